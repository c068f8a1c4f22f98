//! Every kind of disk that we write reads back as it was, against a byte-array model.

mod common;

use common::{sample, vmdk};
use vellum_conformance::format::{
    Model, Recipe, empty_disk, open, random_round_trips, round_trip, write_image,
};
use vellum_core::{Chs, Code, DiskTraits, Uuid};
use vellum_sim::MemoryFiles;

const KINDS: [&[(&str, &str)]; 9] = [
    &[("subformat", "monolithicSparse")],
    &[("subformat", "monolithicFlat")],
    &[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "3M")],
    &[("subformat", "twoGbMaxExtentFlat"), ("extent_size", "5M")],
    &[("subformat", "streamOptimized")],
    &[("subformat", "vmfs")],
    &[("subformat", "monolithicSparse"), ("grain_size", "4k"), ("zeroed_grain", "on")],
    &[("subformat", "streamOptimized"), ("grain_size", "1M"), ("dialect", "virtualbox")],
    &[("subformat", "streamOptimized"), ("grain_size", "16k")],
];

#[test]
fn random_disks_of_every_kind() {
    for kind in KINDS {
        random_round_trips(&vmdk(), &Recipe::options(kind), 6, true);
    }
}

#[test]
fn disks_of_several_grain_tables_and_odd_sizes() {
    for kind in KINDS {
        for size in [512, 1024, 65_536, 65_536 + 512, (70 << 20) + 7 * 512] {
            round_trip(&vmdk(), &Recipe::options(kind), &sample(size), true);
        }
    }
}

#[test]
fn a_size_that_is_no_multiple_of_a_sector_is_rounded_up() {
    for kind in KINDS {
        let files = MemoryFiles::new();
        let model = Model::with_runs(100_001, &[(99_000, 1001)]);
        write_image(&vmdk(), &files, "disk.vmdk", &Recipe::options(kind), &model).unwrap();
        let disk = open(&[vmdk()], &files, "disk.vmdk").unwrap();
        assert_eq!(disk.size(), 100_352);
        vellum_conformance::format::assert_same(&disk, &model, false);
    }
}

#[test]
fn huge_empty_disks_cost_nothing() {
    let tib = 1u64 << 40;
    for (kind, size) in [
        ("monolithicFlat", 64 * tib),
        ("vmfs", 64 * tib),
        ("monolithicSparse", 2 * tib),
        ("streamOptimized", 2 * tib),
        ("twoGbMaxExtentSparse", tib),
        ("twoGbMaxExtentFlat", 4 * tib),
    ] {
        empty_disk(&vmdk(), &Recipe::options(&[("subformat", kind)]), size);
    }
    // Mapping 64 TiB of preallocated grain tables reads 4 GiB of them; making and opening the disk reads none.
    let large = Recipe::options(&[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "1T")]);
    let files = MemoryFiles::new();
    let model = Model::with_runs(64 * tib, &[(64 * tib - 5, 5)]);
    write_image(&vmdk(), &files, "disk.vmdk", &large, &model).unwrap();
    let disk = open(&[vmdk()], &files, "disk.vmdk").unwrap();
    assert_eq!(disk.size(), 64 * tib);
    assert_eq!(common::read(&disk, 64 * tib - 512, 512).unwrap(), model.read(64 * tib - 512, 512));
}

#[test]
fn data_at_the_end_of_a_large_sparse_disk_is_found() {
    let size = 2u64 << 40;
    let model = Model::with_runs(size, &[(0, 100), (1 << 40, 70_000), (size - 100, 100)]);
    for kind in ["monolithicSparse", "streamOptimized"] {
        round_trip(&vmdk(), &Recipe::options(&[("subformat", kind)]), &model, true);
    }
}

