//! The header on disk (sheet vdi.md, section 2) and its validation (section 9).
//!
//! Both versions are brought into one [`Header`], checked before anything is computed from it.

use vellum_core::{Chs, Code, Error, Result, Uuid, bytes};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The name that users type.
pub(crate) const FORMAT: &str = "vdi";
/// `signature`: the only magic to test.
pub(crate) const SIGNATURE: u32 = 0xBEDA_107F;
/// `version` of all current files.
pub(crate) const VERSION_1_1: u32 = 0x0001_0001;
/// `version` of files from before the first release.
pub(crate) const VERSION_0_2: u32 = 0x0000_0002;
/// Where `signature` stands.
const SIGNATURE_AT: usize = 0x40;
/// Where the header proper starts; `cbHeader` counts from here.
pub(crate) const HEADER_AT: u64 = 0x48;
/// Least `cbHeader` of version 1.1.
const CB_HEADER: u32 = 0x180;
/// `cbHeader` of a header with LCHS.
pub(crate) const CB_HEADER_LCHS: u32 = 0x190;
/// Where `uuidModify` of version 1.1 stands.
pub(crate) const UUID_MODIFY_AT: u64 = 0x198;
/// Bytes of pre-header and the longest header that is known.
pub(crate) const HEADER_BYTES: usize = 0x1D8;
/// Bytes of pre-header and header of version 0.2; the block map follows at once.
const HEADER_0_2_BYTES: usize = 420;
/// Greatest `cBlocks` (sheet section 9).
pub(crate) const BLOCKS_MAX: u32 = 0x3FFF_FFFF;
/// Map entry: not in this file.
pub(crate) const FREE: u32 = 0xFFFF_FFFF;
/// Map entry: reads as zeros.
pub(crate) const ZERO: u32 = 0xFFFF_FFFE;

/// Four fields: cylinders, heads, sectors per track, bytes per sector.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct Geometry {
    pub(crate) cylinders: U32,
    pub(crate) heads: U32,
    pub(crate) sectors: U32,
    pub(crate) sector_size: U32,
}

impl Geometry {
    /// The geometry of `chs`; all zero but the sector size means "not set".
    pub(crate) fn new(chs: Option<Chs>) -> Self {
        let chs = chs.unwrap_or_default();
        Geometry {
            cylinders: chs.cylinders.into(),
            heads: chs.heads.into(),
            sectors: chs.sectors.into(),
            sector_size: 512.into(),
        }
    }

    fn chs(&self) -> Option<Chs> {
        let chs =
            Chs { cylinders: self.cylinders.get(), heads: self.heads.get(), sectors: self.sectors.get() };
        (chs.cylinders != 0 && chs.heads != 0 && chs.sectors != 0).then_some(chs)
    }
}

/// Pre-header and header 1.1, with LCHS.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct Header11 {
    pub(crate) text: [u8; 64],
    pub(crate) signature: U32,
    pub(crate) version: U32,
    pub(crate) cb_header: U32,
    pub(crate) image_type: U32,
    pub(crate) flags: U32,
    pub(crate) comment: [u8; 256],
    pub(crate) off_blocks: U32,
    pub(crate) off_data: U32,
    pub(crate) legacy_geometry: Geometry,
    pub(crate) unused: U32,
    pub(crate) cb_disk: U64,
    pub(crate) cb_block: U32,
    pub(crate) cb_block_extra: U32,
    pub(crate) c_blocks: U32,
    pub(crate) c_blocks_allocated: U32,
    pub(crate) uuid_create: [u8; 16],
    pub(crate) uuid_modify: [u8; 16],
    pub(crate) uuid_linkage: [u8; 16],
    pub(crate) uuid_parent_modify: [u8; 16],
    pub(crate) lchs: Geometry,
}

/// Pre-header and header 0.2 (section 2.3).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct Header02 {
    text: [u8; 64],
    signature: U32,
    version: U32,
    image_type: U32,
    flags: U32,
    comment: [u8; 256],
    legacy_geometry: Geometry,
    cb_disk: U64,
    cb_block: U32,
    c_blocks: U32,
    c_blocks_allocated: U32,
    uuid_create: [u8; 16],
    uuid_modify: [u8; 16],
    uuid_linkage: [u8; 16],
}

/// What an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ImageType {
    Dynamic,
    Fixed,
    Undo,
    Differencing,
}

