//! Giving lost space back: the last blocks of the file move into places that nobody uses, then the end is cut off.
//!
//! ```text
//!   1  copy bitmap and data of the last blocks into the holes        until the BAT names them, nobody looks there
//!   2  let the BAT name the copies                                   old and new place hold the same
//!   3  write a footer behind the last block, 4  cut the file off behind it
//! ```

use crate::check::patch;
use crate::header::FOOTER_BYTES;
use crate::map::{SECTOR, Sparse};
use crate::open::Found;
use crate::survey::{Placed, Survey};
use vellum_core::storage::read_vec;
use vellum_core::{Fix, Patch, Result, Storage, bytes};
use zerocopy::IntoBytes;

/// So many bytes of blocks are moved in one repair; more need another one.
const MOVED_MAX: u64 = 64 << 20;

/// Plans to move the last blocks into unused places. `survey` is as if that was done.
///
/// # Errors
/// Those of the storage.
pub(crate) async fn fill_holes(
    storage: &dyn Storage,
    layout: &Sparse,
    survey: &mut Survey,
    data_end: u64,
    fixes: &mut Vec<Fix>,
) -> Result<()> {
    let slot_bytes = layout.slot_bytes();
    let most = bytes::index(bytes::div(MOVED_MAX, slot_bytes)?)?;
    let holes = survey.holes(layout, data_end);
    let (mut blocks, mut entries): (Vec<Patch>, Vec<Patch>) = (Vec::new(), Vec::new());
    let mut moved: Vec<Placed> = Vec::new();
    for hole in holes.iter().take(most) {
        let sector = bytes::narrow(bytes::div(*hole, SECTOR)?)?;
        let Some(last) = survey.placed.pop_if(|last| last.sector > sector) else { break };
        let extent = layout.extent(last.block.into(), last.sector);
        let len = extent.end.min(data_end).saturating_sub(extent.start);
        let mut data = read_vec(storage, extent.start, bytes::index(len)?).await?.to_vec();
        data.resize(bytes::index(slot_bytes)?, 0);
        blocks.push(patch(*hole, &data));
        let entry = bytes::add(layout.table_offset, bytes::mul(last.block.into(), 4)?)?;
        entries.push(patch(entry, &sector.to_be_bytes()));
        moved.push(Placed { sector, ..last });
    }
    if moved.is_empty() {
        return Ok(());
    }
    survey.placed.extend(moved);
    survey.placed.sort_unstable();
    survey.find_end(layout);
    let count = blocks.len();
    let rest = match survey.holes(layout, survey.end).is_empty() {
        true => "",
        false => " (more places are left: repair again)",
    };
    for (what, patches) in [
        (format!("copy the last {count} blocks of the file into places that nobody uses{rest}"), blocks),
        (format!("let the BAT name the {count} copies; nobody uses the old places then"), entries),
    ] {
        fixes.push(Fix { what, is_leak: true, patches, ..Fix::default() });
    }
    Ok(())
}

/// Plans to cut off the end of the file, if there is room for a block that nobody uses.
pub(crate) fn cut(found: &Found, layout: &Sparse, survey: &Survey, footer_at: u64, fixes: &mut Vec<Fix>) {
    for gap in survey.gaps(layout, footer_at).iter().filter(|gap| gap.end == footer_at) {
        let len = gap.end.saturating_sub(gap.start);
        let end = gap.start.checked_next_multiple_of(SECTOR).unwrap_or(gap.start);
        fixes.push(Fix {
            what: format!("write the footer at byte {end:#x}, behind the last block"),
            is_leak: true,
            patches: vec![patch(end, found.footer.as_bytes())],
            ..Fix::default()
        });
        fixes.push(Fix {
            what: format!("cut the file off behind it: {len} bytes"),
            is_leak: true,
            set_len: Some((0, end.saturating_add(FOOTER_BYTES))),
            ..Fix::default()
        });
    }
}
