//! Writing in place.
//!
//! ```text
//!   rank 0   data, bitmaps of new blocks (dynamic: all bits set; differencing: those of the sectors written)
//!   rank 1   BAT entries, bits in bitmaps of blocks that were there before
//! ```
//!
//! A set bit says "the data is here", so in a block that is in the BAT already a bit is a pointer: set before its
//! data, it would show what happened to lie there instead of the parent. A child's reservation covers the sectors
//! touched; the others stay the parent's, bit by bit.

use crate::alloc::Writing;
use crate::header::{ABSENT, FORMAT};
use crate::map::{SECTOR, Spot, Tables, VhdImage};
use crate::open::unix_time;
use std::ops::Range;
use std::sync::atomic::Ordering;
use vellum_core::storage::{past_end, write_slice};
use vellum_core::{
    BoxFuture, Code, Discarded, Error, FlushPoint, Intent, Placement, Reservation, Result, Storage,
    TableChange, WritableImage, ZeroMode, bytes, flush_at,
};
use zerocopy::IntoBytes;

/// The unit of a fixed image. Nothing in the file depends on it.
const FIXED_UNIT: u64 = 1 << 20;
/// In a token (the start of the block in the file, a multiple of 512): the block is new.
const NEW: u64 = 1;

impl VhdImage {
    /// Tables and state of an image that can be written.
    fn sparse_parts(&self) -> Result<(&Tables, &Writing)> {
        match (&self.tables, &self.writing) {
            (Some(tables), Some(writing)) => Ok((tables, writing)),
            _ => Err(Error::new(Code::Usage, "a fixed image has no blocks").image(&self.info.name)),
        }
    }

    fn storage(&self) -> &dyn Storage {
        let [main] = &self.storages;
        main.as_ref()
    }

    /// New timestamp in both footers, never in both at once. (A fixed image has one only: it stays as it is.)
    async fn begin_session(&self) -> Result<()> {
        let (Some(tables), Some(writing)) = (&self.tables, &self.writing) else { return Ok(()) };
        let footer = {
            let mut footer = writing.footer.lock();
            let is_same = footer.timestamp.get() == writing.timestamp;
            footer.timestamp = writing.timestamp.wrapping_add(is_same.into()).into();
            *footer = footer.sealed();
            *footer
        };
        let end = tables.data_end.load(Ordering::Acquire);
        // The one that others rely on is written second.
        let places = if writing.copy_is_sound { [end, 0] } else { [0, end] };
        for at in places {
            write_slice(self.storage(), at, footer.as_bytes()).await?;
            flush_at(FlushPoint::Session, self.storage()).await?;
        }
        let mut info = self.info.clone();
        info.change_property("timestamp", unix_time(footer.timestamp.get()));
        info.modified_unix = Some(unix_time(footer.timestamp.get()));
        writing.told.get_or_init(|| info);
        Ok(())
    }

    /// The part of `range` in one block that gets a place: whole block, or the sectors touched up to `end`.
    fn part(&self, tables: &Tables, block: u64, range: &Range<u64>, sectors: bool) -> Result<Range<u64>> {
        let guest = bytes::mul(block, tables.layout.block)?;
        let end = bytes::add(guest, tables.layout.block)?;
        if !sectors {
            return Ok(guest..end);
        }
        let start = bytes::sub(range.start, bytes::rem(range.start, SECTOR)?)?;
        Ok(start..bytes::align_up(range.end, SECTOR)?.min(end))
    }

    async fn reserve_block(&self, range: Range<u64>) -> Result<Reservation> {
        let (tables, writing) = self.sparse_parts()?;
        let layout = &tables.layout;
        let block = bytes::div(range.start, layout.block)?;
        let entry = tables.load_entry(block).await?;
        let (start, zeroed, flag, part) = if entry == ABSENT {
            let part = self.part(tables, block, &range, layout.differencing)?;
            let slot = self.slot(tables, writing).await?;
            (slot.start, slot.zeroed, NEW, part)
        } else {
            let start = self.bitmap_at(tables, block, entry)?;
            let clear = loop {
                // Each may have squeezed the other out of memory.
                tables.load_entry(block).await?;
                tables.load_bitmap(block, start).await?;
                match self.find(tables, range.clone())? {
                    Spot::Clear { len } => break range.start..bytes::add(range.start, len)?,
                    Spot::Miss => {}
                    Spot::Absent { .. } | Spot::Here { .. } => {
                        return Err(Error::new(Code::Usage, "the range has a place").at(range.start));
                    }
                }
            };
            (start, false, 0, self.part(tables, block, &clear, true)?)
        };
        let within = bytes::sub(part.start, bytes::mul(block, layout.block)?)?;
        let offset = bytes::add(bytes::add(start, layout.bitmap_bytes)?, within)?;
        Ok(Reservation { range: part, storage: 0, offset, zeroed, token: start | flag })
    }

