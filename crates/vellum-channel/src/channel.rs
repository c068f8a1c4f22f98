//! The trait that every channel implements.

use crate::control::Control;
use crate::descriptors::Descriptors;
use crate::endpoint::{Endpoint, PeerProcess};
use crate::error::{ErrorKind, error};
use bitflags::bitflags;
use std::fmt::Debug;
use std::io::{self, IoSlice, IoSliceMut, SeekFrom};
use std::os::fd::BorrowedFd;
use std::process::ExitStatus;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Handle;

bitflags! {
    /// What a channel can do beyond reading and writing. Ask before use: the rest answers
    /// [`ErrorKind::Unsupported`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Features: u32 {
        /// File descriptors travel along the bytes.
        const DESCRIPTORS = 1 << 0;
        /// Either direction can be shut down, at any time and from any thread.
        const SHUTDOWN = 1 << 1;
        /// It is a listening socket: accept is all it does.
        const LISTEN = 1 << 2;
        /// It has a position that can be moved, and positioned reads and writes.
        const SEEK = 1 << 3;
        /// Sends without copying, see [`WriteFlags::ZERO_COPY`].
        const ZERO_COPY = 1 << 4;
        /// Reads that leave the bytes where they are, see [`ReadFlags::PEEK`].
        const PEEK = 1 << 5;
    }
}

bitflags! {
    /// How to read.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ReadFlags: u32 {
        /// Leave what is read in the channel. Needs [`Features::PEEK`].
        const PEEK = 1 << 0;
        /// An end of the stream without the peer's goodbye (TLS `close_notify`) is an end like any other.
        const RELAXED_EOF = 1 << 1;
        /// Leave received descriptors non-blocking if the sender had them so; otherwise they are made blocking.
        const KEEP_DESCRIPTOR_MODE = 1 << 2;
        /// Answer `WouldBlock` rather than wait, from the state of now and not of the executor's last look.
        const NO_WAIT = 1 << 3;
    }
}

bitflags! {
    /// How to write.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct WriteFlags: u32 {
        /// Hand the pages to the kernel instead of copying them. They must stay as they are until
        /// [`Channel::poll_flush_zero_copy`] says that all is sent. Needs [`Features::ZERO_COPY`]; never together with
        /// descriptors.
        const ZERO_COPY = 1 << 0;
        /// Answer `WouldBlock` rather than wait.
        const NO_WAIT = 1 << 1;
    }
}

bitflags! {
    /// What to wait for, and what has come.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Interest: u32 {
        /// A read would return at once: with bytes, with the end of the stream or with an error.
        const READ = 1 << 0;
        /// A write would take at least one byte, or fail, at once.
        const WRITE = 1 << 1;
    }
}

/// A direction, seen from this end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shutdown {
    /// What the peer sends is no longer read: reads find the end of the stream.
    Read,
    /// The peer finds the end of the stream; writes fail.
    Write,
    /// Both.
    Both,
}

impl Shutdown {
    /// Whether reading ends.
    pub fn reads(self) -> bool {
        matches!(self, Self::Read | Self::Both)
    }

    /// Whether writing ends.
    pub fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Both)
    }
}

/// What [`Channel::poll_flush_zero_copy`] found when all sends were through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ZeroCopy {
    /// At least one send went without a copy, or there was none to wait for.
    Sent,
    /// The kernel fell back to copying for every one: zero-copy gains nothing here (a loopback device, say).
    Copied,
}

/// How a channel ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Closed {
    /// Of a child process: how it exited.
    pub exit_status: Option<ExitStatus>,
}

/// What every channel keeps: its name, its kind and its mode.
#[derive(Clone, Debug)]
pub struct Base {
    kind: &'static str,
    name: String,
    features: Features,
    is_blocking: bool,
}

impl Base {
    /// A channel of the named kind, with no name of its own, in blocking mode.
    pub fn new(kind: &'static str, features: Features) -> Self {
        Self { kind, name: String::new(), features, is_blocking: true }
    }

    /// Adds a feature. Features are never taken away.
    pub fn add_feature(&mut self, feature: Features) {
        self.features |= feature;
    }
}

/// An ordered stream of bytes between two ends.
///
/// Every channel is a Tokio stream, and every Tokio stream is a channel through [`Stream`](crate::Stream). The
/// methods here are for those who make channels; those who use them find the operations in
/// [`ChannelExt`](crate::ChannelExt).
///
/// Contract, beyond that of [`AsyncRead`] and [`AsyncWrite`]:
/// * `Pending` registers the task of `cx` with this direction only: one task may read while another writes (through
///   [`Shared`](crate::Shared) or `tokio::io::split`). The last one polled in a direction is the one that is woken.
/// * What a poll reports as transferred is transferred, whatever is dropped afterwards; what it does not report is not
///   (a write that is reported may still sit in a buffer of the channel: flush).
/// * A read of 0 bytes into a buffer that is not empty is the end of the stream.
/// * Bytes that arrived before an error are reported before it.
pub trait Channel: AsyncRead + AsyncWrite + Debug + Send + Unpin {
    /// Kind, name and mode.
    fn base(&self) -> &Base;

