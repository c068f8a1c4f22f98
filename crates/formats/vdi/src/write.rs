//! Writing in place: room for new blocks, discards. (How a session begins, flushes and ends is in `session.rs`.)
//!
//! ```text
//!   a new block   file grows (zeros) | data | cBlocksAllocated      rank 0 \  one flush between,
//!                                    map entry                      rank 1 /  one after
//!   a discard     map entry -> FREE (or ZERO over a parent) | flush | the slot is a hole
//!   a hole        the last block is copied into it, its entry follows | flush | the file is shortened
//! ```
//!
//! The header shares its sector with no entry of the map. Its counter is durable before any entry that it must cover,
//! and goes down only when no durable entry needs it: no crash leaves a counter that lets another program give a
//! block out twice. What a crash may leave is space that nobody uses.

use crate::alloc::{Alloc, NextMove};
use crate::header::{FREE, Header, ZERO};
use crate::layout::slot_of;
use crate::map::{Run, VdiImage};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use vellum_core::{
    BoxFuture, Code, Committer, Discarded, Error, ImageInfo, Intent, Limits, OpenRequest, Placement,
    Preallocate, Providers, Reservation, Result, Storage, TableChange, WritableImage, bytes,
};

/// The page of the header's sector in the table cache; pages of the map start later.
pub(crate) const HEAD: u64 = 0;
/// How often room is looked for, with a flush in between that lets slots go.
const ROUNDS: u32 = 64;
/// How often a page is loaded again that others squeezed out of the cache.
pub(crate) const TRIES: u32 = 1000;

/// What an image has besides, if it was opened for writing.
pub(crate) struct Writer {
    pub(crate) alloc: Mutex<Alloc>,
    /// Held while the length of the file changes, or a slot at the end is taken.
    pub(crate) length: async_lock::Mutex<()>,
    /// Held by the one block that is on its way into a hole: it has two slots meanwhile.
    moving: Arc<async_lock::Mutex<()>>,
    /// The slot that it moves to, with the lock.
    moves_to: Mutex<Option<(u64, async_lock::MutexGuardArc<()>)>>,
    /// Writers that found every slot taken. No move begins before they have theirs.
    starving: AtomicU32,
    pub(crate) committer: Committer,
    pub(crate) providers: Providers,
    pub(crate) limits: Limits,
    pub(crate) skip_checks: bool,
    pub(crate) has_parent: bool,
    /// All blocks have their place for good.
    pub(crate) is_fixed: bool,
    /// Where `cBlocksAllocated` stands.
    pub(crate) counter_at: u64,
    /// What the image says of itself since the session began.
    pub(crate) told: OnceLock<ImageInfo>,
}

impl Writer {
    pub(crate) fn new(request: &OpenRequest, header: &Header) -> Self {
        Writer {
            alloc: Mutex::default(),
            length: async_lock::Mutex::new(()),
            moving: Arc::default(),
            moves_to: Mutex::default(),
            starving: AtomicU32::new(0),
            committer: Committer::default(),
            providers: request.providers.clone(),
            limits: request.limits,
            skip_checks: request.skip_consistency_checks,
            has_parent: header.has_parent(),
            is_fixed: header.is_fixed(),
            counter_at: header.counter_at(),
            told: OnceLock::new(),
        }
    }
}

/// A writer that found every slot taken, as long as it looks for one.
struct Starving<'a>(&'a AtomicU32);

impl<'a> Starving<'a> {
    fn new(count: &'a AtomicU32) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Starving(count)
    }
}

impl Drop for Starving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Writer {
    /// The reservation is committed or aborted; if it was a move, the next one may begin.
    fn ends(&self, reservation: &Reservation) {
        let mut moves_to = self.moves_to.lock();
        if moves_to.as_ref().is_some_and(|(slot, _)| *slot == reservation.token) {
            *moves_to = None;
        }
    }
}

