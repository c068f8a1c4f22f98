//! Damaged and forged images: the right code, the field and its place, nothing else touched, never a panic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;
use common::{guest, image_of, open_vdi, put32};
use proptest::prelude::*;
use vellum_conformance::format::{Model, Recipe, read_all};
use vellum_core::{Buf, Code, Error, Storage, block_on};
use vellum_sim::MemoryFiles;

const MAP: usize = 1 << 20;

fn small() -> Vec<u8> {
    image_of(&Recipe::options(&[("block_size", "4k")]), &Model::with_runs(40 << 10, &[(4096, 5000)]))
}

/// Opens and reads `bytes`; asserts that nothing but the file was opened and that it did not change.
fn try_all(bytes: &[u8]) -> Result<Vec<u8>, Error> {
    let files = MemoryFiles::new();
    files.put("evil.vdi", bytes);
    let opened = open_vdi(&files, "evil.vdi");
    let calls: Vec<String> = files.calls().into_iter().filter(|call| call != "open evil.vdi").collect();
    let result = opened.and_then(|disk| {
        let len = disk.size().min(1 << 20) as usize;
        let (buf, result) = disk.read_at(Buf::zeroed(len), 0).wait();
        result.map(|()| buf.to_vec())
    });
    assert_eq!(calls, [] as [&str; 0], "no other file is touched");
    assert!(files.get("evil.vdi").unwrap().to_vec() == bytes, "the file does not change");
    if let Err(error) = &result {
        assert!(error.image_name().is_some() && error.hint_text().is_some(), "{error:?}");
    }
    result
}

#[track_caller]
fn refused(bytes: &[u8], code: Code, field: &str, at: u64) {
    let error = try_all(bytes).expect_err("refused");
    assert_eq!(error.code(), code, "{error:?}");
    assert_eq!(error.field_name(), Some(field), "{error:?}");
    assert_eq!(error.offset(), Some(at), "{error:?}");
    if code != Code::Truncated {
        assert!(error.found_value().is_some() || code == Code::BadMagic, "{error:?}");
    }
    assert!(error.allowed_values().is_some(), "{error:?}");
}

#[test]
fn every_field_is_checked_before_use() {
    let good = small();
    try_all(&good).expect("the image itself is good");
    let cases: &[(usize, u32, Code, &str)] = &[
        (0x40, 0, Code::BadMagic, "signature"),
        (0x44, 0x0001_0000, Code::Version, "version"),
        (0x44, 0x0002_0001, Code::Version, "version"),
        (0x44, u32::MAX, Code::Version, "version"),
        (0x48, 0, Code::Range, "cbHeader"),
        (0x48, 0x17f, Code::Range, "cbHeader"),
        (0x4C, 0, Code::Range, "type"),
        (0x4C, 5, Code::Range, "type"),
        (0x4C, u32::MAX, Code::Range, "type"),
        (0x50, 2, Code::Range, "flags"),
        (0x50, u32::MAX, Code::Range, "flags"),
        (0x154, 0, Code::Overlap, "offBlocks"),
        (0x154, 0x1D4, Code::Overlap, "offBlocks"),
        (0x154, MAP as u32 + 1, Code::Misaligned, "offBlocks"),
        (0x158, 0, Code::Overlap, "offData"),
        (0x158, MAP as u32 + 39, Code::Overlap, "offData"),
        (0x178, 0, Code::Range, "cbBlock"),
        (0x178, 1, Code::Range, "cbBlock"),
        (0x178, 2048, Code::Range, "cbBlock"),
        (0x178, 4097, Code::Range, "cbBlock"),
        (0x178, 512 << 20, Code::Range, "cbBlock"),
        (0x178, u32::MAX, Code::Range, "cbBlock"),
        (0x17C, 3, Code::Range, "cbBlockExtra"),
        (0x17C, 8192, Code::Range, "cbBlockExtra"),
        (0x180, 0, Code::SizeLie, "cBlocks"),
        (0x180, 9, Code::SizeLie, "cBlocks"),
        (0x180, 0x4000_0000, Code::Range, "cBlocks"),
        (0x180, u32::MAX, Code::Range, "cBlocks"),
        (0x174, 1, Code::SizeLie, "cBlocks"),
        (0x184, 11, Code::Range, "cBlocksAllocated"),
        (0x184, u32::MAX, Code::Range, "cBlocksAllocated"),
    ];
    for (at, value, code, field) in cases {
        let mut bytes = good.clone();
        put32(&mut bytes, *at, *value);
        // cbDisk is blamed on the blocks that do not cover it.
        let place = if *at == 0x174 { 0x180 } else { *at as u64 };
        refused(&bytes, *code, field, place);
    }
}

