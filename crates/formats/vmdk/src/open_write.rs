//! Whether a disk can be written, and what its writer must know beforehand. Changes nothing.

use crate::alloc::Space;
use crate::audit;
use crate::descriptor::Descriptor;
use crate::extent::{Kind, SparseExtent};
use crate::header::SECTOR;
use crate::image::{Part, Source};
use crate::problem;
use crate::session::ContentIdentity;
use crate::write::Writer;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use vellum_core::bytes::{add, mul, sub};
use vellum_core::{Code, Committer, Error, ImageInfo, Limits, OpenRequest, Result, Storage};

/// Entries of a directory that are looked at in one go.
const STEP: u64 = 4096;

/// Prepares for writing, or says why it cannot be.
pub(crate) async fn prepare(
    (request, descriptor, info): (&OpenRequest, &Descriptor, &ImageInfo),
    parts: &mut [Part],
    storages: &[Arc<dyn Storage>],
) -> Result<Writer> {
    check_descriptor(request, descriptor)?;
    let mut spaces = Vec::new();
    let mut written: Vec<usize> = Vec::new();
    let mut is_any_writable = false;
    for part in parts.iter_mut() {
        let mut space = None;
        match &mut part.source {
            _ if part.is_read_only => {}
            Source::Flat { storage, .. } => written.push(*storage),
            Source::Sparse(extent) => {
                let storage = storages.get(extent.file).ok_or_else(not_opened)?;
                space = Some(prepare_sparse(extent, storage.as_ref(), &request.limits).await?);
                written.push(extent.file);
            }
            Source::Zero => is_any_writable = true,
            Source::NoAccess => {}
            Source::Closed(_) => return Err(not_opened()),
        }
        spaces.push(space);
    }
    written.sort_unstable();
    written.dedup();
    let written: Vec<Arc<dyn Storage>> =
        written.iter().filter_map(|number| storages.get(*number).cloned()).collect();
    if written.is_empty() && !is_any_writable && !parts.is_empty() {
        return Err(Error::new(Code::Permission, "the descriptor forbids writing to every extent")
            .hint("open the disk for reading, or make a child of it and write there"));
    }
    for storage in written.iter().chain([&request.storage]) {
        if storage.limits().read_only {
            return Err(Error::new(Code::Permission, "the file cannot be written")
                .image(storage.name())
                .hint("open the disk for reading, or change the permissions of its files"));
        }
    }
    Ok(Writer {
        committer: Committer::default(),
        storages: written,
        spaces,
        identity: ContentIdentity::of(descriptor, request.storage.clone()),
        providers: request.providers.clone(),
        has_parent: info.parent.is_some(),
        skip_consistency_checks: request.skip_consistency_checks,
        keeps_marks: AtomicBool::new(false),
        entries: Mutex::new(()),
        told: OnceLock::new(),
    })
}

#[cold]
fn not_opened() -> Error {
    Error::new(Code::Usage, "an image that is opened without its extents cannot be written")
}

fn check_descriptor(request: &OpenRequest, descriptor: &Descriptor) -> Result<()> {
    if !request.open_parts {
        return Err(not_opened());
    }
    if descriptor.pairs.is_empty() {
        return Err(Error::new(
            Code::Permission,
            "the file has no descriptor: it may be one extent of a larger disk, whose content id must change with it",
        )
        .hint("open the disk's descriptor for writing; if it is lost, convert the file to a new disk"));
    }
    if let Some(path) = descriptor.get("changeTrackPath") {
        return Err(Error::new(
            Code::Feature,
            "the disk's changes are tracked, and the tracking file would be wrong",
        )
        .field("changeTrackPath")
        .found(path)
        .hint("switch changed block tracking off in the product that made the disk, or convert the disk"));
    }
    Ok(())
}

/// Whether a sparse extent can be written; what must be known of it.
async fn prepare_sparse(extent: &mut SparseExtent, storage: &dyn Storage, limits: &Limits) -> Result<Space> {
    let name = extent.name.clone();
    let prepared = async {
        check_kind(extent)?;
        extent.reserved = tables_among_grains(extent, storage, limits).await?;
        Space::new(extent, extent.file_len(), storage.limits().resizable)
    };
    prepared.await.map_err(|error| error.image(name))
}

fn check_kind(extent: &SparseExtent) -> Result<()> {
    let refuse = |what: &str| {
        Err(Error::new(Code::Feature, format!("{what} cannot be written in place"))
            .hint("convert it to a monolithicSparse disk (or another kind) and write there"))
    };
    match extent.kind {
        Kind::Cowd => return refuse("an ESX sparse (COWD) extent"),
        Kind::SeSparse { .. } => return refuse("a seSparse extent (its journal is not public)"),
        Kind::Hosted { .. } if extent.framing.is_some() => return refuse("a streamOptimized disk"),
        Kind::Hosted { .. } => {}
    }
    if extent.version > 2 {
        return Err(problem(
            Code::Feature,
            "a disk whose changes are tracked cannot be written in place",
            "version",
            4,
        )
        .found(extent.version)
        .allowed("1, 2")
        .hint("switch changed block tracking off in the product that made the disk, or convert the disk"));
    }
    if !extent.has_sound_directories {
        return Err(problem(Code::Corrupt, "one of the two grain directories is lost", "gdOffset", 56)
            .hint("`vellum repair` restores it from the other one"));
    }
    Ok(())
}

/// Looks at all directory entries: every table has its own place. Returns those that stand where grains may.
async fn tables_among_grains(
    extent: &SparseExtent,
    storage: &dyn Storage,
    limits: &Limits,
) -> Result<Vec<Range<u64>>> {
    let count = extent.tables()?;
    let bytes = mul(count, 4)?;
    if bytes > limits.table_bytes {
        return Err(problem(
            Code::TableLimit,
            "the grain directory is too large to be written",
            "capacity",
            12,
        )
        .found(format!("{bytes} bytes"))
        .allowed(format!("up to {} bytes", limits.table_bytes))
        .hint("raise the limit `table_bytes` if you trust the file"));
    }
    let header = 0..SECTOR;
    let mut places = vec![header];
    for directory in [Some(extent.gd), extent.rgd].into_iter().flatten() {
        places.push(directory..add(directory, bytes)?);
        let mut first = 0;
        while first < count {
            let step = STEP.min(sub(count, first)?);
            let entries = audit::directory(extent, storage, directory, first, step).await?;
            for (number, value) in (first..).zip(entries) {
                let at = add(directory, mul(number, 4)?)?;
                if let Some(place) = extent.table_place(value).map_err(|error| damaged(error.at(at)))? {
                    places.push(place..add(place, extent.table_bytes()?)?);
                }
            }
            first = add(first, step)?;
        }
    }
    places.sort_unstable_by_key(|range| (range.start, range.end));
    for (one, next) in places.iter().zip(places.iter().skip(1)) {
        if next.start < one.end {
            let error =
                problem(Code::Overlap, "two tables stand on the same bytes", "grain directory entry", 0);
            return Err(damaged(error.at(next.start).found(format!("byte {:#x}", next.start))));
        }
    }
    places.retain(|range| range.end > extent.data_start);
    Ok(places)
}

#[cold]
fn damaged(error: Error) -> Error {
    error
        .hint("`vellum check` tells more, `vellum repair` may mend it; the disk can still be opened for reading")
        .context("looking at the grain directories before writing")
}
