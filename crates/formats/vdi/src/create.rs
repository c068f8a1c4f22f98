//! New images, laid out as VirtualBox lays them out: map at 1 MiB, data aligned to 1 MiB, header 1.1 with LCHS.
//!
//! The map is filled at creation (FREE, or the identity for a fixed image) and completed a page at a time as blocks are
//! placed; the header with its counter is written last.

use crate::header::{BLOCKS_MAX, CB_HEADER_LCHS, FORMAT, Geometry, Header11, SIGNATURE, VERSION_1_1};
use std::sync::Arc;
use vellum_core::storage::write_slice;
use vellum_core::{
    BoxFuture, Buf, Chs, Code, CreateRequest, DiskTraits, Error, ImageWriter, MetaWrite, OptionKind,
    OptionSpec, Payload, Place, Preallocate, Result, Storage, TableWriter, Uuid, WriteFlags, WriterShape,
    bytes, geometry, set_len, write_all,
};
use zerocopy::IntoBytes;

/// Where the map starts, and what data is aligned to.
const ALIGN: u64 = 1 << 20;
/// What stands at the start of the file. Readers ignore it.
const TEXT: &[u8] = b"<<< Vellum Virtual Disk Image >>>\n";

/// The options of `create`.
pub(crate) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "variant",
        kind: OptionKind::OneOf(&["dynamic", "fixed"]),
        default: "dynamic",
        expert: false,
        help: "dynamic grows with its content; fixed has its full length from the start",
    },
    OptionSpec {
        name: "static",
        kind: OptionKind::Flag,
        default: "off",
        expert: false,
        help: "QEMU's name for variant=fixed",
    },
    OptionSpec {
        name: "preallocation",
        kind: OptionKind::OneOf(&["off", "falloc", "full"]),
        default: "off",
        expert: false,
        help: "for fixed images: reserve the space, falloc without writing it, full by writing zeros",
    },
    OptionSpec {
        name: "block_size",
        kind: OptionKind::Size { min: 4 << 10, max: 64 << 20 },
        default: "1M",
        expert: true,
        help: "size of a block, a power of two; QEMU reads images with 1M only",
    },
];

/// The image as it is going to be.
struct Plan {
    fixed: bool,
    preallocate: Preallocate,
    virtual_size: u64,
    block: u64,
    blocks: u64,
    off_data: u64,
    link: Option<Link>,
}

/// How a child names its parent: by its identity and by its state.
#[derive(Clone, Copy)]
struct Link {
    parent: Uuid,
    /// Null if the parent has none: it is not compared then.
    modification: Uuid,
}

impl Plan {
    /// Length of the file with `allocated` blocks.
    fn file_len(&self, allocated: u64) -> Result<u64> {
        bytes::add(self.off_data, bytes::mul(allocated, self.block)?)
    }
}

fn usage(request: &CreateRequest, message: &str) -> Error {
    Error::new(Code::Usage, message).image(request.output.location()).format(FORMAT)
}

/// Reads the options and lays the file out.
fn plan(request: &CreateRequest) -> Result<Plan> {
    let options = &request.options;
    if request.compress {
        return Err(usage(request, "VDI images cannot be compressed")
            .hint("leave compression out, or choose a format that has it (qcow2, vmdk streamOptimized)"));
    }
    let fixed = match (options.given("variant"), options.flag("static", false)) {
        (Some("dynamic"), true) => {
            return Err(usage(request, "variant=dynamic and static=on contradict each other")
                .hint("static=on is another name for variant=fixed; give one of them"));
        }
        (variant, is_static) => is_static || variant == Some("fixed"),
    };
    let preallocate = match options.text("preallocation", "off") {
        "falloc" => Preallocate::Falloc,
        "full" => Preallocate::Full,
        _ => Preallocate::Off,
    };
    if preallocate != Preallocate::Off && !fixed {
        return Err(usage(request, "only fixed images can be preallocated").hint("add variant=fixed"));
    }
    let link = link(request)?;
    if fixed && link.is_some() {
        return Err(usage(request, "a child of another image cannot be fixed")
            .hint("leave variant=fixed and static=on out: a child holds what differs from its parent"));
    }
    let block = options.number("block_size", 1 << 20);
    if !block.is_power_of_two() {
        return Err(usage(request, "block_size must be a power of two")
            .found(block)
            .allowed("4K to 64M")
            .hint("leave block_size out for the usual 1M"));
    }
    let virtual_size = bytes::align_up(request.virtual_size, 512)?;
    let blocks = bytes::div_ceil(virtual_size, block)?;
    let map_end = bytes::add(ALIGN, bytes::mul(blocks, 4)?)?;
    let off_data = bytes::align_up(map_end, ALIGN)?;
    // offData is a field of 32 bits, which is reached a little before the limit of cBlocks.
    if blocks > u64::from(BLOCKS_MAX) || bytes::narrow(off_data).is_err() {
        return Err(usage(request, "the disk has more blocks than a VDI image can have")
            .field("cBlocks")
            .found(format!("{virtual_size} bytes, {blocks} blocks of {block}"))
            .allowed("about 2^30 blocks: just under 1 PiB with block_size=1M")
            .hint("choose larger blocks (block_size=64M reaches 63 PiB), or another format"));
    }
    Ok(Plan { fixed, preallocate, virtual_size, block, blocks, off_data, link })
}

