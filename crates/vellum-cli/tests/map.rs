//! `vellum map`

mod common;
use common::Dir;
use std::io::Read;

#[test]
fn extents_cover_the_disk_without_gaps_and_lead_to_the_bytes() {
    let dir = Dir::new();
    let content = dir.raw_disk("a.img", 9);
    for format in ["qcow2", "vmdk", "vdi", "vpc"] {
        dir.qemu_img(&["convert", "-f", "raw", "-O", format, "a.img", "b"]);
        let map = dir.vellum(&["map", "--json", "b"]).json();
        let size = map["virtual_size"].as_u64().unwrap();
        let mut at = 0;
        for extent in map["extents"].as_array().unwrap() {
            assert_eq!(extent["start"], at, "{format}");
            let length = extent["length"].as_u64().unwrap();
            let start = usize::try_from(at).unwrap();
            let guest = content.get(start..content.len().min(start + length as usize)).unwrap_or(&[]);
            if extent["kind"] == "data" {
                let offset = extent["offset"].as_u64().unwrap() as usize;
                let file = std::fs::read(dir.path("b")).unwrap();
                assert!(file[offset..offset + guest.len()] == *guest, "{format} at {at:#x}");
            } else {
                assert!(guest.iter().all(|byte| *byte == 0), "{format} at {at:#x}: {extent}");
            }
            at += length;
        }
        assert_eq!(at, size, "{format}");
    }
}

#[test]
fn layers_are_named() {
    let dir = Dir::new();
    dir.raw_disk("base.img", 2);
    dir.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "a.qcow2"]);
    let map = dir.vellum(&["map", "--json", "a.qcow2"]).json();
    assert_eq!(map["layers"][1]["format"], "raw");
    let data: Vec<_> =
        map["extents"].as_array().unwrap().iter().filter(|extent| extent["kind"] == "data").collect();
    assert!(!data.is_empty() && data.iter().all(|extent| extent["layer"] == 1), "{map}");
    dir.vellum(&["map", "a.qcow2"]).exits(0).shows("layer 1").shows("base.img").shows("data");
}

#[test]
fn an_error_on_the_way_leaves_valid_json() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 2);
    dir.qemu_img(&["convert", "-f", "raw", "-O", "vdi", "a.img", "b.vdi"]);
    // The block map entry of the second block points far behind the end of the file.
    let mut bytes = dir.read("b.vdi");
    let blocks = u32::from_le_bytes(bytes[0x154..0x158].try_into().unwrap()) as usize;
    bytes[blocks + 4..blocks + 8].copy_from_slice(&0x00ff_ffffu32.to_le_bytes());
    dir.write("b.vdi", &bytes);
    let ran = dir.vellum(&["map", "--json", "b.vdi"]).exits(5);
    assert_eq!(ran.any_json()["error"]["image"].as_str().map(|name| name.ends_with("b.vdi")), Some(true));
    let ran = dir.vellum(&["map", "b.vdi"]).exits(5).says("b.vdi");
    assert!(ran.err.contains("error: "), "{ran:?}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let dir = Dir::new();
    // Many extents: every other cluster of 64 KiB.
    let mut content = vec![0; 64 << 20];
    for cluster in content.chunks_mut(128 << 10) {
        cluster[0] = 1;
    }
    dir.write("a.img", &content);
    dir.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "a.img", "b.qcow2"]);
    for arguments in [&["map", "b.qcow2"][..], &["map", "--json", "b.qcow2"]] {
        let mut child = dir.start(arguments);
        let mut first = [0; 10];
        let mut out = child.stdout.take().unwrap();
        out.read_exact(&mut first).unwrap();
        drop(out);
        let ran = common::Ran::new(child.wait_with_output().unwrap()).exits(0);
        assert_eq!(ran.err, "");
    }
}
