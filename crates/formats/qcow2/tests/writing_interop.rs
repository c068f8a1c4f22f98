//! What QEMU's tools say of images that were written in place, and writing into images that they made.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use vellum_conformance::format::Recipe;
use vellum_conformance::writing::{Bench, Op, random_ops};
use vellum_core::{Format, OpenFlags};
use vellum_format_qcow2::Qcow2;
use vellum_format_raw::Raw;
use vellum_sim::MemoryFiles;

fn formats() -> Vec<Arc<dyn Format>> {
    vec![Arc::new(Qcow2), Arc::new(Raw)]
}

fn qcow2() -> Arc<dyn Format> {
    Arc::new(Qcow2)
}

fn flags() -> OpenFlags {
    OpenFlags { discard: true, ..OpenFlags::default() }
}

fn run(dir: &Path, line: &str) -> String {
    let mut words = line.split_whitespace();
    let tool = words.next().expect("a command");
    let output = Command::new(tool).args(words).current_dir(dir).output();
    let output = output.unwrap_or_else(|e| panic!("{tool}: {e} (Debian: qemu-utils)"));
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}\n{text}");
    text
}

fn save(files: &Arc<MemoryFiles>, dir: &Path) {
    for path in files.paths() {
        std::fs::write(dir.join(&path), files.get(&path).unwrap().to_vec()).unwrap();
    }
}

fn load(dir: &Path, names: &[&str]) -> Arc<MemoryFiles> {
    let files = MemoryFiles::new();
    for name in names {
        files.put(name, &std::fs::read(dir.join(name)).unwrap());
    }
    files
}

/// `qemu-img check` finds nothing, neither errors nor leaks, and `qemu-img compare` sees the model.
fn approve(files: &Arc<MemoryFiles>, dir: &Path, model: &[u8], what: &str) {
    save(files, dir);
    std::fs::write(dir.join("model.raw"), model).unwrap();
    let check = run(dir, "qemu-img check -f qcow2 disk.img");
    assert!(check.contains("No errors were found"), "{what}: {check}");
    let compare = run(dir, "qemu-img compare -f qcow2 -F raw disk.img model.raw");
    assert!(compare.contains("Images are identical"), "{what}: {compare}");
}

fn work(bench: &mut Bench, seed: u64, count: usize, cluster: u64) {
    let size = bench.model.len() as u64;
    for op in random_ops(seed, count, size, cluster) {
        bench.apply(&op);
    }
    bench.verify();
}

#[test]
fn qemu_approves_of_what_we_wrote() {
    let variants: &[(&[(&str, &str)], u64)] = &[
        (&[], 65536),
        (&[("compat", "v2")], 65536),
        (&[("cluster_size", "512")], 512),
        (&[("cluster_size", "512"), ("refcount_bits", "64")], 512),
        (&[("cluster_size", "1k"), ("refcount_bits", "1")], 1024),
        (&[("cluster_size", "4k"), ("refcount_bits", "2")], 4096),
        (&[("cluster_size", "2M")], 2 << 20),
        (&[("extended_l2", "on")], 65536),
        (&[("extended_l2", "on"), ("cluster_size", "16k")], 512),
        (&[("lazy_refcounts", "on"), ("refcount_bits", "64")], 65536),
        (&[("preallocation", "metadata")], 65536),
        (&[("data_file", "disk.data")], 65536),
        (&[("data_file", "disk.data"), ("data_file_raw", "on")], 65536),
        (&[("data_file", "disk.data"), ("extended_l2", "on")], 2048),
    ];
    for (options, unit) in variants {
        for seed in [1, 2] {
            let dir = tempfile::tempdir().unwrap();
            let files = MemoryFiles::new();
            let recipe = Recipe::options(options);
            let size = (12 << 20) + 512;
            let mut bench =
                Bench::new(formats(), &qcow2(), &files, "disk.img", &recipe, size, None, flags()).unwrap();
            work(&mut bench, seed, 200, *unit);
            let model = bench.model.clone();
            let files = bench.close_and_verify();
            approve(&files, dir.path(), &model, &format!("{options:?}"));
            if options.iter().any(|(name, _)| *name == "data_file_raw") {
                assert!(std::fs::read(dir.path().join("disk.data")).unwrap() == model, "raw data file");
            }
        }
    }
}