    async fn commit_block(&self, filled: Reservation) -> Result<()> {
        let (tables, _) = self.sparse_parts()?;
        let layout = &tables.layout;
        let block = bytes::div(filled.range.start, layout.block)?;
        let guest = bytes::mul(block, layout.block)?;
        let first = bytes::div(bytes::sub(filled.range.start, guest)?, SECTOR)?;
        let last = bytes::div(bytes::sub(filled.range.end, guest)?, SECTOR)?;
        let start = filled.token & !NEW;
        if filled.token & NEW == 0 {
            return self.set_bits(tables, block, start, first..last).await;
        }
        let placed = async {
            let mut bitmap = vec![0u8; bytes::index(layout.bitmap_bytes)?];
            match layout.differencing {
                true => set_bits(&mut bitmap, first..last)?,
                false => bitmap.fill(0xff),
            }
            tables.cache.put(start, bitmap)?;
            self.set_entry(tables, block, bytes::narrow(bytes::div(start, SECTOR)?)?).await?;
            tables.set_whole(block, !layout.differencing);
            Ok(())
        };
        // If this fails the place is lost: its bitmap may be on its way to the file already.
        placed.await
    }

    /// Sets the bits of `sectors` in the bitmap at byte `start`, after the data.
    async fn set_bits(&self, tables: &Tables, block: u64, start: u64, sectors: Range<u64>) -> Result<()> {
        let (from, to) = (sectors.start >> 3, sectors.end.div_ceil(8));
        loop {
            // Nobody else changes this bitmap: the block is held.
            let mut bitmap = tables.load_bitmap(block, start).await?.to_vec();
            set_bits(&mut bitmap, sectors.clone())?;
            let changed = bitmap.get(bytes::index(from)?..bytes::index(to)?).unwrap_or_default();
            if tables.cache.update(&[TableChange { page: start, at: from, bytes: changed, rank: 1 }])? {
                return Ok(());
            }
        }
    }

    async fn set_entry(&self, tables: &Tables, block: u64, entry: u32) -> Result<()> {
        let (page, within) = tables.layout.page_of(block)?;
        let change = TableChange { page, at: bytes::wide(within), bytes: &entry.to_be_bytes(), rank: 1 };
        loop {
            if tables.cache.update(&[change])? {
                return Ok(());
            }
            tables.load_entry(block).await?;
        }
    }

    async fn discard_block(&self, range: Range<u64>) -> Result<Discarded> {
        let end = range.end.min(self.info.virtual_size);
        if range.start >= end {
            return Err(past_end(&self.info.name, range.start, 0, self.info.virtual_size));
        }
        let Some(tables) = &self.tables else {
            self.storage().zero(range.start..end, ZeroMode::MayUnmap).await?;
            return Ok(Discarded::Done(bytes::sub(end, range.start)?));
        };
        let (tables, writing) = (tables, self.sparse_parts()?.1);
        let layout = &tables.layout;
        let block = bytes::div(range.start, layout.block)?;
        let entry = tables.load_entry(block).await?;
        if entry == ABSENT {
            let stop = tables.absent_until(block, bytes::div_ceil(end, layout.block)?)?;
            let len = bytes::sub(bytes::mul(stop, layout.block)?.min(end), range.start)?;
            // A child without a block shows its parent, whatever that has there.
            return Ok(if layout.differencing { Discarded::Cannot(len) } else { Discarded::Done(len) });
        }
        let start = self.bitmap_at(tables, block, entry)?;
        let visible = layout.visible(block);
        if layout.differencing {
            let data = bytes::add(start, layout.bitmap_bytes)?;
            self.storage().zero(data..bytes::add(data, visible)?, ZeroMode::MayUnmap).await?;
            self.set_bits(tables, block, start, 0..bytes::div_ceil(visible, SECTOR)?).await?;
        } else {
            tables.set_whole(block, false);
            self.set_entry(tables, block, ABSENT).await?;
            tables.cache.forget(start..start.saturating_add(1));
            // Last: whoever flushes must not let the place go without the entry.
            writing.space.lock().let_go(start);
        }
        Ok(Discarded::Done(visible))
    }

