//! Chains of differencing images, of one format and mixed. The images are made byte by byte (`vellum_tests::chains`),
//! so that what is tested is not tested against itself.

use std::sync::Arc;
use vellum::{ChainOptions, Code, Disk, Error, FilePolicy, Location, Vellum};
use vellum_conformance::format::read_all;
use vellum_sim::MemoryFiles;
use vellum_tests::chains::{Content, Qcow2Image, UNIT, VdiImage, VhdImage, VhdPlaces, VmdkImage};
use vellum_tests::disks::{difference, noise};
use vellum_tests::tools::{qemu_to_raw, text};

/// Units of the disks: 24 units are 1.5 MiB.
const SIZE: u64 = 24 * UNIT;

/// What the base holds: everything, so that whatever shows through is seen.
fn base() -> Content {
    (0..SIZE / UNIT).fold(Content::new(SIZE), |content, unit| content.data(unit, 100 + unit))
}

/// What the child holds: data over data, a mark of zero over data, the rest shows the parent.
fn child() -> Content {
    Content::new(SIZE).data(3, 1).data(4, 2).data(17, 3).zero(9).zero(23)
}

fn open_with(files: &Arc<MemoryFiles>, name: &str, options: &ChainOptions) -> Result<Disk, Error> {
    Vellum::new(files.clone()).open(name, options).map(|(disk, _)| disk)
}

#[track_caller]
fn assert_reads(files: &Arc<MemoryFiles>, name: &str, expected: &[u8]) {
    assert_reads_with(files, name, &ChainOptions::default(), expected);
}

#[track_caller]
fn assert_reads_with(files: &Arc<MemoryFiles>, name: &str, options: &ChainOptions, expected: &[u8]) {
    let disk = open_with(files, name, options).unwrap_or_else(|e| panic!("opening {name}: {e:?}"));
    let content = read_all(&disk);
    assert_eq!(content.len(), expected.len(), "size of the disk");
    if let Some(at) = difference(&content, expected) {
        panic!("{name} differs at {at:#x}, unit {}", at as u64 / UNIT);
    }
}

/// Opening fails with this code, and says what to do.
#[track_caller]
fn assert_refused(files: &Arc<MemoryFiles>, name: &str, options: &ChainOptions, code: Code) {
    match open_with(files, name, options) {
        Ok(disk) => panic!("{name} opened as a chain of {}, expected {}", disk.layers().len(), code.as_str()),
        Err(error) => {
            assert_eq!(error.code(), code, "{error:?}");
            assert!(error.hint_text().is_some(), "no hint: {error:?}");
            assert!(error.image_name().is_some(), "no image named: {error:?}");
        }
    }
}

#[track_caller]
fn assert_is(files: &Arc<MemoryFiles>, name: &str, code: Code) {
    assert_refused(files, name, &ChainOptions::default(), code);
}

fn with_parents(parents: &[&str]) -> ChainOptions {
    ChainOptions { parents: parents.iter().map(|p| Location::from(*p)).collect(), ..Default::default() }
}

// One pair for each format: the base and the child as files `base` and `child`.

fn qcow2_pair(files: &MemoryFiles, base: Content, child: Content) {
    files.put("base", &Qcow2Image { content: base, ..Default::default() }.build());
    let image = Qcow2Image { content: child, backing: Some("base"), backing_format: Some("qcow2") };
    files.put("child", &image.build());
}

fn vmdk_pair(files: &MemoryFiles, base: Content, child: Content) {
    files.put("base", &VmdkImage::base(base, 0x1234_5678).build("base"));
    files.put("child", &vmdk_child(child).build("child"));
}

fn vmdk_child(content: Content) -> VmdkImage<'static> {
    VmdkImage { parent_cid: 0x1234_5678, hint: Some("base"), ..VmdkImage::base(content, 0x9abc_def0) }
}

