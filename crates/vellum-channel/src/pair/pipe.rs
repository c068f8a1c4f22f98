//! One direction of a pair: a bounded queue of bytes, with descriptors between them.

use crate::channel::ReadFlags;
use crate::descriptors::{Descriptors, MESSAGE_DESCRIPTORS_MAX};
use crate::error::{ErrorKind, error};
use crate::stream::scatter;
use parking_lot::Mutex;
use rustix::fs::OFlags;
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::task::{Context, Poll, Waker};

/// Descriptors that wait in one direction at most.
const DESCRIPTORS_MAX: usize = 1024;

#[derive(Debug)]
pub(super) struct Pipe {
    capacity: usize,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// Bytes taken out so far: where the front of `bytes` is in the stream.
    taken: u64,
    messages: VecDeque<Message>,
    /// Descriptors of all messages.
    descriptors: usize,
    /// No more will be written.
    is_write_ended: bool,
    /// No more will be read.
    is_read_ended: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// Descriptors that travel with one byte.
#[derive(Debug)]
struct Message {
    /// Where that byte is in the stream.
    at: u64,
    descriptors: Vec<OwnedFd>,
}

impl Pipe {
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self { capacity, queue: Mutex::default() }
    }

    pub(super) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        let mut queue = self.queue.lock();
        if bufs.iter().all(|buf| buf.is_empty()) || queue.is_read_ended {
            return Poll::Ready(Ok(0));
        }
        if queue.bytes.is_empty() {
            if queue.is_write_ended {
                return Poll::Ready(Ok(0));
            }
            register(&mut queue.reader, cx);
            return Poll::Pending;
        }
        if flags.contains(ReadFlags::PEEK) {
            return Poll::Ready(Ok(queue.copy_out(bufs)));
        }
        let message = queue.take_message();
        if let Some(message) = message
            && let Err(refused) = hand_over(message, fds, flags)
        {
            // The bytes stay for the next read.
            let writer = queue.writer.take();
            drop(queue);
            wake(writer);
            return Poll::Ready(Err(refused));
        }
        let read = queue.copy_out(bufs);
        queue.bytes.drain(..read);
        queue.taken += read as u64;
        let writer = queue.writer.take();
        drop(queue);
        wake(writer);
        Poll::Ready(Ok(read))
    }

    pub(super) fn poll_write(
        &self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
    ) -> Poll<io::Result<usize>> {
        if fds.len() > MESSAGE_DESCRIPTORS_MAX {
            let message = format!("{} descriptors are too many: one message carries 253", fds.len());
            return Poll::Ready(Err(error(ErrorKind::TooManyDescriptors, message)));
        }
        let mut queue = self.queue.lock();
        if queue.is_write_ended || queue.is_read_ended {
            return Poll::Ready(Err(broken(queue.is_write_ended)));
        }
        if bufs.iter().all(|buf| buf.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        let room = self.capacity - queue.bytes.len();
        if room == 0 || queue.descriptors + fds.len() > DESCRIPTORS_MAX {
            register(&mut queue.writer, cx);
            return Poll::Pending;
        }
        if queue.bytes.capacity() < self.capacity {
            let more = self.capacity - queue.bytes.len();
            queue.bytes.try_reserve_exact(more).map_err(|cause| {
                io::Error::new(
                    io::ErrorKind::OutOfMemory,
                    format!("no memory for a pair of channels: {cause}"),
                )
            })?;
        }
        queue.add_message(fds)?;
        let written = queue.copy_in(bufs, room);
        let reader = queue.reader.take();
        drop(queue);
        wake(reader);
        Poll::Ready(Ok(written))
    }

    /// Ready when a read would not wait.
    pub(super) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut queue = self.queue.lock();
        if !queue.bytes.is_empty() || queue.is_write_ended || queue.is_read_ended {
            return Poll::Ready(());
        }
        register(&mut queue.reader, cx);
        Poll::Pending
    }

    /// Ready when a write would not wait.
    pub(super) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut queue = self.queue.lock();
        if queue.bytes.len() < self.capacity || queue.is_write_ended || queue.is_read_ended {
            return Poll::Ready(());
        }
        register(&mut queue.writer, cx);
        Poll::Pending
    }

    /// What was written can still be read; then the stream ends.
    pub(super) fn end_writing(&self) {
        let mut queue = self.queue.lock();
        queue.is_write_ended = true;
        let waiting = queue.take_waiting();
        drop(queue);
        waiting.into_iter().for_each(wake);
    }

    /// What was written is thrown away, descriptors too.
    pub(super) fn end_reading(&self) {
        let mut queue = self.queue.lock();
        queue.is_read_ended = true;
        queue.descriptors = 0;
        let thrown_away = (std::mem::take(&mut queue.bytes), std::mem::take(&mut queue.messages));
        let waiting = queue.take_waiting();
        drop(queue);
        waiting.into_iter().for_each(wake);
        // Closing descriptors can take its time: not under the lock.
        drop(thrown_away);
    }
}

