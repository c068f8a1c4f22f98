//! Both directions with QEMU, and libvmdk's opinion of what we write.

mod common;

use common::{load, open, run, sample, store, vmdk};
use vellum_conformance::format::{Model, Recipe, assert_same, read_all, write_image};
use vellum_sim::MemoryFiles;

const SIZE: u64 = (34 << 20) + 3 * 512;

/// Our option, QEMU's option.
const KINDS: [(&[(&str, &str)], &str); 6] = [
    (&[("subformat", "monolithicSparse")], "subformat=monolithicSparse"),
    (&[("subformat", "monolithicFlat")], "subformat=monolithicFlat"),
    (&[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "10M")], "subformat=twoGbMaxExtentSparse"),
    (&[("subformat", "twoGbMaxExtentFlat"), ("extent_size", "10M")], "subformat=twoGbMaxExtentFlat"),
    (&[("subformat", "streamOptimized")], "subformat=streamOptimized"),
    (&[("zeroed_grain", "on"), ("adapter_type", "lsilogic")], "zeroed_grain=on,adapter_type=lsilogic"),
];

fn raw(directory: &std::path::Path, model: &Model) {
    std::fs::write(directory.join("disk.raw"), model.read(0, model.size as usize)).unwrap();
}

#[test]
fn what_qemu_writes_we_read() {
    let model = sample(SIZE);
    for (_, options) in KINDS {
        let directory = tempfile::tempdir().unwrap();
        raw(directory.path(), &model);
        let arguments = ["convert", "-f", "raw", "-O", "vmdk", "-o", options, "disk.raw", "disk.vmdk"];
        run(directory.path(), "qemu-img", &arguments);
        let disk = open(&load(directory.path()), "disk.vmdk").unwrap();
        assert_same(&disk, &model, true);
        let info = disk.layers()[0].image.info();
        assert!(options.starts_with("zeroed") || options.ends_with(&info.variant), "{}", info.variant);
        assert!(info.warnings.is_empty(), "{:?}", info.warnings);
    }
}

#[test]
fn what_we_write_qemu_and_libvmdk_read() {
    let model = sample(SIZE);
    let vmfs: (&[(&str, &str)], &str) = (&[("subformat", "vmfs")], "");
    let virtualbox: (&[(&str, &str)], &str) =
        (&[("subformat", "streamOptimized"), ("dialect", "virtualbox")], "");
    for (options, _) in KINDS.into_iter().chain([vmfs, virtualbox]) {
        let directory = tempfile::tempdir().unwrap();
        let files = MemoryFiles::new();
        write_image(&vmdk(), &files, "disk.vmdk", &Recipe::options(options), &model).unwrap();
        store(&files, directory.path());
        raw(directory.path(), &model);
        run(directory.path(), "qemu-img", &["compare", "-f", "raw", "-F", "vmdk", "disk.raw", "disk.vmdk"]);
        let flat = options.iter().any(|(_, value)| value.contains("Flat") || *value == "vmfs");
        if !flat {
            run(directory.path(), "qemu-img", &["check", "-f", "vmdk", "disk.vmdk"]);
        }
        let json = run(directory.path(), "qemu-img", &["info", "--output=json", "-f", "vmdk", "disk.vmdk"]);
        assert!(json.contains(&format!("\"virtual-size\": {SIZE}")), "{options:?}: {json}");
        let info = run(directory.path(), "vmdkinfo", &["disk.vmdk"]);
        assert!(info.contains(&format!("({SIZE} bytes)")), "{options:?}: {info}");
    }
}

#[test]
fn qemu_goes_on_writing_into_what_we_wrote() {
    let model = sample(SIZE);
    for (options, _) in KINDS {
        if options.iter().any(|(_, value)| *value == "streamOptimized") {
            continue;
        }
        let directory = tempfile::tempdir().unwrap();
        let files = MemoryFiles::new();
        write_image(&vmdk(), &files, "disk.vmdk", &Recipe::options(options), &model).unwrap();
        store(&files, directory.path());
        raw(directory.path(), &model);
        for (format, file) in [("vmdk", "disk.vmdk"), ("raw", "disk.raw")] {
            let write = ["-f", format, "-c", "write -P 0x5a 7M 200k", "-c", "write -P 0x33 33500k 1k", file];
            run(directory.path(), "qemu-io", &write);
        }
        let disk = open(&load(directory.path()), "disk.vmdk").unwrap();
        let expected = std::fs::read(directory.path().join("disk.raw")).unwrap();
        assert!(read_all(&disk) == expected, "{options:?}");
    }
}

#[test]
fn children_of_qemu_are_read_through_their_parents() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let files = MemoryFiles::new();
    write_image(&vmdk(), &files, "base.vmdk", &Recipe::default(), &sample(SIZE)).unwrap();
    store(&files, path);
    let create =
        ["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", "base.vmdk", "-o", "zeroed_grain=on", "top.vmdk"];
    run(path, "qemu-img", &create);
    let write =
        ["-f", "vmdk", "-c", "write -P 7 1M 3k", "-c", "write -z 5M 64k", "-c", "write -z 3M 1M", "top.vmdk"];
    run(path, "qemu-io", &write);
    run(path, "qemu-img", &["convert", "-f", "vmdk", "-O", "raw", "top.vmdk", "top.raw"]);
    let expected = std::fs::read(path.join("top.raw")).unwrap();
    let disk = open(&load(path), "top.vmdk").unwrap();
    assert_eq!(disk.layers().len(), 2);
    assert!(read_all(&disk) == expected);

    // A write to the base changes its CID: the child must be refused from then on.
    run(path, "qemu-io", &["-f", "vmdk", "-c", "write -P 9 2M 1k", "base.vmdk"]);
    let error = open(&load(path), "top.vmdk").map(|_| ()).unwrap_err();
    assert_eq!(error.code(), vellum_core::Code::ParentModified, "{error}");
}

#[test]
fn an_empty_disk_of_qemu_and_of_ours() {
    for (options, qemu) in KINDS {
        let directory = tempfile::tempdir().unwrap();
        run(directory.path(), "qemu-img", &["create", "-q", "-f", "vmdk", "-o", qemu, "disk.vmdk", "10G"]);
        let flat = qemu.contains("Flat");
        if !flat {
            let disk = open(&load(directory.path()), "disk.vmdk").unwrap();
            assert_eq!(disk.size(), 10 << 30);
            let pieces = vellum_core::block_on(disk.pieces(0..10 << 30, 10)).unwrap();
            assert_eq!(pieces.len(), 1, "{qemu}");
        }
        let files = MemoryFiles::new();
        let options: Vec<_> = options.iter().copied().filter(|(name, _)| *name != "extent_size").collect();
        let model = Model { size: 3 << 30, ..Model::default() };
        write_image(&vmdk(), &files, "ours.vmdk", &Recipe::options(&options), &model).unwrap();
        if !flat {
            store(&files, directory.path());
            let json =
                run(directory.path(), "qemu-img", &["info", "--output=json", "-f", "vmdk", "ours.vmdk"]);
            assert!(json.contains(&format!("\"virtual-size\": {}", 3u64 << 30)), "{json}");
        }
    }
}
