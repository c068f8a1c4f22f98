//! Two ends in one process.

use crate::channel::{
    Base, Channel, Closed, Features, Interest, ReadFlags, Shutdown, WriteFlags, stream_of_channel,
};
use crate::control::{Control, Controls, WakeReader};
use crate::descriptors::Descriptors;
use crate::error::{ErrorKind, error};
use crate::poll_fd::closed;
use crate::turns::in_turn;
use pipe::Pipe;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use tokio::runtime::Handle;

mod pipe;

/// One of two connected ends in this process: what is written to one is read from the other.
///
/// Each direction holds a bounded number of bytes; a write waits while there is no room. The ends may be in different
/// tasks, threads and executors, and need none of their own: to detach and attach does nothing.
///
/// * When one end is closed or dropped, the other reads what was written to it and then the end of the stream; its
///   writes fail with `BrokenPipe`.
/// * After `shutdown(Read)` the bytes that nobody will read are thrown away, and the peer's writes fail with `BrokenPipe`.
/// * Descriptors are duplicated by the write, and come with the very byte they were sent with: a read ends before a byte
///   that descriptors travel with, unless it is its first. A read that asks for no descriptors closes them; a peek leaves
///   them. At most 1024 wait in a direction: further writes with descriptors wait.
///
/// ```
/// use vellum_channel::{ChannelExt, Pair};
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let (mut near, mut far) = Pair::new();
/// near.writev_all(&[std::io::IoSlice::new(b"hello")]).await?;
/// drop(near);
/// let mut word = [0; 5];
/// far.read_all(&mut word).await?;
/// assert!(!far.read_all_eof(&mut word).await?);
/// # std::io::Result::Ok(()) }).unwrap();
/// ```
#[derive(Debug)]
pub struct Pair {
    base: Base,
    incoming: Arc<Pipe>,
    outgoing: Arc<Pipe>,
    controls: Arc<PairControls>,
    reader: Arc<WakeReader>,
}

impl Pair {
    /// Bytes that each direction of [`Pair::new`] holds: 64 KiB, as a pipe of the system.
    pub const DEFAULT_CAPACITY: usize = 64 << 10;

    /// Two connected ends.
    #[allow(clippy::new_ret_no_self)]
    pub fn new() -> (Self, Self) {
        Self::with_capacity(Self::DEFAULT_CAPACITY)
    }

    /// Two connected ends where each direction holds at most `bytes` (at least 1). The memory is taken with the first
    /// write.
    pub fn with_capacity(bytes: usize) -> (Self, Self) {
        let there = Arc::new(Pipe::with_capacity(bytes.max(1)));
        let back = Arc::new(Pipe::with_capacity(bytes.max(1)));
        (Self::end(back.clone(), there.clone()), Self::end(there, back))
    }

    fn end(incoming: Arc<Pipe>, outgoing: Arc<Pipe>) -> Self {
        let controls = PairControls {
            incoming: Arc::downgrade(&incoming),
            outgoing: Arc::downgrade(&outgoing),
            is_open: AtomicBool::new(true),
        };
        Self {
            base: Base::new("pair", Features::DESCRIPTORS | Features::SHUTDOWN | Features::PEEK),
            incoming,
            outgoing,
            controls: Arc::new(controls),
            reader: Arc::default(),
        }
    }

    fn check_open(&self) -> io::Result<()> {
        if self.controls.is_open.load(Ordering::Acquire) { Ok(()) } else { Err(closed()) }
    }

    fn end_both(&self) {
        self.controls.is_open.store(false, Ordering::Release);
        self.incoming.end_reading();
        self.outgoing.end_writing();
    }

    fn poll_send_buffered(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.check_open())
    }

    fn poll_end_writing(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_open()?;
        self.outgoing.end_writing();
        Poll::Ready(Ok(()))
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.end_both();
    }
}

impl Channel for Pair {
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
        fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        self.check_open()?;
        let waits = !flags.contains(ReadFlags::NO_WAIT);
        in_turn(cx, waits, |cx| self.incoming.poll_read(cx, bufs, fds, flags))
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        self.check_open()?;
        let waits = !flags.contains(WriteFlags::NO_WAIT);
        in_turn(cx, waits, |cx| self.outgoing.poll_write(cx, bufs, fds))
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        self.check_open()?;
        let mut found = Interest::empty();
        if interest.contains(Interest::READ) {
            found.set(Interest::READ, self.incoming.poll_readable(cx).is_ready());
        }
        if interest.contains(Interest::WRITE) {
            found.set(Interest::WRITE, self.outgoing.poll_writable(cx).is_ready());
        }
        if found.is_empty() { Poll::Pending } else { Poll::Ready(Ok(found)) }
    }

    fn poll_close(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        self.end_both();
        Poll::Ready(Ok(Closed::default()))
    }

    fn detach(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn attach(&mut self, _executor: &Handle) -> io::Result<()> {
        Ok(())
    }
}

stream_of_channel!([] Pair);

#[derive(Debug)]
struct PairControls {
    incoming: Weak<Pipe>,
    outgoing: Weak<Pipe>,
    is_open: AtomicBool,
}

impl Controls for PairControls {
    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        if !self.is_open.load(Ordering::Acquire) {
            return Err(error(
                ErrorKind::Closed,
                "the pair channel is closed: there is nothing to shut down",
            ));
        }
        if how.reads()
            && let Some(incoming) = self.incoming.upgrade()
        {
            incoming.end_reading();
        }
        if how.writes()
            && let Some(outgoing) = self.outgoing.upgrade()
        {
            outgoing.end_writing();
        }
        Ok(())
    }
}