    async fn flush_tables(&self) -> Result<()> {
        let Some(writing) = &self.writing else { return Ok(()) };
        let Some(tables) = &self.tables else {
            return writing.committer.commit(&[], &self.storages, || (), |()| ()).await;
        };
        let cut = writing.space.lock().cut_number();
        let freeze = || std::mem::take(&mut writing.space.lock().pending);
        let done = |freed: Vec<u64>| writing.space.lock().released.extend(freed);
        writing.committer.commit(&[&tables.cache], &self.storages, freeze, done).await?;
        self.settle(tables, writing, cut).await;
        Ok(())
    }

    async fn end_session(&self) -> Result<()> {
        self.flush_tables().await?;
        let is_cut = |writing: &Writing| writing.space.lock().cut_number().is_none();
        if self.writing.as_ref().is_none_or(is_cut) {
            return Ok(());
        }
        // The footer of the shorter file is durable with this one, and then the file is cut.
        self.flush_tables().await
    }
}

/// Sets the bits of `sectors`.
fn set_bits(bitmap: &mut [u8], sectors: Range<u64>) -> Result<()> {
    for sector in sectors {
        match bitmap.get_mut(bytes::index(sector >> 3)?) {
            Some(byte) => *byte |= 0x80 >> (sector & 7),
            None => {
                return Err(Error::new(Code::Corrupt, "a bitmap is shorter than its block")
                    .format(FORMAT)
                    .found(sector));
            }
        }
    }
    Ok(())
}

impl WritableImage for VhdImage {
    fn begin(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.begin_session())
    }

    fn hull(&self, range: Range<u64>) -> Range<u64> {
        let unit = self.tables.as_ref().map_or(FIXED_UNIT, |tables| tables.layout.block);
        let start = range.start & !unit.saturating_sub(1);
        start..range.end.checked_next_multiple_of(unit).unwrap_or(u64::MAX)
    }

    fn place(&self, range: Range<u64>) -> Result<Placement> {
        let end = range.end.min(self.info.virtual_size);
        if range.start >= end {
            return Err(past_end(&self.info.name, range.start, 0, self.info.virtual_size));
        }
        let Some(tables) = &self.tables else {
            let len = bytes::sub(end, range.start)?;
            return Ok(Placement::InPlace { len, storage: 0, offset: range.start });
        };
        Ok(match self.find(tables, range.start..end)? {
            Spot::Miss => Placement::Miss,
            Spot::Absent { len } | Spot::Clear { len } => Placement::Absent { len },
            Spot::Here { len, offset } => Placement::InPlace { len, storage: 0, offset },
        })
    }

    fn reserve(&self, range: Range<u64>, intent: Intent) -> BoxFuture<'_, Result<Reservation>> {
        Box::pin(async move {
            match intent {
                Intent::Write => self.reserve_block(range).await,
                Intent::Move => Err(Error::new(Code::Usage, "there is no better place").at(range.start)),
            }
        })
    }

    fn commit(&self, filled: Reservation) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.commit_block(filled))
    }

    fn abort(&self, unused: Reservation) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            if let (Some(writing), true) = (&self.writing, unused.token & NEW != 0) {
                writing.space.lock().give_back(unused.token & !NEW);
            }
        })
    }

    fn discard(&self, range: Range<u64>) -> BoxFuture<'_, Result<Discarded>> {
        Box::pin(self.discard_block(range))
    }

    fn share(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            match &self.tables {
                None => Ok(()),
                Some(_) => Err(vellum_core::not_shareable()),
            }
        })
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.flush_tables())
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.end_session())
    }

    fn wants_flush(&self) -> bool {
        self.tables.as_ref().is_some_and(|tables| tables.cache.wants_commit())
    }
}
