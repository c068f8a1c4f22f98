//! Counts and traces of a channel.

use super::trace::{Head, Operation, Trace};
use super::{Way, forward};
use crate::channel::{Channel, Closed, Interest, ReadFlags, WriteFlags, stream_of_channel};
use crate::descriptors::Descriptors;
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, SeekFrom};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

/// What went through a channel in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DirectionCounts {
    /// Bytes transferred.
    pub bytes: u64,
    /// Reads or writes that came to an end: with bytes, with the end of the stream or with an error.
    pub operations: u64,
    /// Those that failed. (To have to wait is no failure.)
    pub errors: u64,
    /// Times that an operation had to wait, or answered that it would have to.
    pub waits: u64,
    /// Time that was spent waiting, from the first look to the transfer, up to now.
    pub blocked: Duration,
    /// Descriptors passed along.
    pub descriptors: u64,
}

/// What went through a channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Read.
    pub read: DirectionCounts,
    /// Written.
    pub written: DirectionCounts,
    /// Since the channel was wrapped.
    pub age: Duration,
}

/// The counts of an [`Observe`], readable from any thread, also after its end.
#[derive(Clone, Debug)]
pub struct Counters(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    begun: Instant,
    ways: [Counter; 2],
}

#[derive(Debug, Default)]
struct Counter {
    bytes: AtomicU64,
    operations: AtomicU64,
    errors: AtomicU64,
    waits: AtomicU64,
    blocked_nanoseconds: AtomicU64,
    descriptors: AtomicU64,
    /// When the wait that is going on began, in nanoseconds since the channel was wrapped; 0 for none.
    waiting_since: AtomicU64,
}

impl Counters {
    /// Whether both count the same channel.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn new() -> Self {
        Self(Arc::new(Shared { begun: Instant::now(), ways: Default::default() }))
    }

    /// The counts of now. (Those of a transfer that ends meanwhile may be there in part.)
    pub fn snapshot(&self) -> Counts {
        let now = self.now();
        Counts {
            read: self.way(Way::Read).snapshot(now),
            written: self.way(Way::Write).snapshot(now),
            age: Duration::from_nanos(now),
        }
    }

    fn way(&self, way: Way) -> &Counter {
        &self.0.ways[way as usize]
    }

    fn now(&self) -> u64 {
        u64::try_from(self.0.begun.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1)
    }
}

impl Counter {
    fn snapshot(&self, now: u64) -> DirectionCounts {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let waiting = match count(&self.waiting_since) {
            0 => 0,
            since => now.saturating_sub(since),
        };
        DirectionCounts {
            bytes: count(&self.bytes),
            operations: count(&self.operations),
            errors: count(&self.errors),
            waits: count(&self.waits),
            blocked: Duration::from_nanos(count(&self.blocked_nanoseconds).saturating_add(waiting)),
            descriptors: count(&self.descriptors),
        }
    }
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

type Callback = Box<dyn Fn(&Trace<'_>) + Send + Sync>;

enum Sink {
    None,
    Callback(Callback),
    Tracing,
}

/// Counts what goes through a channel and, if asked to, tells of every operation.
///
/// ```
/// use vellum_channel::{ChannelExt, Null, Observe};
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let mut null = Observe::new(Null::new()).with_trace(|trace| println!("{trace}"));
/// let counters = null.counters();
/// null.writev(&[std::io::IoSlice::new(b"hello world")]).await?;
/// assert_eq!(counters.snapshot().written.bytes, 11);
/// # std::io::Result::Ok(()) }).unwrap();
/// ```
pub struct Observe<C> {
    inner: C,
    counters: Counters,
    sink: Sink,
}

impl<C: Channel> Observe<C> {
    /// Counts what goes through `inner`.
    pub fn new(inner: C) -> Self {
        Self { inner, counters: Counters::new(), sink: Sink::None }
    }

    /// Tells `callback` of every operation that comes to an end, in the task that carries it out: it should be quick.
    #[must_use]
    pub fn with_trace(mut self, callback: impl Fn(&Trace<'_>) + Send + Sync + 'static) -> Self {
        self.sink = Sink::Callback(Box::new(callback));
        self
    }

    /// Makes every operation that comes to an end an event of [`tracing`], level `TRACE`, target `vellum_channel`.
    #[must_use]
    pub fn with_tracing(mut self) -> Self {
        self.sink = Sink::Tracing;
        self
    }

    /// The counts.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    /// The channel inside.
    pub fn into_inner(self) -> C {
        self.inner
    }

    /// Counts what an operation has come to.
    fn count(&self, way: Way, polled: &Poll<io::Result<usize>>, descriptors: usize) {
        let counter = self.counters.way(way);
        let is_waiting = counter.waiting_since.load(Ordering::Relaxed) != 0;
        match polled {
            Poll::Pending => {
                if !is_waiting {
                    add(&counter.waits, 1);
                    counter.waiting_since.store(self.counters.now(), Ordering::Relaxed);
                }
                return;
            }
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                add(&counter.waits, 1);
                return;
            }
            Poll::Ready(Err(_)) => add(&counter.errors, 1),
            Poll::Ready(Ok(bytes)) => {
                add(&counter.bytes, *bytes as u64);
                if descriptors > 0 {
                    add(&counter.descriptors, descriptors as u64);
                }
            }
        }
        add(&counter.operations, 1);
        if is_waiting {
            let since = counter.waiting_since.swap(0, Ordering::Relaxed);
            add(&counter.blocked_nanoseconds, self.counters.now().saturating_sub(since));
        }
    }

    fn is_traced(&self) -> bool {
        match self.sink {
            Sink::None => false,
            Sink::Callback(_) => true,
            Sink::Tracing => tracing::enabled!(target: "vellum_channel", tracing::Level::TRACE),
        }
    }

    /// Tells of an operation, unless it waits.
    fn trace<T>(
        &self,
        operation: Operation,
        polled: &Poll<io::Result<T>>,
        number: impl Fn(&T) -> u64,
        head: impl Fn(usize) -> Head,
    ) {
        let Poll::Ready(done) = polled else { return };
        if !self.is_traced() {
            return;
        }
        let outcome = done.as_ref().map(number);
        if outcome.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            return;
        }
        let head = head(outcome.map_or(0, |count| usize::try_from(count).unwrap_or(usize::MAX)));
        let trace = Trace { operation, outcome, head: head.bytes() };
        match &self.sink {
            Sink::None => {}
            Sink::Callback(callback) => callback(&trace),
            Sink::Tracing => {
                tracing::trace!(target: "vellum_channel", channel = %self.label(), "{trace}");
            }
        }
    }

    fn trace_plain<T>(&self, operation: Operation, polled: &Poll<io::Result<T>>) {
        self.trace(operation, polled, |_| 0, |_| Head::empty());
    }

    fn poll_send_buffered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(cx);
        self.trace_plain(Operation::Flush, &polled);
        polled
    }

