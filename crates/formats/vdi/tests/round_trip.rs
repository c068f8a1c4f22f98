//! What our writer writes, our reader reads; layouts, identities, sizes at the borders.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::type_complexity
)]

mod common;
use common::{image_of, open_vdi, vdi};
use std::time::{Duration, Instant};
use vellum_conformance::format::{Model, Recipe, empty_disk, random_round_trips, round_trip, write_image};
use vellum_core::{Chs, Code, Confidence, Extent, Format, Sample, Uuid, block_on};
use vellum_format_vdi::Vdi;
use vellum_sim::MemoryFiles;

#[test]
fn every_option_reads_back() {
    let recipes: &[&[(&str, &str)]] = &[
        &[],
        &[("variant", "dynamic"), ("static", "off")],
        &[("variant", "fixed")],
        &[("static", "on")],
        &[("variant", "fixed"), ("preallocation", "falloc")],
        &[("variant", "fixed"), ("static", "on"), ("preallocation", "full")],
        &[("block_size", "4k")],
        &[("block_size", "64k"), ("variant", "fixed")],
        &[("block_size", "64M")],
    ];
    for recipe in recipes {
        random_round_trips(&vdi(), &Recipe::options(recipe), 6, true);
    }
}

#[test]
fn sizes_at_the_borders_read_back() {
    for size in [0, 512, (1 << 20) - 512, 1 << 20, (1 << 20) + 512, 3 << 20] {
        for variant in ["dynamic", "fixed"] {
            let model = Model::with_runs(size, &[(0, 512), (size.saturating_sub(512), 512)]);
            round_trip(&vdi(), &Recipe::options(&[("variant", variant)]), &model, true);
        }
    }
    let odd = Model::with_runs(1_000_001, &[(1_000_000, 1)]);
    let files = MemoryFiles::new();
    write_image(&vdi(), &files, "d", &Recipe::default(), &odd).unwrap();
    assert_eq!(open_vdi(&files, "d").unwrap().size(), 1_000_001u64.next_multiple_of(512));
}

#[test]
fn a_map_over_many_pages_reads_back() {
    // 40 000 blocks of 4 KiB: three pages of the map.
    let runs = [(0, 4096), (16_383 * 4096, 8192), (32_768 * 4096 - 1, 2), (39_999 * 4096, 4096)];
    let model = Model::with_runs(40_000 * 4096, &runs);
    for variant in ["dynamic", "fixed"] {
        round_trip(&vdi(), &Recipe::options(&[("block_size", "4k"), ("variant", variant)]), &model, true);
    }
}

#[test]
fn a_disk_of_64_tib_is_made_and_opened_in_seconds() {
    let start = Instant::now();
    empty_disk(&vdi(), &Recipe::default(), 64 << 40);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    empty_disk(&vdi(), &Recipe::options(&[("static", "on")]), 1 << 40);
    empty_disk(&vdi(), &Recipe::options(&[("block_size", "64M")]), 1 << 50);
}

#[test]
fn the_layout_is_that_of_virtualbox() {
    let model = Model::with_runs(300 << 20, &[(5 << 20, 100), (9 << 20, 100)]);
    let bytes = image_of(&Recipe::default(), &model);
    let le32 = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert!(bytes.starts_with(b"<<< Vellum Virtual Disk Image >>>\n\0"));
    assert_eq!((le32(0x44), le32(0x48), le32(0x4C), le32(0x50)), (0x10001, 0x190, 1, 0));
    assert_eq!((le32(0x154), le32(0x158)), (1 << 20, 2 << 20));
    assert_eq!((le32(0x168), le32(0x178), le32(0x17C)), (512, 1 << 20, 0));
    assert_eq!((le32(0x180), le32(0x184)), (300, 2), "cBlocks, cBlocksAllocated");
    assert_eq!([le32(0x1C8), le32(0x1CC), le32(0x1D0), le32(0x1D4)], [609, 16, 63, 512], "LCHS");
    let map = 1 << 20;
    assert_eq!([le32(map + 16), le32(map + 20), le32(map + 36)], [u32::MAX, 0, 1]);
    assert_eq!(bytes.len(), 4 << 20);
    assert_ne!(bytes[0x188..0x198], [0; 16]);
    assert_ne!(bytes[0x198..0x1A8], [0; 16]);
    assert_eq!(bytes[0x1A8..0x1C8], [0; 32], "no parent");

    let fixed = image_of(&Recipe::options(&[("static", "on")]), &Model::with_runs(3 << 20, &[]));
    let le32 = |at: usize| u32::from_le_bytes(fixed[at..at + 4].try_into().unwrap());
    assert_eq!((le32(0x4C), le32(0x180), le32(0x184)), (2, 3, 3));
    assert_eq!([le32(map), le32(map + 4), le32(map + 8)], [0, 1, 2]);
    assert_eq!(fixed.len(), 5 << 20);
}

