//! `vellum create`

mod common;
use common::Dir;

#[test]
fn every_format_is_made_and_qemu_agrees() {
    let dir = Dir::new();
    for (format, qemu) in
        [("qcow2", "qcow2"), ("vmdk", "vmdk"), ("vdi", "vdi"), ("vhd", "vpc"), ("raw", "raw")]
    {
        dir.vellum(&["create", "-O", format, "--force", "a", "20M"]).exits(0).shows("20 MiB");
        let report: serde_json::Value =
            serde_json::from_str(&dir.qemu_img(&["info", "--output=json", "a"])).unwrap();
        assert_eq!((&report["format"], &report["virtual-size"]), (&qemu.into(), &(20 << 20).into()));
        let own = dir.vellum(&["info", "--json", "a"]).json();
        assert_eq!((&own["format"], &own["virtual_size"]), (&format.into(), &(20 << 20).into()));
    }
    assert_eq!(dir.names(), ["a"]);
}

#[test]
fn the_format_comes_from_an_unambiguous_extension_and_is_said() {
    let dir = Dir::new();
    dir.vellum(&["create", "a.vdi", "1M"]).exits(0).says("note: writing vdi");
    let quiet = dir.vellum(&["create", "-q", "b.vdi", "1M"]).exits(0);
    assert_eq!((quiet.out.as_str(), quiet.err.as_str()), ("", ""));
    // -O, also as -f, wins over the name and needs no note.
    for flag in ["-O", "-f"] {
        let ran = dir.vellum(&["create", "--force", flag, "qcow2", "a.vdi", "1M"]).exits(0);
        assert_eq!(ran.err, "");
        assert_eq!(dir.vellum(&["info", "--json", "a.vdi"]).json()["format"], "qcow2");
    }
    dir.vellum(&["create", "disk", "1M"]).exits(2).says("-O FORMAT");
    assert!(!dir.exists("disk"));
}

#[test]
fn nothing_is_overwritten_without_force() {
    let dir = Dir::new();
    dir.write("a.qcow2", b"precious");
    dir.vellum(&["create", "a.qcow2", "1M"]).exits(2).says("a.qcow2").says("--force");
    assert_eq!(dir.read("a.qcow2"), b"precious");
    assert_eq!(dir.names(), ["a.qcow2"]);
    dir.vellum(&["create", "--force", "a.qcow2", "1M"]).exits(0);
    assert_eq!(dir.vellum(&["info", "--json", "a.qcow2"]).json()["virtual_size"], 1 << 20);
}

#[test]
fn wrong_options_are_refused_by_name_and_leave_nothing() {
    let dir = Dir::new();
    let create = |options: &[&str]| dir.vellum(&[&["create", "a.vmdk", "1M"], options].concat()).exits(2);
    create(&["-o", "subformat=monolithicSparse,subfromat=x"]).says("subfromat").says("vellum formats vmdk");
    create(&["-o", "subformat=thin"]).says("thin").says("streamOptimized");
    create(&["-o", "subformat"]).says("\"subformat\"");
    create(&["--preallocation", "full", "-o", "preallocation=off"]).says("contradicts");
    create(&["-O", "vdmk"]).says("vdmk").says("vmdk");
    assert_eq!(dir.names(), Vec::<String>::new());
}

#[test]
fn options_repeat_and_split() {
    let dir = Dir::new();
    dir.vellum(&[
        "create",
        "a.vmdk",
        "20M",
        "-o",
        "subformat=monolithicFlat,adapter_type=lsilogic",
        "-o",
        "hwversion=6",
    ])
    .exits(0);
    assert_eq!(dir.names(), ["a-flat.vmdk", "a.vmdk"]);
    let descriptor = String::from_utf8_lossy(&dir.read("a.vmdk")).into_owned();
    for text in ["monolithicFlat", "lsilogic", "\"6\""] {
        assert!(descriptor.contains(text), "{text} in {descriptor}");
    }
}

