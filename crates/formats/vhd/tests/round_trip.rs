//! What our writer writes, our reader reads; layouts, identities, sizes at the borders.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::type_complexity
)]

mod common;
use common::{edit_footers, image_of, open_vhd, vhd};
use std::time::{Duration, Instant};
use vellum_conformance::format::{Model, Recipe, empty_disk, random_round_trips, round_trip, write_image};
use vellum_core::{Chs, Code, Confidence, Extent, Format, Sample, Uuid, Value, block_on};
use vellum_format_vhd::Vhd;
use vellum_sim::MemoryFiles;

#[test]
fn every_option_reads_back() {
    let recipes: &[(&[(&str, &str)], bool)] = &[
        (&[], true),
        (&[("subformat", "dynamic"), ("force_size", "on")], true),
        (&[("force_size", "off")], false),
        (&[("subformat", "fixed")], true),
        (&[("subformat", "fixed"), ("force_size", "off"), ("preallocation", "falloc")], false),
        (&[("subformat", "fixed"), ("preallocation", "full")], true),
        (&[("block_size", "4k")], true),
        (&[("block_size", "512k")], true),
        (&[("block_size", "8M")], true),
    ];
    for (recipe, exact) in recipes {
        random_round_trips(&vhd(), &Recipe::options(recipe), 6, *exact);
    }
}

#[test]
fn sizes_at_the_borders_read_back() {
    for size in [0, 512, (2 << 20) - 512, 2 << 20, (2 << 20) + 512, 5 << 20] {
        for subformat in ["dynamic", "fixed"] {
            let model = Model::with_runs(size, &[(0, 512), (size.saturating_sub(512), 512)]);
            round_trip(&vhd(), &Recipe::options(&[("subformat", subformat)]), &model, true);
        }
    }
    let odd = Model::with_runs(1_000_001, &[(1_000_000, 1)]);
    let files = MemoryFiles::new();
    write_image(&vhd(), &files, "d", &Recipe::default(), &odd).unwrap();
    assert_eq!(open_vhd(&files, "d").unwrap().size(), 1_000_001u64.next_multiple_of(512));
}

#[test]
fn a_bat_over_many_pages_reads_back() {
    // 40 000 blocks of 4 KiB: three pages of the BAT, one of them shared with the headers.
    let runs = [(0, 4096), (15_999 * 4096, 8192), (32_768 * 4096 - 1, 2), (39_999 * 4096, 4096)];
    let model = Model::with_runs(40_000 * 4096, &runs);
    round_trip(&vhd(), &Recipe::options(&[("block_size", "4k")]), &model, true);
}

