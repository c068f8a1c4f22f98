//! VMDK descriptors (sheet vmdk.md, section 2): the text, and the extents that it names.

use super::kit::{Cases, Check, Content, Sparse, pattern};
use super::vmdk::{content as sparse_content, descriptor, parts, sparse};
use vellum::Code;

const MIB: u64 = 1 << 20;

/// The data of [`flat`].
fn flat_data() -> Sparse {
    Sparse::zeros(MIB).put(8192, &pattern(70, 512))
}

/// A flat disk of 1 MiB: descriptor and extent.
pub(super) fn flat() -> (Sparse, Sparse) {
    (parts("monolithicFlat", "RW 2048 FLAT \"x-flat.vmdk\" 0"), flat_data())
}

fn flat_content() -> Check {
    Check { size: MIB, data: vec![(8192, pattern(70, 512))], zeros: vec![0..8192, 16384..MIB] }
}

fn text(text: &str) -> Sparse {
    Sparse::bytes(text.as_bytes())
}

pub(super) fn add(cases: &mut Cases) {
    lines(cases);
    sizes(cases);
    extents(cases);
    whole_text(cases);
    odd(cases);
}

fn lines(cases: &mut Cases) {
    let mut bad = |name: &str, class, line: &str, code, field| {
        cases
            .refuse(name, class, parts("custom", line), code)
            .about(field)
            .beside("x-flat.vmdk", Content::Regular(flat_data()));
    };
    bad(
        "vmdk/line-sectors-overflow",
        1,
        "RW 18446744073709551616 FLAT \"x-flat.vmdk\" 0",
        Code::Overflow,
        "extent sectors",
    );
    bad(
        "vmdk/line-sectors-huge",
        1,
        "RW 36028797018963968 FLAT \"x-flat.vmdk\" 0",
        Code::Overflow,
        "extent sectors",
    );
    bad("vmdk/line-sectors-negative", 1, "RW -1 FLAT \"x-flat.vmdk\" 0", Code::Range, "extent sectors");
    bad("vmdk/line-sectors-hex", 1, "RW 0x10 FLAT \"x-flat.vmdk\" 0", Code::Range, "extent sectors");
    bad(
        "vmdk/line-offset-overflow",
        1,
        "RW 8 FLAT \"x-flat.vmdk\" 99999999999999999999",
        Code::Overflow,
        "extent offset",
    );
    bad("vmdk/line-offset-missing", 1, "RW 8 FLAT \"x-flat.vmdk\"", Code::Range, "extent offset");
    bad("vmdk/line-quote-open", 1, "RW 8 FLAT \"x-flat.vmdk 0", Code::Range, "extent file");
    bad("vmdk/line-file-missing", 1, "RW 8 FLAT", Code::Range, "extent file");
    bad("vmdk/line-file-empty", 1, "RW 8 SPARSE \"\"", Code::Range, "extent file");
    bad("vmdk/line-kind-unknown", 1, "RW 8 MAGIC \"x-flat.vmdk\" 0", Code::Feature, "extent type");
    let long = format!("RW 8 FLAT \"{}\" 0", "x".repeat(5000));
    bad("vmdk/line-name-5000", 1, &long, Code::Range, "extent file");
    let half = format!("RW {0} ZERO\nRW {0} ZERO\n", 1u64 << 54);
    bad("vmdk/line-sum-overflows", 1, &half, Code::Overflow, "extent sectors");
    let many = "RW 8 ZERO\n".repeat(4097);
    cases.refuse("vmdk/extents-4097", 1, parts("custom", &many), Code::TableLimit);
    let cid = String::from_utf8(flat().0.read(0, flat().0.len as usize)).expect("text");
    cases
        .refuse("vmdk/cid-not-hex", 1, text(&cid.replace("5689b500", "5689b50g")), Code::Range)
        .about("CID")
        .with("x-flat.vmdk", flat_data());
    cases
        .refuse("vmdk/parent-cid-long", 1, text(&cid.replace("ffffffff", "123456789")), Code::Range)
        .about("parentCID")
        .with("x-flat.vmdk", flat_data());
}

fn sizes(cases: &mut Cases) {
    let bomb = |line: &str, count: usize| text(&format!("# Disk DescriptorFile\n{}", line.repeat(count)));
    cases.refuse("vmdk/text-lines-bomb", 6, bomb("a=b\n", 100_000), Code::TableLimit);
    cases.refuse("vmdk/text-larger-than-limit", 6, bomb("#\n", 600_000), Code::TableLimit);
    cases.refuse(
        "vmdk/text-sparse-1t",
        6,
        text("# Disk DescriptorFile\nversion=1\n").cut(1 << 40),
        Code::TableLimit,
    );
    let one_line = format!("ddb.comment = \"{}\"\n", "x".repeat(900_000));
    let file = parts("monolithicFlat", &format!("RW 2048 FLAT \"x-flat.vmdk\" 0\n{one_line}"));
    cases.accept("vmdk/text-line-900k", 6, file, flat_content()).with("x-flat.vmdk", flat_data());
}

