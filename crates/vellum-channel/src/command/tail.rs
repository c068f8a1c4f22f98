//! The end of what a child writes to its standard error.

use crate::channel::ReadFlags;
use crate::error::{ErrorKind, kind_of};
use crate::file::Watched;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::process::ChildStderr;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use tokio::runtime::Handle;

/// Reads that one poll makes at most.
const READS_MAX: usize = 16;

/// Who waits for the child.
#[derive(Clone, Copy, Debug)]
pub(super) enum Waiter {
    Reader = 0,
    Writer = 1,
    Other = 2,
}

/// Reads along while somebody waits for the child, so that it never waits for its standard error to be read, and keeps
/// the last bytes.
#[derive(Debug)]
pub(super) struct Tail {
    fd: Watched,
    is_ended: bool,
    kept: VecDeque<u8>,
    limit: usize,
    waiters: Arc<Waiters>,
    waker: Waker,
}

/// All who wait, of whom any can read along.
#[derive(Debug, Default)]
struct Waiters(Mutex<[Option<Waker>; 3]>);

impl Wake for Waiters {
    fn wake(self: Arc<Self>) {
        let waiting = std::mem::take(&mut *self.0.lock());
        waiting.into_iter().flatten().for_each(Waker::wake);
    }
}

impl Tail {
    pub(super) fn new(stderr: ChildStderr, limit: usize) -> std::io::Result<Self> {
        let mut fd = Watched::new(stderr.into(), true)?;
        fd.set_own();
        let waiters = Arc::<Waiters>::default();
        let waker = Waker::from(waiters.clone());
        Ok(Self { fd, is_ended: false, kept: VecDeque::new(), limit, waiters, waker })
    }

    /// Reads what is there; `waiter`, who waits for something else, is woken when there is more.
    pub(super) fn drain(&mut self, cx: &mut Context<'_>, waiter: Waiter) {
        if self.is_ended {
            return;
        }
        match &mut self.waiters.0.lock()[waiter as usize] {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
        let waker = self.waker.clone();
        if !self.read(&mut Context::from_waker(&waker), ReadFlags::empty()) {
            cx.waker().wake_by_ref();
        }
    }

    /// Reads what is left when the child has ended.
    pub(super) fn drain_rest(&mut self) {
        let mut context = Context::from_waker(Waker::noop());
        if !self.is_ended {
            self.read(&mut context, ReadFlags::NO_WAIT);
        }
        self.is_ended = true;
        self.fd.close();
    }

    /// False if there may be more.
    fn read(&mut self, cx: &mut Context<'_>, flags: ReadFlags) -> bool {
        let mut room = [0; 4096];
        for _ in 0..READS_MAX {
            match self.fd.poll_read(cx, &mut [IoSliceMut::new(&mut room)], flags) {
                Poll::Pending => return true,
                Poll::Ready(Ok(count)) if count > 0 => self.keep(&room[..count]),
                Poll::Ready(Err(error))
                    if kind_of(&error) == Some(ErrorKind::Detached)
                        || error.kind() == std::io::ErrorKind::WouldBlock =>
                {
                    return true;
                }
                Poll::Ready(_) => {
                    self.is_ended = true;
                    self.fd.close();
                    return true;
                }
            }
        }
        false
    }

    fn keep(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(self.limit)..];
        let surplus = (self.kept.len() + bytes.len()).saturating_sub(self.limit);
        self.kept.drain(..surplus);
        self.kept.extend(bytes);
    }

    /// What was kept, as text that is safe to show.
    pub(super) fn text(&self) -> String {
        let bytes: Vec<u8> = self.kept.iter().copied().collect();
        let is_shown = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
        let safe = |c| if is_shown(c) { c } else { char::REPLACEMENT_CHARACTER };
        String::from_utf8_lossy(&bytes).trim_end().chars().map(safe).collect()
    }

    pub(super) fn detach(&mut self) {
        self.fd.detach();
    }

    pub(super) fn attach(&mut self, executor: &Handle) -> std::io::Result<()> {
        if self.is_ended { Ok(()) } else { self.fd.attach(executor) }
    }
}