/// As VirtualBox links its VMDKs: by UUIDs alone.
fn virtualbox_pair(files: &MemoryFiles, base: Content, child: Content) {
    let parent = VmdkImage { uuids: Some([1, 2, 0, 0]), ..VmdkImage::base(base, 7) };
    let delta = VmdkImage { uuids: Some([3, 4, 1, 2]), ..VmdkImage::base(child, 8) };
    files.put("base", &parent.build("base"));
    files.put("child", &delta.build("child"));
}

fn vdi_pair(files: &MemoryFiles, base: Content, child: Content) {
    files.put("base", &VdiImage { content: base, uuids: [1, 2], parent: None }.build());
    files.put("child", &VdiImage { content: child, uuids: [3, 4], parent: Some([1, 2]) }.build());
}

fn vhd_pair(files: &MemoryFiles, base: Content, child: Content) {
    files.put("base", &VhdImage { content: base, id: 1, parent: None }.build());
    let places = VhdPlaces { relative: Some(".\\base"), ..VhdPlaces::default() };
    files.put("child", &VhdImage { content: child, id: 2, parent: Some((1, places)) }.build());
}

type Pair = fn(&MemoryFiles, Content, Content);
const PAIRS: &[(&str, Pair)] = &[
    ("qcow2", qcow2_pair),
    ("vmdk", vmdk_pair),
    ("vmdk of VirtualBox", virtualbox_pair),
    ("vdi", vdi_pair),
    ("vhd", vhd_pair),
];

#[test]
fn a_child_reads_through_to_its_parent() {
    for (name, pair) in PAIRS {
        let files = MemoryFiles::new();
        pair(&files, base(), child());
        println!("{name}");
        assert_reads(&files, "child", &child().over(&base().over(&[])));
        // The parent alone is the parent.
        assert_reads(&files, "base", &base().over(&[]));
    }
}

#[test]
fn the_builders_and_qemu_agree() {
    let directory = tempfile::tempdir().unwrap();
    let expected = child().over(&base().over(&[]));
    for (name, format, pair) in [("qcow2", "qcow2", qcow2_pair as Pair), ("vmdk", "vmdk", vmdk_pair)] {
        let files = MemoryFiles::new();
        pair(&files, base(), child());
        let own = directory.path().join(name);
        std::fs::create_dir(&own).unwrap();
        for file in ["base", "child"] {
            std::fs::write(own.join(file), files.get(file).unwrap().to_vec()).unwrap();
        }
        let raw = own.join("raw");
        qemu_to_raw(&own.join("child"), format, &raw);
        assert_eq!(difference(&std::fs::read(&raw).unwrap(), &expected), None, "{name}");
        // And so do we, over real files.
        let local = Vellum::local(FilePolicy::default());
        let (disk, _) = local.open(text(&own.join("child")), &ChainOptions::default()).unwrap();
        assert_eq!(difference(&read_all(&disk), &expected), None, "{name}");
    }
}

#[test]
fn a_child_may_be_larger_or_smaller_than_its_parent() {
    for (name, pair) in PAIRS {
        for size in [SIZE + 5 * UNIT, SIZE + 512, SIZE - 3 * UNIT] {
            let files = MemoryFiles::new();
            let own = Content::new(size).data(2, 5).zero(6);
            pair(&files, base(), own.clone());
            println!("{name}, child of {size} bytes");
            assert_reads(&files, "child", &own.over(&base().over(&[])));
        }
    }
}

#[test]
fn three_levels_read_through() {
    let middle = Content::new(SIZE).data(4, 50).data(5, 51).zero(6);
    let top = Content::new(SIZE).data(6, 60).zero(5).data(7, 61);
    let expected = top.over(&middle.over(&base().over(&[])));

    let files = MemoryFiles::new();
    vdi_pair(&files, base(), middle.clone());
    files.put("top", &VdiImage { content: top.clone(), uuids: [5, 6], parent: Some([3, 4]) }.build());
    assert_reads(&files, "top", &expected);

    let files = MemoryFiles::new();
    vhd_pair(&files, base(), middle.clone());
    let places = VhdPlaces { name: Some("child"), ..VhdPlaces::default() };
    files.put("top", &VhdImage { content: top.clone(), id: 3, parent: Some((2, places)) }.build());
    assert_reads(&files, "top", &expected);

    let files = MemoryFiles::new();
    vmdk_pair(&files, base(), middle);
    let image = VmdkImage { parent_cid: 0x9abc_def0, hint: Some("child"), ..VmdkImage::base(top, 1) };
    files.put("top", &image.build("top"));
    assert_reads(&files, "top", &expected);
}