impl Queue {
    /// Copies from the front, up to the next byte that descriptors travel with.
    fn copy_out(&self, bufs: &mut [IoSliceMut<'_>]) -> usize {
        let mut most = self.bytes.len();
        for message in self.messages.iter().take(2) {
            match usize::try_from(message.at - self.taken) {
                // Those of a peek's first byte, which stay.
                Ok(0) | Err(_) => {}
                Ok(distance) => {
                    most = most.min(distance);
                    break;
                }
            }
        }
        let (front, back) = self.bytes.as_slices();
        let front = &front[..front.len().min(most)];
        let back = &back[..most - front.len()];
        let copied = scatter(front, bufs);
        if copied < front.len() || back.is_empty() {
            return copied;
        }
        copied + scatter_from(back, bufs, copied)
    }

    fn copy_in(&mut self, bufs: &[IoSlice<'_>], room: usize) -> usize {
        let mut left = room;
        for buf in bufs {
            let part = &buf[..buf.len().min(left)];
            self.bytes.extend(part);
            left -= part.len();
        }
        room - left
    }

    /// Takes the descriptors that travel with the first byte.
    fn take_message(&mut self) -> Option<Vec<OwnedFd>> {
        if self.messages.front()?.at != self.taken {
            return None;
        }
        let message = self.messages.pop_front()?;
        self.descriptors -= message.descriptors.len();
        Some(message.descriptors)
    }

    /// Puts duplicates of `fds` before the byte that comes next.
    fn add_message(&mut self, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if fds.is_empty() {
            return Ok(());
        }
        let descriptors = fds.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<Vec<_>>>()?;
        self.descriptors += descriptors.len();
        self.messages.push_back(Message { at: self.taken + self.bytes.len() as u64, descriptors });
        Ok(())
    }

    fn take_waiting(&mut self) -> [Option<Waker>; 2] {
        [self.reader.take(), self.writer.take()]
    }
}

/// [`scatter`], leaving out the first `skip` bytes of `bufs`.
fn scatter_from(from: &[u8], bufs: &mut [IoSliceMut<'_>], mut skip: usize) -> usize {
    let mut copied = 0;
    for buf in bufs {
        let Some(rest) = buf.get_mut(skip..) else {
            skip -= buf.len();
            continue;
        };
        skip = 0;
        let part = &from[copied..][..rest.len().min(from.len() - copied)];
        rest[..part.len()].copy_from_slice(part);
        copied += part.len();
    }
    copied
}

/// Gives the descriptors of one message to the reader, or closes them if it does not ask for any.
fn hand_over(message: Vec<OwnedFd>, fds: Option<&mut Descriptors>, flags: ReadFlags) -> io::Result<()> {
    let Some(fds) = fds else { return Ok(()) };
    if !flags.contains(ReadFlags::KEEP_DESCRIPTOR_MODE) {
        for fd in &message {
            let mode = rustix::fs::fcntl_getfl(fd)?;
            if mode.contains(OFlags::NONBLOCK) {
                rustix::fs::fcntl_setfl(fd, mode - OFlags::NONBLOCK)?;
            }
        }
    }
    fds.add(message)
}

fn broken(by_this_side: bool) -> io::Error {
    let message = if by_this_side {
        "writing to this end of the pair has been shut down"
    } else {
        "the other end of the pair is closed or no longer reads"
    };
    io::Error::new(io::ErrorKind::BrokenPipe, message)
}

fn register(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) => waker.clone_from(cx.waker()),
        empty => *empty = Some(cx.waker().clone()),
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}
