//! One table cache for all formats: pages of block maps, grain tables, L2 tables, refcounts, within a budget.
//!
//! A page is shared and never changes under a reader: a change makes it anew (or changes it in place while nobody
//! looks). What was changed is *dirt*: it counts at once for every lookup, and reaches the file with the next group
//! commit ([`crate::Committer`]), rank by rank:
//!
//! ```text
//!   rank 0   what nothing durable points to yet: fresh tables, refcounts that grow     written with the data
//!            ---- flush: data and rank 0 are durable ----
//!   rank 1   pointers to it                                                            written now
//!            ---- flush ----
//!   rank 2   pointers to what rank 1 made                                              (rare)
//! ```

use crate::sync::{RwLock, RwLockReadGuard};
use crate::{Buf, Code, Error, Result, Storage, WriteFlags};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// When a change reaches the file: lower ranks are durable before higher ones are written.
pub type Rank = usize;
/// Ranks that there are.
pub const RANKS: usize = 3;
/// Longest page: dirt is kept in one bit for each sector.
pub const PAGE_BYTES_MAX: usize = 64 << 10;
/// What a disk writes whole, whatever happens.
const SECTOR: usize = 512;

/// Caches pages of one storage's tables.
pub struct TableCache {
    storage: Arc<dyn Storage>,
    budget_bytes: usize,
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    pages: HashMap<u64, Slot, BuildHasherDefault<OffsetHasher>>,
    // Clock order: the front is looked at first; a page used since gets another turn.
    clock: VecDeque<u64>,
    bytes: usize,
    dirty_bytes: usize,
    /// Counts what makes the file's bytes differ from what a running read may see.
    generation: u64,
}

/// Hashes an offset with one multiplication. Who made the image could make pages collide, but only as many as the
/// budget holds, and a lookup happens for every request.
#[derive(Default)]
struct OffsetHasher(u64);

impl Hasher for OffsetHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64((self.0 << 8) | u64::from(*byte)));
    }
    fn write_u64(&mut self, offset: u64) {
        // Offsets are multiples of 512: the low bits come from the high half of the product.
        let product = u128::from(offset) * u128::from(0x9e37_79b9_7f4a_7c15u64);
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

struct Slot {
    page: Arc<[u8]>,
    used: AtomicBool,
    /// Changed sectors, a bit each, by rank.
    dirt: [u128; RANKS],
    /// Nothing durable points to the page: all of it is rank 0.
    fresh: bool,
    /// A group commit is writing it.
    writing: bool,
}

impl Slot {
    fn is_dirty(&self) -> bool {
        self.dirt.iter().any(|bits| *bits != 0)
    }
}

/// A change of some bytes of a cached page.
#[derive(Clone, Copy, Debug)]
pub struct TableChange<'a> {
    /// Offset of the page, as it was loaded or put.
    pub page: u64,
    /// Offset of the bytes in the page.
    pub at: u64,
    /// The new bytes.
    pub bytes: &'a [u8],
    /// When they reach the file. Changes of a page that is fresh are always rank 0.
    pub rank: Rank,
}

/// The dirt of one moment, on its way to the file.
pub(crate) struct Frozen {
    pages: Vec<(u64, Arc<[u8]>, [u128; RANKS])>,
}

impl TableCache {
    /// A cache over `storage` that keeps at most `budget_bytes` (but always one page, and all that is dirty).
    pub fn new(storage: Arc<dyn Storage>, budget_bytes: usize) -> Self {
        TableCache { storage, budget_bytes, state: RwLock::new(State::default()) }
    }

    /// The storage that holds the tables.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The page at byte `offset`, if it is in memory.
    pub fn get(&self, offset: u64) -> Option<Arc<[u8]>> {
        self.state.read().page(offset).cloned()
    }

