//! VMDK sparse extents (sheet vmdk.md, sections 3 to 6): KDMV, streamOptimized, COWD and seSparse.

use super::kit::{Cases, Check, Sparse, pattern};
use vellum::Code;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// Grain tables of [`sparse`]: GD at sector 30, its tables at 31 and 35.
const GD: u64 = 30 * SECTOR;
const RGD: u64 = 21 * SECTOR;
const GT: u64 = 31 * SECTOR;
const GTE16: u64 = GT + 16 * 4;
const RGTE16: u64 = 22 * SECTOR + 16 * 4;

/// An embedded descriptor for an image of `sectors`.
pub(super) fn descriptor(kind: &str, sectors: u64, header: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=5689b500\nparentCID=ffffffff\ncreateType=\"{kind}\"\n{header}\n\
         # Extent description\nRW {sectors} SPARSE \"disk.vmdk\"\n\n# The Disk Data Base\n#DDB\n\n\
         ddb.virtualHWVersion = \"4\"\nddb.adapterType = \"ide\"\n"
    )
}

fn header(version: u32, flags: u32, capacity: u64) -> Sparse {
    Sparse::default()
        .put(0, b"KDMV")
        .le32(4, version)
        .le32(8, flags)
        .le64(12, capacity)
        .le64(20, 128)
        .le64(28, 1)
        .le64(36, 20)
        .le32(44, 512)
        .put(72, &[0, 0x0A, 0x20, 0x0D, 0x0A])
        .put(511, &[0])
}

/// The worked example of section 11: 40 MiB, one grain at 1 MiB.
pub(super) fn sparse() -> Sparse {
    let text = descriptor("monolithicSparse", 0x14000, "");
    header(1, 3, 0x14000)
        .le64(48, 21)
        .le64(56, 30)
        .le64(64, 128)
        .put(SECTOR, text.as_bytes())
        .le32(RGD, 22)
        .le32(RGD + 4, 26)
        .le32(GD, 31)
        .le32(GD + 4, 35)
        .le32(GTE16, 128)
        .le32(RGTE16, 128)
        .put(0x10000, &pattern(60, 4096))
        .cut(0x20000)
}

pub(super) fn content() -> Check {
    Check {
        size: 40 * MIB,
        data: vec![(MIB, pattern(60, 4096))],
        zeros: vec![0..MIB, MIB + 64 * KIB..40 * MIB],
    }
}

/// zlib of `bytes`.
pub(super) fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let codec = vellum_codec::zlib(None).expect("the default level");
    assert!(codec.encode(bytes, &mut out, bytes.len() + 1024).expect("encoding"));
    out
}

fn first_grain() -> Vec<u8> {
    let mut grain = pattern(61, 4096);
    grain.resize(64 << 10, 0);
    grain
}

/// 256 KiB, grain 1 compressed at sector 128, tables behind it, footer and EOS.
pub(super) fn stream() -> Sparse {
    stream_with(&zlib(&first_grain()), None)
}

/// As [`stream`], with this payload and this declared size in the marker.
fn stream_with(payload: &[u8], declared: Option<u32>) -> Sparse {
    let marker = 128 * SECTOR;
    let gt = 256 * SECTOR;
    let gd = gt + 5 * SECTOR;
    let footer = gd + 3 * SECTOR;
    let base = header(3, 0x30001, 512).le64(56, u64::MAX).le64(64, 128).le16(77, 1);
    let copy = base.clone().le64(56, gd / SECTOR + 1).read(0, 512);
    base.put(SECTOR, descriptor("streamOptimized", 512, "").as_bytes())
        .le64(marker, 128)
        .le32(marker + 8, declared.unwrap_or(payload.len() as u32))
        .put(marker + 12, payload)
        .le64(gt, 4)
        .le32(gt + 12, 1)
        .le32(gt + SECTOR + 4, 128)
        .le64(gd, 1)
        .le32(gd + 12, 2)
        .le32(gd + SECTOR, (gt / SECTOR) as u32 + 1)
        .le64(gd + 2 * SECTOR, 1)
        .le32(gd + 2 * SECTOR + 12, 3)
        .put(footer, &copy)
        .cut(footer + 2 * SECTOR)
}

fn stream_content() -> Check {
    Check {
        size: 256 * KIB,
        data: vec![(64 * KIB, first_grain())],
        zeros: vec![0..64 * KIB, 128 * KIB..256 * KIB],
    }
}

