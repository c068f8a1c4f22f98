//! Counting a file's requests that are under way.

use parking_lot::{Condvar, Mutex};
use std::sync::Arc;

/// How many requests of a file are under way.
#[derive(Default)]
pub(crate) struct Pending {
    count: Mutex<usize>,
    none: Condvar,
}

/// One request under way, until it is dropped.
pub(crate) struct PendingGuard(Arc<Pending>);

impl Pending {
    pub(crate) fn enter(self: &Arc<Self>) -> PendingGuard {
        *self.count.lock() += 1;
        PendingGuard(self.clone())
    }

    /// Waits until nothing is under way.
    pub(crate) fn wait_for_none(&self) {
        let mut count = self.count.lock();
        while *count > 0 {
            self.none.wait(&mut count);
        }
    }
}

impl Drop for PendingGuard {
    fn drop(&mut self) {
        let mut count = self.0.count.lock();
        *count -= 1;
        if *count == 0 {
            self.0.none.notify_all();
        }
    }
}
