//! The header (sheet section 1), read with every check that needs no other structure.

use vellum_core::{Code, Error, Limits, Result, bytes};
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(crate) const MAGIC: u32 = 0x5146_49fb;

pub(crate) const INCOMPAT_DIRTY: u64 = 1 << 0;
pub(crate) const INCOMPAT_CORRUPT: u64 = 1 << 1;
pub(crate) const INCOMPAT_DATA_FILE: u64 = 1 << 2;
pub(crate) const INCOMPAT_COMPRESSION: u64 = 1 << 3;
pub(crate) const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
pub(crate) const INCOMPAT_KNOWN: u64 = 0x1f;
pub(crate) const COMPAT_LAZY_REFCOUNTS: u64 = 1 << 0;
pub(crate) const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
pub(crate) const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;

pub(crate) const COMPRESSION_ZLIB: u8 = 0;
pub(crate) const COMPRESSION_ZSTD: u8 = 1;

/// Bytes that version 2 has, and the least and usual length of version 3.
pub(crate) const V2_LEN: u32 = 72;
pub(crate) const V3_LEN_MIN: u32 = 104;
pub(crate) const V3_LEN: u32 = 112;
/// Greatest refcount table in bytes (QEMU's limit).
pub(crate) const REFCOUNT_TABLE_MAX: u64 = 8 << 20;

/// The header as it stands in the file. Version 2 ends before `incompatible_features`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub magic: U32,
    pub version: U32,
    pub backing_file_offset: U64,
    pub backing_file_size: U32,
    pub cluster_bits: U32,
    pub size: U64,
    pub crypt_method: U32,
    pub l1_size: U32,
    pub l1_table_offset: U64,
    pub refcount_table_offset: U64,
    pub refcount_table_clusters: U32,
    pub nb_snapshots: U32,
    pub snapshots_offset: U64,
    pub incompatible_features: U64,
    pub compatible_features: U64,
    pub autoclear_features: U64,
    pub refcount_order: U32,
    pub header_length: U32,
    pub compression_type: u8,
    pub padding: [u8; 7],
}

/// The header, checked.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub version: u32,
    pub backing_file_offset: u64,
    pub backing_file_size: u32,
    pub cluster_bits: u32,
    pub size: u64,
    pub l1_size: u32,
    pub l1_table_offset: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u32,
    pub nb_snapshots: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub compatible: u64,
    pub autoclear: u64,
    pub refcount_order: u32,
    pub header_length: u32,
    pub compression_type: u8,
}

/// An error about one field of the header.
#[cold]
pub(crate) fn field(
    code: Code,
    what: &str,
    name: &str,
    at: u64,
    found: u64,
    allowed: impl std::fmt::Display,
) -> Error {
    Error::new(code, what).field(name).at(at).found(found).allowed(allowed).hint(
        "the header is damaged or was made to mislead; restore the image from a backup, or get it from a source that you trust",
    )
}

impl Header {
    /// Reads the header from the first bytes of a file of `file_len` bytes.
    pub fn read(head: &[u8], file_len: u64, limits: &Limits) -> Result<Self> {
        let raw = raw(head, file_len)?;
        let version = raw.version.get();
        let v3 = version >= 3;
        let mut header = Header {
            version,
            backing_file_offset: raw.backing_file_offset.get(),
            backing_file_size: raw.backing_file_size.get(),
            cluster_bits: raw.cluster_bits.get(),
            size: raw.size.get(),
            l1_size: raw.l1_size.get(),
            l1_table_offset: raw.l1_table_offset.get(),
            refcount_table_offset: raw.refcount_table_offset.get(),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            nb_snapshots: raw.nb_snapshots.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            incompatible: if v3 { raw.incompatible_features.get() } else { 0 },
            compatible: if v3 { raw.compatible_features.get() } else { 0 },
            autoclear: if v3 { raw.autoclear_features.get() } else { 0 },
            refcount_order: if v3 { raw.refcount_order.get() } else { 4 },
            header_length: if v3 { raw.header_length.get() } else { V2_LEN },
            compression_type: COMPRESSION_ZLIB,
        };
        if v3 && header.header_length > V3_LEN_MIN {
            header.compression_type = raw.compression_type;
        }
        header.check_shape()?;
        header.check_crypt(raw.crypt_method.get())?;
        header.check_tables(file_len, limits)?;
        Ok(header)
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1u64.checked_shl(self.cluster_bits).unwrap_or(0)
    }

