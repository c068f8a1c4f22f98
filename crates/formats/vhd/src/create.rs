//! New images. The footer at the end is written last.
//!
//! ```text
//!   0x000 footer copy   0x200 dynamic header   0x600 BAT, padded with 0xFF to a sector
//!   ...   names of the parent, if it is a child, each on sectors of its own
//!   ...   bitmap right before the next boundary of 4 KiB, data on the boundary, up to the next bitmap a gap
//! ```

use crate::header::{
    ABSENT, CHS_MAX, COOKIE, DYNAMIC_COOKIE, DynamicHeader, EPOCH, FOOTER_BYTES, FORMAT, Footer,
    LocatorEntry, NOWHERE, SIZE_MAX, VERSION, bitmap_bytes,
};
use crate::parent::Names;
use std::sync::Arc;
use vellum_core::storage::write_slice;
use vellum_core::{
    BoxFuture, Chs, Code, CreateRequest, Error, ImageWriter, MetaWrite, OptionKind, OptionSpec, Payload,
    Place, Preallocate, Result, Storage, TableWriter, WriterShape, bytes, fill_range, geometry, set_len,
    write_all,
};
use zerocopy::IntoBytes;

/// Where the dynamic header starts.
const HEADER_AT: u64 = 0x200;
/// Where the BAT starts.
const TABLE_AT: u64 = 0x600;
/// What the data of blocks is aligned to.
const ALIGN: u64 = 4096;
/// The unit of placement in fixed images. Nothing in the file depends on it.
const FIXED_BLOCK: u64 = 1 << 20;

/// The options of `create`.
pub(crate) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "subformat",
        kind: OptionKind::OneOf(&["dynamic", "fixed", "differencing"]),
        default: "dynamic",
        expert: false,
        help: "dynamic grows with its content; fixed is the raw disk and a footer; differencing (always if a \
               parent is given) stores what differs from the parent",
    },
    OptionSpec {
        name: "force_size",
        kind: OptionKind::Flag,
        default: "on",
        expert: false,
        help: "on: the disk has exactly the size asked for; off: rounded up to a geometry, for Virtual PC",
    },
    OptionSpec {
        name: "preallocation",
        kind: OptionKind::OneOf(&["off", "falloc", "full"]),
        default: "off",
        expert: false,
        help: "for fixed images: reserve the space (Windows attaches no sparse files), full by writing zeros",
    },
    OptionSpec {
        name: "block_size",
        kind: OptionKind::Size { min: 4 << 10, max: 256 << 20 },
        default: "2M",
        expert: true,
        help: "size of a block of a dynamic image, a power of two; 2M and 512K are what others write",
    },
];

/// The image as it is going to be.
struct Plan {
    fixed: bool,
    preallocate: Preallocate,
    virtual_size: u64,
    chs: Chs,
    creator: ([u8; 4], u32),
    block: u64,
    blocks: u64,
    /// Of a child.
    parent: Option<Names>,
    /// Where the BAT ends: the texts of a child's locators start here.
    table_end: u64,
    /// Where BAT and locators end.
    used: u64,
    /// Byte offset of the first block's bitmap.
    first: u64,
    /// Bytes from one bitmap to the next.
    stride: u64,
}

fn usage(request: &CreateRequest, message: &str) -> Error {
    Error::new(Code::Usage, message).image(request.output.location()).format(FORMAT)
}

/// The smallest disk of at least `sectors` that a geometry can express (geometry.md section 2). A geometry misses at
/// most a cylinder, so the search is short.
fn rounded_up(sectors: u64) -> Result<(u64, Chs)> {
    let mut wanted = sectors;
    loop {
        let chs = geometry::vhd(wanted);
        let covered = bytes::mul(bytes::mul(chs.cylinders.into(), chs.heads.into())?, chs.sectors.into())?;
        if chs == CHS_MAX {
            return Ok((sectors.max(covered), chs));
        }
        if covered >= sectors {
            return Ok((covered, chs));
        }
        wanted = bytes::add(wanted, 1)?;
    }
}