/// COWD, 4 MiB, grains of one sector; guest sector 5 in the file. Reached through a descriptor.
pub(super) fn cowd() -> Sparse {
    Sparse::default()
        .put(0, b"COWD")
        .le32(4, 1)
        .le32(8, 3)
        .le32(12, 8192)
        .le32(16, 1)
        .le32(20, 4)
        .le32(24, 2)
        .le32(28, 38)
        .le32(4 * SECTOR, 5)
        .le32(5 * SECTOR + 5 * 4, 37)
        .put(37 * SECTOR, &pattern(62, 512))
}

/// seSparse, 4 MiB, one grain at guest 32 KiB. Reached through a descriptor.
pub(super) fn sesparse() -> Sparse {
    let areas = [(1, 1), (2, 2), (4, 4), (8, 8), (16, 64), (80, 8), (88, 8), (96, 64)];
    let file = Sparse::default()
        .le64(0, 0x0000_0000_CAFE_BABE)
        .le64(8, 0x0000_0002_0000_0001)
        .le64(16, 8192)
        .le64(24, 8)
        .le64(32, 64)
        .le64(512, 0x0000_0000_CAFE_CAFE);
    let file = areas
        .iter()
        .enumerate()
        .fold(file, |f, (i, (at, len))| f.le64(80 + i as u64 * 16, *at).le64(88 + i as u64 * 16, *len));
    file.le64(8 * SECTOR, 0x1000_0000_0000_0000)
        .le64(16 * SECTOR + 8 * 8, 0x3000_0000_0000_0000)
        .put(96 * SECTOR, &pattern(63, 4096))
        .cut(160 * SECTOR)
}

/// A stand-alone descriptor with these extent lines.
pub(super) fn parts(kind: &str, extents: &str) -> Sparse {
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=5689b500\nparentCID=ffffffff\ncreateType=\"{kind}\"\n\n\
         # Extent description\n{extents}\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\n"
    );
    Sparse::bytes(text.as_bytes())
}

pub(super) fn add(cases: &mut Cases) {
    fields(cases);
    tables(cases);
    whole_file(cases);
    streams(cases);
    other_kinds(cases);
    odd(cases);
}

fn fields(cases: &mut Cases) {
    let bad = |cases: &mut Cases, name: &str, file: Sparse, code, field, at| {
        cases.refuse(name, 1, file, code).field(field, at);
    };
    cases.refuse("vmdk/magic", 1, sparse().put(0, b"KDMX"), Code::BadMagic).as_format("vmdk");
    bad(cases, "vmdk/version-0", sparse().le32(4, 0), Code::Version, "version", 4);
    bad(cases, "vmdk/version-4", sparse().le32(4, 4), Code::Version, "version", 4);
    bad(cases, "vmdk/version-max", sparse().le32(4, u32::MAX), Code::Version, "version", 4);
    for (name, value) in [
        ("vmdk/grain-0", 0),
        ("vmdk/grain-1", 1),
        ("vmdk/grain-4", 4),
        ("vmdk/grain-odd", 129),
        ("vmdk/grain-2g", 0x40_0000),
        ("vmdk/grain-2-63", 1 << 63),
        ("vmdk/grain-max", u64::MAX),
    ] {
        bad(cases, name, sparse().le64(20, value), Code::Range, "grainSize", 20);
    }
    bad(cases, "vmdk/gtes-0", sparse().le32(44, 0), Code::Range, "numGTEsPerGT", 44);
    bad(cases, "vmdk/gtes-513", sparse().le32(44, 513), Code::Range, "numGTEsPerGT", 44);
    bad(cases, "vmdk/gtes-max", sparse().le32(44, u32::MAX), Code::Range, "numGTEsPerGT", 44);
    bad(cases, "vmdk/capacity-max", sparse().le64(12, u64::MAX), Code::Range, "capacity", 12);
    cases.refuse("vmdk/capacity-2-54", 1, sparse().le64(12, 1 << 54), Code::TableLimit).field("capacity", 12);
    cases.refuse("vmdk/capacity-2-40", 1, sparse().le64(12, 1 << 40), Code::OutOfFile).field("gdOffset", 56);
    bad(cases, "vmdk/overhead-past-end", sparse().le64(64, 257), Code::OutOfFile, "overHead", 64);
    bad(cases, "vmdk/overhead-max", sparse().le64(64, u64::MAX), Code::OutOfFile, "overHead", 64);
    bad(
        cases,
        "vmdk/newline-test",
        sparse().put(73, &[0x0A, 0x20, 0x0A, 0x0A]),
        Code::Corrupt,
        "newline test",
        73,
    );
    bad(cases, "vmdk/compression-2", sparse().le16(77, 2), Code::Feature, "compressAlgorithm", 77);
    bad(cases, "vmdk/compression-max", sparse().le16(77, u16::MAX), Code::Feature, "compressAlgorithm", 77);
    bad(
        cases,
        "vmdk/flags-and-compression",
        sparse().le32(8, 0x10003),
        Code::Corrupt,
        "compressAlgorithm",
        77,
    );
    bad(
        cases,
        "vmdk/descriptor-past-end",
        sparse().le64(28, 1 << 32),
        Code::OutOfFile,
        "descriptorOffset",
        28,
    );
    bad(
        cases,
        "vmdk/descriptor-offset-max",
        sparse().le64(28, u64::MAX),
        Code::Overflow,
        "descriptorOffset",
        28,
    );
    bad(
        cases,
        "vmdk/descriptor-size-max",
        sparse().le64(36, u64::MAX),
        Code::Overflow,
        "descriptorOffset",
        28,
    );
    bad(cases, "vmdk/descriptor-size-2m", sparse().le64(36, 4096), Code::TableLimit, "descriptorSize", 36);
    // Without a descriptor it may still be read, with a warning; where sizes differ, the smaller counts (section 9).
    cases.accept("vmdk/descriptor-size-0", 4, sparse().le64(36, 0), content());
    let mut smaller = content();
    (smaller.size, smaller.zeros[1].end) = (32 * MIB, 32 * MIB);
    cases.accept("vmdk/capacity-disagrees", 4, sparse().le64(12, 0x10000), smaller);
}

