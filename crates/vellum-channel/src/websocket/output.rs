//! The writing side of a WebSocket: the sender joined to the inner channel.

use super::frame::{Header, Opcode, status};
use super::send::close_payload;
use super::wakers::Role;
use super::{End, WebSocket};
use crate::channel::{Channel, WriteFlags};
use crate::error::{ErrorKind, error, kind_of};
use smallvec::SmallVec;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// Payload of at least this is sent from where the user has it; less is cheaper to copy behind its header.
const DIRECT_MIN: usize = 16 << 10;
/// A masked message is sent in pieces of this, each masked right before: it is still in the processor's cache when the
/// kernel copies it. Of 32 to 256 KiB the largest is the fastest: a smaller piece wakes the peer for less.
const PIECE: usize = 256 << 10;
/// Slices handed to the inner channel in one call, the header's beside.
const SLICES_MAX: usize = 64;

/// Whether the operation can be tried again: nothing is broken.
fn is_passing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || kind_of(error) == Some(ErrorKind::Detached)
}

impl<C: Channel> WebSocket<C> {
    /// Queues the control frames that are due and sends what is queued, as far as the inner channel takes it.
    pub(super) fn poll_push(
        &mut self,
        cx: &mut Context<'_>,
        role: Role,
        flags: WriteFlags,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_send_queue(cx, role, flags))?;
            self.queue_control()?;
            if self.sender.queued().is_empty() {
                break;
            }
            self.sender.needs_flush = true;
        }
        if self.sender.needs_flush {
            ready!(self.poll_flush_inner(cx, role))?;
        }
        self.poll_end_inner(cx, role)
    }

    /// The same for those who came to read: what is wrong with sending, the next write tells.
    pub(super) fn push_answers(&mut self, cx: &mut Context<'_>, flags: WriteFlags) {
        let is_idle = !self.sender.has_work() && self.pings.due().is_none();
        if is_idle || self.sender.is_broken {
            return;
        }
        if let Poll::Ready(Err(error)) = self.poll_push(cx, Role::Reader, flags) {
            tracing::debug!(%error, "an answer on a WebSocket could not be sent");
        }
    }

    fn queue_control(&mut self) -> io::Result<()> {
        let due = self.pings.due();
        if self.sender.queue_control(due.map(u64::to_be_bytes))?
            && let Some(number) = due
        {
            self.pings.sent(number);
        }
        Ok(())
    }

    fn poll_send_queue(
        &mut self,
        cx: &mut Context<'_>,
        role: Role,
        flags: WriteFlags,
    ) -> Poll<io::Result<()>> {
        while !self.sender.queued().is_empty() {
            let bufs = [IoSlice::new(self.sender.queued())];
            let mut cx = self.wakers.writable(role, cx);
            let polled = poll_write_inner(&mut self.inner, &mut cx, &bufs, flags);
            let sent = ready!(self.note_broken(polled))?;
            self.sender.sent(sent);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_flush_inner(&mut self, cx: &mut Context<'_>, role: Role) -> Poll<io::Result<()>> {
        let mut cx = self.wakers.writable(role, cx);
        let polled = Pin::new(&mut self.inner).poll_flush(&mut cx);
        ready!(self.note_broken(or_pending(polled)))?;
        self.sender.needs_flush = false;
        Poll::Ready(Ok(()))
    }

    /// When both sides have said goodbye, the server ends the stream below; after a violation both do.
    fn poll_end_inner(&mut self, cx: &mut Context<'_>, role: Role) -> Poll<io::Result<()>> {
        let is_due = match self.end {
            Some(End::Closed(_)) => !self.sender.is_masking(),
            Some(End::Failed { .. }) => true,
            Some(End::Cut) | None => false,
        };
        if !is_due || self.has_ended_inner || !self.sender.has_closed() {
            return Poll::Ready(Ok(()));
        }
        let mut cx = self.wakers.writable(role, cx);
        // A peer that is gone needs no end of the stream.
        let _ended = ready!(Pin::new(&mut self.inner).poll_shutdown(&mut cx));
        self.has_ended_inner = true;
        Poll::Ready(Ok(()))
    }

    fn note_broken<T>(&mut self, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(error)) = &polled
            && !is_passing(error)
        {
            self.sender.break_off();
            self.pings.end();
        }
        polled
    }

    /// Why nothing can be written any more, if so.
    fn check_writing(&self) -> io::Result<()> {
        let why = match &self.end {
            _ if self.sender.is_broken => "an earlier write failed",
            Some(End::Closed(_)) => "the peer has closed it",
            Some(End::Failed { .. }) => "it has failed",
            _ if self.sender.is_closing() => "its writing side has been ended",
            _ => return Ok(()),
        };
        let message = format!("{}: nothing can be written any more: {why}", self.label());
        Err(error(ErrorKind::WebSocketClosed, message))
    }

    /// Sends a message of `bufs`, or of a part of them.
    pub(super) fn poll_message(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        let total = bufs.iter().fold(0_usize, |total, buf| total.saturating_add(buf.len()));
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        self.check_writing()?;
        let pushed = self.poll_push(cx, Role::Writer, flags);
        if let Poll::Ready(Err(error)) = pushed {
            // A queue with room takes the message also while the inner channel cannot.
            if !is_passing(&error) || !self.sender.has_room() {
                return Poll::Ready(Err(error));
            }
        } else if !self.sender.has_room() {
            return Poll::Pending;
        }
        let len = total.min(self.write_max);
        let is_waiting = !self.sender.queued().is_empty();
        self.queue_control()?;
        if !self.sender.is_masking() && self.sender.queued().is_empty() {
            let bufs = &bufs[..bufs.len().min(SLICES_MAX)];
            let direct = bufs.iter().fold(0, |sum: usize, buf| sum.saturating_add(buf.len())).min(len);
            if direct >= DIRECT_MIN {
                return self.poll_message_direct(cx, bufs, direct, flags);
            }
        }
        let mut mask = self.sender.begin_frame(Opcode::Binary, len)?;
        let mut is_full = is_waiting;
        let mut done = 0;
        while done < len {
            // Where the inner channel takes no more, the rest waits here: a frame that has begun must go on.
            let part = if is_full { len - done } else { PIECE.min(len - done) };
            self.sender.queue_payload(bufs, done, part, &mut mask);
            done += part;
            if is_full {
                continue;
            }
            match self.poll_send_queue(cx, Role::Writer, flags) {
                Poll::Ready(Err(error)) if !is_passing(&error) => return Poll::Ready(Err(error)),
                sent => is_full = !matches!(sent, Poll::Ready(Ok(()))),
            }
        }
        Poll::Ready(Ok(len))
    }

    /// Sends the first `len` bytes of `bufs` as one message without copying what the inner channel takes at once.
    fn poll_message_direct(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        len: usize,
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        let header = Header::encode(Opcode::Binary, len, None);
        let whole = header.as_bytes().len() + len;
        let mut done = 0;
        while done < whole {
            let window = send_window(header.as_bytes(), bufs, len, done);
            let mut cx = self.wakers.writable(Role::Writer, cx);
            let polled = poll_write_inner(&mut self.inner, &mut cx, &window, flags);
            match self.note_broken(polled) {
                Poll::Ready(Ok(sent)) => done += sent,
                Poll::Ready(Err(error)) if !is_passing(&error) => return Poll::Ready(Err(error)),
                // Nothing has been promised yet.
                waiting if done == 0 => return waiting,
                // A frame that has begun must go on: the rest waits here.
                _ => {
                    self.sender.queue_rest(&header, bufs, len, done);
                    break;
                }
            }
        }
        Poll::Ready(Ok(len))
    }

    /// Sends what waits, and what waits in the inner channel.
    pub(super) fn poll_send_buffered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_open()?;
        if self.sender.is_broken {
            self.check_writing()?;
        }
        self.sender.needs_flush = true;
        self.poll_push(cx, Role::Writer, WriteFlags::empty())
    }

    /// Sends the close frame. The peer answers it with its own and sends no more.
    pub(super) fn poll_end_writing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_open()?;
        self.sender.close(close_payload(status::NORMAL, ""));
        self.poll_send_buffered(cx)
    }

    /// Whether a write would take something, or fail, at once.
    pub(super) fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.check_writing().is_err() {
            return Poll::Ready(Ok(()));
        }
        match self.poll_push(cx, Role::Writer, WriteFlags::empty()) {
            // The write tells.
            Poll::Ready(Err(error)) if !is_passing(&error) => Poll::Ready(Ok(())),
            _ if self.sender.has_room() => Poll::Ready(Ok(())),
            waiting => waiting,
        }
    }
}

