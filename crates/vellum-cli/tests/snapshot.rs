//! `vellum snapshot`, and `--snapshot` of other verbs

mod common;
use common::Dir;

#[test]
fn snapshots_are_made_listed_applied_and_deleted_as_qemu_sees_them() {
    let dir = Dir::new();
    dir.vellum(&["create", "-q", "a.qcow2", "16M"]).exits(0);
    dir.io("a.qcow2", &[], &["write -S 1 0 2M"]).exits(0);
    dir.vellum(&["snapshot", "list", "a.qcow2"]).exits(0).shows("no snapshots");
    let made = dir.vellum(&["snapshot", "create", "--json", "a.qcow2", "first"]).json();
    assert_eq!(made["id"], "1");
    dir.io("a.qcow2", &[], &["write -S 2 1M 2M"]).exits(0);
    dir.vellum(&["snapshot", "create", "a.qcow2", "second"]).exits(0).shows("second");
    dir.io("a.qcow2", &[], &["write -z 0 1M", "read -S 2 1M 2M"]).exits(0);
    let list = dir.qemu_img(&["snapshot", "-l", "a.qcow2"]);
    assert!(list.contains("first") && list.contains("second"), "{list}");
    dir.qemu_img(&["check", "a.qcow2"]);
    let listed = dir.vellum(&["snapshot", "list", "--json", "a.qcow2"]).json();
    let names: Vec<&str> =
        listed["snapshots"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["first", "second"]);
    assert_eq!(listed["snapshots"][0]["virtual_size"], 16 << 20);
    dir.vellum(&["snapshot", "list", "a.qcow2"]).exits(0).shows("first").shows("20");

    // Each state is there, for us and for QEMU.
    let one = dir.vellum(&["convert", "--snapshot", "first", "a.qcow2", "first.raw", "-O", "raw"]).exits(0);
    assert!(!one.err.contains("left behind"), "who asks for a snapshot wants no other one");
    dir.io("first.raw", &["-r", "-f", "raw"], &["read -S 1 0 2M", "read -P 0 2M 14M"]).exits(0);
    dir.qemu_img(&["convert", "-l", "snapshot.name=second", "-O", "raw", "a.qcow2", "second.raw"]);
    dir.vellum(&["compare", "--snapshot", "2", "-F", "raw", "a.qcow2", "second.raw"]).exits(0);
    dir.vellum(&["compare", "a.qcow2", "--second-snapshot", "second", "a.qcow2"]).exits(1);
    let digest = |more: &[&str], name: &str| {
        dir.vellum(&[&["digest", "--json", name], more].concat()).json()["digest"].clone()
    };
    assert_eq!(digest(&["--snapshot", "second"], "a.qcow2"), digest(&["-f", "raw"], "second.raw"));
    dir.vellum(&["map", "--snapshot", "first", "a.qcow2"]).exits(0);
    dir.io("a.qcow2", &["--snapshot", "first"], &["length"]).exits(2).says("snapshot");
    dir.io("a.qcow2", &["--snapshot", "first", "-r"], &["read -S 1 0 2M"]).exits(0);
    dir.io("a.qcow2", &["--snapshot", "third", "-r"], &["length"]).says("third");

    dir.vellum(&["snapshot", "apply", "a.qcow2", "first"]).exits(2).says("--yes");
    dir.vellum(&["snapshot", "apply", "--yes", "a.qcow2", "first"]).exits(0);
    dir.io("a.qcow2", &[], &["read -S 1 0 2M", "write -S 3 0 1M"]).exits(0);
    dir.vellum(&["snapshot", "delete", "--yes", "a.qcow2", "1"]).exits(0);
    dir.vellum(&["snapshot", "delete", "--yes", "a.qcow2", "first"]).says("first");
    dir.io("a.qcow2", &[], &["read -S 3 0 1M"]).exits(0);
    dir.vellum(&["compare", "--snapshot", "second", "-F", "raw", "a.qcow2", "second.raw"]).exits(0);
    dir.qemu_img(&["snapshot", "-d", "second", "a.qcow2"]);
    dir.vellum(&["snapshot", "list", "a.qcow2"]).exits(0).shows("no snapshots");
    dir.vellum(&["check", "a.qcow2"]).exits(0);
    dir.qemu_img(&["check", "a.qcow2"]);
}

#[test]
fn a_conversion_says_what_it_leaves_behind() {
    let dir = Dir::new();
    dir.vellum(&["create", "-q", "a.qcow2", "8M"]).exits(0);
    dir.vellum(&["convert", "a.qcow2", "plain.vdi"]).exits(0);
    dir.vellum(&["snapshot", "create", "-q", "a.qcow2", "first"]).exits(0);
    dir.qemu_img(&["bitmap", "--add", "a.qcow2", "changes"]);
    let said = "a.qcow2: only the disk is copied; left behind: 1 internal snapshot, 1 persistent bitmap";
    dir.vellum(&["convert", "a.qcow2", "a.vdi"]).exits(0).says(said);
    // Also what a parent has.
    dir.vellum(&["snapshot", "create", "-q", "a.qcow2", "second"]).exits(0);
    dir.vellum(&["create", "-q", "--parent", "a.qcow2", "child.qcow2"]).exits(0);
    let done = dir.vellum(&["convert", "--json", "child.qcow2", "child.vdi"]).json();
    let left = done["left_behind"].as_array().expect("a list");
    assert_eq!(left.len(), 1);
    assert!(left[0]["image"].as_str().is_some_and(|image| image.ends_with("a.qcow2")), "{left:?}");
    assert_eq!(left[0]["what"], "2 internal snapshots, 1 persistent bitmap");
}

#[test]
fn qemus_snapshots_are_ours_too() {
    let dir = Dir::new();
    dir.vellum(&["create", "-q", "a.qcow2", "8M"]).exits(0);
    dir.qemu_io("qcow2", "a.qcow2", &["write -P 1 0 1M"]);
    dir.qemu_img(&["snapshot", "-c", "theirs", "a.qcow2"]);
    dir.qemu_io("qcow2", "a.qcow2", &["write -P 2 512k 1M"]);
    dir.io("a.qcow2", &[], &["read -P 2 512K 1M", "write -P 3 0 64K"]).exits(0);
    dir.vellum(&["snapshot", "apply", "-y", "a.qcow2", "theirs"]).exits(0);
    dir.qemu_io("qcow2", "a.qcow2", &["read -P 1 0 1M", "read -P 0 1M 7M"]);
    dir.qemu_img(&["check", "a.qcow2"]);
}

#[test]
fn formats_without_snapshots_say_so() {
    let dir = Dir::new();
    for format in ["raw", "vdi", "vhd", "vmdk"] {
        dir.vellum(&["create", "-q", "--force", "-O", format, "a", "1M"]).exits(0);
        let before = dir.read("a");
        let list = dir.vellum(&["snapshot", "list", "--json", "-f", format, "a"]).exits(5).any_json();
        assert_eq!(list["error"]["code"], "FEATURE");
        dir.vellum(&["snapshot", "create", "-f", format, "a", "x"]).exits(5).says(format).says("--parent");
        dir.vellum(&["snapshot", "delete", "--yes", "-f", format, "a", "x"]).exits(5);
        assert!(dir.read("a") == before, "{format}");
    }
    dir.vellum(&["snapshot"]).exits(2);
}
