//! Against qemu-img 10: each reads what the other writes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;
use common::{Directory, image_of, open_vdi, run};
use vellum_conformance::format::{Model, Recipe, assert_same, read_all};
use vellum_core::block_on;
use vellum_sim::MemoryFiles;

fn model() -> Model {
    Model::with_runs(9 << 20, &[(1_000, 70_000), (3 << 20, 1 << 20), ((7 << 20) - 9, 20)])
}

#[test]
fn qemu_img_reads_what_we_write() {
    let directory = Directory::new();
    let raw = directory.write("model.raw", &model().read(0, 9 << 20));
    let recipes: &[&[(&str, &str)]] = &[
        &[],
        &[("static", "on")],
        &[("variant", "fixed"), ("preallocation", "falloc")],
        &[("variant", "fixed"), ("preallocation", "full")],
        &[("block_size", "1M")],
    ];
    for options in recipes {
        let ours = directory.write("ours.vdi", &image_of(&Recipe::options(options), &model()));
        run("qemu-img", &["compare", "-f", "vdi", "-F", "raw", &ours, &raw]);
        let check = run("qemu-img", &["check", "-f", "vdi", &ours]);
        assert!(check.contains("No errors were found"), "{options:?}: {check}");
        let info = run("qemu-img", &["info", &ours]);
        assert!(info.contains("file format: vdi") && info.contains("(9437184 bytes)"), "{info}");
    }
}

#[test]
fn qemu_img_writes_to_what_we_write_and_we_read_it_again() {
    let directory = Directory::new();
    for options in [&[][..], &[("static", "on")]] {
        let ours = directory.write("ours.vdi", &image_of(&Recipe::options(options), &model()));
        run("qemu-io", &["-f", "vdi", "-c", "write -P 0x5a 5M 64k", "-c", "write -z 3M 1M", &ours]);
        run("qemu-img", &["convert", "-f", "vdi", "-O", "raw", &ours, &directory.path("back.raw")]);
        let files = MemoryFiles::new();
        files.put("d", &std::fs::read(&ours).unwrap());
        let disk = open_vdi(&files, "d").unwrap();
        assert!(read_all(&disk) == std::fs::read(directory.path("back.raw")).unwrap(), "{options:?}");
        assert_eq!(disk.layers()[0].image.info().warnings, [] as [&str; 0]);
    }
}

#[test]
fn we_read_what_qemu_img_writes() {
    let directory = Directory::new();
    let raw = directory.write("model.raw", &model().read(0, 9 << 20));
    for (options, variant) in [("static=off", "dynamic"), ("static=on", "fixed")] {
        let theirs = directory.path("theirs.vdi");
        run("qemu-img", &["convert", "-f", "raw", "-O", "vdi", "-o", options, &raw, &theirs]);
        let files = MemoryFiles::new();
        files.put("d", &std::fs::read(&theirs).unwrap());
        let disk = open_vdi(&files, "d").unwrap();
        assert_same(&disk, &model(), true);
        let info = disk.layers()[0].image.info();
        assert_eq!(info.variant, variant, "{options}");
        assert_eq!(info.warnings, [] as [&str; 0]);
    }
}

#[test]
fn sizes_that_qemu_img_makes_open() {
    let directory = Directory::new();
    for size in ["0", "512", "1M", "1048577", "8T"] {
        let theirs = directory.path("theirs.vdi");
        run("qemu-img", &["create", "-q", "-f", "vdi", &theirs, size]);
        let bytes = std::fs::read(&theirs).unwrap();
        let info = run("qemu-img", &["info", "--output=json", &theirs]);
        let files = MemoryFiles::new();
        files.put("d", &bytes);
        let disk = open_vdi(&files, "d").unwrap();
        assert!(info.contains(&format!("\"virtual-size\": {},", disk.size())), "{size}: {info}");
        if disk.size() != 0 {
            assert_eq!(block_on(disk.pieces(0..disk.size(), 10)).unwrap().len(), 1);
        }
    }
}

#[test]
fn a_counter_behind_the_map_is_read_as_qemu_reads_it() {
    let directory = Directory::new();
    let mut bytes = image_of(&Recipe::default(), &model());
    common::put32(&mut bytes, 0x184, 1);
    let files = MemoryFiles::new();
    files.put("d", &bytes);
    let disk = open_vdi(&files, "d").unwrap();
    let path = directory.write("bad.vdi", &bytes);
    let check = std::process::Command::new("qemu-img").args(["check", "-f", "vdi", &path]).output().unwrap();
    assert!(!check.status.success(), "qemu-img check finds it");
    assert!(read_all(&disk) == model().read(0, disk.size() as usize));
}