fn tables(cases: &mut Cases) {
    let gd = |cases: &mut Cases, name: &str, value: u64, code| {
        cases.refuse(name, 2, sparse().le64(56, value).le64(48, value), code).field("gdOffset", 56);
        // The redundant directory serves if it is whole.
        cases.accept(&format!("{name}-redundant-serves"), 4, sparse().le64(56, value), content());
    };
    gd(cases, "vmdk/gd-at-0", 0, Code::Overlap);
    gd(cases, "vmdk/gd-past-end", 256, Code::OutOfFile);
    gd(cases, "vmdk/gd-product-wraps", 1 << 55, Code::OutOfFile);
    cases.refuse("vmdk/gd-in-footer-of-none", 1, sparse().le64(56, u64::MAX), Code::Truncated);
    let gde = |cases: &mut Cases, name: &str, value: u32, code| {
        // The redundant directory would serve instead: it goes the same way.
        cases
            .refuse(name, 2, sparse().le32(GD, value).le32(RGD, value), code)
            .field("grain directory entry", GD);
    };
    gde(cases, "vmdk/gt-past-end", 256, Code::OutOfFile);
    gde(cases, "vmdk/gt-max", u32::MAX, Code::OutOfFile);
    let gte = |cases: &mut Cases, name: &str, value: u32, code| {
        cases
            .refuse(name, 2, sparse().le32(GTE16, value).le32(RGTE16, value), code)
            .field("grain table entry", GTE16);
    };
    gte(cases, "vmdk/grain-past-end", 256, Code::OutOfFile);
    gte(cases, "vmdk/grain-at-max", u32::MAX, Code::OutOfFile);
    gte(cases, "vmdk/grain-on-header", 2, Code::Overlap);
    gte(cases, "vmdk/grain-on-own-table", 31, Code::Overlap);
    gte(cases, "vmdk/grain-on-directory", 30, Code::Overlap);
    gte(cases, "vmdk/grain-1-without-flag", 1, Code::Overlap);
}

fn whole_file(cases: &mut Cases) {
    for (name, len) in [("vmdk/cut-0", 0), ("vmdk/cut-2", 2)] {
        cases.refuse(name, 5, sparse().cut(len), Code::BadMagic).or(Code::Truncated).as_format("vmdk");
    }
    cases.refuse("vmdk/cut-in-header", 5, sparse().cut(511), Code::Truncated);
    cases.refuse("vmdk/cut-after-header", 5, sparse().cut(512), Code::OutOfFile);
    cases.refuse("vmdk/cut-in-tables", 5, sparse().cut(GT), Code::OutOfFile);
    cases.refuse("vmdk/cut-before-grains", 5, sparse().cut(0xFFFF), Code::OutOfFile).about("overHead");
    cases
        .refuse("vmdk/cut-all-grains", 5, sparse().cut(0x10000), Code::OutOfFile)
        .field("grain table entry", GTE16);
    // The sheet: a truncated last grain is tolerated, the rest is zero.
    cases.accept("vmdk/cut-last-grain", 5, sparse().cut(0x11000), content());
    cases.accept("vmdk/trailing-bytes", 5, sparse().put(0x20000, &[0x55; 777]), content());
}

