//! Where a check begins: everything that the header names, and all L2 tables that any L1 table names.
//!
//! An L2 table stands in the list once, however many L1 entries name it, with their number: a small file whose
//! millions of L1 entries all name the same table is walked as fast as any other.

use crate::entry::{COPIED, OFFSET_MASK};
use crate::extensions::Extensions;
use crate::header::{AUTOCLEAR_BITMAPS, Header};
use crate::judge::{Faults, Shape};
use crate::snapshot_table::{self, EXTRA_NEEDED, Table};
use crate::stored::{Source, too_much};
use std::collections::BTreeSet;
use vellum_core::{Buf, CheckReport, Code, Limits, Result, Severity, bytes};

/// Most L2 tables, entries of all L1 tables together, misaligned L2 tables, entries of bitmap tables.
const L2_TABLES_MAX: usize = 8 << 20;
const L1_ENTRIES_MAX: u64 = 1 << 28;
const MISALIGNED_MAX: usize = 1024;
const BITMAP_ENTRIES_MAX: u64 = 16 << 20;
const BITMAPS_MAX: u32 = 65_535;
const BITMAP_DIRECTORY_MAX: u64 = 64 << 20;
/// Bytes of a table that are read at a time.
pub(crate) const STEP: u64 = 1 << 20;
/// Bits of a bitmap table entry that must be 0.
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;

/// An L2 table and who names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct L2 {
    pub offset: u64,
    /// L1 entries that name it, in all L1 tables.
    pub named: u32,
    /// Entries of the active L1 table that name it with COPIED, and without.
    pub copied: u32,
    pub plain: u32,
    /// The first entry of the active L1 table that names it.
    pub first: u32,
}

impl L2 {
    /// Entries of the active L1 table that name it.
    pub fn active(&self) -> u32 {
        self.copied.saturating_add(self.plain)
    }
}

/// A table of a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BitmapTable {
    pub offset: u64,
    pub entries: u32,
    pub named: u32,
}

/// Everything that a check begins with.
#[derive(Default)]
pub(crate) struct Roots {
    /// Metadata with a place of its own: offset, length, how often named.
    pub regions: Vec<(u64, u64, u32)>,
    /// The active L1 table.
    pub active: Vec<u64>,
    /// Active L1 entries that were mended in memory: index, is data given up.
    pub mended: Vec<(u32, bool)>,
    /// All L2 tables, in order of offset.
    pub l2: Vec<L2>,
    pub bitmaps: Vec<BitmapTable>,
    /// The bitmaps cannot be read: what they use is not known.
    pub bitmaps_broken: bool,
    /// Faults that no plan mends.
    pub unmended: u64,
}

/// How entries are taken.
#[derive(Clone, Copy)]
pub(crate) enum Mode<'a> {
    /// As they stand, and as `qemu-img check` counts them.
    Stands,
    /// Active ones as they would be once mended; the L2 tables of the set are given up.
    Mended(&'a BTreeSet<u64>),
}

/// What the roots are gathered from.
pub(crate) struct Gather<'a> {
    pub source: &'a Source<'a>,
    pub header: &'a Header,
    pub extensions: &'a Extensions,
    pub shape: &'a Shape,
    pub limits: &'a Limits,
}

