//! VDI (sheet vdi.md): the worked example of section 11, and what can be wrong with it.

use super::kit::{Cases, Check, Sparse, pattern};
use vellum::Code;

const MIB: u64 = 1 << 20;

/// 5 MiB, guest block 3 in file block 0, guest block 1 in file block 1.
pub(super) fn base() -> Sparse {
    Sparse::zeros(0x400 + 2 * MIB)
        .put(0, b"<<< Oracle VM VirtualBox Disk Image >>>\n")
        .le32(0x40, 0xBEDA_107F)
        .le32(0x44, 0x0001_0001)
        .le32(0x48, 0x180)
        .le32(0x4C, 1)
        .le32(0x154, 0x200)
        .le32(0x158, 0x400)
        .le32(0x168, 512)
        .le64(0x170, 5 * MIB)
        .le32(0x178, MIB as u32)
        .le32(0x180, 5)
        .le32(0x184, 2)
        .put(0x188, &pattern(1, 16))
        .put(0x198, &pattern(2, 16))
        .put(0x200, &[0xff; 20])
        .le32(0x204, 1)
        .le32(0x20C, 0)
        .put(0x400, &pattern(33, 4096))
        .put(0x400 + MIB, &pattern(11, 4096))
}

/// What [`base`] holds.
fn content() -> Check {
    Check {
        size: 5 * MIB,
        data: vec![(MIB, pattern(11, 4096)), (3 * MIB, pattern(33, 4096))],
        zeros: vec![0..MIB, 2 * MIB..3 * MIB, 4 * MIB..5 * MIB],
    }
}

pub(super) fn add(cases: &mut Cases) {
    header(cases);
    layout(cases);
    blocks(cases);
    map(cases);
    whole_file(cases);
    odd(cases);
}

fn header(cases: &mut Cases) {
    let bad = |cases: &mut Cases, name: &str, at, value, code, field| {
        cases.refuse(name, 1, base().le32(at, value), code).field(field, at);
    };
    cases
        .refuse("vdi/signature", 1, base().le32(0x40, 0xBEDA_1080), Code::BadMagic)
        .as_format("vdi")
        .field("signature", 0x40);
    bad(cases, "vdi/version-0", 0x44, 0, Code::Version, "version");
    bad(cases, "vdi/version-2", 0x44, 0x0002_0000, Code::Version, "version");
    bad(cases, "vdi/version-max", 0x44, u32::MAX, Code::Version, "version");
    bad(cases, "vdi/header-length-0", 0x48, 0, Code::Range, "cbHeader");
    bad(cases, "vdi/header-length-short", 0x48, 0x17F, Code::Range, "cbHeader");
    bad(cases, "vdi/type-0", 0x4C, 0, Code::Range, "type");
    bad(cases, "vdi/type-5", 0x4C, 5, Code::Range, "type");
    bad(cases, "vdi/type-max", 0x4C, u32::MAX, Code::Range, "type");
    bad(cases, "vdi/flags-unknown", 0x50, 0x8000_0002, Code::Range, "flags");
}

fn layout(cases: &mut Cases) {
    let bad = |cases: &mut Cases, name: &str, class, at, value, code, field| {
        cases.refuse(name, class, base().le32(at, value), code).field(field, at);
    };
    bad(cases, "vdi/map-at-0", 2, 0x154, 0, Code::Overlap, "offBlocks");
    bad(cases, "vdi/map-in-header", 2, 0x154, 0x1C4, Code::Overlap, "offBlocks");
    bad(cases, "vdi/map-misaligned", 1, 0x154, 0x202, Code::Misaligned, "offBlocks");
    cases
        .refuse(
            "vdi/map-past-end",
            2,
            base().le32(0x154, 0x7000_0000).le32(0x158, 0x7000_1000),
            Code::OutOfFile,
        )
        .field("offBlocks", 0x154);
    cases.refuse("vdi/map-max", 1, base().le32(0x154, 0xFFFF_FFFC), Code::Overlap).field("offData", 0x158);
    bad(cases, "vdi/data-at-0", 2, 0x158, 0, Code::Overlap, "offData");
    bad(cases, "vdi/data-in-map", 2, 0x158, 0x210, Code::Overlap, "offData");
    cases.refuse("vdi/data-past-end", 1, base().le32(0x158, 0xFFFF_FE00), Code::OutOfFile);
    // 0x40000080 entries of 4 bytes: a 32-bit product wraps to 0x200 and the map seems to fit.
    cases
        .refuse("vdi/map-product-wraps", 1, base().le32(0x180, 0x4000_0080), Code::Range)
        .field("cBlocks", 0x180);
    // The greatest map that is allowed needs 4 GiB of file, which is not there.
    cases.refuse("vdi/blocks-largest-allowed", 1, base().le32(0x180, 0x3FFF_FFFF), Code::Overlap);
    cases.refuse(
        "vdi/map-longer-than-file",
        1,
        base().le32(0x180, 0x2000_0000).le32(0x158, 0x8000_0200),
        Code::Truncated,
    );
}

