//! The operations of a channel, for those who use it.

use crate::channel::{Channel, Closed, Features, Interest, ReadFlags, Shutdown, WriteFlags, ZeroCopy};
use crate::descriptors::{Descriptors, MESSAGE_DESCRIPTORS_MAX};
use crate::error::{ErrorKind, error};
use smallvec::SmallVec;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice, IoSliceMut, SeekFrom};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// Slices handed to the channel in one call.
const SLICES_MAX: usize = 64;

/// What can be done with every channel, beside Tokio's `AsyncReadExt` and `AsyncWriteExt`, which work on it too (its
/// `read`, `write`, `write_all`, `flush`; they wait in either mode).
///
/// Dropping a future stops the operation between two transfers; nothing that was reported is lost. The futures that
/// transfer *all* bytes tell by `transferred()` how far they are, before, during and after:
///
/// ```
/// # use vellum_channel::{ChannelExt, Pair};
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let (mut near, _far) = Pair::with_capacity(4);
/// let data = [std::io::IoSlice::new(b"sixteen bytes...")];
/// let mut sending = near.writev_all(&data);
/// tokio::select! {
///     biased;
///     _ = &mut sending => unreachable!("nobody reads"),
///     () = std::future::ready(()) => {}
/// }
/// assert_eq!(sending.transferred(), 4);
/// # });
/// ```
pub trait ChannelExt: Channel {
    /// Reads some bytes into `bufs`, in order; 0 is the end of the stream. In non-blocking mode `WouldBlock`.
    fn readv<'a, 'b>(&'a mut self, bufs: &'a mut [IoSliceMut<'b>]) -> ReadSome<'a, 'b, Self> {
        self.readv_full(bufs, None, ReadFlags::empty())
    }

    /// The same, taking along descriptors and minding flags.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for `fds` or flags whose feature the channel lacks.
    fn readv_full<'a, 'b>(
        &'a mut self,
        bufs: &'a mut [IoSliceMut<'b>],
        fds: Option<&'a mut Descriptors>,
        flags: ReadFlags,
    ) -> ReadSome<'a, 'b, Self> {
        ReadSome { channel: self, bufs, fds, flags }
    }

    /// Reads some bytes and leaves them in the channel. Needs [`Features::PEEK`].
    fn peek(&mut self, buf: &mut [u8]) -> impl Future<Output = io::Result<usize>> {
        poll_fn(move |cx| {
            check_read(self, false, ReadFlags::PEEK)?;
            let flags = ReadFlags::PEEK | mode_of_read(self);
            let polled = self.poll_readv(cx, &mut [IoSliceMut::new(buf)], None, flags);
            or_would_block(self.is_blocking(), polled)
        })
    }