#[test]
fn tables_past_the_end_are_refused_before_anything_is_allocated() {
    let mut bytes = small();
    put32(&mut bytes, 0x154, 0xF000_0000);
    put32(&mut bytes, 0x158, 0xFFFF_FFFC);
    refused(&bytes, Code::OutOfFile, "offBlocks", 0x154);
    // 2^30 - 1 blocks: a map of 4 GiB, which wraps around in 32 bits.
    let mut bytes = small();
    put32(&mut bytes, 0x180, 0x3FFF_FFFF);
    refused(&bytes, Code::Overlap, "offData", 0x158);
    let mut bytes = small();
    put32(&mut bytes, 0x180, 0x3FC0_0000 - 0x10_0000);
    put32(&mut bytes, 0x158, 0xFFFF_F000);
    refused(&bytes, Code::Truncated, "offBlocks", 0x154);
}

#[test]
fn entries_are_checked_one_by_one() {
    let good = small();
    // The file has two blocks of 4 KiB; guest blocks 1 and 2.
    for (entry, code) in
        [(2, Code::OutOfFile), (0x7FFF_FFFF, Code::OutOfFile), (0xFFFF_FFFD, Code::OutOfFile)]
    {
        let mut bytes = good.clone();
        put32(&mut bytes, MAP + 20, entry);
        refused(&bytes, code, "block map entry", MAP as u64 + 20);
    }
    // The counter is advisory: what a crashed writer left behind it is read.
    let mut past_counter = good.clone();
    put32(&mut past_counter, 0x184, 1);
    let files = MemoryFiles::new();
    files.put("d", &past_counter);
    let disk = open_vdi(&files, "d").unwrap();
    let (buf, result) = disk.read_at(Buf::zeroed(8192), 4096).wait();
    result.unwrap();
    assert_eq!(&*buf, Model::with_runs(40 << 10, &[(4096, 5000)]).read(4096, 8192));
    let mut past_file = good.clone();
    put32(&mut past_file, MAP + 8, 2);
    // An error in one block does not hide the others.
    let files = MemoryFiles::new();
    files.put("d", &past_file);
    let disk = open_vdi(&files, "d").unwrap();
    let (buf, result) = disk.read_at(Buf::zeroed(4096), 4096).wait();
    result.unwrap();
    assert_eq!(&*buf, Model::with_runs(40 << 10, &[(4096, 5000)]).read(4096, 4096));
    // So far, and no further: the extent ends before the bad entry.
    assert_eq!(block_on(disk.lookup(4096..40 << 10)).unwrap().range, 4096..8192);
}

#[test]
fn truncation_at_every_border() {
    let good = small();
    for (len, code, field) in [
        (0, Code::Truncated, "header"),
        (0x47, Code::Truncated, "header"),
        (0x48, Code::Range, "cbHeader"),
        (0x1D7, Code::Truncated, "header"),
        (0x1D8, Code::OutOfFile, "offBlocks"),
        (MAP, Code::OutOfFile, "offBlocks"),
        (MAP + 39, Code::Truncated, "offBlocks"),
        (MAP + 40, Code::OutOfFile, "block map entry"),
        (2 << 20, Code::OutOfFile, "block map entry"),
        ((2 << 20) + 1, Code::Truncated, "block map entry"),
        (good.len() - 1, Code::Truncated, "block map entry"),
    ] {
        let error = try_all(&good[..len]).expect_err("refused");
        assert_eq!((error.code(), error.field_name()), (code, Some(field)), "{len}: {error:?}");
    }
}

#[test]
fn a_last_block_may_end_with_the_disk() {
    // 1.5 blocks of data; the file ends with the last sector that a guest can see.
    let model = Model::with_runs(6144, &[(0, 6144)]);
    let mut bytes = image_of(&Recipe::options(&[("block_size", "4k")]), &model);
    bytes.truncate((2 << 20) + 6144);
    assert!(try_all(&bytes).unwrap() == model.read(0, 6144));
    bytes.truncate((2 << 20) + 6143);
    assert_eq!(try_all(&bytes).unwrap_err().code(), Code::Truncated);
}

