//! Writing in place beside QEMU: it reads and checks what we wrote, and goes on with it; we go on with what it wrote.

mod common;

use common::model::*;
use common::*;
use std::path::Path;
use std::sync::Arc;
use vellum_conformance::mending::carry_out;
use vellum_core::Severity;
use vellum_sim::MemoryFiles;

const SIZE: u64 = (34 << 20) + 3 * 512;

/// Our option, QEMU's option.
const KINDS: [(&[(&str, &str)], &str); 6] = [
    (&[], "subformat=monolithicSparse"),
    (&[("zeroed_grain", "on")], "subformat=monolithicSparse,zeroed_grain=on"),
    (&[("subformat", "monolithicFlat")], "subformat=monolithicFlat"),
    (&[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "10M")], "subformat=twoGbMaxExtentSparse"),
    (&[("subformat", "twoGbMaxExtentFlat"), ("extent_size", "10M")], "subformat=twoGbMaxExtentFlat"),
    (&[("subformat", "vmfs")], ""),
];

fn work(files: &Arc<MemoryFiles>, path: &str, worker: &mut Worker, steps: u64) {
    let disk = open_rw(files, path, 5).unwrap();
    for _ in 0..steps {
        worker.step(&disk);
    }
    disk.close().wait().unwrap();
    let report = check(files, path, false);
    assert_eq!(report.errors, 0, "{:?}", findings(&report));
}

/// QEMU agrees about the content of the disk and finds nothing wrong.
fn agrees(directory: &Path, files: &MemoryFiles, path: &str, worker: &Worker) {
    store(files, directory);
    std::fs::write(directory.join("model.raw"), &worker.model).unwrap();
    run(directory, "qemu-img", &["compare", "-f", "raw", "-F", "vmdk", "model.raw", path]);
    let text = files.get(path).unwrap().to_vec();
    if !String::from_utf8_lossy(&text[..600.min(text.len())]).contains("FLAT")
        && !String::from_utf8_lossy(&text[..600.min(text.len())]).contains("VMFS")
    {
        run(directory, "qemu-img", &["check", "-f", "vmdk", path]);
    }
}

/// QEMU writes some more.
fn goes_on(directory: &Path, path: &str, worker: &mut Worker) {
    let commands =
        ["write -P 0x5a 7M 200k", "write -P 0x33 33500k 1k", "write -z 12M 300k", "write -P 0x44 12400k 3k"];
    let mut arguments = vec!["-f", "vmdk"];
    for command in &commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(path);
    run(directory, "qemu-io", &arguments);
    let mut fill = |start: usize, len: usize, byte| worker.model[start..start + len].fill(byte);
    fill(7 << 20, 200 << 10, 0x5a);
    fill(33_500 << 10, 1 << 10, 0x33);
    fill(12 << 20, 300 << 10, 0);
    fill(12_400 << 10, 3 << 10, 0x44);
}

#[test]
fn qemu_and_we_write_in_turns() {
    for (number, (options, qemu)) in KINDS.into_iter().enumerate() {
        for ours in [true, false] {
            if qemu.is_empty() && !ours {
                continue;
            }
            let directory = tempfile::tempdir().unwrap();
            let mut files = MemoryFiles::new();
            if ours {
                create(&files, "disk.vmdk", SIZE, options);
            } else {
                let size = SIZE.to_string();
                let arguments = ["create", "-q", "-f", "vmdk", "-o", qemu, "disk.vmdk", &size];
                run(directory.path(), "qemu-img", &arguments);
                files = load(directory.path());
            }
            let mut worker = Worker::new(number as u64, vec![0; SIZE as usize]);
            for _ in 0..2 {
                work(&files, "disk.vmdk", &mut worker, 80);
                agrees(directory.path(), &files, "disk.vmdk", &worker);
                goes_on(directory.path(), "disk.vmdk", &mut worker);
                std::fs::remove_file(directory.path().join("model.raw")).unwrap();
                files = load(directory.path());
                worker.verify(&open(&files, "disk.vmdk").unwrap());
                let report = check(&files, "disk.vmdk", true);
                assert_eq!(report.errors, 0, "{options:?}: {:?}", findings(&report));
            }
            let json = run(directory.path(), "qemu-img", &["info", "--output=json", "disk.vmdk"]);
            assert!(json.contains(&format!("\"virtual-size\": {SIZE}")), "{json}");
            let info = run(directory.path(), "vmdkinfo", &["disk.vmdk"]);
            assert!(info.contains(&format!("({SIZE} bytes)")), "{info}");
        }
    }
}

