//! Opening an image: header, extensions, the files that it names.

use crate::extensions::{self, Extensions};
use crate::header::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA, COMPAT_LAZY_REFCOUNTS, COMPRESSION_ZSTD, Header, INCOMPAT_CORRUPT,
    INCOMPAT_DIRTY, INCOMPAT_KNOWN,
};
use crate::map::Qcow2Image;
use crate::snapshot;
use crate::snapshots;
use crate::write::SessionOptions;
use std::sync::Arc;
use vellum_core::storage::read_vec;
use vellum_core::{
    Access, Asker, Code, Error, Image, ImageInfo, OpenRequest, ParentHint, ParentRef, Result, Storage,
    TableCache, Value, bytes,
};

/// Longest backing file name.
const BACKING_NAME_MAX: u32 = 1023;

pub(crate) async fn open(request: OpenRequest) -> Result<Arc<dyn Image>> {
    let main = &request.storage;
    let file_len = main.len()?;
    let head = read_vec(main.as_ref(), 0, bytes::index(file_len.min(112))?).await?;
    let header = Header::read(&head, file_len, &request.limits)?;
    let cluster_0 = read_vec(main.as_ref(), 0, bytes::index(file_len.min(header.cluster()))?).await?;
    let extensions = Extensions::read(&header, &cluster_0)?;
    refuse_unknown_features(&header, &extensions)?;
    let header = match &request.snapshot {
        Some(wanted) if !request.write => {
            snapshots::as_of(main.as_ref(), &header, &request.limits, wanted).await?
        }
        Some(_) => return Err(snapshots::read_only_state()),
        None => header,
    };
    let mut info = describe(&request, &header, &extensions);
    info.parent = parent(&header, &extensions, &cluster_0)?;
    for mark in info.dirty.iter().chain(&info.warnings) {
        request.events.warn(&format!("{}: {mark}", request.location));
    }
    let snapshots = snapshot::snapshots(main.as_ref(), &header, file_len, &request.limits).await?;
    if !snapshots.is_empty() {
        info.besides.push(counted(snapshots.len(), "internal snapshot"));
        info.property("snapshots", Value::List(snapshots));
    }
    let are_kept = header.autoclear & AUTOCLEAR_BITMAPS != 0;
    if let Some(bitmaps) = extensions.bitmaps {
        match snapshot::bitmaps(main.as_ref(), &header, bitmaps, file_len).await {
            Ok(listed) => {
                info.besides.push(counted(listed.len(), "persistent bitmap"));
                info.property("bitmaps", Value::List(listed));
            }
            // Where a program did not keep them, their space may be anything by now.
            Err(_) if !are_kept => {}
            Err(error) => return Err(error),
        }
    }
    if request.write {
        refuse_marks(&request, &header)?;
    }
    let mut storages = vec![main.clone()];
    if header.has_data_file() {
        storages.extend(data_file(&request, &extensions, &mut info).await?);
    }
    let codec = match header.compression_type {
        COMPRESSION_ZSTD => vellum_codec::zstd(None)?,
        _ => vellum_codec::deflate(None)?,
    };
    let tables = TableCache::new(main.clone(), request.limits.table_cache_bytes);
    let bitmaps = extensions.bitmaps.filter(|_| are_kept);
    let is_dirty = header.incompatible & INCOMPAT_DIRTY != 0;
    let image = Qcow2Image::new(header, info, storages, tables, codec)?;
    if !request.write {
        return Ok(Arc::new(image));
    }
    let options = SessionOptions {
        bitmaps,
        events: request.events,
        limits: request.limits,
        recount: is_dirty && !request.skip_consistency_checks,
    };
    Ok(Arc::new(image.for_writing(options)?))
}

/// An image that says "repair me first" is not written. A dirty one is: its refcounts are counted anew before the first
/// write.
fn refuse_marks(request: &OpenRequest, header: &Header) -> Result<()> {
    if header.has_data_file() && !request.open_parts {
        return Err(Error::new(Code::Usage, "an image with a data file cannot be written without it"));
    }
    if header.incompatible & INCOMPAT_CORRUPT == 0 || request.skip_consistency_checks {
        return Ok(());
    }
    Err(Error::new(Code::CorruptFlag, "the image is marked corrupt: writing could destroy more")
        .field("incompatible_features")
        .at(72)
        .found(format!("{:#x}", header.incompatible))
        .allowed("bit 1 clear")
        .hint("`vellum repair` mends it; it can be read as it is"))
}

fn refuse_unknown_features(header: &Header, extensions: &Extensions) -> Result<()> {
    let unknown = header.incompatible & !INCOMPAT_KNOWN;
    if unknown == 0 {
        return Ok(());
    }
    let names: Vec<String> =
        (0..64).filter(|bit| unknown & (1u64 << bit) != 0).map(|bit| extensions.feature(0, bit)).collect();
    Err(Error::new(Code::Feature, "the image needs features that are not implemented")
        .field("incompatible_features")
        .at(72)
        .found(names.join(", "))
        .allowed("bits 0 to 4")
        .hint("a newer version of the tool that wrote the image may know them"))
}