    /// Writes some of `bufs`, in order, at least one byte. In non-blocking mode `WouldBlock`.
    fn writev<'a, 'b>(&'a mut self, bufs: &'a [IoSlice<'b>]) -> WriteSome<'a, 'b, Self> {
        self.writev_full(bufs, &[], WriteFlags::empty())
    }

    /// The same, sending descriptors along (all with the first byte; they stay the caller's) and minding flags.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for descriptors or flags whose feature the channel lacks, [`ErrorKind::Invalid`] for
    /// descriptors together with [`WriteFlags::ZERO_COPY`], [`ErrorKind::TooManyDescriptors`] beyond
    /// [`MESSAGE_DESCRIPTORS_MAX`].
    fn writev_full<'a, 'b>(
        &'a mut self,
        bufs: &'a [IoSlice<'b>],
        fds: &'a [BorrowedFd<'a>],
        flags: WriteFlags,
    ) -> WriteSome<'a, 'b, Self> {
        WriteSome { channel: self, bufs, fds, flags }
    }

    /// Fills all of `buf`. The end of the stream before that is an error.
    fn read_all<'a>(&'a mut self, buf: &'a mut [u8]) -> ReadAll<'a, 'a, Self> {
        ReadAll(ReadAllEof::new(self, Room::One(IoSliceMut::new(buf)), None, ReadFlags::empty()))
    }

    /// Fills all of `buf` and answers true, or false when the stream ends before the first byte.
    fn read_all_eof<'a>(&'a mut self, buf: &'a mut [u8]) -> ReadAllEof<'a, 'a, Self> {
        ReadAllEof::new(self, Room::One(IoSliceMut::new(buf)), None, ReadFlags::empty())
    }

    /// Fills all of `bufs`. The end of the stream before that is an error. Waits in either mode.
    fn readv_all<'a, 'b>(&'a mut self, bufs: &'a mut [IoSliceMut<'b>]) -> ReadAll<'a, 'b, Self> {
        self.readv_full_all(bufs, None, ReadFlags::empty())
    }

    /// Fills all of `bufs` and answers true, or false when the stream ends before the first byte. Waits in either mode.
    fn readv_all_eof<'a, 'b>(&'a mut self, bufs: &'a mut [IoSliceMut<'b>]) -> ReadAllEof<'a, 'b, Self> {
        self.readv_full_all_eof(bufs, None, ReadFlags::empty())
    }

    /// [`readv_all`](ChannelExt::readv_all) with descriptors: those that come along any of the bytes are added to `fds`.
    fn readv_full_all<'a, 'b>(
        &'a mut self,
        bufs: &'a mut [IoSliceMut<'b>],
        fds: Option<&'a mut Descriptors>,
        flags: ReadFlags,
    ) -> ReadAll<'a, 'b, Self> {
        ReadAll(self.readv_full_all_eof(bufs, fds, flags))
    }

    /// [`readv_all_eof`](ChannelExt::readv_all_eof) with descriptors.
    fn readv_full_all_eof<'a, 'b>(
        &'a mut self,
        bufs: &'a mut [IoSliceMut<'b>],
        fds: Option<&'a mut Descriptors>,
        flags: ReadFlags,
    ) -> ReadAllEof<'a, 'b, Self> {
        ReadAllEof::new(self, Room::Many(bufs), fds, flags)
    }

    /// Writes all of `bufs`. Waits in either mode. (For one slice: Tokio's `write_all`, or this.)
    fn writev_all<'a, 'b>(&'a mut self, bufs: &'a [IoSlice<'b>]) -> WriteAll<'a, 'b, Self> {
        self.writev_full_all(bufs, &[], WriteFlags::empty())
    }

    /// The same with descriptors, which go out with the first bytes: any number, as long as there is a byte for every
    /// [`MESSAGE_DESCRIPTORS_MAX`] of them. With [`WriteFlags::ZERO_COPY`] it ends when all is handed to the kernel:
    /// `bufs` must stay as they are until [`flush_zero_copy`](ChannelExt::flush_zero_copy).
    fn writev_full_all<'a, 'b>(
        &'a mut self,
        bufs: &'a [IoSlice<'b>],
        fds: &'a [BorrowedFd<'a>],
        flags: WriteFlags,
    ) -> WriteAll<'a, 'b, Self> {
        WriteAll { channel: self, bufs, fds, flags, cursor: Cursor::default(), is_checked: false }
    }

    /// Waits until the kernel has let go of the pages of all zero-copy sends.
    fn flush_zero_copy(&mut self) -> impl Future<Output = io::Result<ZeroCopy>> {
        poll_fn(move |cx| self.poll_flush_zero_copy(cx))
    }

    /// Waits until the channel is readable or writable, and says which. Empty when
    /// [`Control::wake_reader`](crate::Control::wake_reader) broke off the wait for reading.
    fn ready(&mut self, interest: Interest) -> impl Future<Output = io::Result<Interest>> {
        let reader = self.control().reader().clone();
        poll_fn(move |cx| {
            if interest.contains(Interest::READ) && reader.poll(cx) {
                return Poll::Ready(Ok(Interest::empty()));
            }
            self.poll_ready(cx, interest)
        })
    }

    /// Moves the position, and tells the new one in bytes from the start. Needs [`Features::SEEK`].
    fn seek_to(&mut self, to: SeekFrom) -> impl Future<Output = io::Result<u64>> {
        poll_fn(move |cx| self.poll_seek(cx, to))
    }

    /// Reads some bytes at `offset`; the position stays. Needs [`Features::SEEK`].
    fn preadv<'a>(
        &'a mut self,
        bufs: &'a mut [IoSliceMut<'_>],
        offset: u64,
    ) -> impl Future<Output = io::Result<usize>> {
        poll_fn(move |cx| self.poll_preadv(cx, bufs, offset))
    }

    /// Writes some bytes at `offset`; the position stays. Needs [`Features::SEEK`].
    fn pwritev<'a>(
        &'a mut self,
        bufs: &'a [IoSlice<'_>],
        offset: u64,
    ) -> impl Future<Output = io::Result<usize>> {
        poll_fn(move |cx| self.poll_pwritev(cx, bufs, offset))
    }

    /// Ends one or both directions without closing the channel. From other tasks: [`Channel::control`]. (Tokio's
    /// `shutdown` ends writing in order, with what protocols like TLS say at the end.)
    fn shut_down(&mut self, how: Shutdown) -> io::Result<()> {
        self.control().shutdown(how)
    }

    /// Whether small writes may wait to be merged: the inverse of `TCP_NODELAY`. A hint.
    fn set_delay(&mut self, is_allowed: bool) {
        self.control().set_delay(is_allowed);
    }

    /// Holds back what is written until it is turned off: `TCP_CORK`. A hint.
    fn set_cork(&mut self, is_on: bool) {
        self.control().set_cork(is_on);
    }

    /// Sends what waits in buffers, ends both directions, and gives the descriptor back.
    fn close(&mut self) -> impl Future<Output = io::Result<Closed>> {
        poll_fn(move |cx| self.poll_close(cx))
    }
}