/// Reads the options and lays the file out.
fn plan(request: &CreateRequest) -> Result<Plan> {
    let options = &request.options;
    if request.compress {
        return Err(usage(request, "VHD images cannot be compressed")
            .hint("leave compression out, or choose a format that has it (qcow2, vmdk streamOptimized)"));
    }
    let fixed = options.text("subformat", "dynamic") == "fixed";
    let parent = parent(request, fixed)?;
    let preallocate = match options.text("preallocation", "off") {
        "falloc" => Preallocate::Falloc,
        "full" => Preallocate::Full,
        _ => Preallocate::Off,
    };
    if preallocate != Preallocate::Off && !fixed {
        return Err(usage(request, "only fixed images can be preallocated").hint("add subformat=fixed"));
    }
    let too_large = |size: u64| {
        usage(request, "the disk is larger than a VHD image can be")
            .field("currentSize")
            .found(size)
            .allowed(format!("up to {SIZE_MAX} bytes (2040 GiB)"))
            .hint("choose another format: qcow2, vdi and vmdk hold larger disks")
    };
    if request.virtual_size > SIZE_MAX {
        return Err(too_large(request.virtual_size));
    }
    let sectors = bytes::div_ceil(request.virtual_size, 512)?;
    // Hyper-V's tag makes every reader, QEMU too, take currentSize; Virtual PC's makes them take the geometry.
    let (sectors, chs, creator) = if options.flag("force_size", true) {
        (sectors, geometry::vhd(sectors), (*b"win ", 0x000A_0000))
    } else {
        let (sectors, chs) = rounded_up(sectors)?;
        (sectors, chs, (*b"vpc ", 0x0005_0003))
    };
    let virtual_size = bytes::mul(sectors, 512)?;
    let block = options.number("block_size", 2 << 20);
    if !block.is_power_of_two() {
        return Err(usage(request, "block_size must be a power of two")
            .found(block)
            .allowed("4K to 256M")
            .hint("leave block_size out for the usual 2M"));
    }
    let blocks = bytes::div_ceil(virtual_size, block)?;
    let table_end = bytes::add(TABLE_AT, bytes::align_up(bytes::mul(blocks, 4)?, 512)?)?;
    let used = match &parent {
        Some(names) => names.texts(table_end)?.1,
        None => table_end,
    };
    let bitmap = bitmap_bytes(block);
    let first = bytes::sub(bytes::align_up(bytes::add(used, bitmap)?, ALIGN)?, bitmap)?;
    let stride = bytes::align_up(bytes::add(bitmap, block)?, ALIGN)?;
    // BAT entries are 32-bit sector numbers: every block of a full disk must have one.
    let full = bytes::add(first, bytes::mul(blocks, stride)?)?;
    if !fixed && bytes::div(full, 512)? >= ABSENT.into() {
        return Err(usage(request, "with blocks of this size the disk could not be filled")
            .field("blockSize")
            .found(format!("{blocks} blocks of {block} bytes"))
            .allowed("a file up to 2 TiB")
            .hint("leave block_size out: with 2M every disk up to 2040 GiB fits"));
    }
    Ok(Plan {
        fixed,
        preallocate,
        virtual_size,
        chs,
        creator,
        block,
        blocks,
        parent,
        table_end,
        used,
        first,
        stride,
    })
}

/// The names of the parent, if there is to be one.
fn parent(request: &CreateRequest, fixed: bool) -> Result<Option<Names>> {
    let wants_one = request.options.text("subformat", "dynamic") == "differencing";
    match &request.parent {
        None if wants_one => Err(usage(request, "a differencing image needs a parent")
            .hint("name the parent, or choose subformat=dynamic")),
        Some(_) if fixed => Err(usage(request, "a fixed image cannot have a parent")
            .hint("leave subformat=fixed out: a child is a differencing image")),
        Some(parent) => Names::of(parent).map(Some).map_err(|e| e.image(request.output.location())),
        None => Ok(None),
    }
}

