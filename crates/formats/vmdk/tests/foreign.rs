//! Disks as other products write them, made by hand from the format sheet.

mod common;

use common::*;
use std::sync::Arc;
use vellum_conformance::format::{Model, Recipe, assert_same, pattern, write_image};
use vellum_core::{Code, Uuid, Value};
use vellum_sim::MemoryFiles;

/// A stream of two grain tables: grains 0, 2 and 600 of a disk of 1000 grains. Grain 600 decompresses short.
fn stream(version: u32, text: &str, mark_unknown: bool) -> Vec<u8> {
    let mut header = Header {
        version,
        flags: 0x30001,
        capacity: 128_000,
        rgd: 0,
        gd: u64::MAX,
        over_head: 128,
        compress: 1,
    };
    let mut s = Sectors(header.bytes());
    s.put(512, text.as_bytes());
    s.put(128 * 512 - 1, &[0]);
    let mut directory = Vec::new();
    for grains in [vec![0u64, 2], vec![600]] {
        let mut table = vec![0u8; 2048];
        for number in grains {
            let content = grain(number);
            let data = deflated(if number == 600 { &content[..1000] } else { &content });
            let at = s.append(&grain_marker(number * 128, &data));
            table[(number % 512) as usize * 4..][..4].copy_from_slice(&at.to_le_bytes());
        }
        if mark_unknown {
            s.append(&meta_marker(1, 4));
            s.append(&[0xee; 512]);
        }
        s.append(&meta_marker(4, 1));
        directory.extend_from_slice(&s.append(&table).to_le_bytes());
    }
    s.append(&meta_marker(1, 2));
    header.gd = s.append(&directory).into();
    s.append(&meta_marker(1, 3));
    s.append(&header.bytes());
    s.append(&[0; 512]);
    s.0
}

fn stream_model() -> Model {
    let mut model = Model { size: 128_000 * 512, ..Model::default() };
    for number in [0, 2] {
        model.data.insert(number * GRAIN as u64, grain(number));
    }
    model.data.insert(600 * GRAIN as u64, grain(600)[..1000].to_vec());
    model
}

fn one(name: &str, bytes: &[u8]) -> Arc<MemoryFiles> {
    let files = MemoryFiles::new();
    files.put(name, bytes);
    files
}

#[test]
fn streams_of_vmware_and_virtualbox_are_read() {
    let virtualbox = "ddb.uuid.image=\"6dcd6d83-0d2a-4b11-b0f0-9d7b2b9f6c11\"\n\
                      ddb.uuid.modification=\"00000000-0000-0000-0000-000000000000\"\n\
                      ddb.uuid.parent=\"00000000-0000-0000-0000-000000000000\"\n\
                      ddb.uuid.parentmodification=\"00000000-0000-0000-0000-000000000000\"\n";
    for (version, more, unknown) in [(3, "", false), (1, "", false), (3, "", true), (3, virtualbox, false)] {
        let text = descriptor("streamOptimized", 128_000, more);
        let (disk, notes) =
            open_noting(&one("renamed.vmdk", &stream(version, &text, unknown)), "renamed.vmdk");
        let disk = disk.unwrap();
        assert_same(&disk, &stream_model(), true);
        assert!(notes.is_empty(), "{notes:?}");
        let info = disk.layers()[0].image.info();
        assert_eq!(info.variant, "streamOptimized");
        assert_eq!(info.identity.uuid.is_some(), !more.is_empty());
        assert!(info.parent.is_none() && info.files.is_empty());
    }
}

#[test]
fn neighbouring_compressed_grains_are_bounded_by_each_other() {
    let text = descriptor("streamOptimized", 128_000, "");
    let disk = open(&one("disk.vmdk", &stream(3, &text, false)), "disk.vmdk").unwrap();
    let pieces = vellum_core::block_on(disk.pieces(0..GRAIN as u64, 10)).unwrap();
    let vellum_core::PieceKind::Encoded(_, encoded) = &pieces[0].kind else { panic!("{pieces:?}") };
    let len = deflated(&grain(0)).len() as u32 + 12;
    assert_eq!(encoded.len, len.next_multiple_of(512));
}

#[test]
fn a_stream_that_was_cut_off_says_so() {
    let whole = stream(3, &descriptor("streamOptimized", 128_000, ""), false);
    for len in [whole.len() - 512, whole.len() - 1536, whole.len() / 2, 66_000, 1024 + 10_240] {
        let error = open(&one("d.vmdk", &whole[..len]), "d.vmdk").map(|_| ()).unwrap_err();
        assert_eq!(error.code(), Code::Truncated, "{len}: {error}");
        assert!(error.hint_text().is_some_and(|hint| hint.contains("again")), "{error:?}");
    }
}