fn extents(cases: &mut Cases) {
    let flat_line = |sectors: u64, offset: u64| {
        parts("monolithicFlat", &format!("RW {sectors} FLAT \"x-flat.vmdk\" {offset}"))
    };
    let mut with_flat = |name: &str, class, file: Sparse, code| {
        cases.refuse(name, class, file, code).with("x-flat.vmdk", flat_data());
    };
    with_flat("vmdk/flat-longer-than-file", 4, flat_line(2049, 0), Code::Truncated);
    with_flat("vmdk/flat-offset-past-end", 2, flat_line(8, 4096), Code::Truncated);
    with_flat("vmdk/flat-offset-max", 1, flat_line(8, 1 << 54), Code::Truncated);
    cases
        .refuse("vmdk/extent-missing", 3, flat().0, Code::NotFound)
        .about("extent file")
        .blames("x-flat.vmdk");
    cases
        .refuse("vmdk/extent-is-text", 3, parts("custom", "RW 2048 SPARSE \"x.vmdk\""), Code::BadMagic)
        .with("x.vmdk", text("# Disk DescriptorFile\n").cut(4096));
    cases
        .refuse("vmdk/extent-sparse-cut", 5, parts("custom", "RW 81920 SPARSE \"x.vmdk\""), Code::Truncated)
        .with("x.vmdk", sparse().cut(100));
    // The smaller of two sizes counts, and a sparse extent is what its own header says (section 9).
    cases
        .accept(
            "vmdk/extent-capacity-smaller",
            4,
            parts("custom", "RW 81928 SPARSE \"x.vmdk\""),
            sparse_content(),
        )
        .with("x.vmdk", sparse());
    cases
        .accept(
            "vmdk/extent-of-other-kind",
            4,
            parts("vmfsSparse", "RW 81920 VMFSSPARSE \"x.vmdk\""),
            sparse_content(),
        )
        .with("x.vmdk", sparse());
}

fn whole_text(cases: &mut Cases) {
    cases.refuse("vmdk/text-empty", 5, text("# Disk DescriptorFile\n"), Code::Corrupt);
    cases.refuse("vmdk/text-no-extents", 5, parts("monolithicFlat", ""), Code::Corrupt);
    cases.refuse(
        "vmdk/text-is-binary",
        5,
        text("# Disk DescriptorFile\n").put(22, &[0xff; 2000]),
        Code::Corrupt,
    );
    let base = sparse();
    // The grains are whole: they can be read, with a warning that a parent may be missing.
    cases.accept("vmdk/embedded-text-zeroed", 5, base.clone().put(512, &[0; 1024]), sparse_content());
    cases.accept("vmdk/embedded-text-garbage", 5, base.put(512, &[0xA5; 10240]), sparse_content());
    let text = descriptor("monolithicSparse", 0x14001, "");
    let lie = sparse().put(512, &[0; 1024]).put(512, text.as_bytes());
    cases.accept("vmdk/embedded-sectors-lie", 4, lie, sparse_content());
}

fn odd(cases: &mut Cases) {
    cases.accept("vmdk/flat-healthy", 8, flat().0, flat_content()).with("x-flat.vmdk", flat().1);
    cases
        .accept("vmdk/flat-file-longer", 8, flat().0, flat_content())
        .with("x-flat.vmdk", flat_data().cut(3 * MIB));
    let holes = parts("custom", "RW 2048 ZERO\nNOACCESS 2048 ZERO\nRDONLY 2048 FLAT \"x-flat.vmdk\" 0");
    let check =
        Check { size: 3 * MIB, data: vec![(2 * MIB + 8192, pattern(70, 512))], zeros: vec![0..2 * MIB] };
    cases.accept("vmdk/zero-and-readonly-extents", 8, holes, check).with("x-flat.vmdk", flat_data());
    let zeros = parts("custom", &format!("RW {} ZERO", 1u64 << 51));
    let check = Check { size: 1 << 60, data: Vec::new(), zeros: vec![0..1 << 60] };
    cases.accept("vmdk/zero-extent-1e", 8, zeros, check);
    let crlf =
        String::from_utf8(flat().0.read(0, flat().0.len as usize)).expect("text").replace('\n', " \r\n");
    cases.accept("vmdk/text-crlf", 8, text(&crlf), flat_content()).with("x-flat.vmdk", flat_data());
    let unknown = parts("custom", "RW 2048 FLAT \"x-flat.vmdk\" 0\nfuture.key = \"1\"\nddb.unknown = \"x\"");
    cases.accept("vmdk/text-unknown-keys", 8, unknown, flat_content()).with("x-flat.vmdk", flat_data());
    let twice = parts("custom", "RW 2048 FLAT \"x-flat.vmdk\" 0\nRW 2048 FLAT \"x-flat.vmdk\" 0");
    cases.refuse("vmdk/one-file-twice", 2, twice, Code::Overlap).with("x-flat.vmdk", flat_data());
}
