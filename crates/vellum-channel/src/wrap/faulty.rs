//! A channel that misbehaves within its contract, or beyond it, for tests.

use super::{Way, cut, cut_mut, forward, forward_ends, total, total_mut};
use crate::channel::{Channel, Interest, ReadFlags, WriteFlags, stream_of_channel};
use crate::descriptors::Descriptors;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::task::{Context, Poll};

/// Bytes that a write with a flipped bit takes at most.
const FLIP_MAX: usize = 4096;

/// What goes wrong, and how often. The default is nothing. The same seed and the same operations give the same faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultyOptions {
    /// Decides when the faults come.
    pub seed: u64,
    /// Of 100 transfers, those that are cut to fewer bytes than could be (at least one).
    pub short_percent: u8,
    /// Of 100 operations, those that first say `Pending`, and wake the task at once.
    pub pending_percent: u8,
    /// So many times in a row an operation that does not wait answers `WouldBlock` before it is let through.
    pub would_block: u32,
    /// Of 100 transfers, those in which one bit comes out wrong.
    pub flip_percent: u8,
    /// After so many bytes reads fail, from then on.
    pub read_error: Option<(u64, io::ErrorKind)>,
    /// After so many bytes writes fail, from then on.
    pub write_error: Option<(u64, io::ErrorKind)>,
    /// After so many bytes reads find the end of the stream.
    pub read_end: Option<u64>,
    /// After so many bytes writes find that nobody reads any more (`BrokenPipe`).
    pub write_end: Option<u64>,
}

/// A channel with faults: short and delayed transfers, refusals, errors and ends at a given byte, flipped bits. Made to
/// test what stands on channels.
///
/// ```
/// use vellum_channel::{Buffer, ChannelExt, Faulty, FaultyOptions};
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let cut = FaultyOptions { short_percent: 50, read_end: Some(3), ..FaultyOptions::default() };
/// let mut channel = Faulty::new(Buffer::from_vec(vec![7; 10]), cut);
/// let error = channel.read_all(&mut [0; 10]).await.unwrap_err();
/// assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
/// # });
/// ```
#[derive(Debug)]
pub struct Faulty<C> {
    inner: C,
    options: FaultyOptions,
    random: u64,
    states: [State; 2],
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    transferred: u64,
    refused: u32,
    is_delayed: bool,
}

/// What becomes of an operation.
enum Fate {
    /// It goes on, with at most so many bytes.
    Transfer(usize),
    Later,
    End,
    Fail(io::ErrorKind),
}

impl<C: Channel> Faulty<C> {
    /// Gives `inner` the faults of `options`.
    pub fn new(inner: C, options: FaultyOptions) -> Self {
        Self { inner, options, random: options.seed, states: Default::default() }
    }

    /// The channel inside.
    pub fn into_inner(self) -> C {
        self.inner
    }

    /// The next number of a sequence that the seed decides (SplitMix64).
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn chance(&mut self, percent: u8) -> bool {
        percent > 0 && self.random() % 100 < u64::from(percent)
    }

    /// A number below `limit`, which is not 0.
    fn below(&mut self, limit: usize) -> usize {
        (self.random() % limit as u64) as usize
    }

    fn marks(&self, way: Way) -> (Option<(u64, io::ErrorKind)>, Option<u64>) {
        match way {
            Way::Read => (self.options.read_error, self.options.read_end),
            Way::Write => (self.options.write_error, self.options.write_end),
        }
    }

    /// The error or end that has been reached.
    fn reached(&self, way: Way) -> Option<Fate> {
        let done = self.states[way as usize].transferred;
        let (error, end) = self.marks(way);
        match error {
            Some((at, kind)) if done >= at => Some(Fate::Fail(kind)),
            _ => end.filter(|at| done >= *at).map(|_| match way {
                Way::Read => Fate::End,
                Way::Write => Fate::Fail(io::ErrorKind::BrokenPipe),
            }),
        }
    }

    fn fate(&mut self, way: Way, wanted: usize, waits: bool) -> Fate {
        let (storm, pending) = (self.options.would_block, self.options.pending_percent);
        let state = &mut self.states[way as usize];
        if !waits && state.refused < storm {
            state.refused += 1;
            return Fate::Fail(io::ErrorKind::WouldBlock);
        }
        state.refused = 0;
        let was_delayed = std::mem::take(&mut state.is_delayed);
        if waits && !was_delayed && self.chance(pending) {
            self.states[way as usize].is_delayed = true;
            return Fate::Later;
        }
        if let Some(fate) = self.reached(way) {
            return fate;
        }
        let (error, end) = self.marks(way);
        let done = self.states[way as usize].transferred;
        let mut most = wanted;
        for mark in [error.map(|(at, _)| at), end].into_iter().flatten() {
            most = most.min(usize::try_from(mark - done).unwrap_or(usize::MAX));
        }
        if most > 1 && self.chance(self.options.short_percent) {
            most = 1 + self.below(most);
        }
        Fate::Transfer(most)
    }

