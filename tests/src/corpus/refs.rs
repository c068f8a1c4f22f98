//! Names and identities of other files inside images: what must never be followed, and rings and long chains.

use super::kit::{Cases, Check, Content, Sparse, pattern};
use super::vmdk::parts;
use super::{qcow2, vdi, vhd, vmdk};
use vellum::Code;

const MIB: u64 = 1 << 20;

/// What no image may name: (suffix of the case, name, code).
const FORBIDDEN: &[(&str, &str, Code)] = &[
    ("absolute", "/etc/passwd", Code::PathEscape),
    ("device", "/dev/zero", Code::PathEscape),
    ("parent-directory", "../secret.img", Code::PathEscape),
    ("hidden-parent-directory", "././../secret.img", Code::PathEscape),
    ("backslash-parent", "..\\secret.img", Code::PathEscape),
    ("unc", "\\\\server\\share\\secret.img", Code::RemoteRef),
    ("unc-slashes", "//server/share/secret.img", Code::RemoteRef),
    ("url-http", "http://127.0.0.1:9/secret.img", Code::RemoteRef),
    ("url-nbd", "nbd://127.0.0.1:9/secret", Code::RemoteRef),
    ("url-file", "file:///etc/passwd", Code::RemoteRef),
    ("pseudo-nbd", "nbd:127.0.0.1:9", Code::RemoteRef),
    ("pseudo-json", "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}", Code::RemoteRef),
    ("pseudo-fat", "fat:rw:/etc", Code::RemoteRef),
];

pub(super) fn add(cases: &mut Cases) {
    forbidden(cases);
    special_files(cases);
    missing_and_wrong(cases);
    rings(cases);
    chains(cases);
    vdi_links(cases);
    good(cases);
}

/// A VMDK that names `name` as its parent.
fn vmdk_child(name: &str, parent_cid: &str) -> Sparse {
    let text = vmdk::descriptor("monolithicSparse", 0x14000, &format!("parentFileNameHint=\"{name}\""))
        .replace("parentCID=ffffffff", &format!("parentCID={parent_cid}"));
    vmdk::sparse().put(512, &[0; 1024]).put(512, text.as_bytes())
}

/// A QCOW2 whose data lies in the file `name`.
fn data_file(name: &[u8]) -> Sparse {
    let file = qcow2::extensions(qcow2::base(), &[(0x4441_5441, name)]).be64(72, 1 << 2);
    // With a data file the host offset is the guest offset.
    file.be64(qcow2::L2 + 16 * 8, 1 << 63 | MIB)
}