#[test]
fn children_of_either_are_written_by_either() {
    for ours in [true, false] {
        for options in [&[][..], &[("zeroed_grain", "on")]] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path();
            let mut files = MemoryFiles::new();
            create(&files, "base.vmdk", SIZE, &[]);
            let mut worker = Worker::new(9, vec![0; SIZE as usize]);
            work(&files, "base.vmdk", &mut worker, 60);
            store(&files, path);
            if ours {
                create_child(&files, "disk.vmdk", SIZE, options, Some("base.vmdk")).unwrap();
            } else {
                let mut arguments = vec!["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", "base.vmdk"];
                if !options.is_empty() {
                    arguments.extend(["-o", "zeroed_grain=on"]);
                }
                arguments.push("disk.vmdk");
                run(path, "qemu-img", &arguments);
                files = load(path);
            }
            for _ in 0..2 {
                work(&files, "disk.vmdk", &mut worker, 60);
                agrees(path, &files, "disk.vmdk", &worker);
                goes_on(path, "disk.vmdk", &mut worker);
                std::fs::remove_file(path.join("model.raw")).unwrap();
                files = load(path);
                worker.verify(&open(&files, "disk.vmdk").unwrap());
            }
            let info = run(path, "vmdkinfo", &["disk.vmdk"]);
            assert!(info.contains("base.vmdk"), "{info}");
            let json = run(path, "qemu-img", &["info", "--output=json", "--backing-chain", "disk.vmdk"]);
            assert!(json.contains("\"backing-filename\": \"base.vmdk\""), "{json}");
        }
    }
}

#[test]
fn qemu_sees_a_parent_that_we_changed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let files = MemoryFiles::new();
    create(&files, "base.vmdk", SIZE, &[]);
    create_child(&files, "top.vmdk", SIZE, &[], Some("base.vmdk")).unwrap();
    store(&files, path);
    run(path, "qemu-io", &["-f", "vmdk", "-c", "read 0 1k", "top.vmdk"]);
    let disk = open_rw(&files, "base.vmdk", 1).unwrap();
    write(&disk, 0, &[1]).unwrap();
    disk.close().wait().unwrap();
    store(&files, path);
    let output = std::process::Command::new("qemu-io")
        .args(["-f", "vmdk", "-c", "read 0 1k", "top.vmdk"])
        .current_dir(path)
        .output()
        .unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("parent") || !output.status.success(), "QEMU did not notice: {text}");
}

/// QEMU reads the primary tables only, we mend them: what was damaged for it is whole again afterwards.
#[test]
fn what_repair_mends_qemu_reads() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let model = sample(SIZE);
    let files = MemoryFiles::new();
    let mut bytes = our_file(&[], &model);
    let gd = u64::from_le_bytes(bytes[56..64].try_into().unwrap()) as usize * 512;
    let gt = u32::from_le_bytes(bytes[gd..gd + 4].try_into().unwrap()) as usize * 512;
    bytes[gt..gt + 4].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    bytes[gt + 64..gt + 68].fill(0);
    files.put("disk.vmdk", &bytes);
    let report = check(&files, "disk.vmdk", true);
    assert_eq!(report.findings.iter().filter(|f| f.severity == Severity::Error).count(), 2);
    carry_out(&report, false);
    store(&files, path);
    std::fs::write(path.join("model.raw"), model.read(0, SIZE as usize)).unwrap();
    run(path, "qemu-img", &["compare", "-f", "raw", "-F", "vmdk", "model.raw", "disk.vmdk"]);
    run(path, "qemu-img", &["check", "-f", "vmdk", "disk.vmdk"]);
}
