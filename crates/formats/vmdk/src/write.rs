//! Writing into an open disk: where bytes go, and what the tables say of it afterwards.
//!
//! ```text
//!   new grain    room at the end of the file | data | GT entry and its copy, in memory
//!   flush        data | FLUSH | GT entries and copies (one rank) | FLUSH
//!   discard      GT entry and copy: 0, or 1 where the header allows zeroed grains; the grain is free after the flush
//! ```
//!
//! Flat extents have a place for every byte. What cannot hold data (ZERO, RDONLY, NOACCESS) says so.

use crate::alloc::{Room, Space};
use crate::extent::{Cursor, Grain, Kind, SparseExtent};
use crate::image::{Part, Source, VmdkImage};
use crate::session::ContentIdentity;
use crate::tables::{Changes, Held, Stop};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use vellum_core::bytes::{add, div, div_ceil, mul, narrow, rem, sub, wide};
use vellum_core::{
    BoxFuture, Code, Committer, Discarded, Error, Extent, Image, ImageInfo, Intent, Lookup, Placement,
    Providers, Reservation, Result, Storage, WritableImage, ZeroMode,
};

/// Unit in which flat extents are locked and discarded.
const FLAT_UNIT: u64 = 64 << 10;
/// How often tables are loaded again that were squeezed out of the cache meanwhile.
const TRIES_MAX: u32 = 1000;

/// What a disk has that was opened for writing.
pub(crate) struct Writer {
    pub committer: Committer,
    /// All that may hold data or tables that were written.
    pub storages: Vec<Arc<dyn Storage>>,
    /// The space of each sparse part; by number of the part.
    pub spaces: Vec<Option<Space>>,
    pub identity: ContentIdentity,
    pub providers: Providers,
    /// An absent grain shows a parent.
    pub has_parent: bool,
    pub skip_consistency_checks: bool,
    /// The marks stay as they were found: what they are about was not mended.
    pub keeps_marks: AtomicBool,
    /// Held while entries are looked up and changed in one go. Never across I/O.
    pub entries: Mutex<()>,
    /// What the image says of itself since the session began.
    pub told: OnceLock<ImageInfo>,
}

/// A sparse part that can be written, and all that goes with it.
pub(crate) struct Target<'a> {
    pub part: &'a Part,
    pub extent: &'a SparseExtent,
    pub space: &'a Space,
    pub storage: &'a Arc<dyn Storage>,
}

/// The places of a grain table and its copy.
#[derive(Clone, Copy)]
struct TablePair {
    primary: Option<u64>,
    copy: Option<u64>,
}

impl TablePair {
    fn is_complete(&self, extent: &SparseExtent) -> bool {
        self.primary.is_some() && (extent.rgd.is_none() || self.copy.is_some())
    }
}

/// What hindered a change: load it and try again.
enum Missing {
    Stop(Stop),
    Pages(Changes),
}

impl VmdkImage {
    pub(crate) fn writer(&self) -> Result<&Writer> {
        self.writer.as_ref().ok_or_else(|| vellum_core::storage::read_only(&self.info.name))
    }