impl VdiImage {
    fn writing(&self) -> Result<&Writer> {
        self.writer.as_ref().ok_or_else(|| vellum_core::storage::read_only(&self.info.name))
    }

    pub(crate) fn file(&self) -> &dyn Storage {
        let [main] = &self.storages;
        main.as_ref()
    }

    /// Bytes of the header's sector that are not the map's.
    pub(crate) fn head_len(&self) -> Result<usize> {
        bytes::index(self.layout.off_blocks.min(512))
    }

    /// The blocks that `range` touches, first and one past the last.
    fn blocks_of(&self, range: &Range<u64>) -> Result<(u64, u64)> {
        let block = self.layout.block;
        let end = bytes::div_ceil(range.end, block)?.min(self.layout.blocks.into());
        Ok((bytes::div(range.start, block)?, end))
    }

    /// Makes `changes` and the counter that they need, all at once; `false` if a page is not in memory.
    pub(crate) fn change(
        &self,
        alloc: &mut Alloc,
        counter_at: u64,
        changes: &[TableChange<'_>],
    ) -> Result<bool> {
        let counter = alloc.end().to_le_bytes();
        let mut all = changes.to_vec();
        if alloc.end() != alloc.counter {
            all.push(TableChange { page: HEAD, at: counter_at, bytes: &counter, rank: 0 });
        }
        let done = self.table.update(&all)?;
        if done {
            alloc.counter = alloc.end();
        }
        Ok(done)
    }

    /// Room for the blocks without a place at the start of `range`.
    async fn reserve_absent(&self, writer: &Writer, range: Range<u64>) -> Result<Reservation> {
        let (first, last) = self.blocks_of(&range)?;
        let entries = self.entries(first).await?;
        let most = if self.layout.extra == 0 { bytes::index(last.saturating_sub(first))? } else { 1 };
        let absent = entries.iter().take(most).take_while(|entry| slot_of(*entry).is_none()).count();
        let wanted = bytes::narrow(bytes::wide(absent))?;
        if wanted == 0 {
            return Err(self.misuse("room was asked for where there is some", range.start));
        }
        let mut starving = None;
        for _ in 0..ROUNDS {
            let hole = writer.alloc.lock().take_hole(wanted);
            if let Some(slots) = hole {
                return self.reservation(first, slots, false);
            }
            if let Some((slots, zeroed)) = self.take_end(writer, wanted).await? {
                return self.reservation(first, slots, zeroed);
            }
            // All places are in use, or held by a block that is moving, or wait for a flush before they can be used again.
            starving.get_or_insert_with(|| Starving::new(&writer.starving));
            drop(writer.moving.lock().await);
            self.flush_tables(writer).await?;
        }
        Err(Error::new(Code::NoSpace, "the image has no place for one more block")
            .image(&self.info.name)
            .field("cBlocks")
            .found(format!("{} blocks in use", writer.alloc.lock().end()))
            .hint("flush, and write again"))
    }

    fn reservation(&self, first: u64, slots: Range<u32>, zeroed: bool) -> Result<Reservation> {
        let block = self.layout.block;
        let end = bytes::add(first, bytes::wide(slots.len()))?;
        Ok(Reservation {
            range: bytes::mul(first, block)?..bytes::mul(end, block)?,
            storage: 0,
            offset: self.layout.data_at(slots.start),
            zeroed,
            token: slots.start.into(),
        })
    }

    /// The slots of a reservation, and its first block.
    pub(crate) fn reserved(&self, reservation: &Reservation) -> Result<(u64, Range<u32>)> {
        let first = bytes::div(reservation.range.start, self.layout.block)?;
        let end = bytes::div(reservation.range.end, self.layout.block)?;
        let slot = bytes::narrow(reservation.token)?;
        let end = bytes::narrow(bytes::add(reservation.token, bytes::sub(end, first)?)?)?;
        Ok((first, slot..end))
    }

    /// Takes slots at the end and makes the file long enough; says whether they read as zeros.
    async fn take_end(&self, writer: &Writer, wanted: u32) -> Result<Option<(Range<u32>, bool)>> {
        let _alone = writer.length.lock().await;
        let taken = writer.alloc.lock().take_end(wanted, self.layout.blocks);
        let Some(slots) = taken else { return Ok(None) };
        let len = self.file_len.load(Ordering::Acquire);
        let needed = self.layout.slot_at(slots.end);
        if needed > len {
            if let Err(error) = self.file().set_len(needed, Preallocate::Off).await {
                writer.alloc.lock().give_back(slots);
                return Err(error.context("making the file longer"));
            }
            self.file_len.store(needed, Ordering::Release);
        }
        let zeroed = self.layout.slot_at(slots.start) >= len;
        Ok(Some((slots, zeroed)))
    }

    /// A hole for `block`, which lies behind it.
    async fn reserve_move(&self, writer: &Writer, block: u64) -> Result<Reservation> {
        let entry = self.entries(block).await?.iter().next().and_then(slot_of);
        let may_move = writer.starving.load(Ordering::Acquire) == 0;
        let Some(alone) = writer.moving.try_lock_arc().filter(|_| may_move) else {
            return Err(self.misuse("others need the room", block.saturating_mul(self.layout.block)));
        };
        let mut alloc = writer.alloc.lock();
        if let Some(slots) = entry.and_then(|slot| alloc.take_hole_before(slot)) {
            *writer.moves_to.lock() = Some((slots.start.into(), alone));
            return self.reservation(block, slots, false);
        }
        alloc.disown(block);
        Err(self.misuse("there is no better place", block.saturating_mul(self.layout.block)))
    }

    #[cold]
    fn misuse(&self, what: &str, guest: u64) -> Error {
        Error::new(Code::Usage, what).image(&self.info.name).found(format!("guest byte {guest:#x}"))
    }

    /// The map names the slots for the blocks from `first` on; what it named before is released.
    async fn enter(&self, writer: &Writer, first: u64, slots: &Range<u32>) -> Result<()> {
        let new: Vec<u8> = slots.clone().flat_map(u32::to_le_bytes).collect();
        for _ in 0..TRIES {
            let entries = self.entries(first).await?;
            self.table.load(HEAD, self.head_len()?).await?;
            let change = TableChange { page: entries.key, at: entries.at, bytes: &new, rank: 1 };
            let mut alloc = writer.alloc.lock();
            if !self.change(&mut alloc, writer.counter_at, &[change])? {
                continue;
            }
            for ((old, slot), block) in entries.iter().zip(slots.clone()).zip(first..) {
                alloc.own(slot, block);
                if let Some(old) = slot_of(old) {
                    alloc.release(old);
                }
            }
            return Ok(());
        }
        Err(self.squeezed())
    }

    /// Lets the blocks from `first` on (at most `count`, of one page of the map) read as zeros; returns how many.
    async fn clear(&self, writer: &Writer, first: u64, count: u64) -> Result<u64> {
        let new = if writer.has_parent { ZERO } else { FREE };
        let changes_what = |entry: u32| slot_of(entry).is_some() || (writer.has_parent && entry == FREE);
        for _ in 0..TRIES {
            let entries = self.entries(first).await?;
            let entries_here: Vec<u32> = entries.iter().take(bytes::index(count)?).collect();
            let runs = runs(&entries_here, changes_what);
            let longest = runs.iter().map(|run| run.len()).max().unwrap_or(0);
            let fill = new.to_le_bytes().repeat(longest);
            let changes: Vec<TableChange<'_>> = runs
                .iter()
                .map(|run| {
                    let at = bytes::wide(run.start).saturating_mul(4).saturating_add(entries.at);
                    let bytes = fill.get(..run.len().saturating_mul(4)).unwrap_or_default();
                    TableChange { page: entries.key, at, bytes, rank: 1 }
                })
                .collect();
            let mut alloc = writer.alloc.lock();
            if !changes.is_empty() && !self.table.update(&changes)? {
                continue;
            }
            entries_here.iter().filter_map(|entry| slot_of(*entry)).for_each(|slot| alloc.release(slot));
            return Ok(bytes::wide(entries_here.len()));
        }
        Err(self.squeezed())
    }

    #[cold]
    pub(crate) fn squeezed(&self) -> Error {
        Error::new(Code::Io, "the table cache is too small to hold the pages of one change")
            .image(&self.info.name)
    }
}

/// The runs of entries that `is_wanted`.
fn runs(entries: &[u32], is_wanted: impl Fn(u32) -> bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, _) in entries.iter().enumerate().filter(|(_, entry)| is_wanted(**entry)) {
        match runs.last_mut() {
            Some(run) if run.end == index => run.end = index.saturating_add(1),
            _ => runs.push(index..index.saturating_add(1)),
        }
    }
    runs
}

