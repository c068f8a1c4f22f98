//! A callback whenever a channel becomes ready.

use crate::channel::{Channel, Interest};
use crate::ext::ChannelExt;
use crate::shared::Shared;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

/// A registered callback. Dropping it removes it; [`Watch::leave`] lets it run for as long as it wants.
#[derive(Debug)]
pub struct Watch {
    task: AbortHandle,
    is_removed: Arc<AtomicBool>,
    is_left: bool,
}

impl Watch {
    /// Calls `callback` on `executor` whenever one of the conditions holds: again and again for as long as it does, so
    /// it should read or write until the channel would block. It is over when the callback answers `Break`, after the
    /// callback got an error, or when the watch is removed; then the callback is dropped with what it owns.
    ///
    /// The callback gets the channel and may do what it likes with it but wait: set the handle non-blocking.
    pub fn add<C, F>(mut channel: Shared<C>, interest: Interest, executor: &Handle, mut callback: F) -> Self
    where
        C: Channel + ?Sized + 'static,
        F: FnMut(&mut Shared<C>, io::Result<Interest>) -> ControlFlow<()> + Send + 'static,
    {
        let is_removed = Arc::new(AtomicBool::new(false));
        let removed = is_removed.clone();
        let task = executor.spawn(async move {
            loop {
                let found = channel.ready(interest).await;
                if removed.load(Ordering::Acquire) {
                    return;
                }
                // Empty: somebody used `wake_reader`, which is not for watches.
                if found.as_ref().is_ok_and(|found| found.is_empty()) {
                    continue;
                }
                let has_failed = found.is_err();
                if callback(&mut channel, found).is_break() || has_failed {
                    return;
                }
                tokio::task::yield_now().await;
            }
        });
        Self { task: task.abort_handle(), is_removed, is_left: false }
    }

    /// Ends it. The callback is not called any more once this returns; one that runs in another thread right now is
    /// finished first by that thread.
    pub fn remove(self) {}

    /// Lets it run until its callback ends it.
    pub fn leave(mut self) {
        self.is_left = true;
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.task.is_finished()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.is_left {
            self.is_removed.store(true, Ordering::Release);
            self.task.abort();
        }
    }
}
