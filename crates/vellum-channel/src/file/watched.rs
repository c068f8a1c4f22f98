//! Pipes, terminals and the character devices that an executor can watch.

use crate::channel::{Interest, ReadFlags, WriteFlags};
use crate::poll_fd::{Direction, PollFd};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::task::{Context, Poll};
use tokio::runtime::Handle;

#[derive(Debug)]
pub(crate) struct Watched {
    fd: PollFd,
    /// A short transfer proves a pipe empty, or full. It proves nothing of a terminal, which gives line by line.
    is_pipe: bool,
    /// It was in blocking mode when it came, and may be shared with other processes: put back in the end.
    was_blocking: bool,
}

impl Watched {
    /// Watches the descriptor.
    ///
    /// # Errors
    /// `PermissionDenied` for what cannot be watched.
    pub(crate) fn new(fd: OwnedFd, is_pipe: bool) -> io::Result<Self> {
        let mode = rustix::fs::fcntl_getfl(&fd)?;
        let was_blocking = !mode.contains(OFlags::NONBLOCK);
        // Pipes in packet mode end every read at the end of a packet.
        let is_pipe = is_pipe && !mode.contains(OFlags::DIRECT);
        Ok(Self { fd: PollFd::new(fd)?, is_pipe, was_blocking })
    }

    /// The descriptor is of this channel only: its mode does not matter to others.
    pub(crate) fn set_own(&mut self) {
        self.was_blocking = false;
    }

    pub(crate) fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.fd.fd()
    }

    pub(crate) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        let total: usize = bufs.iter().map(|buf| buf.len()).sum();
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        let is_pipe = self.is_pipe;
        let mut read = |fd: BorrowedFd<'_>| {
            let count = rustix::io::readv(fd, bufs)?;
            Ok((count, is_pipe && (1..total).contains(&count)))
        };
        if !flags.contains(ReadFlags::NO_WAIT) {
            return self.fd.poll_io(cx, Direction::Read, read);
        }
        match self.fd.try_io(&mut read) {
            // Also said of a FIFO that nobody has opened for writing yet: only a hang-up is the end.
            Ok(0) if self.fd.poll_ready(cx, Interest::READ)?.is_pending() => {
                Poll::Ready(Err(io::ErrorKind::WouldBlock.into()))
            }
            done => Poll::Ready(done),
        }
    }

    pub(crate) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        let total: usize = bufs.iter().map(|buf| buf.len()).sum();
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        let is_pipe = self.is_pipe;
        let write = |fd: BorrowedFd<'_>| match rustix::io::writev(fd, bufs) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::WriteZero, "the file takes no bytes")),
            Err(Errno::PIPE) => {
                Err(io::Error::new(io::ErrorKind::BrokenPipe, "nobody reads the pipe any more"))
            }
            Ok(count) => Ok((count, is_pipe && count < total)),
            Err(error) => Err(error.into()),
        };
        if flags.contains(WriteFlags::NO_WAIT) {
            Poll::Ready(self.fd.try_io(write))
        } else {
            self.fd.poll_io(cx, Direction::Write, write)
        }
    }

    pub(crate) fn poll_ready(&self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        self.fd.poll_ready(cx, interest)
    }

    /// Gives the descriptor back, in the mode that it came in.
    pub(crate) fn close(&mut self) {
        if self.was_blocking
            && let Ok(fd) = self.fd.fd()
            && let Ok(mode) = rustix::fs::fcntl_getfl(fd)
        {
            // A courtesy to the other owners of the open file, which cannot be insisted on.
            let _ = rustix::fs::fcntl_setfl(fd, mode - OFlags::NONBLOCK);
        }
        self.fd.close();
    }

    pub(crate) fn detach(&mut self) {
        self.fd.detach();
    }

    pub(crate) fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        self.fd.attach(executor)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.close();
    }
}