    /// The pages that are in memory, for several looks in a row. Nothing is changed meanwhile; the thread must let go of it
    /// before it asks the cache for anything else.
    pub fn view(&self) -> TableView<'_> {
        TableView(self.state.read())
    }

    /// Loads `len` bytes at `offset` as a page. Callers always use the same length for the same offset.
    pub async fn load(&self, offset: u64, len: usize) -> Result<Arc<[u8]>> {
        loop {
            let generation = {
                let state = self.state.read();
                if let Some(slot) = state.pages.get(&offset) {
                    slot.used.store(true, Ordering::Relaxed);
                    return Ok(slot.page.clone());
                }
                state.generation
            };
            let (buf, result) = self.storage.read_at(Buf::zeroed(len), offset).await;
            result.map_err(|e| e.context("reading a table"))?;
            let page: Arc<[u8]> = Arc::from(&*buf);
            let mut state = self.state.write();
            if state.pages.contains_key(&offset) || state.generation != generation {
                // What was read may be older than what was written and evicted meanwhile.
                continue;
            }
            state.insert(offset, Slot::clean(page.clone()), self.budget_bytes);
            return Ok(page);
        }
    }

    /// Makes all changes at once, or none: `false` if one of the pages is not in memory. Lookups see them from now on.
    ///
    /// # Errors
    /// `USAGE` for a change that reaches past its page.
    pub fn update(&self, changes: &[TableChange<'_>]) -> Result<bool> {
        let mut state = self.state.write();
        for change in changes {
            let Some(slot) = state.pages.get(&change.page) else { return Ok(false) };
            let end = change.at.checked_add(change.bytes.len() as u64);
            if end.is_none_or(|end| end > slot.page.len() as u64)
                || change.rank >= RANKS
                || slot.page.len() > PAGE_BYTES_MAX
            {
                return Err(Error::new(Code::Usage, "a change reaches past its table page").at(change.page));
            }
        }
        for change in changes {
            state.change(change);
        }
        Ok(true)
    }

    /// Puts a fresh page in place: a table that nothing points to yet. All of it is written with the data (rank 0).
    pub fn put(&self, offset: u64, bytes: Vec<u8>) -> Result<()> {
        if bytes.len() > PAGE_BYTES_MAX || bytes.is_empty() {
            return Err(Error::new(Code::Usage, "a table page has an impossible length").at(offset));
        }
        let mut state = self.state.write();
        state.remove(offset);
        let mut slot = Slot::clean(bytes.into());
        slot.dirt[0] = sectors(0..slot.page.len());
        slot.fresh = true;
        state.dirty_bytes += slot.page.len();
        state.insert(offset, slot, self.budget_bytes);
        Ok(())
    }

    /// Forgets the pages that start in `range`, with their dirt: the space is no table any more.
    pub fn forget(&self, range: Range<u64>) {
        let mut state = self.state.write();
        state.generation += 1;
        // By page size at the least; the usual case is one cluster.
        let gone: Vec<u64> = if range.end.saturating_sub(range.start) <= 64 * SECTOR as u64 {
            (range.start..range.end).step_by(SECTOR).filter(|at| state.pages.contains_key(at)).collect()
        } else {
            state.pages.keys().copied().filter(|at| range.contains(at)).collect()
        };
        for offset in gone {
            state.remove(offset);
        }
    }

    /// Bytes of pages with dirt.
    pub fn dirty_bytes(&self) -> usize {
        self.state.read().dirty_bytes
    }

    /// Whether so much is dirty that a commit should come before more is changed.
    pub fn wants_commit(&self) -> bool {
        self.dirty_bytes() > self.budget_bytes / 2
    }

    /// Takes the dirt as it is now. The pages stay in memory until [`TableCache::thaw`].
    pub(crate) fn freeze(&self) -> Frozen {
        let mut state = self.state.write();
        state.generation += 1;
        state.dirty_bytes = 0;
        let mut pages: Vec<_> = state
            .pages
            .iter_mut()
            .filter(|(_, slot)| slot.is_dirty())
            .map(|(offset, slot)| {
                slot.fresh = false;
                slot.writing = true;
                (*offset, slot.page.clone(), std::mem::take(&mut slot.dirt))
            })
            .collect();
        pages.sort_unstable_by_key(|(offset, ..)| *offset);
        Frozen { pages }
    }

    /// What was frozen is in the file.
    pub(crate) fn thaw(&self, frozen: &Frozen) {
        let mut state = self.state.write();
        state.generation += 1;
        for (offset, ..) in &frozen.pages {
            if let Some(slot) = state.pages.get_mut(offset) {
                slot.writing = false;
            }
        }
    }

    /// Writes what is frozen of `rank`; says whether that was anything.
    pub(crate) async fn write(&self, frozen: &Frozen, rank: Rank) -> Result<bool> {
        let mut any = false;
        for (offset, page, dirt) in &frozen.pages {
            for run in runs(dirt.get(rank).copied().unwrap_or(0), page.len()) {
                any = true;
                let bytes = page.get(run.clone()).unwrap_or_default();
                let at = offset + run.start as u64;
                let (_, result) = self.storage.write_at(Buf::copy_of(bytes), at, WriteFlags::default()).await;
                result.map_err(|e| e.context("writing a table"))?;
            }
        }
        Ok(any)
    }
}

