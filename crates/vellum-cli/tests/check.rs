//! `vellum check` and `vellum repair`

mod common;
use common::{Dir, FORMATS};

/// A qcow2 with data, and a cluster that is counted and not used.
fn leaking_qcow2(dir: &Dir, name: &str) {
    dir.vellum(&["create", "-q", "--force", "-O", "qcow2", name, "16M"]).exits(0);
    dir.io(name, &[], &["write -S 1 0 1M"]).exits(0);
    let mut file = dir.read(name);
    let refcount_table = be64(&file, 48) as usize;
    let block = be64(&file, refcount_table) as usize;
    let clusters = file.len() / 65536;
    file.resize((clusters + 2) * 65536, 0);
    for cluster in [clusters, clusters + 1] {
        file[block + 2 * cluster + 1] = 1;
    }
    dir.write(name, &file);
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A qcow2 in which a cluster with data is counted as free.
fn broken_qcow2(dir: &Dir, name: &str) {
    dir.vellum(&["create", "-q", "--force", "-O", "qcow2", name, "16M"]).exits(0);
    dir.io(name, &[], &["write -S 1 0 1M"]).exits(0);
    let mut file = dir.read(name);
    let block = be64(&file, be64(&file, 48) as usize) as usize;
    let last = file.len() / 65536 - 1;
    file[block + 2 * last + 1] = 0;
    dir.write(name, &file);
}

/// A VHD whose footer at the end was torn.
fn torn_vhd(dir: &Dir, name: &str) {
    dir.vellum(&["create", "-q", "--force", "-O", "vhd", name, "16M"]).exits(0);
    dir.io(name, &[], &["write -S 1 0 1M"]).exits(0);
    let mut file = dir.read(name);
    let at = file.len() - 512;
    file[at..at + 256].fill(0x5a);
    dir.write(name, &file);
}

fn qemu_check(dir: &Dir, format: &str, name: &str) -> i32 {
    let mut command = std::process::Command::new("qemu-img");
    let status = command.args(["check", "-q", "-f", format]).arg(dir.path(name)).output().unwrap().status;
    status.code().unwrap()
}

#[test]
fn new_and_used_images_are_clean() {
    let dir = Dir::new();
    for (format, _) in FORMATS.into_iter().filter(|(format, _)| *format != "raw") {
        dir.vellum(&["create", "-q", "--force", "-O", format, "a", "40M"]).exits(0);
        dir.vellum(&["check", "a"]).exits(0).shows("no errors were found");
        dir.io("a", &["--discard"], &["write -S 1 5M 10M", "write -z -u 7M 2M", "write -P 1 39M 1M"])
            .exits(0);
        let before = dir.read("a");
        let report = dir.vellum(&["check", "--json", "a"]).any_json();
        assert_eq!(report["errors"], 0, "{format}: {report}");
        assert_eq!(report["format"], format);
        assert!(report["allocated_bytes"].as_u64().unwrap() >= 9 << 20, "{format}: {report}");
        let repaired = dir.vellum(&["repair", "--json", "--yes", "a"]).json();
        assert_eq!(repaired["after"].as_object().map_or(0, |after| after["leaks"].as_u64().unwrap()), 0);
        if report["clean"] == true {
            assert!(dir.read("a") == before, "{format}");
            assert_eq!(dir.names(), ["a"]);
        }
        for name in dir.names() {
            std::fs::remove_file(dir.path(&name)).unwrap();
        }
    }
}

/// Discards leave holes in VMDK and VHD (a VDI fills them itself).
#[test]
fn holes_in_the_middle_are_given_back() {
    let dir = Dir::new();
    for (format, qemu) in [("vmdk", "vmdk"), ("vhd", "vpc"), ("vdi", "vdi")] {
        dir.vellum(&["create", "-q", "--force", "-O", format, "a", "16M"]).exits(0);
        dir.io("a", &["--discard"], &["write -S 1 0 10M", "discard 2M 2M"]).exits(0);
        let content = dir.digest("a");
        let before = dir.read("a");
        dir.vellum(&["check", "a"]).exits(if format == "vdi" { 0 } else { 3 });
        let report = dir.vellum(&["repair", "--json", "--yes", "--leaks-only", "a"]).json();
        let steps = report["steps"].as_array().unwrap();
        assert!(steps.iter().all(|step| step["leak"] == true && step["lossy"] == false), "{report:#}");
        let undo = report["backup"].as_str().map(str::to_owned);
        assert_eq!(undo.is_some(), format != "vdi", "{report:#}");
        dir.vellum(&["check", "a"]).exits(0);
        assert_eq!(dir.digest("a"), content, "{format}");
        dir.io("a", &["-r"], &["read -S 1 0 2M", "read -P 0 2M 2M", "read -S 1 4M 6M"]).exits(0);
        dir.qemu_img(&["convert", "-f", qemu, "-O", "raw", "a", "raw"]);
        assert_eq!(dir.read("raw").chunks(1 << 20).filter(|mib| mib.iter().any(|b| *b != 0)).count(), 8);
        if let Some(backup) = undo {
            assert!(dir.read("a").len() <= before.len() - (2 << 20), "{format}");
            assert!(steps[0]["what"].as_str().unwrap().contains("places that nobody uses"), "{report:#}");
            dir.vellum(&["repair", "--yes", "--undo", &backup, "a"]).exits(0);
            assert!(dir.read("a") == before, "{format}");
        }
        for name in dir.names() {
            std::fs::remove_file(dir.path(&name)).unwrap();
        }
    }
}

#[test]
fn exit_codes_are_those_of_qemu_img() {
    let dir = Dir::new();
    leaking_qcow2(&dir, "leak");
    broken_qcow2(&dir, "broken");
    dir.vellum(&["create", "-q", "-O", "raw", "raw", "1M"]).exits(0);
    dir.vellum(&["create", "-q", "-O", "qcow2", "good", "1M"]).exits(0);
    for (name, code) in [("good", 0), ("leak", 3), ("broken", 2)] {
        dir.vellum(&["check", name]).exits(code);
        assert_eq!(qemu_check(&dir, "qcow2", name), code, "{name}");
    }
    dir.vellum(&["check", "raw"]).exits(1).says("nothing to check");
    dir.vellum(&["check", "nosuch"]).exits(1).says("nosuch");
    dir.vellum(&["check", "--nonsense", "good"]).exits(1);
    let report = dir.vellum(&["check", "--json", "nosuch"]).exits(1).any_json();
    assert_eq!(report["error"]["code"], "NOT_FOUND");
    let report = dir.vellum(&["check", "--json", "leak"]).exits(3).any_json();
    assert_eq!((&report["leaks"], &report["leaked_bytes"]), (&2.into(), &131_072.into()));
    // A verb whose argument is called so keeps the usual codes.
    dir.vellum(&["info", "--nonsense", "check"]).exits(2);
}

#[test]
fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    let dir = Dir::new();
    leaking_qcow2(&dir, "a");
    let before = dir.read("a");
    dir.vellum(&["repair", "--dry-run", "a"]).exits(0).shows("A repair would:").shows("  1. ");
    let report = dir.vellum(&["repair", "--dry-run", "--json", "a"]).json();
    assert_eq!((&report["dry_run"], &report["carried_out"]), (&true.into(), &0.into()));
    assert!(!report["steps"].as_array().unwrap().is_empty() && report["after"].is_null());
    // Without a terminal nobody can be asked.
    dir.vellum(&["repair", "a"]).exits(2).says("--yes");
    assert!(dir.read("a") == before);
    assert_eq!(dir.names(), ["a"]);
}

