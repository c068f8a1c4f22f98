//! What moves while an image is open: where its tables stand, and how long its files are.

use crate::header::Header;
use parking_lot::RwLock;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Tables and lengths of an open image. Read on every lookup, so without locks where that counts.
///
/// Offset and length of a table are changed one after the other: who looks meanwhile may see the old table with the
/// new length. That only matters to overlap checks, which then look at a little more or less than they should.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    /// The active L1 table.
    pub l1_offset: AtomicU64,
    /// Its entries.
    pub l1_entries: AtomicU64,
    /// The refcount table.
    pub refcount_table: AtomicU64,
    /// Its length in bytes.
    pub refcount_table_bytes: AtomicU64,
    /// Header fields that writing changes.
    pub incompatible: AtomicU64,
    pub autoclear: AtomicU64,
    /// Bytes of the image file, as far as anything refers to them. Only grows.
    pub file_len: AtomicU64,
    /// Bytes of the data file; `u64::MAX` if it was not opened.
    pub data_len: AtomicU64,
    protected: RwLock<Protected>,
}

/// Other metadata, known from the first write on.
#[derive(Debug, Default)]
struct Protected {
    /// Offsets of the refcount blocks, sorted.
    refcount_blocks: Vec<u64>,
    /// Snapshot table, L1 tables of snapshots, bitmap directory; sorted and apart.
    areas: Vec<(Range<u64>, &'static str)>,
}

impl Layout {
    pub fn new(header: &Header, file_len: u64, data_len: Option<u64>) -> Self {
        Layout {
            l1_offset: header.l1_table_offset.into(),
            l1_entries: u64::from(header.l1_size).into(),
            refcount_table: header.refcount_table_offset.into(),
            refcount_table_bytes: u64::from(header.refcount_table_clusters)
                .saturating_mul(header.cluster())
                .into(),
            incompatible: header.incompatible.into(),
            autoclear: header.autoclear.into(),
            file_len: file_len.into(),
            data_len: data_len.unwrap_or(u64::MAX).into(),
            ..Layout::default()
        }
    }

    /// Takes over what a repair wrote into the header, and the length that it gave the file.
    pub fn adopt(&self, header: &Header, file_len: u64) {
        let new = Layout::new(header, file_len, None);
        let pairs = [
            (&self.l1_offset, &new.l1_offset),
            (&self.l1_entries, &new.l1_entries),
            (&self.refcount_table, &new.refcount_table),
            (&self.refcount_table_bytes, &new.refcount_table_bytes),
            (&self.incompatible, &new.incompatible),
            (&self.autoclear, &new.autoclear),
            (&self.file_len, &new.file_len),
        ];
        for (field, value) in pairs {
            field.store(value.load(Ordering::Acquire), Ordering::Release);
        }
    }

    /// Where the active L1 table stands, and its length in bytes.
    pub fn l1(&self) -> (u64, u64) {
        let entries = self.l1_entries.load(Ordering::Acquire);
        (self.l1_offset.load(Ordering::Acquire), entries.saturating_mul(8))
    }

    /// Bytes of the image file.
    pub fn file_len(&self) -> u64 {
        self.file_len.load(Ordering::Acquire)
    }

    /// The image file reaches at least to `end` now.
    pub fn reaches(&self, end: u64) {
        self.file_len.fetch_max(end, Ordering::AcqRel);
    }

    /// What the header names that lies in `range`: always checked, also for reading.
    pub fn header_table(&self, range: &Range<u64>, cluster: u64) -> Option<&'static str> {
        let (l1, l1_len) = self.l1();
        let table = self.refcount_table.load(Ordering::Acquire);
        let table_len = self.refcount_table_bytes.load(Ordering::Acquire);
        let tables = [
            ("the header", 0, cluster),
            ("the L1 table", l1, l1_len),
            ("the refcount table", table, table_len),
        ];
        let hit = tables.iter().find(|(_, start, len)| {
            *len > 0 && range.start < start.saturating_add(*len) && *start < range.end
        });
        hit.map(|(what, ..)| *what)
    }

    /// What must not be written as guest data in the cluster at `offset`.
    pub fn metadata(&self, offset: u64, cluster: u64) -> Option<&'static str> {
        let range = offset..offset.saturating_add(cluster);
        if let Some(what) = self.header_table(&range, cluster) {
            return Some(what);
        }
        let protected = self.protected.read();
        if protected.refcount_blocks.binary_search(&offset).is_ok() {
            return Some("a refcount block");
        }
        let after = protected.areas.partition_point(|(start, _)| start.start < range.end);
        // Sorted and apart: only the last one that starts before the end can reach in.
        let last = after.checked_sub(1).and_then(|index| protected.areas.get(index));
        last.filter(|(area, _)| area.end > range.start).map(|(_, what)| *what)
    }

    /// Notes refcount blocks.
    pub fn add_blocks(&self, offsets: impl Iterator<Item = u64>) {
        let blocks = &mut self.protected.write().refcount_blocks;
        blocks.extend(offsets);
        blocks.sort_unstable();
        blocks.dedup();
    }

    /// Replaces the list of other metadata.
    pub fn protect(&self, mut areas: Vec<(Range<u64>, &'static str)>) {
        areas.retain(|(area, _)| !area.is_empty());
        areas.sort_unstable_by_key(|(area, _)| area.start);
        let mut apart: Vec<(Range<u64>, &'static str)> = Vec::with_capacity(areas.len());
        for (area, what) in areas {
            match apart.last_mut() {
                Some((last, _)) if last.end >= area.start => last.end = last.end.max(area.end),
                _ => apart.push((area, what)),
            }
        }
        self.protected.write().areas = apart;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_known_by_name() {
        let layout = Layout::default();
        layout.l1_offset.store(0x30000, Ordering::Release);
        layout.l1_entries.store(1, Ordering::Release);
        layout.add_blocks([0x20000].into_iter());
        layout.protect(vec![(0x80000..0x90000, "b"), (0x50000..0x50010, "a"), (0x88000..0xa0000, "c")]);
        let at = |offset| layout.metadata(offset, 0x10000);
        assert_eq!(at(0), Some("the header"));
        assert_eq!(at(0x30000), Some("the L1 table"));
        assert_eq!(at(0x20000), Some("a refcount block"));
        assert_eq!((at(0x50000), at(0x60000), at(0x90000)), (Some("a"), None, Some("b")));
        assert_eq!((at(0x40000), at(0xa0000)), (None, None));
    }
}
