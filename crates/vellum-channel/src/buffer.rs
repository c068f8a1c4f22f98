//! Memory as a channel.

use crate::channel::{Base, Channel, Closed, Features, Interest, ReadFlags, WriteFlags, stream_of_channel};
use crate::control::{Control, WakeReader};
use crate::descriptors::Descriptors;
use crate::error::{ErrorKind, error};
use crate::no_shutdown::NoShutdown;
use crate::stream::scatter;
use crate::turns::in_turn;
use std::io::{self, IoSlice, IoSliceMut, SeekFrom};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::runtime::Handle;

/// Memory that grows as it is written.
///
/// It behaves like a file: there is **one** position, which reads and writes both move; a read at or beyond the end
/// finds the end of the stream; a write overwrites what is there and goes on beyond the end; a write beyond the end
/// fills the gap with zeros. It is always ready. A write that reaches the limit is short; one that starts there fails
/// with [`ErrorKind::Limit`].
///
/// ```
/// use std::io::SeekFrom;
/// use vellum_channel::{Buffer, ChannelExt};
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let mut buffer = Buffer::new();
/// buffer.writev_all(&[std::io::IoSlice::new(b"hello world")]).await?;
/// buffer.seek_to(SeekFrom::Start(6)).await?;
/// let mut word = [0; 5];
/// buffer.read_all(&mut word).await?;
/// assert_eq!(&word, b"world");
/// # std::io::Result::Ok(()) }).unwrap();
/// ```
#[derive(Debug)]
pub struct Buffer {
    base: Base,
    /// `None` once closed.
    data: Option<Vec<u8>>,
    position: u64,
    limit: usize,
    reader: Arc<WakeReader>,
}

impl Buffer {
    /// The limit of buffers that are made without one: 1 GiB.
    pub const DEFAULT_LIMIT: usize = 1 << 30;

    /// An empty buffer.
    pub fn new() -> Self {
        Self::from_vec(Vec::new())
    }

    /// An empty buffer that grows to at most `limit` bytes.
    pub fn with_limit(limit: usize) -> Self {
        let mut buffer = Self::new();
        buffer.limit = limit;
        buffer
    }

    /// A buffer that holds `data`, with its position at the start. (Its limit is no less than what it holds.)
    pub fn from_vec(data: Vec<u8>) -> Self {
        Self {
            base: Base::new("buffer", Features::SEEK | Features::PEEK),
            limit: Self::DEFAULT_LIMIT.max(data.len()),
            data: Some(data),
            position: 0,
            reader: Arc::default(),
        }
    }

    /// The most it holds.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// All that it holds, wherever the position is. Empty once closed.
    pub fn as_slice(&self) -> &[u8] {
        self.data.as_deref().unwrap_or_default()
    }

    /// All that it holds. Empty once closed, which gives the memory back.
    pub fn into_vec(self) -> Vec<u8> {
        self.data.unwrap_or_default()
    }

    fn data(&self) -> io::Result<&Vec<u8>> {
        self.data.as_ref().ok_or_else(|| self.closed())
    }

    fn closed(&self) -> io::Error {
        error(ErrorKind::Closed, format!("{} is closed: open a new one", self.label()))
    }

    fn read_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        let data = self.data()?;
        // What does not fit a `usize` is beyond the end of any buffer.
        let rest = usize::try_from(offset).ok().and_then(|offset| data.get(offset..)).unwrap_or_default();
        Ok(scatter(rest, bufs))
    }

    fn write_at(&mut self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        self.data()?;
        if bufs.iter().all(|buf| buf.is_empty()) {
            return Ok(0);
        }
        let Some(start) = usize::try_from(offset).ok().filter(|start| *start < self.limit) else {
            return Err(error(
                ErrorKind::Limit,
                format!("{} holds at most {} bytes: cannot write at {offset}", self.label(), self.limit),
            ));
        };
        let total = bufs.iter().fold(0_usize, |total, buf| total.saturating_add(buf.len()));
        let end = start.saturating_add(total).min(self.limit);
        let Some(data) = &mut self.data else { return Err(self.closed()) };
        if end > data.capacity() {
            // Grows in doubles as `Vec` does, but not beyond the limit, and does not abort when there is no memory.
            let capacity = data.capacity().saturating_mul(2).min(self.limit).max(end);
            data.try_reserve_exact(capacity - data.len()).map_err(|cause| {
                io::Error::new(
                    io::ErrorKind::OutOfMemory,
                    format!("cannot grow a buffer to {end} bytes: {cause}"),
                )
            })?;
        }
        if data.len() < start {
            data.resize(start, 0);
        }
        let mut at = start;
        for buf in bufs {
            let part = &buf[..buf.len().min(end - at)];
            let (over, beyond) = part.split_at(part.len().min(data.len() - at));
            data[at..at + over.len()].copy_from_slice(over);
            data.extend_from_slice(beyond);
            at += part.len();
        }
        Ok(end - start)
    }

    fn poll_open(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        in_turn(cx, true, |_| Poll::Ready(self.data().map(|_| ())))
    }

    fn poll_send_buffered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_open(cx)
    }

    fn poll_end_writing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_open(cx)
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Self::new()
    }
}

