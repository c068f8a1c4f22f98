//! VHD (sheet vhd.md): a fixed and a dynamic image with right checksums, and what can be wrong with them.

use super::kit::{Cases, Check, Sparse, pattern};
use vellum::Code;

const MIB: u64 = 1 << 20;
/// Where the dynamic header, the BAT and block 2 of [`dynamic`] stand.
const HEADER: u64 = 0x200;
const BAT: u64 = 0x600;
const BLOCK: u64 = 0x800;
/// Where the footer of [`dynamic`] stands, and its length.
const FOOTER: u64 = BLOCK + 512 + 2 * MIB;
const END: u64 = FOOTER + 512;

/// The sheet's checksum, put at `at + field`.
fn summed(file: Sparse, at: u64, len: usize, field: u64) -> Sparse {
    let file = file.be32(at + field, 0);
    let sum = file.read(at, len).iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    file.be32(at + field, !sum)
}

/// With the checksum of the footer at `at`.
pub(super) fn footer_summed(file: Sparse, at: u64) -> Sparse {
    summed(file, at, 512, 64)
}

/// With the checksum of the dynamic header at 0x200.
fn header_summed(file: Sparse) -> Sparse {
    summed(file, HEADER, 1024, 36)
}

/// With right checksums in footer, copy and dynamic header, as far as there is room for them.
pub(super) fn sealed(file: Sparse) -> Sparse {
    let len = file.len;
    if len < 512 {
        return file;
    }
    let file = footer_summed(footer_summed(file, 0), len - 512);
    let header = file.read(16, 8).iter().fold(0u64, |all, byte| all << 8 | u64::from(*byte));
    match header.checked_add(1024) {
        Some(end) if end <= len => summed(file, header, 1024, 36),
        _ => file,
    }
}

fn footer(file: Sparse, at: u64, kind: u32, size: u64) -> Sparse {
    let file = file
        .put(at, b"conectix")
        .be32(at + 8, 2)
        .be32(at + 12, 0x0001_0000)
        .be64(at + 16, if kind == 2 { u64::MAX } else { HEADER })
        .be32(at + 24, 0x3292_f053)
        .put(at + 28, b"win ")
        .be32(at + 32, 0x0006_0001)
        .put(at + 36, b"Wi2k")
        .be64(at + 40, size)
        .be64(at + 48, size)
        .be16(at + 56, 0x01E1)
        .put(at + 58, &[4, 17])
        .be32(at + 60, kind)
        .put(at + 68, &pattern(5, 16))
        .put(at + 511, &[0]);
    footer_summed(file, at)
}

/// Fixed, 1 MiB.
pub(super) fn fixed() -> Sparse {
    footer(Sparse::zeros(MIB).put(4096, &pattern(9, 512)), MIB, 2, MIB)
}

/// Dynamic, 16 MiB, block 2 (guest 4 MiB) allocated.
pub(super) fn dynamic() -> Sparse {
    sparse_of(3)
}

/// Differencing, as [`dynamic`]; the parent has the UUID of [`fixed`] and [`dynamic`].
pub(super) fn differencing() -> Sparse {
    let file = sparse_of(4).put(HEADER + 40, &pattern(5, 16));
    let file = footer_summed(
        footer_summed(file.put(68, &pattern(6, 16)), 0).put(FOOTER + 68, &pattern(6, 16)),
        FOOTER,
    );
    header_summed(file)
}

/// A differencing image whose parent has its own UUID.
pub(super) fn own_parent() -> Sparse {
    header_summed(differencing().put(HEADER + 40, &pattern(6, 16)))
}

/// Puts a parent locator into slot 0 of a differencing image, its text at 0x700.
pub(super) fn with_locator(file: Sparse, code: &[u8; 4], text: &[u8]) -> Sparse {
    let slot = HEADER + 576;
    let file =
        file.put(slot, code).be32(slot + 4, 512).be32(slot + 8, text.len() as u32).be64(slot + 16, 0x700);
    header_summed(file.put(0x700, text))
}

fn sparse_of(kind: u32) -> Sparse {
    let file = footer(footer(Sparse::zeros(END), 0, kind, 16 * MIB), FOOTER, kind, 16 * MIB);
    let file = file
        .put(HEADER, b"cxsparse")
        .be64(HEADER + 8, u64::MAX)
        .be64(HEADER + 16, BAT)
        .be32(HEADER + 24, 0x0001_0000)
        .be32(HEADER + 28, 8)
        .be32(HEADER + 32, 2 << 20)
        .put(BAT, &[0xff; 512])
        .be32(BAT + 8, (BLOCK / 512) as u32)
        .put(BLOCK, &[0xff; 512])
        .put(BLOCK + 512, &pattern(40, 4096));
    header_summed(file)
}

