//! Damaged and forged images: the right code, the field and its place, nothing else touched, never a panic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;
use common::{edit_footers, edit_header, footer_at, image_of, open_vhd, put32, seal_footer, seal_header};
use proptest::prelude::*;
use vellum_conformance::format::{Model, Recipe};
use vellum_core::{Buf, Code, Error, Storage, block_on};
use vellum_sim::MemoryFiles;

fn model() -> Model {
    Model::with_runs(40 << 10, &[(4096, 5000)])
}

/// Ten blocks of 4 KiB, of which 1 and 2 are there: BAT at 0x600, bitmaps at 0xE00 and 0x2E00 (stride 0x2000).
fn dynamic() -> Vec<u8> {
    image_of(&Recipe::options(&[("block_size", "4k")]), &model())
}

fn fixed() -> Vec<u8> {
    image_of(&Recipe::options(&[("subformat", "fixed")]), &model())
}

/// Opens and reads `bytes`; asserts that nothing but the file was opened and that it did not change.
fn try_all(bytes: &[u8]) -> Result<Vec<u8>, Error> {
    let files = MemoryFiles::new();
    files.put("evil.vhd", bytes);
    let result = open_vhd(&files, "evil.vhd").and_then(|disk| {
        let len = disk.size().min(1 << 20) as usize;
        let (buf, result) = disk.read_at(Buf::zeroed(len), 0).wait();
        result.map(|()| buf.to_vec())
    });
    assert_eq!(files.calls(), ["open evil.vhd"], "no other file is touched");
    assert!(files.get("evil.vhd").unwrap().to_vec() == bytes, "the file does not change");
    if let Err(error) = &result {
        assert!(error.image_name().is_some() && error.hint_text().is_some(), "{error:?}");
    }
    result
}

#[track_caller]
fn refused(bytes: &[u8], code: Code, field: &str, at: usize) {
    let error = try_all(bytes).expect_err("refused");
    assert_eq!(error.code(), code, "{error:?}");
    assert_eq!(error.field_name(), Some(field), "{error:?}");
    assert_eq!(error.offset(), Some(at as u64), "{error:?}");
    assert!(error.allowed_values().is_some(), "{error:?}");
}

fn warnings(bytes: &[u8]) -> (Vec<String>, Option<String>) {
    let files = MemoryFiles::new();
    files.put("d", bytes);
    let disk = open_vhd(&files, "d").unwrap();
    let info = disk.layers()[0].image.info();
    (info.warnings.clone(), info.dirty.clone())
}

#[test]
fn every_field_of_the_footer_is_checked() {
    for good in [dynamic(), fixed()] {
        try_all(&good).expect("the image itself is good");
        let end = footer_at(&good);
        let cases: &[(usize, u32, Code, &str)] = &[
            (12, 0x0002_0000, Code::Version, "version"),
            (12, 0, Code::Version, "version"),
            (60, 0, Code::Range, "diskType"),
            (60, 1, Code::Range, "diskType"),
            (60, 5, Code::Range, "diskType"),
            (60, u32::MAX, Code::Range, "diskType"),
            (48, u32::MAX, Code::Range, "currentSize"),
            (48, 0x1FF, Code::Range, "currentSize"),
            (52, 513, Code::Range, "currentSize"),
        ];
        for (at, value, code, field) in cases {
            let mut bytes = good.clone();
            edit_footers(&mut bytes, |footer| put32(footer, *at, *value));
            // The high half of a field of 64 bits is reported as the field.
            let place = if *field == "currentSize" { 48 } else { *at };
            refused(&bytes, *code, field, end + place);
        }
    }
    let mut bytes = fixed();
    edit_footers(&mut bytes, |footer| put32(footer, 52, (40 << 10) + 512));
    refused(&bytes, Code::SizeLie, "currentSize", footer_at(&fixed()) + 48);
    // The geometry of a creator for which it counts is a size, too.
    edit_footers(&mut bytes, |footer| {
        put32(footer, 52, 40 << 10);
        footer[28..32].copy_from_slice(b"qemu");
        footer[56..60].copy_from_slice(&[0xff, 0xff, 16, 254]);
    });
    refused(&bytes, Code::SizeLie, "currentSize", footer_at(&fixed()) + 48);
}