impl ImageType {
    /// The variant's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            ImageType::Dynamic => "dynamic",
            ImageType::Fixed => "fixed",
            ImageType::Undo => "undo",
            ImageType::Differencing => "differencing",
        }
    }
}

/// Both versions, checked.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) text: String,
    pub(crate) version: u32,
    /// `cbHeader`; 0 in version 0.2, which has none.
    pub(crate) cb_header: u32,
    pub(crate) image_type: ImageType,
    pub(crate) flags: u32,
    pub(crate) comment: String,
    pub(crate) off_blocks: u64,
    pub(crate) off_data: u64,
    pub(crate) pchs: Option<Chs>,
    pub(crate) sector_size: u32,
    pub(crate) lchs: Option<Chs>,
    pub(crate) cb_disk: u64,
    pub(crate) cb_block: u32,
    pub(crate) cb_block_extra: u32,
    pub(crate) c_blocks: u32,
    pub(crate) c_blocks_allocated: u32,
    pub(crate) uuid_create: Uuid,
    pub(crate) uuid_modify: Uuid,
    pub(crate) uuid_linkage: Uuid,
    pub(crate) uuid_parent_modify: Uuid,
    /// Where the fields stand, for messages.
    places: &'static Places,
}

/// Byte offsets of fields in the file.
#[derive(Debug)]
struct Places {
    image_type: u64,
    flags: u64,
    off_blocks: u64,
    off_data: u64,
    cb_block: u64,
    cb_block_extra: u64,
    c_blocks: u64,
    c_blocks_allocated: u64,
    uuid_linkage: u64,
}

const PLACES_1_1: Places = Places {
    image_type: 0x4C,
    flags: 0x50,
    off_blocks: 0x154,
    off_data: 0x158,
    cb_block: 0x178,
    cb_block_extra: 0x17C,
    c_blocks: 0x180,
    c_blocks_allocated: 0x184,
    uuid_linkage: 0x1A8,
};

/// In version 0.2 map and data have no offset fields: `cBlocks` decides.
const PLACES_0_2: Places = Places {
    image_type: 0x48,
    flags: 0x4C,
    off_blocks: 0x16C,
    off_data: 0x16C,
    cb_block: 0x168,
    cb_block_extra: 0x168,
    c_blocks: 0x16C,
    c_blocks_allocated: 0x170,
    uuid_linkage: 0x194,
};

/// Signature and version of a file that starts with `head`.
pub(crate) fn signature_and_version(head: &[u8]) -> Option<(u32, u32)> {
    let signature = bytes::array(head, SIGNATURE_AT).map(u32::from_le_bytes)?;
    let version = bytes::array(head, SIGNATURE_AT.checked_add(4)?).map(u32::from_le_bytes)?;
    Some((signature, version))
}

/// An error about a field.
pub(crate) fn bad(code: Code, field: &'static str, at: u64, message: impl Into<String>) -> Error {
    let hint = match code {
        Code::Truncated | Code::OutOfFile => {
            "the file is not complete: copy it again from where it came from, or restore a backup"
        }
        Code::Version => "convert the image with the program that made it",
        _ => "the header is damaged; restore it from a backup, or name the right format with -f",
    };
    Error::new(code, message).format(FORMAT).field(field).at(at).hint(hint)
}

fn truncated(len: usize, needed: usize) -> Error {
    bad(Code::Truncated, "header", bytes::wide(len), "the file ends inside the header")
        .found(format!("{len} bytes"))
        .allowed(format!("at least {needed}"))
}

/// Text up to the first NUL.
fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(field.get(..end).unwrap_or_default()).into_owned()
}

/// Reads and checks the header of a file that starts with `head` and has `file_len` bytes.
///
/// # Errors
/// `TRUNCATED`, `BAD_MAGIC`, `VERSION`, `RANGE`, `MISALIGNED`, `OVERLAP`, `OUT_OF_FILE`, `SIZE_LIE`, `CORRUPT`.
pub(crate) fn parse(head: &[u8], file_len: u64) -> Result<Header> {
    let header = parse_but_counter(head, file_len)?;
    header.check_counter()?;
    Ok(header)
}

