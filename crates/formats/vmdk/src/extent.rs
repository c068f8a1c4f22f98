//! One sparse extent: where its tables are, and what an entry of them means.

use crate::disputes::Disputes;
use crate::grain::{Framing, stored_max};
use crate::header::{Cowd, ESX_GTES, Hosted, SECTOR, SESPARSE_GRAIN, SeSparse};
use crate::problem;
use crate::tables::{Held, Stop, Tables};
use crate::unwritten::Unwritten;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vellum_core::bytes::{add, div, div_ceil, mul, rem};
use vellum_core::{Code, Error, Events, Result};

/// A sparse extent. Offsets and lengths in bytes unless a name says sectors.
pub(crate) struct SparseExtent {
    /// Index into the image's storages.
    pub file: usize,
    pub name: String,
    /// Grows when the extent is written.
    file_len: AtomicU64,
    /// Bytes of the disk that the extent covers.
    pub capacity: u64,
    pub grain: u64,
    pub gtes: u64,
    pub gd: u64,
    pub rgd: Option<u64>,
    /// Nothing that a table points to lies before this.
    pub data_start: u64,
    pub kind: Kind,
    pub framing: Option<Framing>,
    /// Version of the header of a hosted extent.
    pub version: u32,
    /// The mark of an extent that is being written, or was not closed.
    pub is_unclean: bool,
    /// Both directories stand where the header says.
    pub has_sound_directories: bool,
    /// Where tables stand among the grains (few writers do that), sorted: no grain may lie there. Known only to those
    /// who write.
    pub reserved: Vec<Range<u64>>,
    /// What is known of grain tables that differ from their redundant copies.
    pub disputes: Disputes,
    /// Where tables were never written. Stays empty in an image that is written.
    pub unwritten: Unwritten,
    /// The warning about the use of a redundant table was given.
    warned_redundant: AtomicBool,
    /// The warning about a short grain was given.
    warned_short: AtomicBool,
}

/// What the entries of the tables mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// KDMV; with or without zeroed grains.
    Hosted { zeroed: bool },
    /// ESX sparse.
    Cowd,
    /// seSparse: byte offset and number of its tables, byte offset of its grains.
    SeSparse { tables: u64, tables_count: u64, grains: u64 },
}

/// What a table says of a grain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grain {
    /// Not in this extent.
    Absent,
    /// Zeros.
    Zero,
    /// At this byte of the file.
    At(u64),
}

/// What a lookup found, and of how many grains from the one asked for it is known to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub grain: Grain,
    pub grains: u64,
}

/// A lookup in progress: the pages and the table in hand.
#[derive(Default)]
pub(crate) struct Cursor {
    directory: Held,
    redundant_directory: Held,
    table: Held,
    /// Number and byte offset of the grain table last used; `None` for a missing table.
    last: Option<(u64, Option<u64>)>,
}

impl SparseExtent {
    pub(crate) fn hosted(file: usize, name: &str, file_len: u64, h: &Hosted) -> Result<Self> {
        let framing = if h.markers { Framing::Marker } else { Framing::Bare };
        Ok(SparseExtent {
            file,
            name: name.to_owned(),
            file_len: AtomicU64::new(file_len),
            capacity: mul(h.capacity_sectors, SECTOR)?,
            grain: mul(h.grain_sectors, SECTOR)?,
            gtes: h.gtes,
            gd: h.gd,
            rgd: h.rgd.filter(|rgd| *rgd != h.gd),
            data_start: h.over_head.max(SECTOR),
            kind: Kind::Hosted { zeroed: h.zeroed },
            framing: h.compressed.then_some(framing),
            version: h.version,
            is_unclean: h.is_unclean,
            has_sound_directories: h.has_sound_directories,
            reserved: Vec::new(),
            disputes: Disputes::default(),
            unwritten: Unwritten::default(),
            warned_redundant: AtomicBool::new(false),
            warned_short: AtomicBool::new(false),
        })
    }

    pub(crate) fn cowd(file: usize, name: &str, file_len: u64, c: &Cowd) -> Result<Self> {
        Ok(SparseExtent {
            file,
            name: name.to_owned(),
            file_len: AtomicU64::new(file_len),
            capacity: mul(c.capacity_sectors, SECTOR)?,
            grain: mul(c.grain_sectors, SECTOR)?,
            gtes: ESX_GTES,
            gd: c.gd,
            rgd: None,
            data_start: c.over_head,
            kind: Kind::Cowd,
            framing: None,
            version: 1,
            is_unclean: false,
            has_sound_directories: true,
            reserved: Vec::new(),
            disputes: Disputes::default(),
            unwritten: Unwritten::default(),
            warned_redundant: AtomicBool::new(false),
            warned_short: AtomicBool::new(false),
        })
    }

