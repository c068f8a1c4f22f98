//! Grain tables that lie in holes of the file.
//!
//! Hosted products lay out all grain tables when a disk is made, and file systems store nothing for those that were never
//! written: of an empty disk of 64 TiB they are 8 GiB of zeros with their copies. One question tells where the hole ends,
//! and the tables in it need neither be read nor compared.

use crate::audit;
use crate::extent::SparseExtent;
use crate::tables::Tables;
use parking_lot::RwLock;
use std::ops::Range;
use vellum_core::bytes::{add, mul};
use vellum_core::{Result, Status, Storage};

/// A hole in which tables lie, and one in which their copies do. Those last asked for: the tables of an extent stand one
/// behind the other.
#[derive(Default)]
pub(crate) struct Unwritten(RwLock<Holes>);

#[derive(Default)]
struct Holes {
    tables: Range<u64>,
    copies: Range<u64>,
}

impl Unwritten {
    /// Whether a table of so many bytes at `place` holds nothing.
    pub(crate) fn has_table(&self, place: u64, bytes: u64) -> bool {
        holds(&self.0.read().tables, place, bytes)
    }

    /// Whether a copy of so many bytes at `place` holds nothing.
    pub(crate) fn has_copy(&self, place: u64, bytes: u64) -> bool {
        holds(&self.0.read().copies, place, bytes)
    }
}

impl SparseExtent {
    /// Finds out whether grain table number `table` and its copy lie in holes, and remembers how far these go. Not for an
    /// image that is written: what a writer has in memory fills holes before the file does.
    pub(crate) async fn look_for_holes(&self, tables: &Tables, table: u64) -> Result<bool> {
        let Some(rgd) = self.rgd else { return Ok(false) };
        let bytes = self.table_bytes()?;
        let storage = tables.file(self.file)?.as_ref();
        if !storage.limits().knows_holes {
            return Ok(false);
        }
        let mut found = Vec::with_capacity(2);
        for directory in [self.gd, rgd] {
            let at = add(directory, mul(table, self.entry_bytes())?)?;
            let value = tables.read(self.file, at, self.entry_bytes()).await?;
            let value = audit::entries(&value, self.entry_bytes()).first().copied().unwrap_or(0);
            let Ok(Some(place)) = self.table_place(value) else { return Ok(false) };
            // Tables stand before the grains, or here and there among them.
            let end = self.data_start.max(add(place, bytes)?);
            match hole_at(storage, place..end.min(self.file_len())).await {
                Some(hole) if holds(&hole, place, bytes) => found.push(hole),
                _ => return Ok(false),
            }
        }
        let mut found = found.into_iter();
        if let (Some(tables), Some(copies)) = (found.next(), found.next()) {
            *self.unwritten.0.write() = Holes { tables, copies };
        }
        Ok(true)
    }
}

fn holds(hole: &Range<u64>, place: u64, bytes: u64) -> bool {
    hole.start <= place && place.checked_add(bytes).is_some_and(|end| end <= hole.end)
}

/// The hole at the beginning of `range`. A storage that cannot tell is read instead.
async fn hole_at(storage: &dyn Storage, range: Range<u64>) -> Option<Range<u64>> {
    let found = storage.status(range).await.ok()?;
    let mut holes =
        found.into_iter().take_while(|(_, status)| *status == Status::Hole).map(|(range, _)| range);
    let first = holes.next()?;
    let end = holes.last().map_or(first.end, |last| last.end);
    Some(first.start..end)
}
