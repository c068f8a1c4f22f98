//! Round trips of every variant against a byte-array model.

use std::sync::Arc;
use vellum_conformance::format::{Model, Recipe, empty_disk, random_round_trips, round_trip, write_image};
use vellum_core::{Code, Format};
use vellum_format_qcow2::Qcow2;
use vellum_sim::MemoryFiles;

fn qcow2() -> Arc<dyn Format> {
    Arc::new(Qcow2)
}

#[test]
fn random_disks_in_the_usual_variants() {
    for options in [&[][..], &[("compat", "v2")], &[("extended_l2", "on")], &[("lazy_refcounts", "on")]] {
        random_round_trips(&qcow2(), &Recipe::options(options), 12, true);
    }
    random_round_trips(&qcow2(), &Recipe::default().compressed(), 12, true);
    random_round_trips(&qcow2(), &Recipe::options(&[("compression_type", "zstd")]).compressed(), 12, true);
    random_round_trips(&qcow2(), &Recipe::options(&[("compat", "0.10")]).compressed(), 6, true);
}

#[test]
fn every_cluster_size_with_every_refcount_width() {
    let model =
        Model::with_runs(3_000_320, &[(0, 70_000), (500_000, 3), (1 << 20, 200_000), (2_999_000, 1320)]);
    for cluster_bits in 9..=21 {
        for refcount_bits in [1, 2, 4, 8, 16, 32, 64] {
            let cluster = (1u64 << cluster_bits).to_string();
            let bits = refcount_bits.to_string();
            let recipe = Recipe::options(&[("cluster_size", &cluster), ("refcount_bits", &bits)]);
            round_trip(&qcow2(), &recipe, &model, true);
            round_trip(&qcow2(), &recipe.clone().compressed(), &model, true);
        }
    }
}

#[test]
fn data_files_raw_and_not() {
    let model = Model::with_runs(5 << 20, &[(0, 100), (3 << 20, 70_000)]);
    for raw in ["on", "off"] {
        let recipe = Recipe::options(&[("data_file", "disk.data"), ("data_file_raw", raw)]);
        round_trip(&qcow2(), &recipe, &model, true);
        let files = MemoryFiles::new();
        write_image(&qcow2(), &files, "disk.img", &recipe, &model).unwrap();
        assert_eq!(
            files.get("disk.data").unwrap().to_vec(),
            model.read(0, 5 << 20),
            "the data file is the disk"
        );
    }
}

#[test]
fn preallocated_images() {
    let model = Model::with_runs(3 << 20, &[(1 << 20, 70_000)]);
    for mode in ["metadata", "falloc", "full"] {
        round_trip(&qcow2(), &Recipe::options(&[("preallocation", mode)]), &model, true);
    }
}

#[test]
fn a_disk_of_no_bytes_and_of_one_sector() {
    for size in [0, 512] {
        round_trip(&qcow2(), &Recipe::default(), &Model::with_runs(size, &[(0, 512)]), true);
    }
}

#[test]
fn sixty_four_tebibytes_cost_nothing() {
    empty_disk(&qcow2(), &Recipe::default(), 64 << 40);
    empty_disk(&qcow2(), &Recipe::options(&[("cluster_size", "2M")]), 1 << 60);
}

#[test]
fn wrong_combinations_are_refused_in_words() {
    let model = Model::with_runs(1 << 20, &[]);
    for (options, compress, word) in [
        (&[("compat", "v2"), ("extended_l2", "on")][..], false, "version 3"),
        (&[("compat", "v2"), ("compression_type", "zstd")], true, "version 3"),
        (&[("extended_l2", "on"), ("cluster_size", "8k")], false, "16 KiB"),
        (&[("cluster_size", "65535")], false, "power of two"),
        (&[("refcount_bits", "3")], false, "power of two"),
        (&[("data_file", "d"), ("data_file_raw", "on")], true, "compressed"),
        (&[("data_file_raw", "on")], false, "data_file"),
        (&[("data_file", "../d")], false, "plain file name"),
        (&[("data_file", "disk.img")], false, "own data file"),
    ] {
        let mut recipe = Recipe::options(options);
        recipe.compress = compress;
        let error = write_image(&qcow2(), &MemoryFiles::new(), "disk.img", &recipe, &model).unwrap_err();
        assert!(error.to_string().contains(word), "{options:?}: {error}");
        assert!(error.hint_text().is_some());
    }
    let tiny = Recipe::options(&[("cluster_size", "512")]);
    let huge = Model::with_runs(64 << 40, &[]);
    let error = write_image(&qcow2(), &MemoryFiles::new(), "disk.img", &tiny, &huge).unwrap_err();
    assert_eq!(error.code(), Code::TableLimit);
}