fn blocks(cases: &mut Cases) {
    let bad = |cases: &mut Cases, name: &str, at, value, code, field| {
        cases.refuse(name, 1, base().le32(at, value), code).field(field, at);
    };
    for (name, value) in [
        ("vdi/block-size-0", 0),
        ("vdi/block-size-1", 1),
        ("vdi/block-size-2048", 2048),
        ("vdi/block-size-odd", MIB as u32 + 512),
        ("vdi/block-size-512m", 512 << 20),
        ("vdi/block-size-max", u32::MAX),
    ] {
        bad(cases, name, 0x178, value, Code::Range, "cbBlock");
    }
    bad(cases, "vdi/extra-odd", 0x17C, 3, Code::Range, "cbBlockExtra");
    bad(cases, "vdi/extra-larger-than-block", 0x17C, 2 << 20, Code::Range, "cbBlockExtra");
    bad(cases, "vdi/extra-max", 0x17C, u32::MAX, Code::Range, "cbBlockExtra");
    bad(cases, "vdi/blocks-max", 0x180, u32::MAX, Code::Range, "cBlocks");
    bad(cases, "vdi/allocated-max", 0x184, u32::MAX, Code::Range, "cBlocksAllocated");
    bad(cases, "vdi/allocated-more-than-blocks", 0x184, 6, Code::Range, "cBlocksAllocated");
    cases.refuse("vdi/size-max", 4, base().le64(0x170, u64::MAX), Code::SizeLie).field("cBlocks", 0x180);
    cases
        .refuse("vdi/size-larger-than-blocks", 4, base().le64(0x170, 5 * MIB + 512), Code::SizeLie)
        .field("cBlocks", 0x180);
    cases
        .refuse("vdi/blocks-0", 4, base().le32(0x180, 0).le32(0x184, 0), Code::SizeLie)
        .field("cBlocks", 0x180);
    cases
        .refuse("vdi/differencing-without-uuid", 4, base().le32(0x4C, 4), Code::Corrupt)
        .field("uuidLinkage", 0x1A8);
    cases.refuse("vdi/undo-without-uuid", 4, base().le32(0x4C, 3), Code::Corrupt).about("uuidLinkage");
}

fn map(cases: &mut Cases) {
    let entry = |cases: &mut Cases, name: &str, index: u64, value, code| {
        let at = 0x200 + index * 4;
        cases.refuse(name, 2, base().le32(at, value), code).field("block map entry", at);
    };
    entry(cases, "vdi/entry-past-allocated", 0, 2, Code::OutOfFile);
    entry(cases, "vdi/entry-max", 0, 0xFFFF_FFFD, Code::OutOfFile);
    entry(cases, "vdi/entry-past-file", 4, 1000, Code::OutOfFile);
    // Counter too small although the block is in the file: a crash of a writer that keeps the wrong order. It is advisory.
    cases.accept("vdi/counter-behind-map", 4, base().le32(0x184, 1), content());
    cases
        .refuse("vdi/last-block-cut", 5, base().cut(0x400 + 2 * MIB - 1), Code::Truncated)
        .field("block map entry", 0x204);
    cases.refuse("vdi/no-data-area", 5, base().cut(0x400), Code::OutOfFile).field("block map entry", 0x204);
}

