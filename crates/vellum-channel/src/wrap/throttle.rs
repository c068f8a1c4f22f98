//! A limit on the rate of a channel.

use super::alarm::{Alarm, Executor};
use super::{Way, cut, cut_mut, forward, forward_ends, total, total_mut};
use crate::channel::{Channel, Interest, ReadFlags, WriteFlags, stream_of_channel};
use crate::descriptors::Descriptors;
use crate::error::{ErrorKind, kind_of};
use parking_lot::Mutex;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::Instant;

/// How fast bytes go in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bytes per second over time; 0 stops the direction until the rate is changed.
    pub bytes_per_second: u64,
    /// Bytes that may go at once after a pause, at least 1.
    pub burst: u64,
}

impl Rate {
    /// A rate with what it lets through in a tenth of a second as burst.
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, burst: (bytes_per_second / 10).max(1) }
    }
}

/// The rates of a [`Throttle`], to be read and changed from any thread while it is in use. `None` is unlimited.
#[derive(Clone, Debug)]
pub struct Rates(Arc<[Mutex<Bucket>; 2]>);

impl Rates {
    /// The rate of reading.
    pub fn read(&self) -> Option<Rate> {
        self.0[0].lock().rate
    }

    /// The rate of writing.
    pub fn write(&self) -> Option<Rate> {
        self.0[1].lock().rate
    }

    /// Changes the rate of reading.
    pub fn set_read(&self, rate: Option<Rate>) {
        self.set(Way::Read, rate);
    }

    /// Changes the rate of writing.
    pub fn set_write(&self, rate: Option<Rate>) {
        self.set(Way::Write, rate);
    }

    fn set(&self, way: Way, rate: Option<Rate>) {
        let mut bucket = self.bucket(way).lock();
        bucket.set(rate, Instant::now());
        let waiting = bucket.waiting.take();
        drop(bucket);
        if let Some(waker) = waiting {
            waker.wake();
        }
    }

    fn bucket(&self, way: Way) -> &Mutex<Bucket> {
        &self.0[way as usize]
    }
}

/// Bytes that may go now: fills with time, up to the burst, and is emptied by what goes.
#[derive(Debug)]
struct Bucket {
    rate: Option<Rate>,
    tokens: f64,
    filled: Instant,
    /// Who waits for it to fill.
    waiting: Option<Waker>,
}

/// What a bucket says to an operation.
enum Allowance {
    /// So many bytes may go.
    Bytes(usize),
    /// None before then.
    Later(Instant),
    /// None before the rate is changed.
    Never,
}

impl Bucket {
    fn new(rate: Option<Rate>) -> Self {
        let tokens = rate.map_or(0.0, |rate| rate.burst.max(1) as f64);
        Self { rate, tokens, filled: Instant::now(), waiting: None }
    }

    fn set(&mut self, rate: Option<Rate>, now: Instant) {
        self.fill(now);
        // What a stopped or unlimited direction has saved up counts for nothing.
        let saved = if self.rate.is_none() { f64::INFINITY } else { self.tokens };
        self.rate = rate;
        self.tokens = rate.map_or(0.0, |rate| saved.min(rate.burst.max(1) as f64));
        self.filled = now;
    }

    fn fill(&mut self, now: Instant) {
        if let Some(rate) = self.rate {
            let passed = now.saturating_duration_since(self.filled).as_secs_f64();
            let most = rate.burst.max(1) as f64;
            self.tokens = (self.tokens + passed * rate.bytes_per_second as f64).min(most);
        }
        self.filled = now;
    }

    /// Asks for `wanted` bytes. Waits for a fair part of them: many small transfers cost more than a few larger ones.
    fn ask(&mut self, wanted: usize, now: Instant) -> Allowance {
        let Some(rate) = self.rate else { return Allowance::Bytes(usize::MAX) };
        self.fill(now);
        let part = (wanted.max(1) as f64).min((rate.burst as f64 / 4.0).floor().max(1.0));
        if self.tokens >= part {
            // Saturates, which is what is meant.
            return Allowance::Bytes(self.tokens as usize);
        }
        if rate.bytes_per_second == 0 {
            return Allowance::Never;
        }
        let seconds = (part - self.tokens) / rate.bytes_per_second as f64;
        // A little more than computed, for what rounding takes away.
        let wait = Duration::try_from_secs_f64(seconds)
            .unwrap_or(Duration::MAX)
            .saturating_add(Duration::from_micros(1));
        now.checked_add(wait).map_or(Allowance::Never, Allowance::Later)
    }

    fn take(&mut self, bytes: usize) {
        if self.rate.is_some() {
            self.tokens -= bytes as f64;
        }
    }
}

/// Limits how many bytes a second go through a channel, in each direction.
///
/// A bucket fills with time and is emptied by transfers: over time the rate is kept, after a pause a burst goes at once.
/// Transfers are cut to what may go. Flush, close and descriptors are not limited.
///
/// ```
/// use vellum_channel::{Null, Rate, Throttle};
/// let slow = Throttle::new(Null::new(), None, Some(Rate::new(1 << 20)));
/// slow.rates().set_write(None);
/// ```
#[derive(Debug)]
pub struct Throttle<C> {
    inner: C,
    rates: Rates,
    alarms: [Alarm; 2],
    executor: Executor,
}

