//! `vellum compare`

mod common;
use common::Dir;

#[test]
fn the_same_content_in_two_formats_exits_with_0() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 9);
    dir.qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "a.img", "b.vmdk"]);
    dir.vellum(&["compare", "-f", "raw", "a.img", "b.vmdk"]).exits(0).shows("the same");
    let report = dir.vellum(&["compare", "--json", "b.vmdk", "a.img"]).json();
    assert_eq!((&report["same"], &report["first_difference"]), (&true.into(), &serde_json::Value::Null));
    assert_eq!(report["formats"], serde_json::json!(["vmdk", "raw"]));
}

#[test]
fn a_difference_exits_with_1_and_is_located() {
    let dir = Dir::new();
    let mut content = dir.raw_disk("a.img", 9);
    dir.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "a.img", "b.qcow2"]);
    for at in [5_000_123, 5_000_124, 7 << 20] {
        content[at] ^= 0x55;
    }
    dir.write("a.img", &content);
    dir.vellum(&["compare", "a.img", "b.qcow2"]).exits(1).shows("differ").shows("0x4c4bbb");
    let report = dir.vellum(&["compare", "--json", "a.img", "b.qcow2"]).exits(1).any_json();
    assert_eq!(report["same"], false);
    assert_eq!(report["first_difference"], 5_000_123);
    assert_eq!((&report["different_sectors"], &report["different_bytes"]), (&2.into(), &3.into()));
}

#[test]
fn different_sizes_count_only_if_strict_or_not_zero() {
    let dir = Dir::new();
    let mut content = dir.raw_disk("a.img", 2);
    content.resize(3 << 20, 0);
    dir.write("b.img", &content);
    dir.vellum(&["compare", "a.img", "b.img"]).exits(0).shows("sizes differ");
    dir.vellum(&["compare", "--strict", "a.img", "b.img"]).exits(1);
    *content.last_mut().unwrap() = 1;
    dir.write("b.img", &content);
    let report = dir.vellum(&["compare", "--json", "a.img", "b.img"]).exits(1).any_json();
    assert_eq!(report["first_difference"], (3 << 20) - 1);
    assert_eq!(report["virtual_sizes"], serde_json::json!([2 << 20, 3 << 20]));
}

#[test]
fn errors_are_never_1() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 1);
    dir.write("bad.qcow2", b"QFI\xfb\0\0\0\x03");
    dir.vellum(&["compare", "a.img"]).exits(2);
    dir.vellum(&["compare", "a.img", "gone.img"]).exits(3).says("gone.img");
    dir.vellum(&["compare", "a.img", "bad.qcow2"]).exits(5).says("bad.qcow2");
    dir.vellum(&["compare", "-F", "nonsense", "a.img", "a.img"]).exits(2).says("nonsense");
    dir.vellum(&["compare", "--threads", "0", "a.img", "a.img"]).exits(2);
}

#[test]
fn formats_are_given_to_their_own_disk() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 2);
    dir.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "a.img", "b.qcow2"]);
    dir.vellum(&["compare", "-f", "raw", "-F", "qcow2", "a.img", "b.qcow2"]).exits(0);
    dir.vellum(&["compare", "-f", "raw", "-F", "raw", "a.img", "b.qcow2"]).exits(1);
}

#[test]
fn parents_are_given_to_their_own_disk() {
    let dir = Dir::new();
    dir.raw_disk("base.img", 2);
    dir.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "gone.img", "-F", "raw", "-u", "a.qcow2", "2M"]);
    let second = ["compare", "--second-parent", "base.img", "base.img", "a.qcow2"];
    dir.vellum(&second).exits(0);
    dir.vellum(&["compare", "--parent", "base.img", "a.qcow2", "base.img"]).exits(0);
    dir.vellum(&["compare", "--parent", "base.img", "base.img", "a.qcow2"]).exits(3);
}
