//! The channel to nowhere.

use crate::channel::{Base, Channel, Closed, Features, Interest, ReadFlags, WriteFlags, stream_of_channel};
use crate::control::{Control, WakeReader};
use crate::descriptors::Descriptors;
use crate::error::{ErrorKind, error};
use crate::no_shutdown::NoShutdown;
use crate::turns::in_turn;
use std::io::{self, IoSlice, IoSliceMut, SeekFrom};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::runtime::Handle;

/// Takes whatever is written and is always at the end of its stream.
///
/// It is always ready, its position is always 0, and after [`close`](crate::ChannelExt::close) reads and writes fail.
///
/// ```
/// use vellum_channel::{ChannelExt, Null};
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let mut null = Null::new();
/// assert_eq!(null.writev(&[std::io::IoSlice::new(b"hello world")]).await?, 11);
/// assert!(!null.read_all_eof(&mut [0; 4]).await?);
/// # std::io::Result::Ok(()) }).unwrap();
/// ```
#[derive(Debug)]
pub struct Null {
    base: Base,
    is_closed: bool,
    reader: Arc<WakeReader>,
}

impl Null {
    /// A channel to nowhere.
    pub fn new() -> Self {
        Self { base: Base::new("null", Features::SEEK), is_closed: false, reader: Arc::default() }
    }

    fn check_open(&self) -> io::Result<()> {
        if self.is_closed {
            let message = format!("{} is closed: open a new one", self.label());
            return Err(error(ErrorKind::Closed, message));
        }
        Ok(())
    }

    fn poll_open(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        in_turn(cx, true, |_| Poll::Ready(self.check_open()))
    }

    fn poll_send_buffered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_open(cx)
    }

    fn poll_end_writing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_open(cx)
    }
}

fn total(bufs: &[IoSlice<'_>]) -> usize {
    bufs.iter().fold(0_usize, |total, buf| total.saturating_add(buf.len()))
}

impl Default for Null {
    fn default() -> Self {
        Self::new()
    }
}

impl Channel for Null {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    fn control(&self) -> Control {
        Control::new(Arc::new(NoShutdown("null")), self.reader.clone())
    }

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        _bufs: &mut [IoSliceMut<'_>],
        _fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        in_turn(cx, !flags.contains(ReadFlags::NO_WAIT), |_| Poll::Ready(self.check_open().map(|()| 0)))
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        _fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        let waits = !flags.contains(WriteFlags::NO_WAIT);
        in_turn(cx, waits, |_| Poll::Ready(self.check_open().map(|()| total(bufs))))
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        ready!(self.poll_open(cx))?;
        Poll::Ready(Ok(interest))
    }

    fn poll_close(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        self.is_closed = true;
        Poll::Ready(Ok(Closed::default()))
    }

    fn poll_seek(&mut self, cx: &mut Context<'_>, _to: SeekFrom) -> Poll<io::Result<u64>> {
        ready!(self.poll_open(cx))?;
        Poll::Ready(Ok(0))
    }

    fn poll_preadv(
        &mut self,
        cx: &mut Context<'_>,
        _bufs: &mut [IoSliceMut<'_>],
        _offset: u64,
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_open(cx))?;
        Poll::Ready(Ok(0))
    }

    fn poll_pwritev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        _offset: u64,
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_open(cx))?;
        Poll::Ready(Ok(total(bufs)))
    }

    fn detach(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn attach(&mut self, _executor: &Handle) -> io::Result<()> {
        Ok(())
    }
}

stream_of_channel!([] Null);