#[test]
fn every_field_of_the_dynamic_header_is_checked() {
    let good = dynamic();
    let len = good.len() as u32;
    let end = footer_at(&good);
    for (offset, code) in
        [(0, Code::Overlap), (511, Code::Overlap), (len, Code::OutOfFile), (u32::MAX, Code::OutOfFile)]
    {
        let mut bytes = good.clone();
        edit_footers(&mut bytes, |footer| put32(footer, 20, offset));
        refused(&bytes, code, "dataOffset", end + 16);
        edit_footers(&mut bytes, |footer| footer[16..24].fill(0xff));
        refused(&bytes, Code::OutOfFile, "dataOffset", end + 16);
    }
    let mut elsewhere = good.clone();
    edit_footers(&mut elsewhere, |footer| put32(footer, 20, 0x2000));
    refused(&elsewhere, Code::BadMagic, "cookie of the dynamic header", 0x2000);

    let cases: &[(usize, u32, Code, &str)] = &[
        (0, 0, Code::BadMagic, "cookie of the dynamic header"),
        (24, 0x0002_0000, Code::Version, "headerVersion"),
        (32, 0, Code::Range, "blockSize"),
        (32, 256, Code::Range, "blockSize"),
        (32, 4097, Code::Range, "blockSize"),
        (32, 512 << 20, Code::Range, "blockSize"),
        (32, u32::MAX, Code::Range, "blockSize"),
        (28, 0, Code::SizeLie, "maxTableEntries"),
        (28, 9, Code::SizeLie, "maxTableEntries"),
        (28, u32::MAX, Code::Truncated, "tableOffset"),
        (20, 0, Code::Overlap, "tableOffset"),
        (20, 0x200, Code::Overlap, "tableOffset"),
        (20, 0x5fc, Code::Overlap, "tableOffset"),
        (20, 0x602, Code::Misaligned, "tableOffset"),
        (20, len - 4, Code::Truncated, "tableOffset"),
        (20, 0xFFFF_FF00, Code::OutOfFile, "tableOffset"),
        (16, 0x7FFF_FFFF, Code::OutOfFile, "tableOffset"),
    ];
    for (at, value, code, field) in cases {
        let mut bytes = good.clone();
        edit_header(&mut bytes, |header| put32(header, *at, *value));
        let place = match *field {
            "tableOffset" => 16,
            _ => *at,
        };
        refused(&bytes, *code, field, 0x200 + place);
    }
    let mut bytes = good.clone();
    edit_header(&mut bytes, |header| header[16..24].copy_from_slice(&(u64::MAX - 3).to_be_bytes()));
    refused(&bytes, Code::Overflow, "tableOffset", 0x210);
    let mut bytes = good;
    bytes[0x200 + 100] ^= 1;
    refused(&bytes, Code::Checksum, "checksum of the dynamic header", 0x224);
}

#[test]
fn entries_are_checked_one_by_one() {
    let good = dynamic();
    let end = footer_at(&good) as u32;
    for (entry, code) in [
        (0, Code::Overlap),
        (1, Code::Overlap),
        (2, Code::Overlap),
        (3, Code::Overlap),
        (end / 512, Code::OutOfFile),
        (end / 512 - 1, Code::Truncated),
        (end / 512 - 8, Code::Truncated),
        (u32::MAX - 1, Code::OutOfFile),
    ] {
        let mut bytes = good.clone();
        put32(&mut bytes, 0x608, entry);
        refused(&bytes, code, "BAT entry", 0x608);
        // An error in one block does not hide the others.
        let files = MemoryFiles::new();
        files.put("d", &bytes);
        let disk = open_vhd(&files, "d").unwrap();
        let (buf, result) = disk.read_at(Buf::zeroed(4096), 4096).wait();
        result.unwrap();
        assert_eq!(&*buf, model().read(4096, 4096));
    }
}