impl<C: Channel + ?Sized> ChannelExt for C {}

fn mode_of_read<C: Channel + ?Sized>(channel: &C) -> ReadFlags {
    if channel.is_blocking() { ReadFlags::empty() } else { ReadFlags::NO_WAIT }
}

fn or_would_block<T>(is_blocking: bool, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
    match polled {
        Poll::Pending if !is_blocking => Poll::Ready(Err(io::ErrorKind::WouldBlock.into())),
        polled => polled,
    }
}

fn check_read<C: Channel + ?Sized>(channel: &C, has_fds: bool, flags: ReadFlags) -> io::Result<()> {
    if has_fds && !channel.features().contains(Features::DESCRIPTORS) {
        return Err(channel.unsupported("does not pass file descriptors"));
    }
    if flags.contains(ReadFlags::PEEK) && !channel.features().contains(Features::PEEK) {
        return Err(channel.unsupported("cannot peek"));
    }
    Ok(())
}

fn check_write<C: Channel + ?Sized>(channel: &C, fds: usize, flags: WriteFlags) -> io::Result<()> {
    if fds > 0 && !channel.features().contains(Features::DESCRIPTORS) {
        return Err(channel.unsupported("does not pass file descriptors"));
    }
    if flags.contains(WriteFlags::ZERO_COPY) {
        if fds > 0 {
            return Err(error(ErrorKind::Invalid, "descriptors cannot be sent by a zero-copy write"));
        }
        if !channel.features().contains(Features::ZERO_COPY) {
            return Err(channel.unsupported("cannot send without copying"));
        }
    }
    Ok(())
}

fn too_many(fds: usize, why: &str) -> io::Error {
    error(ErrorKind::TooManyDescriptors, format!("{fds} descriptors are too many: {why}"))
}

/// A read of some bytes. See [`ChannelExt::readv`].
#[derive(Debug)]
#[must_use = "futures do nothing unless awaited"]
pub struct ReadSome<'a, 'b, C: ?Sized> {
    channel: &'a mut C,
    bufs: &'a mut [IoSliceMut<'b>],
    fds: Option<&'a mut Descriptors>,
    flags: ReadFlags,
}

impl<C: Channel + ?Sized> Future for ReadSome<'_, '_, C> {
    type Output = io::Result<usize>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        check_read(this.channel, this.fds.is_some(), this.flags)?;
        let flags = this.flags | mode_of_read(this.channel);
        let polled = this.channel.poll_readv(cx, this.bufs, this.fds.as_deref_mut(), flags);
        or_would_block(!flags.contains(ReadFlags::NO_WAIT), polled)
    }
}

/// A write of some bytes. See [`ChannelExt::writev`].
#[derive(Debug)]
#[must_use = "futures do nothing unless awaited"]
pub struct WriteSome<'a, 'b, C: ?Sized> {
    channel: &'a mut C,
    bufs: &'a [IoSlice<'b>],
    fds: &'a [BorrowedFd<'a>],
    flags: WriteFlags,
}