fn content() -> Check {
    let data = vec![(4 * MIB, pattern(40, 4096))];
    Check { size: 16 * MIB, data, zeros: vec![0..4 * MIB, 5 * MIB..16 * MIB] }
}

fn fixed_content() -> Check {
    Check { size: MIB, data: vec![(4096, pattern(9, 512))], zeros: vec![0..4096, 8192..MIB] }
}

/// A change to both footers of [`dynamic`], with right checksums.
fn both(change: impl Fn(Sparse, u64) -> Sparse) -> Sparse {
    [0, FOOTER].into_iter().fold(dynamic(), |file, at| footer_summed(change(file, at), at))
}

/// A change to the dynamic header, with its right checksum.
fn header(change: impl Fn(Sparse) -> Sparse) -> Sparse {
    header_summed(change(dynamic()))
}

pub(super) fn add(cases: &mut Cases) {
    footers(cases);
    copies(cases);
    dynamic_header(cases);
    bat(cases);
    locators(cases);
    whole_file(cases);
    odd(cases);
}

fn footers(cases: &mut Cases) {
    let bad = |cases: &mut Cases, name: &str, at: u64, value: u32, code, field| {
        cases
            .refuse(name, 1, both(|f, base| f.be32(base + at, value)), code)
            .as_format("vhd")
            .field(field, FOOTER + at);
    };
    bad(cases, "vhd/version-0", 12, 0, Code::Version, "version");
    bad(cases, "vhd/version-2", 12, 0x0002_0000, Code::Version, "version");
    bad(cases, "vhd/type-0", 60, 0, Code::Range, "diskType");
    bad(cases, "vhd/type-1", 60, 1, Code::Range, "diskType");
    bad(cases, "vhd/type-max", 60, u32::MAX, Code::Range, "diskType");
    let wide = |cases: &mut Cases, name: &str, class, at: u64, value: u64, code, field| {
        cases.refuse(name, class, both(|f, base| f.be64(base + at, value)), code).field(field, FOOTER + at);
    };
    wide(cases, "vhd/size-max", 1, 48, u64::MAX, Code::Range, "currentSize");
    wide(cases, "vhd/size-2040g-and-1", 1, 48, 0xFF00_0000 * 512 + 512, Code::Range, "currentSize");
    wide(cases, "vhd/size-unaligned", 1, 48, 16 * MIB - 1, Code::Range, "currentSize");
    wide(cases, "vhd/header-past-end", 2, 16, 1 << 40, Code::OutOfFile, "dataOffset");
    wide(cases, "vhd/header-max", 1, 16, u64::MAX - 511, Code::OutOfFile, "dataOffset");
    wide(cases, "vhd/header-all-ones", 1, 16, u64::MAX, Code::OutOfFile, "dataOffset");
    wide(cases, "vhd/header-cut", 2, 16, END - 512, Code::OutOfFile, "dataOffset");
    cases
        .refuse("vhd/header-on-footer", 2, both(|f, base| f.be64(base + 16, 0)), Code::BadMagic)
        .or(Code::Overlap);
    cases.refuse("vhd/header-on-bat", 2, both(|f, base| f.be64(base + 16, BAT)), Code::BadMagic);
    let big = footer_summed(fixed().be64(MIB + 48, 2 * MIB), MIB);
    cases.refuse("vhd/fixed-size-larger-than-file", 4, big, Code::SizeLie).field("currentSize", MIB + 48);
}

fn copies(cases: &mut Cases) {
    // Tail torn: the copy at 0 serves.
    cases.accept("vhd/tail-checksum-wrong", 4, dynamic().put(FOOTER + 100, b"x"), content());
    cases.accept("vhd/tail-zeroed", 4, dynamic().put(FOOTER, &[0; 512]), content());
    cases.accept("vhd/front-checksum-wrong", 4, dynamic().put(100, b"x"), content());
    cases
        .refuse(
            "vhd/both-checksums-wrong",
            4,
            dynamic().put(100, b"x").put(FOOTER + 100, b"x"),
            Code::Checksum,
        )
        .as_format("vhd");
    cases
        .refuse(
            "vhd/both-cookies-wrong",
            4,
            dynamic().put(0, b"conectiX").put(FOOTER, b"conectiX"),
            Code::BadMagic,
        )
        .as_format("vhd");
    cases
        .refuse("vhd/fixed-checksum-wrong", 4, fixed().put(MIB + 100, b"x"), Code::Checksum)
        .as_format("vhd");
    let mut smaller = content();
    smaller.size = 8 * MIB;
    smaller.zeros = vec![0..4 * MIB, 6 * MIB..8 * MIB];
    // Two valid footers that disagree: the tail wins.
    cases.accept(
        "vhd/footers-disagree",
        4,
        footer_summed(dynamic().be64(FOOTER + 48, 8 * MIB), FOOTER),
        smaller,
    );
    cases
        .refuse("vhd/header-checksum-wrong", 4, dynamic().put(HEADER + 800, b"x"), Code::Checksum)
        .field("checksum of the dynamic header", HEADER + 36);
}

