//! What a disk says of itself.

use crate::descriptor::{Descriptor, ExtentAccess, ExtentKind, ExtentLine};
use crate::header::SparseExtentHeader;
use crate::{NAME, problem};
use vellum_core::bytes::mul;
use vellum_core::{
    Chs, Code, Identity, ImageInfo, OpenRequest, ParentHint, ParentRef, Printable, Result, Value,
};

/// `parentCID` of a disk without parent.
const NO_PARENT: u32 = 0xffff_ffff;
/// Extents that are listed as properties.
const EXTENTS_LISTED: usize = 64;

/// What opening found out besides the descriptor.
pub(crate) struct Facts {
    pub header: Option<SparseExtentHeader>,
    pub size: u64,
    pub grain: Option<u64>,
    /// The disk is in the file that was named.
    pub embedded: bool,
    pub compressed: bool,
}

/// The keys that have properties of their own, in the order in which they are listed.
const KEYS: &[&str] = &[
    "version",
    "encoding",
    "CID",
    "parentCID",
    "isNativeSnapshot",
    "createType",
    "parentFileNameHint",
    "changeTrackPath",
    "ddb.virtualHWVersion",
    "ddb.adapterType",
    "ddb.geometry.cylinders",
    "ddb.geometry.heads",
    "ddb.geometry.sectors",
    "ddb.geometry.biosCylinders",
    "ddb.geometry.biosHeads",
    "ddb.geometry.biosSectors",
    "ddb.uuid",
    "ddb.uuid.image",
    "ddb.uuid.modification",
    "ddb.uuid.parent",
    "ddb.uuid.parentmodification",
    "ddb.longContentID",
    "ddb.thinProvisioned",
    "ddb.deletable",
    "ddb.encoding",
    "ddb.toolsVersion",
    "ddb.toolsInstallType",
    "ddb.comment",
];

/// Describes a disk from its descriptor.
pub(crate) fn describe(
    request: &OpenRequest,
    descriptor: &Descriptor,
    facts: Facts,
    warnings: Vec<String>,
) -> Result<ImageInfo> {
    check_version(descriptor)?;
    let mut info = ImageInfo {
        format: NAME,
        variant: descriptor.get("createType").unwrap_or("(no descriptor)").to_owned(),
        name: request.location.0.clone(),
        virtual_size: facts.size,
        block_size: facts.grain.unwrap_or(0),
        parent: parent(descriptor)?,
        identity: Identity {
            uuid: descriptor.uuid("ddb.uuid.image")?,
            modification: descriptor.uuid("ddb.uuid.modification")?,
            cid: descriptor.content_id("CID")?,
        },
        comment: descriptor.comment(),
        pchs: geometry(descriptor, ["cylinders", "heads", "sectors"]),
        lchs: geometry(descriptor, ["biosCylinders", "biosHeads", "biosSectors"]),
        files: files(descriptor, facts.embedded),
        warnings,
        ..ImageInfo::default()
    };
    if info.virtual_size == 0 {
        info.warnings.push("the disk is empty".to_owned());
    }
    if facts.header.is_some_and(|header| header.unclean_shutdown != 0) {
        info.dirty = Some("the disk was not closed cleanly (uncleanShutdown is set)".to_owned());
    }
    keys(&mut info, descriptor);
    if let Some(header) = facts.header {
        header_fields(&mut info, &header);
    }
    if facts.compressed {
        info.property("compressed", true);
    }
    extents(&mut info, &descriptor.extents)?;
    Ok(info)
}

fn check_version(descriptor: &Descriptor) -> Result<()> {
    let Some(pair) = descriptor.pair("version") else { return Ok(()) };
    if matches!(pair.value.as_str(), "1" | "2" | "3") {
        return Ok(());
    }
    Err(problem(Code::Version, "a version of the descriptor that is not known", "version", pair.at)
        .found(&pair.value)
        .allowed("1 to 3")
        .hint("convert the disk with the product that wrote it"))
}

