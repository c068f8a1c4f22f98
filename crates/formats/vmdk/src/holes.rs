//! Which grains move into which holes, so that the end of an extent can be cut off.

use crate::audit::{self, Side};
use crate::check::Survey;
use crate::extent::{Grain, SparseExtent};
use crate::tables::PAGE;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use vellum_core::bytes::{add, align_up, mul, wide};
use vellum_core::{Result, Storage};

/// A grain, where it goes, and where the entries stand that lead to it. (The last grains come first.)
pub(crate) struct Move {
    pub from: u64,
    pub to: u64,
    pub entries: Vec<u64>,
}

/// All moves of one repair.
pub(crate) struct Moves {
    pub moves: Vec<Move>,
    /// Where the last grain or table ends then.
    pub end: u64,
    /// There are more grains to move.
    pub has_more: bool,
}

/// Place of a grain, and of its entry and the copy of that.
type Placed = (u64, u64, Option<u64>);

/// Finds at most `most` moves.
///
/// # Errors
/// Those of the storage.
pub(crate) async fn moves(
    extent: &SparseExtent,
    storage: &dyn Storage,
    survey: &Survey,
    most: usize,
) -> Result<Moves> {
    let last = last_grains(extent, storage, most).await?;
    let (mut moves, mut has_more) = (Vec::new(), false);
    let mut end = tables_end(extent)?;
    let mut hole = align_up(extent.data_start, extent.grain)?;
    let mut grains = last.into_iter().peekable();
    // Every step finds a hole, or a place that was counted when the tables were read.
    while let Some((from, entry, copy)) = grains.peek().copied() {
        let behind = add(hole, extent.grain)?;
        if behind > from {
            break;
        }
        if !survey.claimed.is_marked(hole)? {
            moves.push(Move { from, to: hole, entries: std::iter::once(entry).chain(copy).collect() });
            grains.next();
            end = end.max(behind);
        }
        hole = behind;
    }
    end = match (grains.peek(), moves.last()) {
        (Some((place, ..)), _) => end.max(add(*place, extent.grain)?),
        (None, Some(lowest)) if moves.len() >= most => {
            // What was not looked at lies before.
            has_more = true;
            end.max(lowest.from)
        }
        _ => end,
    };
    Ok(Moves { moves, end, has_more })
}

/// Where the last table ends, or the metadata at the start.
fn tables_end(extent: &SparseExtent) -> Result<u64> {
    let mut end = extent.data_start;
    for table in &extent.reserved {
        end = end.max(align_up(table.end, PAGE)?.min(extent.file_len().max(table.end)));
    }
    Ok(end)
}

/// The last `most` grains of the file, the last one first.
async fn last_grains(extent: &SparseExtent, storage: &dyn Storage, most: usize) -> Result<Vec<Placed>> {
    let mut heap: BinaryHeap<Reverse<Placed>> = BinaryHeap::new();
    let collect = |pair: audit::Pair| {
        let Side::Table(at, entries) = pair.primary else { return Ok(()) };
        let copy = match pair.copy {
            Some(Side::Table(at, _)) => Some(at),
            _ => None,
        };
        for (number, value) in entries.iter().enumerate() {
            let Ok(Grain::At(place)) = extent.meaning(*value) else { continue };
            let within = mul(wide(number), extent.entry_bytes())?;
            let copy = match copy {
                Some(copy) => Some(add(copy, within)?),
                None => None,
            };
            heap.push(Reverse((place, add(at, within)?, copy)));
            if heap.len() > most {
                heap.pop();
            }
        }
        Ok(())
    };
    audit::walk(extent, storage, collect).await?;
    let last: Vec<Reverse<Placed>> = heap.into_sorted_vec();
    Ok(last.into_iter().map(|Reverse(placed)| placed).collect())
}