#[test]
fn what_formats_keep_besides_the_content_is_kept() {
    let mut recipe = Recipe::default();
    recipe.traits.comment = "Gr\u{fc}\u{df}e ".repeat(60);
    recipe.traits.uuid = Uuid::parse("c9cc8ff4-b6c0-4e54-9dee-acaa4fe4add5");
    recipe.traits.lchs = Some(Chs { cylinders: 1, heads: 255, sectors: 63 });
    recipe.traits.pchs = Some(Chs { cylinders: 100, heads: 16, sectors: 63 });
    let files = MemoryFiles::new();
    write_image(&vdi(), &files, "d", &recipe, &Model::with_runs(1 << 30, &[])).unwrap();
    let disk = open_vdi(&files, "d").unwrap();
    let info = disk.layers()[0].image.info();
    assert_eq!(info.identity.uuid, recipe.traits.uuid);
    assert!(info.identity.modification.is_some());
    assert_eq!(info.lchs, Some(Chs { cylinders: 130, heads: 255, sectors: 63 }), "heads and sectors kept");
    assert_eq!(info.pchs, recipe.traits.pchs);
    assert!(info.comment.starts_with("Gr\u{fc}\u{df}e ") && info.comment.len() <= 255);
    assert!(recipe.traits.comment.starts_with(&info.comment), "cut between characters");
    assert_eq!(info.warnings, [] as [&str; 0]);
    assert_eq!((info.variant.as_str(), info.block_size), ("dynamic", 1 << 20));
    // A geometry of another disk is not carried along.
    recipe.traits.pchs = Some(Chs { cylinders: 65535, heads: 16, sectors: 255 });
    write_image(&vdi(), &files, "e", &recipe, &Model::with_runs(1 << 30, &[])).unwrap();
    assert_eq!(open_vdi(&files, "e").unwrap().layers()[0].image.info().pchs, None);
}

#[test]
fn what_cannot_be_made_is_refused_before_a_file_is_made() {
    let cases: &[(&[(&str, &str)], bool, u64)] = &[
        (&[("variant", "dynamic"), ("static", "on")], false, 1 << 20),
        (&[("preallocation", "full")], false, 1 << 20),
        (&[("block_size", "12k")], false, 1 << 20),
        (&[], true, 1 << 20),
        (&[], false, 1 << 50),
        (&[("block_size", "4k")], false, 4 << 40),
        (&[("block_size", "64M")], false, 1 << 60),
    ];
    for (options, compress, size) in cases {
        let files = MemoryFiles::new();
        let recipe = Recipe { compress: *compress, ..Recipe::options(options) };
        let error =
            write_image(&vdi(), &files, "d", &recipe, &Model::with_runs(*size, &[])).expect_err("refused");
        assert_eq!(error.code(), Code::Usage, "{options:?}: {error:?}");
        assert!(error.hint_text().is_some(), "{error:?}");
        assert_eq!(files.paths(), [] as [&str; 0]);
    }
}

#[test]
fn zero_and_free_are_kept_apart_and_runs_are_long() {
    let mut bytes = image_of(&Recipe::default(), &Model::with_runs(8 << 20, &[(0, 3 << 20)]));
    for block in [4, 5] {
        common::put32(&mut bytes, (1 << 20) + block * 4, 0xFFFF_FFFE);
    }
    let files = MemoryFiles::new();
    files.put("d", &bytes);
    let disk = open_vdi(&files, "d").unwrap();
    let mut found = Vec::new();
    let mut at = 0;
    while at < disk.size() {
        let extent = block_on(disk.lookup(at..disk.size())).unwrap();
        found.push((extent.range.end >> 20, format!("{:?}", extent.extent)));
        at = extent.range.end;
    }
    let raw = format!("{:?}", Extent::Raw { storage: 0, offset: 2 << 20 });
    assert_eq!(found, [(3, raw), (4, "Parent".into()), (6, "Zero".into()), (8, "Parent".into())]);
}

#[test]
fn probing_wants_signature_and_version() {
    let bytes = image_of(&Recipe::default(), &Model::with_runs(1 << 20, &[]));
    let probe = |head: &[u8]| Vdi.probe(&Sample { head, tail: &[], len: 4096 });
    assert_eq!(probe(&bytes[..4096]), Confidence::Sure);
    assert_eq!(probe(&bytes[..72]), Confidence::Sure);
    assert_eq!(probe(&bytes[..71]), Confidence::No);
    let mut other = bytes[..512].to_vec();
    other[0x46] = 9;
    assert_eq!(probe(&other), Confidence::Weak);
    other[0x40] = 0;
    assert_eq!(probe(&other), Confidence::No);
}
