//! New disks: options, names, geometry, and which writer lays them out.
//!
//! A disk is made in sectors: a size that is no multiple of 512 is rounded up, and the rest reads as zeros.

use crate::child;
use crate::descriptor::ExtentKind;
use crate::flat::FlatWriter;
use crate::header::SECTOR;
use crate::print::{Dialect, NewDescriptor, NewExtent};
use crate::sparse::SparseWriter;
use crate::stream::StreamWriter;
use vellum_core::bytes::{add, align_up, div, div_ceil, mul, narrow, rem, sub};
use vellum_core::{
    Chs, Code, CreateRequest, Error, ImageWriter, OptionKind, OptionSpec, Output, Result, geometry,
};

/// The options that `create` takes.
pub(crate) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "subformat",
        kind: OptionKind::OneOf(&[
            "monolithicSparse",
            "monolithicFlat",
            "twoGbMaxExtentSparse",
            "twoGbMaxExtentFlat",
            "streamOptimized",
            "vmfs",
        ]),
        default: "monolithicSparse",
        expert: false,
        help: "kind of VMDK; with compression the default is streamOptimized",
    },
    OptionSpec {
        name: "adapter_type",
        kind: OptionKind::OneOf(&["ide", "buslogic", "lsilogic", "legacyESX"]),
        default: "ide",
        expert: false,
        help: "controller that the disk is meant for",
    },
    OptionSpec {
        name: "hwversion",
        kind: OptionKind::Number { min: 3, max: 99 },
        default: "4",
        expert: false,
        help: "virtual hardware version",
    },
    OptionSpec {
        name: "zeroed_grain",
        kind: OptionKind::Flag,
        default: "off",
        expert: false,
        help: "let zeroed grains be marked (header version 2, which VirtualBox refuses)",
    },
    OptionSpec {
        name: "dialect",
        kind: OptionKind::OneOf(&["vmware", "virtualbox"]),
        default: "vmware",
        expert: false,
        help: "whose keys the descriptor has: virtualbox adds UUIDs, by which its snapshots find their parents",
    },
    OptionSpec {
        name: "toolsversion",
        kind: OptionKind::Number { min: 0, max: 0xffff_ffff },
        default: "2147483647",
        expert: true,
        help: "VMware Tools version",
    },
    OptionSpec {
        name: "extent_size",
        kind: OptionKind::Size { min: 1 << 20, max: 1 << 40 },
        default: "2047M",
        expert: true,
        help: "size of each file of a split disk, a multiple of 1 MiB",
    },
    OptionSpec {
        name: "grain_size",
        kind: OptionKind::Size { min: 4096, max: 1 << 20 },
        default: "64k",
        expert: true,
        help: "allocation unit of sparse disks, a power of two (other tools expect 64 KiB)",
    },
];

/// Bytes of a file of a split disk: 4192256 sectors, as VMware and VirtualBox do it.
const EXTENT_BYTES: u64 = 2047 << 20;
/// Extents of a new disk: what our own limit lets in again.
const EXTENTS_MAX: u64 = 4096;
/// Sectors that a sparse extent can address with 32-bit table entries.
pub(crate) const SPARSE_SECTORS_MAX: u64 = 1 << 32;
/// Flat extents are placed in blocks of this size; every size of extent is a multiple of it.
pub(crate) const FLAT_BLOCK: u64 = 1 << 20;

/// What is to be made.
pub(crate) struct Plan {
    pub output: Output,
    /// Bytes, a multiple of 512.
    pub size: u64,
    /// Bytes of each extent but the last.
    pub extent_bytes: u64,
    pub grain: u64,
    pub zeroed_grain: bool,
    pub level: Option<i32>,
    pub descriptor: NewDescriptor,
}

/// Begins a new disk.
pub(crate) async fn create(request: CreateRequest) -> Result<Box<dyn ImageWriter>> {
    let chosen = request.options.given("subformat");
    let default = if request.compress { "streamOptimized" } else { "monolithicSparse" };
    let subformat = chosen.unwrap_or(default).to_owned();
    let stream = subformat == "streamOptimized";
    if (request.compress || request.level.is_some()) && !stream {
        return Err(Error::new(Code::Usage, "of the kinds of VMDK only streamOptimized can be compressed")
            .found(format!("subformat={subformat} with compression"))
            .allowed("subformat=streamOptimized")
            .hint("leave out the compression, or the subformat"));
    }
    let plan = plan(request, &subformat)?;
    match subformat.as_str() {
        "streamOptimized" => Ok(Box::new(StreamWriter::begin(plan).await?)),
        "monolithicFlat" | "twoGbMaxExtentFlat" | "vmfs" => Ok(Box::new(FlatWriter::begin(plan).await?)),
        _ => Ok(Box::new(SparseWriter::begin(plan).await?)),
    }
}

