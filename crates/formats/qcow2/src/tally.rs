//! [`Tally`]: how often each host cluster is referred to, counted within a budget of memory.
//!
//! Counts stand in chunks of 4096 clusters, made where something refers to. When they exceed the budget, the highest
//! ones are dropped and counted in another pass: a file of any length, however sparse, is counted in bounded memory.

use std::collections::BTreeMap;
use std::ops::Range;
use vellum_core::bytes;

/// Clusters of a chunk.
pub(crate) const CHUNK: u64 = 4096;
const CHUNK_LEN: usize = 4096;
/// What a chunk costs besides its cells, roughly.
const CHUNK_COST: usize = 640;
/// The two low bits of a cell: an active entry with COPIED, or without, refers to the cluster.
const SEEN_COPIED: u32 = 1;
const SEEN_PLAIN: u32 = 2;
const FLAGS: u32 = 3;
const FLAG_BITS: u32 = 2;
/// Greatest count of a narrow and of a wide cell.
const NARROW_MAX: u32 = 0xff >> FLAG_BITS;
/// Greatest count at all; more is counted as this.
pub(crate) const COUNT_MAX: u32 = u32::MAX >> FLAG_BITS;

/// The counts of one pass.
pub(crate) struct Tally {
    range: Range<u64>,
    chunks: BTreeMap<u64, Chunk>,
    cost: usize,
    budget: usize,
    /// One more than the highest cluster that was counted, in this pass or beyond.
    end: u64,
}

struct Chunk {
    cells: Cells,
    /// Bits of the clusters whose stored count is 1.
    single: Vec<u64>,
}

enum Cells {
    Narrow(Vec<u8>),
    Wide(Vec<u32>),
}

/// What is known of a cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    /// How often it is referred to.
    pub count: u32,
    /// An active entry with COPIED refers to it.
    pub seen_copied: bool,
    /// An active entry without COPIED refers to it.
    pub seen_plain: bool,
}

impl Cell {
    fn from_raw(raw: u32) -> Self {
        Cell {
            count: raw >> FLAG_BITS,
            seen_copied: raw & SEEN_COPIED != 0,
            seen_plain: raw & SEEN_PLAIN != 0,
        }
    }
}

/// The parts of a range that lie in one chunk each.
pub(crate) fn chunks(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let start = at;
        let border = start.checked_div(CHUNK)?.checked_add(1)?.saturating_mul(CHUNK);
        at = border.min(range.end);
        (start < range.end).then_some(start..at)
    })
}

impl Tally {
    /// Counts from cluster `from` on, as far as `budget` bytes reach.
    pub fn new(from: u64, budget: usize) -> Self {
        Tally { range: from..u64::MAX, chunks: BTreeMap::new(), cost: 0, budget, end: 0 }
    }

    /// The clusters that this pass counts. Final when everything was added.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// One more than the highest cluster that was added, whether this pass counts it or not.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The clusters `first..=last` are referred to `times` more.
    pub fn add(&mut self, first: u64, last: u64, times: u32) {
        self.end = self.end.max(last.saturating_add(1));
        let mut cluster = first.max(self.range.start);
        while cluster <= last && cluster < self.range.end {
            self.change(cluster, |count, flags| (count.saturating_add(times).min(COUNT_MAX), flags));
            cluster = cluster.saturating_add(1);
        }
    }

    /// An active entry refers to `cluster`, with COPIED or without.
    pub fn flag(&mut self, cluster: u64, copied: bool) {
        if self.range.contains(&cluster) {
            let seen = if copied { SEEN_COPIED } else { SEEN_PLAIN };
            self.change(cluster, |count, flags| (count, flags | seen));
        }
    }

    fn change(&mut self, cluster: u64, how: impl FnOnce(u32, u32) -> (u32, u32)) {
        let (key, at) = place(cluster);
        let mut added = 0usize;
        let chunk = self.chunks.entry(key).or_insert_with(|| {
            added = CHUNK_LEN.saturating_add(CHUNK_COST);
            Chunk { cells: Cells::Narrow(vec![0; CHUNK_LEN]), single: vec![0; CHUNK_LEN / 64] }
        });
        let old = chunk.get(at);
        let (count, flags) = how(old >> FLAG_BITS, old & FLAGS);
        if chunk.set(at, count, flags) {
            added = added.saturating_add(CHUNK_LEN.saturating_mul(3));
        }
        if added > 0 {
            self.cost = self.cost.saturating_add(added);
            self.shrink();
        }
    }

    /// Drops the highest chunks until the rest is within the budget.
    fn shrink(&mut self) {
        while self.cost > self.budget && self.chunks.len() > 1 {
            let Some((key, chunk)) = self.chunks.pop_last() else { return };
            self.range.end = key.saturating_mul(CHUNK);
            self.cost = self.cost.saturating_sub(chunk.cost());
        }
    }

    /// What is known of `cluster`.
    pub fn cell(&self, cluster: u64) -> Cell {
        let (key, at) = place(cluster);
        Cell::from_raw(self.chunks.get(&key).map_or(0, |chunk| chunk.get(at)))
    }

    /// What is known of the clusters of a range that does not reach out of its chunk; `None` if nothing is.
    pub fn cells(&self, range: &Range<u64>) -> Option<Vec<Cell>> {
        let (key, at) = place(range.start);
        let chunk = self.chunks.get(&key)?;
        let len = bytes::index(range.end.saturating_sub(range.start)).ok()?;
        Some((at..at.saturating_add(len)).map(|at| Cell::from_raw(chunk.get(at))).collect())
    }