#[test]
fn vhd_parents_are_found_by_every_kind_of_place() {
    let expected = child().over(&base().over(&[]));
    let cases = [
        VhdPlaces { relative: Some("base"), ..Default::default() },
        VhdPlaces { relative: Some(".\\base"), ..Default::default() },
        VhdPlaces { name: Some("base"), ..Default::default() },
        // What is not there does not hide what is.
        VhdPlaces { relative: Some(".\\gone"), absolute: None, name: Some("base") },
        // The absolute path of the Windows machine that made it is refused, and the next place is tried.
        VhdPlaces { relative: None, absolute: Some("C:\\vm\\base"), name: Some("base") },
        // No place at all, or none that helps: among the images of the directory, by its id.
        VhdPlaces::default(),
        VhdPlaces { relative: Some(".\\gone"), ..Default::default() },
    ];
    for places in cases {
        let files = MemoryFiles::new();
        vhd_pair(&files, base(), child());
        let image = VhdImage { content: child(), id: 2, parent: Some((1, places)) };
        files.put("child", &image.build());
        println!("{places:?}");
        assert_reads(&files, "child", &expected);
    }
}

#[test]
fn in_a_child_without_data_everything_is_the_parents() {
    for (name, pair) in PAIRS {
        let files = MemoryFiles::new();
        pair(&files, base(), Content::new(SIZE));
        println!("{name}");
        assert_reads(&files, "child", &base().over(&[]));
    }
}

// What is refused.

#[test]
fn a_missing_parent_is_missing() {
    for (name, pair) in PAIRS {
        let files = MemoryFiles::new();
        pair(&files, base(), child());
        vellum::block_on(async {
            vellum::Resolver::delete(files.as_ref(), &Location::from("base")).await.unwrap();
        });
        println!("{name}");
        assert_is(&files, "child", Code::ParentMissing);
        // A neighbour that is no parent does not help.
        files.put("neighbour", &noise(1, 70_000));
        files.put("other.vdi", &VdiImage { content: base(), uuids: [9, 9], parent: None }.build());
        assert_is(&files, "child", Code::ParentMissing);
        // `info` works without the parent, and names it.
        let alone = Vellum::new(files.clone()).open_alone("child", &ChainOptions::default()).unwrap();
        assert!(alone.layer.image.info().parent.is_some(), "{name}");
    }
}

#[test]
fn an_image_without_its_parent_is_never_a_whole_disk() {
    // QEMU opens the first of these as if it were a base image, and reads zeros where the parent's data is.
    for (name, pair) in PAIRS {
        let files = MemoryFiles::new();
        pair(&files, base(), child());
        let only = MemoryFiles::new();
        only.put("child", &files.get("child").unwrap().to_vec());
        println!("{name}");
        assert_is(&only, "child", Code::ParentMissing);
    }
}

#[test]
fn another_image_in_the_parents_place_is_wrong() {
    let files = MemoryFiles::new();
    vdi_pair(&files, base(), child());
    files.put("base", &VdiImage { content: base(), uuids: [8, 2], parent: None }.build());
    assert_refused(&files, "child", &with_parents(&["base"]), Code::ParentWrong);
    // Never, whatever else is allowed.
    let lax = ChainOptions { allow_modified_parent: true, probe_parents: true, ..with_parents(&["base"]) };
    assert_refused(&files, "child", &lax, Code::ParentWrong);

    vhd_pair(&files, base(), child());
    files.put("base", &VhdImage { content: base(), id: 9, parent: None }.build());
    assert_is(&files, "child", Code::ParentWrong);

    virtualbox_pair(&files, base(), child());
    let other = VmdkImage { uuids: Some([9, 2, 0, 0]), ..VmdkImage::base(base(), 7) };
    files.put("base", &other.build("base"));
    assert_refused(&files, "child", &with_parents(&["base"]), Code::ParentWrong);
}

