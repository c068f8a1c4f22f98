//! Raw images: round trips, and the little that can be wrong with them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::process::Command;
use std::sync::Arc;
use vellum_conformance::format::{
    Model, Recipe, assert_same, empty_disk, open_with, random_round_trips, read_all, round_trip, write_image,
};
use vellum_core::{ChainOptions, Code, Confidence, Format, Sample};
use vellum_format_raw::Raw;
use vellum_sim::MemoryFiles;

fn raw() -> Arc<dyn Format> {
    Arc::new(Raw)
}

fn as_raw() -> ChainOptions {
    ChainOptions { format: Some("raw".into()), ..ChainOptions::default() }
}

#[test]
fn what_is_written_reads_back() {
    for preallocation in ["off", "falloc", "full"] {
        random_round_trips(&raw(), &Recipe::options(&[("preallocation", preallocation)]), 8, true);
    }
    round_trip(&raw(), &Recipe::default(), &Model::with_runs(0, &[]), true);
    empty_disk(&raw(), &Recipe::default(), 64 << 40);
    empty_disk(&raw(), &Recipe::default(), 1 << 60);
}

#[test]
fn a_length_that_is_no_multiple_of_512_is_kept_with_a_warning() {
    let files = MemoryFiles::new();
    files.put("odd.img", &[7u8; 1000]);
    let disk = open_with(&[raw()], &files, "odd.img", &as_raw()).unwrap();
    assert_eq!(disk.size(), 1000);
    assert_eq!(read_all(&disk), vec![7u8; 1000]);
    assert_eq!(disk.layers()[0].image.info().warnings.len(), 1);
    assert_eq!(files.calls(), ["open odd.img"]);
    round_trip(&raw(), &Recipe::default(), &Model::with_runs(1_048_577, &[(1_048_576, 1)]), true);
}

#[test]
fn raw_claims_nothing_and_the_registry_falls_back_to_it() {
    let sample = Sample { head: &[0; 4096], tail: &[0; 4096], len: 4096 };
    assert_eq!(Raw.probe(&sample), Confidence::No);
    let files = MemoryFiles::new();
    files.put("disk", &[1u8; 512]);
    let disk = open_with(&[raw()], &files, "disk", &ChainOptions::default()).unwrap();
    assert_eq!(disk.layers()[0].image.info().format, "raw");
}

#[test]
fn compression_is_refused_by_name() {
    let files = MemoryFiles::new();
    let model = Model::with_runs(1 << 20, &[]);
    let error = write_image(&raw(), &files, "d", &Recipe::default().compressed(), &model).unwrap_err();
    assert_eq!(error.code(), Code::Usage);
    assert!(error.hint_text().is_some());
}

#[test]
fn qemu_img_reads_what_we_write_and_we_read_what_it_writes() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, theirs) = (directory.path().join("ours.img"), directory.path().join("theirs.img"));
    let model = Model::with_runs(5 << 20, &[(12_345, 70_000), (4 << 20, 1 << 20)]);
    let files = MemoryFiles::new();
    write_image(&raw(), &files, "d", &Recipe::default(), &model).unwrap();
    std::fs::write(&ours, files.get("d").unwrap().to_vec()).unwrap();
    let output = Command::new("qemu-img")
        .args(["convert", "-q", "-f", "raw", "-O", "raw"])
        .args([&ours, &theirs])
        .output()
        .expect("qemu-img is needed (Debian package qemu-utils)");
    assert!(output.status.success(), "{output:?}");
    files.put("t", &std::fs::read(&theirs).unwrap());
    assert_same(&open_with(&[raw()], &files, "t", &as_raw()).unwrap(), &model, true);
}