#[test]
fn footers_at_either_end() {
    let good = dynamic();
    let end = footer_at(&good);
    let expected = model().read(0, 40 << 10);
    assert_eq!(warnings(&good), (vec![], None));
    // Torn: gone, damaged, half written.
    let mut damaged = good.clone();
    damaged[end + 70] ^= 1;
    let mut half = good.clone();
    half[end..].fill(0);
    for torn in [&good[..end], &damaged, &half, &good[..end + 100]] {
        assert!(try_all(torn).unwrap() == expected);
        let (warnings, dirty) = warnings(torn);
        assert!(warnings.len() == 1 && dirty.is_some(), "{warnings:?}");
    }
    // The copy damaged: the footer counts, with a warning.
    let mut copy = good.clone();
    copy[30] ^= 1;
    assert!(try_all(&copy).unwrap() == expected);
    assert!(warnings(&copy).0[0].contains("differ"));
    // Two sound footers that differ: the one at the end counts.
    let mut differ = good.clone();
    differ[68] ^= 1;
    seal_footer(&mut differ, 0);
    assert!(try_all(&differ).unwrap() == expected);
    assert!(warnings(&differ).0[0].contains("differ"));
    // Both damaged.
    let mut both = damaged.clone();
    both[30] ^= 1;
    refused(&both, Code::Checksum, "checksum", end + 64);
    let mut copy_only = copy[..end].to_vec();
    refused(&copy_only, Code::Checksum, "checksum", 64);
    copy_only[0] = 0;
    refused(&copy_only, Code::BadMagic, "cookie", end - 512);
    // A fixed image has no copy; what stands at its start is guest data.
    let mut fixed = fixed();
    let end = footer_at(&fixed);
    fixed.copy_within(end.., 0);
    refused(&fixed[..end], Code::BadMagic, "cookie", end - 512);
    fixed[end + 70] ^= 1;
    refused(&fixed, Code::Checksum, "checksum", end + 64);
}

#[test]
fn footers_of_511_bytes_are_read() {
    for good in [dynamic(), fixed()] {
        let short = &good[..good.len() - 1];
        assert!(try_all(short).unwrap() == model().read(0, 40 << 10));
        assert!(warnings(short).0.iter().any(|warning| warning.contains("511")));
    }
}

#[test]
fn truncation_at_every_border() {
    let good = dynamic();
    for len in [0, 1, 511] {
        assert_eq!(try_all(&good[..len]).unwrap_err().code(), Code::Truncated, "{len}");
    }
    for (len, code, field) in [
        (512, Code::OutOfFile, "dataOffset"),
        (0x5ff, Code::OutOfFile, "dataOffset"),
        (0x600, Code::OutOfFile, "tableOffset"),
        (0x627, Code::Truncated, "tableOffset"),
        (0x628, Code::OutOfFile, "BAT entry"),
        (0xE01, Code::Truncated, "BAT entry"),
        (0x1FFF, Code::Truncated, "BAT entry"),
        (0x2E00, Code::OutOfFile, "BAT entry"),
        (0x3FFF, Code::Truncated, "BAT entry"),
    ] {
        let error = try_all(&good[..len]).expect_err("refused");
        assert_eq!((error.code(), error.field_name()), (code, Some(field)), "{len}: {error:?}");
    }
}

#[test]
fn odd_but_valid_images_are_read() {
    let expected = model().read(0, 40 << 10);
    // Trailing slack before the footer of a fixed image, a larger BAT than needed, saved state, temporary.
    let mut slack = fixed();
    let end = footer_at(&slack);
    slack.splice(end..end, [0xee; 1024]);
    assert!(try_all(&slack).unwrap() == expected);
    let mut larger = dynamic();
    edit_header(&mut larger, |header| put32(header, 28, 100));
    edit_footers(&mut larger, |footer| {
        footer[84] = 1;
        footer[11] = 3;
    });
    assert!(try_all(&larger).unwrap() == expected);
    assert!(warnings(&larger).0[0].contains("saved state"));
    // A dynamic header behind the blocks.
    let mut moved = dynamic();
    let end = footer_at(&moved);
    let header = moved[0x200..0x600].to_vec();
    moved[0x200..0x600].fill(0xdd);
    moved.splice(end..end, header);
    seal_header(&mut moved, end);
    edit_footers(&mut moved, |footer| put32(footer, 20, end as u32));
    assert!(try_all(&moved).unwrap() == expected);
}