#[test]
fn the_worked_example_is_what_we_write() {
    let model = Model::with_runs(40 << 20, &[(1 << 20, 512)]);
    let bytes = our_file(&[], &model);
    assert_eq!(bytes.len(), 131_072);
    assert_eq!(bytes[0x2a00..0x2a08], [0x16, 0, 0, 0, 0x1a, 0, 0, 0]);
    assert_eq!(bytes[0x3c00..0x3c08], [0x1f, 0, 0, 0, 0x23, 0, 0, 0]);
    assert_eq!(bytes[0x2c40..0x2c44], [0x80, 0, 0, 0]);
    assert_eq!(bytes[0x3e40..0x3e44], [0x80, 0, 0, 0]);
    assert_eq!(bytes[0x10000..0x10200], pattern(1 << 20, 512)[..]);
}

#[test]
fn our_stream_has_the_layout_of_vmware() {
    let model = Model::with_runs(40 << 20, &[(0, 100), (34 << 20, 100)]);
    let bytes = our_file(&[("subformat", "streamOptimized")], &model);
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!((word(4), word(8), long(56), long(48), long(64)), (3, 0x30001, u64::MAX, 0, 128));
    let mut at = 128 * 512;
    let mut seen = Vec::new();
    while at < bytes.len() {
        let (val, size) = (long(at), word(at + 8));
        seen.push(if size > 0 { format!("grain {val}") } else { format!("{} {val}", word(at + 12)) });
        at += if size > 0 { (12 + size as usize).next_multiple_of(512) } else { 512 + 512 * val as usize };
    }
    assert_eq!(seen, ["grain 0", "1 4", "grain 69632", "1 4", "2 1", "3 1", "0 0"]);
}

/// Replaces the descriptor embedded in one of our files.
fn with_descriptor(mut bytes: Vec<u8>, text: &str) -> Vec<u8> {
    bytes[512..512 + 10_240].fill(0);
    bytes[512..512 + text.len()].copy_from_slice(text.as_bytes());
    bytes
}

fn layered(child_keys: &str, parent_keys: &str) -> (Arc<MemoryFiles>, Model) {
    let size = 34u64 << 20;
    let sectors = size / 512;
    let parent = Model::with_runs(size, &[(0, 300_000), (33 << 20, 70_000)]);
    let child = Model::with_runs(size, &[(65_536, 65_536), (10 << 20, 1000)]);
    let text = |keys: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\n{keys}\ncreateType=\"monolithicSparse\"\nRW {sectors} SPARSE \"x.vmdk\"\n"
        )
    };
    let files = MemoryFiles::new();
    files.put("base.vmdk", &with_descriptor(our_file(&[], &parent), &text(parent_keys)));
    files.put("child.vmdk", &with_descriptor(our_file(&[], &child), &text(child_keys)));
    let mut bytes = parent.read(0, size as usize);
    bytes[65_536..131_072].copy_from_slice(&child.read(65_536, 65_536));
    bytes[10 << 20..(10 << 20) + 65_536].copy_from_slice(&child.read(10 << 20, 65_536));
    let mut model = Model { size, ..Model::default() };
    for (start, len) in [(0, 300_000), (10 << 20, 1000), (33 << 20, 70_000)] {
        model.data.insert(start as u64, bytes[start..start + len].to_vec());
    }
    (files, model)
}

#[test]
fn a_child_of_vmware_finds_its_parent_by_hint_and_content_id() {
    let child = "CID=8159035c\nparentCID=5689b500\nparentFileNameHint=\"base.vmdk\"";
    let (files, model) = layered(child, "CID=5689b500\nparentCID=ffffffff");
    let disk = open(&files, "child.vmdk").unwrap();
    assert_eq!(disk.layers().len(), 2);
    assert_same(&disk, &model, true);

    let (files, _) = layered(child, "CID=5689b501\nparentCID=ffffffff");
    let error = open(&files, "child.vmdk").map(|_| ()).unwrap_err();
    assert_eq!(error.code(), Code::ParentModified, "{error}");
    let (files, _) =
        layered("CID=1\nparentCID=2\nparentFileNameHint=\"none.vmdk\"", "CID=2\nparentCID=ffffffff");
    assert_eq!(open(&files, "child.vmdk").map(|_| ()).unwrap_err().code(), Code::ParentMissing);
}

