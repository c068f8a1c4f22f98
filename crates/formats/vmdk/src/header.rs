//! The binary structures on disk (sheet sections 3 to 6), all little-endian.

use crate::problem;
use vellum_core::bytes::{add, div_ceil, mul, wide};
use vellum_core::{Code, Error, Result};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a sector, whatever the medium.
pub(crate) const SECTOR: u64 = 512;
/// Magic of a hosted sparse extent.
pub(crate) const MAGIC_KDMV: [u8; 4] = *b"KDMV";
/// Magic of an ESX sparse extent.
pub(crate) const MAGIC_COWD: [u8; 4] = *b"COWD";
/// Magic of a seSparse extent.
pub(crate) const MAGIC_SESPARSE: u64 = 0xCAFE_BABE;
/// Magic of the volatile header of a seSparse extent.
pub(crate) const MAGIC_SESPARSE_VOLATILE: u64 = 0xCAFE_CAFE;
/// `gdOffset` of a stream: the grain directory stands where the footer says.
pub(crate) const GD_AT_END: u64 = u64::MAX;
/// What the newline test holds in an undamaged file.
pub(crate) const NEWLINE_TEST: [u8; 4] = [0x0a, 0x20, 0x0d, 0x0a];
/// The newline test is valid.
pub(crate) const FLAG_NEWLINE_TEST: u32 = 1;
/// There is a redundant grain directory.
pub(crate) const FLAG_REDUNDANT: u32 = 2;
/// A grain table entry of 1 is a zeroed grain.
pub(crate) const FLAG_ZEROED_GRAIN: u32 = 4;
/// Grains are compressed.
pub(crate) const FLAG_COMPRESSED: u32 = 1 << 16;
/// Markers stand in front of grains and metadata.
pub(crate) const FLAG_MARKERS: u32 = 1 << 17;
/// Greatest grain: 1 GiB.
const GRAIN_SECTORS_MAX: u64 = 0x20_0000;
/// Greatest grain that is decompressed in one piece.
const COMPRESSED_GRAIN_MAX: u64 = 8 << 20;
/// Greatest grain directory (sheet section 9).
const GD_ENTRIES_MAX: u64 = 32 << 20;
/// Entries of a grain table of a COWD or seSparse extent.
pub(crate) const ESX_GTES: u64 = 4096;

/// Header (and footer) of a hosted sparse extent (section 3).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct SparseExtentHeader {
    pub magic: [u8; 4],
    pub version: U32,
    pub flags: U32,
    pub capacity: U64,
    pub grain_size: U64,
    pub descriptor_offset: U64,
    pub descriptor_size: U64,
    pub num_gtes_per_gt: U32,
    pub rgd_offset: U64,
    pub gd_offset: U64,
    pub over_head: U64,
    pub unclean_shutdown: u8,
    pub newline_test: [u8; 4],
    pub compress_algorithm: U16,
    pub pad: [u8; 433],
}

/// A marker of a stream (section 4). For a grain marker, `kind` is the start of the data.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct Marker {
    pub val: U64,
    pub size: U32,
    pub kind: U32,
}

/// Bytes of a grain marker before its data.
pub(crate) const GRAIN_MARKER_BYTES: u64 = 12;
/// Marker types of metadata.
pub(crate) const MARKER_GT: u32 = 1;
/// A grain directory follows.
pub(crate) const MARKER_GD: u32 = 2;
/// The footer follows.
pub(crate) const MARKER_FOOTER: u32 = 3;

/// The part of a COWD header that matters (section 5).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct CowdHeader {
    pub magic: [u8; 4],
    pub version: U32,
    pub flags: U32,
    pub capacity: U32,
    pub grain_size: U32,
    pub gd_offset: U32,
    pub num_gd_entries: U32,
    pub free_sector: U32,
    /// Root disk: cylinders, heads, sectors. Child: the name of its parent.
    pub root_or_parent: [u8; 1024],
    pub parent_generation: U32,
    pub generation: U32,
    pub name: [u8; 60],
    pub description: [u8; 512],
    pub saved_generation: U32,
    pub reserved: [u8; 8],
    pub unclean_shutdown: U32,
    pub pad: [u8; 396],
}

