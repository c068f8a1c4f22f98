//! New refcount structures, made from counted references: the repair of those that cannot be mended in place.
//!
//! ```text
//!   file as it is ... | new refcount table | new refcount blocks
//!                     ^ first cluster that nothing refers to, behind the end of the file
//! ```
//!
//! They count themselves; the old ones are counted by nobody and so become free.

use crate::counts;
use crate::header::REFCOUNT_TABLE_MAX;
use crate::tally::{CHUNK, Tally};
use std::collections::BTreeMap;
use vellum_core::{Code, Error, Patch, Result, bytes};

/// The blocks made so far, by number.
pub(crate) struct Rebuild {
    order: u32,
    cluster: u64,
    per_block: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
}

/// What is to be written.
pub(crate) struct Made {
    pub blocks: usize,
    /// Table and blocks.
    pub patches: Vec<Patch>,
    /// Of the header: 12 bytes in one sector.
    pub switch: Patch,
}

impl Rebuild {
    pub fn new(order: u32, cluster: u64) -> Self {
        let width = 1u64.checked_shl(order).unwrap_or(1);
        let per_block = cluster.saturating_mul(8).checked_div(width).unwrap_or(1).max(1);
        Rebuild { order, cluster, per_block, blocks: BTreeMap::new() }
    }

    /// Bytes of the blocks.
    pub fn bytes(&self) -> usize {
        self.blocks.len().saturating_mul(bytes::index(self.cluster).unwrap_or(usize::MAX))
    }

    /// Takes the counts of one pass over; returns how many references did not fit.
    pub fn take(&mut self, tally: &Tally) -> u64 {
        let range = tally.range();
        let most = counts::greatest(self.order);
        let mut too_many = 0u64;
        let mut at = range.start;
        while let Some(start) = tally.next_counted(at, range.end) {
            at = start.saturating_add(1).checked_next_multiple_of(CHUNK).unwrap_or(u64::MAX).min(range.end);
            for cluster in start..at {
                let count = u64::from(tally.cell(cluster).count);
                if count > 0 {
                    self.set(cluster, count.min(most));
                    too_many = too_many.saturating_add(count.saturating_sub(most));
                }
            }
        }
        too_many
    }

    fn set(&mut self, cluster: u64, count: u64) {
        let number = cluster.checked_div(self.per_block).unwrap_or(0);
        let index = bytes::index(cluster.checked_rem(self.per_block).unwrap_or(0)).unwrap_or(usize::MAX);
        let len = bytes::index(self.cluster).unwrap_or(0);
        let block = self.blocks.entry(number).or_insert_with(|| vec![0; len]);
        counts::set(block, self.order, index, count);
    }

    /// Lays everything out from cluster `first` on, where nothing is.
    pub fn finish(mut self, first: u64) -> Result<Made> {
        let (table_clusters, end) = self.room(first)?;
        (first..end).for_each(|cluster| self.set(cluster, 1));
        let table_len = bytes::mul(table_clusters, self.cluster)?;
        let table_at = bytes::mul(first, self.cluster)?;
        let mut table = vec![0u8; bytes::index(table_len)?];
        let mut patches = Vec::with_capacity(self.blocks.len().saturating_add(1));
        let mut at = bytes::add(table_at, table_len)?;
        for (number, block) in self.blocks {
            let entry = bytes::index(bytes::mul(number, 8)?)?;
            if let Some(place) = table.get_mut(entry..entry.saturating_add(8)) {
                place.copy_from_slice(&at.to_be_bytes());
            }
            patches.push(Patch { storage: 0, offset: at, bytes: block });
            at = bytes::add(at, self.cluster)?;
        }
        let blocks = patches.len();
        patches.insert(0, Patch { storage: 0, offset: table_at, bytes: table });
        let mut header = table_at.to_be_bytes().to_vec();
        header.extend_from_slice(&bytes::narrow(table_clusters)?.to_be_bytes());
        Ok(Made { blocks, patches, switch: Patch { storage: 0, offset: 48, bytes: header } })
    }

    /// Clusters of the table, and the end of table and blocks, which count themselves.
    fn room(&self, first: u64) -> Result<(u64, u64)> {
        let mut end = first;
        loop {
            let own = bytes::div(first, self.per_block)?..bytes::div_ceil(end, self.per_block)?;
            let own = if end > first { own } else { 0..0 };
            let highest = self.blocks.last_key_value().map_or(0, |(number, _)| *number);
            let highest = highest.max(own.end.saturating_sub(1));
            let table = bytes::div_ceil(bytes::mul(bytes::add(highest, 1)?, 8)?, self.cluster)?;
            if bytes::mul(table, self.cluster)? > REFCOUNT_TABLE_MAX {
                return Err(Error::new(
                    Code::TableLimit,
                    "new refcounts would need a table larger than 8 MiB",
                )
                .hint("convert the image to one with larger clusters or narrower refcounts"));
            }
            let missing = own.filter(|number| !self.blocks.contains_key(number)).count();
            let blocks = bytes::wide(self.blocks.len().saturating_add(missing));
            let needed = bytes::add(bytes::add(first, table)?, blocks)?;
            // Grows from below, so that it ends with exactly what is needed: nothing is counted in vain.
            if needed <= end {
                return Ok((table, end));
            }
            end = needed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_new_structures_count_themselves_at_every_width() {
        for order in 0..=6u32 {
            for first in [3u64, 100, 4095, 4096, 100_000] {
                let mut tally = Tally::new(0, 64 << 20);
                tally.add(0, first - 1, 1);
                let mut rebuild = Rebuild::new(order, 512);
                rebuild.take(&tally);
                let made = rebuild.finish(first).unwrap();
                let table = &made.patches[0];
                let per_block = 4096 >> order;
                let count = |cluster: u64| -> u64 {
                    let at = (cluster / per_block * 8) as usize;
                    let entry = bytes::be64(&table.bytes[at..at + 8], 0).unwrap();
                    let block = made.patches.iter().find(|patch| patch.offset == entry).expect("a block");
                    counts::get(&block.bytes, order, (cluster % per_block) as usize).unwrap()
                };
                let end = made.patches.iter().map(|p| (p.offset + p.bytes.len() as u64) / 512).max().unwrap();
                assert!((0..end).all(|cluster| count(cluster) == 1), "order {order} first {first}");
                assert!(end.is_multiple_of(per_block) || count(end) == 0);
                assert_eq!(made.switch.bytes.len(), 12);
            }
        }
    }
}