#[test]
fn a_child_of_virtualbox_is_never_read_alone() {
    let (a, b) = (Uuid([0xa1; 16]), Uuid([0xb2; 16]));
    let child = format!(
        "CID=1\nparentCID=ffffffff\nddb.uuid.image=\"{b}\"\nddb.uuid.parent=\"{a}\"\nddb.uuid.parentmodification=\"{a}\""
    );
    let base = |id: Uuid, modified: Uuid| {
        format!("CID=2\nparentCID=ffffffff\nddb.uuid.image=\"{id}\"\nddb.uuid.modification=\"{modified}\"")
    };
    let (files, model) = layered(&child, &base(a, a));
    let disk = open(&files, "child.vmdk").unwrap();
    assert_eq!(disk.layers().len(), 2);
    assert_same(&disk, &model, true);
    let (files, _) = layered(&child, &base(a, b));
    assert_eq!(open(&files, "child.vmdk").map(|_| ()).unwrap_err().code(), Code::ParentModified);
    let (files, _) = layered(&child, &base(b, b));
    assert_eq!(open(&files, "child.vmdk").map(|_| ()).unwrap_err().code(), Code::ParentMissing);
}

#[test]
fn zeroed_grains_stop_the_parent_only_with_their_flag() {
    let keys = "CID=8159035c\nparentCID=5689b500\nparentFileNameHint=\"base.vmdk\"";
    let (files, _) = layered(keys, "CID=5689b500\nparentCID=ffffffff");
    let mut bytes = files.get("child.vmdk").unwrap().to_vec();
    // Entry 0 of both tables; the primary table stands at sector 31, its copy at 22.
    for at in [31 * 512, 22 * 512] {
        bytes[at..at + 4].copy_from_slice(&1u32.to_le_bytes());
    }
    files.put("child.vmdk", &bytes);
    let error = read(&open(&files, "child.vmdk").unwrap(), 0, 512).unwrap_err();
    assert_eq!((error.code(), error.field_name()), (Code::Overlap, Some("grain table entry")));
    bytes[4] = 2;
    bytes[8] = 7;
    files.put("child.vmdk", &bytes);
    let disk = open(&files, "child.vmdk").unwrap();
    assert_eq!(read(&disk, 0, 65_536).unwrap(), vec![0; 65_536]);
    assert_ne!(read(&disk, 131_072, 512).unwrap(), vec![0; 512]);
}

/// A COWD file: 5000 sectors in grains of one sector; grains 0 to 3 and 4999 have data.
fn cowd() -> Vec<u8> {
    let mut s = Sectors::default();
    s.put(0, b"COWD").put32(4, 1).put32(8, 3).put32(12, 5000).put32(16, 1).put32(20, 4).put32(24, 2);
    s.put(2047, &[0]);
    s.put32(4 * 512, 5).put32(4 * 512 + 4, 37);
    let data = 69;
    for number in 0..4 {
        s.put32(5 * 512 + number * 4, (data + number) as u32);
    }
    s.put32(37 * 512 + (4999 - 4096) * 4, data as u32 + 4);
    s.put(data * 512, &pattern(0, 4 * 512)).put((data + 4) * 512, &pattern(4999 * 512, 512));
    s.0
}

#[test]
fn cowd_deltas_are_read_through_their_descriptor() {
    let files = MemoryFiles::new();
    files.put("d-delta.vmdk", &cowd());
    let text = "# Disk DescriptorFile\nversion=1\nCID=2\nparentCID=1\ncreateType=\"vmfsSparse\"\n\
                parentFileNameHint=\"base.vmdk\"\nRW 5000 VMFSSPARSE \"d-delta.vmdk\"\n";
    files.put("d.vmdk", text.as_bytes());
    let base = "# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW 5000 VMFS \"base-flat.vmdk\"\n";
    files.put("base.vmdk", base.as_bytes());
    files.put("base-flat.vmdk", &[0x77; 5000 * 512]);
    let disk = open(&files, "d.vmdk").unwrap();
    let mut expected = vec![0x77; 5000 * 512];
    expected[..2048].copy_from_slice(&pattern(0, 2048));
    expected[4999 * 512..].copy_from_slice(&pattern(4999 * 512, 512));
    assert!(read(&disk, 0, 5000 * 512).unwrap() == expected);
    let pieces = vellum_core::block_on(disk.pieces(0..2048, 10)).unwrap();
    assert_eq!(pieces.len(), 1, "grains of a sector are joined: {pieces:?}");
    // Alone it would show zeros where its parent has data.
    let error = open(&files, "d-delta.vmdk").map(|_| ()).unwrap_err();
    assert_eq!(error.code(), Code::ParentMissing, "{error}");
}