    /// Kind, name and mode, to change.
    fn base_mut(&mut self) -> &mut Base;

    /// What acts on the channel from any thread, while others read and write.
    fn control(&self) -> Control;

    /// Fills `bufs` in order with what is there, at least one byte; 0 is the end of the stream.
    ///
    /// With `fds`, descriptors that come along are added there; without, they are closed by the channel. Implementers
    /// get `fds` only if they have [`Features::DESCRIPTORS`], and a flag only if they have its feature.
    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>>;

    /// Takes bytes of `bufs` in order, at least one unless all are empty. All of `fds` are sent with the first byte,
    /// and stay the caller's.
    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>>;

    /// Waits until one of the conditions holds, and says which. A hint like any readiness: an operation may still have
    /// to wait. A direction that has ended is ready; one that the channel never had (reading, of a pipe's writing end) is not
    /// waited for, and [`ErrorKind::Unsupported`] if there is no other.
    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>>;

    /// Sends what waits in buffers of the channel, and ends both directions. The descriptor or memory is given back;
    /// later operations answer [`ErrorKind::Closed`], a second close does nothing and tells the same.
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>>;

    /// Waits until the kernel has let go of the pages of all zero-copy sends.
    fn poll_flush_zero_copy(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<ZeroCopy>> {
        Poll::Ready(Ok(ZeroCopy::Sent))
    }

    /// Moves the position. See [`Features::SEEK`].
    fn poll_seek(&mut self, _cx: &mut Context<'_>, _to: SeekFrom) -> Poll<io::Result<u64>> {
        Poll::Ready(Err(self.unsupported("cannot seek")))
    }

    /// Reads at `offset` bytes from the start; the position stays. May be short; 0 is the end.
    fn poll_preadv(
        &mut self,
        _cx: &mut Context<'_>,
        _bufs: &mut [IoSliceMut<'_>],
        _offset: u64,
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(self.unsupported("has no positions to read at")))
    }

    /// Writes at `offset` bytes from the start; the position stays. May be short.
    fn poll_pwritev(
        &mut self,
        _cx: &mut Context<'_>,
        _bufs: &[IoSlice<'_>],
        _offset: u64,
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(self.unsupported("has no positions to write at")))
    }

    /// Takes the channel off its executor: until [`attach`](Channel::attach), operations that would have to wait answer
    /// [`ErrorKind::Detached`]. Nothing that was received or accepted is lost. Channels that need no executor do nothing.
    fn detach(&mut self) -> io::Result<()>;

    /// Puts the channel on an executor, which from now on wakes those who wait. Detaches it first if needed.
    fn attach(&mut self, executor: &Handle) -> io::Result<()>;

    /// The address of this end.
    fn local_endpoint(&self) -> io::Result<Endpoint> {
        Err(self.unsupported("has no local address"))
    }

    /// The address of the other end.
    fn peer_endpoint(&self) -> io::Result<Endpoint> {
        Err(self.unsupported("has no peer address"))
    }

    /// The process at the other end, as the kernel saw it when the connection was made.
    fn peer_process(&self) -> io::Result<PeerProcess> {
        Err(self.unsupported("cannot tell the process at its other end"))
    }

    /// What it is: `tcp`, `unix`, `tls`, `file`, ...
    fn kind(&self) -> &'static str {
        self.base().kind
    }

    /// The name that its owner gave it, for debugging; empty if none.
    fn name(&self) -> &str {
        &self.base().name
    }

    /// Names it.
    fn set_name(&mut self, name: &str) {
        name.clone_into(&mut self.base_mut().name);
    }

    /// What it can do.
    fn features(&self) -> Features {
        self.base().features
    }

    /// Whether operations wait.
    fn is_blocking(&self) -> bool {
        self.base().is_blocking
    }

    /// In blocking mode (the default) operations of [`ChannelExt`](crate::ChannelExt) that transfer *some* bytes wait;
    /// in non-blocking mode they answer `WouldBlock`. Those that transfer *all* bytes wait in both.
    fn set_blocking(&mut self, is_blocking: bool) {
        self.base_mut().is_blocking = is_blocking;
    }

    /// Its kind and name, for messages: `tcp channel "migration"`.
    fn label(&self) -> String {
        match self.name() {
            "" => format!("{} channel", self.kind()),
            name => format!("{} channel \"{name}\"", self.kind()),
        }
    }

    /// An error of kind [`ErrorKind::Unsupported`] that names the channel: `what` completes "a tcp channel ...".
    fn unsupported(&self, what: &str) -> io::Error {
        error(ErrorKind::Unsupported, format!("{} {what}", self.label()))
    }
}

/// Those conditions of `wanted` that can come in the `directions` that `channel` has.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when none can.
pub(crate) fn conditions_to_wait_for(
    channel: &impl Channel,
    wanted: Interest,
    directions: Interest,
) -> io::Result<Interest> {
    let possible = wanted & directions;
    if possible.is_empty() && !wanted.is_empty() {
        let (only, other) = match directions {
            Interest::READ => ("reading", "writable"),
            _ => ("writing", "readable"),
        };
        return Err(channel.unsupported(&format!("is for {only} only and never becomes {other}")));
    }
    Ok(possible)
}