#[test]
fn a_parent_that_was_written_to_is_modified() {
    let expected = child().over(&base().over(&[]));
    let lax = ChainOptions { allow_modified_parent: true, ..ChainOptions::default() };

    let files = MemoryFiles::new();
    vdi_pair(&files, base(), child());
    files.put("base", &VdiImage { content: base(), uuids: [1, 9], parent: None }.build());
    assert_is(&files, "child", Code::ParentModified);
    assert_reads_with(&files, "child", &lax, &expected);

    let files = MemoryFiles::new();
    vmdk_pair(&files, base(), child());
    files.put("base", &VmdkImage::base(base(), 0x1234_5679).build("base"));
    assert_is(&files, "child", Code::ParentModified);
    assert_reads_with(&files, "child", &lax, &expected);

    let files = MemoryFiles::new();
    virtualbox_pair(&files, base(), child());
    let written = VmdkImage { uuids: Some([1, 9, 0, 0]), ..VmdkImage::base(base(), 7) };
    files.put("base", &written.build("base"));
    assert_is(&files, "child", Code::ParentModified);
    assert_reads_with(&files, "child", &lax, &expected);
}

#[test]
fn a_virtualbox_child_needs_no_modification_uuid() {
    // A null `uuidParentModify` says nothing, so that nothing is compared.
    let files = MemoryFiles::new();
    vdi_pair(&files, base(), child());
    files.put("child", &VdiImage { content: child(), uuids: [3, 4], parent: Some([1, 0]) }.build());
    assert_reads(&files, "child", &child().over(&base().over(&[])));
}

#[test]
fn a_ring_is_a_cycle() {
    let ring = |name: &'static str, backing: &'static str| {
        let image = Qcow2Image { content: child(), backing: Some(backing), backing_format: Some("qcow2") };
        (name, image.build())
    };
    let files = MemoryFiles::new();
    for (name, bytes) in [ring("self", "self"), ring("a", "b"), ring("b", "a"), ring("x", "./y")] {
        files.put(name, &bytes);
    }
    files.put("y", &ring("y", "z").1);
    files.put("z", &ring("z", "x").1);
    for name in ["self", "a", "b", "x", "y", "z"] {
        assert_is(&files, name, Code::Cycle);
    }

    // By hint and CID.
    let files = MemoryFiles::new();
    let vmdk = |own, parent, hint| VmdkImage {
        parent_cid: parent,
        hint: Some(hint),
        ..VmdkImage::base(child(), own)
    };
    files.put("a", &vmdk(1, 2, "b").build("a"));
    files.put("b", &vmdk(2, 1, "a").build("b"));
    assert_is(&files, "a", Code::Cycle);

    // By UUID alone: two images that call each other parent, and one that calls itself so.
    let files = MemoryFiles::new();
    files.put("a", &VdiImage { content: child(), uuids: [1, 1], parent: Some([2, 2]) }.build());
    files.put("b", &VdiImage { content: child(), uuids: [2, 2], parent: Some([1, 1]) }.build());
    files.put("self", &VdiImage { content: child(), uuids: [3, 3], parent: Some([3, 3]) }.build());
    assert_is(&files, "a", Code::Cycle);
    assert_is(&files, "b", Code::Cycle);
    assert_is(&files, "self", Code::Cycle);

    let files = MemoryFiles::new();
    let places = |name| VhdPlaces { name: Some(name), ..VhdPlaces::default() };
    files.put("a", &VhdImage { content: child(), id: 1, parent: Some((2, places("b"))) }.build());
    files.put("b", &VhdImage { content: child(), id: 2, parent: Some((1, places("a"))) }.build());
    assert_is(&files, "a", Code::Cycle);
}

