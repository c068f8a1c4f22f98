//! Footer and dynamic header on disk (sheet vhd.md, sections 2 and 3) and their validation (section 10).

use vellum_core::{Chs, Code, Error, Result, bytes};
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The name that users type.
pub(crate) const FORMAT: &str = "vhd";
/// `cookie` of a footer.
pub(crate) const COOKIE: &[u8; 8] = b"conectix";
/// `cookie` of a dynamic header.
pub(crate) const DYNAMIC_COOKIE: &[u8; 8] = b"cxsparse";
/// Bytes of a footer.
pub(crate) const FOOTER_BYTES: u64 = 512;
/// Bytes of a dynamic header.
pub(crate) const DYNAMIC_BYTES: u64 = 1024;
/// Version 1.0 of footer and header.
pub(crate) const VERSION: u32 = 0x0001_0000;
/// No offset.
pub(crate) const NOWHERE: u64 = u64::MAX;
/// BAT entry: not in this file.
pub(crate) const ABSENT: u32 = u32::MAX;
/// Greatest disk: 0xFF000000 sectors, 2040 GiB.
pub(crate) const SIZE_MAX: u64 = 0xFF00_0000 * 512;
/// Seconds from 1970 to 2000, where timestamps start.
pub(crate) const EPOCH: u64 = 946_684_800;
/// The greatest geometry; disks that reach it have their size in `currentSize` only.
pub(crate) const CHS_MAX: Chs = Chs { cylinders: 65535, heads: 16, sectors: 255 };

/// The footer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct Footer {
    pub(crate) cookie: [u8; 8],
    pub(crate) features: U32,
    pub(crate) version: U32,
    pub(crate) data_offset: U64,
    pub(crate) timestamp: U32,
    pub(crate) creator_app: [u8; 4],
    pub(crate) creator_version: U32,
    pub(crate) creator_host: [u8; 4],
    pub(crate) original_size: U64,
    pub(crate) current_size: U64,
    pub(crate) cylinders: U16,
    pub(crate) heads: u8,
    pub(crate) sectors_per_track: u8,
    pub(crate) disk_type: U32,
    pub(crate) checksum: U32,
    pub(crate) unique_id: [u8; 16],
    pub(crate) saved_state: u8,
    pub(crate) reserved: [u8; 427],
}

/// The dynamic header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct DynamicHeader {
    pub(crate) cookie: [u8; 8],
    pub(crate) data_offset: U64,
    pub(crate) table_offset: U64,
    pub(crate) header_version: U32,
    pub(crate) max_table_entries: U32,
    pub(crate) block_size: U32,
    pub(crate) checksum: U32,
    pub(crate) parent_unique_id: [u8; 16],
    pub(crate) parent_timestamp: U32,
    pub(crate) reserved: U32,
    /// UTF-16, big-endian.
    pub(crate) parent_unicode_name: [u8; 512],
    pub(crate) parent_locator: [LocatorEntry; 8],
    pub(crate) reserved_end: [u8; 256],
}

/// Where the parent may be, in one system's words.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct LocatorEntry {
    pub(crate) code: [u8; 4],
    pub(crate) data_space: U32,
    pub(crate) data_length: U32,
    pub(crate) reserved: U32,
    pub(crate) data_offset: U64,
}

/// `diskType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiskType {
    Fixed,
    Dynamic,
    Differencing,
}

impl DiskType {
    /// The variant's name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            DiskType::Fixed => "fixed",
            DiskType::Dynamic => "dynamic",
            DiskType::Differencing => "differencing",
        }
    }
}

/// The checksum of a structure: complement of the sum of its bytes, with the four at `field` taken as 0.
pub(crate) fn checksum(structure: &[u8], field: usize) -> u32 {
    let bytes = structure.iter().enumerate();
    let counted = bytes.filter(|(index, _)| !(field..field.saturating_add(4)).contains(index));
    !counted.fold(0u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)))
}

/// Where the checksum stands in a footer.
const FOOTER_CHECKSUM: usize = 64;
/// Where the checksum stands in a dynamic header.
const DYNAMIC_CHECKSUM: usize = 36;

impl Footer {
    /// Takes a footer of 512 bytes, or of 511 (whose last byte counts as 0).
    pub(crate) fn read(at: &[u8]) -> Option<Footer> {
        let mut whole = [0u8; 512];
        if at.len() < 511 {
            return None;
        }
        whole.iter_mut().zip(at).for_each(|(to, from)| *to = *from);
        Footer::read_from_bytes(&whole).ok()
    }

    /// Whether the cookie is there.
    pub(crate) fn has_cookie(&self) -> bool {
        &self.cookie == COOKIE
    }