    fn poll_end_writing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.trace_plain(Operation::EndWriting, &polled);
        polled
    }
}

fn of_bytes(count: &usize) -> u64 {
    *count as u64
}

impl<C: Channel> Channel for Observe<C> {
    forward!(base executor flush_zero_copy);

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        mut fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        let had = fds.as_ref().map_or(0, |fds| fds.len());
        let polled = self.inner.poll_readv(cx, bufs, fds.as_deref_mut(), flags);
        if flags.contains(ReadFlags::PEEK) {
            // What is peeked at is read, and counted, later.
            self.trace(Operation::Peek, &polled, of_bytes, |count| Head::of_mut(bufs, count));
            return polled;
        }
        let has = fds.as_ref().map_or(0, |fds| fds.len());
        self.count(Way::Read, &polled, has.saturating_sub(had));
        self.trace(Operation::Read, &polled, of_bytes, |count| Head::of_mut(bufs, count));
        polled
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        let polled = self.inner.poll_writev(cx, bufs, fds, flags);
        self.count(Way::Write, &polled, fds.len());
        self.trace(Operation::Write, &polled, of_bytes, |count| Head::of(bufs, count));
        polled
    }

    fn poll_preadv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        let polled = self.inner.poll_preadv(cx, bufs, offset);
        self.count(Way::Read, &polled, 0);
        self.trace(Operation::ReadAt(offset), &polled, of_bytes, |count| Head::of_mut(bufs, count));
        polled
    }

    fn poll_pwritev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        let polled = self.inner.poll_pwritev(cx, bufs, offset);
        self.count(Way::Write, &polled, 0);
        self.trace(Operation::WriteAt(offset), &polled, of_bytes, |count| Head::of(bufs, count));
        polled
    }

    /// Waiting for readiness counts as waiting, until an operation follows.
    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        let polled = self.inner.poll_ready(cx, interest);
        if polled.is_pending() {
            for (condition, way) in [(Interest::READ, Way::Read), (Interest::WRITE, Way::Write)] {
                if interest.contains(condition) {
                    self.count(way, &Poll::Pending, 0);
                }
            }
        }
        polled
    }

    fn poll_seek(&mut self, cx: &mut Context<'_>, to: SeekFrom) -> Poll<io::Result<u64>> {
        let polled = self.inner.poll_seek(cx, to);
        self.trace(Operation::Seek, &polled, |position| *position, |_| Head::empty());
        polled
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        let closed = ready!(self.inner.poll_close(cx));
        let polled = Poll::Ready(closed);
        self.trace_plain(Operation::Close, &polled);
        polled
    }
}

stream_of_channel!([C: Channel] Observe<C>);

impl<C: fmt::Debug> fmt::Debug for Observe<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self.counters.snapshot();
        f.debug_struct("Observe").field("inner", &self.inner).field("counts", &counts).finish_non_exhaustive()
    }
}