/// Begins an image: fills the BAT or, if fixed, gives the file its length.
///
/// # Errors
/// `USAGE` for options or sizes that cannot be, `NO_SPACE` and `IO` from the storage.
pub(crate) async fn create(request: CreateRequest) -> Result<Box<dyn ImageWriter>> {
    let plan = plan(&request)?;
    let footer = footer(&plan, &request)?.sealed();
    let main = request.output.main().await?;
    let storage = main.as_ref();
    let len = if plan.fixed { bytes::add(plan.virtual_size, FOOTER_BYTES)? } else { plan.first };
    if !storage.limits().resizable && (!plan.fixed || storage.len()? != len) {
        return Err(usage(
            &request,
            "a VHD image ends in its footer, which needs a file of the right length",
        )
        .hint("write to a file, or write another format to the device"));
    }
    let table = TableWriter::new(0, TABLE_AT, plan.blocks, 4, 0xff);
    if plan.fixed {
        set_len(storage, len, plan.preallocate).await?;
    } else {
        let padded = bytes::align_up(table.len_bytes(), 512)?;
        fill_range(storage, TABLE_AT, padded, 0xff).await?;
        if let Some(names) = &plan.parent {
            for (at, text) in names.texts(plan.table_end)?.0 {
                write_slice(storage, at, text).await?;
            }
        }
        write_slice(storage, HEADER_AT, dynamic_header(&plan)?.sealed().as_bytes()).await?;
        write_slice(storage, 0, footer.as_bytes()).await?;
    }
    let block_size = if plan.fixed { FIXED_BLOCK } else { plan.block };
    Ok(Box::new(VhdWriter {
        shape: WriterShape { block_size, codec: None, encoded_limit: 0 },
        storages: [main],
        bitmap: vec![0xff; bytes::index(bitmap_bytes(plan.block))?],
        footer,
        table,
        allocated: 0,
        last: None,
        plan,
    }))
}

fn footer(plan: &Plan, request: &CreateRequest) -> Result<Footer> {
    let seconds = request.providers.unix_time.saturating_sub(EPOCH);
    let unique_id =
        request.traits.uuid.filter(|uuid| !uuid.is_nil()).unwrap_or_else(|| request.providers.random_uuid());
    let (creator_app, creator_version) = plan.creator;
    let narrow = |value: u32| u8::try_from(value).unwrap_or(u8::MAX);
    Ok(Footer {
        cookie: *COOKIE,
        features: 2.into(),
        version: VERSION.into(),
        data_offset: if plan.fixed { NOWHERE } else { HEADER_AT }.into(),
        timestamp: u32::try_from(seconds).unwrap_or(u32::MAX).into(),
        creator_app,
        creator_version: creator_version.into(),
        creator_host: *b"Wi2k",
        original_size: plan.virtual_size.into(),
        current_size: plan.virtual_size.into(),
        cylinders: u16::try_from(plan.chs.cylinders).unwrap_or(u16::MAX).into(),
        heads: narrow(plan.chs.heads),
        sectors_per_track: narrow(plan.chs.sectors),
        disk_type: match (plan.fixed, &plan.parent) {
            (true, _) => 2,
            (false, None) => 3,
            (false, Some(_)) => 4,
        }
        .into(),
        checksum: 0.into(),
        unique_id: unique_id.0,
        saved_state: 0,
        reserved: [0; 427],
    })
}

fn dynamic_header(plan: &Plan) -> Result<DynamicHeader> {
    let mut header = DynamicHeader {
        cookie: *DYNAMIC_COOKIE,
        data_offset: NOWHERE.into(),
        table_offset: TABLE_AT.into(),
        header_version: VERSION.into(),
        max_table_entries: bytes::narrow(plan.blocks)?.into(),
        block_size: bytes::narrow(plan.block)?.into(),
        checksum: 0.into(),
        parent_unique_id: [0; 16],
        parent_timestamp: 0.into(),
        reserved: 0.into(),
        parent_unicode_name: [0; 512],
        parent_locator: [LocatorEntry::default(); 8],
        reserved_end: [0; 256],
    };
    if let Some(names) = &plan.parent {
        names.enter(&mut header, plan.table_end)?;
    }
    Ok(header)
}

