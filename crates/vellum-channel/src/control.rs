//! What acts on a channel from any thread.

use crate::channel::Shutdown;
use parking_lot::Mutex;
use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Waker};

/// The channel's part of a [`Control`]. Every method is quick, never waits, and may be called at any time.
pub trait Controls: Debug + Send + Sync {
    /// Ends one or both directions, and wakes whoever waits there.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where the channel has no such thing,
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed) when it is closed.
    fn shutdown(&self, how: Shutdown) -> io::Result<()>;

    /// Whether small writes may wait to be merged (`TCP_NODELAY` turned round). A hint.
    fn set_delay(&self, _is_allowed: bool) {}

    /// While on, what is written is held back until there is enough for whole packets (`TCP_CORK`). A hint.
    fn set_cork(&self, _is_on: bool) {}
}

/// Acts on a channel while other tasks read and write it: clone it, send it anywhere. It does not keep the channel open.
#[derive(Clone, Debug)]
pub struct Control {
    controls: Arc<dyn Controls>,
    reader: Arc<WakeReader>,
}

impl Control {
    /// For implementers: the channel's part, and what [`ChannelExt::ready`](crate::ChannelExt::ready) waits with.
    pub fn new(controls: Arc<dyn Controls>, reader: Arc<WakeReader>) -> Self {
        Self { controls, reader }
    }

    /// Ends one or both directions, and wakes whoever waits there. See [`Controls::shutdown`].
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.controls.shutdown(how)
    }

    /// Whether small writes may wait to be merged. See [`Controls::set_delay`].
    pub fn set_delay(&self, is_allowed: bool) {
        self.controls.set_delay(is_allowed);
    }

    /// Holds back what is written until it is turned off. See [`Controls::set_cork`].
    pub fn set_cork(&self, is_on: bool) {
        self.controls.set_cork(is_on);
    }

    /// Makes a task that waits in [`ChannelExt::ready`](crate::ChannelExt::ready) for the channel to become readable
    /// return with nothing, and the next one that would.
    pub fn wake_reader(&self) {
        self.reader.wake();
    }

    /// What a waiting reader registers with.
    pub(crate) fn reader(&self) -> &Arc<WakeReader> {
        &self.reader
    }
}

/// Lets any thread interrupt a task that waits for a channel to become readable.
#[derive(Debug, Default)]
pub struct WakeReader {
    is_woken: AtomicBool,
    waiting: Mutex<Option<Waker>>,
}

impl WakeReader {
    fn wake(&self) {
        self.is_woken.store(true, Ordering::Release);
        let waiting = self.waiting.lock().take();
        if let Some(waker) = waiting {
            waker.wake();
        }
    }

    /// Whether it was woken since the last call; if not, `cx` is woken when it is.
    pub(crate) fn poll(&self, cx: &Context<'_>) -> bool {
        let mut waiting = self.waiting.lock();
        if self.is_woken.swap(false, Ordering::Acquire) {
            return true;
        }
        match &mut *waiting {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
        false
    }
}
