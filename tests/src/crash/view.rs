//! What a guest sees of a disk, as a hash for each sector; and what the image says of its own layout.

use std::ops::Range;
use vellum::{Buf, Disk, Extent, PieceKind, Result, Storage, Uuid, Value, block_on};
use vellum_sim::{Content, SECTOR, hash_of};

/// A hash for each sector of the disk; 0 for zeros.
pub type View = Vec<u64>;

const STEP: u64 = 256 << 10;

/// Sectors that may hold something else than zeros, in runs.
fn runs(disk: &Disk) -> Result<Vec<Range<u64>>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for piece in block_on(disk.pieces(0..disk.size(), usize::MAX))? {
        if matches!(piece.kind, PieceKind::Zero) {
            continue;
        }
        let run = piece.range.start / SECTOR..piece.range.end.div_ceil(SECTOR);
        match runs.last_mut() {
            Some(last) if last.end >= run.start => last.end = last.end.max(run.end),
            _ => runs.push(run),
        }
    }
    Ok(runs)
}

/// Calls `each` with offset and bytes of everything that may not be zero.
fn scan(disk: &Disk, mut each: impl FnMut(u64, &[u8])) -> Result<()> {
    for run in runs(disk)? {
        let mut at = run.start * SECTOR;
        let end = (run.end * SECTOR).min(disk.size());
        while at < end {
            let (buf, result) = disk.read_at(Buf::zeroed(STEP.min(end - at) as usize), at).wait();
            result?;
            each(at, &buf);
            at += buf.len() as u64;
        }
    }
    Ok(())
}

/// Reads all of a disk.
pub fn view(disk: &Disk) -> Result<View> {
    let mut view = vec![0u64; disk.size().div_ceil(SECTOR) as usize];
    scan(disk, |at, bytes| {
        let first = (at / SECTOR) as usize;
        for (index, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            view[first + index] = hash_of(sector);
        }
    })?;
    Ok(view)
}

/// Reads all of a disk.
pub fn content(disk: &Disk) -> Result<Content> {
    let mut content = Content::default();
    scan(disk, |at, bytes| content.write(bytes, at))?;
    content.set_len(disk.size());
    Ok(content)
}

/// By what others see that an image was changed: modification UUID, content id, time. All `None`: the format has nothing.
pub type Marks = (Option<Uuid>, Option<u32>, Option<Value>);

/// The marks of the top image.
pub fn marks(disk: &Disk) -> Marks {
    let info = disk.layers()[0].image.info();
    // The one footer of a fixed VHD is never written over: only the time of the file tells that it changed.
    if (info.format, info.variant.as_str()) == ("vhd", "fixed") {
        return (None, None, None);
    }
    let time = info.properties.iter().find(|property| property.name == "timestamp");
    (info.identity.modification, info.identity.cid, time.map(|property| property.value.clone()))
}

/// I5, for every format: no two guest ranges live in the same bytes, and all bytes lie inside the file. (A file may
/// end inside the last unit of a disk.)
pub fn overlap(disk: &Disk) -> Result<Option<String>> {
    let mut places: Vec<(usize, Range<u64>, u64)> = Vec::new();
    let mut at = 0;
    while at < disk.size() {
        let found = block_on(disk.lookup(at..disk.size()))?;
        let len = found.range.end - found.range.start;
        if let (0, Extent::Raw { storage, offset }) = (found.layer, &found.extent) {
            places.push((*storage, *offset..offset + len, found.range.start));
        }
        at = found.range.end;
    }
    places.sort_unstable_by_key(|(storage, host, _)| (*storage, host.start));
    for pair in places.windows(2) {
        if pair[0].0 == pair[1].0 && pair[1].1.start < pair[0].1.end {
            return Ok(Some(format!(
                "guest bytes at {:#x} and at {:#x} live in the same place ({:#x?} and {:#x?})",
                pair[0].2, pair[1].2, pair[0].1, pair[1].1
            )));
        }
    }
    for (storage, host, guest) in &places {
        let len = disk.storage(0, *storage)?.len()?;
        if host.end > len {
            return Ok(Some(format!(
                "guest bytes at {guest:#x} live past the end of the file: {host:#x?} of {len:#x}"
            )));
        }
    }
    Ok(None)
}
