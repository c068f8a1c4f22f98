//! The reading side of a WebSocket: the receiver joined to the inner channel.

use super::frame::{Violation, may_be_sent, status};
use super::head::quote;
use super::ping::Silence;
use super::receive::{Short, Step, window};
use super::send::close_payload;
use super::wakers::Role;
use super::{End, WebSocket, WebSocketClose};
use crate::channel::{Channel, ReadFlags, WriteFlags};
use crate::error::{ErrorKind, error, kind_of};
use std::io::{self, IoSliceMut};
use std::task::{Context, Poll, ready};

/// Reads of the inner channel that bring no payload, until other tasks have their turn.
const READS_PER_POLL: usize = 32;

/// Payload of at least this in one read: more follows at once, mostly.
const MUCH: usize = 16 << 10;

/// How often a reader asks for the rest of a frame, after a read that brought [`MUCH`] of it, before it sleeps: while the
/// peer is at it, to be put to sleep and woken costs more, most of all the sender, who has to wake it on another processor.
/// It takes less than ten microseconds.
const ASKS: u32 = 16;

/// What the input came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Starved,
    Payload,
    Ended,
}

impl<C: Channel> WebSocket<C> {
    /// Deals with what came in, until payload is next or more bytes are needed.
    pub(super) fn digest(&mut self) -> Progress {
        while self.end.is_none() {
            match self.receiver.step() {
                Ok(Step::Payload) => return Progress::Payload,
                Ok(Step::Starved) => return Progress::Starved,
                Ok(Step::Ping(payload)) => self.sender.pong(payload),
                Ok(Step::Pong(payload)) => self.pings.answered(&payload),
                Ok(Step::Close(payload)) => match read_close(&payload) {
                    Ok(close) => self.peer_closes(close),
                    Err(violation) => self.fail(violation),
                },
                Err(violation) => self.fail(violation),
            }
        }
        Progress::Ended
    }

    fn peer_closes(&mut self, close: WebSocketClose) {
        // Nothing that follows counts.
        self.receiver.discard();
        let code = close.code.unwrap_or(status::NORMAL);
        self.sender.close(close_payload(code, "peer requested close"));
        self.finish(End::Closed(close));
    }

    fn fail(&mut self, violation: Violation) {
        self.receiver.discard();
        // The peer is told the kind only: the rest may quote it.
        self.sender.close(close_payload(violation.code, violation.kind.code()));
        self.finish(End::Failed { kind: violation.kind, message: format!("the peer {}", violation.what) });
    }

    pub(super) fn finish(&mut self, end: End) {
        self.pings.end();
        self.end.get_or_insert(end);
    }