fn parent(header: &Header, extensions: &Extensions, cluster_0: &[u8]) -> Result<Option<ParentRef>> {
    if header.backing_file_offset == 0 {
        return Ok(None);
    }
    if !(1..=BACKING_NAME_MAX).contains(&header.backing_file_size) {
        return Err(crate::header::field(
            Code::Range,
            "the length of the backing file name is out of range",
            "backing_file_size",
            16,
            header.backing_file_size.into(),
            format!("1 to {BACKING_NAME_MAX}"),
        ));
    }
    let start = bytes::index(header.backing_file_offset)?;
    let name = start
        .checked_add(bytes::index(header.backing_file_size.into())?)
        .and_then(|end| cluster_0.get(start..end))
        .filter(|_| header.backing_file_offset >= header.header_length.into());
    let Some(name) = name else {
        return Err(crate::header::field(
            Code::OutOfFile,
            "the backing file name does not lie in the first cluster",
            "backing_file_offset",
            8,
            header.backing_file_offset,
            format!("{} to {}", header.header_length, header.cluster()),
        ));
    };
    if header.autoclear & AUTOCLEAR_RAW_DATA != 0 && header.has_data_file() {
        return Err(crate::header::field(
            Code::Corrupt,
            "an image whose data file is raw cannot have a backing file",
            "backing_file_offset",
            8,
            header.backing_file_offset,
            0,
        ));
    }
    if name.contains(&0) {
        return Err(Error::new(Code::NulInName, "the backing file name holds a NUL byte")
            .field("backing_file_name")
            .at(header.backing_file_offset)
            .found(String::from_utf8_lossy(name))
            .hint("the image was damaged or made to mislead; do not use it"));
    }
    let place = String::from_utf8(name.to_vec()).map_err(|_| {
        Error::new(Code::Range, "the backing file name is not UTF-8")
            .field("backing_file_name")
            .at(header.backing_file_offset)
            .found(String::from_utf8_lossy(name))
            .hint("name the parent with --parent FILE")
    })?;
    Ok(Some(ParentRef {
        hints: vec![ParentHint { field: "backing_file", place }],
        format: extensions.backing_format.clone(),
        ..ParentRef::default()
    }))
}

async fn data_file(
    request: &OpenRequest,
    extensions: &Extensions,
    info: &mut ImageInfo,
) -> Result<Option<Arc<dyn Storage>>> {
    let Some(name) = &extensions.data_file else {
        return Err(Error::new(
            Code::Corrupt,
            "the image keeps its data in another file but does not name it",
        )
        .field(format!("header extension {:#010x}", extensions::DATA_FILE))
        .at(72)
        .found("no such extension")
        .allowed("a file name")
        .hint("the header is damaged; restore the image from a backup"));
    };
    info.files.push(name.clone());
    if !request.open_parts {
        return Ok(None);
    }
    let asker = Asker::Part { of: request.location.clone() };
    let opened = request
        .resolver
        .open(name, &asker, Access { write: request.write, ..request.access })
        .await
        .map_err(|e| {
            e.field("external data file name")
                .found(name)
                .context(format!("opening the data file of {}", request.location))
        })?;
    if opened.storage.id().is_some() && opened.storage.id() == request.storage.id() {
        return Err(Error::new(Code::Cycle, "the image names itself as its data file")
            .field("external data file name")
            .at(72)
            .found(name)
            .hint("the image was damaged or made to mislead; do not use it"));
    }
    Ok(Some(opened.storage))
}

fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

fn describe(request: &OpenRequest, header: &Header, extensions: &Extensions) -> ImageInfo {
    let mut info = ImageInfo {
        format: "qcow2",
        variant: format!("v{}", header.version),
        name: request.location.0.clone(),
        virtual_size: header.size,
        block_size: header.cluster(),
        ..ImageInfo::default()
    };
    let marks =
        [(INCOMPAT_CORRUPT, "marked corrupt"), (INCOMPAT_DIRTY, "marked dirty: its refcounts may be stale")];
    let set: Vec<&str> =
        marks.iter().filter(|(bit, _)| header.incompatible & bit != 0).map(|(_, text)| *text).collect();
    if !set.is_empty() {
        info.dirty = Some(format!("the image is {}", set.join(" and ")));
    }
    info.property("version", header.version);
    info.property("compat", if header.version == 2 { "0.10" } else { "1.1" });
    info.property("cluster_size", Value::Bytes(header.cluster()));
    info.property("refcount_bits", 1u32.checked_shl(header.refcount_order).unwrap_or(0));
    info.property(
        "compression_type",
        if header.compression_type == COMPRESSION_ZSTD { "zstd" } else { "zlib" },
    );
    info.property("extended_l2", header.extended_l2());
    info.property("lazy_refcounts", header.compatible & COMPAT_LAZY_REFCOUNTS != 0);
    info.property("l1_size", header.l1_size);
    if header.has_data_file() {
        info.property("data_file_raw", header.autoclear & AUTOCLEAR_RAW_DATA != 0);
    }
    if let Some(name) = &extensions.data_file {
        // Named but not in use is worth knowing too.
        info.property("data_file", name.as_str());
    }
    if let Some(format) = &extensions.backing_format {
        info.property("backing_format", format.as_str());
    }
    let unknown = |kind, mask: u64| -> Vec<Value> {
        (0..64)
            .filter(|bit| mask & (1u64 << bit) != 0)
            .map(|bit| Value::Text(extensions.feature(kind, bit)))
            .collect()
    };
    let compatible = unknown(1, header.compatible & !COMPAT_LAZY_REFCOUNTS);
    if !compatible.is_empty() {
        info.property("unknown_compatible_features", Value::List(compatible));
    }
    let autoclear = unknown(2, header.autoclear & !(AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA));
    if !autoclear.is_empty() {
        info.property("unknown_autoclear_features", Value::List(autoclear));
    }
    if !extensions.unknown.is_empty() {
        let list = extensions.unknown.iter().map(|kind| Value::Text(format!("{kind:#010x}"))).collect();
        info.property("unknown_header_extensions", Value::List(list));
    }
    if extensions.bitmaps.is_some() && header.autoclear & AUTOCLEAR_BITMAPS == 0 {
        info.warnings.push("the persistent bitmaps are stale: a writer did not keep them".to_owned());
    }
    info
}