    /// Whether L2 entries have a bitmap of subclusters.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & INCOMPAT_EXTENDED_L2 != 0
    }

    /// Whether guest data lies in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPAT_DATA_FILE != 0
    }

    /// Whether that file is the disk by itself.
    pub fn has_raw_data(&self) -> bool {
        self.has_data_file() && self.autoclear & AUTOCLEAR_RAW_DATA != 0
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        let entry = if self.extended_l2() { 16 } else { 8 };
        self.cluster().checked_div(entry).unwrap_or(0)
    }

    /// Guest bytes that one L2 table covers.
    pub fn l2_covers(&self) -> u64 {
        self.cluster().saturating_mul(self.l2_entries())
    }

    fn check_shape(&self) -> Result<()> {
        let at = |what, name, offset, found: u32, allowed: &str| {
            Err(field(Code::Range, what, name, offset, found.into(), allowed))
        };
        if !(9..=21).contains(&self.cluster_bits) {
            return at("the cluster size is out of range", "cluster_bits", 20, self.cluster_bits, "9 to 21");
        }
        if self.extended_l2() && self.cluster_bits < 14 {
            let found = self.cluster_bits;
            return at(
                "subclusters need larger clusters",
                "cluster_bits",
                20,
                found,
                "14 to 21 with extended L2",
            );
        }
        if self.refcount_order > 6 {
            return at(
                "the refcount width is out of range",
                "refcount_order",
                96,
                self.refcount_order,
                "0 to 6",
            );
        }
        let len = self.header_length;
        let aligned = len.is_multiple_of(8) && u64::from(len) <= self.cluster();
        if self.version >= 3 && (len < V3_LEN_MIN || !aligned) {
            let allowed = "104 to the cluster size, a multiple of 8";
            return at("the header length is out of range", "header_length", 100, len, allowed);
        }
        if self.compression_type > COMPRESSION_ZSTD {
            return Err(field(
                Code::Feature,
                "the compression type is not known",
                "compression_type",
                104,
                self.compression_type.into(),
                "0 (zlib), 1 (zstd)",
            )
            .hint("a newer version of the tool that wrote the image may know it"));
        }
        // Unknown bits are refused by name later; they may change what the known ones mean.
        let flagged = self.incompatible & INCOMPAT_COMPRESSION != 0;
        if self.incompatible & !INCOMPAT_KNOWN == 0 && flagged != (self.compression_type != COMPRESSION_ZLIB)
        {
            return Err(field(
                Code::Corrupt,
                "compression type and its feature bit contradict each other",
                "compression_type",
                104,
                self.compression_type.into(),
                "not 0 if and only if incompatible bit 3 is set",
            ));
        }
        Ok(())
    }

    fn check_crypt(&self, method: u32) -> Result<()> {
        let what = match method {
            0 => return Ok(()),
            1 => "the image is encrypted with legacy AES, which is not implemented",
            2 => "the image is encrypted with LUKS, which is not implemented for qcow2",
            _ => "the encryption method is not known",
        };
        Err(Error::new(Code::Feature, what)
            .field("crypt_method")
            .at(32)
            .found(method)
            .allowed("0 (none)")
            .hint("decrypt it first, with the tool that made it, into an unencrypted image"))
    }

    fn check_tables(&self, file_len: u64, limits: &Limits) -> Result<()> {
        let cluster = self.cluster();
        let l1_bytes = u64::from(self.l1_size).saturating_mul(8);
        if l1_bytes > limits.table_bytes {
            return Err(field(
                Code::TableLimit,
                "the L1 table is larger than the limit",
                "l1_size",
                36,
                self.l1_size.into(),
                format!("up to {} entries", limits.table_bytes / 8),
            ));
        }
        let needed = bytes::div_ceil(self.size, self.l2_covers())?;
        if u64::from(self.l1_size) < needed {
            return Err(field(
                Code::SizeLie,
                "the L1 table is too small for the size of the disk",
                "l1_size",
                36,
                self.l1_size.into(),
                format!("at least {needed} entries for {} bytes", self.size),
            ));
        }
        let rt_bytes = u64::from(self.refcount_table_clusters).saturating_mul(cluster);
        if rt_bytes > REFCOUNT_TABLE_MAX {
            let allowed = format!("up to {REFCOUNT_TABLE_MAX} bytes");
            let found = self.refcount_table_clusters.into();
            let what = "the refcount table is larger than the limit";
            return Err(field(Code::TableLimit, what, "refcount_table_clusters", 56, found, allowed));
        }
        if rt_bytes == 0 {
            let what = "the image has no refcount table";
            return Err(field(Code::Range, what, "refcount_table_clusters", 56, 0, "at least 1"));
        }
        let tables = [
            ("l1_table_offset", 40, self.l1_table_offset, l1_bytes),
            ("refcount_table_offset", 48, self.refcount_table_offset, rt_bytes),
        ];
        for (name, at, offset, len) in tables {
            if len > 0 {
                check_table(name, at, offset, len, cluster, file_len)?;
            }
        }
        let l1_end = self.l1_table_offset.saturating_add(l1_bytes);
        let rt_end = self.refcount_table_offset.saturating_add(rt_bytes);
        if l1_bytes > 0 && self.l1_table_offset < rt_end && self.refcount_table_offset < l1_end {
            let what = "the L1 table overlaps the refcount table";
            return Err(field(
                Code::Overlap,
                what,
                "l1_table_offset",
                40,
                self.l1_table_offset,
                "a place of its own",
            ));
        }
        Ok(())
    }
}