macro_rules! forward_channel {
    () => {
        fn base(&self) -> &Base {
            (**self).base()
        }
        fn base_mut(&mut self) -> &mut Base {
            (**self).base_mut()
        }
        fn control(&self) -> Control {
            (**self).control()
        }
        fn poll_readv(
            &mut self,
            cx: &mut Context<'_>,
            bufs: &mut [IoSliceMut<'_>],
            fds: Option<&mut Descriptors>,
            flags: ReadFlags,
        ) -> Poll<io::Result<usize>> {
            (**self).poll_readv(cx, bufs, fds, flags)
        }
        fn poll_writev(
            &mut self,
            cx: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
            fds: &[BorrowedFd<'_>],
            flags: WriteFlags,
        ) -> Poll<io::Result<usize>> {
            (**self).poll_writev(cx, bufs, fds, flags)
        }
        fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
            (**self).poll_ready(cx, interest)
        }
        fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
            (**self).poll_close(cx)
        }
        fn poll_flush_zero_copy(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<ZeroCopy>> {
            (**self).poll_flush_zero_copy(cx)
        }
        fn poll_seek(&mut self, cx: &mut Context<'_>, to: SeekFrom) -> Poll<io::Result<u64>> {
            (**self).poll_seek(cx, to)
        }
        fn poll_preadv(
            &mut self,
            cx: &mut Context<'_>,
            bufs: &mut [IoSliceMut<'_>],
            offset: u64,
        ) -> Poll<io::Result<usize>> {
            (**self).poll_preadv(cx, bufs, offset)
        }
        fn poll_pwritev(
            &mut self,
            cx: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
            offset: u64,
        ) -> Poll<io::Result<usize>> {
            (**self).poll_pwritev(cx, bufs, offset)
        }
        fn detach(&mut self) -> io::Result<()> {
            (**self).detach()
        }
        fn attach(&mut self, executor: &Handle) -> io::Result<()> {
            (**self).attach(executor)
        }
        fn local_endpoint(&self) -> io::Result<Endpoint> {
            (**self).local_endpoint()
        }
        fn peer_endpoint(&self) -> io::Result<Endpoint> {
            (**self).peer_endpoint()
        }
        fn peer_process(&self) -> io::Result<PeerProcess> {
            (**self).peer_process()
        }
        fn set_blocking(&mut self, is_blocking: bool) {
            (**self).set_blocking(is_blocking);
        }
    };
}

impl<C: Channel + ?Sized> Channel for Box<C> {
    forward_channel!();
}

impl<C: Channel + ?Sized> Channel for &mut C {
    forward_channel!();
}

/// Makes a channel a Tokio stream by its own methods `poll_readv` and `poll_writev`, and `poll_send_buffered` (sends
/// what waits in its buffers) and `poll_end_writing` (the peer finds the end of the stream), which it has as inherent
/// methods.
macro_rules! stream_of_channel {
    ([$($generics:tt)*] $channel:ty) => {
        impl<$($generics)*> tokio::io::AsyncRead for $channel {
            fn poll_read(
                self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
                buf: &mut tokio::io::ReadBuf<'_>,
            ) -> std::task::Poll<std::io::Result<()>> {
                let flags = $crate::ReadFlags::empty();
                let bytes = std::io::IoSliceMut::new(buf.initialize_unfilled());
                let read = std::task::ready!($crate::Channel::poll_readv(
                    self.get_mut(), cx, &mut [bytes], None, flags
                ))?;
                buf.advance(read);
                std::task::Poll::Ready(Ok(()))
            }
        }

        $crate::channel::stream_of_channel!(write [$($generics)*] $channel);
    };
    (write [$($generics:tt)*] $channel:ty) => {
        impl<$($generics)*> tokio::io::AsyncWrite for $channel {
            fn poll_write(
                self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
                buf: &[u8],
            ) -> std::task::Poll<std::io::Result<usize>> {
                let flags = $crate::WriteFlags::empty();
                $crate::Channel::poll_writev(self.get_mut(), cx, &[std::io::IoSlice::new(buf)], &[], flags)
            }

            fn poll_write_vectored(
                self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
                bufs: &[std::io::IoSlice<'_>],
            ) -> std::task::Poll<std::io::Result<usize>> {
                $crate::Channel::poll_writev(self.get_mut(), cx, bufs, &[], $crate::WriteFlags::empty())
            }

            fn is_write_vectored(&self) -> bool {
                true
            }

            fn poll_flush(
                self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
            ) -> std::task::Poll<std::io::Result<()>> {
                self.get_mut().poll_send_buffered(cx)
            }

            fn poll_shutdown(
                self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
            ) -> std::task::Poll<std::io::Result<()>> {
                self.get_mut().poll_end_writing(cx)
            }
        }
    };
}
pub(crate) use stream_of_channel;