/// The same without a look at `cBlocksAllocated`, which can be made anew from the map.
///
/// # Errors
/// Those of [`parse`].
pub(crate) fn parse_but_counter(head: &[u8], file_len: u64) -> Result<Header> {
    let Some((signature, version)) = signature_and_version(head) else {
        return Err(truncated(head.len(), HEADER_0_2_BYTES));
    };
    if signature != SIGNATURE {
        return Err(bad(Code::BadMagic, "signature", 0x40, "this is not a VDI image")
            .found(format!("{signature:#010x}"))
            .allowed(format!("{SIGNATURE:#010x}"))
            .hint("let the format be recognised: leave -f out"));
    }
    let header = match version {
        VERSION_1_1 => parse_1_1(head)?,
        VERSION_0_2 => parse_0_2(head)?,
        _ => {
            return Err(bad(Code::Version, "version", 0x44, "this version of VDI is not known")
                .found(format!("{version:#010x}"))
                .allowed("0x00010001 (1.1), 0x00000002 (0.2)"));
        }
    };
    header.check_blocks()?;
    header.check_layout(file_len)?;
    header.check_link()?;
    Ok(header)
}

fn parse_1_1(head: &[u8]) -> Result<Header> {
    let cb_header: u32 = bytes::array(head, 0x48).map(u32::from_le_bytes).unwrap_or(0);
    if cb_header < CB_HEADER {
        return Err(bad(Code::Range, "cbHeader", 0x48, "the header is too short for version 1.1")
            .found(format!("{cb_header:#x}"))
            .allowed("0x180 and more"));
    }
    let with_lchs = cb_header >= CB_HEADER_LCHS;
    let needed = if with_lchs { HEADER_BYTES } else { HEADER_BYTES.saturating_sub(16) };
    let Some(present) = head.get(..needed) else { return Err(truncated(head.len(), needed)) };
    let mut whole = [0u8; HEADER_BYTES];
    whole.iter_mut().zip(present).for_each(|(to, from)| *to = *from);
    let Ok(raw) = Header11::read_from_bytes(&whole) else { return Err(truncated(head.len(), needed)) };
    Ok(Header {
        text: text(&raw.text),
        version: raw.version.get(),
        cb_header,
        image_type: image_type(raw.image_type.get(), PLACES_1_1.image_type)?,
        flags: raw.flags.get(),
        comment: text(&raw.comment),
        off_blocks: raw.off_blocks.get().into(),
        off_data: raw.off_data.get().into(),
        pchs: raw.legacy_geometry.chs(),
        sector_size: raw.legacy_geometry.sector_size.get(),
        lchs: raw.lchs.chs(),
        cb_disk: raw.cb_disk.get(),
        cb_block: raw.cb_block.get(),
        cb_block_extra: raw.cb_block_extra.get(),
        c_blocks: raw.c_blocks.get(),
        c_blocks_allocated: raw.c_blocks_allocated.get(),
        uuid_create: Uuid::from_microsoft(raw.uuid_create),
        uuid_modify: Uuid::from_microsoft(raw.uuid_modify),
        uuid_linkage: Uuid::from_microsoft(raw.uuid_linkage),
        uuid_parent_modify: Uuid::from_microsoft(raw.uuid_parent_modify),
        places: &PLACES_1_1,
    })
}

fn parse_0_2(head: &[u8]) -> Result<Header> {
    let Some(raw) = head.get(..HEADER_0_2_BYTES).and_then(|head| Header02::read_from_bytes(head).ok()) else {
        return Err(truncated(head.len(), HEADER_0_2_BYTES));
    };
    let off_blocks = bytes::wide(HEADER_0_2_BYTES);
    let map_bytes = bytes::mul(raw.c_blocks.get().into(), 4)?;
    Ok(Header {
        text: text(&raw.text),
        version: raw.version.get(),
        cb_header: 0,
        image_type: image_type(raw.image_type.get(), PLACES_0_2.image_type)?,
        flags: raw.flags.get(),
        comment: text(&raw.comment),
        off_blocks,
        off_data: bytes::add(off_blocks, map_bytes)?,
        pchs: raw.legacy_geometry.chs(),
        sector_size: raw.legacy_geometry.sector_size.get(),
        lchs: None,
        cb_disk: raw.cb_disk.get(),
        cb_block: raw.cb_block.get(),
        cb_block_extra: 0,
        c_blocks: raw.c_blocks.get(),
        c_blocks_allocated: raw.c_blocks_allocated.get(),
        uuid_create: Uuid::from_microsoft(raw.uuid_create),
        uuid_modify: Uuid::from_microsoft(raw.uuid_modify),
        uuid_linkage: Uuid::from_microsoft(raw.uuid_linkage),
        uuid_parent_modify: Uuid::default(),
        places: &PLACES_0_2,
    })
}