impl Channel for Buffer {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    fn control(&self) -> Control {
        Control::new(Arc::new(NoShutdown("buffer")), self.reader.clone())
    }

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        _fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        in_turn(cx, !flags.contains(ReadFlags::NO_WAIT), |_| {
            let read = self.read_at(bufs, self.position)?;
            if !flags.contains(ReadFlags::PEEK) {
                self.position += read as u64;
            }
            Poll::Ready(Ok(read))
        })
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        _fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        in_turn(cx, !flags.contains(WriteFlags::NO_WAIT), |_| {
            let written = self.write_at(bufs, self.position)?;
            self.position += written as u64;
            Poll::Ready(Ok(written))
        })
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        ready!(self.poll_open(cx))?;
        Poll::Ready(Ok(interest))
    }

    fn poll_close(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        self.data = None;
        Poll::Ready(Ok(Closed::default()))
    }

    fn poll_seek(&mut self, cx: &mut Context<'_>, to: SeekFrom) -> Poll<io::Result<u64>> {
        ready!(self.poll_open(cx))?;
        let sought = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(distance) => self.position.checked_add_signed(distance),
            SeekFrom::End(distance) => (self.data()?.len() as u64).checked_add_signed(distance),
        };
        // As for files, positions are those that fit an `i64`.
        let Some(position) = sought.filter(|position| i64::try_from(*position).is_ok()) else {
            let message = format!("{}: cannot seek to {to:?}, which is no position", self.label());
            return Poll::Ready(Err(error(ErrorKind::Invalid, message)));
        };
        self.position = position;
        Poll::Ready(Ok(position))
    }

    fn poll_preadv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_open(cx))?;
        Poll::Ready(self.read_at(bufs, offset))
    }

    fn poll_pwritev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_open(cx))?;
        Poll::Ready(self.write_at(bufs, offset))
    }

    fn detach(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn attach(&mut self, _executor: &Handle) -> io::Result<()> {
        Ok(())
    }
}

stream_of_channel!([] Buffer);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::kind_of;

    fn write(buffer: &mut Buffer, offset: u64, parts: &[&[u8]]) -> io::Result<usize> {
        let bufs: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
        buffer.write_at(&bufs, offset)
    }

    #[test]
    fn a_gap_is_filled_with_zeros_and_what_is_before_it_stays() {
        let mut buffer = Buffer::from_vec(b"abc".to_vec());
        assert_eq!(write(&mut buffer, 5, &[b"x", b"", b"yz"]).expect("fits"), 3);
        assert_eq!(buffer.as_slice(), b"abc\0\0xyz");
    }

    #[test]
    fn a_write_overwrites_and_goes_on_beyond_the_end() {
        let mut buffer = Buffer::from_vec(b"abcdef".to_vec());
        assert_eq!(write(&mut buffer, 2, &[b"12", b"345", b"67"]).expect("fits"), 7);
        assert_eq!(buffer.as_slice(), b"ab1234567");
        assert_eq!(write(&mut buffer, 0, &[b"AB"]).expect("fits"), 2);
        assert_eq!(buffer.into_vec(), b"AB1234567");
    }

    #[test]
    fn writes_stop_at_the_limit_and_memory_is_not_taken_beyond_it() {
        let mut buffer = Buffer::with_limit(4);
        assert_eq!(write(&mut buffer, 2, &[b"x", b"yz"]).expect("two fit"), 2);
        assert_eq!(buffer.as_slice(), b"\0\0xy");
        for offset in [4, 5, 1 << 40, u64::MAX] {
            let refused = write(&mut buffer, offset, &[b"z"]).expect_err("no room");
            assert_eq!(kind_of(&refused), Some(ErrorKind::Limit));
        }
        assert_eq!(write(&mut buffer, u64::MAX, &[b""]).expect("nothing to write"), 0);
        assert_eq!(buffer.as_slice().len(), 4);
    }
}