#[test]
fn compression_selects_the_stream_and_contradictions_are_refused() {
    let files = MemoryFiles::new();
    write_image(&vmdk(), &files, "d.vmdk", &Recipe::default().compressed(), &sample(1 << 20)).unwrap();
    let disk = open(&[vmdk()], &files, "d.vmdk").unwrap();
    assert_eq!(disk.layers()[0].image.info().variant, "streamOptimized");

    let refused = |options: &[(&'static str, &str)], compress: bool, size: u64| {
        let recipe = Recipe { compress, ..Recipe::options(options) };
        let model = Model { size, ..Model::default() };
        let error = write_image(&vmdk(), &MemoryFiles::new(), "d.vmdk", &recipe, &model).unwrap_err();
        assert_eq!(error.code(), Code::Usage, "{error}");
        assert!(error.hint_text().is_some(), "{error}");
        error.to_string()
    };
    refused(&[("subformat", "monolithicFlat")], true, 512);
    refused(&[("subformat", "monolithicFlat"), ("zeroed_grain", "on")], false, 512);
    refused(&[("dialect", "virtualbox"), ("zeroed_grain", "on")], false, 512);
    refused(&[("grain_size", "65k")], false, 512);
    refused(&[("subformat", "streamOptimized"), ("grain_size", "4k")], false, 512);
    refused(&[("subformat", "twoGbMaxExtentFlat"), ("extent_size", "1025k")], false, 512);
    assert!(refused(&[], false, (2 << 40) + 512).contains("2 TiB"));
    assert!(refused(&[("subformat", "streamOptimized")], false, 3 << 40).contains("2 TiB"));
    assert!(refused(&[("subformat", "twoGbMaxExtentFlat")], false, 64 << 40).contains("4096"));
}

#[test]
fn names_in_descriptors_are_the_final_ones() {
    let files = MemoryFiles::new();
    let recipe = Recipe::options(&[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "1M")]);
    write_image(&vmdk(), &files, "dir/my disk.vmdk", &recipe, &sample(3 << 20)).unwrap();
    assert_eq!(
        files.paths(),
        ["dir/my disk-s001.vmdk", "dir/my disk-s002.vmdk", "dir/my disk-s003.vmdk", "dir/my disk.vmdk"]
    );
    let text = String::from_utf8(files.get("dir/my disk.vmdk").unwrap().to_vec()).unwrap();
    assert!(text.contains("RW 2048 SPARSE \"my disk-s002.vmdk\"\n"), "{text}");
    assert!(!text.contains(".part"));
}

#[test]
fn traits_are_kept() {
    let uuid = Uuid([0x11; 16]);
    let traits = DiskTraits {
        comment: "line one\nline \\two\\ \"quoted\" ä".into(),
        pchs: Some(Chs { cylinders: 20, heads: 4, sectors: 17 }),
        lchs: Some(Chs { cylinders: 20, heads: 4, sectors: 17 }),
        uuid: Some(uuid),
    };
    for dialect in ["vmware", "virtualbox"] {
        let files = MemoryFiles::new();
        let recipe = Recipe { traits: traits.clone(), ..Recipe::options(&[("dialect", dialect)]) };
        write_image(&vmdk(), &files, "d.vmdk", &recipe, &sample(1 << 20)).unwrap();
        let disk = open(&[vmdk()], &files, "d.vmdk").unwrap();
        let info = disk.layers()[0].image.info();
        assert_eq!(info.comment, traits.comment);
        assert_eq!(info.pchs, traits.pchs);
        assert_eq!(info.lchs, Some(Chs { cylinders: 30, heads: 4, sectors: 17 }));
        assert_eq!(info.identity.uuid, Some(uuid));
        assert!(info.identity.modification.is_some() && info.identity.cid.is_some());
        assert!(info.parent.is_none());
    }
}

#[test]
fn grains_of_a_sparse_disk_are_aligned_and_continue_each_other() {
    let files = MemoryFiles::new();
    let model = Model::with_runs(40 << 20, &[(1 << 20, 4 << 20)]);
    write_image(&vmdk(), &files, "d.vmdk", &Recipe::default(), &model).unwrap();
    let disk = open(&[vmdk()], &files, "d.vmdk").unwrap();
    let pieces = vellum_core::block_on(disk.pieces(1 << 20..5 << 20, 100)).unwrap();
    assert_eq!(pieces.len(), 1, "{pieces:?}");
    assert!(matches!(pieces[0].kind, vellum_core::PieceKind::Raw { offset: 65_536, .. }), "{pieces:?}");
}