fn image_type(value: u32, at: u64) -> Result<ImageType> {
    match value {
        1 => Ok(ImageType::Dynamic),
        2 => Ok(ImageType::Fixed),
        3 => Ok(ImageType::Undo),
        4 => Ok(ImageType::Differencing),
        _ => Err(bad(Code::Range, "type", at, "the image type is not known")
            .found(value)
            .allowed("1 (dynamic), 2 (fixed), 3 (undo), 4 (differencing)")),
    }
}

impl Header {
    /// Whether the image stands on a parent.
    pub(crate) fn has_parent(&self) -> bool {
        matches!(self.image_type, ImageType::Undo | ImageType::Differencing) || !self.uuid_linkage.is_nil()
    }

    /// Whether every block has its place from the start.
    pub(crate) fn is_fixed(&self) -> bool {
        self.image_type == ImageType::Fixed
    }

    /// Where `cBlocksAllocated` stands.
    pub(crate) fn counter_at(&self) -> u64 {
        self.places.c_blocks_allocated
    }

    /// Bytes from one block in the file to the next.
    pub(crate) fn stride(&self) -> u64 {
        u64::from(self.cb_block).saturating_add(u64::from(self.cb_block_extra))
    }

    /// Sizes of blocks, and counters (section 9).
    fn check_blocks(&self) -> Result<()> {
        let places = self.places;
        if self.flags & !1 != 0 {
            return Err(bad(Code::Range, "flags", places.flags, "unknown flags are set")
                .found(format!("{:#x}", self.flags))
                .allowed("0, 1"));
        }
        if !self.cb_block.is_power_of_two() || !(4096..=256 << 20).contains(&self.cb_block) {
            return Err(bad(Code::Range, "cbBlock", places.cb_block, "the block size is not allowed")
                .found(self.cb_block)
                .allowed("a power of two, 4 KiB to 256 MiB"));
        }
        let extra = self.cb_block_extra;
        if extra != 0 && (!extra.is_power_of_two() || extra > self.cb_block) {
            return Err(bad(
                Code::Range,
                "cbBlockExtra",
                places.cb_block_extra,
                "the size of private data before each block is not allowed",
            )
            .found(extra)
            .allowed(format!("0, or a power of two up to {}", self.cb_block)));
        }
        if self.c_blocks > BLOCKS_MAX {
            return Err(bad(Code::Range, "cBlocks", places.c_blocks, "the disk has too many blocks")
                .found(self.c_blocks)
                .allowed(format!("up to {BLOCKS_MAX}")));
        }
        let mapped = bytes::mul(self.c_blocks.into(), self.cb_block.into())?;
        if mapped < self.cb_disk {
            return Err(bad(Code::SizeLie, "cBlocks", places.c_blocks, "the blocks do not cover the disk")
                .found(format!("{} blocks of {} bytes", self.c_blocks, self.cb_block))
                .allowed(format!("enough for cbDisk = {}", self.cb_disk)));
        }
        Ok(())
    }

    /// The counter must be one that a map can have.
    pub(crate) fn check_counter(&self) -> Result<()> {
        if self.c_blocks_allocated > self.c_blocks {
            return Err(bad(
                Code::Range,
                "cBlocksAllocated",
                self.counter_at(),
                "more blocks are allocated than the disk has",
            )
            .found(self.c_blocks_allocated)
            .allowed(format!("up to cBlocks = {}", self.c_blocks)));
        }
        Ok(())
    }