fn sesparse(replay: u64) -> Vec<u8> {
    let mut s = Sectors::default();
    for (index, value) in [0xcafe_babe, 0x2_0000_0001, 40_000, 8, 64, 0, 0, 0, 0, 0].into_iter().enumerate() {
        s.put64(index * 8, value);
    }
    // offset, size: volatile header, journal header, journal, directory, tables, bitmap, backmap, grains.
    let areas = [(1, 1), (2, 1), (3, 1), (4, 1), (64, 128), (192, 1), (193, 1), (200, 800)];
    for (index, (offset, size)) in areas.into_iter().enumerate() {
        s.put64(80 + index * 16, offset).put64(88 + index * 16, size);
    }
    s.put64(512, 0xcafe_cafe).put64(512 + 24, replay).put(1023, &[0]);
    // Directory: table 0 for the first 4096 grains, table 1 for the rest.
    s.put64(4 * 512, 0x1000_0000_0000_0000).put64(4 * 512 + 8, 0x1000_0000_0000_0001);
    let entries: [(usize, u64); 4] =
        [(0, 0x3001_0000_0000_0000), (1, 0x3002_0000_0000_0000), (2, 2 << 60), (4, 1 << 60)];
    for (number, entry) in entries {
        s.put64(64 * 512 + number * 8, entry);
    }
    s.put64((64 + 64) * 512 + (4999 - 4096) * 8, 0x3000_0000_0000_0000);
    for grain in 0..3u64 {
        s.put((200 + grain as usize * 8) * 512, &[0x10 + grain as u8; 4096]);
    }
    s.put(1000 * 512 - 1, &[0]);
    s.0
}

#[test]
fn sesparse_deltas_are_read_and_dirty_ones_refused() {
    let files = MemoryFiles::new();
    files.put("s-sesparse.vmdk", &sesparse(0));
    let text = "# Disk DescriptorFile\nversion=1\nCID=2\nparentCID=1\ncreateType=\"seSparse\"\n\
                parentFileNameHint=\"base.vmdk\"\nRW 40000 SESPARSE \"s-sesparse.vmdk\"\n";
    files.put("s.vmdk", text.as_bytes());
    let base = "# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW 40000 VMFS \"base-flat.vmdk\"\n";
    files.put("base.vmdk", base.as_bytes());
    files.put("base-flat.vmdk", &vec![0x77; 40_000 * 512]);
    let disk = open(&files, "s.vmdk").unwrap();
    let bytes = read(&disk, 0, 40_000 * 512).unwrap();
    for (number, value) in
        [(0, 0x11), (1, 0x12), (2, 0), (3, 0x77), (4, 0), (5, 0x77), (4999, 0x10), (4998, 0x77)]
    {
        assert!(bytes[number * 4096..][..4096].iter().all(|b| *b == value), "grain {number}");
    }
    files.put("s-sesparse.vmdk", &sesparse(1));
    let error = open(&files, "s.vmdk").map(|_| ()).unwrap_err();
    assert_eq!(
        (error.code(), error.field_name(), error.offset()),
        (Code::Dirty, Some("replayJournal"), Some(536))
    );
}

#[test]
fn custom_disks_mix_every_kind_of_extent() {
    let files = MemoryFiles::new();
    let sparse = Model::with_runs(1 << 20, &[(65_536, 1000)]);
    files.put("s.vmdk", &our_file(&[], &sparse));
    files.put("c.vmdk", &cowd());
    files.put("f.vmdk", &pattern(0, 20 * 512));
    let text = "# Disk DescriptorFile\nversion=1\nCID=9\nparentCID=ffffffff\ncreateType=\"custom\"\n\
                RW 4 FLAT \"f.vmdk\" 8\nRDONLY 2048 SPARSE \"s.vmdk\"\nRW 100 ZERO\nRW 5000 VMFSSPARSE \"c.vmdk\"\n\
                RW 2 FLAT \"f.vmdk\" 0\nNOACCESS 3 FLAT \"secret.vmdk\" 0\nRW 1 VMFS \"f.vmdk\" 19\n";
    files.put("disk.vmdk", text.as_bytes());
    let disk = open(&files, "disk.vmdk").unwrap();
    let mut model = Model { size: (4 + 2048 + 100 + 5000 + 2 + 3 + 1) * 512, ..Model::default() };
    model.data.insert(0, pattern(8 * 512, 4 * 512));
    model.data.insert(4 * 512 + 65_536, sparse.read(65_536, 1000));
    let at = (4 + 2048 + 100) * 512;
    model.data.insert(at, pattern(0, 2048));
    model.data.insert(at + 4999 * 512, pattern(4999 * 512, 512));
    let at = at + 5000 * 512;
    model.data.insert(at, pattern(0, 1024));
    model.data.insert(at + 5 * 512, pattern(19 * 512, 512));
    for (start, data) in &model.data {
        assert!(read(&disk, *start, data.len()).unwrap() == *data, "{start}");
    }
    assert_eq!(disk.size(), model.size);
    assert_eq!(read(&disk, at + 2 * 512, 512).unwrap_err().code(), Code::Permission);
    assert!(!files.calls().iter().any(|call| call.contains("secret")));
}