    /// The sparse parts that can be written.
    pub(crate) fn targets(&self) -> Result<Vec<Target<'_>>> {
        let writer = self.writer()?;
        let mut targets = Vec::new();
        for (part, space) in self.parts.iter().zip(&writer.spaces) {
            if let (Source::Sparse(extent), Some(space)) = (&part.source, space) {
                let storage = self.tables.file(extent.file)?;
                targets.push(Target { part, extent, space, storage });
            }
        }
        Ok(targets)
    }

    /// The sparse part at guest byte `at`, or why it cannot hold data.
    fn target(&self, at: u64) -> Result<Target<'_>> {
        let (number, part) = self.numbered_part(at)?;
        let space = self.writer()?.spaces.get(number).and_then(Option::as_ref);
        match (&part.source, space) {
            (Source::Sparse(extent), Some(space)) => {
                Ok(Target { part, extent, space, storage: self.tables.file(extent.file)? })
            }
            (Source::Flat { .. }, _) if !part.is_read_only => {
                Err(Error::new(Code::Usage, "a flat extent has a place for every byte")
                    .image(&self.info.name))
            }
            _ => Err(self.refuses(part)),
        }
    }

    #[cold]
    fn refuses(&self, part: &Part) -> Error {
        let (access, message) = match part.source {
            Source::Zero => ("ZERO", "an extent without a file can hold nothing but zeros"),
            Source::NoAccess => ("NOACCESS", "the descriptor forbids access to this extent"),
            _ => ("RDONLY", "the descriptor forbids writing to this extent"),
        };
        Error::new(Code::Permission, message)
            .image(&self.info.name)
            .found(format!("{access} at guest bytes {:#x} to {:#x}", part.start, part.end))
            .hint("write elsewhere, or convert the disk to one that can hold data everywhere")
    }

    /// The tables of number `table`, as the directories say now.
    fn pair_now(&self, extent: &SparseExtent, table: u64) -> Result<TablePair, Stop> {
        let place = |directory: u64| -> Result<Option<u64>, Stop> {
            let at = add(directory, mul(table, 4)?)?;
            let value = self.tables.entry(&mut Held::default(), extent.file, at, 4)?;
            Ok(extent.table_place(value).map_err(|error| error.at(at).image(&extent.name))?)
        };
        let copy = extent.rgd.map(place).transpose()?.flatten();
        Ok(TablePair { primary: place(extent.gd)?, copy })
    }

    async fn bring_in(&self, missing: Missing) -> Result<()> {
        match missing {
            Missing::Stop(Stop::Miss(page)) => self.tables.load(page).await,
            Missing::Stop(Stop::Bad(error)) => Err(error),
            Missing::Stop(Stop::Compare(_)) => Err(Error::new(Code::Usage, "a table was not compared")),
            Missing::Pages(changes) => self.tables.load_for(&changes).await,
        }
    }

    /// Carries out a change of tables that may have to be loaded first. `change` is called under the lock.
    async fn change_tables(
        &self,
        change: impl Fn() -> Result<Option<Changes>, Stop> + Send + Sync,
        then: impl Fn() + Send + Sync,
    ) -> Result<()> {
        let writer = self.writer()?;
        for _ in 0..TRIES_MAX {
            let missing = {
                let _alone = writer.entries.lock();
                match change() {
                    Ok(None) => return Ok(()),
                    Ok(Some(changes)) => {
                        if self.tables.apply(&changes)? {
                            then();
                            return Ok(());
                        }
                        Missing::Pages(changes)
                    }
                    Err(stop) => Missing::Stop(stop),
                }
            };
            self.bring_in(missing).await?;
        }
        Err(Error::new(Code::Io, "the table cache is too small to hold one page").image(&self.info.name))
    }

    /// Sets consecutive entries of one grain table, from that of grain `number` on, and their copies.
    async fn set_entries(&self, target: &Target<'_>, number: u64, entries: &[u8]) -> Result<()> {
        let extent = target.extent;
        let change = || self.entry_changes(extent, number, entries).map(Some);
        let then = || extent.disputes.settle(number, wide(entries.len() / 4));
        self.change_tables(change, then).await.map_err(|e| e.image(&extent.name))
    }

    fn entry_changes(&self, extent: &SparseExtent, number: u64, entries: &[u8]) -> Result<Changes, Stop> {
        let (table, entry) = (div(number, extent.gtes)?, rem(number, extent.gtes)?);
        let pair = self.pair_now(extent, table)?;
        let mut changes = Changes::default();
        let Some(primary) = pair.primary else {
            return Err(Stop::Bad(Error::new(Code::Corrupt, "a grain table went away").image(&extent.name)));
        };
        for place in [Some(primary), pair.copy.filter(|copy| *copy != primary)].into_iter().flatten() {
            self.tables.change(&mut changes, extent.file, add(place, mul(entry, 4)?)?, entries)?;
        }
        Ok(changes)
    }

    /// Puts what was decided between differing tables into both of them.
    pub(crate) async fn mend(&self) -> Result<()> {
        for target in self.targets()?.iter().filter(|target| target.extent.disputes.any_decided()) {
            let extent = target.extent;
            for (number, value) in extent.disputes.all_decided() {
                let bytes = narrow(value)?.to_le_bytes();
                let change = || match extent.disputes.decided(number) {
                    Some(still) if still == value => self.entry_changes(extent, number, &bytes).map(Some),
                    _ => Ok(None),
                };
                self.change_tables(change, || extent.disputes.settle(number, 1)).await?;
            }
        }
        Ok(())
    }

    async fn pair(&self, extent: &SparseExtent, table: u64) -> Result<TablePair> {
        for _ in 0..TRIES_MAX {
            match self.pair_now(extent, table) {
                Ok(pair) => return Ok(pair),
                Err(stop) => self.bring_in(Missing::Stop(stop)).await?,
            }
        }
        Err(Error::new(Code::Io, "the table cache is too small to hold one page").image(&extent.name))
    }

    /// Makes grain table number `table` and its copy, if one of them is missing.
    pub(crate) async fn ensure_table(&self, target: &Target<'_>, table: u64) -> Result<()> {
        let extent = target.extent;
        if self.pair(extent, table).await?.is_complete(extent) {
            return Ok(());
        }
        let _alone = target.space.making.lock().await;
        let pair = self.pair(extent, table).await?;
        if pair.is_complete(extent) {
            return Ok(());
        }
        let mut fresh = Vec::new();
        let directories = [(Some(extent.gd), pair.primary), (extent.rgd, pair.copy)];
        for (directory, place) in directories {
            if let (Some(directory), None) = (directory, place) {
                fresh.push((directory, self.new_table(target).await?));
            }
        }
        let change = || {
            let mut changes = Changes::default();
            for (directory, place) in &fresh {
                let entry = narrow(extent.entry_of(*place)?)?.to_le_bytes();
                let at = add(*directory, mul(table, 4)?)?;
                self.tables.change(&mut changes, extent.file, at, &entry)?;
                // A power loss may have left one table of the two.
                if let Some(other) = pair.primary.or(pair.copy) {
                    let content = self.content_of(extent, other)?;
                    self.tables.change(&mut changes, extent.file, *place, &content)?;
                }
            }
            Ok(Some(changes))
        };
        let tables = extent.tables()?;
        self.change_tables(change, || extent.disputes.agree(table, tables)).await
    }

    /// The entries of the grain table at `place`, from memory.
    fn content_of(&self, extent: &SparseExtent, place: u64) -> Result<Vec<u8>, Stop> {
        let bytes = extent.table_bytes()?;
        if let Some(content) = self.tables.peek(extent.file, place, bytes)? {
            return Ok(content);
        }
        // One of its (at most two) pages: the first entry or the last tells which.
        let mut held = Held::default();
        self.tables.entry(&mut held, extent.file, place, 4)?;
        self.tables.entry(&mut held, extent.file, sub(add(place, bytes)?, 4)?, 4)?;
        Err(Stop::Bad(Error::new(Code::OutOfFile, "a table lies past the end of the file").at(place)))
    }

    /// Room for a grain table of zeros.
    async fn new_table(&self, target: &Target<'_>) -> Result<u64> {
        let extent = target.extent;
        let bytes = extent.table_bytes()?;
        let (place, begins_page) = target.space.take_table(extent, target.storage.as_ref(), bytes).await?;
        if begins_page {
            self.tables.put(extent.file, place)?;
        }
        Ok(place)
    }

    /// How many grains from `number` on, which has no place, have none either; up to byte `end` of the extent.
    fn absent_run(&self, extent: &SparseExtent, number: u64, end: u64) -> Result<u64> {
        let in_table = sub(extent.gtes, rem(number, extent.gtes)?)?;
        let limit = in_table.min(sub(div_ceil(end, extent.grain)?, number)?);
        let (mut count, mut cursor) = (1, Cursor::default());
        while count < limit {
            match extent.grain(&self.tables, &mut cursor, add(number, count)?, &self.events) {
                Ok(found) if !matches!(found.grain, Grain::At(_)) => {
                    count = add(count, found.grains.max(1))?;
                }
                _ => break,
            }
        }
        Ok(count.min(limit))
    }

    async fn reserve_grains(&self, range: Range<u64>) -> Result<Reservation> {
        let target = self.target(range.start)?;
        let (part, extent) = (target.part, target.extent);
        let number = div(sub(range.start, part.start)?, extent.grain)?;
        self.load(range.clone()).await?;
        self.ensure_table(&target, div(number, extent.gtes)?).await?;
        let count = self.absent_run(extent, number, sub(range.end.min(part.end), part.start)?)?;
        let room = target.space.take(extent, target.storage.as_ref(), count).await?;
        let start = add(part.start, mul(number, extent.grain)?)?;
        let end = add(start, mul(room.grains, extent.grain)?)?;
        // Past the end of the disk the engine puts zeros; past the end of an extent comes the next one.
        let is_last = part.end == self.info.virtual_size;
        let stop = if is_last { end } else { end.min(part.end) };
        if stop < end && !room.is_fresh {
            let at = add(room.place, sub(stop, start)?)?;
            vellum_core::fill_range(target.storage.as_ref(), at, sub(end, stop)?, 0).await?;
        }
        Ok(Reservation {
            range: start..stop,
            storage: extent.file,
            offset: room.place,
            zeroed: room.is_fresh,
            token: 0,
        })
    }

    fn room_of(&self, target: &Target<'_>, reservation: &Reservation) -> Result<Room> {
        let len = sub(reservation.range.end, reservation.range.start)?;
        let grains = div_ceil(len, target.extent.grain)?;
        Ok(Room { place: reservation.offset, grains, is_fresh: false })
    }

    async fn commit_grains(&self, filled: Reservation) -> Result<()> {
        let target = self.target(filled.range.start)?;
        let extent = target.extent;
        let room = self.room_of(&target, &filled)?;
        let mut entries = Vec::new();
        for number in 0..room.grains {
            let place = add(room.place, mul(number, extent.grain)?)?;
            entries.extend_from_slice(&narrow(extent.entry_of(place)?)?.to_le_bytes());
        }
        let number = div(sub(filled.range.start, target.part.start)?, extent.grain)?;
        self.set_entries(&target, number, &entries).await
    }

    /// Lets the grains go that lie in `range`, which is inside a sparse part.
    async fn discard_grains(&self, range: Range<u64>) -> Result<Discarded> {
        let target = self.target(range.start)?;
        let (part, extent) = (target.part, target.extent);
        let has_parent = self.writer()?.has_parent;
        let has_zero_mark = extent.kind == Kind::Hosted { zeroed: true };
        let len = sub(range.end, range.start)?;
        let (start, end) = (sub(range.start, part.start)?, sub(range.end, part.start)?);
        let first = div(start, extent.grain)?;
        let whole =
            if range.end == part.end { div_ceil(end, extent.grain)? } else { div(end, extent.grain)? };
        if rem(start, extent.grain)? != 0 || whole <= first || (has_parent && !has_zero_mark) {
            return Ok(Discarded::Cannot(len));
        }
        let table = div(first, extent.gtes)?;
        let stop = whole.min(mul(add(table, 1)?, extent.gtes)?);
        let (mut entries, mut freed, mut is_changed) = (Vec::new(), Vec::new(), false);
        let mut number = first;
        while number < stop {
            let found = self.grain_at(&target, number).await?;
            let grains = found.grains.max(1).min(sub(stop, number)?);
            let entry = match found.grain {
                Grain::Absent => u32::from(has_parent),
                Grain::Zero => 1,
                Grain::At(place) => {
                    freed.push(place);
                    u32::from(has_zero_mark)
                }
            };
            is_changed |= match found.grain {
                Grain::Absent => has_parent,
                Grain::Zero => false,
                Grain::At(_) => true,
            };
            for _ in 0..grains {
                entries.extend_from_slice(&entry.to_le_bytes());
            }
            number = add(number, grains)?;
        }
        if is_changed {
            self.ensure_table(&target, table).await?;
            let is_doubtful = match freed.is_empty() {
                true => true,
                false => extent.verdict(target.storage.as_ref(), &self.events).await?.is_doubtful,
            };
            self.set_entries(&target, first, &entries).await?;
            // A grain that another entry may lead to is not given to anyone else.
            if !is_doubtful {
                target.space.release(freed);
            }
        }
        Ok(Discarded::Done(sub(mul(stop, extent.grain)?.min(sub(part.end, part.start)?), start)?))
    }

    async fn grain_at(&self, target: &Target<'_>, number: u64) -> Result<crate::extent::Found> {
        let extent = target.extent;
        for _ in 0..TRIES_MAX {
            match extent.grain(&self.tables, &mut Cursor::default(), number, &self.events) {
                Ok(found) => return Ok(found),
                Err(Stop::Bad(error)) => return Err(error),
                Err(_) => {
                    let start = mul(number, extent.grain)?;
                    self.lookups(target.part).load(extent, start).await?;
                }
            }
        }
        Err(Error::new(Code::Io, "the table cache is too small to hold one page").image(&extent.name))
    }

    async fn discard_start(&self, range: Range<u64>) -> Result<Discarded> {
        let (_, part) = self.numbered_part(range.start)?;
        let range = range.start..range.end.min(part.end);
        let len = sub(range.end, range.start)?;
        match &part.source {
            Source::Zero => Ok(Discarded::Done(len)),
            _ if part.is_read_only => Ok(Discarded::Cannot(len)),
            Source::Flat { storage, offset } => {
                let at = add(*offset, sub(range.start, part.start)?)?;
                self.tables.file(*storage)?.zero(at..add(at, len)?, ZeroMode::MayUnmap).await?;
                Ok(Discarded::Done(len))
            }
            Source::Sparse(_) => self.discard_grains(range).await,
            Source::NoAccess | Source::Closed(_) => Ok(Discarded::Cannot(len)),
        }
    }

    async fn flush_all(&self) -> Result<()> {
        let writer = self.writer()?;
        self.mend().await?;
        let spaces = || writer.spaces.iter().flatten();
        let freeze = || spaces().map(Space::freeze).collect::<Vec<_>>();
        let done = |freed: Vec<Vec<u64>>| {
            for (space, freed) in spaces().zip(freed) {
                space.thaw(freed);
            }
        };
        writer.committer.commit(&[self.tables.cache()], &writer.storages, freeze, done).await?;
        for target in self.targets()? {
            target.space.punch(target.storage.as_ref()).await?;
        }
        Ok(())
    }

    /// The unit of guest byte `at`: a grain, or a piece of a flat extent.
    fn unit(&self, at: u64) -> Option<Range<u64>> {
        let (_, part) = self.numbered_part(at).ok()?;
        let unit = match &part.source {
            Source::Sparse(extent) => extent.grain,
            _ => FLAT_UNIT,
        };
        let within = at.checked_sub(part.start)?.checked_rem(unit)?;
        let start = at.checked_sub(within)?;
        Some(start..start.checked_add(unit)?.min(part.end))
    }
}