fn utf16le(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

fn vhd_child(name: &str) -> Sparse {
    vhd::with_locator(vhd::differencing(), b"W2ru", &utf16le(name))
}

fn forbidden(cases: &mut Cases) {
    for (suffix, name, code) in FORBIDDEN {
        let name_of = |format: &str, what: &str| format!("{format}/{what}-{suffix}");
        let bytes = name.as_bytes();
        cases
            .refuse(&name_of("qcow2", "backing"), 3, qcow2::backed(bytes, Some(b"raw")), *code)
            .about("backing_file");
        cases.refuse(&name_of("qcow2", "data-file"), 3, data_file(bytes), *code);
        if !name.contains('"') {
            cases
                .refuse(
                    &name_of("vmdk", "extent"),
                    3,
                    parts("custom", &format!("RW 8 FLAT \"{name}\" 0")),
                    *code,
                )
                .about("extent file");
            cases
                .refuse(&name_of("vmdk", "parent"), 3, vmdk_child(name, "5689b500"), *code)
                .about("parentFileNameHint");
        }
        cases.refuse(&name_of("vhd", "parent"), 3, vhd_child(name), *code).about("W2ru");
    }
    cases.refuse("qcow2/backing-nul", 3, qcow2::backed(b"base\0.img", Some(b"raw")), Code::NulInName);
    cases.refuse("qcow2/data-file-nul", 3, data_file(b"data\0.img"), Code::NulInName);
    cases.refuse("vmdk/extent-nul", 3, parts("custom", "RW 8 FLAT \"a\0b\" 0"), Code::NulInName);
    cases.refuse("vmdk/parent-nul", 3, vmdk_child("a\0b", "5689b500"), Code::NulInName);
    cases.refuse("vhd/parent-nul", 3, vhd_child("a\0b"), Code::NulInName);
    let url = vhd::with_locator(vhd::differencing(), b"MacX", b"file://server/secret.vhd");
    cases.refuse("vhd/parent-mac-url", 3, url, Code::RemoteRef);
    let windows = vhd::with_locator(vhd::differencing(), b"W2ku", &utf16le("C:\\Windows\\secret.vhd"));
    cases.refuse("vhd/parent-drive-letter", 3, windows, Code::ExternalRef);
}

fn special_files(cases: &mut Cases) {
    let special: [(&str, Content, Code); 3] = [
        ("fifo", Content::Fifo, Code::ExternalRef),
        ("directory", Content::Directory, Code::ExternalRef),
        ("symlink-outside", Content::Symlink("../secret.img".into()), Code::PathEscape),
    ];
    for (suffix, content, code) in special {
        cases
            .refuse(&format!("qcow2/backing-{suffix}"), 3, qcow2::backed(b"x.img", Some(b"raw")), code)
            .beside("x.img", content.clone());
        cases
            .refuse(&format!("qcow2/data-file-{suffix}"), 3, data_file(b"x.img"), code)
            .beside("x.img", content.clone());
        cases
            .refuse(&format!("vmdk/extent-{suffix}"), 3, parts("custom", "RW 8 FLAT \"x.img\" 0"), code)
            .beside("x.img", content.clone());
        cases.refuse(&format!("vhd/parent-{suffix}"), 3, vhd_child("x.img"), code).beside("x.img", content);
    }
}

fn missing_and_wrong(cases: &mut Cases) {
    cases.refuse("qcow2/backing-missing", 3, qcow2::backed(b"gone.img", Some(b"raw")), Code::ParentMissing);
    cases.refuse("qcow2/data-file-missing", 3, data_file(b"gone.img"), Code::NotFound).blames("gone.img");
    cases
        .refuse("qcow2/data-file-bit-without-name", 4, qcow2::base().be64(72, 1 << 2), Code::Corrupt)
        .or(Code::ExternalRef);
    cases.refuse("vmdk/parent-missing", 3, vmdk_child("gone.vmdk", "5689b500"), Code::ParentMissing);
    // A guest can write any magic into a raw disk: what the child does not state is not guessed.
    cases
        .refuse("qcow2/backing-format-unstated", 3, qcow2::backed(b"b.qcow2", None), Code::FormatRequired)
        .with("b.qcow2", qcow2::base());
    cases
        .refuse("qcow2/backing-format-unknown", 3, qcow2::backed(b"b.img", Some(b"nonsense")), Code::Feature)
        .with("b.img", Sparse::zeros(MIB));
    cases
        .refuse("qcow2/backing-is-other-format", 3, qcow2::backed(b"b.img", Some(b"qcow2")), Code::BadMagic)
        .with("b.img", Sparse::zeros(MIB))
        .blames("b.img");
    cases
        .refuse("qcow2/backing-broken", 3, qcow2::backed(b"b.img", Some(b"qcow2")), Code::Range)
        .with("b.img", qcow2::base().be32(20, 99))
        .blames("b.img");
    cases
        .refuse("vmdk/parent-other-cid", 3, vmdk_child("p.vmdk", "11111111"), Code::ParentModified)
        .with("p.vmdk", vmdk::sparse());
    let other = vhd::footer_summed(vhd::fixed().put(MIB + 68, &[9; 16]), MIB);
    cases.refuse("vhd/parent-other-uuid", 3, vhd_child("p.vhd"), Code::ParentWrong).with("p.vhd", other);
}

fn rings(cases: &mut Cases) {
    let backed = |name: &str| qcow2::backed(name.as_bytes(), Some(b"qcow2"));
    cases.refuse("qcow2/backing-itself", 3, backed("disk.qcow2"), Code::Cycle);
    cases.refuse("qcow2/backing-itself-dotted", 3, backed("././disk.qcow2"), Code::Cycle);
    cases.refuse("qcow2/backing-itself-as-raw", 3, qcow2::backed(b"disk.qcow2", Some(b"raw")), Code::Cycle);
    cases
        .refuse("qcow2/ring-of-two", 3, backed("b.qcow2"), Code::Cycle)
        .with("b.qcow2", backed("disk.qcow2"));
    cases.refuse("qcow2/data-file-itself", 3, data_file(b"disk.qcow2"), Code::Cycle);
    let itself = || parts("custom", "RW 8 FLAT \"disk.vmdk\" 0");
    cases.refuse("vmdk/extent-itself", 3, itself(), Code::Cycle);
    cases.refuse(
        "vmdk/extent-itself-as-sparse",
        3,
        parts("custom", "RW 8 SPARSE \"disk.vmdk\""),
        Code::Cycle,
    );
    cases.refuse("vmdk/parent-itself", 3, vmdk_child("disk.vmdk", "5689b500"), Code::Cycle);
    cases
        .refuse("vmdk/ring-of-two", 3, vmdk_child("b.vmdk", "5689b500"), Code::Cycle)
        .with("b.vmdk", vmdk_child("disk.vmdk", "5689b500"));
    // The child's own UUID as that of its parent, and its own name.
    let own = vhd::with_locator(vhd::own_parent(), b"W2ru", &utf16le("disk.vhd"));
    cases.refuse("vhd/parent-itself", 3, own, Code::Cycle);
}

fn chains(cases: &mut Cases) {
    let long = |cases: &mut Cases, name: &str, extension: &str, link: &dyn Fn(&str) -> Sparse| {
        let at = |i: usize| format!("c{i}.{extension}");
        let mut case = cases.refuse(name, 3, link(&at(1)), Code::Depth);
        for i in 1..400 {
            let next = at((i + 1).min(399));
            case = match i {
                // The first 63 may be opened; a chain of 64 with the top image is the limit.
                1..64 => case.with(&at(i), link(&next)),
                _ => case.beside(&at(i), Content::Regular(link(&next))),
            };
        }
    };
    long(cases, "qcow2/chain-of-400", "qcow2", &|next| qcow2::backed(next.as_bytes(), Some(b"qcow2")));
    long(cases, "vmdk/chain-of-400", "vmdk", &|next| vmdk_child(next, "5689b500"));
}

fn vdi_links(cases: &mut Cases) {
    let child = |own: u8, parent: u8, modify: u8| {
        vdi::base()
            .le32(0x4C, 4)
            .put(0x188, &pattern(own, 16))
            .put(0x1A8, &pattern(parent, 16))
            .put(0x1B8, &if modify == 0 { vec![0; 16] } else { pattern(modify, 16) })
    };
    cases.refuse("vdi/parent-missing", 3, child(20, 1, 0), Code::ParentMissing);
    cases.refuse("vdi/parent-itself", 3, child(20, 20, 0), Code::Cycle);
    cases.refuse("vdi/ring-of-two", 3, child(20, 30, 0), Code::Cycle).with("b.vdi", child(30, 20, 0));
    cases.refuse("vdi/parent-modified", 3, child(20, 1, 99), Code::ParentModified).with("b.vdi", vdi::base());
    // The neighbour with the right UUID is broken: it is not taken.
    cases
        .refuse("vdi/parent-broken", 3, child(20, 1, 0), Code::ParentMissing)
        .with("b.vdi", vdi::base().le32(0x178, 3));
    // Parents are found by looking at every neighbour: that must not be done again for every link.
    let id = |i: u32| [pattern(77, 12), i.to_le_bytes().to_vec()].concat();
    let link = |i: u32| vdi::base().le32(0x4C, 4).put(0x188, &id(i)).put(0x1A8, &id(i + 1)).cut(0x400);
    let mut long = cases.refuse("vdi/chain-of-400", 3, link(0), Code::Depth);
    for i in 1..400 {
        long = long.with(&format!("c{i}.vdi"), link(i));
    }
    let check = Check {
        size: 5 * MIB,
        data: vec![(MIB, pattern(11, 4096)), (3 * MIB, pattern(33, 4096)), (0, pattern(33, 4096))],
        zeros: vec![2 * MIB..3 * MIB],
    };
    let parent = vdi::base().le32(0x200, 0).le32(0x20C, 0xFFFF_FFFF);
    cases.accept("vdi/parent-by-uuid", 8, child(20, 1, 2), check).with("b.vdi", parent);
}

fn good(cases: &mut Cases) {
    let check = Check {
        size: 10 * MIB,
        data: vec![(MIB, pattern(80, 4096)), (0, pattern(90, 512))],
        zeros: vec![512..MIB, 2 * MIB..2 * MIB + 4096, 5 * MIB..10 * MIB],
    };
    // The parent is shorter than the child, and has data where the child has a zero cluster.
    let parent = Sparse::zeros(3 * MIB).put(0, &pattern(90, 512)).put(2 * MIB, &pattern(91, 4096));
    cases
        .accept("qcow2/backing-raw", 8, qcow2::backed(b"b.img", Some(b"raw")), check.clone())
        .with("b.img", parent.clone());
    cases.accept("qcow2/backing-unstated-raw", 8, qcow2::backed(b"b.img", None), check).with("b.img", parent);
    // A raw parent that holds a forged header stays raw when the child says so.
    let forged = qcow2::backed(b"/etc/passwd", Some(b"raw"));
    let mut check = qcow2::content();
    check.data.push((0, b"QFI\xfb".to_vec()));
    check.zeros.truncate(0);
    cases
        .accept("qcow2/backing-raw-with-forged-header", 3, qcow2::backed(b"b.img", Some(b"raw")), check)
        .with("b.img", forged);
}