/// The parent that the image is to be a child of. VDI names it by UUID, and by nothing else.
fn link(request: &CreateRequest) -> Result<Option<Link>> {
    let Some(parent) = &request.parent else { return Ok(None) };
    match parent.identity.uuid.filter(|uuid| !uuid.is_nil()) {
        Some(uuid) => {
            Ok(Some(Link { parent: uuid, modification: parent.identity.modification.unwrap_or_default() }))
        }
        None => Err(usage(request, "the parent has no UUID, which is all by which a VDI image can name it")
            .field("uuidLinkage")
            .found(format!("{} ({})", parent.place, parent.format))
            .allowed("a parent with a UUID: vdi, vhd, and vmdk that VirtualBox made")
            .hint("make the child in a format that names its parent by its place, as qcow2 does")),
    }
}

/// Begins an image: fills the map and, if fixed, gives the file its length.
///
/// # Errors
/// `USAGE` for options or sizes that cannot be, `NO_SPACE` and `IO` from the storage.
pub(crate) async fn create(request: CreateRequest) -> Result<Box<dyn ImageWriter>> {
    let plan = plan(&request)?;
    let main = request.output.main().await?;
    let map = TableWriter::new(0, ALIGN, plan.blocks, 4, 0xff);
    if plan.fixed {
        set_len(main.as_ref(), plan.file_len(plan.blocks)?, plan.preallocate).await?;
        write_identity(main.as_ref(), plan.blocks).await?;
    } else {
        map.write_fill(main.as_ref()).await?;
    }
    let uuid_create =
        request.traits.uuid.filter(|uuid| !uuid.is_nil()).unwrap_or_else(|| request.providers.random_uuid());
    Ok(Box::new(VdiWriter {
        shape: WriterShape { block_size: plan.block, codec: None, encoded_limit: 0 },
        storages: [main],
        map,
        allocated: 0,
        last: None,
        uuid_create,
        uuid_modify: request.providers.random_uuid(),
        traits: request.traits,
        plan,
    }))
}

/// Writes the map of a fixed image: 0, 1, 2, ... in steps of 1 MiB.
async fn write_identity(storage: &dyn Storage, blocks: u64) -> Result<()> {
    const STEP: u64 = 256 << 10;
    let mut buf = Buf::zeroed(bytes::index(bytes::mul(STEP.min(blocks), 4)?)?);
    let mut next = 0u64;
    while next < blocks {
        let step = STEP.min(bytes::sub(blocks, next)?);
        buf.set_window(0..bytes::index(bytes::mul(step, 4)?)?);
        let offset = bytes::add(ALIGN, bytes::mul(next, 4)?)?;
        for (entry, index) in buf.as_chunks_mut::<4>().0.iter_mut().zip(next..) {
            *entry = bytes::narrow(index)?.to_le_bytes();
        }
        let (back, result) = storage.write_at(buf, offset, WriteFlags::default()).await;
        result?;
        buf = back;
        next = bytes::add(next, step)?;
    }
    Ok(())
}