/// The constant header of a seSparse extent (section 6): offsets and sizes in sectors.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct SeSparseConstHeader {
    pub magic: U64,
    pub version: U64,
    pub capacity: U64,
    pub grain_size: U64,
    pub grain_table_size: U64,
    pub flags: U64,
    pub reserved: [U64; 4],
    pub volatile_header_offset: U64,
    pub volatile_header_size: U64,
    pub journal_header_offset: U64,
    pub journal_header_size: U64,
    pub journal_offset: U64,
    pub journal_size: U64,
    pub grain_dir_offset: U64,
    pub grain_dir_size: U64,
    pub grain_tables_offset: U64,
    pub grain_tables_size: U64,
    pub free_bitmap_offset: U64,
    pub free_bitmap_size: U64,
    pub backmap_offset: U64,
    pub backmap_size: U64,
    pub grains_offset: U64,
    pub grains_size: U64,
    pub pad: [u8; 304],
}

/// The volatile header of a seSparse extent.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct SeSparseVolatileHeader {
    pub magic: U64,
    pub free_gt_number: U64,
    pub next_txn_seq: U64,
    pub replay_journal: U64,
    pub pad: [u8; 480],
}

/// A structure at the start of `bytes`.
pub(crate) fn parse<T: FromBytes + KnownLayout + Immutable + Unaligned>(bytes: &[u8], at: u64) -> Result<T> {
    T::read_from_prefix(bytes).map(|(value, _)| value).map_err(|_| {
        Error::new(Code::Truncated, "the file ends inside a header")
            .at(at)
            .found(format!("{} bytes", bytes.len()))
            .allowed(format!("{} bytes", size_of::<T>()))
            .hint("the file is incomplete; copy it again from its source")
    })
}

/// A hosted sparse extent whose header was checked. Offsets in bytes, sizes as named.
#[derive(Clone, Debug)]
pub(crate) struct Hosted {
    pub capacity_sectors: u64,
    pub grain_sectors: u64,
    pub gtes: u64,
    pub gd: u64,
    pub rgd: Option<u64>,
    pub over_head: u64,
    pub compressed: bool,
    pub markers: bool,
    pub zeroed: bool,
    pub version: u32,
    pub is_unclean: bool,
    /// Every directory that the header names can be used.
    pub has_sound_directories: bool,
    pub warnings: Vec<String>,
}

impl SparseExtentHeader {
    /// Whether it is a mere container of a descriptor.
    pub(crate) fn is_container(&self) -> bool {
        self.capacity.get() == 0 && self.descriptor_offset.get() != 0
    }