fn streams(cases: &mut Cases) {
    cases.accept("vmdk/stream-healthy", 8, stream(), stream_content());
    let bomb = zlib(&vec![0u8; 16 << 20]);
    cases.refuse("vmdk/stream-bomb", 6, stream_with(&bomb, None), Code::Decompress);
    cases.refuse("vmdk/stream-garbage", 6, stream_with(&[0xff; 100], None), Code::Decompress);
    cases.refuse(
        "vmdk/stream-cut-payload",
        6,
        stream_with(&zlib(&pattern(3, 65536)), Some(40)),
        Code::Decompress,
    );
    let mut wrong_sum = zlib(&first_grain());
    let last = wrong_sum.len() - 1;
    wrong_sum[last] ^= 1;
    cases.refuse("vmdk/stream-adler-wrong", 6, stream_with(&wrong_sum, None), Code::Decompress);
    let mut preset = zlib(&first_grain());
    preset[..2].copy_from_slice(&[0x78, 0xBB]);
    cases.refuse("vmdk/stream-preset-dictionary", 6, stream_with(&preset, None), Code::Decompress);
    let mut half = Check { size: 256 * KIB, data: vec![(64 * KIB, vec![0xEE; 1000])], ..Check::default() };
    half.zeros.push(65 * KIB..128 * KIB);
    cases.accept("vmdk/stream-grain-short", 6, stream_with(&zlib(&[0xEE; 1000]), None), half);
    cases.refuse("vmdk/stream-size-0", 1, stream_with(&zlib(&first_grain()), Some(0)), Code::Corrupt);
    cases.refuse(
        "vmdk/stream-size-max",
        1,
        stream_with(&zlib(&first_grain()), Some(u32::MAX)),
        Code::Corrupt,
    );
    cases.refuse(
        "vmdk/stream-size-past-end",
        1,
        stream_with(&zlib(&first_grain()), Some(120_000)),
        Code::Corrupt,
    );
    let marker = 128 * SECTOR;
    cases.refuse("vmdk/stream-lba-wrong", 2, stream().le64(marker, 0), Code::Corrupt);
    cases.refuse("vmdk/stream-lba-max", 2, stream().le64(marker, u64::MAX), Code::Corrupt);
    let footer = stream().len - 2 * SECTOR;
    cases.refuse("vmdk/stream-footer-magic", 5, stream().put(footer, b"KDMX"), Code::BadMagic);
    cases.refuse("vmdk/stream-footer-of-itself", 2, stream().le64(footer + 56, u64::MAX), Code::Range);
    cases.refuse("vmdk/stream-footer-gd-past-end", 2, stream().le64(footer + 56, 100_000), Code::OutOfFile);
    cases.accept("vmdk/stream-footer-disagrees", 4, stream().le64(footer + 12, 1024), stream_content());
    cases.refuse("vmdk/stream-cut-eos", 5, stream().cut(footer + 512), Code::Truncated);
    cases.refuse("vmdk/stream-cut-half", 5, stream().cut(200 * SECTOR), Code::Truncated);
    let large = stream().le64(20, 0x20_0000).le64(footer + 20, 0x20_0000);
    cases.refuse("vmdk/stream-grain-1g", 1, large, Code::Feature).field("grainSize", footer + 20);
}

