//! A descriptor that an executor watches, and that can move to another executor.

use crate::channel::Interest;
use crate::error::{ErrorKind, error};
use rustix::event::{PollFd as SystemPollFd, PollFlags, Timespec};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::runtime::Handle;

/// A non-blocking descriptor of a socket, pipe or terminal.
#[derive(Debug)]
pub(crate) struct PollFd {
    state: State,
}

#[derive(Debug)]
enum State {
    Attached(AsyncFd<Arc<OwnedFd>>),
    Detached(Arc<OwnedFd>),
    Closed,
}

/// A direction of one operation.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Direction {
    Read,
    Write,
}

impl PollFd {
    /// Makes the descriptor non-blocking and registers it with the current executor.
    ///
    /// # Errors
    /// `PermissionDenied` for what cannot be watched: regular files.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { state: State::Attached(watch(Arc::new(fd))?) })
    }

    /// The descriptor.
    pub fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        Ok(self.shared()?.as_fd())
    }

    /// The descriptor for use from other threads: gone when this one is closed.
    pub fn weak(&self) -> Weak<OwnedFd> {
        self.shared().map(Arc::downgrade).unwrap_or_default()
    }

    fn shared(&self) -> io::Result<&Arc<OwnedFd>> {
        match &self.state {
            State::Attached(watched) => Ok(watched.get_ref()),
            State::Detached(fd) => Ok(fd),
            State::Closed => Err(closed()),
        }
    }

    /// Carries out `operation`, which answers `WouldBlock` when it has to wait. It also says whether it left the
    /// descriptor *drained* (a read that emptied it, a write that filled it), which saves the next call to the kernel:
    /// only where a short transfer proves that, as on TCP sockets.
    pub fn poll_io<T>(
        &self,
        cx: &mut Context<'_>,
        direction: Direction,
        mut operation: impl FnMut(BorrowedFd<'_>) -> io::Result<(T, bool)>,
    ) -> Poll<io::Result<T>> {
        let watched = match &self.state {
            State::Attached(watched) => watched,
            State::Closed => return Poll::Ready(Err(closed())),
            State::Detached(fd) => {
                return match self.now(&mut operation, fd.as_fd()) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => Poll::Ready(Err(detached())),
                    done => Poll::Ready(done),
                };
            }
        };
        loop {
            let mut guard = ready!(poll_guard(watched, cx, direction))?;
            match operation(watched.get_ref().as_fd()) {
                Ok((value, is_drained)) => {
                    if is_drained {
                        guard.clear_ready();
                    }
                    return Poll::Ready(Ok(value));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Carries out `operation` without asking the executor, which may not have looked yet.
    pub fn try_io<T>(
        &self,
        mut operation: impl FnMut(BorrowedFd<'_>) -> io::Result<(T, bool)>,
    ) -> io::Result<T> {
        self.now(&mut operation, self.fd()?)
    }

    fn now<T>(
        &self,
        operation: &mut impl FnMut(BorrowedFd<'_>) -> io::Result<(T, bool)>,
        fd: BorrowedFd<'_>,
    ) -> io::Result<T> {
        loop {
            match operation(fd) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done.map(|(value, _)| value),
            }
        }
    }

    /// Waits until one of the conditions holds, by the state of the kernel and not of the executor's last look.
    pub fn poll_ready(&self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        let watched = match &self.state {
            State::Attached(watched) => watched,
            State::Closed => return Poll::Ready(Err(closed())),
            State::Detached(fd) => {
                let found = now_ready(fd.as_fd(), interest)?;
                return Poll::Ready(if found.is_empty() { Err(detached()) } else { Ok(found) });
            }
        };
        loop {
            let found = now_ready(watched.get_ref().as_fd(), interest)?;
            if !found.is_empty() {
                return Poll::Ready(Ok(found));
            }
            let mut has_waited = false;
            for (condition, direction) in
                [(Interest::READ, Direction::Read), (Interest::WRITE, Direction::Write)]
            {
                if !interest.contains(condition) {
                    continue;
                }
                if let Poll::Ready(guard) = poll_guard(watched, cx, direction) {
                    guard?.clear_ready();
                    has_waited = true;
                }
            }
            if !has_waited {
                return Poll::Pending;
            }
        }
    }

    /// Takes the descriptor off its executor.
    pub fn detach(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Closed) {
            State::Attached(watched) => State::Detached(watched.into_inner()),
            other => other,
        };
    }

    /// Registers the descriptor with another executor.
    pub fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        self.detach();
        let State::Detached(fd) = &self.state else { return Err(closed()) };
        let _context = executor.enter();
        self.state = State::Attached(watch(fd.clone())?);
        Ok(())
    }

    /// Gives the descriptor back to the kernel (as soon as no other thread is acting on it). Says whether it was open.
    pub fn close(&mut self) -> bool {
        !matches!(std::mem::replace(&mut self.state, State::Closed), State::Closed)
    }
}

/// Registers with the current executor, which must have been built with I/O (`enable_io`, `enable_all`).
fn watch(fd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    if Handle::try_current().is_err() {
        return Err(error(
            ErrorKind::Detached,
            "a channel is made inside of a Tokio runtime: enter one first",
        ));
    }
    // SAFETY: the `Arc` keeps the descriptor open for as long as the `AsyncFd` exists, an `OwnedFd` stays the same
    // descriptor for its whole life, and nothing here reaches into the `AsyncFd` to exchange it.
    unsafe { AsyncFd::register(fd) }.map_err(|error| error.into_parts().1)
}

/// The error of operations on a channel closed by this side.
pub(crate) fn closed() -> io::Error {
    error(ErrorKind::Closed, "the channel is closed: open a new one")
}

fn detached() -> io::Error {
    error(
        ErrorKind::Detached,
        "the channel would have to wait but is detached from its executor: attach it to one",
    )
}

type Guard<'a> = AsyncFdReadyGuard<'a, Arc<OwnedFd>>;

fn poll_guard<'a>(
    watched: &'a AsyncFd<Arc<OwnedFd>>,
    cx: &mut Context<'_>,
    direction: Direction,
) -> Poll<io::Result<Guard<'a>>> {
    match direction {
        Direction::Read => watched.poll_read_ready(cx),
        Direction::Write => watched.poll_write_ready(cx),
    }
}

/// What an operation could do now.
pub(crate) fn now_ready(fd: BorrowedFd<'_>, interest: Interest) -> io::Result<Interest> {
    let mut wanted = PollFlags::empty();
    wanted.set(PollFlags::IN, interest.contains(Interest::READ));
    wanted.set(PollFlags::OUT, interest.contains(Interest::WRITE));
    let mut polled = [SystemPollFd::from_borrowed_fd(fd, wanted)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    loop {
        match rustix::event::poll(&mut polled, Some(&at_once)) {
            Err(rustix::io::Errno::INTR) => {}
            done => {
                done?;
                break;
            }
        }
    }
    let found = polled[0].revents();
    // After a hang-up or an error neither direction has to wait: the operation tells what happened.
    let ended = found.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
    let mut ready = Interest::empty();
    ready.set(Interest::READ, ended || found.contains(PollFlags::IN));
    ready.set(Interest::WRITE, ended || found.contains(PollFlags::OUT));
    Ok(ready & interest)
}
