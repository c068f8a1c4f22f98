//! What L1 and L2 entries may say (sheet section 2), judged one by one for `check`: what an entry refers to, what is
//! wrong with it, and what it would say if that were mended.

use crate::entry::{ALL_ALLOCATED as LOW, COMPRESSED, COPIED, L1_RESERVED, L2_RESERVED, OFFSET_MASK, ZERO};
use crate::header::Header;
use std::ops::Range;
use vellum_core::Code;

/// A thing that is wrong with an entry.
pub(crate) struct Fault {
    bit: u16,
    pub code: Code,
    pub what: &'static str,
    /// Mending gives guest data up, or chooses between two readings of it.
    pub is_lossy: bool,
}

/// Several of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Faults(u16);

const RESERVED: u16 = 1 << 0;
const MISALIGNED: u16 = 1 << 1;
const PAST_END: u16 = 1 << 2;
const COMPRESSED_COPIED: u16 = 1 << 3;
const COMPRESSED_ELSEWHERE: u16 = 1 << 4;
const COMPRESSED_BITMAP: u16 = 1 << 5;
const BOTH_KINDS: u16 = 1 << 6;
const ZERO_BIT: u16 = 1 << 7;
const NO_PLACE: u16 = 1 << 8;
const OTHER_PLACE: u16 = 1 << 9;
const IN_HEADER: u16 = 1 << 10;
const UNUSED_MISALIGNED: u16 = 1 << 11;
const UNUSED_PAST_END: u16 = 1 << 12;

const FAULTS: &[Fault] = &[
    Fault { bit: RESERVED, code: Code::Corrupt, what: "reserved bits are set", is_lossy: false },
    Fault {
        bit: MISALIGNED,
        code: Code::Misaligned,
        what: "the offset is not aligned to clusters",
        is_lossy: true,
    },
    Fault {
        bit: PAST_END,
        code: Code::OutOfFile,
        what: "the offset points past the end of the file",
        is_lossy: true,
    },
    Fault {
        bit: COMPRESSED_COPIED,
        code: Code::Corrupt,
        what: "a compressed cluster has the COPIED flag",
        is_lossy: false,
    },
    Fault {
        bit: COMPRESSED_ELSEWHERE,
        code: Code::Corrupt,
        what: "a compressed cluster in an image with a data file",
        is_lossy: true,
    },
    Fault {
        bit: COMPRESSED_BITMAP,
        code: Code::Corrupt,
        what: "a compressed cluster has a bitmap of subclusters",
        is_lossy: false,
    },
    Fault {
        bit: BOTH_KINDS,
        code: Code::Corrupt,
        what: "a subcluster is both allocated and zero",
        is_lossy: true,
    },
    Fault {
        bit: ZERO_BIT,
        code: Code::Corrupt,
        what: "the zero bit is set where it means nothing (version 2, or subclusters)",
        is_lossy: true,
    },
    Fault {
        bit: NO_PLACE,
        code: Code::Corrupt,
        what: "subclusters are allocated without a cluster",
        is_lossy: true,
    },
    Fault {
        bit: OTHER_PLACE,
        code: Code::Corrupt,
        what: "a cluster of the data file does not stand at its guest offset",
        is_lossy: true,
    },
    Fault {
        bit: IN_HEADER,
        code: Code::Overlap,
        what: "the offset points into the header, the L1 table or the refcount table",
        is_lossy: true,
    },
    Fault {
        bit: UNUSED_MISALIGNED,
        code: Code::Misaligned,
        what: "the offset kept for a zero cluster is not aligned",
        is_lossy: false,
    },
    Fault {
        bit: UNUSED_PAST_END,
        code: Code::OutOfFile,
        what: "the offset kept for a zero cluster points past the end of the file",
        is_lossy: false,
    },
];
/// What `qemu-img check` sees in the counts of the clusters, not in the entry.
const SEEN_ELSEWHERE: u16 = IN_HEADER;

