//! Damaged and hostile disks: each is refused with its code, field and place, or read as far as it makes sense.

mod common;

use common::*;
use proptest::prelude::*;
use std::sync::Arc;
use vellum_conformance::format::{Model, Recipe, write_image};
use vellum_core::{Code, Error};
use vellum_sim::MemoryFiles;

const SIZE: u64 = 34 << 20;
/// In our file of [`SIZE`] bytes: sectors of directories and tables.
const RGD: usize = 21 * 512;
const RGT: usize = 22 * 512;
const GD: usize = 30 * 512;
const GT: usize = 31 * 512;

fn model() -> Model {
    Model::with_runs(SIZE, &[(0, 65_536), (1 << 20, 65_536), (33 << 20, 1000)])
}

fn files_with(bytes: &[u8]) -> Arc<MemoryFiles> {
    let files = MemoryFiles::new();
    files.put("d.vmdk", bytes);
    files
}

/// Opens and reads everything; the first error, and what was warned.
fn whole(bytes: &[u8]) -> (Result<Vec<u8>, Error>, Vec<String>) {
    let files = files_with(bytes);
    let notes: Arc<std::sync::Mutex<Vec<String>>> = Arc::default();
    let sink = notes.clone();
    let options = vellum_core::ChainOptions {
        format: Some("vmdk".into()),
        events: vellum_core::Events::new(move |note| sink.lock().unwrap().push(note.to_owned())),
        ..Default::default()
    };
    let result = vellum_conformance::format::open_with(&[vmdk()], &files, "d.vmdk", &options)
        .and_then(|disk| read(&disk, 0, disk.size().min(SIZE) as usize));
    assert_eq!(files.calls(), ["open d.vmdk"], "no other file is touched");
    assert!(files.get("d.vmdk").unwrap().to_vec() == bytes, "nothing is changed");
    let notes = notes.lock().unwrap().clone();
    (result, notes)
}

fn refused(bytes: &[u8], code: Code, field: Option<&str>) -> Error {
    let error = whole(bytes).0.map(|_| ()).unwrap_err();
    assert_eq!((error.code(), error.field_name()), (code, field), "{error:?}");
    assert!(error.hint_text().is_some(), "{error:?}");
    error
}

fn set32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn set64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[test]
fn a_bad_entry_is_replaced_by_its_redundant_copy_with_one_warning() {
    let good = our_file(&[], &model());
    let expected = model().read(0, SIZE as usize);
    for (at, value) in
        [(GT, 0x7fff_ffff), (GT, 5), (GT + 64, u32::MAX), (GD, 0x7fff_ffff), (GD + 4, u32::MAX)]
    {
        let mut bytes = good.clone();
        set32(&mut bytes, at, value);
        let (read, notes) = whole(&bytes);
        assert!(read.unwrap() == expected, "{at:#x}");
        assert_eq!(notes.iter().filter(|note| note.contains("redundant")).count(), 1, "{notes:?}");
    }
}

#[test]
fn an_entry_that_is_bad_in_both_copies_is_an_error_at_its_place() {
    let good = our_file(&[], &model());
    for (value, copy, code) in [
        (0x7fff_ffff, 0x7fff_fff0, Code::OutOfFile),
        (0x7fff_ffff, 0, Code::OutOfFile),
        (0, 0, Code::OutOfFile),
        (31, 22, Code::Overlap),
        (1, 1, Code::Overlap),
    ] {
        let mut bytes = good.clone();
        set32(&mut bytes, GT + 64, value);
        set32(&mut bytes, RGT + 64, copy);
        if value == 0 {
            // Nothing there: zeros, not an error.
            assert!(whole(&bytes).0.unwrap()[1 << 20..(1 << 20) + 65_536].iter().all(|b| *b == 0));
            continue;
        }
        let error = refused(&bytes, code, Some("grain table entry"));
        assert_eq!(error.offset(), Some(GT as u64 + 64));
    }
    let mut bytes = good.clone();
    set32(&mut bytes, GD, 0x7fff_ffff);
    set32(&mut bytes, RGD, 0x7fff_ffff);
    assert_eq!(refused(&bytes, Code::OutOfFile, Some("grain directory entry")).offset(), Some(GD as u64));
}

#[test]
fn tables_aimed_at_the_header_or_at_the_directory_give_errors_not_data() {
    for target in [1u32, 21, 30] {
        let mut bytes = our_file(&[], &model());
        set32(&mut bytes, GD, target);
        set32(&mut bytes, RGD, target);
        let error = whole(&bytes).0.unwrap_err();
        assert!(matches!(error.code(), Code::Overlap | Code::OutOfFile), "{error:?}");
    }
}