    pub(crate) fn sesparse(file: usize, name: &str, file_len: u64, s: &SeSparse) -> Result<Self> {
        Ok(SparseExtent {
            file,
            name: name.to_owned(),
            file_len: AtomicU64::new(file_len),
            capacity: mul(s.capacity_sectors, SECTOR)?,
            grain: mul(SESPARSE_GRAIN, SECTOR)?,
            gtes: ESX_GTES,
            gd: s.gd,
            rgd: None,
            data_start: s.grains,
            kind: Kind::SeSparse { tables: s.tables, tables_count: s.tables_count, grains: s.grains },
            framing: None,
            version: 1,
            is_unclean: false,
            has_sound_directories: true,
            reserved: Vec::new(),
            disputes: Disputes::default(),
            unwritten: Unwritten::default(),
            warned_redundant: AtomicBool::new(false),
            warned_short: AtomicBool::new(false),
        })
    }

    /// Bytes of a table entry.
    pub(crate) fn entry_bytes(&self) -> u64 {
        if matches!(self.kind, Kind::SeSparse { .. }) { 8 } else { 4 }
    }

    /// Bytes of a grain table.
    pub(crate) fn table_bytes(&self) -> Result<u64> {
        mul(self.gtes, self.entry_bytes())
    }

    /// Grain tables that the capacity needs.
    pub(crate) fn tables(&self) -> Result<u64> {
        div_ceil(self.capacity, mul(self.gtes, self.grain)?)
    }

    /// Length of the file, as far as entries may point into it.
    pub(crate) fn file_len(&self) -> u64 {
        self.file_len.load(Ordering::Acquire)
    }

    /// The file was made longer or shorter.
    pub(crate) fn set_file_len(&self, len: u64) {
        self.file_len.store(len, Ordering::Release);
    }

    /// Looks up grain number `number`.
    pub(crate) fn grain(
        &self,
        tables: &Tables,
        cursor: &mut Cursor,
        number: u64,
        events: &Events,
    ) -> Result<Found, Stop> {
        let (table, entry) = (div(number, self.gtes)?, rem(number, self.gtes)?);
        let base = match cursor.last {
            Some((last, base)) if last == table => base,
            _ => {
                let base = match self.disputes.found(table) {
                    Some(base) => Some(base),
                    None => self.find_table(tables, cursor, table, events)?,
                };
                cursor.last = Some((table, base));
                base
            }
        };
        let Some(base) = base else {
            return Ok(Found { grain: Grain::Absent, grains: self.gtes.saturating_sub(entry) });
        };
        let at = add(base, mul(entry, self.entry_bytes())?)?;
        let value =
            tables.entry(&mut cursor.table, self.file, at, self.entry_bytes()).map_err(named(self))?;
        let decided = self.disputes.decided(number);
        let value = decided.unwrap_or(value);
        let grain = match self.meaning(value) {
            Ok(grain) => grain,
            Err(why) => self.redundant(tables, table, entry, why.at(at), events)?,
        };
        let mut grains = 1;
        if value == 0 && !self.disputes.any_decided() {
            // Empty tables are the rule in large disks: step over their zeros as bytes, not as entries.
            let rest = mul(self.gtes.saturating_sub(entry), self.entry_bytes())?;
            grains = div(Tables::zeros(&cursor.table, at, rest)?, self.entry_bytes())?.max(1);
        }
        Ok(Found { grain, grains })
    }

    /// Finds a grain table that was compared with its copy, and remembers it.
    fn find_table(
        &self,
        tables: &Tables,
        cursor: &mut Cursor,
        table: u64,
        events: &Events,
    ) -> Result<Option<u64>, Stop> {
        let base = self.table(tables, cursor, table, events)?;
        if let Some(base) = base {
            if let Some(rgd) = self.rgd
                && !self.disputes.is_agreed(table)
            {
                if self.is_unwritten(tables, cursor, (base, rgd), table)? {
                    return Ok(None);
                }
                return Err(Stop::Compare(table));
            }
            if base > 0 && rem(base, SECTOR)? == 0 {
                self.disputes.remember(table, self.tables()?, base);
            }
        }
        Ok(base)
    }

    /// Whether table number `table` at `base`, and its copy, are known to hold nothing but zeros without being read.
    fn is_unwritten(
        &self,
        tables: &Tables,
        cursor: &mut Cursor,
        (base, rgd): (u64, u64),
        table: u64,
    ) -> Result<bool, Stop> {
        let bytes = self.table_bytes()?;
        if !self.unwritten.has_table(base, bytes) {
            return Ok(false);
        }
        let at = add(rgd, mul(table, self.entry_bytes())?)?;
        let held = &mut cursor.redundant_directory;
        let value = tables.entry(held, self.file, at, self.entry_bytes()).map_err(named(self))?;
        Ok(matches!(self.table_place(value), Ok(Some(copy)) if self.unwritten.has_copy(copy, bytes)))
    }

