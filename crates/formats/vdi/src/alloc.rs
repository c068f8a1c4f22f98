//! Which slots of the file are in use. (A slot is a place for one block; the map gives a slot to a guest block.)
//!
//! ```text
//!   slot   0   1   2   3   4   5   6   7 | 8        new blocks go into a hole, else to `end`
//!          used    hole    used  pending | end      pending: released, but something durable may still point there
//! ```
//!
//! Nothing here waits or does I/O. All of it is made anew from the map when a writing session begins; the counter of
//! the header is not believed.

use crate::slots::Slots;
use std::ops::Range;

/// Slots of the end of the file whose guest blocks are known: 64 Ki at a time.
const TAIL_SLOTS: u32 = 64 << 10;
/// So many pending slots want a flush.
const PENDING_MAX: usize = 1 << 20;

/// The guest blocks that live in the last slots. A hint only: what it says is looked up in the map before it is used.
#[derive(Debug, Default)]
struct Tail {
    from: u32,
    owners: Vec<Option<u32>>,
    is_known: bool,
}

impl Tail {
    fn at(&mut self, slot: u32) -> Option<&mut Option<u32>> {
        let index = usize::try_from(slot.checked_sub(self.from)?).ok()?;
        if !self.is_known {
            return None;
        }
        if index >= self.owners.len() {
            if slot.saturating_sub(self.from) > TAIL_SLOTS.saturating_mul(4) {
                *self = Tail::default();
                return None;
            }
            self.owners.resize(index.saturating_add(1), None);
        }
        self.owners.get_mut(index)
    }
}

/// A block that should move into a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NextMove {
    /// All is dense, or what is not will be after the next flush.
    None,
    /// This guest block.
    Block(u32),
    /// Whose the last slots are is not known: [`Alloc::begin_tail`], then tell [`Alloc::own`] of all entries.
    Unknown,
}

/// The allocator of an image that is being written.
#[derive(Debug, Default)]
pub(crate) struct Alloc {
    slots: Slots,
    pending: Vec<u32>,
    tail: Tail,
    /// `cBlocksAllocated` as it stands in the cached header.
    pub(crate) counter: u32,
    /// Space was let go at the end of the file.
    pub(crate) is_shorter: bool,
    /// The map contradicts itself (and is written all the same): nothing is let go, since others may use it.
    pub(crate) is_damaged: bool,
}

impl Alloc {
    /// An allocator that knows the slots in use.
    pub(crate) fn new(slots: Slots) -> Self {
        Alloc { counter: slots.end(), slots, ..Alloc::default() }
    }

    /// The same for a map that contradicts itself: all slots before `claimed` count as used.
    pub(crate) fn damaged(mut slots: Slots, claimed: u32) -> Self {
        slots.fill(claimed);
        Alloc { is_damaged: true, ..Alloc::new(slots) }
    }

    /// What `cBlocksAllocated` must be: every slot in use or pending lies before it.
    pub(crate) fn end(&self) -> u32 {
        self.slots.end()
    }
    pub(crate) fn wants_flush(&self) -> bool {
        self.pending.len() > PENDING_MAX
    }

    /// Takes up to `wanted` neighbouring slots that hold old bytes.
    pub(crate) fn take_hole(&mut self, wanted: u32) -> Option<Range<u32>> {
        self.slots.take_hole(wanted)
    }
    /// Takes up to `wanted` slots at the end. The caller keeps others from changing the file's length meanwhile.
    pub(crate) fn take_end(&mut self, wanted: u32, blocks: u32) -> Option<Range<u32>> {
        self.slots.take_end(wanted, blocks)
    }
    /// Takes the first hole, if it lies before `slot`.
    pub(crate) fn take_hole_before(&mut self, slot: u32) -> Option<Range<u32>> {
        let hole = self.slots.first_hole()?;
        if hole < slot { self.slots.take_hole(1) } else { None }
    }

