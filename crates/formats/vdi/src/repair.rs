//! What mends an image: steps that each leave it no worse, in the order in which they must be carried out.
//!
//! 1. a counter that is too small is raised: that is right whatever else is done;
//! 2. a last block that is cut gets its missing part back, as zeros (lossy); bad entries are cleared (lossy);
//! 3. the last blocks are copied into places that nobody uses, then the map names the copies;
//! 4. the counter goes down to what the map needs, and the file is cut behind its last block.
//!
//! Clearing entries loses what they named. The steps behind it lose nothing, but count on it: nobody carries them out
//! without it (they are not called leaks then), because the counter may go down only when no entry needs it.

use crate::check::Checked;
use crate::header::FREE;
use crate::scan::{Fault, owners};
use crate::slots::Slots;
use std::collections::{HashMap, HashSet};
use vellum_core::storage::read_vec;
use vellum_core::{Code, Fix, Patch, Result, Storage, bytes};

/// So many bytes of blocks are moved in one repair; more need another one.
const MOVED_MAX: u64 = 64 << 20;

/// Plans the repair of an image that was looked over.
pub(crate) async fn plan(image: &mut Checked, storage: &dyn Storage) -> Result<()> {
    let mut counter = image.header.c_blocks_allocated;
    if counter < image.survey.claimed {
        image.plan_counter(image.survey.claimed);
        counter = image.survey.claimed;
    }
    image.plan_entries()?;
    if bytes::wide(image.faults.len()) != image.survey.faults {
        return Ok(()); // More bad entries than are mended at once.
    }
    image.plan_moves(storage).await?;
    let end = image.survey.slots.end();
    if counter != end {
        image.plan_counter(end);
    }
    image.plan_cut();
    Ok(())
}

impl Checked {
    fn patch(offset: u64, bytes: Vec<u8>) -> Patch {
        Patch { storage: 0, offset, bytes }
    }

    fn plan_counter(&mut self, to: u32) {
        let from = self.header.c_blocks_allocated;
        self.report.fixes.push(Fix {
            what: format!("set cBlocksAllocated (now {from}) to {to}, as the map has it"),
            is_leak: to < from && from <= self.header.c_blocks && self.faults.is_empty(),
            patches: vec![Self::patch(self.header.counter_at(), to.to_le_bytes().to_vec())],
            ..Fix::default()
        });
    }

    fn plan_cut(&mut self) {
        let end = self.end_offset();
        if self.file_len <= end {
            return;
        }
        self.report.fixes.push(Fix {
            what: format!("cut the file from {} to {end} bytes, behind its last block", self.file_len),
            is_leak: self.faults.is_empty(),
            set_len: Some((0, end)),
            ..Fix::default()
        });
    }

    /// Bad entries become FREE; a last block that is cut gets its missing part back, as zeros.
    fn plan_entries(&mut self) -> Result<()> {
        let is_cut = |fault: &&Fault| fault.code == Code::Truncated;
        if let Some(cut) = self.faults.iter().find(is_cut) {
            let end = self.layout.slot_at(cut.slot.saturating_add(1));
            self.report.fixes.push(Fix {
                what: format!(
                    "make the file {end} bytes long; the missing part of guest block {} reads as zeros",
                    cut.block
                ),
                is_lossy: true,
                set_len: Some((0, end)),
                ..Fix::default()
            });
        }
        let mut patches: Vec<Patch> = Vec::new();
        let mut count = 0u64;
        for fault in self.faults.iter().filter(|fault| !is_cut(fault)) {
            count = bytes::add(count, 1)?;
            let offset = self.layout.entry_at(fault.block);
            match patches.last_mut() {
                Some(last) if last.offset.saturating_add(bytes::wide(last.bytes.len())) == offset => {
                    last.bytes.extend(FREE.to_le_bytes());
                }
                _ => patches.push(Self::patch(offset, FREE.to_le_bytes().to_vec())),
            }
        }
        if count != 0 {
            let instead = if self.header.has_parent() { "what the parent holds" } else { "zeros" };
            self.report.fixes.push(Fix {
                what: format!("clear {count} bad entries of the block map; their blocks read as {instead}"),
                is_lossy: true,
                patches,
                ..Fix::default()
            });
        }
        Ok(())
    }

    /// Holes in the middle of the file are filled with its last blocks, as a session does when it is closed.
    async fn plan_moves(&mut self, storage: &dyn Storage) -> Result<()> {
        // A fixed image has all its places for good; private data before blocks stays where it is.
        if self.header.is_fixed() || self.layout.extra != 0 {
            return Ok(());
        }
        let moves = moves(&self.survey.slots, bytes::index(bytes::div(MOVED_MAX, self.layout.stride)?)?);
        if moves.is_empty() {
            return Ok(());
        }
        // Entries that are cleared own nothing.
        let faults = self.faults.iter().filter(|fault| fault.code != Code::Truncated);
        let cleared: HashSet<u64> = faults.map(|fault| fault.block).collect();
        let (mut blocks, mut entries) = (Vec::new(), Vec::new());
        for (block, slot) in owners(storage, &self.layout, |slot| moves.contains_key(&slot)).await? {
            let Some(hole) = moves.get(&slot).copied().filter(|_| !cleared.contains(&block)) else {
                continue;
            };
            let from = self.layout.slot_at(slot);
            let here = self.layout.stride.min(self.file_len.saturating_sub(from));
            let mut data = read_vec(storage, from, bytes::index(here)?).await?.to_vec();
            data.resize(bytes::index(self.layout.stride)?, 0);
            blocks.push(Self::patch(self.layout.slot_at(hole), data));
            entries.push(Self::patch(self.layout.entry_at(block), hole.to_le_bytes().to_vec()));
            self.survey.slots.clear(slot);
            self.survey.slots.set(hole);
        }
        let count = blocks.len();
        let rest = match self.survey.slots.holes() {
            0 => String::new(),
            holes => format!(" ({holes} more places are left: repair again)"),
        };
        for (what, patches) in [
            (format!("copy the last {count} blocks of the file into places that nobody uses{rest}"), blocks),
            (format!("let the block map name the {count} copies; nobody uses the old places then"), entries),
        ] {
            let is_leak = self.faults.is_empty();
            self.report.fixes.push(Fix { what, is_leak, patches, ..Fix::default() });
        }
        Ok(())
    }
}

/// Which slots move to which holes: the last to the first, at most so many.
fn moves(slots: &Slots, most: usize) -> HashMap<u32, u32> {
    let mut moves = HashMap::new();
    let mut used = (0..slots.end()).rev().filter(|slot| slots.is_used(*slot));
    for hole in slots.hole_runs().flatten().take(most) {
        match used.next() {
            Some(last) if last > hole => moves.insert(last, hole),
            _ => break,
        };
    }
    moves
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_slots_move_into_the_first_holes() {
        let mut slots = Slots::default();
        slots.fill(100);
        [3, 4, 50, 97, 98].into_iter().for_each(|slot| slots.clear(slot));
        let all = |most| {
            let mut all: Vec<(u32, u32)> = moves(&slots, most).into_iter().collect();
            all.sort_unstable();
            all
        };
        // 97 and 98 are behind what is the end then.
        assert_eq!(all(10), [(95, 50), (96, 4), (99, 3)]);
        assert_eq!(all(2), [(96, 4), (99, 3)]);
        assert_eq!(all(0), []);
        slots.fill(100);
        assert!(moves(&slots, 10).is_empty());
    }
}