    /// Header, map and data follow each other, and the map is inside the file.
    fn check_layout(&self, file_len: u64) -> Result<()> {
        let places = self.places;
        let header_end = match self.cb_header {
            0 => bytes::wide(HEADER_0_2_BYTES),
            cb if cb >= CB_HEADER_LCHS => bytes::add(HEADER_AT, CB_HEADER_LCHS.into())?,
            _ => bytes::add(HEADER_AT, CB_HEADER.into())?,
        };
        let off_blocks = format!("{:#x}", self.off_blocks);
        if self.off_blocks < header_end {
            return Err(bad(Code::Overlap, "offBlocks", places.off_blocks, "the map lies in the header")
                .found(off_blocks)
                .allowed(format!("{header_end:#x} and more")));
        }
        if bytes::rem(self.off_blocks, 4)? != 0 {
            return Err(bad(Code::Misaligned, "offBlocks", places.off_blocks, "the map is not aligned")
                .found(off_blocks)
                .allowed("a multiple of 4"));
        }
        let map_end = bytes::add(self.off_blocks, bytes::mul(self.c_blocks.into(), 4)?)?;
        if self.off_data < map_end {
            return Err(bad(Code::Overlap, "offData", places.off_data, "the data area lies in the map")
                .found(format!("{:#x}", self.off_data))
                .allowed(format!("{map_end:#x} and more")));
        }
        if map_end > file_len && self.c_blocks != 0 {
            let code = if self.off_blocks >= file_len { Code::OutOfFile } else { Code::Truncated };
            return Err(bad(code, "offBlocks", places.off_blocks, "the file ends before the end of the map")
                .found(format!("a map up to byte {map_end}"))
                .allowed(format!("up to the end of the file, {file_len}")));
        }
        Ok(())
    }

    /// A differencing image without its parent's UUID must not be taken for a whole disk.
    fn check_link(&self) -> Result<()> {
        if self.has_parent() && self.uuid_linkage.is_nil() {
            let what = format!("the {} image does not say which parent it stands on", self.image_type.name());
            return Err(bad(Code::Corrupt, "uuidLinkage", self.places.uuid_linkage, what)
                .found(self.uuid_linkage)
                .allowed("the uuidCreate of the parent")
                .hint("the data of the parent is missing; restore the header from a backup"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_sheet() {
        assert_eq!(size_of::<Header11>(), HEADER_BYTES);
        assert_eq!(size_of::<Header02>(), HEADER_0_2_BYTES);
        assert_eq!(std::mem::offset_of!(Header11, cb_disk), 0x170);
        assert_eq!(std::mem::offset_of!(Header11, uuid_linkage), PLACES_1_1.uuid_linkage as usize);
        assert_eq!(std::mem::offset_of!(Header11, lchs), 0x1C8);
        assert_eq!(std::mem::offset_of!(Header11, off_blocks), PLACES_1_1.off_blocks as usize);
        assert_eq!(std::mem::offset_of!(Header11, c_blocks_allocated), 0x184);
        assert_eq!(std::mem::offset_of!(Header11, uuid_modify), UUID_MODIFY_AT as usize);
        assert_eq!(std::mem::offset_of!(Header02, c_blocks), PLACES_0_2.c_blocks as usize);
        assert_eq!(std::mem::offset_of!(Header02, cb_block), PLACES_0_2.cb_block as usize);
        assert_eq!(std::mem::offset_of!(Header02, uuid_linkage), PLACES_0_2.uuid_linkage as usize);
    }

    #[test]
    fn worked_example_of_the_sheet() {
        let mut file = vec![0u8; 0x214];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x40, &[0x7f, 0x10, 0xda, 0xbe, 1, 0, 1, 0, 0x80, 1, 0, 0, 1, 0, 0, 0]);
        put(0x154, &[0, 2, 0, 0, 0, 4, 0, 0]);
        put(0x168, &[0, 2]);
        put(0x170, &[0, 0, 0x50, 0, 0, 0, 0, 0, 0, 0, 0x10, 0]);
        put(0x180, &[5, 0, 0, 0, 2, 0, 0, 0, 0xf4, 0x8f, 0xcc, 0xc9, 0xc0, 0xb6, 0x54, 0x4e]);
        put(0x190, &[0x9d, 0xee, 0xac, 0xaa, 0x4f, 0xe4, 0xad, 0xd5, 1]);
        let header = parse(&file, 2_098_176).unwrap();
        assert_eq!(header.image_type, ImageType::Dynamic);
        assert_eq!((header.off_blocks, header.off_data), (0x200, 0x400));
        assert_eq!((header.cb_disk, header.cb_block, header.c_blocks), (5 << 20, 1 << 20, 5));
        assert_eq!(header.c_blocks_allocated, 2);
        assert_eq!(header.uuid_create.to_string(), "c9cc8ff4-b6c0-4e54-9dee-acaa4fe4add5");
        assert!(!header.has_parent());
        assert_eq!(header.lchs, None);
    }
}
