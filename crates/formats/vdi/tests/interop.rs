//! Against qemu-img 10: each reads what the other writes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;
use common::{Directory, guest, image_of, open_vdi, run};
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

/// Files of this machine, unlocked: the same process looks at them through several handles.
fn real_files() -> std::sync::Arc<dyn vellum_core::Resolver> {
    let options = vellum_io::OpenOptions { lock: vellum_io::LockMode::None, ..Default::default() };
    std::sync::Arc::new(vellum_io::LocalFiles::new(Default::default(), options))
}

/// Random work on a real file: `qemu-img` finds nothing wrong and reads what the model says.
#[test]
fn qemu_img_agrees_after_random_writing() {
    let directory = Directory::new();
    let files = real_files();
    let size = (20u64 << 20) + 512;
    for (seed, options) in [(1, &[][..]), (2, &[]), (3, &[("static", "on")]), (12, &[("variant", "fixed")])] {
        let path = directory.path("ours.vdi");
        let _ = std::fs::remove_file(&path);
        guest::create(&files, &path, size, options, None).unwrap();
        let flags = vellum_core::OpenFlags { discard: true, honor_zeroes: seed > 2, ..Default::default() };
        let mut guest = guest::Guest::new(&files, &path, vec![0; size as usize], flags, seed);
        for round in 0..4 {
            (0..60).for_each(|_| guest.step(1 << 20, 3 << 20));
            guest.disk.close().wait().unwrap();
            let check = run("qemu-img", &["check", "-f", "vdi", &path]);
            assert!(check.contains("No errors were found"), "{seed}/{round}: {check}");
            let back = directory.path("back.raw");
            run("qemu-img", &["convert", "-f", "vdi", "-O", "raw", &path, &back]);
            guest.compare(&std::fs::read(&back).unwrap()[..size as usize], 0);
            // They write, we go on.
            let at = guest.random.below(19 << 20) / 512 * 512;
            run("qemu-io", &["-f", "vdi", "-c", &format!("write -P 0x5a {at} 700k"), &path]);
            let end = at as usize + (700 << 10);
            guest.model[at as usize..end].fill(0x5a);
            guest.loose[at as usize..end].fill(false);
            guest.disk = guest::open_writable(&files, &path, flags, seed * 10 + round).unwrap();
            guest.verify();
            // We write, and qemu-io looks at some of it.
            guest.write(at, &[0x77; 1024]);
            guest.flush();
            run("qemu-io", &["-r", "-U", "-f", "vdi", "-c", &format!("read -P 0x77 {at} 1k"), &path]);
        }
        guest.disk.close().wait().unwrap();
        let raw = directory.path("back.raw");
        run("qemu-img", &["convert", "-f", "vdi", "-O", "raw", &path, &raw]);
        guest.compare(&std::fs::read(&raw).unwrap()[..size as usize], 0);
        run("qemu-img", &["compare", "-f", "vdi", "-F", "raw", &path, &raw]);
    }
}

#[test]
fn an_image_that_qemu_made_is_written() {
    let directory = Directory::new();
    let files = real_files();
    for option in ["static=off", "static=on"] {
        let path = directory.path("theirs.vdi");
        run("qemu-img", &["create", "-q", "-f", "vdi", "-o", option, &path, "12M"]);
        let flags = vellum_core::OpenFlags { discard: true, ..Default::default() };
        let mut guest = guest::Guest::new(&files, &path, vec![0; 12 << 20], flags, 4);
        (0..150).for_each(|_| guest.step(1 << 20, 3 << 20));
        guest.reopen();
        guest.verify();
        guest.disk.close().wait().unwrap();
        let check = run("qemu-img", &["check", "-f", "vdi", &path]);
        assert!(check.contains("No errors were found"), "{option}: {check}");
        run("qemu-img", &["convert", "-f", "vdi", "-O", "raw", &path, &directory.path("back.raw")]);
        guest.compare(&std::fs::read(directory.path("back.raw")).unwrap(), 0);
    }
}
