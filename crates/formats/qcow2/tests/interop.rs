//! Both directions with qemu-img 10, and what libqcow sees.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use vellum_conformance::format::{Model, Recipe, open_with, pattern, read_all, write_image};
use vellum_core::{ChainOptions, Format, Storage};
use vellum_format_qcow2::Qcow2;
use vellum_sim::MemoryFiles;

fn qcow2() -> Arc<dyn Format> {
    Arc::new(Qcow2)
}

/// Runs a tool; a missing tool is a failure that names the package.
fn run(dir: &Path, line: &str) -> String {
    let mut words = line.split_whitespace();
    let tool = words.next().expect("a command");
    let output = Command::new(tool).args(words).current_dir(dir).output();
    let output = output.unwrap_or_else(|e| panic!("{tool}: {e} (Debian: qemu-utils, libqcow-utils)"));
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

/// A disk with data that compresses, data that does not, zero runs and an odd end.
fn disk() -> Model {
    let mut model = Model::with_runs(8_388_608 + 1536, &[(0, 200_000), (1_000_000, 5), (3 << 20, 600_000)]);
    let mut noise = 0x1234_5678_9abc_def1u64;
    let random: Vec<u8> = (0..300_000)
        .map(|_| {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            noise as u8
        })
        .collect();
    model.data.insert(5 << 20, random);
    model.data.insert(model.size - 700, pattern(9, 700));
    model
}

/// Far matches: the second half of each 60 KiB repeats the first.
fn far_matches() -> Model {
    let mut model = Model { size: 4 << 20, ..Model::default() };
    let mut noise = 88_172_645_463_325_252u64;
    let mut half = |len: usize| -> Vec<u8> {
        (0..len)
            .map(|_| {
                noise ^= noise << 13;
                noise ^= noise >> 7;
                noise ^= noise << 17;
                noise as u8
            })
            .collect()
    };
    for chunk in 0..32u64 {
        let unit = half(20_000);
        model.data.insert(chunk * 131_072, [unit.clone(), unit.clone(), unit].concat());
    }
    model
}

#[test]
fn qemu_reads_and_checks_what_we_write() {
    let plain = Recipe::options;
    let recipes = [
        plain(&[]),
        plain(&[("compat", "v2")]),
        plain(&[("cluster_size", "512")]),
        plain(&[("cluster_size", "2M")]),
        plain(&[("extended_l2", "on")]),
        plain(&[("extended_l2", "on"), ("cluster_size", "16k")]),
        plain(&[("lazy_refcounts", "on"), ("refcount_bits", "64")]),
        plain(&[("refcount_bits", "1"), ("cluster_size", "4k")]),
        plain(&[("preallocation", "metadata")]),
        plain(&[("preallocation", "full")]),
        plain(&[("data_file", "disk.data")]),
        plain(&[("data_file", "disk.data"), ("data_file_raw", "on")]),
        plain(&[]).compressed(),
        plain(&[("compat", "v2")]).compressed(),
        plain(&[("compression_type", "zstd")]).compressed(),
        plain(&[("compression_type", "zstd"), ("cluster_size", "2M")]).compressed(),
        plain(&[("cluster_size", "512")]).compressed(),
        plain(&[("refcount_bits", "1")]).compressed(),
        plain(&[("refcount_bits", "2"), ("extended_l2", "on")]).compressed(),
        plain(&[("refcount_bits", "4"), ("cluster_size", "4k")]).compressed(),
        plain(&[("cluster_size", "2M")]).compressed(),
    ];
    for model in [disk(), far_matches(), Model::with_runs(1 << 20, &[])] {
        for recipe in &recipes {
            let dir = tempfile::tempdir().unwrap();
            let files = MemoryFiles::new();
            write_image(&qcow2(), &files, "disk.img", recipe, &model).unwrap();
            save(&files, dir.path());
            std::fs::write(dir.path().join("model.raw"), model.read(0, model.size as usize)).unwrap();
            let check = run(dir.path(), "qemu-img check -f qcow2 disk.img");
            assert!(check.contains("No errors were found"), "{recipe:?}: {check}");
            let compare = run(dir.path(), "qemu-img compare -f qcow2 -F raw disk.img model.raw");
            assert!(compare.contains("Images are identical"), "{recipe:?}: {compare}");
        }
    }
}

#[test]
fn we_read_what_qemu_writes() {
    let model = disk();
    let content = model.read(0, model.size as usize);
    for options in [
        "-o compat=1.1",
        "-o compat=0.10",
        "-o cluster_size=512",
        "-o cluster_size=2M",
        "-o extended_l2=on",
        "-o extended_l2=on,cluster_size=2M",
        "-o refcount_bits=1",
        "-o refcount_bits=64,lazy_refcounts=on",
        "-o preallocation=metadata",
        "-o preallocation=full",
        "-c",
        "-c -o compat=0.10",
        "-c -o cluster_size=512",
        "-c -o cluster_size=2M",
        "-c -o compression_type=zstd",
        "-c -o compression_type=zstd,cluster_size=1M",
        "-c -o extended_l2=on",
    ] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("model.raw"), &content).unwrap();
        run(dir.path(), &format!("qemu-img convert -f raw -O qcow2 {options} model.raw disk.img"));
        let files = load(dir.path(), &["disk.img"]);
        let disk = open_with(&[qcow2()], &files, "disk.img", &ChainOptions::default()).unwrap();
        assert!(read_all(&disk) == content, "{options}");
        assert_eq!(
            std::fs::read(dir.path().join("disk.img")).unwrap(),
            files.get("disk.img").unwrap().to_vec()
        );
    }
}