impl<C: Channel> Throttle<C> {
    /// Limits `inner`; `None` is unlimited.
    pub fn new(inner: C, read: Option<Rate>, write: Option<Rate>) -> Self {
        let rates = Rates(Arc::new([Mutex::new(Bucket::new(read)), Mutex::new(Bucket::new(write))]));
        Self { inner, rates, alarms: Default::default(), executor: Executor::Current }
    }

    /// The rates, to change them while the channel is in use.
    pub fn rates(&self) -> Rates {
        self.rates.clone()
    }

    /// The channel inside.
    pub fn into_inner(self) -> C {
        self.inner
    }

    /// Waits until some of `wanted` bytes may go, and says how many.
    fn poll_allowance(&mut self, cx: &mut Context<'_>, way: Way, wanted: usize) -> Poll<io::Result<usize>> {
        loop {
            let mut bucket = self.rates.bucket(way).lock();
            let deadline = match bucket.ask(wanted, Instant::now()) {
                Allowance::Bytes(bytes) => return Poll::Ready(Ok(bytes)),
                Allowance::Later(deadline) => Some(deadline),
                Allowance::Never => None,
            };
            match &mut bucket.waiting {
                Some(waker) => waker.clone_from(cx.waker()),
                empty => *empty = Some(cx.waker().clone()),
            }
            drop(bucket);
            let Some(deadline) = deadline else { return Poll::Pending };
            let alarm = &mut self.alarms[way as usize];
            ready!(alarm.poll(cx, &self.executor, deadline))?;
            alarm.clear();
        }
    }

    /// The same, and `WouldBlock` for an operation that does not wait.
    fn poll_may(
        &mut self,
        cx: &mut Context<'_>,
        way: Way,
        wanted: usize,
        waits: bool,
    ) -> Poll<io::Result<usize>> {
        match self.poll_allowance(cx, way, wanted) {
            Poll::Pending if !waits => Poll::Ready(Err(io::ErrorKind::WouldBlock.into())),
            polled => polled,
        }
    }

    fn took(&self, way: Way, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = &polled {
            self.rates.bucket(way).lock().take(*bytes);
        }
        polled
    }

    forward_ends!();
}

impl<C: Channel> Channel for Throttle<C> {
    forward!(base close flush_zero_copy seek);

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        if flags.contains(ReadFlags::PEEK) {
            return self.inner.poll_readv(cx, bufs, fds, flags);
        }
        let wanted = total_mut(bufs);
        let may = ready!(self.poll_may(cx, Way::Read, wanted, !flags.contains(ReadFlags::NO_WAIT)))?;
        let polled = if wanted <= may {
            self.inner.poll_readv(cx, bufs, fds, flags)
        } else {
            self.inner.poll_readv(cx, &mut cut_mut(bufs, may), fds, flags)
        };
        self.took(Way::Read, polled)
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        let wanted = total(bufs);
        let may = ready!(self.poll_may(cx, Way::Write, wanted, !flags.contains(WriteFlags::NO_WAIT)))?;
        let polled = if wanted <= may {
            self.inner.poll_writev(cx, bufs, fds, flags)
        } else {
            self.inner.poll_writev(cx, &cut(bufs, may), fds, flags)
        };
        self.took(Way::Write, polled)
    }

    fn poll_preadv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        let may = ready!(self.poll_allowance(cx, Way::Read, total_mut(bufs)))?;
        let polled = self.inner.poll_preadv(cx, &mut cut_mut(bufs, may), offset);
        self.took(Way::Read, polled)
    }

    fn poll_pwritev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        let may = ready!(self.poll_allowance(cx, Way::Write, total(bufs)))?;
        let polled = self.inner.poll_pwritev(cx, &cut(bufs, may), offset);
        self.took(Way::Write, polled)
    }

    /// A direction is ready when the channel inside is, and a byte may go.
    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        let mut may = Interest::empty();
        for (condition, way) in [(Interest::READ, Way::Read), (Interest::WRITE, Way::Write)] {
            if interest.contains(condition)
                && let Poll::Ready(allowed) = self.poll_allowance(cx, way, usize::MAX)
            {
                allowed?;
                may |= condition;
            }
        }
        if may.is_empty() {
            return Poll::Pending;
        }
        match self.inner.poll_ready(cx, may) {
            // It has the other direction only, which has to wait for its rate.
            Poll::Ready(Err(error)) if may != interest && kind_of(&error) == Some(ErrorKind::Unsupported) => {
                Poll::Pending
            }
            polled => polled,
        }
    }

    fn detach(&mut self) -> io::Result<()> {
        self.inner.detach()?;
        self.executor = Executor::Detached;
        self.alarms.iter_mut().for_each(Alarm::clear);
        Ok(())
    }

    fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        self.inner.attach(executor)?;
        self.executor = Executor::Attached(executor.clone());
        self.alarms.iter_mut().for_each(Alarm::clear);
        Ok(())
    }
}

stream_of_channel!([C: Channel] Throttle<C>);
