//! `vellum info`

mod common;
use common::Dir;

const SIZE: u64 = 20 << 20;

#[test]
fn every_format_that_qemu_makes_is_described() {
    let dir = Dir::new();
    for (format, name) in
        [("qcow2", "qcow2"), ("vmdk", "vmdk"), ("vdi", "vdi"), ("vpc", "vhd"), ("raw", "raw")]
    {
        // qemu-img rounds a vpc disk to its geometry, unless told not to.
        let options: &[&str] = if format == "vpc" { &["-o", "force_size=on"] } else { &[] };
        dir.qemu_img(&[&["create", "-q", "-f", format], options, &["a", "20M"]].concat());
        let report = dir.vellum(&["info", "--json", "a"]).json();
        assert_eq!((report["format"].as_str(), report["virtual_size"].as_u64()), (Some(name), Some(SIZE)));
        assert_eq!(report["raw_by_default"], format == "raw");
        let length = std::fs::metadata(dir.path("a")).unwrap().len();
        assert_eq!(report["files"][0]["length"], length, "{format}");
        assert!(report["files"][0]["allocated"].is_u64(), "{format}");
        let shown = dir.vellum(&["info", "a"]).exits(0).shows(name).shows("20 MiB (20971520 bytes)");
        assert_eq!(shown.err, "");
    }
}

#[test]
fn no_other_file_is_needed_extents_of_a_vmdk() {
    let dir = Dir::new();
    dir.qemu_img(&["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "a.vmdk", "20M"]);
    std::fs::remove_file(dir.path("a-flat.vmdk")).unwrap();
    dir.vellum(&["info", "a.vmdk"]).exits(0).shows("monolithicFlat").shows("a-flat.vmdk").shows("20 MiB");
    let report = dir.vellum(&["info", "--json", "a.vmdk"]).json();
    assert_eq!(report["named_files"][0], "a-flat.vmdk");
    assert_eq!(report["files"].as_array().unwrap().len(), 1);
    // The other verbs do need it.
    dir.vellum(&["info", "--chain", "a.vmdk"]).exits(3).says("a-flat.vmdk");
    dir.vellum(&["digest", "a.vmdk"]).exits(3).says("a-flat.vmdk");
}

#[test]
fn no_other_file_is_needed_parent_of_a_qcow2() {
    let dir = Dir::new();
    dir.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "gone.qcow2", "-F", "qcow2", "-u", "a.qcow2", "20M"]);
    dir.vellum(&["info", "a.qcow2"]).exits(0).shows("gone.qcow2");
    let report = dir.vellum(&["info", "--json", "a.qcow2"]).json();
    assert_eq!(report["parent"]["places"][0]["place"], "gone.qcow2");
    assert_eq!(report["parent"]["format"], "qcow2");
    let error = dir.vellum(&["info", "--chain", "--json", "a.qcow2"]).exits(3).any_json();
    assert_eq!(error["error"]["code"], "PARENT_MISSING");
    dir.vellum(&["info", "--chain", "a.qcow2"]).exits(3).says("gone.qcow2").says("hint: ");
}

#[test]
fn a_chain_is_shown_layer_by_layer() {
    let dir = Dir::new();
    dir.qemu_img(&["create", "-q", "-f", "raw", "base.img", "20M"]);
    dir.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "a.qcow2"]);
    dir.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "b.qcow2", "30M"]);
    let report = dir.vellum(&["info", "--chain", "--json", "b.qcow2"]).json();
    let chain = report["chain"].as_array().unwrap();
    let formats: Vec<_> = chain.iter().map(|image| image["format"].as_str().unwrap()).collect();
    assert_eq!(formats, ["qcow2", "qcow2", "raw"]);
    assert_eq!(report["virtual_size"], 30 << 20);
    assert_eq!(chain[2]["raw_by_default"], false);
    let shown = dir.vellum(&["info", "--chain", "b.qcow2"]).exits(0);
    assert!(shown.out.contains("layer 2:") && shown.out.contains("base.img"), "{}", shown.out);
}

#[test]
fn text_from_an_image_cannot_act_on_the_terminal() {
    let dir = Dir::new();
    dir.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "x\x1b[2J\u{9b}31m",
        "-F",
        "raw",
        "-u",
        "a.qcow2",
        "1M",
    ]);
    for arguments in [&["info", "a.qcow2"][..], &["info", "--json", "a.qcow2"], &["digest", "a.qcow2"]] {
        let ran = dir.vellum(arguments);
        let all = format!("{}{}", ran.out, ran.err);
        assert!(!all.contains('\x1b') && !all.contains('\u{9b}'), "{all:?}");
        assert!(all.contains("[2J"), "{all:?}");
    }
    let report = dir.vellum(&["info", "--json", "a.qcow2"]).json();
    assert_eq!(report["parent"]["places"][0]["place"], "x\x1b[2J\u{9b}31m");
}

#[test]
fn damage_and_unknown_versions_are_refused_with_field_and_offset() {
    let dir = Dir::new();
    dir.qemu_img(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    let mut bytes = dir.read("a.qcow2");
    bytes[4..8].copy_from_slice(&9u32.to_be_bytes());
    dir.write("a.qcow2", &bytes);
    let ran = dir
        .vellum(&["info", "a.qcow2"])
        .exits(5)
        .says("error: ")
        .says("a.qcow2")
        .says("0x4")
        .says("  while ");
    assert_eq!(ran.out, "");
    let ran = dir.vellum(&["info", "--json", "a.qcow2"]).exits(5);
    assert_eq!(ran.err, "");
    let error = ran.any_json();
    assert_eq!(error["error"]["code"], "VERSION");
    assert_eq!(error["error"]["kind"], "not_implemented");
    assert_eq!(error["error"]["offset"], 4);
    assert!(error["error"]["context"].as_array().is_some_and(|list| !list.is_empty()));
}

#[test]
fn colours_only_when_wanted() {
    let dir = Dir::new();
    dir.write("a.img", &[0; 4096]);
    assert!(!dir.vellum(&["info", "a.img"]).exits(0).out.contains('\x1b'));
    assert!(dir.vellum(&["info", "--color=always", "a.img"]).exits(0).out.contains("\x1b["));
    assert!(dir.vellum(&["--color", "always", "info", "gone"]).exits(3).err.contains("\x1b["));
}