    /// Byte offset and length of the embedded descriptor, if there is one.
    pub(crate) fn descriptor(&self, file_len: u64, limit: u64) -> Result<Option<(u64, u64)>> {
        let (sector, sectors) = (self.descriptor_offset.get(), self.descriptor_size.get());
        if sector == 0 || sectors == 0 {
            return Ok(None);
        }
        let (offset, len) = match (sector.checked_mul(SECTOR), sectors.checked_mul(SECTOR)) {
            (Some(offset), Some(len)) => (offset, len),
            _ => {
                return Err(problem(
                    Code::Overflow,
                    "the descriptor is out of reach",
                    "descriptorOffset",
                    28,
                )
                .found(format!("sector {sector}, {sectors} sectors"))
                .allowed("a place that 64 bits can hold")
                .hint("the header is damaged; restore it from a backup"));
            }
        };
        if len > limit {
            return Err(problem(
                Code::TableLimit,
                "the descriptor is larger than the limit",
                "descriptorSize",
                36,
            )
            .found(format!("{len} bytes"))
            .allowed(format!("up to {limit} bytes"))
            .hint("raise the limit `descriptor_bytes` if you trust the file"));
        }
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(problem(
                Code::OutOfFile,
                "the descriptor lies past the end of the file",
                "descriptorOffset",
                28,
            )
            .found(format!("byte {offset}, {len} bytes"))
            .allowed(format!("inside {file_len} bytes"))
            .hint("the file is truncated; copy it again from its source"));
        }
        Ok(Some((offset, len)))
    }

    /// Checks what stands before the offsets: what tells whether the file can be understood at all.
    pub(crate) fn check_kind(&self, base: u64) -> Result<()> {
        let at = |offset: u64| base.saturating_add(offset);
        if self.magic != MAGIC_KDMV {
            return Err(problem(Code::BadMagic, "this is not a sparse extent", "magic", base)
                .found(format!("{:02x?}", self.magic))
                .allowed("KDMV")
                .hint("the descriptor names a file that is something else"));
        }
        if !(1..=3).contains(&self.version.get()) {
            return Err(problem(Code::Version, "a version of VMDK that is not known", "version", at(4))
                .found(self.version.get())
                .allowed("1 to 3")
                .hint("convert the disk with the product that wrote it"));
        }
        if self.flags.get() & FLAG_NEWLINE_TEST != 0 && self.newline_test != NEWLINE_TEST {
            return Err(problem(
                Code::Corrupt,
                "the file was damaged by a transfer in text mode",
                "newline test",
                at(73),
            )
            .found(format!("{:02x?}", self.newline_test))
            .allowed(format!("{NEWLINE_TEST:02x?}"))
            .hint("copy the file again from its source in binary mode"));
        }
        if self.compress_algorithm.get() > 1 {
            return Err(problem(
                Code::Feature,
                "a compression that is not known",
                "compressAlgorithm",
                at(77),
            )
            .found(self.compress_algorithm.get())
            .allowed("0 (none), 1 (deflate)")
            .hint("convert the disk with the product that wrote it"));
        }
        if self.flags.get() & FLAG_COMPRESSED != 0 && self.compress_algorithm.get() == 0 {
            return Err(problem(
                Code::Corrupt,
                "the flags say that grains are compressed, the algorithm says that they are not",
                "compressAlgorithm",
                at(77),
            )
            .found(0)
            .allowed(1)
            .hint("the header is damaged; restore it from a backup"));
        }
        Ok(())
    }

    /// Checks every field that lookups use. `base` is where the header stands, for messages.
    pub(crate) fn check(&self, file_len: u64, base: u64) -> Result<Hosted> {
        self.check_kind(base)?;
        let at = |offset: u64| base.saturating_add(offset);
        let flags = self.flags.get();
        let (capacity, grain) = (self.capacity.get(), self.grain_size.get());
        let gtes = u64::from(self.num_gtes_per_gt.get());
        let compressed = self.compress_algorithm.get() == 1;
        check_grain(grain, 8, compressed, at(20))?;
        if !(1..=512).contains(&gtes) {
            return Err(problem(Code::Range, "entries of a grain table", "numGTEsPerGT", at(44))
                .found(gtes)
                .allowed("1 to 512")
                .hint("the header is damaged; restore it from a backup"));
        }
        check_capacity(capacity, at(12))?;
        let entries = div_ceil(capacity, mul(gtes, grain)?)?;
        if entries > GD_ENTRIES_MAX {
            return Err(problem(Code::TableLimit, "the grain directory is too large", "capacity", at(12))
                .found(format!("{entries} entries"))
                .allowed(format!("up to {GD_ENTRIES_MAX} entries"))
                .hint("the header is damaged, or made to exhaust memory"));
        }
        let mut warnings = Vec::new();
        let gd_bytes = mul(entries, 4)?;
        let rgd = self.redundant_directory(file_len, gd_bytes, &mut warnings);
        let mut gd = directory(self.gd_offset.get(), gd_bytes, file_len, "gdOffset", at(56));
        if let (Err(error), Some(rgd)) = (&gd, rgd) {
            warnings.push(format!("the grain directory cannot be used ({error}); its redundant copy is"));
            gd = Ok(rgd);
        }
        let has_sound_directories = warnings.is_empty();
        let over_head = self.over_head.get().saturating_mul(SECTOR);
        if over_head > file_len {
            return Err(problem(
                Code::OutOfFile,
                "the metadata alone is longer than the file",
                "overHead",
                at(64),
            )
            .found(format!("{} sectors", self.over_head.get()))
            .allowed(format!("up to {} sectors", file_len.checked_div(SECTOR).unwrap_or(0)))
            .hint("the file is truncated; copy it again from its source"));
        }
        if compressed && flags & FLAG_COMPRESSED == 0 {
            warnings.push("the algorithm says that grains are compressed, the flags do not".to_owned());
        }
        Ok(Hosted {
            capacity_sectors: capacity,
            grain_sectors: grain,
            gtes,
            gd: gd?,
            rgd,
            over_head,
            compressed,
            markers: flags & FLAG_MARKERS != 0,
            zeroed: flags & FLAG_ZEROED_GRAIN != 0,
            version: self.version.get(),
            is_unclean: self.unclean_shutdown != 0,
            has_sound_directories,
            warnings,
        })
    }

    fn redundant_directory(&self, file_len: u64, bytes: u64, warnings: &mut Vec<String>) -> Option<u64> {
        if self.flags.get() & FLAG_REDUNDANT == 0 || self.rgd_offset.get() == 0 {
            return None;
        }
        match directory(self.rgd_offset.get(), bytes, file_len, "rgdOffset", 48) {
            Ok(offset) => Some(offset),
            Err(error) => {
                warnings.push(format!("the redundant grain directory cannot be used: {error}"));
                None
            }
        }
    }
}