struct VdiWriter {
    shape: WriterShape,
    storages: [Arc<dyn Storage>; 1],
    plan: Plan,
    map: TableWriter,
    /// Blocks placed so far; the index of the next one.
    allocated: u64,
    last: Option<(u64, Place)>,
    uuid_create: Uuid,
    uuid_modify: Uuid,
    traits: DiskTraits,
}

impl ImageWriter for VdiWriter {
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
        if block >= self.plan.blocks || payload != Payload::Data {
            return Err(Error::new(Code::Usage, "VDI images take plain blocks inside the disk").found(block));
        }
        let index = if self.plan.fixed { block } else { self.allocated };
        if !self.plan.fixed {
            self.map.set(block, &bytes::narrow(index)?.to_le_bytes(), writes)?;
            self.allocated = bytes::add(self.allocated, 1)?;
        }
        let place = Place { storage: 0, offset: self.plan.file_len(index)? };
        self.last = Some((block, place));
        Ok(place)
    }

    fn finish(mut self: Box<Self>) -> BoxFuture<'static, Result<()>> {
        Box::pin(async move {
            let mut writes = Vec::new();
            self.map.finish(&mut writes);
            write_all(&self.storages, writes).await?;
            let allocated = if self.plan.fixed { self.plan.blocks } else { self.allocated };
            let [main] = &self.storages;
            // The last block may have been written short.
            let preallocate = Preallocate::Off;
            set_len(main.as_ref(), self.plan.file_len(allocated)?, preallocate).await?;
            write_slice(main.as_ref(), 0, self.header(allocated)?.as_bytes()).await
        })
    }
}

impl VdiWriter {
    fn header(&self, allocated: u64) -> Result<Header11> {
        let plan = &self.plan;
        let sectors = bytes::div(plan.virtual_size, 512)?;
        let lchs = Some(geometry::lchs(sectors, self.traits.lchs)).filter(|_| sectors != 0);
        Ok(Header11 {
            text: padded(TEXT),
            signature: SIGNATURE.into(),
            version: VERSION_1_1.into(),
            cb_header: CB_HEADER_LCHS.into(),
            image_type: image_type(plan).into(),
            flags: 0.into(),
            comment: padded(clip(&self.traits.comment, 255).as_bytes()),
            off_blocks: bytes::narrow(ALIGN)?.into(),
            off_data: bytes::narrow(plan.off_data)?.into(),
            legacy_geometry: Geometry::new(self.traits.pchs.filter(|chs| plausible(*chs, sectors))),
            unused: 0.into(),
            cb_disk: plan.virtual_size.into(),
            cb_block: bytes::narrow(plan.block)?.into(),
            cb_block_extra: 0.into(),
            c_blocks: bytes::narrow(plan.blocks)?.into(),
            c_blocks_allocated: bytes::narrow(allocated)?.into(),
            uuid_create: self.uuid_create.to_microsoft(),
            uuid_modify: self.uuid_modify.to_microsoft(),
            uuid_linkage: plan.link.map_or([0; 16], |link| link.parent.to_microsoft()),
            uuid_parent_modify: plan.link.map_or([0; 16], |link| link.modification.to_microsoft()),
            lchs: Geometry::new(lchs),
        })
    }
}

/// `type`: 1 dynamic, 2 fixed, 4 differencing.
fn image_type(plan: &Plan) -> u32 {
    match (plan.fixed, plan.link) {
        (true, _) => 2,
        (false, None) => 1,
        (false, Some(_)) => 4,
    }
}

/// Whether a physical geometry of another format is worth keeping (geometry.md section 4, rule 1).
fn plausible(chs: Chs, sectors: u64) -> bool {
    geometry::pchs(sectors, Some(chs)) == chs
}

/// `bytes`, cut or padded with NUL to `N`.
fn padded<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut field = [0u8; N];
    field.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    field
}

/// At most `max` bytes of `text`, cut between characters.
fn clip(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_are_cut_between_characters() {
        assert_eq!(clip("abc", 255), "abc");
        assert_eq!(clip("äää", 3), "ä");
        assert_eq!(padded::<4>(b"abcdef"), *b"abcd");
    }
}
