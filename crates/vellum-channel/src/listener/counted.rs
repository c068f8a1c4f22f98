//! Connections that are counted as long as they are open.

use super::Shared;
use crate::channel::{Base, Channel, Closed, Interest, ReadFlags, WriteFlags, ZeroCopy};
use crate::control::Control;
use crate::descriptors::Descriptors;
use crate::endpoint::{Endpoint, PeerProcess};
use std::fmt::{self, Debug, Formatter};
use std::io::{self, IoSlice, IoSliceMut, SeekFrom};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;

/// One of the connections that are open.
pub(super) struct Open {
    shared: Arc<Shared>,
    _place: OwnedSemaphorePermit,
}

impl Open {
    pub fn new(shared: Arc<Shared>, place: OwnedSemaphorePermit) -> Self {
        shared.open.send_modify(|open| *open += 1);
        Self { shared, _place: place }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shared.open.send_modify(|open| *open = open.saturating_sub(1));
    }
}

/// A channel that is counted until it is closed or dropped. Else it is what is inside.
pub(super) struct Counted<C> {
    // Before `open`: the descriptor is free when the place is.
    channel: C,
    open: Option<Open>,
}

impl<C> Counted<C> {
    pub fn new(channel: C, open: Open) -> Self {
        Self { channel, open: Some(open) }
    }
}

impl<C: Channel> Channel for Counted<C> {
    fn base(&self) -> &Base {
        self.channel.base()
    }

    fn base_mut(&mut self) -> &mut Base {
        self.channel.base_mut()
    }

    fn control(&self) -> Control {
        self.channel.control()
    }

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        self.channel.poll_readv(cx, bufs, fds, flags)
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        self.channel.poll_writev(cx, bufs, fds, flags)
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        self.channel.poll_ready(cx, interest)
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        let closed = ready!(self.channel.poll_close(cx));
        self.open = None;
        Poll::Ready(closed)
    }

    fn poll_flush_zero_copy(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<ZeroCopy>> {
        self.channel.poll_flush_zero_copy(cx)
    }

    fn poll_seek(&mut self, cx: &mut Context<'_>, to: SeekFrom) -> Poll<io::Result<u64>> {
        self.channel.poll_seek(cx, to)
    }

    fn poll_preadv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        self.channel.poll_preadv(cx, bufs, offset)
    }

    fn poll_pwritev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        self.channel.poll_pwritev(cx, bufs, offset)
    }

    fn detach(&mut self) -> io::Result<()> {
        self.channel.detach()
    }

    fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        self.channel.attach(executor)
    }

    fn local_endpoint(&self) -> io::Result<Endpoint> {
        self.channel.local_endpoint()
    }

    fn peer_endpoint(&self) -> io::Result<Endpoint> {
        self.channel.peer_endpoint()
    }

    fn peer_process(&self) -> io::Result<PeerProcess> {
        self.channel.peer_process()
    }

    fn set_blocking(&mut self, is_blocking: bool) {
        self.channel.set_blocking(is_blocking);
    }
}

impl<C: Channel> AsyncRead for Counted<C> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().channel).poll_read(cx, buf)
    }
}

impl<C: Channel> AsyncWrite for Counted<C> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().channel).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().channel).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.channel.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().channel).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().channel).poll_shutdown(cx)
    }
}

impl<C: Debug> Debug for Counted<C> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.channel.fmt(f)
    }
}