#[test]
fn header_fields_at_their_extremes() {
    let good = our_file(&[], &model());
    for (at, value, code, field) in [
        (12, u64::MAX, Code::Range, "capacity"),
        (12, 1 << 54, Code::TableLimit, "capacity"),
        (12, 1 << 40, Code::OutOfFile, "gdOffset"),
        (20, 0, Code::Range, "grainSize"),
        (20, 3, Code::Range, "grainSize"),
        (20, 0x40_0000, Code::Range, "grainSize"),
        (28, u64::MAX / 512 - 1, Code::OutOfFile, "descriptorOffset"),
        (28, u64::MAX, Code::Overflow, "descriptorOffset"),
        (36, 1 << 40, Code::TableLimit, "descriptorSize"),
        (64, 1 << 30, Code::OutOfFile, "overHead"),
    ] {
        let mut bytes = good.clone();
        set64(&mut bytes, at, value);
        let error = refused(&bytes, code, Some(field));
        assert!(error.offset().is_some() && error.found_value().is_some(), "{error:?}");
    }
    let mut bytes = good.clone();
    set32(&mut bytes, 4, 77);
    refused(&bytes, Code::Version, Some("version"));
    let mut bytes = good;
    bytes[74] = 0x0d;
    refused(&bytes, Code::Corrupt, Some("newline test"));
}

#[test]
fn every_truncation_is_an_error_or_zeros_in_the_last_grain() {
    let good = our_file(&[], &model());
    let expected = model().read(0, SIZE as usize);
    for len in [0, 3, 100, 511, 512, 600, 10_751, 10_752, 15_000, 40_000, 65_535] {
        let error = whole(&good[..len]).0.map(|_| ()).unwrap_err();
        assert!(error.hint_text().is_some(), "{len}: {error:?}");
    }
    let error = whole(&good[..good.len() - 65_536 - 100]).0.map(|_| ()).unwrap_err();
    assert_eq!((error.code(), error.field_name()), (Code::OutOfFile, Some("grain table entry")));
    let (bytes, notes) = whole(&good[..good.len() - 65_000]);
    let bytes = bytes.unwrap();
    let end = (33 << 20) + 536;
    assert!(bytes[..end] == expected[..end] && bytes[end..].iter().all(|b| *b == 0));
    assert_eq!(notes.len(), 1, "{notes:?}");
}

#[test]
fn sizes_that_contradict_each_other() {
    // One extent: the smaller size holds.
    let mut bytes = our_file(&[], &model());
    set64(&mut bytes, 12, SIZE / 512 - 2048);
    let files = files_with(&bytes);
    let (disk, notes) = open_noting(&files, "d.vmdk");
    assert_eq!(disk.unwrap().size(), SIZE - (1 << 20));
    assert!(notes.iter().any(|note| note.contains("smaller")), "{notes:?}");
    // In the middle of a disk a smaller extent would move what follows.
    let files = MemoryFiles::new();
    let recipe = Recipe::options(&[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "4M")]);
    write_image(&vmdk(), &files, "d.vmdk", &recipe, &sample(9 << 20)).unwrap();
    let mut first = files.get("d-s001.vmdk").unwrap().to_vec();
    set64(&mut first, 12, 2048);
    files.put("d-s001.vmdk", &first);
    assert_eq!(open(&files, "d.vmdk").map(|_| ()).unwrap_err().code(), Code::SizeLie);
    // A flat file that is too short.
    let files = MemoryFiles::new();
    files.put("f", &[1; 1000]);
    files.put("d.vmdk", b"# Disk DescriptorFile\nRW 2 FLAT \"f\" 0\n");
    let error = open(&files, "d.vmdk").map(|_| ()).unwrap_err();
    assert_eq!((error.code(), error.field_name()), (Code::Truncated, Some("extent sectors")));
}

fn text_refused(lines: &str, code: Code) -> Error {
    let files = MemoryFiles::new();
    files.put("d.vmdk", format!("# Disk DescriptorFile\n{lines}").as_bytes());
    files.put("f", &[1; 4096]);
    let error = open(&files, "d.vmdk").map(|_| ()).unwrap_err();
    assert_eq!(error.code(), code, "{error:?}");
    assert!(error.hint_text().is_some(), "{error:?}");
    error
}

