//! Against qemu-img 10 and libvhdi: each reads what the other writes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;
use common::{Directory, edit_footers, image_of, open_vhd, run};
use vellum_conformance::format::{Model, Recipe, assert_same, read_all};
use vellum_core::Disk;
use vellum_sim::MemoryFiles;

const SIZE: u64 = 20 << 20;

fn model() -> Model {
    Model::with_runs(SIZE, &[(1_000, 70_000), (3 << 20, 4 << 20), (SIZE - 1500, 1500)])
}

fn open_file(path: &str) -> Disk {
    let files = MemoryFiles::new();
    files.put("d", &std::fs::read(path).unwrap());
    open_vhd(&files, "d").unwrap()
}

fn virtual_size(path: &str) -> u64 {
    let info = run("qemu-img", &["info", "--output=json", "-f", "vpc", path]);
    // The file below comes first in the list.
    let (_, rest) = info.rsplit_once("\"virtual-size\": ").unwrap();
    rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

#[test]
fn qemu_img_reads_what_we_write_with_exactly_our_size() {
    let directory = Directory::new();
    let raw = directory.write("model.raw", &model().read(0, SIZE as usize));
    let recipes: &[(&[(&str, &str)], u64)] = &[
        (&[], SIZE),
        (&[("force_size", "off")], 20_994_048),
        (&[("subformat", "fixed")], SIZE),
        (&[("subformat", "fixed"), ("preallocation", "falloc")], SIZE),
        (&[("subformat", "fixed"), ("preallocation", "full")], SIZE),
        (&[("subformat", "fixed"), ("force_size", "off")], 20_994_048),
        (&[("block_size", "4k")], SIZE),
        (&[("block_size", "512k")], SIZE),
        (&[("block_size", "8M")], SIZE),
    ];
    for (options, size) in recipes {
        let ours = directory.write("ours.vhd", &image_of(&Recipe::options(options), &model()));
        run("qemu-img", &["compare", "-f", "vpc", "-F", "raw", &ours, &raw]);
        assert_eq!(virtual_size(&ours), *size, "{options:?}");
        if !options.contains(&("subformat", "fixed")) {
            // A fixed image has no mark at its start, which is all that QEMU's recognition looks at.
            assert!(run("qemu-img", &["info", &ours]).contains("file format: vpc"));
        }
    }
}

#[test]
fn exact_sizes_are_exact_for_qemu_img_too() {
    let directory = Directory::new();
    for size in [0, 512, 1 << 20, (1 << 20) + 512, 100 << 20, 33_822_867_456, 136_899_993_600, 2040 << 30] {
        let ours = directory.write("ours.vhd", &image_of(&Recipe::default(), &Model::with_runs(size, &[])));
        assert_eq!(virtual_size(&ours), size);
    }
}

#[test]
fn libvhdi_reads_what_we_write() {
    let directory = Directory::new();
    for (options, kind) in [(&[][..], "Dynamic"), (&[("subformat", "fixed")], "Fixed")] {
        let ours = directory.write("ours.vhd", &image_of(&Recipe::options(options), &model()));
        let info = run("vhdiinfo", &[&ours]);
        assert!(info.contains(kind) && info.contains("(20971520 bytes)"), "{info}");
    }
}

#[test]
fn qemu_img_writes_to_what_we_write_and_we_read_it_again() {
    let directory = Directory::new();
    for options in [&[][..], &[("subformat", "fixed")], &[("force_size", "off")], &[("block_size", "64k")]] {
        for model in [model(), Model::with_runs(SIZE, &[])] {
            let ours = directory.write("ours.vhd", &image_of(&Recipe::options(options), &model));
            run("qemu-io", &["-f", "vpc", "-c", "write -P 0x5a 9M 64k", "-c", "write -P 0x5b 15M 3M", &ours]);
            run("qemu-img", &["convert", "-f", "vpc", "-O", "raw", &ours, &directory.path("back.raw")]);
            let disk = open_file(&ours);
            assert!(read_all(&disk) == std::fs::read(directory.path("back.raw")).unwrap(), "{options:?}");
            assert_eq!(disk.layers()[0].image.info().warnings, [] as [&str; 0]);
        }
    }
}

#[test]
fn we_read_what_qemu_img_writes() {
    let directory = Directory::new();
    let raw = directory.write("model.raw", &model().read(0, SIZE as usize));
    for (options, variant, exact) in [
        ("subformat=dynamic", "dynamic", false),
        ("subformat=dynamic,force_size=on", "dynamic", true),
        ("subformat=fixed", "fixed", false),
        ("subformat=fixed,force_size=on", "fixed", true),
    ] {
        let theirs = directory.path("theirs.vhd");
        run("qemu-img", &["convert", "-f", "raw", "-O", "vpc", "-o", options, &raw, &theirs]);
        let disk = open_file(&theirs);
        assert_same(&disk, &model(), exact);
        assert_eq!(disk.size(), virtual_size(&theirs), "{options}");
        let info = disk.layers()[0].image.info();
        assert_eq!(info.variant, variant, "{options}");
        assert_eq!(info.warnings, [] as [&str; 0]);
    }
}

#[test]
fn every_creator_gets_the_size_that_qemu_img_gives_it() {
    let directory = Directory::new();
    let image = image_of(&Recipe::default(), &model());
    let creators: [&[u8; 4]; 14] = [
        b"vpc ",
        b"qemu",
        b"qem2",
        b"win ",
        b"vs  ",
        b"vbox",
        b"d2v\0",
        b"d2v ",
        b"tap\0",
        b"CTXS",
        b"wa\0\0",
        b"abcd",
        b"\0\0\0\0",
        b"VPC ",
    ];
    for creator in creators {
        for chs in [[2, 90, 4, 17], [2, 91, 4, 17], [0xff, 0xff, 16, 255], [0, 10, 4, 17]] {
            let mut bytes = image.clone();
            edit_footers(&mut bytes, |footer| {
                footer[28..32].copy_from_slice(creator);
                footer[56..60].copy_from_slice(&chs);
            });
            // 603/4/17 is more than the ten blocks of the BAT hold: an error for both.
            let path = directory.write("d.vhd", &bytes);
            let files = MemoryFiles::new();
            files.put("d", &bytes);
            if chs == [2, 91, 4, 17] && matches!(creator, b"vpc " | b"qemu") {
                assert!(open_vhd(&files, "d").is_err());
                let qemu = std::process::Command::new("qemu-img").args(["info", "-f", "vpc", &path]).output();
                assert!(!qemu.unwrap().status.success());
            } else {
                assert_eq!(open_vhd(&files, "d").unwrap().size(), virtual_size(&path), "{creator:?} {chs:?}");
            }
        }
    }
}

#[test]
fn sizes_that_qemu_img_makes_open() {
    let directory = Directory::new();
    for size in ["0", "512", "1M", "1048577", "127G", "2040G"] {
        for force in ["force_size=on", "force_size=off"] {
            let theirs = directory.path("theirs.vhd");
            run("qemu-img", &["create", "-q", "-f", "vpc", "-o", force, &theirs, size]);
            assert_eq!(open_file(&theirs).size(), virtual_size(&theirs), "{size} {force}");
        }
    }
}