#[test]
fn a_repair_mends_keeps_a_backup_and_can_be_undone() {
    let dir = Dir::new();
    type Make = fn(&Dir, &str);
    let cases: [(&str, &str, Make); 3] =
        [("leak", "qcow2", leaking_qcow2), ("broken", "qcow2", broken_qcow2), ("torn", "vpc", torn_vhd)];
    for (name, format, make) in cases {
        make(&dir, name);
        let before = dir.read(name);
        let report = dir.vellum(&["repair", "--yes", "--json", name]).json();
        assert_eq!(report["after"]["clean"], true, "{name}: {report:#}");
        let backup = report["backup"].as_str().unwrap().to_owned();
        assert!(backup.contains(&format!("{name}.vellum-backup-")), "{backup}");
        dir.vellum(&["check", name]).exits(0);
        dir.io(name, &["-r"], &["read -S 1 0 1M", "read -P 0 1M 15M"]).exits(0);
        if format == "qcow2" {
            assert_eq!(qemu_check(&dir, format, name), 0);
        } else {
            dir.qemu_io(format, name, &["read -P 0 1M 1M"]);
        }
        let mended = dir.read(name);
        dir.vellum(&["repair", "--undo", &backup, name]).exits(2).says("--yes");
        dir.vellum(&["repair", "--yes", "--undo", &backup, name]).exits(0);
        assert!(dir.read(name) == before, "{name}");
        // Once more does no harm.
        dir.vellum(&["repair", "--yes", "--json", "--undo", &backup, name]).json();
        assert!(dir.read(name) == before, "{name}");
        // A copy that was repaired is the image, too; one that was written to is not.
        dir.write("copy", &mended);
        dir.vellum(&["repair", "--yes", "--undo", &backup, "copy"]).exits(0);
        assert!(dir.read("copy") == before, "{name}");
        dir.write("copy", &mended);
        dir.io("copy", &[], &["write -S 9 8M 4M"]).exits(0);
        let written = dir.read("copy");
        let refused = dir.vellum(&["repair", "--yes", "--json", "--undo", &backup, "copy"]).exits(5);
        assert_eq!(refused.any_json()["error"]["code"], "MISMATCH", "{name}");
        assert!(dir.read("copy") == written, "{name}");
    }
    dir.write("nobackup", b"nonsense");
    dir.vellum(&["repair", "--yes", "--undo", "nobackup", "leak"]).exits(5).says("backup");
    dir.vellum(&["repair", "--yes", "--undo", "nosuch", "leak"]).exits(3);
}