/// The byte offset of a directory that lies inside the file.
fn directory(sector: u64, bytes: u64, file_len: u64, field: &'static str, at: u64) -> Result<u64> {
    let offset = sector.checked_mul(SECTOR);
    let end = offset.and_then(|offset| offset.checked_add(bytes));
    let message = "the grain directory lies past the end of the file";
    match (offset, end) {
        (Some(offset), Some(end)) if end <= file_len && (offset > 0 || bytes == 0) => Ok(offset),
        (Some(0), _) => Err(problem(Code::Overlap, "the grain directory stands on the header", field, at)
            .found(0)
            .allowed("from sector 1")
            .hint("the header is damaged; restore it from a backup")),
        _ => Err(problem(Code::OutOfFile, message, field, at)
            .found(format!("sector {sector}, {bytes} bytes"))
            .allowed(format!("inside {file_len} bytes"))
            .hint("the file is truncated or its header damaged; copy it again from its source")),
    }
}

fn check_grain(grain: u64, min: u64, compressed: bool, at: u64) -> Result<()> {
    if !grain.is_power_of_two() || !(min..=GRAIN_SECTORS_MAX).contains(&grain) {
        return Err(problem(Code::Range, "size of a grain", "grainSize", at)
            .found(format!("{grain} sectors"))
            .allowed(format!("a power of two, {min} to {GRAIN_SECTORS_MAX} sectors"))
            .hint("the header is damaged; restore it from a backup"));
    }
    if compressed && mul(grain, SECTOR)? > COMPRESSED_GRAIN_MAX {
        return Err(problem(Code::Feature, "compressed grains of this size", "grainSize", at)
            .found(format!("{grain} sectors"))
            .allowed(format!("up to {COMPRESSED_GRAIN_MAX} bytes when compressed"))
            .hint("no known product writes such grains; the header is probably damaged"));
    }
    Ok(())
}

/// Greatest size of a disk in sectors (sheet section 9).
pub(crate) const DISK_SECTORS_MAX: u64 = 1 << 54;

fn check_capacity(capacity: u64, at: u64) -> Result<()> {
    if capacity > DISK_SECTORS_MAX {
        return Err(problem(Code::Range, "size of the extent", "capacity", at)
            .found(format!("{capacity} sectors"))
            .allowed(format!("up to {DISK_SECTORS_MAX} sectors"))
            .hint("the header is damaged; restore it from a backup"));
    }
    Ok(())
}

/// A COWD extent whose header was checked. Offsets in bytes.
#[derive(Clone, Debug)]
pub(crate) struct Cowd {
    pub capacity_sectors: u64,
    pub grain_sectors: u64,
    pub gd: u64,
    pub over_head: u64,
}

impl CowdHeader {
    /// Checks every field that lookups use.
    pub(crate) fn check(&self, file_len: u64) -> Result<Cowd> {
        if self.version.get() != 1 {
            return Err(problem(Code::Version, "a version of COWD that is not known", "version", 4)
                .found(self.version.get())
                .allowed(1)
                .hint("convert the disk with the product that wrote it"));
        }
        let (capacity, grain) = (u64::from(self.capacity.get()), u64::from(self.grain_size.get()));
        if grain == 0 || grain > GRAIN_SECTORS_MAX {
            return Err(problem(Code::Range, "size of a grain", "grainSize", 16)
                .found(format!("{grain} sectors"))
                .allowed(format!("1 to {GRAIN_SECTORS_MAX} sectors"))
                .hint("the header is damaged; restore it from a backup"));
        }
        let needed = div_ceil(capacity, mul(ESX_GTES, grain)?)?;
        if u64::from(self.num_gd_entries.get()) < needed {
            return Err(problem(
                Code::Range,
                "the grain directory is too small for the capacity",
                "numGDEntries",
                24,
            )
            .found(self.num_gd_entries.get())
            .allowed(format!("at least {needed}"))
            .hint("the header is damaged; restore it from a backup"));
        }
        let gd_bytes = mul(needed, 4)?;
        let gd = directory(u64::from(self.gd_offset.get()), gd_bytes, file_len, "gdOffset", 20)?;
        let over_head = wide(size_of::<CowdHeader>());
        Ok(Cowd { capacity_sectors: capacity, grain_sectors: grain, gd, over_head })
    }
}