fn plan(request: CreateRequest, subformat: &str) -> Result<Plan> {
    let options = &request.options;
    let dialect =
        if options.text("dialect", "vmware") == "virtualbox" { Dialect::VirtualBox } else { Dialect::VMware };
    let sparse = matches!(subformat, "monolithicSparse" | "twoGbMaxExtentSparse");
    let split = subformat.starts_with("twoGb");
    let size = align_up(request.virtual_size, SECTOR)?;
    let grain = options.number("grain_size", 64 << 10);
    check_grain(grain, subformat == "streamOptimized")?;
    let extent_bytes =
        if split { split_size(options.number("extent_size", EXTENT_BYTES))? } else { size.max(1) };
    let zeroed_grain = options.flag("zeroed_grain", false);
    check_zeroed(zeroed_grain, sparse, dialect)?;
    if !matches!(subformat, "monolithicFlat" | "twoGbMaxExtentFlat" | "vmfs") {
        check_sparse_size(size.min(extent_bytes))?;
    }
    let (create_type, kind) = match subformat {
        "monolithicFlat" => ("monolithicFlat", ExtentKind::Flat),
        "twoGbMaxExtentFlat" => ("twoGbMaxExtentFlat", ExtentKind::Flat),
        "twoGbMaxExtentSparse" => ("twoGbMaxExtentSparse", ExtentKind::Sparse),
        "streamOptimized" => ("streamOptimized", ExtentKind::Sparse),
        "vmfs" => ("vmfs", ExtentKind::Vmfs),
        _ => ("monolithicSparse", ExtentKind::Sparse),
    };
    let extents = extents(&request.output.file_name(), kind, split, size, extent_bytes)?;
    let adapter_type = options.text("adapter_type", "ide").to_owned();
    let sectors = div(size, SECTOR)?;
    let virtualbox = dialect == Dialect::VirtualBox;
    let physical = if virtualbox || adapter_type == "ide" {
        geometry::pchs(sectors, request.traits.pchs)
    } else {
        scsi_geometry(sectors)?
    };
    let providers = &request.providers;
    let cid = content_id(providers.random_u64());
    let content_id = [providers.random_u64(), (providers.random_u64() & !0xffff_ffff) | u64::from(cid)];
    let (uuid, modification) = (providers.random_uuid(), providers.random_uuid());
    let parent = match &request.parent {
        Some(parent) => Some(child::link(parent, dialect, subformat)?),
        None => None,
    };
    let has_uuids = virtualbox || parent.as_ref().is_some_and(|parent| parent.uuids.is_some());
    let uuid = request.traits.uuid.or(has_uuids.then_some(uuid));
    let descriptor = NewDescriptor {
        dialect,
        create_type,
        cid,
        extents,
        hw_version: options.text("hwversion", "4").to_owned(),
        tools_version: options.text("toolsversion", "2147483647").to_owned(),
        adapter_type,
        geometry: physical,
        // Only what was handed over: a made-up one would keep VirtualBox from reading it off the partition table.
        bios: request.traits.lchs.map(|lchs| geometry::lchs(sectors, Some(lchs))),
        uuid,
        modification: uuid.map(|_| modification),
        content_id,
        comment: request.traits.comment.clone(),
        parent,
    };
    let level = request.level;
    Ok(Plan { output: request.output, size, extent_bytes, grain, zeroed_grain, level, descriptor })
}

fn check_grain(grain: u64, stream: bool) -> Result<()> {
    // The grain directory of a stream is held until its end: 1 MiB for 2 TiB of the smallest grains.
    let min: u64 = if stream { 16 << 10 } else { 4096 };
    if grain.is_power_of_two() && grain >= min {
        return Ok(());
    }
    Err(Error::new(Code::Usage, "option grain_size")
        .found(grain)
        .allowed(format!("a power of two from {min} bytes"))
        .hint("64k is what every product writes"))
}

fn split_size(bytes: u64) -> Result<u64> {
    if rem(bytes, FLAT_BLOCK)? == 0 {
        return Ok(bytes);
    }
    Err(Error::new(Code::Usage, "option extent_size")
        .found(bytes)
        .allowed("a multiple of 1 MiB")
        .hint("2047M is what VMware and VirtualBox write"))
}

fn check_zeroed(zeroed: bool, sparse: bool, dialect: Dialect) -> Result<()> {
    if zeroed && !sparse {
        return Err(Error::new(
            Code::Usage,
            "zeroed_grain=on is for monolithicSparse and twoGbMaxExtentSparse",
        )
        .hint("leave it out"));
    }
    if zeroed && dialect == Dialect::VirtualBox {
        return Err(Error::new(Code::Usage, "VirtualBox does not read disks with zeroed_grain=on")
            .hint("leave out one of the two options"));
    }
    Ok(())
}

fn check_sparse_size(bytes: u64) -> Result<()> {
    let max = mul(SPARSE_SECTORS_MAX, SECTOR)?;
    if bytes <= max {
        return Ok(());
    }
    Err(Error::new(Code::Usage, "the disk is too large for one sparse file of VMDK")
        .found(format!("{bytes} bytes"))
        .allowed(format!("up to {max} bytes (2 TiB)"))
        .hint("choose subformat=twoGbMaxExtentSparse (with a larger extent_size), monolithicFlat or vmfs"))
}