    /// The checksum that it should have.
    pub(crate) fn right_checksum(&self) -> u32 {
        checksum(self.as_bytes(), FOOTER_CHECKSUM)
    }

    /// Cookie and checksum are right.
    pub(crate) fn is_sound(&self) -> bool {
        self.has_cookie() && self.checksum.get() == self.right_checksum()
    }

    /// The disk type, if it is one that exists.
    pub(crate) fn disk_type(&self) -> Option<DiskType> {
        match self.disk_type.get() {
            2 => Some(DiskType::Fixed),
            3 => Some(DiskType::Dynamic),
            4 => Some(DiskType::Differencing),
            _ => None,
        }
    }

    /// Whether major version and type are known.
    pub(crate) fn is_known(&self) -> bool {
        self.version.get() >> 16 == VERSION >> 16 && self.disk_type().is_some()
    }

    /// The geometry as it stands there.
    pub(crate) fn chs(&self) -> Chs {
        Chs {
            cylinders: self.cylinders.get().into(),
            heads: self.heads.into(),
            sectors: self.sectors_per_track.into(),
        }
    }

    /// The bytes with the right checksum.
    pub(crate) fn sealed(mut self) -> Self {
        self.checksum = self.right_checksum().into();
        self
    }
}

impl DynamicHeader {
    /// The bytes with the right checksum.
    pub(crate) fn sealed(mut self) -> Self {
        self.checksum = checksum(self.as_bytes(), DYNAMIC_CHECKSUM).into();
        self
    }

    /// Bytes of the bitmap before each block's data.
    pub(crate) fn bitmap_bytes(&self) -> u64 {
        bitmap_bytes(self.block_size.get().into())
    }

    /// Bytes of the BAT.
    pub(crate) fn table_bytes(&self) -> u64 {
        u64::from(self.max_table_entries.get()).saturating_mul(4)
    }
}

/// Bytes of the bitmap of a block: a bit for each sector, in whole sectors.
pub(crate) fn bitmap_bytes(block_size: u64) -> u64 {
    block_size.div_ceil(512 * 8).next_multiple_of(512)
}

/// An error about a field.
pub(crate) fn bad(code: Code, field: &'static str, at: u64, message: impl Into<String>) -> Error {
    let hint = match code {
        Code::Truncated | Code::OutOfFile | Code::SizeLie => {
            "the file is not complete: copy it again from where it came from, or restore a backup"
        }
        Code::Version => "convert the image with the program that made it",
        _ => "the image is damaged; restore it from a backup, or name the right format with -f",
    };
    Error::new(code, message).format(FORMAT).field(field).at(at).hint(hint)
}

/// Checks version, type and size of a sound footer that stands at byte `at`.
pub(crate) fn check_footer(footer: &Footer, at: u64) -> Result<DiskType> {
    let place = |field: u64| at.saturating_add(field);
    let version = footer.version.get();
    if version >> 16 != VERSION >> 16 {
        return Err(bad(Code::Version, "version", place(12), "this version of VHD is not known")
            .found(format!("{version:#010x}"))
            .allowed("0x00010000 (1.0)"));
    }
    let Some(disk_type) = footer.disk_type() else {
        return Err(bad(Code::Range, "diskType", place(60), "the disk type is not known")
            .found(footer.disk_type)
            .allowed("2 (fixed), 3 (dynamic), 4 (differencing)"));
    };
    let size = footer.current_size.get();
    if size > SIZE_MAX || bytes::rem(size, 512)? != 0 {
        return Err(bad(Code::Range, "currentSize", place(48), "the size of the disk is not allowed")
            .found(size)
            .allowed(format!("a multiple of 512 up to {SIZE_MAX} (2040 GiB)")));
    }
    Ok(disk_type)
}

/// Reads and checks a dynamic header that stands at byte `at` of a file of `file_len` bytes.
///
/// # Errors
/// `BAD_MAGIC`, `CHECKSUM`, `VERSION`, `RANGE`, `MISALIGNED`, `OVERLAP`, `OUT_OF_FILE`, `TRUNCATED`.
pub(crate) fn parse_dynamic(raw: &[u8], at: u64, file_len: u64) -> Result<DynamicHeader> {
    let place = |field: u64| at.saturating_add(field);
    let Ok(header) = DynamicHeader::read_from_bytes(raw) else {
        return Err(bad(Code::Truncated, "dynamic header", at, "the file ends inside the dynamic header"));
    };
    if &header.cookie != DYNAMIC_COOKIE {
        return Err(bad(Code::BadMagic, "cookie of the dynamic header", at, "there is no dynamic header")
            .found(format!("{:02x?}", header.cookie))
            .allowed("cxsparse"));
    }
    let sum = checksum(raw, DYNAMIC_CHECKSUM);
    if header.checksum.get() != sum {
        return Err(bad(
            Code::Checksum,
            "checksum of the dynamic header",
            place(36),
            "the checksum does not match",
        )
        .found(format!("{:#010x}", header.checksum.get()))
        .allowed(format!("{sum:#010x}")));
    }
    let version = header.header_version.get();
    if version >> 16 != VERSION >> 16 {
        return Err(bad(
            Code::Version,
            "headerVersion",
            place(24),
            "this version of the header is not known",
        )
        .found(format!("{version:#010x}"))
        .allowed("0x00010000 (1.0)"));
    }
    let block_size = header.block_size.get();
    if !block_size.is_power_of_two() || !(512..=256 << 20).contains(&block_size) {
        return Err(bad(Code::Range, "blockSize", place(32), "the block size is not allowed")
            .found(block_size)
            .allowed("a power of two, 512 bytes to 256 MiB"));
    }
    check_table(&header, at, file_len)?;
    Ok(header)
}