#[test]
fn a_ring_of_real_files_is_a_cycle_however_they_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let image =
        |backing| Qcow2Image { content: child(), backing: Some(backing), backing_format: Some("qcow2") };
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("a"), image("b").build()).unwrap();
    std::fs::write(path("b"), image("link").build()).unwrap();
    std::fs::hard_link(path("a"), path("link")).unwrap();
    let result = Vellum::local(FilePolicy::default()).open(text(&path("a")), &ChainOptions::default());
    assert_eq!(result.err().map(|e| e.code()), Some(Code::Cycle));
}

#[test]
fn a_chain_of_64_opens_and_one_of_65_is_too_deep() {
    let files = MemoryFiles::new();
    files.put("0", &Qcow2Image { content: base(), ..Default::default() }.build());
    let mut expected = base().over(&[]);
    for level in 1..=64u64 {
        let content = Content::new(SIZE).data(level % 24, level);
        let backing = (level - 1).to_string();
        let image =
            Qcow2Image { content: content.clone(), backing: Some(&backing), backing_format: Some("qcow2") };
        files.put(&level.to_string(), &image.build());
        if level < 64 {
            expected = content.over(&expected);
        }
    }
    assert_reads(&files, "63", &expected);
    assert_is(&files, "64", Code::Depth);
    let mut wider = ChainOptions::default();
    wider.limits.chain_depth = 65;
    assert_eq!(open_with(&files, "64", &wider).unwrap().layers().len(), 65);
}

#[test]
fn a_backing_file_of_no_stated_format_is_probed_only_on_request() {
    let files = MemoryFiles::new();
    qcow2_pair(&files, base(), child());
    let silent = Qcow2Image { content: child(), backing: Some("base"), backing_format: None };
    files.put("child", &silent.build());
    assert_is(&files, "child", Code::FormatRequired);
    let expected = child().over(&base().over(&[]));
    let trusting = ChainOptions { probe_parents: true, ..ChainOptions::default() };
    assert_reads_with(&files, "child", &trusting, &expected);
    assert_reads_with(&files, "child", &with_parents(&["base"]), &expected);
    // What no format claims can only be raw.
    files.put("base", &base().over(&[]));
    assert_reads(&files, "child", &expected);
    // And what is said to be raw is raw, whatever it looks like.
    let qcow2 = Qcow2Image { content: base(), ..Default::default() }.build();
    files.put("base", &qcow2);
    let raw = Qcow2Image { content: child(), backing: Some("base"), backing_format: Some("raw") };
    files.put("child", &raw.build());
    assert_reads(&files, "child", &child().over(&qcow2));
}

#[test]
fn names_of_parents_do_not_lead_out() {
    let cases = [
        ("../base", Code::PathEscape),
        ("sub/../../base", Code::PathEscape),
        ("/etc/passwd", Code::PathEscape),
        ("nbd://server/export", Code::RemoteRef),
        ("json:{\"driver\":\"null-co\"}", Code::RemoteRef),
        ("https://server/disk.qcow2", Code::RemoteRef),
        ("fat:rw:/etc", Code::RemoteRef),
        ("\\\\server\\share\\base", Code::RemoteRef),
    ];
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("sub")).unwrap();
    for (name, code) in cases {
        let files = MemoryFiles::new();
        let bytes =
            Qcow2Image { content: child(), backing: Some(name), backing_format: Some("qcow2") }.build();
        files.put("child", &bytes);
        println!("{name}");
        assert_is(&files, "child", code);
        assert_eq!(files.calls().len(), 2, "nothing else is tried: {:?}", files.calls());
        // The real resolver says the same.
        let path = directory.path().join("child");
        std::fs::write(&path, bytes).unwrap();
        let result = Vellum::local(FilePolicy::default()).open(text(&path), &ChainOptions::default());
        assert_eq!(result.err().map(|e| e.code()), Some(code), "{name}, by the file system");
    }
    for (hint, code) in [("../base.vmdk", Code::PathEscape), ("/dev/sda", Code::PathEscape)] {
        let files = MemoryFiles::new();
        files.put("child", &VmdkImage { hint: Some(hint), ..vmdk_child(child()) }.build("child"));
        assert_is(&files, "child", code);
    }
    let files = MemoryFiles::new();
    let places = VhdPlaces { absolute: Some("\\\\server\\vm\\base.vhd"), ..VhdPlaces::default() };
    files.put("child", &VhdImage { content: child(), id: 2, parent: Some((1, places)) }.build());
    assert_is(&files, "child", Code::RemoteRef);
    // But a parent that the user names is the user's affair.
    files.put("elsewhere/base", &VhdImage { content: base(), id: 1, parent: None }.build());
    assert_reads_with(&files, "child", &with_parents(&["elsewhere/base"]), &child().over(&base().over(&[])));
}