impl<C: Channel + ?Sized> Future for WriteSome<'_, '_, C> {
    type Output = io::Result<usize>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        check_write(this.channel, this.fds.len(), this.flags)?;
        if this.fds.len() > MESSAGE_DESCRIPTORS_MAX {
            return Poll::Ready(Err(too_many(this.fds.len(), "one message carries 253")));
        }
        let mut flags = this.flags;
        if !this.channel.is_blocking() {
            flags |= WriteFlags::NO_WAIT;
        }
        let polled = this.channel.poll_writev(cx, this.bufs, this.fds, flags);
        or_would_block(!flags.contains(WriteFlags::NO_WAIT), polled)
    }
}

/// How far an operation is: the slice it is in, the bytes of it that are done, and the bytes done in all.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    slice: usize,
    within: usize,
    transferred: usize,
}

impl Cursor {
    /// Moves over `count` bytes of slices with the given lengths.
    fn advance(&mut self, count: usize, len_of: impl Fn(usize) -> usize) {
        self.transferred += count;
        let mut left = count;
        while left > 0 {
            let rest = len_of(self.slice) - self.within;
            if left < rest {
                self.within += left;
                return;
            }
            left -= rest;
            self.slice += 1;
            self.within = 0;
        }
    }
}

/// Where an operation reads to.
#[derive(Debug)]
enum Room<'a, 'b> {
    One(IoSliceMut<'a>),
    Many(&'a mut [IoSliceMut<'b>]),
}

impl Room<'_, '_> {
    fn count(&self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::Many(bufs) => bufs.len(),
        }
    }

    fn len_of(&self, slice: usize) -> usize {
        match self {
            Self::One(buf) => buf.len(),
            Self::Many(bufs) => bufs[slice].len(),
        }
    }

    fn total(&self) -> usize {
        (0..self.count()).map(|slice| self.len_of(slice)).sum()
    }

    /// The next slices to fill, from `cursor` on; none is empty.
    fn window(&mut self, cursor: Cursor) -> SmallVec<[IoSliceMut<'_>; 16]> {
        let mut window = SmallVec::new();
        match self {
            Self::One(buf) => window.push(IoSliceMut::new(&mut buf[cursor.within..])),
            Self::Many(bufs) => {
                for (at, buf) in bufs.iter_mut().enumerate().skip(cursor.slice) {
                    let from = if at == cursor.slice { cursor.within } else { 0 };
                    if from < buf.len() && window.len() < SLICES_MAX {
                        window.push(IoSliceMut::new(&mut buf[from..]));
                    } else if window.len() == SLICES_MAX {
                        break;
                    }
                }
            }
        }
        window
    }
}

/// A read of all bytes, or of none at the end of the stream. See [`ChannelExt::readv_all_eof`].
#[derive(Debug)]
#[must_use = "futures do nothing unless awaited"]
pub struct ReadAllEof<'a, 'b, C: ?Sized> {
    channel: &'a mut C,
    room: Room<'a, 'b>,
    total: usize,
    fds: Option<&'a mut Descriptors>,
    flags: ReadFlags,
    cursor: Cursor,
}

impl<'a, 'b, C: Channel + ?Sized> ReadAllEof<'a, 'b, C> {
    fn new(
        channel: &'a mut C,
        room: Room<'a, 'b>,
        fds: Option<&'a mut Descriptors>,
        flags: ReadFlags,
    ) -> Self {
        let total = room.total();
        Self { channel, room, total, fds, flags, cursor: Cursor::default() }
    }

    /// Bytes read so far. They are at the start of the buffers, also when the operation failed or is dropped.
    pub fn transferred(&self) -> usize {
        self.cursor.transferred
    }
}

impl<C: Channel + ?Sized> Future for ReadAllEof<'_, '_, C> {
    type Output = io::Result<bool>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        check_read(this.channel, this.fds.is_some(), this.flags)?;
        if this.flags.contains(ReadFlags::PEEK) {
            return Poll::Ready(Err(error(ErrorKind::Invalid, "a peek reads some bytes, never all")));
        }
        while this.cursor.transferred < this.total {
            let mut window = this.room.window(this.cursor);
            let fds = this.fds.as_deref_mut();
            let read = ready!(this.channel.poll_readv(cx, &mut window, fds, this.flags))?;
            drop(window);
            if read == 0 {
                return Poll::Ready(match this.cursor.transferred {
                    0 => Ok(false),
                    got => Err(cut_short(this.channel, got, this.total)),
                });
            }
            this.cursor.advance(read, |slice| this.room.len_of(slice));
        }
        Poll::Ready(Ok(true))
    }
}