#[test]
fn odd_but_valid_images_are_read() {
    let model = Model::with_runs(40 << 10, &[(4096, 5000)]);
    let good = small();
    let expected = model.read(0, 40 << 10);
    // A disk size that is no multiple of 512 is rounded down, as VirtualBox does.
    let mut odd_size = good.clone();
    put32(&mut odd_size, 0x170, (40 << 10) - 1);
    assert!(try_all(&odd_size).unwrap() == expected[..(40 << 10) - 512]);
    // Null UUIDs, another sector size, a longer header, the zero-expanding flag, trailing bytes, a spare block.
    let mut odd = good.clone();
    odd[0x188..0x1A8].fill(0);
    put32(&mut odd, 0x168, 4096);
    put32(&mut odd, 0x48, 0x400);
    put32(&mut odd, 0x50, 1);
    put32(&mut odd, 0x180, 11);
    odd.extend([0xee; 100]);
    assert!(try_all(&odd).unwrap() == expected);
    let files = MemoryFiles::new();
    files.put("d", &odd);
    let disk = open_vdi(&files, "d").unwrap();
    let info = disk.layers()[0].image.info();
    assert_eq!(info.warnings.len(), 2, "{:?}", info.warnings);
    assert_eq!(info.identity, Default::default());
    // The short header of QEMU, whose map may start where LCHS would be.
    let mut short = good.clone();
    put32(&mut short, 0x48, 0x180);
    assert!(try_all(&short).unwrap() == expected);
    assert_eq!(info.lchs.map(|chs| chs.heads), Some(16));
}

#[test]
fn private_data_before_blocks_is_skipped() {
    let mut bytes = small();
    put32(&mut bytes, 0x17C, 512);
    let data = bytes.split_off(2 << 20);
    for block in data.chunks(4096) {
        bytes.extend([0xdd; 512]);
        bytes.extend(block);
    }
    assert!(try_all(&bytes).unwrap() == Model::with_runs(40 << 10, &[(4096, 5000)]).read(0, 40 << 10));
}