#[test]
fn info_touches_no_other_file() {
    let files = MemoryFiles::new();
    let recipe = Recipe::options(&[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "1M")]);
    write_image(&vmdk(), &files, "d.vmdk", &recipe, &sample(3 << 20)).unwrap();
    let before = files.calls().len();
    let registry = vellum_core::FormatRegistry::new(vec![vmdk()]);
    let resolver: Arc<dyn vellum_core::Resolver> = files.clone();
    let options = vellum_core::ChainOptions::default();
    let found = vellum_core::block_on(registry.open_alone(&resolver, "d.vmdk", &options)).unwrap();
    assert_eq!(files.calls()[before..], ["open d.vmdk"]);
    let info = found.layer.image.info();
    assert_eq!(info.files, ["d-s001.vmdk", "d-s002.vmdk", "d-s003.vmdk"]);
    assert_eq!(info.virtual_size, 3 << 20);
    let adapter = info.properties.iter().find(|p| p.name == "ddb.adapterType").unwrap();
    assert_eq!(adapter.value, Value::Text("ide".into()));
    assert!(found.layer.image.map(0..512).is_err());
}

#[test]
fn a_lone_extent_opens_with_a_warning_and_an_unclean_one_says_so() {
    let files = MemoryFiles::new();
    let recipe = Recipe::options(&[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "1M")]);
    let model = sample(3 << 20);
    write_image(&vmdk(), &files, "d.vmdk", &recipe, &model).unwrap();
    let (disk, notes) = open_noting(&files, "d-s001.vmdk");
    assert!(read(&disk.unwrap(), 0, 1 << 20).unwrap() == model.read(0, 1 << 20));
    assert!(notes.iter().any(|note| note.contains("no descriptor")), "{notes:?}");

    let mut bytes = our_file(&[], &model);
    bytes[72] = 1;
    let files = one("u.vmdk", &bytes);
    let (disk, notes) = open_noting(&files, "u.vmdk");
    assert!(disk.unwrap().layers()[0].image.info().dirty.is_some());
    assert!(notes.iter().any(|note| note.contains("uncleanShutdown")), "{notes:?}");
}

#[test]
fn a_container_holds_nothing_but_the_descriptor() {
    let files = MemoryFiles::new();
    let mut s = Sectors(
        Header { version: 1, flags: 1, capacity: 0, rgd: 0, gd: 0, over_head: 0, compress: 0 }.bytes(),
    );
    s.put(
        512,
        b"# Disk DescriptorFile\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\nRW 2 FLAT \"f\" 0\n",
    );
    s.put(21 * 512 - 1, &[0]);
    files.put("c.vmdk", &s.0);
    files.put("f", &pattern(0, 1024));
    assert_eq!(read(&open(&files, "c.vmdk").unwrap(), 0, 1024).unwrap(), pattern(0, 1024));
}

#[test]
fn windows_style_and_device_names_go_to_the_resolver() {
    for (name, code) in [
        ("\\\\.\\PhysicalDrive1", Code::RemoteRef),
        ("/dev/sda", Code::PathEscape),
        ("../x.vmdk", Code::PathEscape),
        ("..\\x.vmdk", Code::PathEscape),
        ("http://host/x", Code::RemoteRef),
        ("missing.vmdk", Code::NotFound),
    ] {
        let files = MemoryFiles::new();
        let text = format!("# Disk DescriptorFile\ncreateType=\"fullDevice\"\nRW 100 FLAT \"{name}\" 0\n");
        files.put("d.vmdk", text.as_bytes());
        let error = open(&files, "d.vmdk").map(|_| ()).unwrap_err();
        assert_eq!(error.code(), code, "{error:?}");
        assert_eq!(error.found_value(), Some(name));
        assert_eq!(files.calls(), ["open d.vmdk".to_owned(), format!("open {name}")]);
    }
}