/// The BAT lies inside the file and on nothing else.
fn check_table(header: &DynamicHeader, at: u64, file_len: u64) -> Result<()> {
    let table = header.table_offset.get();
    let len = header.table_bytes();
    let about = |code, message: &str| {
        bad(code, "tableOffset", at.saturating_add(16), message)
            .found(format!("a table of {len} bytes at {table:#x}"))
    };
    let Some(end) = table.checked_add(len) else {
        return Err(about(Code::Overflow, "the BAT ends beyond 64 bits")
            .allowed(format!("up to the end of the file, {file_len}")));
    };
    if bytes::rem(table, 4)? != 0 {
        return Err(about(Code::Misaligned, "the BAT is not aligned").allowed("a multiple of 4"));
    }
    let header_end = bytes::add(at, DYNAMIC_BYTES)?;
    if table < FOOTER_BYTES || (table < header_end && end > at) {
        return Err(about(Code::Overlap, "the BAT lies in the headers")
            .allowed(format!("outside of 0x0 to 0x200 and {at:#x} to {header_end:#x}")));
    }
    if end > file_len && end != table {
        let code = if table >= file_len { Code::OutOfFile } else { Code::Truncated };
        return Err(about(code, "the file ends before the end of the BAT")
            .allowed(format!("up to the end of the file, {file_len}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_sheet() {
        assert_eq!(size_of::<Footer>(), 512);
        assert_eq!(size_of::<DynamicHeader>(), 1024);
        assert_eq!(std::mem::offset_of!(Footer, checksum), FOOTER_CHECKSUM);
        assert_eq!(std::mem::offset_of!(Footer, saved_state), 84);
        assert_eq!(std::mem::offset_of!(DynamicHeader, checksum), DYNAMIC_CHECKSUM);
        assert_eq!(std::mem::offset_of!(DynamicHeader, parent_locator), 576);
    }

    #[test]
    fn bitmaps_have_a_bit_for_each_sector_in_whole_sectors() {
        assert_eq!(bitmap_bytes(512), 512);
        assert_eq!(bitmap_bytes(512 << 10), 512);
        assert_eq!(bitmap_bytes(2 << 20), 512);
        assert_eq!(bitmap_bytes(4 << 20), 1024);
        assert_eq!(bitmap_bytes(256 << 20), 64 << 10);
    }

    #[test]
    fn worked_example_of_the_sheet() {
        let mut bytes = [0u8; 512];
        let hex = "636f6e656374697800000002000100000000000000000200\
                   3292f05371656d75000500035769326b00000000014058000000000001405800025b041100000003";
        for (index, byte) in bytes.iter_mut().enumerate().take(hex.len() / 2) {
            *byte = u8::from_str_radix(&hex[index * 2..index * 2 + 2], 16).unwrap();
        }
        let footer = Footer::read(&bytes).unwrap().sealed();
        assert!(footer.is_sound() && footer.is_known());
        assert_eq!(footer.disk_type(), Some(DiskType::Dynamic));
        assert_eq!(footer.current_size.get(), 20_994_048);
        assert_eq!(footer.chs(), Chs { cylinders: 603, heads: 4, sectors: 17 });
        assert_eq!(&footer.creator_app, b"qemu");

        let mut header = [0u8; 1024];
        header[..8].copy_from_slice(DYNAMIC_COOKIE);
        header[8..16].fill(0xff);
        header[16..36].copy_from_slice(&[0, 0, 0, 0, 0, 0, 6, 0, 0, 1, 0, 0, 0, 0, 0, 11, 0, 0x20, 0, 0]);
        header[36..40].copy_from_slice(&0xffff_f46c_u32.to_be_bytes());
        let header = parse_dynamic(&header, 512, 2_100_224).unwrap();
        assert_eq!((header.max_table_entries.get(), header.block_size.get()), (11, 2 << 20));
    }
}