/// The extent lines, with the final names of their files.
fn extents(
    main: &str,
    kind: ExtentKind,
    split: bool,
    size: u64,
    extent_bytes: u64,
) -> Result<Vec<NewExtent>> {
    if main.is_empty() || main.contains(|c: char| c == '"' || c.is_control()) {
        return Err(Error::new(Code::Usage, "a VMDK cannot have this file name")
            .found(main)
            .allowed("names without quotes and control characters")
            .hint("choose another name"));
    }
    let stem = main.rsplit_once('.').map_or(main, |(stem, _)| if stem.is_empty() { main } else { stem });
    let sectors = |bytes| div(bytes, SECTOR);
    if !split {
        let name = if kind == ExtentKind::Sparse { main.to_owned() } else { format!("{stem}-flat.vmdk") };
        return Ok(vec![NewExtent { sectors: sectors(size)?, kind, name }]);
    }
    let count = div_ceil(size, extent_bytes)?.max(1);
    if count > EXTENTS_MAX {
        let least = align_up(div_ceil(size, EXTENTS_MAX)?, FLAT_BLOCK)?;
        return Err(Error::new(Code::Usage, "the disk would be split into too many files")
            .found(count)
            .allowed(format!("up to {EXTENTS_MAX}"))
            .hint(format!(
                "set extent_size={}M or more, or choose subformat=monolithicFlat",
                div_ceil(least, 1 << 20)?
            )));
    }
    let letter = if kind == ExtentKind::Sparse { 's' } else { 'f' };
    let mut extents = Vec::new();
    for number in 0..count {
        let bytes = extent_bytes.min(sub(size, mul(number, extent_bytes)?)?);
        let name = format!("{stem}-{letter}{:03}.vmdk", add(number, 1)?);
        extents.push(NewExtent { sectors: sectors(bytes)?, kind, name });
    }
    Ok(extents)
}

/// VMware's geometry for SCSI disks (sheet `geometry.md`, section 3).
fn scsi_geometry(sectors: u64) -> Result<Chs> {
    const GIB: u64 = (1 << 30) / 512;
    let (heads, per_track) = match sectors {
        0..GIB => (64u32, 32u32),
        GIB.. if sectors < GIB.saturating_mul(2) => (128, 32),
        _ => (255, 63),
    };
    let cylinders = div(sectors, mul(heads.into(), per_track.into())?)?.clamp(1, u32::MAX.into());
    Ok(Chs { cylinders: narrow(cylinders)?, heads, sectors: per_track })
}

/// A content id that means nothing else: not "no parent", not "look elsewhere", not zero.
fn content_id(random: u64) -> u32 {
    let id = u32::try_from(random & 0xffff_ffff).unwrap_or(1);
    if matches!(id, 0 | 0xffff_fffe..) { 1 } else { id }
}

/// The refusal of a payload that a writer did not ask for.
#[cold]
pub(crate) fn wrong_payload() -> Error {
    Error::new(Code::Usage, "the payload is not of the kind that the writer's shape asks for")
}

/// The refusal of a block out of order or outside the disk.
#[cold]
pub(crate) fn wrong_block(block: u64) -> Error {
    Error::new(Code::Usage, "blocks must be placed in ascending order inside the disk").found(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_follows_the_sheet() {
        let of = |bytes: u64| scsi_geometry(bytes / 512).unwrap();
        assert_eq!(of(16 << 30), Chs { cylinders: 2088, heads: 255, sectors: 63 });
        assert_eq!(of(100 << 20), Chs { cylinders: 100, heads: 64, sectors: 32 });
        assert_eq!(of((2 << 30) - 512).heads, 128);
        assert_eq!(of(512).cylinders, 1);
    }

    #[test]
    fn names_follow_the_main_file() {
        let names = |main: &str, kind, split| -> Vec<String> {
            extents(main, kind, split, 3 << 20, 1 << 20).unwrap().into_iter().map(|e| e.name).collect()
        };
        assert_eq!(names("a b.vmdk", ExtentKind::Flat, false), ["a b-flat.vmdk"]);
        assert_eq!(names("disk.1.vmdk", ExtentKind::Sparse, false), ["disk.1.vmdk"]);
        assert_eq!(names("x.VMDK", ExtentKind::Sparse, true), ["x-s001.vmdk", "x-s002.vmdk", "x-s003.vmdk"]);
        assert_eq!(names("noext", ExtentKind::Flat, true)[2], "noext-f003.vmdk");
        assert!(extents("a\"b.vmdk", ExtentKind::Flat, false, 512, 512).is_err());
    }

    #[test]
    fn content_ids_are_never_special() {
        for random in [0, 0xffff_ffff, 0xffff_fffe, 0x1_0000_0000] {
            assert_eq!(content_id(random), 1);
        }
        assert_eq!(content_id(u64::MAX - 5), 0xffff_fffa);
    }
}
