//! Persistent bitmaps (sheet section 8) of an image that is written: they are not kept, and every one says so.
//!
//! A bitmap that is marked as in use when an image is opened was not saved by its last writer: nobody trusts it, and
//! whoever knows bitmaps can delete it. So the mark is set on all of them before the first write, and stays. (Clearing
//! the autoclear bit instead, as a writer does who knows nothing of bitmaps, would lose their clusters, too.)

use crate::extensions::Bitmaps;
use vellum_core::storage::{read_vec, write_slice};
use vellum_core::{Result, Storage, bytes};

/// Longest directory that is looked through.
const DIRECTORY_MAX: u64 = 16 << 20;
/// Bytes of an entry before its extra data.
const FIXED: usize = 24;
const IN_USE: u32 = 1;

/// Marks every bitmap as in use, without a flush; `false` if the directory cannot be walked.
pub(crate) async fn mark_in_use(storage: &dyn Storage, bitmaps: Bitmaps) -> Result<bool> {
    let start = bitmaps.directory_offset;
    let inside = storage.len()?.saturating_sub(start);
    if bitmaps.directory_size > inside.min(DIRECTORY_MAX) {
        return Ok(false);
    }
    let directory = read_vec(storage, start, bytes::index(bitmaps.directory_size)?).await?;
    let Some(flags) = flags_of(&directory, bitmaps.count) else { return Ok(false) };
    for (at, value) in flags.into_iter().filter(|(_, value)| value & IN_USE == 0) {
        // Four aligned bytes: never torn.
        let at = bytes::add(start, bytes::wide(at))?;
        write_slice(storage, at, &(value | IN_USE).to_be_bytes()).await?;
    }
    Ok(true)
}

/// Place and value of the flags of every entry.
fn flags_of(directory: &[u8], count: u32) -> Option<Vec<(usize, u32)>> {
    let mut at = 0usize;
    let mut found = Vec::new();
    for _ in 0..count {
        let fixed = directory.get(at..at.checked_add(FIXED)?)?;
        found.push((at.checked_add(12)?, bytes::be32(fixed, 3)?));
        let name = usize::from(u16::from_be_bytes(bytes::array(fixed, 18)?));
        let extra = usize::try_from(bytes::be32(fixed, 5)?).ok()?;
        let end = at.checked_add(FIXED)?.checked_add(extra)?.checked_add(name)?;
        directory.get(..end)?;
        at = end.checked_next_multiple_of(8)?;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(flags: u32, name: &[u8], extra: u32) -> Vec<u8> {
        let mut entry = vec![0u8; FIXED + extra as usize];
        entry[12..16].copy_from_slice(&flags.to_be_bytes());
        entry[18..20].copy_from_slice(&(name.len() as u16).to_be_bytes());
        entry[20..24].copy_from_slice(&extra.to_be_bytes());
        entry.extend_from_slice(name);
        entry.resize(entry.len().next_multiple_of(8), 0);
        entry
    }

    #[test]
    fn every_entry_is_found_or_none() {
        let directory = [entry(2, b"first", 0), entry(3, b"b", 16)].concat();
        assert_eq!(flags_of(&directory, 2), Some(vec![(12, 2), (44, 3)]));
        assert_eq!(flags_of(&directory, 3), None);
        assert_eq!(flags_of(&directory[..directory.len() - 17], 2), None);
        assert_eq!(flags_of(&entry(0, b"x", 0)[..23], 1), None);
    }
}