    /// Carries out `transfer` with the bytes that fate gives it.
    fn suffer(
        &mut self,
        cx: &mut Context<'_>,
        way: Way,
        wanted: usize,
        waits: bool,
        transfer: impl FnOnce(&mut Self, &mut Context<'_>, usize) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let most = match if wanted == 0 { Fate::Transfer(0) } else { self.fate(way, wanted, waits) } {
            Fate::Transfer(most) => most,
            Fate::Later => {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Fate::End => return Poll::Ready(Ok(0)),
            Fate::Fail(kind) if kind == io::ErrorKind::WouldBlock => return Poll::Ready(Err(kind.into())),
            Fate::Fail(kind) => {
                let done = self.states[way as usize].transferred;
                let message = format!("{} fails after {done} bytes, as it was told to", self.label());
                return Poll::Ready(Err(io::Error::new(kind, message)));
            }
        };
        let polled = transfer(self, cx, most);
        if let Poll::Ready(Ok(bytes)) = &polled {
            self.states[way as usize].transferred += *bytes as u64;
        }
        polled
    }

    /// Flips a bit of what has been read, now and then.
    fn flip_read(&mut self, bufs: &mut [IoSliceMut<'_>], polled: &Poll<io::Result<usize>>) {
        let Poll::Ready(Ok(read @ 1..)) = polled else { return };
        if !self.chance(self.options.flip_percent) {
            return;
        }
        let mut at = self.below(*read);
        let bit = self.below(8);
        for buf in bufs {
            if let Some(byte) = buf.get_mut(at) {
                *byte ^= 1 << bit;
                return;
            }
            at -= buf.len();
        }
    }

    /// A copy of the first bytes of `bufs`, at most `most`, with a bit flipped; now and then.
    fn flip_written(&mut self, bufs: &[IoSlice<'_>], most: usize) -> Option<Vec<u8>> {
        if most == 0 || !self.chance(self.options.flip_percent) {
            return None;
        }
        let mut bytes =
            cut(bufs, most.min(FLIP_MAX)).iter().flat_map(|buf| buf.iter().copied()).collect::<Vec<_>>();
        let (at, bit) = (self.below(bytes.len()), self.below(8));
        bytes[at] ^= 1 << bit;
        Some(bytes)
    }

    forward_ends!();
}

impl<C: Channel> Channel for Faulty<C> {
    forward!(base executor close flush_zero_copy seek);

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        if flags.contains(ReadFlags::PEEK) {
            return match self.reached(Way::Read) {
                Some(Fate::End) => Poll::Ready(Ok(0)),
                _ => self.inner.poll_readv(cx, bufs, fds, flags),
            };
        }
        let waits = !flags.contains(ReadFlags::NO_WAIT);
        self.suffer(cx, Way::Read, total_mut(bufs), waits, |this, cx, most| {
            let polled = this.inner.poll_readv(cx, &mut cut_mut(bufs, most), fds, flags);
            this.flip_read(bufs, &polled);
            polled
        })
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        let waits = !flags.contains(WriteFlags::NO_WAIT);
        self.suffer(cx, Way::Write, total(bufs), waits, |this, cx, most| {
            match this.flip_written(bufs, most) {
                // The copy is gone when this returns: nothing for a send without copying.
                Some(wrong) => {
                    let flags = flags - WriteFlags::ZERO_COPY;
                    this.inner.poll_writev(cx, &[IoSlice::new(&wrong)], fds, flags)
                }
                None => this.inner.poll_writev(cx, &cut(bufs, most), fds, flags),
            }
        })
    }

    fn poll_preadv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        self.suffer(cx, Way::Read, total_mut(bufs), true, |this, cx, most| {
            let polled = this.inner.poll_preadv(cx, &mut cut_mut(bufs, most), offset);
            this.flip_read(bufs, &polled);
            polled
        })
    }

    fn poll_pwritev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        self.suffer(cx, Way::Write, total(bufs), true, |this, cx, most| match this.flip_written(bufs, most) {
            Some(wrong) => this.inner.poll_pwritev(cx, &[IoSlice::new(&wrong)], offset),
            None => this.inner.poll_pwritev(cx, &cut(bufs, most), offset),
        })
    }

    /// A direction that has reached its error or end is ready.
    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        let mut reached = Interest::empty();
        reached.set(Interest::READ, self.reached(Way::Read).is_some());
        reached.set(Interest::WRITE, self.reached(Way::Write).is_some());
        match interest & reached {
            none if none.is_empty() => self.inner.poll_ready(cx, interest),
            found => Poll::Ready(Ok(found)),
        }
    }
}

stream_of_channel!([C: Channel] Faulty<C>);
