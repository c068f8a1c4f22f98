//! The blocking face of channels.

use crate::channel::{Channel, Closed, Interest, ReadFlags, WriteFlags, ZeroCopy};
use crate::descriptors::Descriptors;
use crate::ext::ChannelExt;
use crate::shared::Shared;
use std::future::Future;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use tokio::io::AsyncWriteExt;
use tokio::runtime::{Builder, Handle, Runtime};

/// A channel for threads that may block: `std::io`'s traits, and the operations of [`ChannelExt`].
///
/// It waits in the calling thread, without another one behind it. In non-blocking mode
/// ([`Channel::set_blocking`]) what transfers *some* bytes answers `WouldBlock` instead. Not for async code: there it
/// panics, as every wait inside of an executor does.
#[derive(Debug)]
pub struct Blocking<C> {
    channel: C,
    executor: Executor,
}

#[derive(Clone, Debug)]
enum Executor {
    Own(Arc<Runtime>),
    Other(Handle),
}

impl Executor {
    fn own() -> io::Result<Self> {
        Ok(Self::Own(Arc::new(Builder::new_current_thread().enable_all().build()?)))
    }

    fn block_on<F: Future>(&self, future: F) -> F::Output {
        match self {
            Self::Own(runtime) => runtime.block_on(future),
            Self::Other(handle) => handle.block_on(future),
        }
    }
}

impl<C: Channel> Blocking<C> {
    /// Takes a channel from wherever it is attached.
    ///
    /// # Errors
    /// The channel cannot leave its executor ([`Stream`](crate::Stream)): use [`Blocking::on`].
    pub fn new(mut channel: C) -> io::Result<Self> {
        let executor = Executor::own()?;
        if let Executor::Own(runtime) = &executor {
            channel.attach(runtime.handle())?;
        }
        Ok(Self { channel, executor })
    }

    /// Makes a channel, by a connect for example, and waits for it.
    ///
    /// # Errors
    /// Those of `making`.
    pub fn open(making: impl Future<Output = io::Result<C>>) -> io::Result<Self> {
        let executor = Executor::own()?;
        let channel = executor.block_on(making)?;
        Ok(Self { channel, executor })
    }

    /// Uses the channel where it is attached: `executor` must be that one, and have threads of its own.
    pub fn on(executor: Handle, channel: C) -> Self {
        Self { channel, executor: Executor::Other(executor) }
    }

    /// The channel, to be attached to another executor.
    ///
    /// # Errors
    /// Those of [`Channel::detach`].
    pub fn into_inner(self) -> io::Result<C> {
        let mut channel = self.channel;
        if let Executor::Own(_) = self.executor {
            channel.detach()?;
        }
        Ok(channel)
    }

    /// A channel that several threads use: clone it.
    pub fn into_shared(self) -> Blocking<Shared<C>> {
        Blocking { channel: Shared::new(self.channel), executor: self.executor }
    }

    /// The channel, for what does not wait: features, control, mode, name.
    pub fn channel(&self) -> &C {
        &self.channel
    }

    /// The same, to change.
    pub fn channel_mut(&mut self) -> &mut C {
        &mut self.channel
    }