fn cut_short<C: Channel + ?Sized>(channel: &C, got: usize, wanted: usize) -> io::Error {
    let label = channel.label();
    error(ErrorKind::UnexpectedEof, format!("{label} ended after {got} of {wanted} bytes"))
}

/// A read of all bytes. See [`ChannelExt::readv_all`].
#[derive(Debug)]
#[must_use = "futures do nothing unless awaited"]
pub struct ReadAll<'a, 'b, C: ?Sized>(ReadAllEof<'a, 'b, C>);

impl<C: Channel + ?Sized> ReadAll<'_, '_, C> {
    /// Bytes read so far. They are at the start of the buffers, also when the operation failed or is dropped.
    pub fn transferred(&self) -> usize {
        self.0.transferred()
    }
}

impl<C: Channel + ?Sized> Future for ReadAll<'_, '_, C> {
    type Output = io::Result<()>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let inner = &mut self.get_mut().0;
        let is_full = ready!(Pin::new(&mut *inner).poll(cx))?;
        Poll::Ready(if is_full { Ok(()) } else { Err(cut_short(inner.channel, 0, inner.total)) })
    }
}

/// A write of all bytes. See [`ChannelExt::writev_all`].
#[derive(Debug)]
#[must_use = "futures do nothing unless awaited"]
pub struct WriteAll<'a, 'b, C: ?Sized> {
    channel: &'a mut C,
    bufs: &'a [IoSlice<'b>],
    fds: &'a [BorrowedFd<'a>],
    flags: WriteFlags,
    cursor: Cursor,
    is_checked: bool,
}

impl<C: Channel + ?Sized> WriteAll<'_, '_, C> {
    /// Bytes that the channel took so far, also when the operation failed or is dropped. It will deliver them; channels
    /// with buffers of their own (TLS, WebSocket) may need a flush for that.
    pub fn transferred(&self) -> usize {
        self.cursor.transferred
    }

    fn check(&mut self) -> io::Result<()> {
        check_write(self.channel, self.fds.len(), self.flags)?;
        let messages = self.fds.len().div_ceil(MESSAGE_DESCRIPTORS_MAX);
        if messages > self.bufs.iter().map(|buf| buf.len()).sum() {
            return Err(too_many(self.fds.len(), "every 253 of them need a byte to travel with"));
        }
        self.is_checked = true;
        Ok(())
    }
}

/// The next slices to send, from `cursor` on, of at most `bytes`; none is empty.
fn send_window<'a>(bufs: &'a [IoSlice<'_>], cursor: Cursor, mut bytes: usize) -> SmallVec<[IoSlice<'a>; 16]> {
    let mut window = SmallVec::new();
    for (at, buf) in bufs.iter().enumerate().skip(cursor.slice) {
        if window.len() == SLICES_MAX || bytes == 0 {
            break;
        }
        let rest = &buf[if at == cursor.slice { cursor.within } else { 0 }..];
        if !rest.is_empty() {
            let part = &rest[..rest.len().min(bytes)];
            bytes -= part.len();
            window.push(IoSlice::new(part));
        }
    }
    window
}

impl<C: Channel + ?Sized> Future for WriteAll<'_, '_, C> {
    type Output = io::Result<()>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        if !this.is_checked {
            this.check()?;
        }
        loop {
            let (fds, later) = this.fds.split_at(this.fds.len().min(MESSAGE_DESCRIPTORS_MAX));
            // A byte is kept back for every message of descriptors that is still to come.
            let window = send_window(this.bufs, this.cursor, if later.is_empty() { usize::MAX } else { 1 });
            if window.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let sent = ready!(this.channel.poll_writev(cx, &window, fds, this.flags))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            this.fds = later;
            this.cursor.advance(sent, |slice| this.bufs[slice].len());
        }
    }
}
