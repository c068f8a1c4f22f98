//! The whole BAT at once: which blocks lie where, which entries are wrong, and what room nobody uses. Looked at before
//! an image is written, and by `check`.

use crate::header::ABSENT;
use crate::map::{SECTOR, Sparse};
use std::ops::Range;
use vellum_core::storage::read_vec;
use vellum_core::{Code, Result, Storage, bytes};

/// Where data of new blocks is aligned, so that file systems can share it.
const ALIGN: u64 = 4096;
/// Wrong entries that are kept.
const FAULTS_MAX: usize = 1 << 16;
/// Places for blocks that are looked for in unused room.
const HOLES_MAX: usize = 1 << 20;

/// A block that lies where a block can lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Placed {
    pub(crate) sector: u32,
    pub(crate) block: u32,
}

/// An entry that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) block: u32,
    pub(crate) entry: u32,
    pub(crate) code: Code,
}

/// What the BAT says.
#[derive(Default)]
pub(crate) struct Survey {
    /// Well placed blocks, by place.
    pub(crate) placed: Vec<Placed>,
    /// Wrong entries, by block.
    pub(crate) faults: Vec<Fault>,
    /// There are more blocks or faults than are kept.
    pub(crate) is_cut_short: bool,
    /// Where the last well placed block ends, or the structures at the start.
    pub(crate) end: u64,
    /// Guest bytes that have a place.
    pub(crate) guest_bytes: u64,
}

impl Survey {
    /// Reads the BAT; keeps the places of at most `placed_max` blocks.
    ///
    /// # Errors
    /// Those of the storage.
    pub(crate) async fn read(
        storage: &dyn Storage,
        layout: &Sparse,
        data_end: u64,
        placed_max: usize,
    ) -> Result<Survey> {
        let mut survey = Survey { end: Survey::structures_end(layout), ..Survey::default() };
        let blocks = bytes::narrow(layout.blocks())?;
        let mut block = 0u32;
        while block < blocks {
            let (key, within) = layout.page_of(block.into())?;
            let page = read_vec(storage, key, layout.page_bytes(key)?).await?;
            let (entries, _) = page.get(within..).unwrap_or_default().as_chunks::<4>();
            if entries.is_empty() || survey.faults.len() >= FAULTS_MAX {
                survey.is_cut_short = true;
                break;
            }
            for entry in entries.iter().take(bytes::index(u64::from(blocks.saturating_sub(block)))?) {
                survey.add(layout, data_end, block, u32::from_be_bytes(*entry), placed_max);
                block = block.saturating_add(1);
            }
        }
        survey.placed.sort_unstable();
        Ok(survey)
    }

    fn structures_end(layout: &Sparse) -> u64 {
        layout.structures().chain(layout.locators.iter().cloned()).map(|taken| taken.end).max().unwrap_or(0)
    }

    /// Finds out where the last block ends, after blocks moved.
    pub(crate) fn find_end(&mut self, layout: &Sparse) {
        let ends = self.placed.iter().map(|placed| layout.extent(placed.block.into(), placed.sector).end);
        self.end = ends.max().unwrap_or(0).max(Survey::structures_end(layout));
    }

    fn add(&mut self, layout: &Sparse, data_end: u64, block: u32, entry: u32, placed_max: usize) {
        if entry == ABSENT {
            return;
        }
        let extent = layout.extent(block.into(), entry);
        match layout.fault(&extent, data_end) {
            Some(code) if self.faults.len() < FAULTS_MAX => self.faults.push(Fault { block, entry, code }),
            Some(_) => self.is_cut_short = true,
            None => {
                self.end = self.end.max(extent.end);
                self.guest_bytes = self.guest_bytes.saturating_add(layout.visible(block.into()));
                match self.placed.len() < placed_max {
                    true => self.placed.push(Placed { sector: entry, block }),
                    false => self.is_cut_short = true,
                }
            }
        }
    }

    /// Takes out the blocks that lie on others: of two, the one with the greater number.
    pub(crate) fn take_overlaps(&mut self, layout: &Sparse) -> Vec<Fault> {
        let mut kept: Vec<Placed> = Vec::with_capacity(self.placed.len());
        let mut faults = Vec::new();
        for next in self.placed.drain(..) {
            let start = u64::from(next.sector).saturating_mul(SECTOR);
            match kept.last().copied() {
                Some(last) if layout.extent(last.block.into(), last.sector).end > start => {
                    let gone = if last.block < next.block { next } else { last };
                    if gone == last {
                        kept.pop();
                        kept.push(next);
                    }
                    faults.push(Fault { block: gone.block, entry: gone.sector, code: Code::Overlap });
                }
                _ => kept.push(next),
            }
        }
        self.placed = kept;
        faults.sort_unstable_by_key(|fault| fault.block);
        faults
    }

