//! A bit for each slot of the file.

use std::ops::Range;

/// A bit for each slot.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    words: Vec<u64>,
    /// One more than the greatest slot in use.
    end: u32,
    used: u32,
    /// No hole lies before it.
    hint: u32,
}

fn word_and_bit(slot: u32) -> (usize, u64) {
    (usize::try_from(slot >> 6).unwrap_or(usize::MAX), 1u64.wrapping_shl(slot & 63))
}

impl Slots {
    pub(crate) fn end(&self) -> u32 {
        self.end
    }
    pub(crate) fn used(&self) -> u32 {
        self.used
    }
    /// Slots before the end that nobody uses.
    pub(crate) fn holes(&self) -> u32 {
        self.end.saturating_sub(self.used)
    }

    pub(crate) fn is_used(&self, slot: u32) -> bool {
        let (word, bit) = word_and_bit(slot);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Takes a slot; `false` if it was taken.
    pub(crate) fn set(&mut self, slot: u32) -> bool {
        let (at, bit) = word_and_bit(slot);
        if at >= self.words.len() {
            self.words.resize(at.saturating_add(1), 0);
        }
        match self.words.get_mut(at) {
            Some(word) if *word & bit == 0 => *word |= bit,
            _ => return false,
        }
        self.used = self.used.saturating_add(1);
        self.end = self.end.max(slot.saturating_add(1));
        true
    }

    /// Lets a slot go, and the end with it if it was the last.
    pub(crate) fn clear(&mut self, slot: u32) {
        let (at, bit) = word_and_bit(slot);
        if let Some(word) = self.words.get_mut(at)
            && *word & bit != 0
        {
            *word &= !bit;
            self.used = self.used.saturating_sub(1);
            self.hint = self.hint.min(slot);
            while self.end > 0 && !self.is_used(self.end.saturating_sub(1)) {
                self.end = self.end.saturating_sub(1);
            }
        }
    }

    /// The first slot from `from` on that nobody uses; may be the end.
    fn next_free(&self, from: u32) -> u32 {
        let (first, _) = word_and_bit(from);
        let below = 1u64.wrapping_shl(from & 63).wrapping_sub(1);
        for (index, word) in self.words.iter().enumerate().skip(first) {
            let taken = if index == first { word | below } else { *word };
            if taken != u64::MAX {
                let base = u32::try_from(index).unwrap_or(u32::MAX).saturating_mul(64);
                return base.saturating_add(taken.trailing_ones());
            }
        }
        self.end
    }

    /// The first hole.
    pub(crate) fn first_hole(&mut self) -> Option<u32> {
        if self.holes() == 0 {
            return None;
        }
        self.hint = self.next_free(self.hint);
        Some(self.hint)
    }

    /// Takes up to `wanted` slots of the first hole.
    pub(crate) fn take_hole(&mut self, wanted: u32) -> Option<Range<u32>> {
        let first = self.first_hole()?;
        let mut end = first;
        while end < first.saturating_add(wanted) && end < self.end && self.set(end) {
            end = end.saturating_add(1);
        }
        Some(first..end)
    }

    /// Takes up to `wanted` slots behind the end; there are `blocks` in all.
    pub(crate) fn take_end(&mut self, wanted: u32, blocks: u32) -> Option<Range<u32>> {
        let run = self.end..self.end.saturating_add(wanted).min(blocks);
        run.clone().for_each(|slot| {
            self.set(slot);
        });
        (!run.is_empty()).then_some(run)
    }

    /// Takes every slot before `end`.
    pub(crate) fn fill(&mut self, end: u32) {
        (0..end).for_each(|slot| {
            self.set(slot);
        });
    }

    /// The holes, in order.
    pub(crate) fn hole_runs(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        let mut at = 0u32;
        std::iter::from_fn(move || {
            let first = self.next_free(at);
            if first >= self.end {
                return None;
            }
            let mut end = first;
            while end < self.end && !self.is_used(end) {
                end = end.saturating_add(1);
            }
            at = end;
            Some(first..end)
        })
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
    fn holes_are_found_across_words() {
        let mut slots = Slots::default();
        slots.fill(200);
        assert_eq!((slots.end(), slots.used(), slots.holes()), (200, 200, 0));
        assert_eq!(slots.first_hole(), None);
        [63, 64, 65, 130].into_iter().for_each(|slot| slots.clear(slot));
        assert_eq!(slots.hole_runs().collect::<Vec<_>>(), [63..66, 130..131]);
        assert_eq!(slots.take_hole(2), Some(63..65));
        assert_eq!(slots.take_hole(5), Some(65..66));
        assert_eq!(slots.take_hole(5), Some(130..131));
        assert_eq!(slots.take_hole(5), None);
        assert_eq!(slots.take_end(5, 203), Some(200..203));
        assert_eq!(slots.take_end(5, 203), None);
    }

    #[test]
    fn the_end_follows_what_is_let_go() {
        let mut slots = slots(&[0, 1, 2, 100]);
        assert!(!slots.set(2));
        slots.clear(1);
        slots.clear(100);
        assert_eq!((slots.end(), slots.holes()), (3, 1));
        slots.clear(2);
        slots.clear(0);
        assert_eq!((slots.end(), slots.holes(), slots.first_hole()), (0, 0, None));
        assert_eq!(slots.take_end(2, 10), Some(0..2));
    }
}