struct VhdWriter {
    shape: WriterShape,
    storages: [Arc<dyn Storage>; 1],
    plan: Plan,
    footer: Footer,
    table: TableWriter,
    /// The bitmap of every placed block: all sectors are here.
    bitmap: Vec<u8>,
    /// Blocks placed so far.
    allocated: u64,
    last: Option<(u64, Place)>,
}

impl VhdWriter {
    /// Where the bitmap of the block that is placed as number `index` starts.
    fn bitmap_at(&self, index: u64) -> Result<u64> {
        bytes::add(self.plan.first, bytes::mul(index, self.plan.stride)?)
    }

    fn place_fixed(&self, block: u64) -> Result<Place> {
        Ok(Place { storage: 0, offset: bytes::mul(block, FIXED_BLOCK)? })
    }

    fn place_dynamic(&mut self, block: u64, writes: &mut Vec<MetaWrite>) -> Result<Place> {
        let start = self.bitmap_at(self.allocated)?;
        let sector = bytes::narrow(bytes::div(start, 512)?)?;
        self.table.set(block, &sector.to_be_bytes(), writes)?;
        writes.push(MetaWrite { storage: 0, offset: start, bytes: self.bitmap.clone() });
        self.allocated = bytes::add(self.allocated, 1)?;
        Ok(Place { storage: 0, offset: bytes::add(start, bytes::wide(self.bitmap.len()))? })
    }

    /// Where the footer goes.
    fn footer_at(&self) -> Result<u64> {
        match self.allocated {
            _ if self.plan.fixed => Ok(self.plan.virtual_size),
            0 => Ok(self.plan.used),
            // Behind the last block's data, which ends on a boundary.
            count => {
                let start = self.bitmap_at(bytes::sub(count, 1)?)?;
                bytes::add(bytes::add(start, bytes::wide(self.bitmap.len()))?, self.plan.block)
            }
        }
    }
}

impl ImageWriter for VhdWriter {
    fn shape(&self) -> &WriterShape {
        &self.shape
    }
    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn place(&mut self, block: u64, payload: Payload, writes: &mut Vec<MetaWrite>) -> Result<Place> {
        if let Some((last, place)) = self.last {
            if last == block {
                return Ok(place);
            }
            if last > block {
                return Err(Error::new(Code::Usage, "blocks must be placed in ascending order").found(block));
            }
        }
        let start = bytes::mul(block, self.shape.block_size)?;
        if start >= self.plan.virtual_size || payload != Payload::Data {
            return Err(Error::new(Code::Usage, "VHD images take plain blocks inside the disk").found(block));
        }
        let place =
            if self.plan.fixed { self.place_fixed(block)? } else { self.place_dynamic(block, writes)? };
        self.last = Some((block, place));
        Ok(place)
    }

    fn finish(mut self: Box<Self>) -> BoxFuture<'static, Result<()>> {
        Box::pin(async move {
            let mut writes = Vec::new();
            self.table.finish(&mut writes);
            write_all(&self.storages, writes).await?;
            let [main] = &self.storages;
            let at = self.footer_at()?;
            set_len(main.as_ref(), bytes::add(at, FOOTER_BYTES)?, Preallocate::Off).await?;
            write_slice(main.as_ref(), at, self.footer.as_bytes()).await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chs(cylinders: u32, heads: u32, sectors: u32) -> Chs {
        Chs { cylinders, heads, sectors }
    }

    #[test]
    fn rounded_up_as_in_the_table_of_the_sheet() {
        for (sectors, geometry, covered) in [
            (6144, chs(91, 4, 17), 6188),
            (40960, chs(603, 4, 17), 41004),
            (204_800, chs(1004, 12, 17), 204_816),
            (409_600, chs(826, 16, 31), 409_696),
            (524_288, chs(521, 16, 63), 525_168),
            (1_032_192, chs(1024, 16, 63), 1_032_192),
            (66_058_240, chs(65534, 16, 63), 66_058_272),
            (66_060_288, chs(16192, 16, 255), 66_063_360),
            (266_338_304, chs(65279, 16, 255), 266_338_320),
            (1 << 30, CHS_MAX, 1 << 30),
        ] {
            assert_eq!(rounded_up(sectors).unwrap(), (covered, geometry), "{sectors}");
        }
    }
}