impl WritableImage for VdiImage {
    fn begin(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.begin_session(self.writing()?).await })
    }

    fn hull(&self, range: Range<u64>) -> Range<u64> {
        let block = self.layout.block;
        let within = range.start.checked_rem(block).unwrap_or(0);
        let end = range.end.checked_next_multiple_of(block).unwrap_or(u64::MAX);
        range.start.saturating_sub(within)..end
    }

    fn place(&self, range: Range<u64>) -> Result<Placement> {
        Ok(match self.find(range)? {
            None => Placement::Miss,
            Some((len, Run::Data { offset, .. })) => Placement::InPlace { len, storage: 0, offset },
            Some((len, _)) => Placement::Absent { len },
        })
    }

    fn reserve(&self, range: Range<u64>, intent: Intent) -> BoxFuture<'_, Result<Reservation>> {
        Box::pin(async move {
            let writer = self.writing()?;
            match intent {
                Intent::Write => self.reserve_absent(writer, range).await,
                Intent::Move => self.reserve_move(writer, self.blocks_of(&range)?.0).await,
            }
        })
    }

    fn commit(&self, filled: Reservation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let writer = self.writing()?;
            let (first, slots) = self.reserved(&filled)?;
            let entered = self.enter(writer, first, &slots).await;
            if entered.is_err() {
                writer.alloc.lock().give_back(slots);
            }
            writer.ends(&filled);
            entered
        })
    }

    fn abort(&self, unused: Reservation) -> BoxFuture<'_, ()> {
        if let (Ok(writer), Ok((_, slots))) = (self.writing(), self.reserved(&unused)) {
            writer.alloc.lock().give_back(slots);
            writer.ends(&unused);
        }
        Box::pin(async {})
    }

    fn discard(&self, range: Range<u64>) -> BoxFuture<'_, Result<Discarded>> {
        Box::pin(async move {
            let writer = self.writing()?;
            if writer.is_fixed || writer.alloc.lock().is_damaged {
                return Ok(Discarded::Cannot(bytes::sub(range.end, range.start)?));
            }
            let (first, last) = self.blocks_of(&range)?;
            let cleared = self.clear(writer, first, bytes::sub(last, first)?).await?;
            let end = bytes::mul(bytes::add(first, cleared)?, self.layout.block)?.min(range.end);
            Ok(Discarded::Done(bytes::sub(end, range.start)?))
        })
    }

    fn share(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.share_session(self.writing()?).await })
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.flush_tables(self.writing()?).await })
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.end_session(self.writing()?).await })
    }

    fn wants_flush(&self) -> bool {
        self.table.wants_commit()
            || self.writer.as_ref().is_some_and(|writer| writer.alloc.lock().wants_flush())
    }

    fn wants_move(&self) -> Option<Range<u64>> {
        let writer = self.writer.as_ref().filter(|writer| !writer.is_fixed && self.layout.extra == 0)?;
        let next = writer.alloc.lock().next_move();
        let NextMove::Block(block) = next else { return None };
        let start = u64::from(block).checked_mul(self.layout.block)?;
        Some(start..start.checked_add(self.layout.block)?)
    }
}