#[test]
fn only_leaks_are_mended_if_asked_for() {
    let dir = Dir::new();
    leaking_qcow2(&dir, "a");
    // And an error: the first cluster of data is counted as free.
    let mut file = dir.read("a");
    let block = be64(&file, be64(&file, 48) as usize) as usize;
    let used = file.len() / 65536 - 3;
    file[block + 2 * used + 1] = 0;
    dir.write("a", &file);
    let report = dir.vellum(&["repair", "--leaks-only", "--yes", "--json", "a"]).exits(5).any_json();
    assert_eq!((&report["after"]["leaks"], &report["before"]["leaks"]), (&0.into(), &2.into()), "{report:#}");
    assert_eq!(report["after"]["errors"], report["before"]["errors"]);
    dir.vellum(&["repair", "--yes", "a"]).exits(0).shows("no errors were found");
    dir.io("a", &[], &["read -S 1 0 1M"]).exits(0);
}

#[test]
fn steps_that_lose_data_need_force() {
    let dir = Dir::new();
    dir.vellum(&["create", "-q", "-O", "vdi", "a", "16M"]).exits(0);
    dir.io("a", &[], &["write -S 1 0 2M"]).exits(0);
    let mut file = dir.read("a");
    // A block map entry that points far past the end of the file.
    let map = u32::from_le_bytes(file[0x154..0x158].try_into().unwrap()) as usize;
    file[map + 4..map + 8].copy_from_slice(&0x0012_3456u32.to_le_bytes());
    dir.write("a", &file);
    dir.vellum(&["check", "a"]).exits(2);
    let planned = dir.vellum(&["repair", "--dry-run", "--json", "a"]).exits(0).any_json();
    let lossy = planned["steps"].as_array().unwrap().iter().any(|step| step["lossy"] == true);
    assert!(lossy, "{planned:#}");
    dir.vellum(&["repair", "--yes", "a"]).exits(2).says("--force").says("nothing was changed");
    assert!(dir.read("a") == file);
    assert_eq!(dir.names(), ["a"]);
    dir.vellum(&["repair", "--yes", "--force", "a"]).exits(0);
    dir.vellum(&["check", "a"]).exits(0);
    dir.io("a", &["-r"], &["read -S 1 0 1M", "read -P 0 1M 1M"]).exits(0);
}
