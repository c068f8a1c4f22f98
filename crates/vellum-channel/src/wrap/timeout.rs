//! A limit on how long an operation of a channel waits.

use super::alarm::{Alarm, Executor};
use super::{Way, forward};
use crate::channel::{Channel, Closed, Interest, ReadFlags, WriteFlags, ZeroCopy, stream_of_channel};
use crate::descriptors::Descriptors;
use crate::error::{ErrorKind, error};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::Instant;

/// How long operations may wait without any progress; `None` is for ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeoutOptions {
    /// For a byte, or the end of the stream, to arrive.
    pub read: Option<Duration>,
    /// For a byte to be taken; also for flush, shutdown and close.
    pub write: Option<Duration>,
}

/// Fails an operation that has waited for too long, with [`ErrorKind::Timeout`].
///
/// The time starts when an operation begins to wait and ends with the next transfer in that direction, also when the
/// operation is dropped and begun again meanwhile, as in a `select!` loop. (When nothing has waited for a while, the time
/// starts anew.) Waiting for readiness counts like the operation it is for.
///
/// A timeout transfers nothing and loses nothing: the channel stays as usable as it was, and the next operation has the
/// whole time again. What to do with a peer that does not answer is the caller's decision.
#[derive(Debug)]
pub struct Timeout<C> {
    inner: C,
    options: TimeoutOptions,
    waits: [Wait; 2],
    executor: Executor,
}

/// A direction in which something waits, or not.
#[derive(Debug, Default)]
struct Wait {
    deadline: Option<Instant>,
    alarm: Alarm,
}

impl Wait {
    fn clear(&mut self) {
        self.deadline = None;
        self.alarm.clear();
    }

    /// Whether `limit` has passed since the wait began.
    fn poll(&mut self, cx: &mut Context<'_>, executor: &Executor, limit: Duration) -> Poll<io::Result<()>> {
        let now = Instant::now();
        // A deadline long past belongs to an operation that was dropped: one that waits is polled when its time is up.
        let slack = limit.min(Duration::from_secs(1));
        if self.deadline.is_some_and(|deadline| now.saturating_duration_since(deadline) > slack) {
            self.deadline = None;
        }
        // A limit beyond all time is none.
        let Some(latest) = now.checked_add(limit) else { return Poll::Pending };
        let deadline = *self.deadline.get_or_insert(latest);
        self.alarm.poll(cx, executor, deadline)
    }
}

impl<C: Channel> Timeout<C> {
    /// Limits the waits of `inner`.
    pub fn new(inner: C, options: TimeoutOptions) -> Self {
        Self { inner, options, waits: Default::default(), executor: Executor::Current }
    }

    /// The limits.
    pub fn options(&self) -> TimeoutOptions {
        self.options
    }

    /// Changes the limits. Waits that have begun keep theirs.
    pub fn set_options(&mut self, options: TimeoutOptions) {
        self.options = options;
    }

    /// The channel inside.
    pub fn into_inner(self) -> C {
        self.inner
    }

    fn limit(&self, way: Way) -> Option<Duration> {
        match way {
            Way::Read => self.options.read,
            Way::Write => self.options.write,
        }
    }

    /// Passes on what the channel inside said, unless it has waited for too long.
    fn in_time<T>(
        &mut self,
        cx: &mut Context<'_>,
        way: Way,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let limit = self.limit(way);
        let wait = &mut self.waits[way as usize];
        match (&polled, limit) {
            (Poll::Pending, Some(limit)) => match wait.poll(cx, &self.executor, limit) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                Poll::Ready(Ok(())) => {
                    wait.clear();
                    Poll::Ready(Err(self.timed_out(way, limit)))
                }
            },
            (Poll::Pending, None) => polled,
            (Poll::Ready(Err(error)), _) if error.kind() == io::ErrorKind::WouldBlock => polled,
            (Poll::Ready(_), _) => {
                if wait.deadline.is_some() {
                    wait.clear();
                }
                polled
            }
        }
    }

    fn timed_out(&self, way: Way, limit: Duration) -> io::Error {
        let what = match way {
            Way::Read => "nothing arrived on",
            Way::Write => "nothing could be sent on",
        };
        let label = self.label();
        let message = format!("{what} {label} for {limit:?}: try again, or close it");
        error(ErrorKind::Timeout, message)
    }

    fn poll_send_buffered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(cx);
        self.in_time(cx, Way::Write, polled)
    }

    fn poll_end_writing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.in_time(cx, Way::Write, polled)
    }
}

impl<C: Channel> Channel for Timeout<C> {
    forward!(base seek);

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        let polled = self.inner.poll_readv(cx, bufs, fds, flags);
        self.in_time(cx, Way::Read, polled)
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        let polled = self.inner.poll_writev(cx, bufs, fds, flags);
        self.in_time(cx, Way::Write, polled)
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        let polled = self.inner.poll_ready(cx, interest);
        // It has waited in every direction asked for, until one is ready: that it is does not end the wait for bytes,
        // which the operation that follows does.
        if let Poll::Ready(done) = polled {
            return Poll::Ready(done);
        }
        for (condition, way) in [(Interest::READ, Way::Read), (Interest::WRITE, Way::Write)] {
            if interest.contains(condition)
                && let Poll::Ready(timed_out) = self.in_time(cx, way, Poll::<io::Result<Interest>>::Pending)
            {
                return Poll::Ready(timed_out);
            }
        }
        Poll::Pending
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        let polled = self.inner.poll_close(cx);
        self.in_time(cx, Way::Write, polled)
    }

    fn poll_flush_zero_copy(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<ZeroCopy>> {
        let polled = self.inner.poll_flush_zero_copy(cx);
        self.in_time(cx, Way::Write, polled)
    }

    fn poll_preadv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        let polled = self.inner.poll_preadv(cx, bufs, offset);
        self.in_time(cx, Way::Read, polled)
    }

    fn poll_pwritev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        let polled = self.inner.poll_pwritev(cx, bufs, offset);
        self.in_time(cx, Way::Write, polled)
    }

    fn detach(&mut self) -> io::Result<()> {
        self.inner.detach()?;
        self.executor = Executor::Detached;
        self.waits.iter_mut().for_each(Wait::clear);
        Ok(())
    }

    fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        self.inner.attach(executor)?;
        self.executor = Executor::Attached(executor.clone());
        self.waits.iter_mut().for_each(Wait::clear);
        Ok(())
    }
}

stream_of_channel!([C: Channel] Timeout<C>);