impl Gather<'_> {
    /// Gathers everything; faults go into `report`.
    pub async fn roots(&self, mode: Mode<'_>, report: &mut CheckReport) -> Result<Roots> {
        let mut roots = Roots::default();
        roots.regions.push((0, self.header.cluster(), 1));
        let mut tables = L2List::default();
        self.active(mode, &mut roots, &mut tables, report).await?;
        let snapshots = snapshot_table::read(self.source, self.header, self.limits).await?;
        self.snapshots(&snapshots, &mut roots, &mut tables, report).await?;
        roots.l2 = tables.finish(self.shape)?;
        self.bitmaps(&mut roots, report).await?;
        Ok(roots)
    }

    async fn active(
        &self,
        mode: Mode<'_>,
        roots: &mut Roots,
        tables: &mut L2List,
        report: &mut CheckReport,
    ) -> Result<()> {
        let h = self.header;
        let len = bytes::mul(h.l1_size.into(), 8)?;
        let raw = self.source.read(h.l1_table_offset, len).await?;
        roots.active = raw.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect();
        roots.regions.push((h.l1_table_offset, len, 1));
        for (index, word) in roots.active.iter_mut().enumerate() {
            if *word == 0 {
                continue;
            }
            let first = bytes::narrow(bytes::wide(index))?;
            let at = h.l1_table_offset.saturating_add(u64::from(first).saturating_mul(8));
            let faults = self.shape.judge_l1(*word).faults;
            note_l1(report, faults, *word, at);
            if let Mode::Mended(given_up) = mode {
                let banned = given_up.contains(&(*word & OFFSET_MASK));
                if !faults.is_empty() || banned {
                    *word = if banned { 0 } else { self.shape.mend_l1(*word, faults) };
                    roots.mended.push((first, banned || faults.is_lossy()));
                }
            }
            if *word != 0 {
                let copied = *word & COPIED != 0;
                let offset = *word & OFFSET_MASK;
                let (copied, plain) = (u32::from(copied), u32::from(!copied));
                tables.push(L2 { offset, named: 1, copied, plain, first })?;
            }
        }
        Ok(())
    }

    async fn snapshots(
        &self,
        table: &Table,
        roots: &mut Roots,
        tables: &mut L2List,
        report: &mut CheckReport,
    ) -> Result<()> {
        let h = self.header;
        roots.regions.push((h.snapshots_offset, table.len, 1));
        let mut l1s: Vec<(u64, u32)> = Vec::new();
        for (index, entry) in table.entries.iter().enumerate() {
            let at = Some(h.snapshots_offset);
            let mut wrong = |code, what: &str| {
                report.find(Severity::Error, code, format!("snapshot {index}: {what}"), at);
                roots.unmended = roots.unmended.saturating_add(1);
            };
            if h.version >= 3 && entry.extra.len() < EXTRA_NEEDED {
                wrong(Code::Corrupt, "the entry lacks the extra data that version 3 must have");
            }
            if h.has_data_file() {
                wrong(Code::Corrupt, "an image with a data file cannot have internal snapshots");
            }
            if bytes::rem(entry.l1_table_offset, h.cluster())? != 0 {
                wrong(Code::Misaligned, "its L1 table is not aligned to clusters");
            } else if u64::from(entry.l1_size).saturating_mul(8) > self.limits.table_bytes {
                wrong(Code::TableLimit, "its L1 table is larger than the limit");
            } else if entry.l1_size > 0 {
                l1s.push((entry.l1_table_offset, entry.l1_size));
            }
        }
        let all = l1s.iter().fold(0u64, |sum, (_, entries)| sum.saturating_add((*entries).into()));
        l1s.sort_unstable();
        let distinct = l1s.chunk_by(|a, b| a == b).filter_map(|same| Some((*same.first()?, same.len())));
        let work = distinct.clone().fold(0u64, |sum, ((_, entries), _)| sum.saturating_add(entries.into()));
        if work > L1_ENTRIES_MAX {
            let what = "the L1 tables of the snapshots are too large to check";
            return Err(too_much(what, "snapshot l1_size", all, format!("{L1_ENTRIES_MAX} entries in all")));
        }
        for ((offset, entries), named) in distinct {
            let named = bytes::narrow(bytes::wide(named))?;
            roots.regions.push((offset, bytes::mul(entries.into(), 8)?, named));
            self.inactive(offset, entries, named, roots, tables, report).await?;
        }
        Ok(())
    }

    /// The L1 table of one snapshot, or of several that share it.
    async fn inactive(
        &self,
        offset: u64,
        entries: u32,
        named: u32,
        roots: &mut Roots,
        tables: &mut L2List,
        report: &mut CheckReport,
    ) -> Result<()> {
        let len = bytes::mul(entries.into(), 8)?;
        let mut done = 0u64;
        while done < len {
            let part: Buf =
                self.source.read(bytes::add(offset, done)?, STEP.min(bytes::sub(len, done)?)).await?;
            for (index, word) in part.as_chunks::<8>().0.iter().enumerate() {
                let word = u64::from_be_bytes(*word);
                if word == 0 {
                    continue;
                }
                let faults = self.shape.judge_l1(word).faults;
                if !faults.is_empty() {
                    let at = offset.saturating_add(done).saturating_add(bytes::wide(index).saturating_mul(8));
                    (0..named).take(1000).for_each(|_| note_l1(report, faults, word, at));
                    roots.unmended = roots.unmended.saturating_add(1);
                }
                tables.push(L2 { offset: word & OFFSET_MASK, named, ..L2::default() })?;
            }
            done = bytes::add(done, bytes::wide(part.len()))?;
        }
        Ok(())
    }

    async fn bitmaps(&self, roots: &mut Roots, report: &mut CheckReport) -> Result<()> {
        // A program that did not keep the bitmaps leaves the bit clear: what they used is lost space.
        let Some(ext) = self.extensions.bitmaps.filter(|_| self.header.autoclear & AUTOCLEAR_BITMAPS != 0)
        else {
            return Ok(());
        };
        let (offset, len) = (ext.directory_offset, ext.directory_size);
        let in_file = offset.checked_add(len).is_some_and(|end| end <= self.source.len);
        let aligned = bytes::rem(offset, self.header.cluster())? == 0;
        let fits = ext.count <= BITMAPS_MAX && len <= BITMAP_DIRECTORY_MAX && len > 0;
        let mut tables = None;
        if in_file && aligned && fits {
            tables = directory(&self.source.read(offset, len).await?, ext.count);
        }
        let Some(mut tables) = tables else {
            let what = "the bitmap directory cannot be read";
            report.find(Severity::Error, Code::Corrupt, what, Some(offset));
            roots.bitmaps_broken = true;
            return Ok(());
        };
        roots.regions.push((offset, len, 1));
        tables.sort_unstable();
        for same in tables.chunk_by(|a, b| a == b) {
            if let Some(table) = same.first() {
                let named = bytes::narrow(bytes::wide(same.len()))?;
                roots.bitmaps.push(BitmapTable { named, ..*table });
                roots.regions.push((table.offset, bytes::mul(table.entries.into(), 8)?, named));
            }
        }
        let all = roots.bitmaps.iter().fold(0u64, |sum, table| sum.saturating_add(table.entries.into()));
        if all > BITMAP_ENTRIES_MAX {
            let what = "the bitmap tables are too large to check";
            return Err(too_much(
                what,
                "bitmap table_size",
                all,
                format!("{BITMAP_ENTRIES_MAX} entries in all"),
            ));
        }
        Ok(())
    }
}