/// The parent by content id and name (VMware, QEMU), by UUID (VirtualBox), or both.
fn parent(descriptor: &Descriptor) -> Result<Option<ParentRef>> {
    let cid = descriptor.content_id("parentCID")?.filter(|cid| *cid != NO_PARENT);
    let uuid = descriptor.uuid("ddb.uuid.parent")?;
    if cid.is_none() && uuid.is_none() {
        return Ok(None);
    }
    let place = descriptor.get("parentFileNameHint");
    let hints = place.map(|place| ParentHint { field: "parentFileNameHint", place: place.to_owned() });
    let modification = uuid.map_or(Ok(None), |_| descriptor.uuid("ddb.uuid.parentmodification"))?;
    Ok(Some(ParentRef {
        hints: hints.into_iter().collect(),
        // Only a VMDK has a content id; VirtualBox links images of different formats by UUID.
        format: (uuid.is_none()).then(|| NAME.to_owned()),
        expected: Identity { uuid, modification, cid },
        ..ParentRef::default()
    }))
}

fn geometry(descriptor: &Descriptor, keys: [&str; 3]) -> Option<Chs> {
    let [cylinders, heads, sectors] = keys.map(|key| descriptor.small_number(&format!("ddb.geometry.{key}")));
    let chs = Chs { cylinders: cylinders?, heads: heads?, sectors: sectors? };
    // VirtualBox writes zeros for "not set".
    (chs.cylinders != 0 && chs.heads != 0 && chs.sectors != 0).then_some(chs)
}

fn files(descriptor: &Descriptor, embedded: bool) -> Vec<String> {
    let mut own = embedded;
    let mut names: Vec<String> = Vec::new();
    for line in &descriptor.extents {
        if own && matches!(line.kind, ExtentKind::Sparse | ExtentKind::VmfsSparse | ExtentKind::SeSparse) {
            own = false;
            continue;
        }
        if let Some(name) = line.name.as_ref().filter(|_| line.kind != ExtentKind::Zero) {
            names.push(name.clone());
        }
    }
    let mut seen = std::collections::HashSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names.extend(descriptor.get("changeTrackPath").map(str::to_owned));
    names
}

fn keys(info: &mut ImageInfo, descriptor: &Descriptor) {
    for key in KEYS {
        if let Some(value) = descriptor.get(key) {
            info.property(key, value);
        }
    }
    let known = |name: &str| KEYS.iter().any(|key| key.eq_ignore_ascii_case(name));
    let others: Vec<Value> = descriptor
        .pairs
        .iter()
        .filter(|pair| !known(&pair.key))
        .map(|pair| Value::Text(format!("{} = {}", pair.key, Printable(&pair.value))))
        .collect();
    if !others.is_empty() {
        info.property("other keys", Value::List(others));
    }
}

fn header_fields(info: &mut ImageInfo, header: &SparseExtentHeader) {
    info.property("header.version", header.version.get());
    info.property("header.flags", format!("{:#x}", header.flags.get()));
    info.property("header.capacity", header.capacity.get());
    info.property("header.grainSize", header.grain_size.get());
    info.property("header.descriptorOffset", header.descriptor_offset.get());
    info.property("header.descriptorSize", header.descriptor_size.get());
    info.property("header.numGTEsPerGT", header.num_gtes_per_gt.get());
    info.property("header.rgdOffset", header.rgd_offset.get());
    info.property("header.gdOffset", header.gd_offset.get());
    info.property("header.overHead", header.over_head.get());
    info.property("header.uncleanShutdown", header.unclean_shutdown != 0);
    info.property("header.compressAlgorithm", u32::from(header.compress_algorithm.get()));
}

fn extents(info: &mut ImageInfo, lines: &[ExtentLine]) -> Result<()> {
    let mut listed = Vec::new();
    for line in lines.iter().take(EXTENTS_LISTED) {
        let access = match line.access {
            ExtentAccess::ReadWrite => "RW",
            ExtentAccess::ReadOnly => "RDONLY",
            ExtentAccess::NoAccess => "NOACCESS",
        };
        let mut record = vec![
            ("access", Value::from(access)),
            ("size", Value::Bytes(mul(line.sectors, crate::header::SECTOR)?)),
            ("type", Value::from(line.kind.word())),
        ];
        if let Some(name) = &line.name {
            record.push(("file", Value::from(name.as_str())));
        }
        if line.offset != 0 {
            record.push(("offset", Value::Bytes(mul(line.offset, crate::header::SECTOR)?)));
        }
        listed.push(Value::Record(record));
    }
    if !listed.is_empty() {
        info.property("extents", Value::List(listed));
    }
    if lines.len() > EXTENTS_LISTED {
        info.property("extents in all", vellum_core::bytes::wide(lines.len()));
    }
    Ok(())
}