/// A seSparse extent whose header was checked. Offsets in bytes.
#[derive(Clone, Debug)]
pub(crate) struct SeSparse {
    pub capacity_sectors: u64,
    pub gd: u64,
    pub tables: u64,
    pub tables_count: u64,
    pub grains: u64,
    pub volatile_header: u64,
}

/// Sectors of a grain of a seSparse extent.
pub(crate) const SESPARSE_GRAIN: u64 = 8;
const SESPARSE_TABLE_SECTORS: u64 = 64;

impl SeSparseConstHeader {
    /// Checks every field that lookups use against the constants of the sheet.
    pub(crate) fn check(&self, file_len: u64) -> Result<SeSparse> {
        let constants: [(u64, u64, &str, u64); 5] = [
            (self.version.get(), 0x0000_0002_0000_0001, "version", 8),
            (self.grain_size.get(), SESPARSE_GRAIN, "grainSize", 24),
            (self.grain_table_size.get(), SESPARSE_TABLE_SECTORS, "grainTableSize", 32),
            (self.flags.get(), 0, "flags", 40),
            (self.reserved.iter().fold(0, |all, r| all | r.get()), 0, "reserved", 48),
        ];
        for (found, allowed, field, at) in constants {
            if found != allowed {
                let code = if field == "version" { Code::Version } else { Code::Feature };
                return Err(problem(code, "a kind of seSparse extent that is not known", field, at)
                    .found(format!("{found:#x}"))
                    .allowed(format!("{allowed:#x}"))
                    .hint("convert the disk on the ESXi host that wrote it"));
            }
        }
        let capacity = self.capacity.get();
        check_capacity(capacity, 16)?;
        let tables_needed = div_ceil(capacity, mul(ESX_GTES, SESPARSE_GRAIN)?)?;
        let gd_bytes = mul(tables_needed, 8)?;
        if self.grain_dir_size.get().saturating_mul(SECTOR) < gd_bytes {
            return Err(problem(
                Code::Range,
                "the grain directory is too small for the capacity",
                "grain directory size",
                136,
            )
            .found(format!("{} sectors", self.grain_dir_size.get()))
            .allowed(format!("at least {gd_bytes} bytes"))
            .hint("the header is damaged; restore it from a backup"));
        }
        let inside = |sector: &U64, sectors: u64, field, at| {
            directory(sector.get(), sectors.saturating_mul(SECTOR), file_len, field, at)
        };
        let gd = directory(self.grain_dir_offset.get(), gd_bytes, file_len, "grain directory offset", 128)?;
        let tables = inside(&self.grain_tables_offset, 0, "grain tables offset", 144)?;
        let grains = inside(&self.grains_offset, 0, "grains offset", 192)?;
        let volatile_header = inside(&self.volatile_header_offset, 1, "volatile header offset", 80)?;
        let tables_count = self.grain_tables_size.get().checked_div(SESPARSE_TABLE_SECTORS).unwrap_or(0);
        Ok(SeSparse { capacity_sectors: capacity, gd, tables, tables_count, grains, volatile_header })
    }
}

impl SeSparseVolatileHeader {
    /// Checks that the journal needs no replay. `at` is where the header stands.
    pub(crate) fn check(&self, at: u64) -> Result<()> {
        if self.magic.get() != MAGIC_SESPARSE_VOLATILE {
            return Err(problem(Code::BadMagic, "the volatile header is not there", "volatile header", at)
                .found(format!("{:#x}", self.magic.get()))
                .allowed(format!("{MAGIC_SESPARSE_VOLATILE:#x}"))
                .hint("the extent is damaged; restore it from a backup"));
        }
        if self.replay_journal.get() != 0 {
            return Err(problem(
                Code::Dirty,
                "the extent was not closed: its journal must be replayed first",
                "replayJournal",
                add(at, 24)?,
            )
            .found(self.replay_journal.get())
            .allowed(0)
            .hint(
                "the journal's format is not public; start and stop the virtual machine on its ESXi host",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