/// The tables that a bitmap directory names; `None` if it contradicts itself.
fn directory(raw: &[u8], count: u32) -> Option<Vec<BitmapTable>> {
    let mut at = 0usize;
    let mut tables = Vec::new();
    for _ in 0..count {
        let fixed: [u8; 24] = bytes::array(raw, at)?;
        let name = usize::from(u16::from_be_bytes(bytes::array(&fixed, 18)?));
        let extra = usize::try_from(bytes::be32(&fixed, 5)?).ok()?;
        let len = extra.checked_add(name)?.checked_add(24)?.checked_next_multiple_of(8)?;
        let is_dirty_bitmap = fixed.get(16) == Some(&1);
        if name == 0 || name > 1023 || !is_dirty_bitmap || at.checked_add(len)? > raw.len() {
            return None;
        }
        let (offset, entries) = (bytes::be64(&fixed, 0)?, bytes::be32(&fixed, 2)?);
        tables.push(BitmapTable { offset, entries, named: 1 });
        at = at.checked_add(len)?;
    }
    Some(tables)
}

/// The cluster that an entry of a bitmap table names; `Err` if the entry means nothing.
pub(crate) fn bitmap_cluster(word: u64, cluster: u64) -> std::result::Result<Option<u64>, ()> {
    let offset = word & OFFSET_MASK;
    let aligned = bytes::rem(offset, cluster).is_ok_and(|rest| rest == 0);
    if word & BITMAP_RESERVED != 0 || !aligned || offset != 0 && word & 1 != 0 {
        return Err(());
    }
    Ok((offset != 0).then_some(offset))
}