    /// Reads into `bufs`, which have `room` bytes.
    pub(super) fn poll_input(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        room: usize,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        for _ in 0..READS_PER_POLL {
            let mut copied = 0;
            let progress = loop {
                match self.digest() {
                    Progress::Payload if flags.contains(ReadFlags::PEEK) => {
                        return Poll::Ready(Ok(self.receiver.peek(bufs, 0)));
                    }
                    Progress::Payload if copied < room => copied += self.receiver.take(bufs, copied),
                    other => break other,
                }
            };
            if copied > 0 {
                return Poll::Ready(Ok(copied));
            }
            if progress == Progress::Ended {
                return Poll::Ready(self.tell_end(flags));
            }
            let asks_again =
                self.asks_left > 0 && self.receiver.is_in_frame() && !flags.contains(ReadFlags::NO_WAIT);
            let asked = if asks_again { flags | ReadFlags::NO_WAIT } else { flags };
            let polled = match self.receiver.direct(room).filter(|_| !flags.contains(ReadFlags::PEEK)) {
                Some(part) => self.poll_read_direct(cx, bufs, room, part, asked),
                None => self.poll_read_ahead(cx, Role::Reader, asked).map_ok(|()| 0),
            };
            match polled {
                Poll::Ready(Err(error)) if asks_again && error.kind() == io::ErrorKind::WouldBlock => {
                    self.asks_left -= 1;
                    break;
                }
                polled => match ready!(polled)? {
                    0 => {}
                    read => return Poll::Ready(Ok(read)),
                },
            }
        }
        // Other tasks have their turn, then this one again.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Waits until payload is next, or the end.
    pub(super) fn poll_payload(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Progress>> {
        for _ in 0..READS_PER_POLL {
            match self.digest() {
                Progress::Starved => ready!(self.poll_read_ahead(cx, Role::Reader, ReadFlags::empty()))?,
                found => return Poll::Ready(Ok(found)),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads what is there into the buffer.
    pub(super) fn poll_read_ahead(
        &mut self,
        cx: &mut Context<'_>,
        role: Role,
        flags: ReadFlags,
    ) -> Poll<io::Result<()>> {
        if let Some(error) = self.read_error.take() {
            return Poll::Ready(Err(error));
        }
        let mut cx = self.wakers.readable(role, cx);
        let mut bufs = [IoSliceMut::new(self.receiver.room())];
        let polled = self.inner.poll_readv(&mut cx, &mut bufs, None, inner_flags(flags));
        let read = ready!(end_of_truncated(polled))?;
        self.receiver.filled(read);
        self.note_read(read);
        Poll::Ready(Ok(()))
    }

    /// Reads `part` bytes of payload right into `bufs`, and what follows them into the buffer.
    fn poll_read_direct(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        room: usize,
        part: usize,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        if let Some(error) = self.read_error.take() {
            return Poll::Ready(Err(error));
        }
        let mut cx = self.wakers.readable(Role::Reader, cx);
        let flags = inner_flags(flags);
        let polled = if part == room {
            self.inner.poll_readv(&mut cx, bufs, None, flags)
        } else {
            let mut window = window(bufs, 0, part);
            window.push(IoSliceMut::new(self.receiver.room()));
            self.inner.poll_readv(&mut cx, &mut window, None, flags)
        };
        let read = ready!(end_of_truncated(polled))?;
        let payload = read.min(part);
        if payload >= MUCH {
            self.asks_left = ASKS;
        }
        self.receiver.pass_direct(bufs, payload);
        self.receiver.filled(read - payload);
        self.note_read(read);
        Poll::Ready(Ok(payload))
    }

    fn note_read(&mut self, read: usize) {
        if read == 0 {
            self.is_inner_over = true;
            self.finish(End::Cut);
        } else if let Some(keep_alive) = &mut self.keep_alive {
            keep_alive.was_heard = true;
        }
    }

    /// What a read answers at the end.
    pub(super) fn tell_end(&self, flags: ReadFlags) -> io::Result<usize> {
        let label = self.label();
        match &self.end {
            Some(End::Closed(close)) if close.is_normal() => Ok(0),
            Some(End::Closed(close)) => {
                let code = close.code.unwrap_or_default();
                let reason = quote(&close.reason);
                let message =
                    format!("{label}: the peer closed with code {code} and the reason \"{reason}\"");
                Err(error(ErrorKind::WebSocketClosed, message))
            }
            Some(End::Failed { kind, message }) => Err(error(*kind, format!("{label}: {message}"))),
            Some(End::Cut) | None => {
                if flags.contains(ReadFlags::RELAXED_EOF) || self.controls.is_read_ended() {
                    return Ok(0);
                }
                let message =
                    format!("{label} ended without a close frame: what the peer sent may have been cut");
                Err(error(ErrorKind::UnexpectedEof, message))
            }
        }
    }

    /// While a reader waits: asks a silent peer whether it is still there.
    pub(super) fn poll_keep_alive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        while let Some(keep_alive) = &mut self.keep_alive {
            match ready!(keep_alive.poll(cx)) {
                Silence::Ask => {
                    self.pings.request();
                    self.push_answers(cx, WriteFlags::empty());
                }
                Silence::GiveUp(time) => {
                    let message = format!("the peer has been silent for {time:?}, it answers no ping");
                    self.finish(End::Failed { kind: ErrorKind::Timeout, message });
                    return Poll::Ready(self.tell_end(ReadFlags::empty()));
                }
            }
        }
        Poll::Pending
    }
}

fn inner_flags(flags: ReadFlags) -> ReadFlags {
    flags & (ReadFlags::RELAXED_EOF | ReadFlags::NO_WAIT)
}

/// An inner stream that ended without its own goodbye has ended: whether that matters, the close frame tells.
fn end_of_truncated(polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
    match polled {
        Poll::Ready(Err(error)) if kind_of(&error) == Some(ErrorKind::TlsTruncated) => Poll::Ready(Ok(0)),
        polled => polled,
    }
}

/// Reads the payload of a close frame.
fn read_close(payload: &Short) -> Result<WebSocketClose, Violation> {
    let Some((code, reason)) = payload.split_first_chunk() else {
        return match payload.len() {
            0 => Ok(WebSocketClose::default()),
            _ => Err(Violation::protocol("closed with half of a status code")),
        };
    };
    let code = u16::from_be_bytes(*code);
    if !may_be_sent(code) {
        return Err(Violation::protocol(format!(
            "closed with the status code {code}, which may not be sent"
        )));
    }
    let reason = std::str::from_utf8(reason).map_err(|_| Violation {
        code: status::BAD_DATA,
        kind: ErrorKind::WebSocketProtocol,
        what: "gave a reason for its close that is not UTF-8".into(),
    })?;
    Ok(WebSocketClose { code: Some(code), reason: reason.to_owned() })
}