#[test]
fn we_read_what_qemu_io_wrote_and_zeroed() {
    for options in
        ["extended_l2=on", "extended_l2=off", "data_file=disk.data", "data_file=disk.data,data_file_raw=on"]
    {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        run(at, &format!("qemu-img create -f qcow2 -o {options} disk.img 4M"));
        let commands = [
            "write -P 7 0 1M",
            "write -z 128k 64k",
            "write -P 9 130k 2k",
            "write -z 4k 8k",
            "discard 512k 64k",
            "write -P 3 3999k 1k",
            "write -z 2M 1M",
        ];
        let mut io = Command::new("qemu-io");
        io.current_dir(at).args(["-f", "qcow2", "disk.img"]);
        commands.iter().for_each(|command| {
            io.args(["-c", command]);
        });
        assert!(io.output().expect("qemu-io (Debian: qemu-utils)").status.success());
        if !options.starts_with("data_file") {
            run(at, "qemu-img snapshot -c first disk.img");
            let write = Command::new("qemu-io")
                .current_dir(at)
                .args(["-f", "qcow2", "disk.img", "-c", "write -P 5 64k 70k"])
                .status();
            assert!(write.unwrap().success());
        }
        run(at, "qemu-img convert -f qcow2 -O raw disk.img plain.raw");
        let names: &[&str] =
            if options.starts_with("data_file") { &["disk.img", "disk.data"] } else { &["disk.img"] };
        let files = load(at, names);
        let disk = open_with(&[qcow2()], &files, "disk.img", &ChainOptions::default()).unwrap();
        assert!(read_all(&disk) == std::fs::read(at.join("plain.raw")).unwrap(), "{options}");
        let info = disk.layers()[0].image.info();
        let snapshots = info.properties.iter().filter(|p| p.name == "snapshots").count();
        assert_eq!(snapshots, usize::from(!options.starts_with("data_file")));
    }
}

#[test]
fn libqcow_knows_our_images() {
    let dir = tempfile::tempdir().unwrap();
    for (name, recipe) in [("v2.img", Recipe::options(&[("compat", "v2")])), ("v3.img", Recipe::default())] {
        let files = MemoryFiles::new();
        write_image(&qcow2(), &files, name, &recipe, &disk()).unwrap();
        save(&files, dir.path());
        let text = run(dir.path(), &format!("qcowinfo {name}"));
        assert!(text.contains("8390144 bytes"), "{text}");
    }
}

#[test]
fn opening_reads_little() {
    let files = MemoryFiles::new();
    write_image(&qcow2(), &files, "disk.img", &Recipe::default(), &disk()).unwrap();
    let before = files.get("disk.img").unwrap().allocated_bytes();
    let disk = open_with(&[qcow2()], &files, "disk.img", &ChainOptions::default()).unwrap();
    assert_eq!(files.calls().iter().filter(|call| call.starts_with("open")).count(), 1);
    assert_eq!(files.get("disk.img").unwrap().allocated_bytes(), before);
    assert_eq!(disk.size(), 8_390_144);
}
