//! Entries of L1 and L2 tables (sheet section 2): bits and what they say together.

use std::ops::Range;
use vellum_core::{Result, bytes};

/// The refcount of what the entry names is exactly 1.
pub(crate) const COPIED: u64 = 1 << 63;
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// Reads as zeros (version 3, without subclusters).
pub(crate) const ZERO: u64 = 1;
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
pub(crate) const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
pub(crate) const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
pub(crate) const SUBCLUSTERS: u32 = 32;
/// All 32 subclusters allocated, none zero.
pub(crate) const ALL_ALLOCATED: u64 = 0xffff_ffff;
/// All 32 subclusters read as zeros.
pub(crate) const ALL_ZERO: u64 = 0xffff_ffff_0000_0000;

/// Offset, and end of the last sector, of compressed data: `x = 62 - (cluster_bits - 8)` bits of offset, the rest
/// counts sectors after the first.
pub(crate) fn compressed_range(entry: u64, cluster_bits: u32) -> Result<Range<u64>> {
    let x = 70u32.saturating_sub(cluster_bits);
    let body = entry & !(COPIED | COMPRESSED);
    let offset = body & bytes::sub(1u64.checked_shl(x).unwrap_or(0), 1)?;
    let sectors = bytes::add(body.checked_shr(x).unwrap_or(0), 1)?;
    Ok(offset..bytes::add(offset & !511, bytes::mul(sectors, 512)?)?)
}

/// The bits `first..end` of a bitmap of subclusters.
pub(crate) fn subcluster_bits(range: Range<u64>) -> u64 {
    let below = |bit: u64| match u32::try_from(bit) {
        Ok(bit) if bit < 64 => 1u64.checked_shl(bit).unwrap_or(0).wrapping_sub(1),
        _ => u64::MAX,
    };
    below(range.end.min(SUBCLUSTERS.into())) & !below(range.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_entries_of_the_sheet() {
        assert_eq!(compressed_range(0x5400_0000_0005_0000, 16).unwrap(), 0x50000..0x50000 + 81 * 512);
        assert_eq!(compressed_range(0x4000_0000_0005_a0c6, 16).unwrap(), 0x5a0c6..0x5a200);
    }

    #[test]
    fn subclusters_are_bits() {
        assert_eq!(subcluster_bits(0..32), ALL_ALLOCATED);
        assert_eq!(subcluster_bits(1..3), 0b110);
        assert_eq!(subcluster_bits(31..32), 1 << 31);
        assert_eq!(subcluster_bits(5..5), 0);
    }
}
