//! Walking through all grain tables of an extent with their redundant copies, as they stand in the file. For check, for
//! deciding between tables that differ, and before freed grains are used again.

use crate::extent::SparseExtent;
use crate::header::SECTOR;
use std::collections::HashMap;
use vellum_core::bytes::{add, div, div_ceil, index, le32, le64, mul, rem, sub, wide};
use vellum_core::storage::read_vec;
use vellum_core::{Result, Storage};

/// Entries of a directory that are read at a time.
const STEP: u64 = 4096;
/// Tables that lie over each other could make a small file take for ever: bytes read beyond twice the file.
const EXTRA_BYTES: u64 = 16 << 20;

/// A grain table and its copy.
pub(crate) struct Pair {
    /// Number of the table: index into the directories.
    pub number: u64,
    pub primary: Side,
    /// `None` in an extent without redundant copies.
    pub copy: Option<Side>,
}

/// What a directory entry leads to.
pub(crate) enum Side {
    /// The entry is 0.
    Missing,
    /// The entry does not lead to a table inside the file.
    Bad,
    /// A table, its byte offset and its entries.
    Table(u64, Vec<u64>),
}

/// Shows every table that is there to `visit`. `false`: given up, because the tables lie over each other.
pub(crate) async fn walk(
    extent: &SparseExtent,
    storage: &dyn Storage,
    mut visit: impl FnMut(Pair) -> Result<()> + Send,
) -> Result<bool> {
    let tables = extent.tables()?;
    let mut budget = extent.file_len().saturating_mul(2).saturating_add(EXTRA_BYTES);
    let mut first = 0;
    while first < tables {
        let count = STEP.min(sub(tables, first)?);
        let primary = directory(extent, storage, extent.gd, first, count).await?;
        let copy = match extent.rgd {
            Some(rgd) => Some(directory(extent, storage, rgd, first, count).await?),
            None => None,
        };
        for (place, value) in primary.iter().enumerate() {
            let other = copy.as_ref().map(|copy| copy.get(place).copied().unwrap_or(0));
            if *value == 0 && other.is_none_or(|other| other == 0) {
                continue;
            }
            let cost = mul(extent.table_bytes()?, 2)?;
            let Some(left) = budget.checked_sub(cost) else { return Ok(false) };
            budget = left;
            let number = add(first, wide(place))?;
            let primary = side(extent, storage, *value).await?;
            let copy = match other {
                Some(other) => Some(side(extent, storage, other).await?),
                None => None,
            };
            visit(Pair { number, primary, copy })?;
        }
        first = add(first, count)?;
    }
    Ok(true)
}

/// `count` entries of the directory at byte `at`, from number `first` on.
pub(crate) async fn directory(
    extent: &SparseExtent,
    storage: &dyn Storage,
    at: u64,
    first: u64,
    count: u64,
) -> Result<Vec<u64>> {
    let size = extent.entry_bytes();
    let bytes = read_vec(storage, add(at, mul(first, size)?)?, index(mul(count, size)?)?).await?;
    Ok(entries(&bytes, size))
}

async fn side(extent: &SparseExtent, storage: &dyn Storage, value: u64) -> Result<Side> {
    match extent.table_place(value) {
        Ok(None) => Ok(Side::Missing),
        Err(_) => Ok(Side::Bad),
        Ok(Some(place)) => {
            let bytes = read_vec(storage, place, index(extent.table_bytes()?)?).await?;
            Ok(Side::Table(place, entries(&bytes, extent.entry_bytes())))
        }
    }
}

/// The little-endian entries of a table, 4 or 8 bytes each.
pub(crate) fn entries(bytes: &[u8], size: u64) -> Vec<u64> {
    if size == 8 {
        return (0..).map_while(|number| le64(bytes, number)).collect();
    }
    (0..).map_while(|number| le32(bytes, number)).map(u64::from).collect()
}

/// Which places of a file grains were seen at: a bit each, in units of a grain (or less, where grains do not begin at
/// multiples of their size).
pub(crate) struct Slots {
    base: u64,
    grain: u64,
    unit: u64,
    words: HashMap<u64, u64>,
}

impl Slots {
    pub(crate) fn new(extent: &SparseExtent) -> Self {
        let (base, grain) = (extent.data_start, extent.grain);
        let unit = 1u64.checked_shl(base.trailing_zeros()).unwrap_or(grain).clamp(SECTOR, grain.max(SECTOR));
        Slots { base, grain, unit, words: HashMap::new() }
    }

    /// Whether grains at `place` stand where others of the extent do: a multiple of their size from the first.
    pub(crate) fn is_aligned(&self, place: u64) -> bool {
        rem(place, self.grain).is_ok_and(|within| within == 0)
            || rem(place.saturating_sub(self.base), self.grain).is_ok_and(|within| within == 0)
    }

    fn numbers(&self, place: u64, len: u64) -> Result<std::ops::RangeInclusive<u64>> {
        let last = add(place, len.saturating_sub(1))?;
        Ok(div(place, self.unit)?..=div(last, self.unit)?)
    }

    /// Marks the slots of `len` bytes at `place`; whether one of them was marked before.
    pub(crate) fn mark(&mut self, place: u64, len: u64) -> Result<bool> {
        let mut was_marked = false;
        for slot in self.numbers(place, len)? {
            let word = self.words.entry(slot >> 6).or_default();
            let bit = bit(slot);
            was_marked |= *word & bit != 0;
            *word |= bit;
        }
        Ok(was_marked)
    }

    /// Whether a grain at `place` touches a slot that is marked.
    pub(crate) fn is_marked(&self, place: u64) -> Result<bool> {
        Ok(self
            .numbers(place, self.grain)?
            .any(|slot| self.words.get(&(slot >> 6)).is_some_and(|word| word & bit(slot) != 0)))
    }

    /// Bytes of whole slots between the metadata and the end of the file that are not marked.
    pub(crate) fn unmarked(&self, file_len: u64) -> Result<u64> {
        let first = div_ceil(self.base, self.unit)?;
        let end = div(file_len, self.unit)?;
        let mut marked = 0u64;
        for (word, bits) in &self.words {
            let from = word.saturating_mul(64);
            for slot in from..from.saturating_add(64) {
                if bits & bit(slot) != 0 && (first..end).contains(&slot) {
                    marked = add(marked, 1)?;
                }
            }
        }
        mul(end.saturating_sub(first).saturating_sub(marked), self.unit)
    }
}

/// The bit of a slot in its word.
pub(crate) fn bit(slot: u64) -> u64 {
    1u64.rotate_left(u32::try_from(slot & 63).unwrap_or(0))
}
