//! One pass over the whole map, page by page: which slots of the file are in use, and which entries cannot be right.
//!
//! Memory: one bit for each slot of the file, within [`Limits::table_bytes`].

use crate::header::{FORMAT, bad};
use crate::layout::{Layout, slot_of};
use crate::slots::Slots;
use vellum_core::storage::read_vec;
use vellum_core::{Code, Limits, Result, Storage, bytes};

/// Entries are read in steps of 1 MiB.
const STEP: u64 = 256 << 10;

/// An entry that cannot be right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    /// `OUT_OF_FILE`, `CORRUPT` (no such slot), `TRUNCATED` (the file ends in the slot), `OVERLAP` (used twice).
    pub(crate) code: Code,
    /// Guest block.
    pub(crate) block: u64,
    /// What its entry says.
    pub(crate) slot: u32,
}

/// What the map says in all.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// The slots that are in use and (partly) in the file.
    pub(crate) slots: Slots,
    /// One more than the greatest slot that an entry names, in the file or not.
    pub(crate) claimed: u32,
    /// Entries that cannot be right.
    pub(crate) faults: u64,
}

/// Looks at every entry of the map; `found` is told of those that cannot be right.
///
/// # Errors
/// Those of the storage, and `TABLE_LIMIT` for more slots than memory is allowed for.
pub(crate) async fn survey(
    storage: &dyn Storage,
    layout: &Layout,
    file_len: u64,
    limits: &Limits,
    mut found: impl FnMut(Fault) + Send,
) -> Result<Survey> {
    let mut survey = Survey::default();
    entries(storage, layout, |block, slot| {
        if let Err(code) = survey.add(block, slot, layout, file_len, limits)? {
            survey.faults = survey.faults.saturating_add(1);
            found(Fault { code, block, slot });
        }
        Ok(())
    })
    .await?;
    Ok(survey)
}

/// The guest blocks whose places are `wanted`, and those places.
///
/// # Errors
/// Those of the storage.
pub(crate) async fn owners(
    storage: &dyn Storage,
    layout: &Layout,
    wanted: impl Fn(u32) -> bool + Send + Sync,
) -> Result<Vec<(u64, u32)>> {
    let mut owners = Vec::new();
    entries(storage, layout, |block, slot| {
        if wanted(slot) {
            owners.push((block, slot));
        }
        Ok(())
    })
    .await?;
    Ok(owners)
}

/// Calls `each` with every guest block that has a place, and the place.
async fn entries(
    storage: &dyn Storage,
    layout: &Layout,
    mut each: impl FnMut(u64, u32) -> Result<()> + Send,
) -> Result<()> {
    let blocks = u64::from(layout.blocks);
    let mut first = 0u64;
    while first < blocks {
        let step = STEP.min(bytes::sub(blocks, first)?);
        let len = bytes::index(bytes::mul(step, 4)?)?;
        let page = read_vec(storage, layout.entry_at(first), len).await?;
        let entries = page.as_chunks::<4>().0.iter().map(|entry| u32::from_le_bytes(*entry));
        for (entry, block) in entries.zip(first..) {
            if let Some(slot) = slot_of(entry) {
                each(block, slot)?;
            }
        }
        first = bytes::add(first, step)?;
    }
    Ok(())
}

impl Survey {
    fn add(
        &mut self,
        block: u64,
        slot: u32,
        layout: &Layout,
        file_len: u64,
        limits: &Limits,
    ) -> Result<std::result::Result<(), Code>> {
        if slot < layout.blocks {
            self.claimed = self.claimed.max(slot.saturating_add(1));
        }
        let checked = layout.check(block, slot, file_len).map(|_| ());
        if matches!(checked, Err(Code::OutOfFile | Code::Corrupt)) {
            return Ok(checked);
        }
        check_limit(slot, limits)?;
        Ok(if self.slots.set(slot) { checked } else { Err(Code::Overlap) })
    }
}

/// One bit for each slot up to this one is allowed.
pub(crate) fn check_limit(slot: u32, limits: &Limits) -> Result<()> {
    if u64::from(slot >> 3) < limits.table_bytes {
        return Ok(());
    }
    Err(bad(
        Code::TableLimit,
        "block map",
        0,
        "the file has more blocks than may be kept account of in memory",
    )
    .format(FORMAT)
    .found(format!("block {slot}, one bit each"))
    .allowed(format!("{} bytes", limits.table_bytes))
    .hint("raise the limit of table bytes, or convert the image to one with larger blocks"))
}
