//! One channel, many tasks.

use crate::channel::{Base, Channel, Closed, Interest, ReadFlags, WriteFlags, ZeroCopy, stream_of_channel};
use crate::control::Control;
use crate::descriptors::Descriptors;
use crate::endpoint::{Endpoint, PeerProcess};
use crate::error::{ErrorKind, kind_of};
use parking_lot::Mutex;
use std::fmt::{self, Debug};
use std::io::{self, IoSlice, IoSliceMut, SeekFrom};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use tokio::io::AsyncRead;
use tokio::runtime::Handle;

/// A handle of a channel that several tasks use: clone it. Any number of them may wait in either direction.
///
/// Each handle has a mode (blocking or not) and a name of its own, which start as the channel's. Single operations of
/// several tasks follow one another; those that transfer *all* bytes are made of many, so two tasks that read, or two
/// that write, need an agreement of their own. The channel is closed by [`close`](crate::ChannelExt::close) on any
/// handle, and when the last one is dropped.
pub struct Shared<C: ?Sized> {
    base: Base,
    readers: Arc<Waiters>,
    writers: Arc<Waiters>,
    channel: Arc<Mutex<C>>,
}

impl<C: Channel> Shared<C> {
    /// Makes the channel one that can be shared.
    pub fn new(channel: C) -> Self {
        Self {
            base: channel.base().clone(),
            readers: Arc::default(),
            writers: Arc::default(),
            channel: Arc::new(Mutex::new(channel)),
        }
    }

    /// The channel, if this is its only handle; otherwise the handle.
    ///
    /// # Errors
    /// Other handles exist: this one is given back.
    pub fn try_into_inner(self) -> Result<C, Self> {
        let Self { base, readers, writers, channel } = self;
        match Arc::try_unwrap(channel) {
            Ok(channel) => Ok(channel.into_inner()),
            Err(channel) => Err(Self { base, readers, writers, channel }),
        }
    }
}

impl<C: Channel + ?Sized> Shared<C> {
    /// Carries out one poll for the task of `cx`, with a waker in its place that wakes all who wait in this direction.
    fn poll<T>(
        &self,
        waiters: &Arc<Waiters>,
        cx: &Context<'_>,
        operation: impl FnOnce(&mut C, &mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let mut channel = self.channel.lock();
        waiters.add(cx.waker());
        let waker = Waker::from(waiters.clone());
        let polled = operation(&mut channel, &mut Context::from_waker(&waker));
        if polled.is_ready() {
            waiters.remove(cx.waker());
        }
        polled
    }

    fn wake_all(&self) {
        self.readers.wake_by_ref();
        self.writers.wake_by_ref();
    }

    fn poll_send_buffered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(&self.writers, cx, |channel, cx| Pin::new(channel).poll_flush(cx))
    }

    fn poll_end_writing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(&self.writers, cx, |channel, cx| Pin::new(channel).poll_shutdown(cx))
    }
}

impl<C: ?Sized> Clone for Shared<C> {
    fn clone(&self) -> Self {
        Self {
            base: self.base.clone(),
            readers: self.readers.clone(),
            writers: self.writers.clone(),
            channel: self.channel.clone(),
        }
    }
}

impl<C: ?Sized> Debug for Shared<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("base", &self.base).finish_non_exhaustive()
    }
}

/// The tasks that wait in one direction.
#[derive(Debug, Default)]
struct Waiters(Mutex<Vec<Waker>>);

impl Waiters {
    fn add(&self, waker: &Waker) {
        let mut waiting = self.0.lock();
        if !waiting.iter().any(|known| known.will_wake(waker)) {
            waiting.push(waker.clone());
        }
    }

    fn remove(&self, waker: &Waker) {
        self.0.lock().retain(|known| !known.will_wake(waker));
    }
}

impl Wake for Waiters {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let waiting = std::mem::take(&mut *self.0.lock());
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// What two directions that are waited for come to. One that the channel does not have is not, if there is the other.
fn either(one: Poll<io::Result<Interest>>, other: Poll<io::Result<Interest>>) -> Poll<io::Result<Interest>> {
    let is_missing = |error: &io::Error| kind_of(error) == Some(ErrorKind::Unsupported);
    match (one, other) {
        (Poll::Ready(Ok(one)), Poll::Ready(Ok(other))) => Poll::Ready(Ok(one | other)),
        (Poll::Ready(Err(error)), other) if is_missing(&error) => other,
        (one, Poll::Ready(Err(error))) if is_missing(&error) => one,
        (Poll::Pending, other) => other,
        (one, _) => one,
    }
}

impl<C: Channel + ?Sized> Channel for Shared<C> {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    fn control(&self) -> Control {
        self.channel.lock().control()
    }

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        self.poll(&self.readers, cx, |channel, cx| channel.poll_readv(cx, bufs, fds, flags))
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        self.poll(&self.writers, cx, |channel, cx| channel.poll_writev(cx, bufs, fds, flags))
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        if !interest.contains(Interest::READ) {
            return self.poll(&self.writers, cx, |channel, cx| channel.poll_ready(cx, interest));
        }
        let mut found = self.poll(&self.readers, cx, |channel, cx| channel.poll_ready(cx, Interest::READ));
        if interest.contains(Interest::WRITE) {
            let writable =
                self.poll(&self.writers, cx, |channel, cx| channel.poll_ready(cx, Interest::WRITE));
            found = either(found, writable);
        }
        found
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        let polled = self.poll(&self.writers, cx, |channel, cx| channel.poll_close(cx));
        if polled.is_ready() {
            self.wake_all();
        }
        polled
    }

    fn poll_flush_zero_copy(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<ZeroCopy>> {
        self.poll(&self.writers, cx, |channel, cx| channel.poll_flush_zero_copy(cx))
    }

    fn poll_seek(&mut self, cx: &mut Context<'_>, to: SeekFrom) -> Poll<io::Result<u64>> {
        self.poll(&self.writers, cx, |channel, cx| channel.poll_seek(cx, to))
    }

    fn poll_preadv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        self.poll(&self.readers, cx, |channel, cx| channel.poll_preadv(cx, bufs, offset))
    }

    fn poll_pwritev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        self.poll(&self.writers, cx, |channel, cx| channel.poll_pwritev(cx, bufs, offset))
    }

    /// Tasks that wait go on waiting, and are woken by the next attach.
    fn detach(&mut self) -> io::Result<()> {
        self.channel.lock().detach()
    }

    fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        let attached = self.channel.lock().attach(executor);
        self.wake_all();
        attached
    }

    fn local_endpoint(&self) -> io::Result<Endpoint> {
        self.channel.lock().local_endpoint()
    }

    fn peer_endpoint(&self) -> io::Result<Endpoint> {
        self.channel.lock().peer_endpoint()
    }

    fn peer_process(&self) -> io::Result<PeerProcess> {
        self.channel.lock().peer_process()
    }
}

impl<C: Channel + ?Sized> AsyncRead for Shared<C> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll(&self.readers, cx, |channel, cx| Pin::new(channel).poll_read(cx, buf))
    }
}

stream_of_channel!(write [C: Channel + ?Sized] Shared<C>);
