//! What acts on a TLS channel from any thread, and who waits for it.

use crate::channel::Shutdown;
use crate::control::{Control, Controls};
use crate::error::ErrorKind;
use parking_lot::Mutex;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};

/// Forwards to the channel below, and knows which directions this side has ended.
#[derive(Debug)]
pub(super) struct TlsControls {
    below: Control,
    is_read_ended: AtomicBool,
    is_write_ended: AtomicBool,
}

impl TlsControls {
    pub fn new(below: Control) -> Self {
        Self { below, is_read_ended: AtomicBool::new(false), is_write_ended: AtomicBool::new(false) }
    }

    /// Whether this side has shut down reading.
    pub fn is_read_ended(&self) -> bool {
        self.is_read_ended.load(Ordering::Acquire)
    }

    /// Whether this side has shut down writing, without a goodbye.
    pub fn is_write_ended(&self) -> bool {
        self.is_write_ended.load(Ordering::Acquire)
    }

    fn mark(&self, how: Shutdown, is_ended: bool) {
        if how.reads() {
            self.is_read_ended.store(is_ended, Ordering::Release);
        }
        if how.writes() {
            self.is_write_ended.store(is_ended, Ordering::Release);
        }
    }
}

impl Controls for TlsControls {
    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        // Before the channel below wakes anyone, so that they find it.
        self.mark(how, true);
        let done = self.below.shutdown(how);
        if done.as_ref().is_err_and(|error| crate::kind_of(error) == Some(ErrorKind::Unsupported)) {
            self.mark(how, false);
        }
        done
    }

    fn set_delay(&self, is_allowed: bool) {
        self.below.set_delay(is_allowed);
    }

    fn set_cork(&self, is_on: bool) {
        self.below.set_cork(is_on);
    }
}

/// The tasks that wait for the channel below.
///
/// Both the reader and the writer of a TLS channel write to it: the reader to pass on what the protocol itself has to
/// say, or what a writer left behind. Since a channel wakes only the last task that was polled in a direction, what is
/// registered below is this, and it wakes both.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    tasks: Mutex<Tasks>,
}

#[derive(Debug, Default)]
struct Tasks {
    /// Waits to write what is in the buffer.
    writer: Option<Waker>,
    /// Reads, and would pass on what is in the buffer.
    helper: Option<Waker>,
    /// Waits for the channel below to become readable.
    reader: Option<Waker>,
}

impl Waiting {
    /// The waker to register for writing below.
    pub fn waker(self: &Arc<Self>) -> Waker {
        Waker::from(self.clone())
    }

    pub fn add_writer(&self, task: &Waker) {
        remember(&mut self.tasks.lock().writer, task);
    }

    pub fn add_helper(&self, task: &Waker) {
        remember(&mut self.tasks.lock().helper, task);
    }

    pub fn add_reader(&self, task: &Waker) {
        remember(&mut self.tasks.lock().reader, task);
    }

    /// Lets the reader look again: what it had registered below may be gone.
    pub fn wake_reader(&self) {
        let reader = self.tasks.lock().reader.take();
        if let Some(task) = reader {
            task.wake();
        }
    }

    /// Lets everyone look again.
    pub fn wake_all(&self) {
        let Tasks { writer, helper, reader } = std::mem::take(&mut *self.tasks.lock());
        for task in [writer, helper, reader].into_iter().flatten() {
            task.wake();
        }
    }
}

fn remember(place: &mut Option<Waker>, task: &Waker) {
    match place {
        Some(known) => known.clone_from(task),
        None => *place = Some(task.clone()),
    }
}

impl Wake for Waiting {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut tasks = self.tasks.lock();
        let woken = [tasks.writer.take(), tasks.helper.take()];
        drop(tasks);
        for task in woken.into_iter().flatten() {
            task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn writer_and_helper_are_both_woken_and_once() {
        let (waiting, writer, helper) =
            (Arc::<Waiting>::default(), Arc::<Count>::default(), Arc::<Count>::default());
        waiting.add_writer(&Waker::from(writer.clone()));
        waiting.add_helper(&Waker::from(helper.clone()));
        let below = waiting.waker();
        below.wake_by_ref();
        below.wake();
        assert_eq!((writer.0.load(Ordering::Relaxed), helper.0.load(Ordering::Relaxed)), (1, 1));
    }
}