fn dynamic_header(cases: &mut Cases) {
    let bad = |cases: &mut Cases, name: &str, class, at: u64, value: u32, code, field| {
        cases.refuse(name, class, header(|f| f.be32(HEADER + at, value)), code).field(field, HEADER + at);
    };
    cases
        .refuse("vhd/header-cookie", 1, header(|f| f.put(HEADER, b"cxsparsf")), Code::BadMagic)
        .field("cookie of the dynamic header", HEADER);
    bad(cases, "vhd/header-version", 1, 24, 0x0002_0000, Code::Version, "headerVersion");
    for (name, value) in [
        ("vhd/block-size-0", 0),
        ("vhd/block-size-1", 1),
        ("vhd/block-size-256", 256),
        ("vhd/block-size-odd", 3 << 20),
        ("vhd/block-size-512m", 512 << 20),
        ("vhd/block-size-max", u32::MAX),
    ] {
        bad(cases, name, 1, 32, value, Code::Range, "blockSize");
    }
    bad(cases, "vhd/entries-0", 4, 28, 0, Code::SizeLie, "maxTableEntries");
    bad(cases, "vhd/entries-too-few", 4, 28, 7, Code::SizeLie, "maxTableEntries");
    cases.refuse("vhd/entries-max", 1, header(|f| f.be32(HEADER + 28, u32::MAX)), Code::Truncated);
    cases.refuse(
        "vhd/entries-product-wraps",
        1,
        header(|f| f.be32(HEADER + 28, 0x4000_0008)),
        Code::Truncated,
    );
    let table = |cases: &mut Cases, name: &str, value: u64, code| {
        cases.refuse(name, 2, header(|f| f.be64(HEADER + 16, value)), code).field("tableOffset", HEADER + 16);
    };
    table(cases, "vhd/bat-at-0", 0, Code::Overlap);
    table(cases, "vhd/bat-on-header", HEADER, Code::Overlap);
    table(cases, "vhd/bat-reaches-into-header", HEADER - 4, Code::Overlap);
    table(cases, "vhd/bat-past-end", 1 << 40, Code::OutOfFile);
    table(cases, "vhd/bat-cut", END - 16, Code::Truncated);
    table(cases, "vhd/bat-misaligned", BAT + 1, Code::Misaligned);
    cases
        .refuse("vhd/bat-max", 1, header(|f| f.be64(HEADER + 16, u64::MAX - 3)), Code::Overflow)
        .or(Code::OutOfFile);
}

fn bat(cases: &mut Cases) {
    let entry = |cases: &mut Cases, name: &str, value: u32, code| {
        cases.refuse(name, 2, dynamic().be32(BAT + 8, value), code).field("BAT entry", BAT + 8);
    };
    entry(cases, "vhd/entry-0", 0, Code::Overlap);
    entry(cases, "vhd/entry-on-header", 1, Code::Overlap);
    entry(cases, "vhd/entry-on-bat", (BAT / 512) as u32, Code::Overlap);
    entry(cases, "vhd/entry-past-end", (END / 512) as u32, Code::OutOfFile);
    entry(cases, "vhd/entry-max", 0xFFFF_FFFE, Code::OutOfFile);
    entry(cases, "vhd/entry-block-cut", (BLOCK / 512) as u32 + 2, Code::Truncated);
    let small = both(|f, at| f.put(at + 511, &[0]));
    let small = header_summed(small.be32(HEADER + 32, 512).be32(HEADER + 28, 8));
    let small = [0, FOOTER].into_iter().fold(small, |f, at| footer_summed(f.be64(at + 48, 8 * 512), at));
    let check = Check { size: 4096, data: vec![(1024, pattern(40, 512))], zeros: vec![0..1024, 1536..4096] };
    cases.accept("vhd/block-size-512", 8, small, check);
}

