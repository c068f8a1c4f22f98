//! Sends whose pages the kernel takes instead of copying them, and how it tells that it let go of them.
//!
//! The kernel numbers the sends of a socket and reports through the socket's error queue which of them it is through
//! with. A queue that is not empty is an "error" that wakes those who wait to write, for good as Tokio sees it: it would
//! call the socket writable from then on, and a full one would be tried again without end. So writers of such a socket
//! wait on an epoll set of their own with the socket in it, edge-triggered, which Tokio sees as something to read.

use super::{message, system};
use crate::channel::{Interest, ZeroCopy};
use crate::error::{Error, ErrorKind};
use crate::poll_fd::{Direction, PollFd, now_ready};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::task::{Context, Poll, ready};
use tokio::runtime::Handle;

/// The zero-copy sends of one socket, and where its writers wait.
#[derive(Debug)]
pub(super) struct ZeroCopySends {
    counts: Counts,
    gate: Gate,
}

/// How many sends there were, and what became of them.
#[derive(Debug, Default)]
struct Counts {
    /// Handed to the kernel.
    queued: u64,
    /// Of these, those that the kernel is through with.
    completed: u64,
    /// Whether any was handed over, and any went without a copy, since the last flush.
    has_queued: bool,
    has_sent: bool,
}

impl Counts {
    fn in_flight(&self) -> u64 {
        self.queued - self.completed
    }

    fn queue(&mut self) {
        self.queued += 1;
        self.has_queued = true;
    }

    fn complete(&mut self, done: system::Completion) {
        self.completed = self.queued.min(self.completed + u64::from(done.sends));
        self.has_sent |= !done.is_copied;
    }

    /// What a flush answers when nothing is in flight.
    fn take_result(&mut self) -> ZeroCopy {
        let is_copied = self.has_queued && !self.has_sent;
        self.has_queued = false;
        self.has_sent = false;
        if is_copied { ZeroCopy::Copied } else { ZeroCopy::Sent }
    }

    /// Takes what the error queue tells; says whether it told of any send.
    fn reap(&mut self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        let before = self.completed;
        while self.in_flight() > 0 {
            match system::receive_completion(fd) {
                Ok(Some(done)) => self.complete(done),
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(self.completed > before)
    }
}

/// What to send.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outgoing<'a> {
    /// The bytes, `total` in all.
    pub bufs: &'a [IoSlice<'a>],
    pub total: usize,
    /// Whether to send them without a copy.
    pub is_zero_copy: bool,
    /// Whether to answer `WouldBlock` rather than wait.
    pub no_wait: bool,
}

impl ZeroCopySends {
    /// Allows zero-copy sends on the socket. `None` where the kernel has none, or where somebody had allowed them before:
    /// what the error queue tells may be of their sends then.
    pub fn new(socket: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        match system::is_zero_copy(socket) {
            Ok(false) if system::allow_zero_copy(socket).is_ok() => {
                Ok(Some(Self { counts: Counts::default(), gate: Gate::new(socket)? }))
            }
            _ => Ok(None),
        }
    }