    /// Gives slots back that nothing ever pointed to.
    pub(crate) fn give_back(&mut self, slots: Range<u32>) {
        let end = self.slots.end();
        slots.for_each(|slot| self.slots.clear(slot));
        self.is_shorter |= self.slots.end() < end;
    }

    /// The map does not name the slot any more, but the file still may.
    pub(crate) fn release(&mut self, slot: u32) {
        if let Some(owner) = self.tail.at(slot) {
            *owner = None;
        }
        if !self.is_damaged {
            self.pending.push(slot);
        }
    }

    /// What a commit that starts now makes free.
    pub(crate) fn freeze(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.pending)
    }
    /// The commit is durable.
    pub(crate) fn thaw(&mut self, released: Vec<u32>) {
        let end = self.slots.end();
        released.into_iter().for_each(|slot| self.slots.clear(slot));
        self.is_shorter |= self.slots.end() < end;
    }

    /// The map names the slot for `block`.
    pub(crate) fn own(&mut self, slot: u32, block: u64) {
        if let Some(owner) = self.tail.at(slot) {
            *owner = u32::try_from(block).ok();
        }
    }

    /// Forgets that `block` is said to own a slot.
    pub(crate) fn disown(&mut self, block: u64) {
        let block = u32::try_from(block).ok();
        self.tail.owners.iter_mut().filter(|owner| **owner == block).for_each(|owner| *owner = None);
    }

    /// From now on the owners of the last slots are kept.
    pub(crate) fn begin_tail(&mut self) {
        let from = self.slots.end().saturating_sub(TAIL_SLOTS);
        self.tail = Tail { from, owners: Vec::new(), is_known: true };
    }

    /// The last block, if it lies behind a hole.
    pub(crate) fn next_move(&mut self) -> NextMove {
        if self.is_damaged {
            return NextMove::None;
        }
        let Some(hole) = self.slots.first_hole() else { return NextMove::None };
        let mut slot = self.slots.end();
        while slot > hole.saturating_add(1) {
            slot = slot.saturating_sub(1);
            if !self.tail.is_known || slot < self.tail.from {
                return NextMove::Unknown;
            }
            if self.slots.is_used(slot)
                && let Some(Some(block)) = self.tail.at(slot)
            {
                return NextMove::Block(*block);
            }
        }
        NextMove::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(used: &[u32]) -> Slots {
        let mut slots = Slots::default();
        assert!(used.iter().all(|slot| slots.set(*slot)));
        slots
    }

    #[test]
    fn released_slots_are_given_out_only_after_the_commit() {
        let mut alloc = Alloc::new(slots(&[0, 1, 2, 3]));
        alloc.release(1);
        assert_eq!((alloc.take_hole(1), alloc.next_move()), (None, NextMove::None));
        let frozen = alloc.freeze();
        alloc.release(0);
        alloc.thaw(frozen);
        assert_eq!(alloc.next_move(), NextMove::Unknown);
        alloc.begin_tail();
        for (slot, block) in [(2, 20), (3, 30)] {
            alloc.own(slot, block);
        }
        assert_eq!(alloc.next_move(), NextMove::Block(30));
        assert_eq!(alloc.take_hole_before(1), None);
        assert_eq!(alloc.take_hole_before(3), Some(1..2));
        alloc.own(1, 30);
        alloc.release(3);
        assert_eq!(alloc.next_move(), NextMove::None);
        let frozen = alloc.freeze();
        alloc.thaw(frozen);
        assert!(alloc.is_shorter);
        assert_eq!((alloc.end(), alloc.next_move()), (3, NextMove::Block(20)));
    }

    #[test]
    fn a_damaged_map_lets_nothing_go() {
        let mut alloc = Alloc::damaged(slots(&[0, 5]), 10);
        assert_eq!((alloc.end(), alloc.take_hole(1)), (10, None));
        alloc.release(5);
        assert_eq!(alloc.freeze(), [] as [u32; 0]);
        assert_eq!(alloc.take_end(1, 20), Some(10..11));
    }
}