// Mixed chains.

#[test]
fn qcow2_over_a_flat_vmdk_over_a_raw_file() {
    let files = MemoryFiles::new();
    let raw = base().over(&[]);
    files.put("flat.raw", &raw);
    let descriptor = format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
         RW {} FLAT \"flat.raw\" 0\n",
        SIZE / 512
    );
    files.put("base", descriptor.as_bytes());
    // A sparse child of the flat disk, and a QCOW2 over it.
    files.put("middle", &vmdk_child(child()).build("middle"));
    let top = Content::new(SIZE).data(9, 70).zero(2);
    let image = Qcow2Image { content: top.clone(), backing: Some("middle"), backing_format: Some("vmdk") };
    files.put("top", &image.build());
    assert_reads(&files, "top", &top.over(&child().over(&raw)));
    // The hint names a descriptor: a raw file in its place is no parent, whatever the CID.
    files.put("middle", &VmdkImage { hint: Some("flat.raw"), ..vmdk_child(child()) }.build("middle"));
    assert_is(&files, "top", Code::BadMagic);
}

#[test]
fn a_virtualbox_chain_of_vdi_over_vmdk() {
    let files = MemoryFiles::new();
    virtualbox_pair(&files, base(), child());
    let top = Content::new(SIZE).data(9, 90).zero(3).data(0, 91);
    files.put("top.vdi", &VdiImage { content: top.clone(), uuids: [5, 6], parent: Some([3, 4]) }.build());
    assert_reads(&files, "top.vdi", &top.over(&child().over(&base().over(&[]))));
}

#[test]
fn qcow2_over_every_format() {
    for (name, pair) in PAIRS {
        let files = MemoryFiles::new();
        pair(&files, base(), child());
        let top = Content::new(SIZE).data(3, 80).zero(4);
        let format = name.split(' ').next();
        let image = Qcow2Image { content: top.clone(), backing: Some("child"), backing_format: format };
        files.put("top", &image.build());
        println!("{name}");
        assert_reads(&files, "top", &top.over(&child().over(&base().over(&[]))));
    }
    // VHD is what QEMU calls vpc.
    let files = MemoryFiles::new();
    vhd_pair(&files, base(), child());
    let image = Qcow2Image { content: child(), backing: Some("base"), backing_format: Some("vpc") };
    files.put("top", &image.build());
    assert_reads(&files, "top", &child().over(&base().over(&[])));
}

#[test]
fn the_user_may_name_every_parent_of_a_chain() {
    let files = MemoryFiles::new();
    vdi_pair(&files, base(), child());
    let top = Content::new(SIZE).data(1, 30);
    files.put("top", &VdiImage { content: top.clone(), uuids: [5, 6], parent: Some([3, 4]) }.build());
    let far = MemoryFiles::new();
    for (from, to) in [("top", "a/top"), ("child", "b/child"), ("base", "c/base")] {
        far.put(to, &files.get(from).unwrap().to_vec());
    }
    assert_is(&far, "a/top", Code::ParentMissing);
    assert_refused(&far, "a/top", &with_parents(&["b/child"]), Code::ParentMissing);
    let all = with_parents(&["b/child", "c/base"]);
    assert_reads_with(&far, "a/top", &all, &top.over(&child().over(&base().over(&[]))));
    assert_refused(&far, "a/top", &with_parents(&["c/base"]), Code::ParentWrong);
}