#[test]
fn sizes_that_are_none_are_explained() {
    let dir = Dir::new();
    for size in ["1.5T", "", "abc", "10X", "99999999999999999999", "16E"] {
        dir.vellum(&["create", "a.raw", size]).exits(2).says("such as 10G");
    }
    dir.vellum(&["create", "a.raw", "1.5T"]).exits(2).says("1536G");
    dir.vellum(&["create", "a.raw", "-1"]).exits(2);
    // A size that no format can have is an error too, and no panic.
    for format in ["qcow2", "vmdk", "vdi", "vhd", "raw"] {
        let ran = dir.vellum(&["create", "-O", format, "huge", "15E"]);
        assert!((2..=5).contains(&ran.code), "{format}: {ran:?}");
    }
    assert_eq!(dir.names(), Vec::<String>::new());
}

#[test]
fn reproducible_images_are_the_same_and_others_are_not() {
    let dir = Dir::new();
    for format in ["vdi", "vhd", "vmdk", "qcow2"] {
        for name in ["a", "b"] {
            std::fs::create_dir_all(dir.path(name)).unwrap();
            let target = format!("{name}/disk");
            dir.vellum(&["create", "--force", "--reproducible", "-O", format, &target, "20M"]).exits(0);
        }
        assert!(dir.read("a/disk") == dir.read("b/disk"), "{format}");
    }
    dir.vellum(&["create", "a.vdi", "20M"]).exits(0);
    dir.vellum(&["create", "b.vdi", "20M"]).exits(0);
    assert!(dir.read("a.vdi") != dir.read("b.vdi"));
}

#[test]
fn preallocated_images_have_their_space_from_the_beginning() {
    use std::os::unix::fs::MetadataExt;
    let dir = Dir::new();
    dir.raw_disk("source.img", 8);
    let allocated = |name: &str| dir.path(name).metadata().unwrap().blocks() * 512;
    for (format, more, holder) in [
        ("raw", "", ""),
        ("vdi", "variant=fixed", ""),
        ("vhd", "subformat=fixed", ""),
        ("qcow2", "", ""),
        ("qcow2", "extended_l2=on,cluster_size=16k", ""),
        ("qcow2", "data_file=data", "data"),
    ] {
        for mode in ["falloc", "full"] {
            let mut options = vec!["--force", "-O", format, "--preallocation", mode];
            if !more.is_empty() {
                options.extend(["-o", more]);
            }
            let holder = if holder.is_empty() { "disk" } else { holder };
            dir.vellum(&[&["create", "disk", "8M"], &options[..]].concat()).exits(0);
            assert!(allocated(holder) >= 8 << 20, "created {format} {more} {mode}: {}", allocated(holder));
            let source = ["convert", "-f", "raw", "source.img", "disk"];
            dir.vellum(&[&source, &options[..]].concat()).exits(0);
            assert!(allocated(holder) >= 8 << 20, "converted {format} {more} {mode}: {}", allocated(holder));
            assert_eq!(dir.digest("disk"), dir.digest("source.img"), "{format} {more} {mode}");
            if format == "qcow2" {
                dir.qemu_img(&["check", "-q", "disk"]);
            }
        }
    }
}

#[test]
fn a_comment_is_kept() {
    let dir = Dir::new();
    dir.vellum(&["create", "--comment", "für Ärzte", "a.vdi", "1M"]).exits(0);
    assert_eq!(dir.vellum(&["info", "--json", "a.vdi"]).json()["comment"], "für Ärzte");
    for format in ["vdi", "vmdk"] {
        let ran = dir.vellum(&["create", "--comment", "kept", "-O", format, "b", "1M", "--force"]).exits(0);
        assert_eq!(ran.err, "", "{format}");
    }
    // Or it is said that it is not.
    for format in ["raw", "vhd", "qcow2"] {
        dir.vellum(&["create", "--comment", "lost", "-O", format, "b", "1M", "--force"])
            .exits(0)
            .says("keep no comment");
    }
    dir.vellum(&["create", "--comment", &"long".repeat(100), "-O", "vdi", "b", "1M", "--force"])
        .exits(0)
        .says("cut");
}

#[test]
fn json_names_what_was_made() {
    let dir = Dir::new();
    let report = dir.vellum(&["create", "--json", "a.vpc", "8M"]).json();
    assert_eq!((&report["image"], &report["format"]), (&"a.vpc".into(), &"vhd".into()));
    assert_eq!(report["virtual_size"], 8 << 20);
    let error = dir.vellum(&["create", "--json", "a.vpc", "8M"]).exits(2).any_json();
    assert_eq!(error["error"]["code"], "EXISTS");
}
