//! `vellum digest`

mod common;
use common::Dir;
use std::process::Command;

#[test]
fn the_same_content_has_the_same_digest_in_every_format() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 9);
    let of_raw = dir.digest("a.img");
    for (format, options) in [
        ("qcow2", &[][..]),
        ("qcow2", &["-c"]),
        ("vmdk", &["-o", "subformat=streamOptimized"]),
        ("vdi", &[]),
        ("vpc", &["-o", "force_size=on"]),
    ] {
        dir.qemu_img(&[&["convert", "-f", "raw", "-O", format], options, &["a.img", "b"]].concat());
        assert_eq!(dir.digest("b"), of_raw, "{format} {options:?}");
    }
}

#[test]
fn flat_is_what_sha256sum_says() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 5);
    dir.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "a.img", "b.qcow2"]);
    let sum =
        Command::new("sha256sum").arg(dir.path("a.img")).output().expect("sha256sum (package coreutils)");
    let sum = String::from_utf8(sum.stdout).unwrap();
    let (expected, _) = sum.split_once(' ').unwrap();
    let ran = dir.vellum(&["digest", "--flat", "b.qcow2"]).exits(0);
    assert_eq!(ran.out, format!("{expected}  b.qcow2\n"));
    assert_eq!(dir.vellum(&["digest", "--flat", "--json", "a.img"]).json()["algorithm"], "sha256");
}

#[test]
fn the_tree_digest_names_its_algorithm() {
    let dir = Dir::new();
    dir.write("a.img", &[0; 1 << 16]);
    let digest = dir.digest("a.img");
    dir.vellum(&["digest", "-f", "raw", "a.img"])
        .exits(0)
        .shows(&format!("vellum-tree-sha256:{digest}  a.img\n"));
}

#[test]
fn an_empty_disk_of_64_tib_takes_no_time() {
    let dir = Dir::new();
    dir.vellum(&["create", "a.qcow2", "64T"]).exits(0);
    let started = std::time::Instant::now();
    let report = dir.vellum(&["digest", "--json", "a.qcow2"]).json();
    assert_eq!((&report["virtual_size"], &report["data_bytes"]), (&(64u64 << 40).into(), &0.into()));
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}