fn other_kinds(cases: &mut Cases) {
    let cowd_disk = || parts("vmfsSparse", "RW 8192 VMFSSPARSE \"x-delta.vmdk\"");
    let check =
        Check { size: 4 * MIB, data: vec![(2560, pattern(62, 512))], zeros: vec![0..2560, 3072..4 * MIB] };
    cases.accept("vmdk/cowd-healthy", 8, cowd_disk(), check.clone()).with("x-delta.vmdk", cowd());
    // More entries than are needed: those past the need are never looked at.
    cases
        .accept("vmdk/cowd-directory-max", 1, cowd_disk(), check)
        .with("x-delta.vmdk", cowd().le32(24, u32::MAX));
    let mut bad = |name: &str, class, file: Sparse, code: Code| {
        cases.refuse(name, class, cowd_disk(), code).with("x-delta.vmdk", file).blames("x-delta.vmdk");
    };
    bad("vmdk/cowd-version", 1, cowd().le32(4, 2), Code::Version);
    bad("vmdk/cowd-grain-0", 1, cowd().le32(16, 0), Code::Range);
    bad("vmdk/cowd-grain-max", 1, cowd().le32(16, u32::MAX), Code::Range);
    bad("vmdk/cowd-directory-too-small", 4, cowd().le32(24, 1), Code::Range);
    bad("vmdk/cowd-directory-past-end", 2, cowd().le32(20, 0xFFFF_0000), Code::OutOfFile);
    bad("vmdk/cowd-table-past-end", 2, cowd().le32(4 * SECTOR, 0xFFFF_0000), Code::OutOfFile);
    bad("vmdk/cowd-grain-past-end", 2, cowd().le32(5 * SECTOR + 20, 0xFFFF_0000), Code::OutOfFile);
    bad("vmdk/cowd-cut", 5, cowd().cut(1000), Code::Truncated);

    let se_disk = || parts("seSparse", "RW 8192 SESPARSE \"x-sesparse.vmdk\"");
    let check = Check { size: 4 * MIB, data: vec![(32 * KIB, pattern(63, 4096))], zeros: vec![0..32 * KIB] };
    cases.accept("vmdk/sesparse-healthy", 8, se_disk(), check).with("x-sesparse.vmdk", sesparse());
    let mut bad = |name: &str, class, file: Sparse, code: Code| {
        cases.refuse(name, class, se_disk(), code).with("x-sesparse.vmdk", file).blames("x-sesparse.vmdk");
    };
    bad("vmdk/sesparse-version", 1, sesparse().le64(8, 3), Code::Version);
    bad("vmdk/sesparse-grain", 1, sesparse().le64(24, 16), Code::Feature);
    bad("vmdk/sesparse-capacity-max", 1, sesparse().le64(16, u64::MAX), Code::Range);
    bad("vmdk/sesparse-journal-pending", 7, sesparse().le64(512 + 24, 1), Code::Dirty);
    bad("vmdk/sesparse-volatile-magic", 1, sesparse().le64(512, 7), Code::BadMagic);
    bad("vmdk/sesparse-directory-entry", 2, sesparse().le64(8 * SECTOR, 0x1000_0000_FFFF_FFFF), Code::Range);
    bad("vmdk/sesparse-grain-type", 2, sesparse().le64(16 * SECTOR + 64, 0x7000_0000_0000_0000), Code::Range);
    bad(
        "vmdk/sesparse-grain-past-end",
        2,
        sesparse().le64(16 * SECTOR + 64, 0x3000_0000_0001_0000),
        Code::OutOfFile,
    );
    bad(
        "vmdk/sesparse-grain-max",
        1,
        sesparse().le64(16 * SECTOR + 64, 0x3FFF_FFFF_FFFF_FFFF),
        Code::Overflow,
    );
    bad("vmdk/sesparse-cut", 5, sesparse().cut(300), Code::Truncated);
}

fn odd(cases: &mut Cases) {
    cases.accept("vmdk/healthy", 8, sparse(), content());
    cases.accept("vmdk/unclean", 7, sparse().put(72, &[1]), content());
    // The redundant copy of a table lies elsewhere or is damaged: the primary serves.
    cases.accept("vmdk/redundant-past-end", 4, sparse().le64(48, 1 << 40), content());
    cases.accept("vmdk/redundant-differs", 4, sparse().le32(RGTE16, 0), content());
    let mut twice = content();
    twice.data.push((0, pattern(60, 4096)));
    twice.zeros.remove(0);
    cases.accept("vmdk/grain-twice", 2, sparse().le32(GT, 128).le32(22 * SECTOR, 128), twice);
    cases.accept(
        "vmdk/zeroed-grain",
        8,
        sparse().le32(4, 2).le32(8, 7).le32(GTE16, 1).le32(RGTE16, 1),
        Check { size: 40 * MIB, data: Vec::new(), zeros: vec![0..40 * MIB] },
    );
    cases.accept("vmdk/flags-unknown", 8, sparse().le32(8, 0x8000_0003), content());
}