impl Frozen {
    /// Whether there is anything of this rank.
    pub(crate) fn has(&self, rank: Rank) -> bool {
        self.pages.iter().any(|(_, _, dirt)| dirt.get(rank).is_some_and(|bits| *bits != 0))
    }
}

impl Slot {
    fn clean(page: Arc<[u8]>) -> Self {
        Slot { page, used: AtomicBool::new(false), dirt: [0; RANKS], fresh: false, writing: false }
    }
}

/// The pages of a [`TableCache`] at one moment.
pub struct TableView<'a>(RwLockReadGuard<'a, State>);

impl TableView<'_> {
    /// The page at byte `offset`, if it is in memory.
    pub fn get(&self, offset: u64) -> Option<&[u8]> {
        self.0.page(offset).map(|page| page.as_ref())
    }
}

impl State {
    fn page(&self, offset: u64) -> Option<&Arc<[u8]>> {
        let slot = self.pages.get(&offset)?;
        slot.used.store(true, Ordering::Relaxed);
        Some(&slot.page)
    }

    fn change(&mut self, change: &TableChange<'_>) {
        let Some(slot) = self.pages.get_mut(&change.page) else { return };
        let was_dirty = slot.is_dirty();
        let at = change.at as usize;
        let range = at..at + change.bytes.len();
        // Copies the page only while a reader or a commit still looks at the old one.
        Arc::make_mut(&mut slot.page)[range.clone()].copy_from_slice(change.bytes);
        let rank = if slot.fresh { 0 } else { change.rank };
        slot.dirt[rank] |= sectors(range);
        slot.used.store(true, Ordering::Relaxed);
        if !was_dirty {
            self.dirty_bytes += slot.page.len();
        }
    }

    fn remove(&mut self, offset: u64) {
        if let Some(slot) = self.pages.remove(&offset) {
            self.bytes -= slot.page.len();
            if slot.is_dirty() {
                self.dirty_bytes -= slot.page.len();
            }
            self.clock.retain(|at| *at != offset);
        }
    }

    fn insert(&mut self, offset: u64, slot: Slot, budget_bytes: usize) {
        let mut turns = self.clock.len() * 2;
        while self.bytes + slot.page.len() > budget_bytes && turns > 0 {
            turns -= 1;
            let Some(oldest) = self.clock.pop_front() else { break };
            let again = self.pages.get(&oldest).is_some_and(|slot| {
                slot.used.swap(false, Ordering::Relaxed) || slot.is_dirty() || slot.writing
            });
            if again {
                self.clock.push_back(oldest);
            } else if let Some(slot) = self.pages.remove(&oldest) {
                self.bytes -= slot.page.len();
            }
        }
        self.bytes += slot.page.len();
        self.clock.push_back(offset);
        self.pages.insert(offset, slot);
    }
}

/// The bits of the sectors that `range` of a page touches.
fn sectors(range: Range<usize>) -> u128 {
    if range.is_empty() {
        return 0;
    }
    let (first, last) = (range.start / SECTOR, (range.end - 1) / SECTOR);
    let up_to_last = u128::MAX >> (127 - last.min(127));
    up_to_last & (u128::MAX << first.min(127))
}

