//! `vellum create --parent`, and writing to children.

mod common;
use common::{Dir, script};

/// Which child can name which parent, without further options.
const PAIRS: [(&str, &str); 10] = [
    ("raw", "qcow2"),
    ("vdi", "qcow2"),
    ("vhd", "qcow2"),
    ("vmdk", "qcow2"),
    ("qcow2", "qcow2"),
    ("vdi", "vdi"),
    ("vhd", "vhd"),
    ("vdi", "vhd"),
    ("vhd", "vdi"),
    ("vmdk", "vmdk"),
];

fn qemu(format: &str) -> &str {
    if format == "vhd" { "vpc" } else { format }
}

/// A parent of 8 MiB with data at its beginning and at its end.
fn parent(dir: &Dir, format: &str) {
    dir.vellum(&["create", "-q", "--force", "-O", format, "base", "8M"]).exits(0);
    dir.io("base", &["-f", format], &["write -S 7 0 2M", "write -S 8 6M 2M"]).exits(0);
}

#[test]
fn a_child_shows_its_parent_and_hides_it_where_it_was_written() {
    let dir = Dir::new();
    for (above, below) in PAIRS {
        parent(&dir, above);
        let before = dir.read("base");
        let made = dir
            .vellum(&["create", "--json", "--force", "-O", below, "-b", "base", "-F", above, "child"])
            .json();
        assert_eq!(made["parent"]["place"], "base", "{above} {below}");
        assert_eq!(made["parent"]["format"], above);
        let size = made["virtual_size"].as_u64().unwrap();
        assert!((8 << 20..9 << 20).contains(&size), "{above} {below}: {size}");
        dir.io(
            "child",
            &[],
            &[
                "read -S 7 0 2M",
                "read -P 0 2M 4M",
                "write -P 1 1000000 5000",
                "write -P 2 3M 64K",
                "write -z 6M 100K",
                "write -z -u 7M 512K",
                "reopen",
                "verify",
                "read -S 7 0 1000000",
                "read -S 8 6396K 772K",
            ],
        )
        .exits(0);
        assert!(dir.read("base") == before, "{above} {below}");
        let chain = dir.vellum(&["info", "--json", "--chain", "child"]).json();
        assert_eq!(chain["chain"][1]["format"], above);
        if below == "qcow2" || (above, below) == ("vmdk", "vmdk") {
            // Of the others QEMU reads no children, or only those whose parents have their format.
            dir.qemu_io(
                qemu(below),
                "child",
                &["read -P 1 1000000 5000", "read -P 2 3M 64K", "read -P 0 7M 512K"],
            );
            dir.qemu_img(&["convert", "-f", qemu(below), "-O", "raw", "child", "flat"]);
            dir.vellum(&["compare", "-F", "raw", "child", "flat"]).exits(0);
        }
    }
}

#[test]
fn many_writes_at_a_time_complete_their_blocks_from_the_parent() {
    let dir = Dir::new();
    dir.write("script", script(11, 150).as_bytes());
    for (above, below) in [("raw", "qcow2"), ("vdi", "vdi"), ("vhd", "vhd"), ("vmdk", "vmdk"), ("vdi", "vhd")]
    {
        dir.vellum(&["create", "-q", "--force", "-O", above, "base", "32M"]).exits(0);
        dir.io("base", &["-f", above], &["write -S 900 3M 7M", "write -S 901 20M 9M"]).exits(0);
        dir.vellum(&["convert", "-q", "--force", "-f", above, "-O", "raw", "base", "model"]).exits(0);
        dir.io("model", &["-q", "-f", "raw", "--script", "script"], &[]).exits(0);
        dir.vellum(&["create", "-q", "--force", "-O", below, "-b", "base", "-F", above, "child"]).exits(0);
        let ran = dir.io("child", &["-q", "--depth", "32", "--script", "script"], &[]);
        assert!(ran.code == 0, "{above} {below}: {ran:#?}");
        dir.vellum(&["compare", "-F", "raw", "child", "model"]).exits(0);
        let check = dir.vellum(&["check", "child"]);
        assert!([0, 3].contains(&check.code), "{above} {below}: {check:#?}");
    }
}

#[test]
fn sizes_may_differ_from_the_parents() {
    let dir = Dir::new();
    parent(&dir, "qcow2");
    dir.vellum(&["create", "-q", "-b", "base", "larger.qcow2", "20M"]).exits(0);
    dir.io(
        "larger.qcow2",
        &[],
        &["read -S 8 6M 2M", "read -P 0 8M 12M", "write -P 3 8380K 100K", "verify", "read -P 0 9M 11M"],
    )
    .exits(0);
    dir.vellum(&["create", "-q", "-b", "base", "smaller.qcow2", "7M"]).exits(0);
    dir.io("smaller.qcow2", &[], &["read -S 8 6M 1M", "write -P 3 7160K 8K", "verify", "length"])
        .exits(0)
        .shows("7340032");
    dir.qemu_img(&["check", "larger.qcow2"]);
    dir.qemu_img(&["check", "smaller.qcow2"]);
}