#[test]
fn children_of_larger_and_smaller_parents() {
    let parent_content = |len: usize| -> Vec<u8> { (0..len).map(|i| (i / 512 % 251) as u8).collect() };
    for (parent_size, child_size) in [(3 << 20, 6 << 20), (6 << 20, 3 << 20), (4 << 20, 4 << 20)] {
        for (options, unit) in [
            (&[][..], 65536u64),
            (&[("compat", "v2")], 65536),
            (&[("extended_l2", "on")], 2048),
            (&[("cluster_size", "512")], 512),
            (&[("cluster_size", "2M")], 2 << 20),
            (&[("data_file", "disk.data")], 65536),
        ] {
            for parent_format in ["raw", "qcow2"] {
                let dir = tempfile::tempdir().unwrap();
                let content = parent_content(parent_size);
                std::fs::write(dir.path().join("content.raw"), &content).unwrap();
                run(dir.path(), &format!("qemu-img convert -f raw -O {parent_format} content.raw base.img"));
                let files = load(dir.path(), &["base.img"]);
                let before = files.get("base.img").unwrap().to_vec();
                let parent = Some(("base.img", &content[..]));
                let recipe = Recipe::options(options);
                let mut bench =
                    Bench::new(formats(), &qcow2(), &files, "disk.img", &recipe, child_size, parent, flags())
                        .unwrap();
                bench.verify();
                work(&mut bench, 5, 120, unit);
                let model = bench.model.clone();
                let files = bench.close_and_verify();
                assert!(files.get("base.img").unwrap().to_vec() == before, "the parent is unchanged");
                let what = format!("{options:?} over {parent_format} {parent_size} {child_size}");
                approve(&files, dir.path(), &model, &what);
                let info = run(dir.path(), "qemu-img info disk.img");
                assert!(info.contains(&format!("backing file format: {parent_format}")), "{info}");
            }
        }
    }
}

#[test]
fn images_with_snapshots_compression_and_bitmaps_made_by_qemu() {
    let content: Vec<u8> = (0..(5usize << 20) + 1024).map(|i| (i / 700 % 251) as u8).collect();
    for options in [
        "-c",
        "-c -o compat=0.10",
        "-c -o cluster_size=512",
        "-c -o cluster_size=2M",
        "-c -o compression_type=zstd",
        "-c -o extended_l2=on",
        "-o compat=0.10",
        "-o extended_l2=on",
        "-o refcount_bits=2",
        "-o lazy_refcounts=on,preallocation=metadata",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        std::fs::write(at.join("content.raw"), &content).unwrap();
        run(at, &format!("qemu-img convert -f raw -O qcow2 {options} content.raw disk.img"));
        run(at, "qemu-img snapshot -c first disk.img");
        if !options.contains("0.10") {
            run(at, "qemu-img bitmap --add -f qcow2 disk.img b0");
        }
        let files = load(at, &["disk.img"]);
        let mut bench = Bench::existing(formats(), &files, "disk.img", content.clone(), flags()).unwrap();
        work(&mut bench, 11, 150, 65536);
        let model = bench.model.clone();
        let files = bench.close_and_verify();
        approve(&files, at, &model, options);
        run(at, "qemu-img convert -l snapshot.name=first -f qcow2 -O raw disk.img first.raw");
        assert!(
            std::fs::read(at.join("first.raw")).unwrap() == content,
            "{options}: the snapshot is untouched"
        );
        // And QEMU goes on with the image.
        run(at, "qemu-img snapshot -d first disk.img");
        let mut io = Command::new("qemu-io");
        io.current_dir(at).args(["-f", "qcow2", "-c", "write -P 7 0 3M", "disk.img"]);
        assert!(io.output().unwrap().status.success());
        let check = run(at, "qemu-img check -f qcow2 disk.img");
        assert!(check.contains("No errors were found"), "{options}: {check}");
    }
}

#[test]
fn refcount_blocks_and_the_table_grow() {
    // 512-byte clusters and 64-bit counts: a block counts 32 KiB, a table of one cluster 2 MiB.
    for (bits, size) in [("64", 6u64 << 20), ("16", 24 << 20)] {
        let dir = tempfile::tempdir().unwrap();
        let files = MemoryFiles::new();
        let recipe = Recipe::options(&[("cluster_size", "512"), ("refcount_bits", bits)]);
        let mut bench =
            Bench::new(formats(), &qcow2(), &files, "disk.img", &recipe, size, None, flags()).unwrap();
        for step in 0..size / 8192 {
            bench.apply(&Op::Write(step * 8192, 8192));
            if step % 100 == 0 {
                bench.flush();
            }
        }
        let model = bench.model.clone();
        let files = bench.close_and_verify();
        approve(&files, dir.path(), &model, bits);
    }
}

#[test]
fn discarded_space_is_used_again() {
    let files = MemoryFiles::new();
    let size = 32u64 << 20;
    let mut bench =
        Bench::new(formats(), &qcow2(), &files, "disk.img", &Recipe::default(), size, None, flags()).unwrap();
    bench.apply(&Op::Write(0, size as usize));
    bench.flush();
    let len = vellum_core::Storage::len(files.get("disk.img").unwrap().as_ref()).unwrap();
    for round in 0..10 {
        bench.apply(&Op::Discard(0, size / 2));
        bench.flush();
        bench.apply(&Op::Write(round * 65536, 8 << 20));
        bench.flush();
    }
    assert_eq!(vellum_core::Storage::len(files.get("disk.img").unwrap().as_ref()).unwrap(), len);
    let allocated = vellum_core::Storage::allocated_bytes(files.get("disk.img").unwrap().as_ref()).unwrap();
    assert!(allocated < 28 << 20, "{allocated} bytes: holes were punched");
    let dir = tempfile::tempdir().unwrap();
    let model = bench.model.clone();
    let files = bench.close_and_verify();
    approve(&files, dir.path(), &model, "discarded");
}
