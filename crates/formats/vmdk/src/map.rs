//! Looking up where a range lives: pure, from cached tables.

use crate::extent::{Cursor, Grain, SparseExtent};
use crate::grain::GrainCodec;
use crate::header::SECTOR;
use crate::tables::{Stop, Tables};
use std::ops::Range;
use std::sync::Arc;
use vellum_core::bytes::{add, div, mul, narrow, rem, sub};
use vellum_core::{Codec, Encoded, Events, Extent, Lookup, Result};

/// Grains of a run of data, at most: with 64 KiB grains, 1 GiB of the disk.
const RUN_MAX: u32 = 16_384;
/// Steps over an empty range, at most; a step is usually a whole grain table. Bounds the work of one lookup in a child
/// that is empty over a parent in small pieces.
const STEPS_MAX: u32 = 1024;
/// Entries looked at to find the end of a compressed grain.
const NEIGHBOURS_MAX: u64 = 16;

/// What a lookup needs besides the extent.
pub(crate) struct Lookups<'a> {
    pub tables: &'a Tables,
    pub events: &'a Events,
    pub zlib: &'a Arc<dyn Codec>,
    /// Byte of the disk where the extent begins.
    pub extent_start: u64,
    /// The disk was opened for writing.
    pub is_written: bool,
}

impl Lookups<'_> {
    /// Where the start of `range` (in bytes of the extent) lives.
    pub(crate) fn map(&self, extent: &SparseExtent, range: Range<u64>) -> Result<Lookup> {
        match self.find(extent, range) {
            Ok(found) => Ok(found),
            Err(Stop::Miss(_) | Stop::Compare(_)) => Ok(Lookup::Miss),
            Err(Stop::Bad(error)) => Err(error),
        }
    }

    /// Brings in what `map` misses.
    pub(crate) async fn load(&self, extent: &SparseExtent, start: u64) -> Result<()> {
        let number = div(start, extent.grain)?;
        // A lookup needs at most four tables: directory and table, and the redundant copy of either.
        let name = |e: vellum_core::Error| e.image(&extent.name);
        for _ in 0..10 {
            match extent.grain(self.tables, &mut Cursor::default(), number, self.events) {
                Ok(_) => return Ok(()),
                Err(Stop::Miss(page)) => self.tables.load(page).await.map_err(name)?,
                Err(Stop::Compare(table)) => {
                    if self.is_written || !extent.look_for_holes(self.tables, table).await.map_err(name)? {
                        extent.compare(self.tables, table, self.events).await.map_err(name)?;
                    }
                }
                Err(Stop::Bad(error)) => return Err(error),
            }
        }
        Ok(())
    }

    fn find(&self, extent: &SparseExtent, range: Range<u64>) -> Result<Lookup, Stop> {
        let mut cursor = Cursor::default();
        let first = div(range.start, extent.grain)?;
        let found = extent.grain(self.tables, &mut cursor, first, self.events)?;
        match found.grain {
            Grain::At(place) if extent.framing.is_some() => {
                self.encoded(extent, &mut cursor, range, first, place)
            }
            Grain::At(place) => self.raw(extent, &mut cursor, range, first, place),
            kind => self.empty(extent, &mut cursor, range, first, kind, found.grains),
        }
    }

    /// A run of grains that all are absent, or all zero.
    fn empty(
        &self,
        extent: &SparseExtent,
        cursor: &mut Cursor,
        range: Range<u64>,
        first: u64,
        kind: Grain,
        grains: u64,
    ) -> Result<Lookup, Stop> {
        let mut next = first.saturating_add(grains);
        for _ in 0..STEPS_MAX {
            if next.saturating_mul(extent.grain) >= range.end {
                break;
            }
            match extent.grain(self.tables, cursor, next, self.events) {
                Ok(found) if found.grain == kind => next = next.saturating_add(found.grains),
                _ => break,
            }
        }
        let end = next.saturating_mul(extent.grain).min(range.end);
        let len = sub(end, range.start)?;
        Ok(Lookup::Found { len, extent: if kind == Grain::Zero { Extent::Zero } else { Extent::Parent } })
    }

    /// A run of grains that lie one behind the other in the file.
    fn raw(
        &self,
        extent: &SparseExtent,
        cursor: &mut Cursor,
        range: Range<u64>,
        first: u64,
        place: u64,
    ) -> Result<Lookup, Stop> {
        let within = rem(range.start, extent.grain)?;
        let mut next = add(first, 1)?;
        let mut expected = add(place, extent.grain)?;
        for _ in 0..RUN_MAX {
            if mul(next, extent.grain)? >= range.end || expected >= extent.file_len() {
                break;
            }
            match extent.grain(self.tables, cursor, next, self.events) {
                Ok(found) if found.grain == Grain::At(expected) => {}
                _ => break,
            }
            next = add(next, 1)?;
            expected = add(expected, extent.grain)?;
        }
        let len = sub(mul(next, extent.grain)?.min(range.end), range.start)?;
        let offset = add(place, within)?;
        // Only the last grain of a file can be cut off by its end: what is missing reads as zeros.
        let there = extent.file_len().saturating_sub(offset);
        if there < len {
            extent.warn_short(self.events, offset);
        }
        if there == 0 {
            return Ok(Lookup::Found { len, extent: Extent::Zero });
        }
        Ok(Lookup::Found { len: len.min(there), extent: Extent::Raw { storage: extent.file, offset } })
    }

    /// One compressed grain.
    fn encoded(
        &self,
        extent: &SparseExtent,
        cursor: &mut Cursor,
        range: Range<u64>,
        number: u64,
        place: u64,
    ) -> Result<Lookup, Stop> {
        let start = mul(number, extent.grain)?;
        let skip = sub(range.start, start)?;
        let len = add(start, extent.grain)?.min(range.end).saturating_sub(range.start);
        let mut stored_end = place.saturating_add(extent.stored_max()?).min(extent.file_len());
        // In an undamaged file any grain that lies further on bounds this one.
        for next in number.saturating_add(1)..number.saturating_add(NEIGHBOURS_MAX) {
            if next.saturating_mul(extent.grain) >= extent.capacity {
                break;
            }
            match extent.grain(self.tables, cursor, next, self.events) {
                Ok(found) => match found.grain {
                    Grain::At(other) if other > place => {
                        stored_end = stored_end.min(other);
                        break;
                    }
                    Grain::Absent if found.grains > 1 => break,
                    _ => {}
                },
                Err(_) => break,
            }
        }
        let sector = div(start, SECTOR)?;
        let codec = GrainCodec {
            zlib: self.zlib.clone(),
            framing: extent.framing.unwrap_or(crate::grain::Framing::Marker),
            sector,
            disk_sector: sector.saturating_add(div(self.extent_start, SECTOR)?),
        };
        let encoded = Encoded {
            storage: extent.file,
            offset: place,
            len: narrow(sub(stored_end, place)?)?,
            block_len: narrow(extent.grain)?,
            skip: narrow(skip)?,
            codec: Arc::new(codec),
        };
        Ok(Lookup::Found { len, extent: Extent::Encoded(encoded) })
    }
}
