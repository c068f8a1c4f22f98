//! [`Quick`]: whether small writes are done on the thread that asks.
//!
//! A small write into the page cache is a copy of memory, over before another thread would have woken up for it. But
//! it may have to wait: for a page of which it changes a part, for the journal, for the disk if too much is dirty
//! already; and few file systems can say so beforehand (ext4 refuses `RWF_NOWAIT` for such writes). So it is tried,
//! and after one that took long the others go where the driver sends them, for a while.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a small write: a change of threads costs more than the copy.
const SMALL: usize = 32 << 10;
/// A small write that takes longer has waited for something.
const SLOW: Duration = Duration::from_micros(100);
/// How many times as long as a slow write the others stay away: who asks waits a fifth of the time at most.
const REST: u32 = 4;

/// Whether small writes are quick at the moment.
pub(crate) struct Quick {
    origin: Instant,
    /// Nanoseconds from `origin` until it is tried again.
    again: AtomicU64,
}

impl Default for Quick {
    fn default() -> Self {
        Quick { origin: Instant::now(), again: AtomicU64::new(0) }
    }
}

impl Quick {
    /// Whether a write of `len` bytes that would begin at `now` is expected to be quick.
    pub(crate) fn expects(&self, len: usize, now: Instant) -> bool {
        len <= SMALL && self.nanos(now) >= self.again.load(Ordering::Relaxed)
    }

    /// Takes note of how long a small write took.
    pub(crate) fn note(&self, begun: Instant, ended: Instant) {
        let took = ended.saturating_duration_since(begun);
        if took > SLOW {
            let again = ended.checked_add(took.saturating_mul(REST)).unwrap_or(ended);
            self.again.fetch_max(self.nanos(again), Ordering::Relaxed);
        }
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.origin).as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_slow_write_the_others_stay_away_for_a_while() {
        let quick = Quick::default();
        let start = quick.origin;
        let at = |micros: u64| start + Duration::from_micros(micros);
        assert!(quick.expects(SMALL, at(0)) && !quick.expects(SMALL + 1, at(0)));
        quick.note(at(0), at(100));
        assert!(quick.expects(4096, at(100)));
        quick.note(at(100), at(1100));
        assert!(!quick.expects(4096, at(1100)) && !quick.expects(4096, at(5099)));
        assert!(quick.expects(4096, at(5100)));
        // One that began earlier and was less slow does not shorten the rest.
        quick.note(at(90), at(1200));
        quick.note(at(90), at(200));
        assert!(!quick.expects(4096, at(5600)) && quick.expects(4096, at(5640)));
    }
}
