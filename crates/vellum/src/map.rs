//! `map`: which layer and which offset each range of a disk comes from.

use std::ops::Range;
use vellum_core::{Disk, Extent, Result, block_on};

/// One range of a disk and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// The guest range in bytes.
    pub range: Range<u64>,
    /// Index of the layer that answers, 0 = the top image.
    pub layer: usize,
    /// What is there.
    pub kind: MapKind,
    /// File that holds it, and the byte offset there.
    pub place: Option<(String, u64)>,
}

/// What a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// Data as it is.
    Data,
    /// Data in a hole of the image's file: reads as zeros.
    Hole,
    /// Compressed data; neighbouring blocks are one entry, the place is that of the first.
    Compressed,
    /// Marked as zero in that layer.
    Zero,
    /// In no layer: reads as zeros.
    Absent,
}

impl MapKind {
    /// The word that people and scripts see.
    pub fn as_str(self) -> &'static str {
        match self {
            MapKind::Data => "data",
            MapKind::Hole => "hole",
            MapKind::Compressed => "compressed",
            MapKind::Zero => "zero",
            MapKind::Absent => "absent",
        }
    }
}

/// Calls `each` for every entry of the map of `disk`, joined where they continue each other.
pub(crate) fn map(disk: &Disk, mut each: impl FnMut(MapEntry) -> Result<()>) -> Result<()> {
    let mut at = 0;
    let mut held: Option<MapEntry> = None;
    while at < disk.size() {
        let found = block_on(disk.lookup(at..disk.size()))?;
        at = found.range.end;
        for entry in entries(disk, found.range, found.layer, found.extent)? {
            match &mut held {
                Some(last) if continues(last, &entry) => last.range.end = entry.range.end,
                _ => {
                    if let Some(done) = held.replace(entry) {
                        each(done)?;
                    }
                }
            }
        }
    }
    held.map_or(Ok(()), each)
}

fn entries(disk: &Disk, range: Range<u64>, layer: usize, extent: Extent) -> Result<Vec<MapEntry>> {
    let one = |kind, place| Ok(vec![MapEntry { range: range.clone(), layer, kind, place }]);
    match extent {
        Extent::Zero => one(MapKind::Zero, None),
        Extent::Parent => one(MapKind::Absent, None),
        Extent::Encoded(encoded) => {
            let name = disk.storage(layer, encoded.storage)?.name().to_owned();
            one(MapKind::Compressed, Some((name, encoded.offset)))
        }
        Extent::Raw { storage, offset } => {
            let storage = disk.storage(layer, storage)?;
            let name = storage.name().to_owned();
            if !storage.limits().knows_holes {
                return one(MapKind::Data, Some((name, offset)));
            }
            let (mut found, mut done) = (Vec::new(), 0);
            let len = range.end - range.start;
            while done < len {
                for (part, status) in block_on(storage.status(offset + done..offset + len))? {
                    let guest = range.start + (part.start - offset)..range.start + (part.end - offset);
                    let kind = match status {
                        vellum_core::Status::Data => MapKind::Data,
                        vellum_core::Status::Hole => MapKind::Hole,
                    };
                    done = part.end - offset;
                    found.push(MapEntry {
                        range: guest,
                        layer,
                        kind,
                        place: Some((name.clone(), part.start)),
                    });
                }
            }
            Ok(found)
        }
    }
}

fn continues(last: &MapEntry, next: &MapEntry) -> bool {
    if last.kind != next.kind || last.layer != next.layer || last.range.end != next.range.start {
        return false;
    }
    match (&last.place, &next.place) {
        (None, None) => true,
        (Some((a, at)), Some((b, next_at))) => {
            a == b
                && (last.kind == MapKind::Compressed || at + (last.range.end - last.range.start) == *next_at)
        }
        _ => false,
    }
}

impl crate::Vellum {
    /// Calls `each` for every entry of the map of `disk`: the cost follows what is allocated, not the disk's size.
    pub fn map(&self, disk: &Disk, each: impl FnMut(MapEntry) -> Result<()>) -> Result<()> {
        map(disk, each)
    }
}