/// The byte ranges of the runs of set bits.
fn runs(mut bits: u128, len: usize) -> impl Iterator<Item = Range<usize>> {
    std::iter::from_fn(move || {
        if bits == 0 {
            return None;
        }
        let first = bits.trailing_zeros() as usize;
        let count = (bits >> first).trailing_ones() as usize;
        let end = first + count;
        bits = if end >= 128 { 0 } else { bits & (u128::MAX << end) };
        Some(first * SECTOR..(end * SECTOR).min(len))
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::{Memory, block_on};

    fn cache(bytes: &[u8], budget: usize) -> (Arc<Memory>, TableCache) {
        let memory = Arc::new(Memory::from_bytes("t", bytes));
        (memory.clone(), TableCache::new(memory, budget))
    }

    fn change(page: u64, at: u64, bytes: &[u8]) -> TableChange<'_> {
        TableChange { page, at, bytes, rank: 1 }
    }

    #[test]
    fn the_budget_holds_and_evicted_pages_come_back() {
        let bytes: Vec<u8> = (0..65536u32).map(|i| (i / 256) as u8).collect();
        let (_, cache) = cache(&bytes, 4096);
        for round in 0..3 {
            for page in 0..256u64 {
                let loaded = block_on(cache.load(page * 256, 256)).unwrap();
                assert!(loaded.iter().all(|b| u64::from(*b) == page), "round {round}");
                assert!(cache.state.read().bytes <= 4096);
            }
        }
        assert!(cache.get(255 * 256).is_some());
        assert!(cache.get(0).is_none());
    }

    #[test]
    fn sectors_and_runs_agree() {
        assert_eq!(sectors(0..1), 1);
        assert_eq!(sectors(511..513), 3);
        assert_eq!(sectors(0..65536), u128::MAX);
        assert_eq!(sectors(65535..65536), 1 << 127);
        assert_eq!(runs(0b1101, 2048).collect::<Vec<_>>(), [0..512, 1024..2048]);
        assert!(runs(u128::MAX, 65536).eq(std::iter::once(0..65536)));
        assert!(runs(0b10, 700).eq(std::iter::once(512..700)));
    }

    #[test]
    fn changes_are_seen_at_once_and_written_sector_by_sector() {
        let (memory, cache) = cache(&[7u8; 8192], 1 << 20);
        assert!(!cache.update(&[change(0, 0, &[1])]).unwrap());
        block_on(cache.load(0, 4096)).unwrap();
        let old = cache.get(0).unwrap();
        assert!(cache.update(&[change(0, 600, &[1, 2]), change(0, 4095, &[3])]).unwrap());
        assert_eq!((old[600], cache.get(0).unwrap()[600]), (7, 1));
        assert!(cache.update(&[change(0, 4095, &[1, 2])]).is_err());
        assert_eq!(memory.to_vec(), [7u8; 8192]);
        let frozen = cache.freeze();
        assert!(!frozen.has(0) && frozen.has(1));
        // A change after the freeze belongs to the next group.
        assert!(cache.update(&[change(0, 600, &[9])]).unwrap());
        assert!(block_on(cache.write(&frozen, 1)).unwrap());
        cache.thaw(&frozen);
        assert_eq!(memory.to_vec()[598..603], [7, 7, 1, 2, 7]);
        assert_eq!(memory.to_vec()[4095], 3);
        assert_eq!(cache.dirty_bytes(), 4096);
    }

    #[test]
    fn dirty_pages_are_never_evicted_and_fresh_ones_are_rank_0() {
        let (_, cache) = cache(&[0u8; 65536], 1024);
        cache.put(65536, vec![5; 512]).unwrap();
        assert!(cache.update(&[change(65536, 0, &[6])]).unwrap());
        for page in 0..100u64 {
            block_on(cache.load(page * 512, 512)).unwrap();
        }
        assert_eq!(cache.get(65536).unwrap()[..2], [6, 5]);
        let frozen = cache.freeze();
        assert!(frozen.has(0) && !frozen.has(1));
        assert!(cache.update(&[change(65536, 0, &[7])]).unwrap());
        assert!(cache.freeze().has(1));
        cache.forget(65536..66048);
        assert!(cache.get(65536).is_none());
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::Memory;
    use loom::sync::Arc as LoomArc;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    /// A storage in memory answers at once, so nothing ever waits.
    fn now<T>(future: impl Future<Output = T>) -> T {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => value,
            Poll::Pending => panic!("it waits"),
        }
    }

    fn cache(bytes: usize, budget: usize) -> (Arc<Memory>, LoomArc<TableCache>) {
        let memory = Arc::new(Memory::from_bytes("t", &vec![0; bytes]));
        (memory.clone(), LoomArc::new(TableCache::new(memory, budget)))
    }

    fn set(cache: &TableCache, at: u64, value: u8, rank: Rank) {
        assert!(cache.update(&[TableChange { page: 0, at, bytes: &[value], rank }]).unwrap());
    }

    fn commit(cache: &TableCache) {
        let frozen = cache.freeze();
        for rank in 0..RANKS {
            now(cache.write(&frozen, rank)).unwrap();
        }
        cache.thaw(&frozen);
    }

    /// Three threads in all orders take hours; with three preemptions, seconds.
    fn bounded() -> loom::model::Builder {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder
    }

    #[test]
    fn what_is_not_in_a_frozen_group_is_in_the_next() {
        bounded().check(|| {
            let (memory, cache) = cache(1024, 4096);
            now(cache.load(0, 1024)).unwrap();
            let writer = {
                let cache = cache.clone();
                loom::thread::spawn(move || {
                    set(&cache, 0, 1, 1);
                    set(&cache, 600, 2, 0);
                })
            };
            let committer = {
                let cache = cache.clone();
                loom::thread::spawn(move || commit(&cache))
            };
            // A reader sees the changes in the order in which they were made, and keeps the page that it has.
            let page = cache.get(0).unwrap();
            let seen = (page[0], page[600]);
            assert!(matches!(seen, (0, 0) | (1, 0) | (1, 2)), "{seen:?}");
            writer.join().unwrap();
            assert_eq!((page[0], page[600]), seen);
            committer.join().unwrap();
            commit(&cache);
            let (file, page) = (memory.to_vec(), cache.get(0).unwrap());
            assert_eq!((file[0], file[600], page[0], page[600]), (1, 2, 1, 2));
            assert_eq!(cache.dirty_bytes(), 0);
            assert!(!cache.freeze().has(0) && !cache.freeze().has(1));
        });
    }

    #[test]
    fn two_groups_that_follow_each_other_lose_nothing() {
        loom::model(|| {
            let (memory, cache) = cache(512, 4096);
            now(cache.load(0, 512)).unwrap();
            set(&cache, 0, 1, 1);
            let writer = {
                let cache = cache.clone();
                loom::thread::spawn(move || set(&cache, 0, 2, 1))
            };
            commit(&cache);
            assert!(memory.to_vec()[0] >= 1);
            commit(&cache);
            writer.join().unwrap();
            let is_dirty = cache.dirty_bytes() > 0;
            // Either the change is in the file or it still is dirt.
            assert_eq!(memory.to_vec()[0], if is_dirty { 1 } else { 2 });
        });
    }

    #[test]
    fn a_page_read_before_it_was_changed_written_and_evicted_does_not_come_back() {
        loom::model(|| {
            // Room for one page: loading the second one evicts the first, unless it is dirty or being written.
            let (_, cache) = cache(1024, 512);
            let reader = {
                let cache = cache.clone();
                loom::thread::spawn(move || now(cache.load(0, 512)).unwrap()[0])
            };
            now(cache.load(0, 512)).unwrap();
            set(&cache, 0, 1, 1);
            commit(&cache);
            now(cache.load(512, 512)).unwrap();
            reader.join().unwrap();
            assert_eq!(now(cache.load(0, 512)).unwrap()[0], 1);
        });
    }

    #[test]
    fn a_dirty_page_is_never_evicted_while_others_are_loaded() {
        loom::model(|| {
            let (memory, cache) = cache(1024, 512);
            now(cache.load(0, 512)).unwrap();
            set(&cache, 0, 1, 1);
            let other = {
                let cache = cache.clone();
                loom::thread::spawn(move || {
                    now(cache.load(512, 512)).unwrap();
                })
            };
            commit(&cache);
            // Whether it is still there or comes back from the file.
            assert_eq!(now(cache.load(0, 512)).unwrap()[0], 1);
            other.join().unwrap();
            assert_eq!(memory.to_vec()[0], 1);
        });
    }
}