impl Faults {
    /// Those that count as errors of their own.
    pub fn errors(self) -> impl Iterator<Item = &'static Fault> {
        FAULTS.iter().filter(move |fault| self.0 & fault.bit & !SEEN_ELSEWHERE != 0)
    }
    /// All of them.
    pub fn all(self) -> impl Iterator<Item = &'static Fault> {
        FAULTS.iter().filter(move |fault| self.0 & fault.bit != 0)
    }
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
    /// Whether mending any of them gives data up.
    pub fn is_lossy(self) -> bool {
        self.all().any(|fault| fault.is_lossy)
    }
    fn has(self, bits: u16) -> bool {
        self.0 & bits != 0
    }
    fn set(&mut self, bit: u16, wrong: bool) {
        if wrong {
            self.0 |= bit;
        }
    }
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// No place in the file.
    Nowhere,
    /// A cluster, for data or kept for later.
    Cluster,
    /// Compressed data.
    Compressed,
}

/// An entry, judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Judged {
    pub kind: Kind,
    /// Bytes of the image file that it refers to: offset and length. What reaches too far past the end counts not.
    pub refers: Option<(u64, u64)>,
    pub faults: Faults,
}

impl Judged {
    /// Whether it counts as a place of guest data.
    pub fn is_allocated(&self) -> bool {
        self.kind != Kind::Nowhere && !self.faults.has(COMPRESSED_ELSEWHERE | COMPRESSED_BITMAP)
    }
}

/// An L2 entry with its bitmap of subclusters (0 without).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub word: u64,
    pub bitmap: u64,
}

/// What entries are judged by.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub cluster: u64,
    pub cluster_bits: u32,
    pub file_len: u64,
    pub extended: bool,
    pub data_file: bool,
    pub version: u32,
    /// Header, L1 table, refcount table.
    pub fixed: [Range<u64>; 3],
}

impl Shape {
    pub fn new(header: &Header, file_len: u64) -> Self {
        let cluster = header.cluster();
        let l1 = header.l1_table_offset;
        let table = header.refcount_table_offset;
        let table_len = u64::from(header.refcount_table_clusters).saturating_mul(cluster);
        Shape {
            cluster,
            cluster_bits: header.cluster_bits,
            file_len,
            extended: header.extended_l2(),
            data_file: header.has_data_file(),
            version: header.version,
            fixed: [
                0..cluster,
                l1..l1.saturating_add(u64::from(header.l1_size).saturating_mul(8)),
                table..table.saturating_add(table_len),
            ],
        }
    }

    /// Bytes of an L2 entry.
    pub fn entry_len(&self) -> usize {
        if self.extended { 16 } else { 8 }
    }

    /// Number of the cluster at byte `offset`.
    pub fn number(&self, offset: u64) -> u64 {
        offset.checked_shr(self.cluster_bits).unwrap_or(0)
    }

    fn is_aligned(&self, offset: u64) -> bool {
        offset & self.cluster.wrapping_sub(1) == 0
    }

    fn in_fixed(&self, offset: u64) -> bool {
        let end = offset.saturating_add(self.cluster);
        self.fixed.iter().any(|area| !area.is_empty() && offset < area.end && area.start < end)
    }

    /// A region of the file, unless it reaches past the end by a cluster or more: the file may end in a cluster.
    pub fn region(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let end = offset.checked_add(len)?;
        (end.saturating_sub(self.file_len) < self.cluster).then_some((offset, len))
    }

    /// Judges an L1 entry that is not 0.
    pub fn judge_l1(&self, word: u64) -> Judged {
        let offset = word & OFFSET_MASK;
        let mut faults = Faults::default();
        faults.set(RESERVED, word & L1_RESERVED != 0);
        faults.set(MISALIGNED, !self.is_aligned(offset));
        faults.set(IN_HEADER, self.in_fixed(offset));
        let refers = self.region(offset, self.cluster);
        faults.set(PAST_END, refers.is_none());
        Judged { kind: Kind::Cluster, refers, faults }
    }

    /// What an L1 entry would say if it were mended: nothing, where it names no place.
    pub fn mend_l1(&self, word: u64, faults: Faults) -> u64 {
        if faults.has(MISALIGNED | PAST_END | IN_HEADER) { 0 } else { word & !L1_RESERVED }
    }