#[test]
fn a_chain_of_three_formats() {
    let dir = Dir::new();
    parent(&dir, "vdi");
    dir.vellum(&["create", "-q", "-b", "base", "-O", "vhd", "middle"]).exits(0);
    dir.io("middle", &[], &["write -P 1 1M 64K", "write -z 6M 64K"]).exits(0);
    dir.vellum(&["create", "-q", "-b", "middle", "-O", "qcow2", "top"]).exits(0);
    dir.io(
        "top",
        &[],
        &["read -P 1 1M 64K", "read -P 0 6M 64K", "write -P 2 1M 4K", "reopen", "verify", "read -S 7 0 1M"],
    )
    .exits(0);
    dir.vellum(&["convert", "-q", "top", "flat.vmdk"]).exits(0);
    dir.vellum(&["compare", "top", "flat.vmdk"]).exits(0);
}

#[test]
fn a_parent_that_was_written_to_is_noticed() {
    let dir = Dir::new();
    for format in ["vdi", "vhd", "vmdk"] {
        parent(&dir, format);
        let base = std::fs::File::options().write(true).open(dir.path("base")).unwrap();
        base.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(100)).unwrap();
        drop(base);
        dir.vellum(&["create", "-q", "--force", "-O", format, "-b", "base", "child"]).exits(0);
        let before = dir.io("child", &[], &["read -S 7 0 1M"]).exits(0);
        assert!(!before.err.contains("modified"), "{before:?}");
        dir.io("base", &[], &["write -P 9 0 512"]).exits(0);
        if format == "vhd" {
            // Times are all that a VHD has, and they go wrong.
            dir.io("child", &["-r"], &["length"])
                .exits(0)
                .says("may have been modified after the child was made");
            let allowed = dir.io("child", &["-r", "--allow-modified-parent"], &["length"]).exits(0);
            assert_eq!(allowed.err, "");
            continue;
        }
        let ran = dir.io("child", &["--json", "-r"], &["length"]);
        assert_eq!(
            (ran.code, &ran.any_json()["error"]["code"]),
            (5, &"PARENT_MODIFIED".into()),
            "{format}: {ran:?}"
        );
        dir.io("child", &["--allow-modified-parent"], &["read -P 9 0 512"]).exits(0);
    }
}

#[test]
fn a_parent_elsewhere_is_named_by_its_absolute_place_and_that_is_said() {
    let dir = Dir::new();
    parent(&dir, "qcow2");
    std::fs::create_dir_all(dir.path("sub/below")).unwrap();
    std::fs::copy(dir.path("base"), dir.path("sub/below/near")).unwrap();
    let far = dir.vellum(&["create", "-b", "base", "sub/far.qcow2"]).exits(0);
    let far = far.says("--allow-dir");
    assert!(far.out.contains("child of /"), "{far:?}");
    dir.io("sub/far.qcow2", &[], &["length"]).exits(5).says("--allow-dir");
    dir.io("sub/far.qcow2", &["--allow-dir", "."], &["read -S 7 0 1M"]).exits(0);
    // Below the child it is named relative to the child, from wherever the command runs.
    let near = dir.vellum(&["create", "--json", "-b", "sub/below/near", "sub/near.qcow2"]).json();
    assert_eq!(near["parent"]["place"], "below/near");
    std::fs::rename(dir.path("sub"), dir.path("moved")).unwrap();
    dir.io("moved/near.qcow2", &[], &["read -S 7 0 1M"]).exits(0);
}

#[test]
fn what_cannot_be_a_child_or_a_parent_is_refused_and_leaves_nothing() {
    let dir = Dir::new();
    parent(&dir, "raw");
    let create = |arguments: &[&str]| dir.vellum(&[&["create", "-q"], arguments].concat());
    for format in ["raw", "vdi", "vhd", "vmdk"] {
        create(&["-O", format, "-b", "base", "-F", "raw", "child"]).exits(2).says("qcow2");
    }
    create(&["-O", "qcow2", "-b", "nosuch", "child"]).exits(3).says("nosuch");
    create(&["-O", "qcow2", "--force", "-b", "base", "-F", "raw", "base"])
        .exits(2)
        .says("part of the source");
    create(&["-O", "qcow2", "child"]).exits(2);
    create(&["-O", "qcow2", "child", "1M", "-F", "raw"]).exits(2);
    assert_eq!(dir.names(), ["base"]);
    dir.vellum(&["create", "-O", "qcow2", "-b", "base", "child"]).exits(0).says("read as raw");
}
