//! A WebSocket as a channel.

use super::WebSocket;
use crate::channel::{Base, Channel, Closed, Interest, ReadFlags, Shutdown, WriteFlags, stream_of_channel};
use crate::control::{Control, Controls};
use crate::descriptors::Descriptors;
use crate::endpoint::{Endpoint, PeerProcess};
use crate::error::{ErrorKind, kind_of};
use crate::poll_fd::closed;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use tokio::runtime::Handle;

/// Acts on the inner channel, and remembers what that means for the end of the stream.
#[derive(Debug)]
pub(super) struct InnerControls {
    inner: Control,
    is_read_ended: AtomicBool,
}

impl InnerControls {
    pub fn new(inner: Control) -> Self {
        Self { inner, is_read_ended: AtomicBool::new(false) }
    }

    /// Whether this side has ended reading: the end of the stream is then no surprise.
    pub fn is_read_ended(&self) -> bool {
        self.is_read_ended.load(Ordering::Acquire)
    }
}

impl Controls for InnerControls {
    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let before = self.is_read_ended.fetch_or(how.reads(), Ordering::AcqRel);
        let done = self.inner.shutdown(how);
        if done.is_err() {
            self.is_read_ended.fetch_and(before, Ordering::AcqRel);
        }
        done
    }

    fn set_delay(&self, is_allowed: bool) {
        self.inner.set_delay(is_allowed);
    }

    fn set_cork(&self, is_on: bool) {
        self.inner.set_cork(is_on);
    }
}

impl<C: Channel> WebSocket<C> {
    pub(super) fn check_open(&self) -> io::Result<()> {
        if self.closing.is_closed() { Err(closed()) } else { Ok(()) }
    }

    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = self.poll_payload(cx);
        self.push_answers(cx, WriteFlags::empty());
        match polled {
            Poll::Ready(Err(error)) if kind_of(&error) == Some(ErrorKind::Detached) => {
                Poll::Ready(Err(error))
            }
            Poll::Ready(Err(error)) => {
                // The read tells.
                self.read_error = Some(error);
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Ok(_)) => Poll::Ready(Ok(())),
            // A silent peer is told by the read, too.
            Poll::Pending => self.poll_keep_alive(cx).map(|_| Ok(())),
        }
    }
}

impl<C: Channel> Channel for WebSocket<C> {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    fn control(&self) -> Control {
        Control::new(self.controls.clone(), self.inner.control().reader().clone())
    }

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        _fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        self.check_open()?;
        let room = bufs.iter().fold(0_usize, |room, buf| room.saturating_add(buf.len()));
        if room == 0 {
            return Poll::Ready(Ok(0));
        }
        let polled = self.poll_input(cx, bufs, room, flags);
        let no_wait = flags.contains(ReadFlags::NO_WAIT);
        self.push_answers(cx, if no_wait { WriteFlags::NO_WAIT } else { WriteFlags::empty() });
        if polled.is_pending() { self.poll_keep_alive(cx) } else { polled }
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        _fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        self.check_open()?;
        self.poll_message(cx, bufs, flags)
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        self.check_open()?;
        let mut found = Interest::empty();
        if interest.contains(Interest::READ)
            && let Poll::Ready(done) = self.poll_readable(cx)
        {
            done?;
            found |= Interest::READ;
        }
        if interest.contains(Interest::WRITE)
            && let Poll::Ready(done) = self.poll_room(cx)
        {
            done?;
            found |= Interest::WRITE;
        }
        if found.is_empty() { Poll::Pending } else { Poll::Ready(Ok(found)) }
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        self.poll_close_all(cx)
    }

    fn detach(&mut self) -> io::Result<()> {
        self.inner.detach()?;
        self.closing.detach();
        if let Some(keep_alive) = &mut self.keep_alive {
            keep_alive.detach();
        }
        Ok(())
    }

    fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        self.detach()?;
        self.inner.attach(executor)
    }

    fn local_endpoint(&self) -> io::Result<Endpoint> {
        self.inner.local_endpoint()
    }

    fn peer_endpoint(&self) -> io::Result<Endpoint> {
        self.inner.peer_endpoint()
    }

    fn peer_process(&self) -> io::Result<PeerProcess> {
        self.inner.peer_process()
    }
}

stream_of_channel!([C: Channel] WebSocket<C>);