#[test]
fn hostile_descriptors() {
    text_refused("", Code::Corrupt);
    text_refused("RW 1 FLAT \"d.vmdk\" 0\n", Code::Cycle);
    text_refused("RW 1 FLAT \"./d.vmdk\" 0\n", Code::Cycle);
    text_refused("RW 1 SPARSE \"d.vmdk\"\n", Code::Cycle);
    text_refused("RW 4 FLAT \"f\" 0\nRW 4 FLAT \"f\" 3\n", Code::Overlap);
    text_refused("RW 4 FLAT \"f\" 0\nRW 4 FLAT \"./f\" 3\n", Code::Overlap);
    text_refused("RW 1 FLAT \"f\" 9007199254740992\n", Code::Truncated);
    text_refused("RW 1 FLAT \"f\0g\" 0\n", Code::NulInName);
    text_refused("RW 1 SPARSE \"f\"\n", Code::BadMagic);
    text_refused("RW 1 SESPARSE \"f\"\n", Code::BadMagic);
    text_refused("RW 1 VMFSRDM \"f\"\n", Code::Feature);
    text_refused("encryption.keySafe = \"x\"\nRW 1 FLAT \"f\" 0\n", Code::Feature);
    text_refused("version=9\nRW 1 ZERO\n", Code::Version);
    text_refused("parentCID=xyz\nRW 1 ZERO\n", Code::Range);
    text_refused(&"RW 1 ZERO\n".repeat(5000), Code::TableLimit);
    text_refused(&"x".repeat(1 << 20), Code::TableLimit);
    text_refused("RW 99999999999999999999 ZERO\n", Code::Overflow);
    text_refused("RW 18014398509481984 ZERO\nRW 1 ZERO\n", Code::Overflow);
}

#[test]
fn two_extents_cannot_share_a_sparse_file_and_the_disk_cannot_contain_itself() {
    let files = MemoryFiles::new();
    files.put("s", &our_file(&[], &Model::with_runs(1 << 20, &[])));
    files.put("d.vmdk", b"# Disk DescriptorFile\nRW 2048 SPARSE \"s\"\nRW 2048 SPARSE \"./s\"\n");
    assert_eq!(open(&files, "d.vmdk").map(|_| ()).unwrap_err().code(), Code::Overlap);
    let mut bytes = our_file(&[], &Model::with_runs(1 << 20, &[]));
    let text = b"# Disk DescriptorFile\nRW 2048 SPARSE \"x\"\nRW 2048 SPARSE \"d.vmdk\"\n\0";
    bytes[512..512 + text.len()].copy_from_slice(text);
    assert_eq!(open(&files_with(&bytes), "d.vmdk").map(|_| ()).unwrap_err().code(), Code::Cycle);
}

#[test]
fn compressed_grains_that_lie() {
    let good = our_file(&[("subformat", "streamOptimized")], &model());
    let at = 128 * 512;
    type Change = fn(&mut [u8]);
    let cases: [(Change, Code); 5] = [
        (|grain| set64(grain, 0, 128), Code::Corrupt),
        (|grain| set32(grain, 8, 0), Code::Corrupt),
        (|grain| set32(grain, 8, u32::MAX), Code::Corrupt),
        (|grain| grain[12] ^= 0x0f, Code::Decompress),
        (|grain| grain[2000] ^= 0xff, Code::Decompress),
    ];
    for (change, code) in cases {
        let mut bytes = good.clone();
        change(&mut bytes[at..]);
        let error = whole(&bytes).0.map(|_| ()).unwrap_err();
        assert_eq!(error.code(), code, "{error:?}");
        assert!(error.hint_text().is_some() && error.offset() == Some(at as u64), "{error:?}");
    }
    // A footer that points back to itself, and one whose directory lies outside.
    for (gd, code) in [(u64::MAX, Code::Range), (1 << 40, Code::OutOfFile), (0, Code::Overlap)] {
        let mut bytes = good.clone();
        let footer = bytes.len() - 1024;
        set64(&mut bytes, footer + 56, gd);
        refused(&bytes, code, Some("gdOffset"));
    }
}

#[test]
fn a_huge_compressed_grain_is_refused_before_it_takes_memory() {
    let mut bytes = our_file(&[("subformat", "streamOptimized")], &model());
    let footer = bytes.len() - 1024;
    set64(&mut bytes, footer + 20, 0x20_0000);
    refused(&bytes, Code::Feature, Some("grainSize"));
}

#[test]
fn both_copies_unreadable_directories_are_out_of_file() {
    let mut bytes = our_file(&[], &model());
    set64(&mut bytes, 56, 1 << 40);
    let (read, notes) = whole(&bytes);
    assert!(read.unwrap() == model().read(0, SIZE as usize));
    assert!(!notes.is_empty());
    set64(&mut bytes, 48, 1 << 40);
    refused(&bytes, Code::OutOfFile, Some("gdOffset"));
}

/// A storage that counts the bytes read from it.
struct Counting(vellum_core::Memory, std::sync::atomic::AtomicU64);