    /// The byte offset of grain table number `table`; `None` if there is none.
    fn table(
        &self,
        tables: &Tables,
        cursor: &mut Cursor,
        table: u64,
        events: &Events,
    ) -> Result<Option<u64>, Stop> {
        let at = add(self.gd, mul(table, self.entry_bytes())?)?;
        let value =
            tables.entry(&mut cursor.directory, self.file, at, self.entry_bytes()).map_err(named(self))?;
        match (self.table_place(value), self.rgd) {
            (Ok(place @ Some(_)), _) | (Ok(place), None) => Ok(place),
            (Ok(None), Some(rgd)) => {
                // Tables are made in pairs; a power loss may have kept one pointer of the two.
                let copy_at = add(rgd, mul(table, 4)?)?;
                let copy = tables.entry(&mut Held::default(), self.file, copy_at, 4).map_err(named(self))?;
                Ok(self.table_place(copy).ok().flatten())
            }
            (Err(why), None) => Err(Stop::Bad(why.at(at).image(&self.name))),
            (Err(why), Some(rgd)) => {
                let copy_at = add(rgd, mul(table, 4)?)?;
                let copy = tables.entry(&mut Held::default(), self.file, copy_at, 4).map_err(named(self))?;
                match self.table_place(copy) {
                    Ok(Some(place)) => {
                        self.warn_redundant(events, at);
                        Ok(Some(place))
                    }
                    _ => Err(Stop::Bad(why.at(at).image(&self.name))),
                }
            }
        }
    }

    /// What an entry of the grain directory means.
    pub(crate) fn table_place(&self, value: u64) -> Result<Option<u64>> {
        if value == 0 {
            return Ok(None);
        }
        let bytes = mul(self.gtes, self.entry_bytes())?;
        let place = match self.kind {
            Kind::SeSparse { tables, tables_count, .. } => {
                let number = value & 0xffff_ffff;
                if value >> 32 != 0x1000_0000 || number >= tables_count {
                    return Err(problem(Code::Range, "this is no grain table", "grain directory entry", 0)
                        .found(format!("{value:#x}"))
                        .allowed(format!("0x1000000000000000 + table 0 to {tables_count}"))
                        .hint("the extent is damaged; restore it from a backup"));
                }
                add(tables, mul(number, bytes)?)?
            }
            _ => mul(value, SECTOR)?,
        };
        if place.checked_add(bytes).is_none_or(|end| end > self.file_len()) {
            return Err(problem(
                Code::OutOfFile,
                "a grain table lies past the end of the file",
                "grain directory entry",
                0,
            )
            .found(format!("byte {place:#x}"))
            .allowed(format!("inside {:#x} bytes", self.file_len()))
            .hint("the file is truncated or damaged; copy it again from its source"));
        }
        Ok(Some(place))
    }

    /// What an entry of a grain table means.
    pub(crate) fn meaning(&self, value: u64) -> Result<Grain> {
        let place = match self.kind {
            Kind::SeSparse { grains, .. } => match sesparse_grain(value)? {
                SeGrain::Absent => return Ok(Grain::Absent),
                SeGrain::Zero => return Ok(Grain::Zero),
                SeGrain::Number(number) => add(grains, mul(number, self.grain)?)?,
            },
            _ if value == 0 => return Ok(Grain::Absent),
            Kind::Hosted { zeroed: true } if value == 1 => return Ok(Grain::Zero),
            _ => mul(value, SECTOR)?,
        };
        let (code, message) = if place >= self.file_len() {
            (Code::OutOfFile, "a grain lies past the end of the file")
        } else if place < self.data_start || self.is_reserved(place) {
            (Code::Overlap, "a grain lies inside the metadata")
        } else {
            return Ok(Grain::At(place));
        };
        Err(problem(code, message, "grain table entry", 0)
            .found(format!("byte {place:#x}"))
            .allowed(format!("{:#x} to {:#x}", self.data_start, self.file_len()))
            .hint(
                "the file is truncated or damaged; copy it again from its source or restore it from a backup",
            ))
    }

    /// Whether a grain at `place` would lie over a table.
    fn is_reserved(&self, place: u64) -> bool {
        let end = place.saturating_add(self.grain);
        let next = self.reserved.partition_point(|range| range.end <= place);
        self.reserved.get(next).is_some_and(|range| range.start < end)
    }

