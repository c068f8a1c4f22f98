//! What a disk that can be written has besides its layers: locks, flags, the first failure, discarded pieces.

use crate::commit::poisoned;
use crate::disk::Inner;
use crate::storage::read_only;
use crate::{Code, Error, Hold, RangeGuard, RangeLocks, Result};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// How a disk is used; the seed's open flags. Can be changed while the disk is open ([`crate::Disk::set_flags`]); those
/// that cannot (shareable, sequential) are in [`crate::ChainOptions`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags {
    /// Nothing may be changed, though the image was opened for writing.
    pub read_only: bool,
    /// Allocate blocks for zeros that a guest writes, where nothing was; else nothing is stored for them.
    pub honor_zeroes: bool,
    /// Allocate blocks in a child for data that its parent holds already; else nothing is stored for it.
    pub honor_same: bool,
    /// Hand every whole block of zeros to the format, which may have a mark for it, even where data lies.
    pub inform_zeroes: bool,
    /// Let discards reach the image; else they are accepted and change nothing.
    pub discard: bool,
    /// Answer flushes without carrying them out. **Data is lost at a power loss.**
    pub ignore_flush: bool,
}

/// What a disk that can be written has besides its layers.
pub(crate) struct Writing {
    pub(crate) locks: RangeLocks,
    /// Other processes write the image, too: nothing but the disk's own bytes may change.
    pub(crate) is_shared: bool,
    pub(crate) flags: Mutex<OpenFlags>,
    pub(crate) begun: async_lock::OnceCell<()>,
    pub(crate) failed: Mutex<Option<String>>,
    pub(crate) is_closed: AtomicBool,
    pub(crate) discarded: Mutex<HashMap<u64, Vec<Range<u64>>>>,
    pub(crate) has_discarded: AtomicBool,
}

/// Units of which discarded pieces are remembered at most.
const DISCARDED_UNITS_MAX: usize = 1024;

impl Writing {
    pub(crate) fn new(flags: OpenFlags, is_shared: bool) -> Self {
        Writing {
            locks: RangeLocks::default(),
            is_shared,
            flags: Mutex::new(flags),
            begun: async_lock::OnceCell::new(),
            failed: Mutex::default(),
            is_closed: AtomicBool::new(false),
            discarded: Mutex::default(),
            has_discarded: AtomicBool::new(false),
        }
    }

    /// The lock of a reader, if no writer is in its way.
    pub(crate) fn try_shared(&self, range: Range<u64>) -> Option<RangeGuard> {
        self.locks.try_lock(range, Hold::Shared)
    }

    pub(crate) async fn shared(&self, range: Range<u64>) -> RangeGuard {
        self.locks.lock(range, Hold::Shared).await
    }

    pub(crate) fn check(&self, name: &str) -> Result<()> {
        if self.flags.lock().read_only {
            return Err(read_only(name));
        }
        if self.is_closed.load(Ordering::Acquire) {
            return Err(Error::new(Code::Usage, "the disk was closed").image(name));
        }
        match &*self.failed.lock() {
            None => Ok(()),
            Some(first) => Err(poisoned(first).image(name)),
        }
    }

    /// Remembers the first failure; after it nothing more is written.
    pub(crate) fn fail<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.failed.lock().get_or_insert_with(|| error.to_string());
        }
        result
    }

    /// Remembers a failed flush of the driver's own, whatever the request was that it was made for.
    pub(crate) fn notice<T>(&self, result: Result<T>) -> Result<T> {
        match &result {
            Err(error) if error.is_flush_failure() => self.fail(result),
            _ => result,
        }
    }

    /// Something is written: what was remembered as discarded in these units is not any more.
    pub(crate) fn forget_discarded(&self, hull: &Range<u64>) {
        if self.has_discarded.load(Ordering::Acquire) {
            let mut discarded = self.discarded.lock();
            discarded.retain(|_, pieces| {
                pieces.iter().all(|piece| piece.end <= hull.start || hull.end <= piece.start)
            });
            self.has_discarded.store(!discarded.is_empty(), Ordering::Release);
        }
    }

    /// Adds a discarded piece of a unit; says whether all of the unit is discarded now.
    pub(crate) fn add_discarded(&self, unit: &Range<u64>, piece: Range<u64>) -> bool {
        let mut discarded = self.discarded.lock();
        if discarded.len() >= DISCARDED_UNITS_MAX && !discarded.contains_key(&unit.start) {
            discarded.clear(); // only ever costs space
        }
        let pieces = discarded.entry(unit.start).or_default();
        pieces.push(piece);
        pieces.sort_unstable_by_key(|piece| piece.start);
        let mut reached = unit.start;
        for piece in pieces.iter() {
            if piece.start > reached {
                break;
            }
            reached = reached.max(piece.end);
        }
        let whole = reached >= unit.end;
        if whole {
            discarded.remove(&unit.start);
        }
        self.has_discarded.store(!discarded.is_empty(), Ordering::Release);
        whole
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Some(writing) = &self.writing else { return };
        if writing.begun.get().is_some() && !writing.is_closed.load(Ordering::Acquire) {
            tracing::warn!("{}: dropped without close(); what was not flushed may be lost", self.name);
        }
    }
}