#[test]
fn the_largest_disk_is_made_and_opened_at_once() {
    let start = Instant::now();
    for recipe in [&[][..], &[("subformat", "fixed")], &[("force_size", "off")], &[("block_size", "256M")]] {
        empty_disk(&vhd(), &Recipe::options(recipe), 2040 << 30);
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn data_of_blocks_is_aligned_for_sharing() {
    let model = Model::with_runs(9 << 20, &[(0, 1), (5 << 20, 1), ((9 << 20) - 1, 1)]);
    for (block_size, bitmap) in [("2M", 512), ("512k", 512), ("8M", 1024), ("4k", 512)] {
        let bytes = image_of(&Recipe::options(&[("block_size", block_size)]), &model);
        let files = MemoryFiles::new();
        files.put("d", &bytes);
        let disk = open_vhd(&files, "d").unwrap();
        for at in [0, 5 << 20, (9 << 20) - 512] {
            let found = block_on(disk.lookup(at..9 << 20)).unwrap();
            let Extent::Raw { offset, .. } = found.extent else { panic!("{found:?}") };
            let start = offset - at % disk.layers()[0].image.info().block_size;
            assert_eq!(start % 4096, 0, "{block_size}");
            let before = &bytes[start as usize - bitmap..start as usize];
            assert!(before.iter().all(|byte| *byte == 0xff), "the bitmap is right before the data");
        }
    }
}

#[test]
fn the_layout_is_that_of_the_sheet() {
    let model = Model::with_runs(20 << 20, &[(4 << 20, 2 << 20)]);
    let bytes = image_of(&Recipe::default(), &model);
    assert_eq!(bytes[..512], bytes[bytes.len() - 512..], "the copy is the footer");
    assert_eq!(bytes[..8], *b"conectix");
    assert_eq!(bytes[8..24], [0, 0, 0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    assert_eq!(bytes[24..28], (1_700_000_000u32 - 946_684_800).to_be_bytes());
    assert_eq!(bytes[28..40], *b"win \0\x0a\0\0Wi2k");
    assert_eq!(bytes[40..48], (20u64 << 20).to_be_bytes());
    assert_eq!(bytes[48..56], (20u64 << 20).to_be_bytes());
    assert_eq!(bytes[56..64], [2, 90, 4, 17, 0, 0, 0, 3], "602/4/17, dynamic");
    assert_eq!(bytes[0x200..0x208], *b"cxsparse");
    assert_eq!(bytes[0x210..0x224], [0, 0, 0, 0, 0, 0, 6, 0, 0, 1, 0, 0, 0, 0, 0, 10, 0, 0x20, 0, 0]);
    // BAT[2] is the sector before 4 KiB; the rest is absent, up to the end of the sector.
    assert_eq!(bytes[0x608..0x60c], [0, 0, 0, 7]);
    assert!(bytes[0x600..0x608].iter().chain(&bytes[0x60c..0x800]).all(|byte| *byte == 0xff));
    assert_eq!(bytes.len(), 4096 + (2 << 20) + 512);

    let fixed = image_of(&Recipe::options(&[("subformat", "fixed")]), &model);
    assert_eq!(fixed.len(), (20 << 20) + 512);
    let footer = &fixed[20 << 20..];
    assert_eq!(footer[16..24], [0xff; 8]);
    assert_eq!(footer[60..64], [0, 0, 0, 2]);

    let rounded = image_of(&Recipe::options(&[("force_size", "off")]), &model);
    assert_eq!(rounded[28..36], *b"vpc \0\x05\0\x03");
    assert_eq!(rounded[48..56], 20_994_048u64.to_be_bytes());
    assert_eq!(rounded[56..60], [2, 91, 4, 17], "603/4/17");
}

#[test]
fn identity_and_geometry_are_kept() {
    let mut recipe = Recipe::default();
    recipe.traits.uuid = Uuid::parse("c9cc8ff4-b6c0-4e54-9dee-acaa4fe4add5");
    let files = MemoryFiles::new();
    write_image(&vhd(), &files, "d", &recipe, &Model::with_runs(1 << 30, &[])).unwrap();
    let disk = open_vhd(&files, "d").unwrap();
    let info = disk.layers()[0].image.info();
    assert_eq!(info.identity.uuid, recipe.traits.uuid);
    assert_eq!(info.pchs, Some(Chs { cylinders: 2080, heads: 16, sectors: 63 }));
    assert_eq!((info.variant.as_str(), info.block_size), ("dynamic", 2 << 20));
    let property = |name| info.properties.iter().find(|p| p.name == name).map(|p| p.value.clone());
    assert_eq!(property("creatorApp"), Some(Value::from("win")));
    assert_eq!(property("timestamp"), Some(Value::from(1_700_000_000u64)));
    assert_eq!(property("savedState"), Some(Value::from(false)));
    assert_eq!(info.warnings, [] as [&str; 0]);
    assert_eq!(info.dirty, None);
}

#[test]
fn what_cannot_be_made_is_refused_before_a_file_is_made() {
    let cases: &[(&[(&str, &str)], bool, u64)] = &[
        (&[("preallocation", "full")], false, 1 << 20),
        (&[("block_size", "12k")], false, 1 << 20),
        (&[], true, 1 << 20),
        (&[], false, (2040 << 30) + 1),
        (&[("subformat", "fixed")], false, 1 << 42),
        (&[], false, u64::MAX),
        // Full, it would need more than 2^32 sectors.
        (&[("block_size", "512k")], false, 2040 << 30),
    ];
    for (options, compress, size) in cases {
        let files = MemoryFiles::new();
        let recipe = Recipe { compress: *compress, ..Recipe::options(options) };
        let error =
            write_image(&vhd(), &files, "d", &recipe, &Model::with_runs(*size, &[])).expect_err("refused");
        assert_eq!(error.code(), Code::Usage, "{options:?}: {error:?}");
        assert!(error.hint_text().is_some(), "{error:?}");
        assert_eq!(files.paths(), [] as [&str; 0]);
    }
}

#[test]
fn probing_wants_a_footer_that_is_right_in_every_way() {
    let probe = |bytes: &[u8]| {
        let take = bytes.len().min(Sample::LEN);
        let (head, tail) = (&bytes[..take], &bytes[bytes.len() - take..]);
        Vhd.probe(&Sample { head, tail, len: bytes.len() as u64 })
    };
    let model = Model::with_runs(1 << 20, &[(0, 5000)]);
    let dynamic = image_of(&Recipe::default(), &model);
    let fixed = image_of(&Recipe::options(&[("subformat", "fixed")]), &model);
    assert_eq!(probe(&dynamic), Confidence::Sure);
    assert_eq!(probe(&fixed), Confidence::Sure);
    assert_eq!(probe(&fixed[..fixed.len() - 1]), Confidence::Sure, "511 bytes");
    assert_eq!(probe(&fixed[..fixed.len() - 2]), Confidence::No);
    assert_eq!(probe(&dynamic[..dynamic.len() - 512]), Confidence::Sure, "torn");
    assert_eq!(probe(&[]), Confidence::No);

    // Right cookie, wrong checksum, version or type, at the end of what may be a raw disk.
    let mut bad = fixed.clone();
    *bad.last_mut().unwrap() = 1;
    assert_eq!(probe(&bad), Confidence::No);
    let mut bad = fixed.clone();
    edit_footers(&mut bad, |footer| footer[13] = 2);
    assert_eq!(probe(&bad), Confidence::No);
    let mut bad = fixed.clone();
    edit_footers(&mut bad, |footer| footer[63] = 5);
    assert_eq!(probe(&bad), Confidence::No);
    // A cookie at the start with a wrong checksum is a weak sign.
    let mut bad = dynamic[..dynamic.len() - 512].to_vec();
    bad[100] ^= 1;
    assert_eq!(probe(&bad), Confidence::Weak);
}