    /// The redundant copy of an entry whose primary is bad, if the copy is plausible; else the error.
    fn redundant(
        &self,
        tables: &Tables,
        table: u64,
        entry: u64,
        why: Error,
        events: &Events,
    ) -> Result<Grain, Stop> {
        let at = why.offset().unwrap_or(0);
        let why = why.image(&self.name);
        let Some(rgd) = self.rgd else { return Err(Stop::Bad(why)) };
        let mut held = Held::default();
        let mut read = |offset| tables.entry(&mut held, self.file, offset, 4);
        let place = match read(add(rgd, mul(table, 4)?)?) {
            Ok(value) => self.table_place(value),
            Err(Stop::Bad(_)) => return Err(Stop::Bad(why)),
            Err(stop) => return Err(stop),
        };
        let Ok(Some(place)) = place else { return Err(Stop::Bad(why)) };
        match read(add(place, mul(entry, 4)?)?) {
            Ok(value) => match self.meaning(value) {
                // A copy that says "nothing here" cannot vouch for an entry that said "here".
                Ok(Grain::Absent) | Err(_) => Err(Stop::Bad(why)),
                Ok(grain) => {
                    self.warn_redundant(events, at);
                    Ok(grain)
                }
            },
            Err(Stop::Bad(_)) => Err(Stop::Bad(why)),
            Err(stop) => Err(stop),
        }
    }

    fn warn_redundant(&self, events: &Events, at: u64) {
        if !self.warned_redundant.swap(true, Ordering::Relaxed) {
            events.warn(&format!(
                "{}: a table is damaged at byte {at:#x}; its redundant copy is used (this is reported once)",
                self.name
            ));
        }
    }

    /// Says once that the last grain of the file is not there whole.
    pub(crate) fn warn_short(&self, events: &Events, at: u64) {
        if !self.warned_short.swap(true, Ordering::Relaxed) {
            events.warn(&format!(
                "{}: the grain at byte {at:#x} is cut off by the end of the file; the rest of it reads as zeros",
                self.name
            ));
        }
    }

    /// Greatest bytes from a compressed grain's marker to its end.
    pub(crate) fn stored_max(&self) -> Result<u64> {
        stored_max(self.grain)
    }
}

/// Names the extent in an error.
fn named(extent: &SparseExtent) -> impl Fn(Stop) -> Stop + '_ {
    |stop| match stop {
        Stop::Bad(error) => Stop::Bad(error.image(&extent.name)),
        stop => stop,
    }
}

/// What an entry of a seSparse grain table means (sheet section 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SeGrain {
    Absent,
    Zero,
    Number(u64),
}

fn sesparse_grain(value: u64) -> Result<SeGrain> {
    match value >> 60 {
        0 if value == 0 => Ok(SeGrain::Absent),
        // Unmapped reads as zero in QEMU; other readers may fall through [the sheet has it unconfirmed].
        1 | 2 => Ok(SeGrain::Zero),
        3 => {
            let high = (value & 0x0fff_0000_0000_0000) >> 48;
            let low = (value & 0x0000_ffff_ffff_ffff) << 12;
            Ok(SeGrain::Number(high | low))
        }
        _ => Err(problem(Code::Range, "an entry that is not known", "grain table entry", 0)
            .found(format!("{value:#x}"))
            .allowed("types 0 to 3 in the top four bits")
            .hint("the extent is damaged; restore it from a backup")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An extent without tables: grains of 64 KiB from byte 65 536 on.
    pub(crate) fn plain(file_len: u64) -> SparseExtent {
        let hosted = Hosted {
            capacity_sectors: 2048,
            grain_sectors: 128,
            gtes: 512,
            gd: 1024,
            rgd: Some(512),
            over_head: 65_536,
            compressed: false,
            markers: false,
            zeroed: false,
            version: 1,
            is_unclean: false,
            has_sound_directories: true,
            warnings: Vec::new(),
        };
        SparseExtent::hosted(0, "plain", file_len, &hosted).unwrap()
    }

    #[test]
    fn sesparse_entries_of_the_sheet() {
        assert_eq!(sesparse_grain(0x3005_0000_0000_0000).unwrap(), SeGrain::Number(5));
        assert_eq!(sesparse_grain(0x3345_0000_0000_0012).unwrap(), SeGrain::Number(0x12345));
        assert_eq!(sesparse_grain(0).unwrap(), SeGrain::Absent);
        assert_eq!(sesparse_grain(0x1000_0000_0000_0000).unwrap(), SeGrain::Zero);
        assert_eq!(sesparse_grain(0x2000_0000_0000_0000).unwrap(), SeGrain::Zero);
        assert_eq!(sesparse_grain(1).unwrap_err().code(), Code::Range);
        assert_eq!(sesparse_grain(0x4000_0000_0000_0000).unwrap_err().code(), Code::Range);
    }
}
