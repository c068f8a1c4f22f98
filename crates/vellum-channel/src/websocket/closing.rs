//! The end of a WebSocket: goodbyes, within bounds.

use super::frame::status;
use super::input::Progress;
use super::send::close_payload;
use super::wakers::Role;
use super::{End, WebSocket};
use crate::channel::{Channel, Closed, ReadFlags, WriteFlags};
use crate::error::{ErrorKind, error};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::runtime::Handle;
use tokio::time::{Sleep, sleep};

/// Reads of what nobody wants any more, until other tasks have their turn.
const READS_PER_POLL: usize = 32;

/// How far a close is.
#[derive(Debug, Default)]
pub(super) struct Closing {
    has_begun: bool,
    /// Messages were waiting to be sent when it began.
    owes: bool,
    deadline: Option<Pin<Box<Sleep>>>,
    /// How the goodbye went.
    goodbye: Option<io::Result<()>>,
    closed: Option<Closed>,
}

impl Closing {
    pub fn is_closed(&self) -> bool {
        self.closed.is_some()
    }

    /// Lets go of the executor.
    pub fn detach(&mut self) {
        self.deadline = None;
    }
}

impl<C: Channel> WebSocket<C> {
    pub(super) fn poll_close_all(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        if let Some(closed) = self.closing.closed {
            return Poll::Ready(Ok(closed));
        }
        if self.closing.goodbye.is_none() {
            let goodbye = ready!(self.poll_goodbye_in_time(cx));
            self.closing.goodbye = Some(goodbye);
        }
        let mut cx = self.wakers.writable(Role::Writer, cx);
        let inner = ready!(self.inner.poll_close(&mut cx));
        self.closing.closed = Some(inner.as_ref().map_or_else(|_| Closed::default(), |closed| *closed));
        self.closing.deadline = None;
        self.finish(End::Cut);
        self.sender.break_off();
        self.wakers.wake_all();
        match self.closing.goodbye.take() {
            Some(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(inner),
        }
    }

    fn poll_goodbye_in_time(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !std::mem::replace(&mut self.closing.has_begun, true) {
            self.closing.owes = !self.sender.queued().is_empty();
        }
        let polled = self.poll_goodbye(cx);
        let owes = self.closing.owes;
        match polled {
            // Without messages to deliver, a peer that is gone already is as good as one that answers.
            Poll::Ready(Err(_)) if !owes => Poll::Ready(Ok(())),
            Poll::Ready(done) => Poll::Ready(done),
            Poll::Pending => {
                ready!(self.poll_deadline(cx));
                let is_sent = self.sender.has_closed() && !self.sender.needs_flush;
                if is_sent || !owes {
                    return Poll::Ready(Ok(()));
                }
                let left = self.sender.queued().len();
                let time = self.close_timeout;
                let message = format!(
                    "{}: closed with {left} bytes unsent: the peer took none for {time:?}",
                    self.label()
                );
                Poll::Ready(Err(error(ErrorKind::Timeout, message)))
            }
        }
    }

    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.close_timeout.is_zero() {
            return Poll::Ready(());
        }
        if self.closing.deadline.is_none() && Handle::try_current().is_err() {
            // No clock here: what goes out is waited for, an answer is not.
            return if self.sender.has_closed() { Poll::Ready(()) } else { Poll::Pending };
        }
        let time = self.close_timeout;
        self.closing.deadline.get_or_insert_with(|| Box::pin(sleep(time))).as_mut().poll(cx)
    }

    /// Sends the close frame behind all messages, and waits for that of the peer.
    fn poll_goodbye(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.sender.is_broken {
            return Poll::Ready(Ok(()));
        }
        self.sender.close(close_payload(status::NORMAL, ""));
        for _ in 0..READS_PER_POLL {
            ready!(self.poll_push(cx, Role::Writer, WriteFlags::empty()))?;
            match self.digest() {
                Progress::Payload => self.receiver.skip(),
                Progress::Starved => ready!(self.poll_read_ahead(cx, Role::Writer, ReadFlags::empty()))?,
                Progress::Ended => match self.end {
                    // It may still send what it sent before it learns of that: closing on it would reset the
                    // connection, and our close frame would be lost.
                    Some(End::Failed { .. }) if !self.is_inner_over => {
                        ready!(self.poll_read_ahead(cx, Role::Writer, ReadFlags::empty()))?;
                        self.receiver.discard();
                    }
                    _ => return Poll::Ready(Ok(())),
                },
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