#[test]
fn version_0_2_is_read() {
    let model = Model::with_runs(3 << 20, &[(2 << 20, 1000)]);
    let mut bytes = vec![0u8; 420 + 12];
    put32(&mut bytes, 0x40, 0xBEDA_107F);
    put32(&mut bytes, 0x44, 2);
    put32(&mut bytes, 0x48, 1);
    bytes[0x50..0x53].copy_from_slice(b"old");
    put32(&mut bytes, 0x15C, 512);
    put32(&mut bytes, 0x160, 3 << 20);
    put32(&mut bytes, 0x168, 1 << 20);
    put32(&mut bytes, 0x16C, 3);
    put32(&mut bytes, 0x170, 1);
    bytes[0x174..0x194].fill(7);
    put32(&mut bytes, 420, u32::MAX);
    put32(&mut bytes, 424, u32::MAX);
    bytes.extend(model.read(2 << 20, 1 << 20));
    let files = MemoryFiles::new();
    files.put("d", &bytes);
    let disk = open_vdi(&files, "d").unwrap();
    assert!(read_all(&disk) == model.read(0, 3 << 20));
    assert_eq!(disk.layers()[0].image.info().comment, "old");
    assert!(try_all(&bytes[..419]).is_err_and(|e| e.code() == Code::Truncated));
    assert!(try_all(&bytes[..431]).is_err_and(|e| e.code() == Code::Truncated));
    put32(&mut bytes, 0x16C, u32::MAX);
    refused(&bytes, Code::Range, "cBlocks", 0x16C);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the bytes: writing is refused, or it works and what others wrote stays; a repair leaves no error.
    #[test]
    fn forged_images_are_written_or_refused_and_mended(
        changes in prop::collection::vec(
            (prop_oneof![1 => 0x40usize..0x1D8, 3 => MAP..MAP + 40], prop_oneof![any::<u32>(), 0u32..4, Just(u32::MAX)]),
            1..4,
        ),
        cut in prop_oneof![4 => Just(usize::MAX), 1 => (2usize << 20)..(2 << 20) + 9000],
        more in prop_oneof![3 => Just(0usize), 1 => 1usize..20_000],
    ) {
        let mut bytes = GOOD.with(Clone::clone);
        for (at, value) in changes {
            put32(&mut bytes, at, value);
        }
        bytes.truncate(cut);
        bytes.resize(bytes.len() + more, 0xee);
        write_to(&bytes, false);
        write_to(&bytes, true);
        mend(&bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the bytes: an error or data, no panic, no other file, no change.
    #[test]
    fn no_bytes_can_make_it_panic(
        changes in prop::collection::vec(
            (prop_oneof![0x40usize..0x1D8, MAP..MAP + 40], prop_oneof![any::<u32>(), 0u32..20, Just(u32::MAX), Just(1 << 31)]),
            1..5,
        ),
        cut in prop_oneof![9 => Just(usize::MAX), 1 => 0usize..(2 << 20) + 9000],
    ) {
        let mut bytes = GOOD.with(Clone::clone);
        for (at, value) in changes {
            put32(&mut bytes, at, value);
        }
        bytes.truncate(cut);
        let _ = try_hostile(&bytes);
    }
}

thread_local! {
    static GOOD: Vec<u8> = small();
}

/// As `try_all`, but children may look around in their directory.
fn try_hostile(bytes: &[u8]) -> Result<(), Error> {
    let files = MemoryFiles::new();
    files.put("evil.vdi", bytes);
    let disk = open_vdi(&files, "evil.vdi")?;
    let pieces = block_on(disk.pieces(0..disk.size(), 50))?;
    assert!(!pieces.is_empty() || disk.size() == 0);
    let (_, result) = disk.read_at(Buf::zeroed(disk.size().min(1 << 20) as usize), 0).wait();
    result
}

/// Writes to a forged image: an error, or nothing else changes.
fn write_to(bytes: &[u8], insist: bool) {
    let files = MemoryFiles::new();
    files.put("evil.vdi", bytes);
    let resolver: std::sync::Arc<dyn vellum_core::Resolver> = files.clone();
    let flags = vellum_core::OpenFlags { discard: true, ..Default::default() };
    let opened = match insist {
        true => guest::open_insisting(&resolver, "evil.vdi"),
        false => guest::open_writable(&resolver, "evil.vdi", flags, 1),
    };
    assert!(files.get("evil.vdi").unwrap().to_vec() == bytes, "opening changes nothing");
    let Ok(disk) = opened else { return };
    let size = disk.size().min(40 << 10);
    if size < 1024 {
        return;
    }
    let read = |at: u64, len: u64| {
        let (buf, result) = disk.read_at(Buf::zeroed(len as usize), at).wait();
        result.map(|()| buf.to_vec())
    };
    let sectors =
        |disk_size: u64| (0..disk_size / 512).map(|sector| read(sector * 512, 512).ok()).collect::<Vec<_>>();
    let before = sectors(size);
    let (_, written) = disk.write(Buf::copy_of(&[0xab; 512]), size / 1024 * 512, Default::default()).wait();
    if written.is_err() {
        return;
    }
    if !insist {
        // Nobody else's bytes changed.
        for (sector, (old, new)) in before.iter().zip(sectors(size)).enumerate() {
            let expected = if sector as u64 == size / 1024 { Some(vec![0xab; 512]) } else { old.clone() };
            assert!(new == expected, "sector {sector}");
        }
    }
    let _ = disk.discard_range(0..size).wait();
    let _ = disk.write(Buf::copy_of(&[0xac; 512]), 0, Default::default()).wait();
    let _ = disk.flush_all().wait();
    let closed = disk.close().wait();
    if !insist && closed.is_ok() {
        let report = guest::check(&resolver, "evil.vdi").unwrap();
        assert_eq!(report.errors, 0, "{:?}", guest::findings(&report));
    }
    assert!(files.get("evil.vdi").unwrap().len().unwrap() < 1 << 40);
}

/// Checks a forged image and carries the plan out: no error is left, unless the header makes no sense.
fn mend(bytes: &[u8]) {
    let memory = std::sync::Arc::new(vellum_core::Memory::from_bytes("evil.vdi", bytes));
    let Ok(report) = block_on(guest::check_storage(memory.clone())) else { return };
    if report.errors > 0 && report.fixes.is_empty() {
        return;
    }
    guest::repair(&report);
    let again = block_on(guest::check_storage(memory)).unwrap();
    assert_eq!((again.errors, again.fixes.len()), (0, 0), "{:?}", guest::findings(&again));
}