    /// Room behind a block and before `data_end` that nobody uses and that could hold a block at least.
    ///
    /// Room before the first block is not looked at: Xen keeps a map of its own there, and room for a longer BAT.
    pub(crate) fn gaps(&self, layout: &Sparse, data_end: u64) -> Vec<Range<u64>> {
        let slot = layout.slot_bytes();
        let others = layout.structures().chain(layout.locators.iter().cloned());
        let mut others: Vec<(Range<u64>, bool)> = others.map(|range| (range, false)).collect();
        others.push((data_end..data_end, false));
        others.sort_unstable_by_key(|(range, _)| range.start);
        let mut others = others.into_iter().peekable();
        let mut blocks = self.placed.iter().map(|placed| {
            let start = u64::from(placed.sector).saturating_mul(SECTOR);
            (start..start.saturating_add(slot), true)
        });
        let mut block = blocks.next();
        let mut gaps = Vec::new();
        let (mut reached, mut is_behind_block) = (0u64, false);
        loop {
            let other =
                others.next_if(|(other, _)| block.as_ref().is_none_or(|(b, _)| other.start <= b.start));
            let next = match other {
                Some(other) => Some(other),
                None => std::mem::replace(&mut block, blocks.next()),
            };
            let Some((range, is_block)) = next else { return gaps };
            let room = range.start.saturating_sub(reached);
            if is_behind_block && room >= slot && gaps.len() < HOLES_MAX {
                gaps.push(reached..range.start);
            }
            if range.end > reached {
                reached = range.end.checked_next_multiple_of(SECTOR).unwrap_or(range.end);
                is_behind_block = is_block;
            }
        }
    }

    /// Where blocks could be placed in room that nobody uses.
    pub(crate) fn holes(&self, layout: &Sparse, data_end: u64) -> Vec<u64> {
        let mut holes = Vec::new();
        for gap in self.gaps(layout, data_end) {
            let mut at = gap.start;
            loop {
                let start = aligned_start(layout, at);
                let end = start.saturating_add(layout.slot_bytes());
                if end > gap.end || holes.len() >= HOLES_MAX {
                    break;
                }
                holes.push(start);
                at = end;
            }
        }
        holes
    }
}

/// The first start of a block from `at` on with its data well aligned.
pub(crate) fn aligned_start(layout: &Sparse, at: u64) -> u64 {
    let align = if layout.block >= ALIGN { ALIGN } else { SECTOR };
    let data = at.saturating_add(layout.bitmap_bytes);
    data.checked_next_multiple_of(align).unwrap_or(u64::MAX).saturating_sub(layout.bitmap_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Sparse {
        Sparse {
            table_offset: 0x600,
            table_bytes: 40,
            header_at: 0x200,
            block: 4096,
            bitmap_bytes: 512,
            virtual_size: 10 * 4096,
            file_len: 1 << 20,
            differencing: false,
            locators: Vec::new(),
        }
    }

    fn survey(placed: &[(u32, u32)]) -> Survey {
        let mut placed: Vec<Placed> =
            placed.iter().map(|&(sector, block)| Placed { sector, block }).collect();
        placed.sort_unstable();
        Survey { placed, ..Survey::default() }
    }

    #[test]
    fn of_two_blocks_in_one_place_the_first_stays() {
        let mut survey = survey(&[(7, 3), (7, 1), (15, 2), (24, 0)]);
        let faults = survey.take_overlaps(&layout());
        assert_eq!(faults.iter().map(|f| (f.block, f.entry)).collect::<Vec<_>>(), [(2, 15), (3, 7)]);
        assert_eq!(survey.placed, [Placed { sector: 7, block: 1 }, Placed { sector: 24, block: 0 }]);
    }

    #[allow(clippy::single_range_in_vec_init)]
    #[test]
    fn gaps_hold_a_block_and_holes_are_aligned() {
        let survey = survey(&[(7, 0), (39, 1)]);
        let layout = layout();
        assert_eq!(survey.gaps(&layout, 48 * 512), [16 * 512..39 * 512]);
        assert_eq!(survey.holes(&layout, 48 * 512), [23 * 512]);
        assert_eq!(survey.gaps(&layout, 60 * 512), [16 * 512..39 * 512, 48 * 512..60 * 512]);
        assert_eq!(aligned_start(&layout, 0x800), 4096 - 512);
    }
}