impl vellum_core::Storage for Counting {
    fn name(&self) -> &str {
        "counting"
    }
    fn len(&self) -> Result<u64, Error> {
        self.0.len()
    }
    fn limits(&self) -> vellum_core::StorageLimits {
        vellum_core::StorageLimits { read_only: true, ..Default::default() }
    }
    fn read_at(&self, buf: vellum_core::Buf, offset: u64) -> vellum_core::Completion<vellum_core::WithBuf> {
        self.1.fetch_add(buf.len() as u64, std::sync::atomic::Ordering::Relaxed);
        self.0.read_at(buf, offset)
    }
    fn write_at(
        &self,
        _: vellum_core::Buf,
        _: u64,
        _: vellum_core::WriteFlags,
    ) -> vellum_core::Completion<vellum_core::WithBuf> {
        panic!("opening for reading must not write")
    }
    fn flush(&self) -> vellum_core::Completion<Result<(), Error>> {
        panic!("opening for reading must not flush")
    }
    fn zero(
        &self,
        _: std::ops::Range<u64>,
        _: vellum_core::ZeroMode,
    ) -> vellum_core::Completion<Result<(), Error>> {
        panic!("opening for reading must not zero")
    }
    fn discard(&self, _: std::ops::Range<u64>) -> vellum_core::Completion<Result<(), Error>> {
        panic!("opening for reading must not discard")
    }
    fn status(
        &self,
        range: std::ops::Range<u64>,
    ) -> vellum_core::Completion<Result<Vec<(std::ops::Range<u64>, vellum_core::Status)>, Error>> {
        self.0.status(range)
    }
    fn set_len(&self, _: u64, _: vellum_core::Preallocate) -> vellum_core::Completion<Result<(), Error>> {
        panic!("opening for reading must not resize")
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[test]
fn a_disk_with_the_largest_directory_is_opened_and_read_with_little_io() {
    use vellum_core::{Format, Storage};
    // 2^54 sectors in grains of 1 GiB: 32 Mi directory entries in a file of 1 TiB, all zero.
    let mut header =
        Header { version: 1, flags: 1, capacity: 1 << 54, rgd: 0, gd: 128, over_head: 128, compress: 0 }
            .bytes();
    set64(&mut header, 20, 0x20_0000);
    let memory = vellum_core::Memory::from_bytes("counting", &header);
    memory.set_len(1 << 40, vellum_core::Preallocate::Off).wait().unwrap();
    let storage = Arc::new(Counting(memory, Default::default()));
    let request = vellum_core::OpenRequest {
        storage: storage.clone(),
        location: "d.vmdk".into(),
        resolver: MemoryFiles::new(),
        limits: Default::default(),
        events: vellum_core::Events::new(|_| {}),
        open_parts: true,
        write: false,
        access: vellum_core::Access::default(),
        skip_consistency_checks: false,
        snapshot: None,
        providers: vellum_core::Providers::seeded(0, 0),
    };
    let image = vellum_core::block_on(vellum_format_vmdk::Vmdk.open(request)).unwrap();
    let size = image.info().virtual_size;
    assert_eq!(size, 1 << 63);
    for at in [0, size / 3, size - 1] {
        let found = vellum_core::block_on(vellum_core::lookup(image.as_ref(), at..size)).unwrap();
        assert!(found.0 >= 1 && matches!(found.1, vellum_core::Extent::Parent));
    }
    let read = storage.1.load(std::sync::atomic::Ordering::Relaxed);
    assert!(read <= 256 << 10, "{read} bytes were read");
}

fn survives(bytes: &[u8]) {
    let files = files_with(bytes);
    if let Ok(disk) = open(&files, "d.vmdk") {
        let mut at = 0;
        while at < disk.size().min(SIZE) {
            let len = (1 << 20).min(disk.size() - at);
            let _ = read(&disk, at, len as usize);
            at += len;
        }
        let _ = read(&disk, disk.size().saturating_sub(512), 512);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_headers_and_tables_never_panic(
        stream: bool,
        changes in proptest::collection::vec((0usize..512, any::<u8>()), 1..6),
        tables in proptest::collection::vec((0usize..40_000, any::<u32>()), 0..4),
        cut in proptest::option::of(0usize..140_000),
    ) {
        let small = Model::with_runs(3 << 20, &[(0, 70_000), (2 << 20, 10)]);
        let kind = if stream { "streamOptimized" } else { "monolithicSparse" };
        let mut bytes = our_file(&[("subformat", kind)], &small);
        let header = if stream { bytes.len() - 1024 } else { 0 };
        for (at, value) in changes {
            bytes[header + at % 80] = value;
        }
        for (at, value) in tables {
            let at = at.min(bytes.len() - 4) / 4 * 4;
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        survives(&bytes);
    }
}