#[test]
fn one_cache_page_is_enough() {
    let limits = {
        let mut limits = vellum_core::Limits::default();
        limits.table_cache_bytes = 0;
        limits
    };
    let files = MemoryFiles::new();
    files.put("d", &dynamic());
    let options = vellum_core::ChainOptions { limits, ..Default::default() };
    let disk = vellum_conformance::format::open_with(&[common::vhd()], &files, "d", &options).unwrap();
    assert!(vellum_conformance::format::read_all(&disk) == model().read(0, 40 << 10));
}

/// A locator that is not needed, and names a place of exbibytes: the footer does not go behind it. (Found by fuzzing.)
#[test]
fn a_locator_past_the_end_does_not_move_the_footer() {
    let mut bytes = dynamic();
    edit_header(&mut bytes, |header| {
        // The eighth: code, dataSpace, dataLength, reserved, dataOffset.
        header[744..748].copy_from_slice(b"W2ru");
        put32(header, 748, 1);
        put32(header, 752, 8);
        header[760..768].copy_from_slice(&(1u64 << 62).to_be_bytes());
    });
    let files = MemoryFiles::new();
    files.put("d", &bytes);
    let options = common::write_options(vellum_core::OpenFlags::default());
    let disk = vellum_conformance::format::open_with(&[common::vhd()], &files, "d", &options).unwrap();
    let mut expected = model().read(0, 40 << 10);
    expected[..512].fill(7);
    let (_, result) = disk.write(Buf::copy_of(&[7; 512]), 0, vellum_core::WriteFlags::default()).wait();
    result.unwrap();
    disk.close().wait().unwrap();
    // One block of 4 KiB and its bitmap.
    assert!(files.get("d").unwrap().len().unwrap() <= bytes.len() as u64 + 0x2000);
    let disk = open_vhd(&files, "d").unwrap();
    assert!(vellum_conformance::format::read_all(&disk) == expected);
}

thread_local! {
    static GOOD: Vec<u8> = dynamic();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the bytes, with right checksums: an error or data, no panic.
    #[test]
    fn no_bytes_can_make_it_panic(
        changes in prop::collection::vec(
            (
                prop_oneof![8usize..84, 0x208usize..0x240, 0x440usize..0x460, 0x600usize..0x628],
                prop_oneof![any::<u32>(), 0u32..20, Just(u32::MAX), Just(1 << 31), (0u32..12).prop_map(|i| 512 << i)],
            ),
            1..5,
        ),
        cut in prop_oneof![9 => Just(usize::MAX), 1 => 0usize..0x4200],
        differencing in any::<bool>(),
    ) {
        let mut bytes = GOOD.with(Clone::clone);
        for (at, value) in changes {
            put32(&mut bytes, at, value);
        }
        if differencing {
            bytes[63] = 4;
        }
        let end = footer_at(&bytes);
        bytes.copy_within(0..512, end);
        seal_header(&mut bytes, 0x200);
        seal_footer(&mut bytes, 0);
        seal_footer(&mut bytes, end);
        bytes.truncate(cut);
        let files = MemoryFiles::new();
        files.put("evil.vhd", &bytes);
        if let Ok(disk) = open_vhd(&files, "evil.vhd") {
            let _ = block_on(disk.pieces(0..disk.size(), 50));
            let _ = disk.read_at(Buf::zeroed(disk.size().min(1 << 20) as usize), 0).wait();
        }
    }
}
