//! Files that are two formats, or none, and formats given by hand.

use super::kit::{Cases, Check, Sparse, pattern};
use super::{qcow2, vdi, vhd, vmdk};
use vellum::Code;

const MIB: u64 = 1 << 20;

pub(super) fn add(cases: &mut Cases) {
    polyglots(cases);
    raw(cases);
    wrong_format(cases);
}

/// `front` with the bytes of a VDI header from its signature on, and a map of its own.
fn with_vdi(front: &[u8]) -> Sparse {
    vdi::base().put(0, &[0; 64]).put(0, front)
}

fn polyglots(cases: &mut Cases) {
    let two = |cases: &mut Cases, name: &str, file: Sparse| {
        cases.refuse(name, 5, file, Code::Ambiguous);
    };
    two(cases, "raw/qcow2-and-vdi", with_vdi(&qcow2::base().read(0, 64)));
    two(cases, "raw/vmdk-and-vdi", with_vdi(&vmdk::sparse().read(0, 64)));
    // Named by the user, one of them is meant.
    let vdi_content = Check {
        size: 5 * MIB,
        data: vec![(MIB, pattern(11, 4096)), (3 * MIB, pattern(33, 4096))],
        zeros: vec![0..MIB],
    };
    cases
        .accept("raw/qcow2-and-vdi-as-vdi", 5, with_vdi(&qcow2::base().read(0, 64)), vdi_content.clone())
        .as_format("vdi");
    // Any guest can write a footer to the end of its disk; which of the two it is, only the user knows.
    let tailed = |file: Sparse| {
        let len = file.len.next_multiple_of(512);
        file.cut(len).put(len, &vhd::fixed().read(MIB, 512))
    };
    two(cases, "raw/vdi-and-vhd-footer", tailed(vdi::base()));
    two(cases, "raw/qcow2-and-vhd-footer", tailed(qcow2::base()));
    cases.accept("raw/vdi-and-vhd-footer-as-vdi", 5, tailed(vdi::base()), vdi_content).as_format("vdi");
    cases
        .accept("raw/qcow2-and-vhd-footer-as-qcow2", 5, tailed(qcow2::base()), qcow2::content())
        .as_format("qcow2");
    let text = b"# Disk DescriptorFile\nversion=1\nRW 8 FLAT \"/etc/passwd\" 0\n";
    cases
        .refuse("raw/descriptor-and-vhd-footer", 5, tailed(Sparse::bytes(text)), Code::Ambiguous)
        .or(Code::PathEscape);
    cases.refuse("raw/descriptor-and-vdi", 5, with_vdi(text), Code::Ambiguous);
}

fn raw(cases: &mut Cases) {
    let check = |size, data| Check { size, data, zeros: Vec::new() };
    cases.accept("raw/empty", 8, Sparse::zeros(0), check(0, Vec::new()));
    cases.accept("raw/one-byte", 8, Sparse::bytes(b"x"), check(1, vec![(0, b"x".to_vec())]));
    cases.accept("raw/511-bytes", 8, Sparse::bytes(&[7; 511]), check(511, vec![(0, vec![7; 511])]));
    cases.accept(
        "raw/1e",
        8,
        Sparse::zeros(1 << 60).put(1 << 59, b"deep"),
        check(1 << 60, vec![(1 << 59, b"deep".to_vec())]),
    );
    // As raw, nothing in it is believed.
    for (name, file) in [
        ("raw/forged-qcow2", qcow2::backed(b"/etc/passwd", Some(b"raw"))),
        ("raw/forged-vdi", vdi::base()),
        ("raw/forged-vhd", vhd::fixed()),
        ("raw/forged-vmdk", vmdk::sparse()),
        ("raw/forged-descriptor", vmdk::parts("custom", "RW 8 FLAT \"/etc/passwd\" 0")),
    ] {
        let data = file.read(0, 512.min(file.len as usize));
        let check = check(file.len, vec![(0, data)]);
        cases.accept(name, 3, file, check).as_format("raw");
    }
    // The cookie of a footer without its checksum is data that happens to lie there.
    let cookie = Sparse::zeros(MIB).put(MIB - 512, b"conectix");
    cases.accept(
        "raw/vhd-cookie-by-accident",
        4,
        cookie,
        check(MIB, vec![(MIB - 512, b"conectix".to_vec())]),
    );
    cases.accept(
        "raw/text-not-descriptor",
        8,
        Sparse::bytes(b"# Disk\nhello\n"),
        check(13, vec![(0, b"# Disk".to_vec())]),
    );
    for (name, magic) in [("raw/luks", &b"LUKS\xba\xbe\0\x01"[..]), ("raw/only-magic-of-gpt", b"EFI PART")] {
        cases.accept(name, 5, Sparse::zeros(4096).put(0, magic), check(4096, vec![(0, magic.to_vec())]));
    }
}

fn wrong_format(cases: &mut Cases) {
    cases.refuse("qcow2/is-vdi", 5, vdi::base(), Code::BadMagic).as_format("qcow2");
    cases.refuse("vdi/is-qcow2", 5, qcow2::base(), Code::BadMagic).as_format("vdi");
    cases.refuse("vmdk/is-vdi", 5, vdi::base(), Code::BadMagic).as_format("vmdk");
    cases.refuse("vhd/is-qcow2", 5, qcow2::base(), Code::BadMagic).as_format("vhd");
    cases.refuse("vhd/is-zeros", 5, Sparse::zeros(MIB), Code::BadMagic).as_format("vhd");
    cases.refuse("vmdk/is-zeros-1e", 5, Sparse::zeros(1 << 60), Code::BadMagic).as_format("vmdk");
    cases.refuse("qcow2/is-zeros-1e", 5, Sparse::zeros(1 << 60), Code::BadMagic).as_format("qcow2");
    cases.refuse("raw/format-that-is-none", 5, Sparse::zeros(512), Code::Usage).as_format("nonsense");
}