    /// Waits for any asynchronous operation on the channel.
    pub fn run<'a, F: Future + 'a>(&'a mut self, operation: impl FnOnce(&'a mut C) -> F) -> F::Output {
        self.executor.block_on(operation(&mut self.channel))
    }

    /// See [`Channel::set_blocking`].
    pub fn set_blocking(&mut self, is_blocking: bool) {
        self.channel.set_blocking(is_blocking);
    }

    /// See [`ChannelExt::readv_full`].
    pub fn readv_full(
        &mut self,
        bufs: &mut [IoSliceMut<'_>],
        fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> io::Result<usize> {
        self.executor.block_on(self.channel.readv_full(bufs, fds, flags))
    }

    /// See [`ChannelExt::writev_full`].
    pub fn writev_full(
        &mut self,
        bufs: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> io::Result<usize> {
        self.executor.block_on(self.channel.writev_full(bufs, fds, flags))
    }

    /// See [`ChannelExt::peek`].
    pub fn peek(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.executor.block_on(self.channel.peek(buf))
    }

    /// See [`ChannelExt::readv_full_all_eof`]. Waits in either mode.
    pub fn readv_full_all_eof(
        &mut self,
        bufs: &mut [IoSliceMut<'_>],
        fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> io::Result<bool> {
        self.executor.block_on(self.channel.readv_full_all_eof(bufs, fds, flags))
    }

    /// See [`ChannelExt::readv_full_all`]. Waits in either mode.
    pub fn readv_full_all(
        &mut self,
        bufs: &mut [IoSliceMut<'_>],
        fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> io::Result<()> {
        self.executor.block_on(self.channel.readv_full_all(bufs, fds, flags))
    }

    /// See [`ChannelExt::readv_all_eof`]. Waits in either mode.
    pub fn readv_all_eof(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<bool> {
        self.executor.block_on(self.channel.readv_all_eof(bufs))
    }

    /// See [`ChannelExt::readv_all`]. Waits in either mode.
    pub fn readv_all(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        self.executor.block_on(self.channel.readv_all(bufs))
    }

    /// See [`ChannelExt::read_all_eof`]. Waits in either mode.
    pub fn read_all_eof(&mut self, buf: &mut [u8]) -> io::Result<bool> {
        self.executor.block_on(self.channel.read_all_eof(buf))
    }

    /// See [`ChannelExt::read_all`]. Waits in either mode.
    pub fn read_all(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.executor.block_on(self.channel.read_all(buf))
    }

    /// See [`ChannelExt::writev_full_all`]. Waits in either mode.
    pub fn writev_full_all(
        &mut self,
        bufs: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> io::Result<()> {
        self.executor.block_on(self.channel.writev_full_all(bufs, fds, flags))
    }

    /// See [`ChannelExt::writev_all`]. Waits in either mode.
    pub fn writev_all(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<()> {
        self.executor.block_on(self.channel.writev_all(bufs))
    }

    /// See [`ChannelExt::ready`]. Waits in either mode.
    pub fn wait(&mut self, interest: Interest) -> io::Result<Interest> {
        self.executor.block_on(self.channel.ready(interest))
    }

    /// See [`ChannelExt::flush_zero_copy`].
    pub fn flush_zero_copy(&mut self) -> io::Result<ZeroCopy> {
        self.executor.block_on(self.channel.flush_zero_copy())
    }

    /// See [`ChannelExt::preadv`].
    pub fn preadv(&mut self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        self.executor.block_on(self.channel.preadv(bufs, offset))
    }

    /// See [`ChannelExt::pwritev`].
    pub fn pwritev(&mut self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        self.executor.block_on(self.channel.pwritev(bufs, offset))
    }

    /// Ends writing in order: Tokio's `shutdown`.
    pub fn end_writing(&mut self) -> io::Result<()> {
        self.executor.block_on(self.channel.shutdown())
    }

    /// See [`ChannelExt::close`].
    pub fn close(&mut self) -> io::Result<Closed> {
        self.executor.block_on(self.channel.close())
    }
}

impl<C: Channel> Clone for Blocking<Shared<C>> {
    fn clone(&self) -> Self {
        Self { channel: self.channel.clone(), executor: self.executor.clone() }
    }
}

impl<C: Channel> Read for Blocking<C> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(buf)])
    }

    fn read_vectored(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.readv_full(bufs, None, ReadFlags::empty())
    }
}

impl<C: Channel> Write for Blocking<C> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.writev_full(bufs, &[], WriteFlags::empty())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.executor.block_on(AsyncWriteExt::flush(&mut self.channel))
    }
}

impl<C: Channel> Seek for Blocking<C> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.executor.block_on(self.channel.seek_to(to))
    }
}