    /// The clusters of a range that does not reach out of its chunk of which anything is known.
    pub fn counted(&self, range: &Range<u64>) -> Vec<(u64, Cell)> {
        let (key, at) = place(range.start);
        let Some(chunk) = self.chunks.get(&key) else { return Vec::new() };
        let known = |(cluster, raw): (u64, u32)| (raw != 0).then(|| (cluster, Cell::from_raw(raw)));
        match &chunk.cells {
            Cells::Narrow(cells) => range
                .clone()
                .zip(cells.iter().skip(at).map(|raw| u32::from(*raw)))
                .filter_map(known)
                .collect(),
            Cells::Wide(cells) => {
                range.clone().zip(cells.iter().skip(at).copied()).filter_map(known).collect()
            }
        }
    }

    /// The first cluster from `from` on, before `until`, that belongs to a chunk with counts.
    pub fn next_counted(&self, from: u64, until: u64) -> Option<u64> {
        let (key, _) = place(from);
        let (found, _) = self.chunks.range(key..).next()?;
        let cluster = found.saturating_mul(CHUNK).max(from);
        (cluster < until).then_some(cluster)
    }

    /// Notes that the stored count of `cluster` is 1.
    pub fn set_single(&mut self, cluster: u64) {
        let (key, at) = place(cluster);
        let Some(chunk) = self.chunks.get_mut(&key) else { return };
        let bit = 1u64.checked_shl(u32::try_from(at % 64).unwrap_or(0)).unwrap_or(0);
        if let Some(word) = chunk.single.get_mut(at / 64) {
            *word |= bit;
        }
    }

    /// Whether the stored count of `cluster` is 1, as far as it was noted.
    pub fn is_single(&self, cluster: u64) -> bool {
        let (key, at) = place(cluster);
        let word = self.chunks.get(&key).and_then(|chunk| chunk.single.get(at / 64)).copied().unwrap_or(0);
        word.checked_shr(u32::try_from(at % 64).unwrap_or(0)).unwrap_or(0) & 1 != 0
    }
}

/// Number of the chunk and place in it.
fn place(cluster: u64) -> (u64, usize) {
    (cluster / CHUNK, bytes::index(cluster % CHUNK).unwrap_or(0))
}

impl Chunk {
    fn get(&self, at: usize) -> u32 {
        match &self.cells {
            Cells::Narrow(cells) => cells.get(at).copied().unwrap_or(0).into(),
            Cells::Wide(cells) => cells.get(at).copied().unwrap_or(0),
        }
    }

    /// Sets a cell; says whether the cells had to become wider for it.
    fn set(&mut self, at: usize, count: u32, flags: u32) -> bool {
        let mut widened = false;
        if let Cells::Narrow(cells) = &self.cells
            && count > NARROW_MAX
        {
            self.cells = Cells::Wide(cells.iter().map(|cell| u32::from(*cell)).collect());
            widened = true;
        }
        let cell = count.saturating_mul(1 << FLAG_BITS) | flags;
        match &mut self.cells {
            Cells::Narrow(cells) => {
                if let (Some(to), Ok(cell)) = (cells.get_mut(at), u8::try_from(cell)) {
                    *to = cell;
                }
            }
            Cells::Wide(cells) => {
                if let Some(to) = cells.get_mut(at) {
                    *to = cell;
                }
            }
        }
        widened
    }

    fn cost(&self) -> usize {
        let cells = match &self.cells {
            Cells::Narrow(_) => CHUNK_LEN,
            Cells::Wide(_) => CHUNK_LEN.saturating_mul(4),
        };
        cells.saturating_add(CHUNK_COST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_flags_survive_widening() {
        let mut tally = Tally::new(0, 1 << 20);
        tally.add(3, 5, 1);
        tally.flag(4, true);
        tally.add(4, 4, 63);
        tally.flag(5, false);
        tally.add(6, 6, u32::MAX);
        assert_eq!(tally.cell(3), Cell { count: 1, ..Cell::default() });
        assert_eq!(tally.cell(4), Cell { count: 64, seen_copied: true, seen_plain: false });
        assert_eq!(tally.cell(5), Cell { count: 1, seen_copied: false, seen_plain: true });
        assert_eq!(tally.cell(6).count, COUNT_MAX);
        tally.set_single(3);
        assert!(tally.is_single(3) && !tally.is_single(4));
    }

    #[test]
    fn passes_within_a_budget_count_everything_once() {
        let clusters: Vec<u64> = (0..200u64).map(|i| i * 1_000_003 % 77_777 * 4096).collect();
        let (mut from, mut total, mut passes) = (0, 0, 0);
        loop {
            let mut tally = Tally::new(from, 50_000);
            clusters.iter().for_each(|cluster| tally.add(*cluster, *cluster, 1));
            let range = tally.range();
            let mut at = range.start;
            while let Some(cluster) = tally.next_counted(at, range.end) {
                total += (cluster..cluster + CHUNK).map(|c| tally.cell(c).count).sum::<u32>();
                at = cluster + CHUNK;
            }
            passes += 1;
            if range.end == u64::MAX {
                break;
            }
            from = range.end;
        }
        assert_eq!(total, 200);
        assert!(passes > 10, "{passes}");
    }
}