fn note_l1(report: &mut CheckReport, faults: Faults, word: u64, at: u64) {
    for fault in faults.errors() {
        let message = format!("L1 entry {word:#018x}: {}", fault.what);
        report.find(Severity::Error, fault.code, message, Some(at));
    }
}

/// L2 tables as they are met, put together by offset.
#[derive(Default)]
struct L2List {
    sorted: Vec<L2>,
    pending: Vec<L2>,
}

impl L2List {
    fn push(&mut self, table: L2) -> Result<()> {
        self.pending.push(table);
        if self.pending.len() >= self.sorted.len().max(1 << 16) {
            self.compact()?;
        }
        Ok(())
    }

    fn compact(&mut self) -> Result<()> {
        self.sorted.append(&mut self.pending);
        self.sorted.sort_unstable_by_key(|table| table.offset);
        self.sorted.dedup_by(|next, kept| {
            if next.offset != kept.offset {
                return false;
            }
            kept.first = match (kept.active(), next.active()) {
                (0, _) => next.first,
                (_, 0) => kept.first,
                _ => kept.first.min(next.first),
            };
            kept.named = kept.named.saturating_add(next.named);
            kept.copied = kept.copied.saturating_add(next.copied);
            kept.plain = kept.plain.saturating_add(next.plain);
            true
        });
        if self.sorted.len() > L2_TABLES_MAX {
            let found = self.sorted.len();
            let what = "the image has too many L2 tables to check";
            return Err(too_much(what, "L1 table", found, format!("up to {L2_TABLES_MAX}")));
        }
        Ok(())
    }

    fn finish(mut self, shape: &Shape) -> Result<Vec<L2>> {
        self.compact()?;
        let misaligned = self.sorted.iter().filter(|table| table.offset & shape.cluster.wrapping_sub(1) != 0);
        let misaligned = misaligned.count();
        if misaligned > MISALIGNED_MAX {
            let what = "the L1 table names too many misaligned L2 tables to check";
            return Err(too_much(what, "L1 table", misaligned, format!("up to {MISALIGNED_MAX}")));
        }
        Ok(self.sorted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_named_often_stand_once_with_their_number() {
        let mut list = L2List::default();
        for index in 0..300_000u32 {
            let copied = u32::from(index % 2 == 0);
            let offset = 0x10000 * u64::from(index % 7);
            list.push(L2 { offset, named: 1, copied, plain: 1 - copied, first: index }).unwrap();
        }
        list.push(L2 { offset: 0x10000, named: 5, ..L2::default() }).unwrap();
        list.compact().unwrap();
        assert_eq!(list.sorted.len(), 7);
        let one = list.sorted[1];
        assert_eq!((one.offset, one.first, one.named - one.active()), (0x10000, 1, 5));
        assert_eq!(list.sorted.iter().map(|table| table.named).sum::<u32>(), 300_005);
    }

    #[test]
    fn bitmap_entries() {
        assert_eq!(bitmap_cluster(0, 0x10000), Ok(None));
        assert_eq!(bitmap_cluster(1, 0x10000), Ok(None));
        assert_eq!(bitmap_cluster(0x50000, 0x10000), Ok(Some(0x50000)));
        for bad in [0x50001, 0x50200, 2, 1 << 60] {
            assert_eq!(bitmap_cluster(bad, 0x10000), Err(()));
        }
    }
}