    /// Sends some bytes.
    pub fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        socket: &PollFd,
        outgoing: Outgoing<'_>,
    ) -> Poll<io::Result<usize>> {
        let Outgoing { bufs, total, is_zero_copy, no_wait } = outgoing;
        let coop = ready!(tokio::task::coop::poll_proceed(cx));
        let mut has_retried = false;
        loop {
            let sent = socket.try_io(|fd| match is_zero_copy {
                true => Ok((message::transmit_zero_copy(fd, bufs)?, false)),
                false => message::transmit(fd, super::Kind::Tcp, bufs, total, &[]),
            });
            let error = match sent {
                Ok(sent) => {
                    if is_zero_copy && sent > 0 {
                        self.counts.queue();
                    }
                    coop.made_progress();
                    return Poll::Ready(Ok(sent));
                }
                Err(error) => error,
            };
            if error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) {
                // What is through gives memory back. What is not will: wait for it.
                if self.counts.reap(socket.fd()?)? {
                    continue;
                }
                if self.counts.in_flight() == 0 {
                    if has_retried {
                        return Poll::Ready(Err(no_memory(error)));
                    }
                    has_retried = true;
                    continue;
                }
            } else if error.kind() != io::ErrorKind::WouldBlock {
                return Poll::Ready(Err(error));
            }
            if no_wait {
                return Poll::Ready(Err(io::ErrorKind::WouldBlock.into()));
            }
            ready!(self.gate.poll_changed(cx))?;
        }
    }

    /// Waits until the kernel has let go of all pages.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>, socket: &PollFd) -> Poll<io::Result<ZeroCopy>> {
        loop {
            self.counts.reap(socket.fd()?)?;
            if self.counts.in_flight() == 0 {
                return Poll::Ready(Ok(self.counts.take_result()));
            }
            ready!(self.gate.poll_changed(cx))?;
        }
    }

    /// As [`PollFd::poll_ready`], where that what the error queue holds is no news to the user.
    pub fn poll_ready(
        &mut self,
        cx: &mut Context<'_>,
        socket: &PollFd,
        interest: Interest,
    ) -> Poll<io::Result<Interest>> {
        loop {
            let found = self.ready_now(socket.fd()?, interest)?;
            if !found.is_empty() {
                return Poll::Ready(Ok(found));
            }
            let mut has_waited = false;
            if interest.contains(Interest::READ) {
                let counts = &mut self.counts;
                let polled =
                    socket.poll_io(cx, Direction::Read, |fd| match ready_now(counts, fd, Interest::READ)? {
                        found if found.is_empty() => Err(io::ErrorKind::WouldBlock.into()),
                        found => Ok((found, false)),
                    });
                if polled.is_ready() {
                    return polled;
                }
            }
            if interest.contains(Interest::WRITE)
                && let Poll::Ready(changed) = self.gate.poll_changed(cx)
            {
                changed?;
                has_waited = true;
            }
            if !has_waited {
                return Poll::Pending;
            }
        }
    }

    fn ready_now(&mut self, fd: BorrowedFd<'_>, interest: Interest) -> io::Result<Interest> {
        ready_now(&mut self.counts, fd, interest)
    }

    pub fn detach(&mut self) {
        self.gate.set.detach();
    }

    pub fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        self.gate.set.attach(executor)
    }
}

/// What an operation could do now. More may be through between the two looks: then look again.
fn ready_now(counts: &mut Counts, fd: BorrowedFd<'_>, interest: Interest) -> io::Result<Interest> {
    loop {
        counts.reap(fd)?;
        let found = now_ready(fd, interest)?;
        if found.is_empty() || !counts.reap(fd)? {
            return Ok(found);
        }
    }
}

fn no_memory(cause: io::Error) -> io::Error {
    Error::new(
        ErrorKind::ZeroCopyMemory,
        "this process may not lock memory enough for a zero-copy send: raise the limit (`ulimit -l`), or send without \
         ZERO_COPY",
    )
    .because(cause)
    .into()
}

/// Tells of every change of a socket once: that there is room to write again, or news in the error queue.
#[derive(Debug)]
struct Gate {
    set: PollFd,
}

impl Gate {
    fn new(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Errors are always told.
        let events = epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&set, socket, epoll::EventData::new_u64(0), events)?;
        Ok(Self { set: PollFd::new(set)? })
    }

    fn poll_changed(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.set.poll_io(cx, Direction::Read, |set| {
            let mut room = [MaybeUninit::uninit(); 1];
            let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
            let (events, _) = epoll::wait(set, &mut room, Some(&at_once))?;
            if events.is_empty() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(((), false)) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_tells_of_the_sends_since_the_last() {
        let mut counts = Counts::default();
        assert_eq!(counts.take_result(), ZeroCopy::Sent, "there was none");
        for _ in 0..3 {
            counts.queue();
        }
        counts.complete(system::Completion { sends: 1, is_copied: true });
        assert_eq!(counts.in_flight(), 2);
        counts.complete(system::Completion { sends: 2, is_copied: true });
        assert_eq!((counts.in_flight(), counts.take_result()), (0, ZeroCopy::Copied));
        counts.queue();
        counts.queue();
        counts.complete(system::Completion { sends: 1, is_copied: true });
        counts.complete(system::Completion { sends: 1, is_copied: false });
        assert_eq!(counts.take_result(), ZeroCopy::Sent, "one went without a copy");
        assert_eq!(counts.take_result(), ZeroCopy::Sent, "none since");
    }

    #[test]
    fn more_is_never_completed_than_was_queued() {
        let mut counts = Counts::default();
        counts.queue();
        counts.complete(system::Completion { sends: u32::MAX, is_copied: false });
        assert_eq!(counts.in_flight(), 0);
    }
}
