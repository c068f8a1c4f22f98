//! [`Committer`]: the group commit, by which metadata reaches the file in an order that survives a power loss.
//!
//! ```text
//!   guest writes       data -> its place in the file;   tables change in memory (dirt)
//!   guest flush        freeze the dirt | write rank 0 | FLUSH | write rank 1 | FLUSH | (rank 2 | FLUSH)
//! ```
//!
//! However many writes went before, a guest flush costs two file flushes, or one if no table changed. Flushes that
//! are asked for while one runs share the next one.

use crate::table::{Frozen, RANKS, TableCache};
use crate::{Code, Error, Result, Storage};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Which of a driver's flushes this is. Tests take each of them away in turn and must find out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushPoint {
    /// After the marks and identities that a writing session begins with.
    Session,
    /// After data and rank 0, before the pointers to them.
    Data,
    /// After the pointers.
    Tables,
    /// Anything else of a driver: repair, snapshots.
    Other,
}

/// Makes every completed write of `storage` durable.
///
/// # Errors
/// Those of the storage.
pub async fn flush_at(point: FlushPoint, storage: &dyn Storage) -> Result<()> {
    if mutation::skips(point) {
        return Ok(());
    }
    storage.flush().await.map_err(Error::flush_failure)
}

/// For the test of the crash tests: flushes that are left out.
pub mod mutation {
    use super::FlushPoint;
    use std::cell::Cell;

    thread_local! {
        static LEFT_OUT: Cell<Option<FlushPoint>> = const { Cell::new(None) };
    }

    /// Leaves out every flush of this kind **on this thread**, which loses data at the next power loss. For tests.
    #[doc(hidden)]
    pub fn leave_out(point: Option<FlushPoint>) {
        LEFT_OUT.set(point);
    }

    pub(super) fn skips(point: FlushPoint) -> bool {
        LEFT_OUT.get() == Some(point)
    }
}

/// Runs the group commits of one image.
#[derive(Default)]
pub struct Committer {
    gate: async_lock::Mutex<()>,
    asked: AtomicU64,
    covered: AtomicU64,
    failed: Mutex<Option<String>>,
}

impl Committer {
    /// Makes everything durable that was written and committed before the call.
    ///
    /// `storages` are all that hold data or tables of the image. `freeze` is called at the moment that the group is
    /// closed, `done` with its answer when the group is durable: the place to let go of what nothing durable points
    /// to any more. Neither may wait.
    ///
    /// # Errors
    /// Those of the storages. After the first one every further commit fails: what is in the file is no longer known.
    pub async fn commit<T>(
        &self,
        caches: &[&TableCache],
        storages: &[Arc<dyn Storage>],
        freeze: impl FnOnce() -> T + Send,
        done: impl FnOnce(T) + Send,
    ) -> Result<()> {
        let ticket = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let _alone = self.gate.lock().await;
        self.check()?;
        if self.covered.load(Ordering::SeqCst) >= ticket {
            return Ok(());
        }
        let covers = self.asked.load(Ordering::SeqCst);
        // What the driver wants to know goes first: a change that comes between is then committed, not let go.
        let closed = freeze();
        let frozen: Vec<Frozen> = caches.iter().map(|cache| cache.freeze()).collect();
        let written = self.write(caches, &frozen, storages).await;
        if let Err(error) = written {
            *self.failed.lock() = Some(error.to_string());
            return Err(error.flush_failure().context("making the image's tables durable"));
        }
        for (cache, frozen) in caches.iter().zip(&frozen) {
            cache.thaw(frozen);
        }
        done(closed);
        self.covered.store(covers, Ordering::SeqCst);
        Ok(())
    }

    async fn write(
        &self,
        caches: &[&TableCache],
        frozen: &[Frozen],
        storages: &[Arc<dyn Storage>],
    ) -> Result<()> {
        for (cache, frozen) in caches.iter().zip(frozen) {
            cache.write(frozen, 0).await?;
        }
        for storage in storages {
            flush_at(FlushPoint::Data, storage.as_ref()).await?;
        }
        for rank in 1..RANKS {
            for (cache, frozen) in caches.iter().zip(frozen) {
                cache.write(frozen, rank).await?;
            }
            let mut flushed: Vec<&Arc<dyn Storage>> = Vec::new();
            for (cache, _) in caches.iter().zip(frozen).filter(|(_, frozen)| frozen.has(rank)) {
                // Two caches may stand over one file.
                if !flushed.iter().any(|storage| Arc::ptr_eq(storage, cache.storage())) {
                    flush_at(FlushPoint::Tables, cache.storage().as_ref()).await?;
                    flushed.push(cache.storage());
                }
            }
        }
        Ok(())
    }

    /// Fails if a commit failed before.
    ///
    /// # Errors
    /// `IO`, naming the first failure.
    pub fn check(&self) -> Result<()> {
        match &*self.failed.lock() {
            None => Ok(()),
            Some(first) => Err(poisoned(first)),
        }
    }
}

/// The error after a failed flush.
#[cold]
pub(crate) fn poisoned(first: &str) -> Error {
    Error::new(Code::Io, "an earlier write of the image's tables or a flush failed; nothing more is written")
        .found(first)
        .hint("what was written since the last good flush may be lost: close the image, see to the disk, open it again")
        .flush_failure()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::{Memory, TableChange, block_on};

    #[test]
    fn ranks_reach_the_file_in_order_and_done_comes_last() {
        let memory = Arc::new(Memory::from_bytes("t", &[0u8; 4096]));
        let storages: [Arc<dyn Storage>; 1] = [memory.clone()];
        let cache = TableCache::new(memory.clone(), 1 << 20);
        let committer = Committer::default();
        block_on(cache.load(0, 4096)).unwrap();
        cache.update(&[TableChange { page: 0, at: 0, bytes: &[1], rank: 1 }]).unwrap();
        let mut order = Vec::new();
        block_on(committer.commit(&[&cache], &storages, || 7, |seven| order.push(seven))).unwrap();
        assert_eq!(memory.to_vec()[0], 1);
        assert_eq!((order, cache.dirty_bytes()), (vec![7], 0));
    }
}