fn whole_file(cases: &mut Cases) {
    for (name, len) in [
        ("vdi/cut-0", 0),
        ("vdi/cut-in-text", 0x20),
        ("vdi/cut-before-version", 0x44),
        ("vdi/cut-in-header", 0x170),
        ("vdi/cut-header-less-1", 0x1C7),
    ] {
        cases.refuse(name, 5, base().cut(len), Code::Truncated).as_format("vdi");
    }
    cases.refuse("vdi/cut-before-map", 5, base().cut(0x200), Code::OutOfFile).about("offBlocks");
    cases.refuse("vdi/cut-in-map", 5, base().cut(0x208), Code::Truncated).about("offBlocks");
    cases.accept("vdi/trailing-bytes", 5, base().put(0x400 + 2 * MIB, b"conectix trailing"), content());
}

fn odd(cases: &mut Cases) {
    cases.accept("vdi/healthy", 8, base(), content());
    let lchs = base()
        .put(0x200, &[0; 20])
        .le32(0x154, 0x300)
        .put(0x300, &[0xff; 20])
        .le32(0x304, 1)
        .le32(0x30C, 0)
        .le32(0x48, 0x190);
    cases.accept("vdi/header-with-lchs", 8, lchs.clone(), content());
    cases.accept("vdi/header-length-large", 8, lchs.le32(0x48, 0x800), content());
    // A file block of its own for two guest blocks is odd, but reading it is harmless.
    let mut twice = content();
    twice.zeros.remove(0);
    twice.data.push((0, pattern(11, 4096)));
    cases.accept("vdi/entry-twice", 2, base().le32(0x200, 1), twice);
    let mut zero = content();
    zero.data.remove(0);
    zero.zeros.push(MIB..2 * MIB);
    cases.accept("vdi/entry-zero", 8, base().le32(0x204, 0xFFFF_FFFE), zero);
    let mut smaller = content();
    smaller.size = 4 * MIB + 512;
    smaller.zeros.pop();
    cases.accept("vdi/size-unaligned", 8, base().le64(0x170, 4 * MIB + 700), smaller);
    cases.accept(
        "vdi/more-blocks-than-size",
        8,
        base().le32(0x180, 0x80),
        Check { size: 5 * MIB, ..Check::default() },
    );
    let empty = base().le64(0x170, 0).le32(0x180, 0).le32(0x184, 0).cut(0x400);
    cases.accept("vdi/no-bytes", 8, empty, Check::default());
    cases.accept("vdi/null-uuids", 8, base().put(0x188, &[0; 32]), content());
    // 64 TiB, all absent, the map a hole of 256 MiB full of zeros would be data: so one page of FREE and the rest cut.
    let blocks = 64u32 << 20;
    let big = base()
        .le64(0x170, u64::from(blocks) * MIB)
        .le32(0x180, blocks)
        .le32(0x184, 0)
        .le32(0x158, 0x1000_0200);
    cases
        .refuse("vdi/map-all-zero-entries", 2, big.cut(0x1000_0200), Code::OutOfFile)
        .about("block map entry");
    let extra = base()
        .le32(0x17C, 512)
        .cut(0x400)
        .put(0x400 + 512, &pattern(33, 4096))
        .put(0x400 + MIB + 1024, &pattern(11, 4096))
        .cut(0x400 + 2 * (MIB + 512));
    cases.accept("vdi/private-data-before-blocks", 8, extra, content());
    let mut small = Sparse::zeros(0x400 + 2 * 4096);
    small.runs = base().cut(0x400).runs;
    let small = small
        .le32(0x178, 4096)
        .le64(0x170, 5 * 4096)
        .put(0x400, &pattern(33, 4096))
        .put(0x400 + 4096, &pattern(11, 4096));
    let check = Check {
        size: 5 * 4096,
        data: vec![(4096, pattern(11, 4096)), (3 * 4096, pattern(33, 4096))],
        zeros: vec![0..4096, 8192..12288, 16384..20480],
    };
    cases.accept("vdi/block-size-4096", 8, small, check);
}