/// A table that the header names: aligned, behind the header, inside the file.
pub(crate) fn check_table(
    name: &str,
    at: u64,
    offset: u64,
    len: u64,
    cluster: u64,
    file_len: u64,
) -> Result<()> {
    if !bytes::rem(offset, cluster)?.eq(&0) {
        let allowed = format!("a multiple of {cluster}");
        return Err(field(Code::Misaligned, "a table is not aligned to clusters", name, at, offset, allowed));
    }
    if offset < cluster {
        return Err(field(
            Code::Overlap,
            "a table overlaps the header",
            name,
            at,
            offset,
            format!("{cluster} or more"),
        ));
    }
    match offset.checked_add(len) {
        None => Err(field(
            Code::Overflow,
            "the end of a table exceeds 64 bits",
            name,
            at,
            offset,
            "inside the file",
        )),
        Some(end) if end > file_len => Err(field(
            Code::OutOfFile,
            "a table reaches past the end of the file",
            name,
            at,
            offset,
            format!("{len} bytes inside the file of {file_len} bytes"),
        )),
        Some(_) => Ok(()),
    }
}

/// The bytes of the header, zero-filled where the file (or version 2) has none.
fn raw(head: &[u8], file_len: u64) -> Result<RawHeader> {
    if bytes::be32(head, 0) != Some(MAGIC) {
        return Err(Error::new(Code::BadMagic, "this is no qcow2 image")
            .field("magic")
            .at(0)
            .found(format!("{:02x?}", head.get(..4).unwrap_or(head)))
            .allowed("51 46 49 fb")
            .hint("leave out -f to have the format recognised"));
    }
    let version = bytes::be32(head, 1);
    let needed: usize = match version {
        Some(2) => 72,
        Some(3) => 104,
        Some(other) => {
            return Err(Error::new(Code::Version, "the version of the image is not implemented")
                .field("version")
                .at(4)
                .found(other)
                .allowed("2, 3")
                .hint("convert it with the tool that made it"));
        }
        None => 8,
    };
    if head.len() < needed {
        return Err(Error::new(Code::Truncated, "the file ends inside the header")
            .field("header")
            .at(file_len)
            .found(format!("{file_len} bytes"))
            .allowed(format!("at least {needed} bytes"))
            .hint("the file was cut off; get a complete copy"));
    }
    let mut whole = [0u8; size_of::<RawHeader>()];
    for (to, from) in whole.iter_mut().zip(head) {
        *to = *from;
    }
    RawHeader::read_from_bytes(&whole)
        .map_err(|_| Error::new(Code::Truncated, "the file ends inside the header"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The header of the sheet's worked example.
    pub(crate) fn worked_example() -> Vec<u8> {
        let mut head = vec![0u8; 112];
        let text = "514649fb000000030000000000000000 00000000000000100000000000a00000\
                    00000000000000010000000000030000 00000000000100000000000100000000";
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        for (i, pair) in digits.chunks(2).enumerate() {
            head[i] = u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        }
        head[96..104].copy_from_slice(&[0, 0, 0, 4, 0, 0, 0, 0x70]);
        head
    }

    #[test]
    fn the_worked_example_reads_as_the_sheet_says() {
        let header = Header::read(&worked_example(), 0x60000, &Limits::default()).unwrap();
        assert_eq!((header.version, header.cluster_bits, header.size), (3, 16, 0xa00000));
        assert_eq!((header.l1_size, header.l1_table_offset), (1, 0x30000));
        assert_eq!((header.refcount_table_offset, header.refcount_table_clusters), (0x10000, 1));
    }

    #[test]
    fn every_bad_field_has_its_code() {
        let cases: &[(usize, &[u8], Code)] = &[
            (0, b"QFI\xfa", Code::BadMagic),
            (4, &[0, 0, 0, 4], Code::Version),
            (20, &[0, 0, 0, 8], Code::Range),
            (20, &[0, 0, 0, 22], Code::Range),
            (20, &[0xff; 4], Code::Range),
            (24, &[0x7f, 0xff, 0xff, 0xff], Code::SizeLie),
            (32, &[0, 0, 0, 1], Code::Feature),
            (32, &[0, 0, 0, 2], Code::Feature),
            (36, &[0xff; 4], Code::TableLimit),
            (36, &[0; 4], Code::SizeLie),
            (40, &[0, 0, 0, 0, 0, 3, 0, 1], Code::Misaligned),
            (40, &[0; 8], Code::Overlap),
            (40, &[0, 0, 0, 0, 0, 1, 0, 0], Code::Overlap),
            (40, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0], Code::OutOfFile),
            (48, &[0, 0, 0, 0, 0x10, 0, 0, 0], Code::OutOfFile),
            (56, &[0; 4], Code::Range),
            (56, &[0xff; 4], Code::TableLimit),
            (96, &[0, 0, 0, 7], Code::Range),
            (100, &[0, 0, 0, 96], Code::Range),
            (100, &[0, 0, 0, 107], Code::Range),
            (104, &[1], Code::Corrupt),
            (104, &[9], Code::Feature),
        ];
        for (at, bytes, code) in cases {
            let mut head = worked_example();
            head[*at..*at + bytes.len()].copy_from_slice(bytes);
            let error = Header::read(&head, 0x60000, &Limits::default()).expect_err("a bad field");
            assert_eq!(error.code(), *code, "field at {at}: {error}");
            assert!(error.hint_text().is_some() && error.field_name().is_some(), "{error}");
        }
        for len in 0..104 {
            let head = worked_example();
            assert!(Header::read(&head[..len], len as u64, &Limits::default()).is_err());
        }
    }
}