impl WritableImage for VmdkImage {
    fn begin(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.begin_session())
    }

    fn hull(&self, range: Range<u64>) -> Range<u64> {
        if range.is_empty() {
            return range;
        }
        let start = self.unit(range.start).map_or(range.start, |unit| unit.start);
        let end = self.unit(range.end.saturating_sub(1)).map_or(range.end, |unit| unit.end);
        start..end.max(range.end)
    }

    fn place(&self, range: Range<u64>) -> Result<Placement> {
        let (_, part) = self.numbered_part(range.start)?;
        if matches!(part.source, Source::Zero) {
            return Ok(Placement::Absent { len: sub(range.end.min(part.end), range.start)? });
        }
        if part.is_read_only {
            return Err(self.refuses(part));
        }
        Ok(match self.map(range)? {
            Lookup::Miss => Placement::Miss,
            Lookup::Found { len, extent: Extent::Raw { storage, offset } } => {
                Placement::InPlace { len, storage, offset }
            }
            Lookup::Found { len, .. } => Placement::Absent { len },
        })
    }

    fn reserve(&self, range: Range<u64>, intent: Intent) -> BoxFuture<'_, Result<Reservation>> {
        Box::pin(async move {
            match intent {
                Intent::Write => self.reserve_grains(range).await,
                Intent::Move => Err(Error::new(Code::Usage, "grains are not moved").image(&self.info.name)),
            }
        })
    }

    fn commit(&self, filled: Reservation) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.commit_grains(filled))
    }

    fn abort(&self, unused: Reservation) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            if let Ok(target) = self.target(unused.range.start)
                && let Ok(room) = self.room_of(&target, &unused)
            {
                // Failing loses the space, no more.
                let _ = target.space.give_back(room);
            }
        })
    }

    fn discard(&self, range: Range<u64>) -> BoxFuture<'_, Result<Discarded>> {
        Box::pin(self.discard_start(range))
    }

    fn share(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.writer()?;
            match self.parts.iter().all(|part| matches!(part.source, Source::Flat { .. })) {
                true => Ok(()),
                false => Err(vellum_core::not_shareable()),
            }
        })
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.flush_all())
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.flush_all().await?;
            self.end_session().await
        })
    }

    fn wants_flush(&self) -> bool {
        self.tables.cache().wants_commit()
    }
}