fn locators(cases: &mut Cases) {
    let slot = HEADER + 576;
    let bad = |cases: &mut Cases, name: &str, len: u32, offset: u64, code| {
        let file = with_locator(differencing(), b"W2ru", b"x\0.\0v\0h\0d\0");
        let file = header_summed(file.be32(slot + 8, len).be64(slot + 16, offset));
        cases.refuse(name, 1, file, code).beside("x.vhd", super::Content::Regular(fixed()));
    };
    bad(cases, "vhd/locator-length-max", u32::MAX, 0x700, Code::Range);
    bad(cases, "vhd/locator-length-odd", 9, 0x700, Code::Range);
    bad(cases, "vhd/locator-past-end", 10, 1 << 50, Code::OutOfFile);
    bad(cases, "vhd/locator-offset-max", 10, u64::MAX - 1, Code::OutOfFile);
    cases.refuse("vhd/parent-missing", 3, differencing(), Code::ParentMissing);
    let lone = with_locator(differencing(), b"W2ru", &[0x00, 0xD8]);
    cases.refuse("vhd/locator-lone-surrogate", 1, lone, Code::Range);
}

fn whole_file(cases: &mut Cases) {
    for (name, len) in [("vhd/cut-0", 0), ("vhd/cut-8", 8), ("vhd/cut-in-footer", 511)] {
        cases.refuse(name, 5, dynamic().cut(len), Code::Truncated).as_format("vhd");
    }
    cases.refuse("vhd/cut-after-footer", 5, dynamic().cut(512), Code::OutOfFile).about("dataOffset");
    cases.refuse("vhd/cut-in-header", 5, dynamic().cut(0x5FF), Code::OutOfFile).about("dataOffset");
    cases.refuse("vhd/cut-before-bat", 5, dynamic().cut(0x600), Code::OutOfFile).about("tableOffset");
    cases.refuse("vhd/cut-in-bat", 5, dynamic().cut(0x610), Code::Truncated).about("tableOffset");
    cases.refuse("vhd/cut-before-block", 5, dynamic().cut(BLOCK), Code::OutOfFile).about("BAT entry");
    cases.refuse("vhd/cut-in-bitmap", 5, dynamic().cut(BLOCK + 100), Code::Truncated).about("BAT entry");
    cases.refuse("vhd/cut-in-block", 5, dynamic().cut(FOOTER - 1), Code::Truncated).about("BAT entry");
    // Torn while growing: the block is whole, the footer is not there yet; the copy at 0 serves.
    cases.accept("vhd/cut-tail-footer", 5, dynamic().cut(FOOTER), content());
    cases.accept("vhd/trailing-bytes", 5, dynamic().put(END, &[0x55; 1000]), content());
    // A fixed disk whose footer is not at the end has no footer: nobody claims it.
    let raw = Check { size: MIB + 1024, data: vec![(4096, pattern(9, 512))], zeros: Vec::new() };
    cases.accept("vhd/fixed-trailing-bytes-is-raw", 5, fixed().cut(MIB + 1024), raw);
    cases.refuse("vhd/fixed-trailing-bytes", 5, fixed().cut(MIB + 1024), Code::BadMagic).as_format("vhd");
}

fn odd(cases: &mut Cases) {
    cases.accept("vhd/healthy", 8, dynamic(), content());
    cases.accept("vhd/healthy-fixed", 8, fixed(), fixed_content());
    cases.accept("vhd/saved-state", 7, both(|f, at| f.put(at + 84, &[1])), content());
    cases.accept("vhd/features-unknown", 8, both(|f, at| f.be32(at + 8, 0xFFFF_FFFF)), content());
    cases.accept("vhd/entries-more-than-needed", 8, header(|f| f.be32(HEADER + 28, 100)), content());
    let empty = footer(Sparse::zeros(0), 0, 2, 0);
    cases.accept("vhd/fixed-no-bytes", 8, empty, Check::default());
    let mut partly = content();
    partly.zeros.push(4 * MIB + 512..4 * MIB + 4096);
    partly.data = vec![(4 * MIB, pattern(40, 512))];
    cases.accept("vhd/bitmap-one-bit", 8, dynamic().put(BLOCK, &[0; 512]).put(BLOCK, &[0x80]), partly);
    // A footer of 511 bytes, as Virtual PC before 2004 wrote it; the last byte of the 512 is reserved and 0.
    cases.accept("vhd/fixed-footer-511", 8, fixed().cut(MIB + 511), fixed_content());
    let mut twice = content();
    twice.data.push((0, pattern(40, 4096)));
    twice.zeros = vec![2 * MIB..4 * MIB, 6 * MIB..16 * MIB];
    cases.accept("vhd/entry-twice", 2, dynamic().be32(BAT, (BLOCK / 512) as u32), twice);
}
