//! Differencing images: sector bitmaps over a parent, and the many names of that parent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;
use common::{edit_footers, edit_header, image_of, open_vhd, put32, vhd};
use std::sync::Arc;
use vellum_conformance::format::{Model, Recipe, open_with, read_all};
use vellum_core::{ChainOptions, Code, Disk, Error, Extent, ParentHint, Uuid, block_on};
use vellum_sim::MemoryFiles;

const SIZE: u64 = 8 << 20;
/// Our writer leaves this free between BAT and first block.
const ROOM: usize = 0x800;

fn utf16le(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// A child of `parent` with the data of `model`: the blocks are whole, bitmaps say that only `here` of each is.
struct Child {
    bytes: Vec<u8>,
    used: usize,
    slots: usize,
}

impl Child {
    fn new(parent: &[u8], model: &Model) -> Self {
        let mut recipe = Recipe::default();
        recipe.traits.uuid = Uuid::parse("11111111-2222-4333-8444-555555555555");
        let mut bytes = image_of(&recipe, model);
        edit_footers(&mut bytes, |footer| footer[63] = 4);
        let id = parent[68..84].to_vec();
        edit_header(&mut bytes, |header| {
            header[40..56].copy_from_slice(&id);
            header[56..60].copy_from_slice(&[0, 0, 0, 9]);
        });
        Child { bytes, used: ROOM, slots: 0 }
    }

    fn name(mut self, name: &str) -> Self {
        let utf16: Vec<u8> = name.encode_utf16().flat_map(u16::to_be_bytes).collect();
        edit_header(&mut self.bytes, |header| header[64..64 + utf16.len()].copy_from_slice(&utf16));
        self
    }

    fn locator(mut self, code: &[u8; 4], data: &[u8]) -> Self {
        let (at, slot) = (self.used, 576 + self.slots * 24);
        self.bytes[at..at + data.len()].copy_from_slice(data);
        edit_header(&mut self.bytes, |header| {
            header[slot..slot + 4].copy_from_slice(code);
            put32(header, slot + 4, 512);
            put32(header, slot + 8, data.len() as u32);
            put32(header, slot + 20, at as u32);
        });
        self.used += data.len();
        self.slots += 1;
        self
    }

    /// Clears the bits of `sectors` of guest block `block`.
    fn clear(mut self, block: usize, sectors: std::ops::Range<usize>) -> Self {
        let entry: [u8; 4] = self.bytes[0x600 + block * 4..0x604 + block * 4].try_into().unwrap();
        let bitmap = u32::from_be_bytes(entry) as usize * 512;
        for sector in sectors {
            self.bytes[bitmap + sector / 8] &= !(0x80 >> (sector % 8));
        }
        self
    }
}

fn base() -> (Model, Vec<u8>) {
    let model = Model::with_runs(SIZE, &[(0, SIZE as usize)]);
    let bytes = image_of(&Recipe::default(), &model);
    (model, bytes)
}

/// Data that differs from the parent's at the same place.
fn top() -> Model {
    let mut model = Model::with_runs(SIZE, &[(2 << 20, 4 << 20)]);
    model.data.values_mut().flatten().for_each(|byte| *byte = !*byte | 0x80);
    model
}

fn open(child: &[u8], parent: Option<&[u8]>) -> Result<(Disk, Arc<MemoryFiles>), Error> {
    let files = MemoryFiles::new();
    files.put("vm/child.vhd", child);
    if let Some(parent) = parent {
        files.put("vm/parent.vhd", parent);
    }
    open_vhd(&files, "vm/child.vhd").map(|disk| (disk, files.clone()))
}

#[test]
fn a_child_reads_through_its_parent_sector_by_sector() {
    let (model, parent) = base();
    let child = Child::new(&parent, &top()).locator(b"W2ru", &utf16le(r".\parent.vhd"));
    let child = child.clear(1, 3..17).clear(1, 4095..4096).clear(2, 0..8);
    let (disk, files) = open(&child.bytes, Some(&parent)).unwrap();
    let mut expected = model.read(0, SIZE as usize);
    let over = top().read(2 << 20, 4 << 20);
    expected[2 << 20..6 << 20].copy_from_slice(&over);
    for (from, to) in [(3, 17), (4095, 4096 + 8)] {
        let range = (2 << 20) + from * 512..(2 << 20) + to * 512;
        expected[range.clone()].copy_from_slice(&model.read(range.start as u64, range.len()));
    }
    assert!(read_all(&disk) == expected);
    assert_eq!(disk.layers().len(), 2);
    assert_eq!(files.calls(), ["open vm/child.vhd", "open ./parent.vhd"], "nothing else is touched");

    // The child's own map: absent blocks in one piece, and sectors apart.
    let top = Disk::new(disk.layers()[..1].to_vec(), Default::default()).unwrap();
    let at = |start: u64| block_on(top.lookup(start..SIZE)).unwrap();
    assert!(matches!(at(0).extent, Extent::Parent) && at(0).range == (0..2 << 20));
    assert!(matches!(at(2 << 20).extent, Extent::Raw { .. }));
    assert_eq!(at(2 << 20).range.end, (2 << 20) + 3 * 512);
    assert!(matches!(at((2 << 20) + 1536).extent, Extent::Parent));
    assert_eq!(at((2 << 20) + 1536).range.end, (2 << 20) + 17 * 512);
    assert!(matches!(at(6 << 20).extent, Extent::Parent) && at(6 << 20).range == (6 << 20..SIZE));
}

#[test]
fn clear_bits_of_a_dynamic_image_are_zeros() {
    let (model, parent) = base();
    let mut child = Child::new(&parent, &top()).clear(1, 3..17);
    edit_footers(&mut child.bytes, |footer| footer[63] = 3);
    let (disk, _) = open(&child.bytes, None).unwrap();
    let mut expected = vec![0; SIZE as usize];
    expected[2 << 20..6 << 20].copy_from_slice(&top().read(2 << 20, 4 << 20));
    expected[(2 << 20) + 1536..(2 << 20) + 17 * 512].fill(0);
    assert!(read_all(&disk) == expected);
    let found = block_on(disk.lookup((2 << 20) + 1536..SIZE)).unwrap();
    assert!(matches!(found.extent, Extent::Zero), "{found:?}");
    assert_eq!(model.size, SIZE);
}

#[test]
fn hints_come_in_search_order() {
    let (_, parent) = base();
    let child = Child::new(&parent, &top())
        .name("parent.vhd")
        .locator(b"Wi2k", b"C:\\old\\\xe4.vhd\0\0")
        .locator(b"MacX", b"file:///Users/me/my%20parent.vhd")
        .locator(b"Mac ", &[0xff; 40])
        .locator(b"W2ku", &utf16le(r"C:\vm\parent.vhd"))
        .locator(b"Wi2r", b".\\old\\p.vhd")
        .locator(b"W2ru", &utf16le("..\\vm\\parent.vhd\0\0"));
    let files = MemoryFiles::new();
    files.put("vm/child.vhd", &child.bytes);
    let resolver: Arc<dyn vellum_core::Resolver> = files.clone();
    let registry = vellum_core::FormatRegistry::new(vec![vhd()]);
    let alone = block_on(registry.open_alone(&resolver, "vm/child.vhd", &ChainOptions::default())).unwrap();
    let info = alone.layer.image.info();
    let found = info.parent.clone().unwrap();
    let hint = |field, place: &str| ParentHint { field, place: place.to_owned() };
    assert_eq!(
        found.hints,
        [
            hint("W2ru", "../vm/parent.vhd"),
            hint("W2ku", r"C:\vm\parent.vhd"),
            hint("MacX", "/Users/me/my parent.vhd"),
            hint("parentUnicodeName", "parent.vhd"),
            hint("Wi2r", "./old/p.vhd"),
            hint("Wi2k", "C:\\old\\\u{e4}.vhd"),
        ]
    );
    assert_eq!(found.expected.uuid.map(|uuid| uuid.0.to_vec()), Some(parent[68..84].to_vec()));
    assert_eq!(info.variant, "differencing");
    let timestamp = info.properties.iter().find(|p| p.name == "parentTimestamp").unwrap();
    assert_eq!(timestamp.value, vellum_core::Value::Number(946_684_809));
    assert_eq!(files.calls(), ["open vm/child.vhd"], "names are read, not opened");
}

#[test]
fn the_parent_is_found_by_a_later_name_or_by_its_identity() {
    let (_, parent) = base();
    let by_name = Child::new(&parent, &top())
        .locator(b"W2ku", &utf16le(r"C:\gone\parent.vhd"))
        .locator(b"W2ru", &utf16le(r".\elsewhere\parent.vhd"))
        .name("parent.vhd");
    assert_eq!(open(&by_name.bytes, Some(&parent)).unwrap().0.layers().len(), 2);
    let by_identity = Child::new(&parent, &top());
    assert_eq!(open(&by_identity.bytes, Some(&parent)).unwrap().0.layers().len(), 2);
}

#[test]
fn a_child_is_never_read_as_a_whole_disk() {
    let (_, parent) = base();
    let child = Child::new(&parent, &top()).name("parent.vhd");
    assert_eq!(open(&child.bytes, None).err().unwrap().code(), Code::ParentMissing);
    // Without any name, too.
    let nameless = Child::new(&parent, &top());
    assert_eq!(open(&nameless.bytes, None).err().unwrap().code(), Code::ParentMissing);
    // Another image in the parent's place.
    let mut other = parent.clone();
    edit_footers(&mut other, |footer| footer[68] ^= 1);
    assert_eq!(open(&child.bytes, Some(&other)).err().unwrap().code(), Code::ParentWrong);
    // Itself in the parent's place.
    let itself = Child::new(&parent, &top()).name("child.vhd");
    assert!(matches!(open(&itself.bytes, None).err().unwrap().code(), Code::Cycle | Code::ParentWrong));
}

#[test]
fn names_outside_the_directory_are_refused() {
    let (_, parent) = base();
    let cases: &[(&[u8; 4], Vec<u8>, Code)] = &[
        (b"W2ru", utf16le(r"..\..\etc\shadow"), Code::PathEscape),
        (b"W2ku", utf16le(r"\\server\share\p.vhd"), Code::RemoteRef),
        (b"W2ru", utf16le(r"\\server\share\p.vhd"), Code::RemoteRef),
        (b"W2ku", utf16le("nbd://host/x"), Code::RemoteRef),
        (b"MacX", b"http://host/x".to_vec(), Code::RemoteRef),
        (b"MacX", b"file:///etc/shadow".to_vec(), Code::PathEscape),
    ];
    for (code, data, expected) in cases {
        let child = Child::new(&parent, &top()).locator(code, data);
        assert_eq!(open(&child.bytes, None).err().unwrap().code(), *expected, "{data:02x?}");
    }
}

#[test]
fn names_that_are_no_names_are_errors() {
    let (_, parent) = base();
    let refused = |child: &[u8], code: Code, field: &str| {
        let error = open(child, Some(&parent)).err().expect("refused");
        assert_eq!((error.code(), error.field_name()), (code, Some(field)), "{error:?}");
        assert!(error.hint_text().is_some() && error.offset().is_some(), "{error:?}");
    };
    let child = |code: &[u8; 4], data: &[u8]| Child::new(&parent, &top()).locator(code, data).bytes;
    refused(&child(b"W2ru", b"a\0b\0c"), Code::Range, "W2ru");
    refused(&child(b"W2ku", b"a\0\0\0b\0"), Code::NulInName, "W2ku");
    refused(&child(b"W2ru", &[0, 0xdc]), Code::Range, "W2ru");
    refused(&child(b"Wi2r", b"a\0b"), Code::NulInName, "Wi2r");
    refused(&child(b"MacX", b"file:///a%00"), Code::NulInName, "MacX");
    refused(&child(b"MacX", &[0xff]), Code::Range, "MacX");
    refused(&Child::new(&parent, &top()).name("a\0b").bytes, Code::NulInName, "parentUnicodeName");

    let patched = |offset: usize, value: u32| {
        let mut bytes = child(b"W2ru", b"a\0");
        edit_header(&mut bytes, |header| put32(header, 576 + offset, value));
        bytes
    };
    refused(&patched(8, (64 << 10) + 1), Code::Range, "dataLength of a parent locator");
    refused(&patched(8, u32::MAX), Code::Range, "dataLength of a parent locator");
    refused(&patched(16, u32::MAX), Code::OutOfFile, "dataOffset of a parent locator");
    refused(&patched(20, u32::MAX), Code::OutOfFile, "dataOffset of a parent locator");
}

#[test]
fn a_fixed_image_can_be_a_parent() {
    let (model, _) = base();
    let parent = image_of(&Recipe::options(&[("subformat", "fixed")]), &model);
    let end = parent.len() - 512;
    let child = Child::new(&parent[end..], &Model::with_runs(SIZE, &[])).name("parent.vhd");
    let files = MemoryFiles::new();
    files.put("child.vhd", &child.bytes);
    files.put("parent.vhd", &parent);
    let disk = open_with(&[vhd()], &files, "child.vhd", &ChainOptions::default()).unwrap();
    assert!(read_all(&disk) == model.read(0, SIZE as usize));
}
