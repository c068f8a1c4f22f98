//! The socket as a channel.

use super::zero_copy::Outgoing;
use super::{Kind, Socket, address, message, system};
use crate::channel::{
    Base, Channel, Closed, Features, Interest, ReadFlags, Shutdown, WriteFlags, ZeroCopy, stream_of_channel,
};
use crate::control::{Control, Controls};
use crate::descriptors::Descriptors;
use crate::endpoint::{Endpoint, PeerProcess};
use crate::error::{ErrorKind, error};
use crate::poll_fd::Direction;
use crate::stream::scatter;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::runtime::Handle;

impl Channel for Socket {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    fn control(&self) -> Control {
        Control::new(self.controls.clone(), self.reader.clone())
    }

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        mut fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        let count = bufs.len().min(message::SLICES_MAX);
        let (bufs, _) = bufs.split_at_mut(count);
        let room: usize = bufs.iter().map(|buf| buf.len()).sum();
        if room == 0 || self.controls.is_read_ended() {
            return Poll::Ready(self.fd.fd().map(|_| 0));
        }
        if !self.unreported.is_empty() {
            self.fd.fd()?;
            return Poll::Ready(Ok(self.take_unreported(flags, |bytes| scatter(bytes, bufs))));
        }
        let kind = self.kind;
        let mut unreported = 0;
        let receive = |fd: BorrowedFd<'_>| {
            message::receive(fd, kind, bufs, room, fds.as_deref_mut(), flags, &mut unreported)
        };
        let polled = if flags.contains(ReadFlags::NO_WAIT) {
            Poll::Ready(self.fd.try_io(receive))
        } else {
            self.fd.poll_io(cx, Direction::Read, receive)
        };
        if unreported > 0 {
            self.unreported = gather(bufs, unreported);
        }
        polled
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        let bufs = bufs.get(..message::SLICES_MAX).unwrap_or(bufs);
        let total: usize = bufs.iter().map(|buf| buf.len()).sum();
        if total == 0 {
            return Poll::Ready(self.fd.fd().map(|_| 0));
        }
        let no_wait = flags.contains(WriteFlags::NO_WAIT);
        let is_zero_copy = flags.contains(WriteFlags::ZERO_COPY);
        if let Some(sends) = &mut self.zero_copy
            && fds.is_empty()
        {
            return sends.poll_send(cx, &self.fd, Outgoing { bufs, total, is_zero_copy, no_wait });
        }
        if is_zero_copy || (!fds.is_empty() && self.kind != Kind::Unix) {
            return Poll::Ready(Err(
                self.unsupported("does not do what the write asks for: see its features")
            ));
        }
        let kind = self.kind;
        let transmit = |fd: BorrowedFd<'_>| message::transmit(fd, kind, bufs, total, fds);
        if no_wait {
            return Poll::Ready(self.fd.try_io(transmit));
        }
        match self.fd.poll_io(cx, Direction::Write, transmit) {
            // The kernel may not wake who waits at a full socket when its writing is shut down.
            Poll::Pending if self.controls.poll_write_ended(cx) => match self.fd.try_io(transmit) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
                done => Poll::Ready(done),
            },
            polled => polled,
        }
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        if interest.contains(Interest::READ) && !self.unreported.is_empty() {
            return Poll::Ready(self.fd.fd().map(|_| Interest::READ));
        }
        let polled = match &mut self.zero_copy {
            Some(sends) => sends.poll_ready(cx, &self.fd, interest),
            None => self.fd.poll_ready(cx, interest),
        };
        let is_write = interest.contains(Interest::WRITE);
        match polled {
            Poll::Pending if is_write && self.controls.poll_write_ended(cx) => {
                Poll::Ready(Ok(Interest::WRITE))
            }
            polled => polled,
        }
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        if self.fd.fd().is_ok() {
            let flushed = match &mut self.zero_copy {
                Some(sends) => ready!(sends.poll_flush(cx, &self.fd)).map(drop),
                None => Ok(()),
            };
            self.zero_copy = None;
            self.unreported = Vec::new();
            self.fd.close();
            flushed?;
        }
        Poll::Ready(Ok(Closed::default()))
    }

    fn poll_flush_zero_copy(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<ZeroCopy>> {
        match &mut self.zero_copy {
            Some(sends) => sends.poll_flush(cx, &self.fd),
            None => Poll::Ready(self.fd.fd().map(|_| ZeroCopy::Sent)),
        }
    }

    fn detach(&mut self) -> io::Result<()> {
        self.fd.fd()?;
        self.fd.detach();
        if let Some(sends) = &mut self.zero_copy {
            sends.detach();
        }
        Ok(())
    }

    fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        self.fd.attach(executor)?;
        match &mut self.zero_copy {
            Some(sends) => sends.attach(executor),
            None => Ok(()),
        }
    }

    fn local_endpoint(&self) -> io::Result<Endpoint> {
        address::local(self.fd.fd()?)
    }

    fn peer_endpoint(&self) -> io::Result<Endpoint> {
        address::peer(self.fd.fd()?)
    }

    fn peer_process(&self) -> io::Result<PeerProcess> {
        if self.kind != Kind::Unix {
            return Err(self.unsupported("cannot tell the process at its other end: only Unix sockets can"));
        }
        let found = system::peer_credentials(self.fd.fd()?)?;
        match u32::try_from(found.pid) {
            Ok(pid) if pid > 0 => Ok(PeerProcess { pid, uid: found.uid, gid: found.gid }),
            _ if self.features().contains(Features::LISTEN) || self.peer_endpoint().is_err() => Err(error(
                ErrorKind::Unsupported,
                format!("the {} has no peer: it is not connected", self.label()),
            )),
            _ => Err(self.unsupported("has a peer in a process namespace that is not visible from here")),
        }
    }
}

impl Socket {
    /// Gives bytes of a read that failed, which `take` copies.
    fn take_unreported(&mut self, flags: ReadFlags, take: impl FnOnce(&[u8]) -> usize) -> usize {
        let taken = take(&self.unreported);
        if !flags.contains(ReadFlags::PEEK) {
            self.unreported.drain(..taken);
        }
        taken
    }

    /// Nothing waits in a socket channel: the kernel has what was written.
    fn poll_send_buffered(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.fd.fd().map(drop))
    }

    fn poll_end_writing(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.controls.shutdown(Shutdown::Write))
    }
}

/// The first `count` bytes of `bufs`.
fn gather(bufs: &[IoSliceMut<'_>], count: usize) -> Vec<u8> {
    bufs.iter().flat_map(|buf| buf.iter().copied()).take(count).collect()
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buf.remaining() == 0 || this.controls.is_read_ended() {
            return Poll::Ready(this.fd.fd().map(drop));
        }
        if !this.unreported.is_empty() {
            this.fd.fd()?;
            this.take_unreported(ReadFlags::empty(), |bytes| {
                let count = bytes.len().min(buf.remaining());
                buf.put_slice(&bytes[..count]);
                count
            });
            return Poll::Ready(Ok(()));
        }
        let kind = this.kind;
        // SAFETY: the memory is only handed to the kernel, which writes bytes there: nothing of it that was initialised
        // becomes uninitialised.
        let room = unsafe { buf.unfilled_mut() };
        let receive = |fd: BorrowedFd<'_>| message::receive_uninit(fd, kind, room);
        let read = ready!(this.fd.poll_io(cx, Direction::Read, receive))?;
        // SAFETY: the kernel has just written so many bytes at the start of the unfilled part.
        unsafe { buf.assume_init(read) };
        buf.advance(read);
        Poll::Ready(Ok(()))
    }
}

stream_of_channel!(write [] Socket);