fn or_pending<T>(polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
    match polled {
        Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
        polled => polled,
    }
}

fn poll_write_inner<C: Channel>(
    inner: &mut C,
    cx: &mut Context<'_>,
    bufs: &[IoSlice<'_>],
    flags: WriteFlags,
) -> Poll<io::Result<usize>> {
    match ready!(or_pending(inner.poll_writev(cx, bufs, &[], flags & WriteFlags::NO_WAIT)))? {
        0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        sent => Poll::Ready(Ok(sent)),
    }
}

/// What is left to send of a frame: of its header and of the first `len` bytes of `bufs`, behind `done` bytes.
fn send_window<'a>(
    header: &'a [u8],
    bufs: &'a [IoSlice<'_>],
    mut len: usize,
    done: usize,
) -> SmallVec<[IoSlice<'a>; 16]> {
    let mut window = SmallVec::new();
    if let Some(rest) = header.get(done..).filter(|rest| !rest.is_empty()) {
        window.push(IoSlice::new(rest));
    }
    let mut skip = done.saturating_sub(header.len());
    for buf in bufs {
        let buf = &buf[..len.min(buf.len())];
        len -= buf.len();
        let from = skip.min(buf.len());
        skip -= from;
        if from < buf.len() {
            window.push(IoSlice::new(&buf[from..]));
        }
    }
    window
}