    /// Judges an L2 entry. `guest` is the offset of its cluster on the disk, if there is only one.
    pub fn judge(&self, entry: Entry, guest: Option<u64>) -> Judged {
        let (word, bitmap) = (entry.word, entry.bitmap);
        let mut faults = Faults::default();
        let nowhere = |faults| Judged { kind: Kind::Nowhere, refers: None, faults };
        if word & COMPRESSED != 0 {
            return self.judge_compressed(entry);
        }
        faults.set(RESERVED, word & L2_RESERVED != 0);
        let zero_bit = word & ZERO != 0;
        faults.set(ZERO_BIT, zero_bit && (self.extended || self.version < 3));
        let is_zero = zero_bit && !self.extended;
        let offset = word & OFFSET_MASK;
        let (allocated, zero) = (bitmap & LOW, bitmap >> 32);
        if offset == 0 && (is_zero || !self.data_file || word & COPIED == 0) {
            faults.set(NO_PLACE, allocated != 0);
            return nowhere(faults);
        }
        let kind = Kind::Cluster;
        faults.set(BOTH_KINDS, allocated & zero != 0);
        let unused = if self.extended { allocated == 0 } else { is_zero };
        faults.set(if unused { UNUSED_MISALIGNED } else { MISALIGNED }, !self.is_aligned(offset));
        if self.data_file {
            faults.set(OTHER_PLACE, guest.is_some_and(|guest| guest != offset) && !unused);
            return Judged { kind, refers: None, faults };
        }
        faults.set(IN_HEADER, self.in_fixed(offset));
        let refers = self.region(offset, self.cluster);
        faults.set(if unused { UNUSED_PAST_END } else { PAST_END }, refers.is_none());
        Judged { kind, refers, faults }
    }

    fn judge_compressed(&self, entry: Entry) -> Judged {
        let mut faults = Faults::default();
        faults.set(COMPRESSED_COPIED, entry.word & COPIED != 0);
        faults.set(COMPRESSED_ELSEWHERE, self.data_file);
        faults.set(COMPRESSED_BITMAP, entry.bitmap != 0);
        if self.data_file || entry.bitmap != 0 {
            return Judged { kind: Kind::Compressed, refers: None, faults };
        }
        let (offset, len) = self.compressed(entry.word);
        let refers = self.region(offset, len);
        faults.set(PAST_END, refers.is_none());
        // Reading refuses what reaches past the last sector.
        faults.set(IN_HEADER, offset < self.cluster);
        Judged { kind: Kind::Compressed, refers, faults }
    }

    /// Offset and length of the data of a compressed cluster.
    pub fn compressed(&self, word: u64) -> (u64, u64) {
        let x = 70u32.saturating_sub(self.cluster_bits);
        let body = word & !(COPIED | COMPRESSED);
        let offset = body & 1u64.checked_shl(x).unwrap_or(0).wrapping_sub(1);
        let sectors = body.checked_shr(x).unwrap_or(0).saturating_add(1);
        (offset, sectors.saturating_mul(512).saturating_sub(offset % 512))
    }

    /// What a faulty L2 entry would say if it were mended. COPIED is left to whoever knows the counts.
    pub fn mend(&self, entry: Entry, faults: Faults, guest: Option<u64>) -> Entry {
        let Entry { word, bitmap } = entry;
        let (allocated, zero) = (bitmap & LOW, bitmap >> 32);
        if faults.has(COMPRESSED_ELSEWHERE) || word & COMPRESSED != 0 && faults.has(PAST_END | IN_HEADER) {
            return self.zeroed(LOW);
        }
        if word & COMPRESSED != 0 {
            let mended = Entry { word: word & !COPIED, bitmap: 0 };
            // Without its bitmap it may turn out to point nowhere.
            let (offset, len) = self.compressed(word);
            let is_lost = self.region(offset, len).is_none() || offset < self.cluster;
            return if is_lost { self.zeroed(LOW) } else { mended };
        }
        if faults.has(MISALIGNED | PAST_END | IN_HEADER | NO_PLACE) {
            return self.zeroed(allocated | zero);
        }
        if faults.has(UNUSED_MISALIGNED | UNUSED_PAST_END) {
            return self.zeroed(zero);
        }
        let mut word = word & !L2_RESERVED;
        if faults.has(ZERO_BIT) {
            word &= !ZERO;
        }
        if let (true, Some(guest)) = (faults.has(OTHER_PLACE), guest) {
            word = guest | COPIED;
        }
        // Data wins over zeros: it can still be looked at.
        let bitmap = if faults.has(BOTH_KINDS) { bitmap & !((allocated & zero) << 32) } else { bitmap };
        let mended = Entry { word, bitmap };
        // What was hidden behind the first fault.
        let rest = self.judge(mended, guest).faults;
        if rest.is_empty() { mended } else { self.zeroed(allocated | zero) }
    }

    /// An entry without a place, whose subclusters of `mask` read as zeros; without subclusters all of it.
    fn zeroed(&self, mask: u64) -> Entry {
        match (self.extended, self.version) {
            (true, _) => Entry { word: 0, bitmap: (mask & LOW) << 32 },
            (false, 2) => Entry { word: 0, bitmap: 0 },
            (false, _) => Entry { word: ZERO, bitmap: 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        Shape {
            cluster: 0x10000,
            cluster_bits: 16,
            file_len: 0x60000,
            extended: false,
            data_file: false,
            version: 3,
            fixed: [0..0x10000, 0x30000..0x30008, 0x10000..0x20000],
        }
    }

    fn mended(shape: &Shape, word: u64, bitmap: u64) -> (u64, u64) {
        let entry = Entry { word, bitmap };
        let judged = shape.judge(entry, None);
        assert!(!judged.faults.is_empty(), "{word:#x} has no fault");
        let mended = shape.mend(entry, judged.faults, None);
        assert!(shape.judge(mended, None).faults.is_empty(), "{word:#x} -> {mended:x?}");
        (mended.word, mended.bitmap)
    }

    #[test]
    fn entries_of_the_worked_example_are_faultless() {
        let shape = shape();
        for word in [0, 1, COPIED | 0x50000, COPIED | 0x50001, 0x5400_0000_0005_0000] {
            let judged = shape.judge(Entry { word, bitmap: 0 }, None);
            assert!(judged.faults.is_empty(), "{word:#x}: {judged:?}");
        }
        assert_eq!(shape.compressed(0x5400_0000_0005_0000), (0x50000, 41472));
        assert_eq!(shape.compressed(0x4000_0000_0005_a0c6), (0x5a0c6, 314));
    }

    #[test]
    fn faulty_entries_are_mended_without_new_faults() {
        let shape = shape();
        assert_eq!(mended(&shape, COPIED | 0x50002, 0), (COPIED | 0x50000, 0));
        assert_eq!(mended(&shape, COPIED | 0x50200, 0), (ZERO, 0));
        assert_eq!(mended(&shape, COPIED | 0x70000, 0), (ZERO, 0));
        assert_eq!(mended(&shape, COPIED | 0x10000, 0), (ZERO, 0));
        assert_eq!(mended(&shape, 0xd400_0000_0005_0000, 0), (0x5400_0000_0005_0000, 0));
        assert_eq!(mended(&shape, 0x5400_0000_0009_0000, 0), (ZERO, 0));
        let v2 = Shape { version: 2, ..shape.clone() };
        assert_eq!(mended(&v2, COPIED | 0x50001, 0), (COPIED | 0x50000, 0));
        assert_eq!(mended(&v2, COPIED | 0x70000, 0), (0, 0));
        let extended = Shape { extended: true, ..shape };
        assert_eq!(mended(&extended, COPIED | 0x50000, 3 << 32 | 2), (COPIED | 0x50000, 1 << 32 | 2));
        assert_eq!(mended(&extended, COPIED | 0x90000, 1 << 32 | 2), (0, 3 << 32));
        assert_eq!(mended(&extended, 0, 1 << 32 | 2), (0, 3 << 32));
    }

    #[test]
    fn l1_entries() {
        let shape = shape();
        assert!(shape.judge_l1(COPIED | 0x40000).faults.is_empty());
        for (word, mended) in [(COPIED, 0), (0x40001, 0x40000), (COPIED | 0x40200, 0), (0x80000, 0)] {
            let faults = shape.judge_l1(word).faults;
            assert_eq!(shape.mend_l1(word, faults), mended, "{word:#x}");
        }
    }
}
