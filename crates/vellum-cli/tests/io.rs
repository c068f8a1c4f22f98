//! `vellum io`

mod common;
use common::{Dir, FORMATS, script};
use std::io::Write;
use std::process::Stdio;

#[test]
fn what_is_written_is_there_for_vellum_and_for_qemu() {
    let dir = Dir::new();
    for (format, qemu) in FORMATS {
        dir.vellum(&["create", "-q", "--force", "-O", format, "a", "40M"]).exits(0);
        let f = ["-f", format];
        dir.io(
            "a",
            &f,
            &[
                "write -P 0xab 0 64K",
                "write -P 0xcd 100 1000 # in the middle",
                "write -S 5 3M 5M",
                "flush",
                "write -z 4M 1M",
                "write -z -u 6M 1M",
                "verify",
                "reopen",
                "verify",
                "read -S 5 3M 1M",
                "read -P 0 4M 1M",
            ],
        )
        .exits(0)
        .shows("bytes as written");
        dir.qemu_io(
            qemu,
            "a",
            &["read -P 0xab 0 100", "read -P 0xcd 100 1000", "read -P 0 4M 1M", "read -P 0 8M 32M"],
        );
        dir.qemu_io(qemu, "a", &["write -P 0x11 20M 3M", "write -P 0x12 0 512"]);
        dir.io("a", &f, &["read -P 0x11 20M 3M", "read -P 0x12 0 512", "read -P 0xab 2K 512"]).exits(0);
        if !matches!(format, "raw" | "vhd") {
            dir.qemu_img(&["check", "-f", qemu, "a"]);
        }
    }
}

#[test]
fn the_same_script_gives_the_same_disk_in_every_format_with_any_driver() {
    let dir = Dir::new();
    dir.write("script", script(7, 250).as_bytes());
    dir.vellum(&["create", "-q", "-O", "raw", "model", "32M"]).exits(0);
    dir.io("model", &["-q", "-f", "raw", "--script", "script"], &[]).exits(0);
    for (format, qemu) in &FORMATS[1..] {
        for more in [&["--depth", "32"][..], &["--depth", "8", "--driver", "uring"], &["--discard"]] {
            dir.vellum(&["create", "-q", "--force", "-O", format, "a", "32M"]).exits(0);
            let ran = dir.io("a", &[&["-q", "--script", "script"], more].concat(), &[]);
            assert!(ran.code == 0, "{format} {more:?}: {ran:#?}");
            dir.qemu_img(&["compare", "-f", "raw", "-F", qemu, "model", "a"]);
            if *format != "vhd" {
                dir.qemu_img(&["check", "-q", "-f", qemu, "a"]);
            }
        }
    }
}

#[test]
fn what_is_not_expected_is_exit_code_1_and_told() {
    let dir = Dir::new();
    dir.vellum(&["create", "-q", "a.vdi", "4M"]).exits(0);
    let ran =
        dir.io("a.vdi", &[], &["write -P 1 4096 4096", "read -P 2 4096 10", "read -P 0 0 5000"]).exits(1);
    let ran = ran
        .shows("expected 0x02, found 0x01; 10 bytes")
        .shows("from byte 0x1000 on: expected 0x00, found 0x01; 904 bytes");
    assert_eq!(ran.err, "");
    let quiet = dir.io("a.vdi", &["-q"], &["read 0 512", "read -P 9 0 512"]).exits(1);
    assert_eq!(quiet.out.lines().count(), 1, "{quiet:?}");
    let report =
        dir.io("a.vdi", &["--json"], &["read -P 1 0 8K", "read -v 4096 4", "length"]).exits(1).any_json();
    assert_eq!(report["mismatches"], 1);
    let found = &report["commands"][0]["mismatches"][0];
    assert_eq!((&found["offset"], &found["expected"], &found["bytes"]), (&0.into(), &1.into(), &4096.into()));
    assert_eq!(report["commands"][1]["data"], "01010101");
    assert_eq!(report["commands"][2]["virtual_size"], 4 << 20);
    assert_eq!(report["commands"][0]["ok"], false);
}

#[test]
fn a_wrong_command_is_refused_before_anything_is_done() {
    let dir = Dir::new();
    dir.vellum(&["create", "-q", "a.vdi", "4M"]).exits(0);
    let before = dir.read("a.vdi");
    dir.io("a.vdi", &[], &["write 0 4K", "wrote 0 4K"]).exits(2).says("wrote").says("vellum io --help");
    dir.write("script", b"write 0 4K\n\n# all right\nread -P 300 0 1\n");
    dir.io("a.vdi", &["--script", "script"], &[]).exits(2).says("300").says("line 4 of script");
    dir.io("a.vdi", &["--script", "nosuch"], &[]).exits(3).says("nosuch");
    assert!(dir.read("a.vdi") == before);
}

#[test]
fn the_first_error_ends_it_unless_told_to_go_on() {
    let dir = Dir::new();
    dir.vellum(&["create", "-q", "a.vdi", "4M"]).exits(0);
    dir.io("a.vdi", &[], &["write -P 1 0 512", "read 4M 1", "write -P 2 0 512"])
        .exits(2)
        .says("past the end of the disk")
        .says("read 4M 1");
    dir.io("a.vdi", &[], &["read -P 1 0 512"]).exits(0);
    let ran = dir.io("a.vdi", &["--keep-going"], &["discard 3M 2M", "write -P 2 0 512"]).exits(2);
    assert!(ran.out.contains("failed:") && ran.out.contains("write -P 2 0 512: done"), "{ran:?}");
    let report = dir.io("a.vdi", &["--json"], &["write -z 0 5M"]).exits(2).any_json();
    assert_eq!((&report["error"]["code"], &report["commands"][0]["ok"]), (&"USAGE".into(), &false.into()));
}

#[test]
fn a_disk_that_is_opened_for_reading_does_not_change() {
    let dir = Dir::new();
    for (format, _) in FORMATS {
        dir.vellum(&["create", "-q", "--force", "-O", format, "a", "4M"]).exits(0);
        let before = dir.read("a");
        dir.io("a", &["-f", format, "-r"], &["read -P 0 0 4M", "write 0 512"]).exits(4).says("read-only");
        // Opened for writing, and not written.
        dir.io("a", &["-f", format], &["read -P 0 0 4M", "flush"]).exits(0);
        dir.io("a", &["-f", format], &["flags read-only=on", "write 0 512"]).exits(4).says("read-only");
        assert!(dir.read("a") == before, "{format}");
    }
}

#[test]
fn what_no_format_claims_is_written_only_if_it_is_said_to_be_raw() {
    let dir = Dir::new();
    let before = dir.raw_disk("a", 2);
    dir.io("a", &["-r"], &["read 0 512"]).exits(0).says("-f raw");
    dir.io("a", &[], &["write 0 512"]).exits(5).says("-f raw");
    let error = dir.io("a", &["--json"], &["write 0 512"]).exits(5).any_json();
    assert_eq!(error["error"]["code"], "FORMAT_REQUIRED");
    dir.vellum(&["bench", "--write", "--force", "-n", "1", "a"]).exits(5).says("-f raw");
    assert!(dir.read("a") == before);
    dir.io("a", &["-f", "raw"], &["write -P 7 0 512"]).exits(0);
    assert!(dir.read("a")[..512] == [7; 512]);
}

#[test]
fn commands_come_from_standard_input_too() {
    let dir = Dir::new();
    dir.vellum(&["create", "-q", "a.qcow2", "4M"]).exits(0);
    let run = |text: &str| {
        let mut command = dir.command(&["io", "a.qcow2"]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        common::Ran::new(child.wait_with_output().unwrap())
    };
    run("write -P 7 1M 64K\nawrite -P 8 2M 64K\nwait\nread -P 7 1M 64K\nverify\n")
        .exits(0)
        .shows("131072 bytes as written");
    run("read -P 7 1M 1K\nnonsense\nwrite 0 1K").exits(2).says("nonsense");
    run("flags discard=on ignore-flush=on\nflags discard=off").exits(0).shows("discard=off ignore-flush=on");
}

#[test]
fn what_was_flushed_survives_kill_9() {
    let dir = Dir::new();
    for (format, qemu) in FORMATS {
        dir.vellum(&["create", "-q", "--force", "-O", format, "a", "16M"]).exits(0);
        let ran = dir.io(
            "a",
            &["-f", format],
            &["write -S 1 1M 3M", "flush", "write -S 2 8M 3M", "abort", "length"],
        );
        assert_eq!(ran.code, 137, "{format}: {ran:?}");
        dir.io(
            "a",
            &["-f", format, "--skip-checks"],
            &["read -S 1 1M 3M", "write -S 3 12M 1M", "read -S 3 12M 1M"],
        )
        .exits(0);
        let check = dir.vellum(&["check", "-f", format, "a"]);
        assert!([0, 3].contains(&check.code) || format == "raw", "{format}: {check:?}");
        dir.qemu_img(&["convert", "-f", qemu, "-O", "raw", "a", "b"]);
        dir.io("b", &["-r", "-f", "raw"], &["read -S 1 1M 3M"]).exits(0);
    }
}

#[test]
fn kill_9_at_any_time_leaves_no_errors() {
    let dir = Dir::new();
    dir.write("script", script(3, 4000).as_bytes());
    for (format, _) in &FORMATS[1..] {
        dir.vellum(&["create", "-q", "--force", "-O", format, "a", "32M"]).exits(0);
        for milliseconds in [40, 120, 250, 90] {
            let arguments =
                ["io", "-q", "a", "--skip-checks", "--discard", "--depth", "32", "--script", "script"];
            let mut child = dir.start(&arguments);
            std::thread::sleep(std::time::Duration::from_millis(milliseconds));
            child.kill().unwrap();
            child.wait().unwrap();
            let check = dir.vellum(&["check", "a"]);
            assert!([0, 3].contains(&check.code), "{format}: {check:#?}");
        }
        dir.vellum(&["repair", "-q", "--yes", "a"]).exits(0);
        dir.io("a", &["--skip-checks"], &["write -S 5 0 1M", "verify"]).exits(0);
    }
}

#[test]
fn there_is_one_writer() {
    let dir = Dir::new();
    dir.vellum(&["create", "-q", "a.qcow2", "4M"]).exits(0);
    let mut command = dir.command(&["io", "a.qcow2"]);
    let mut writer = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = writer.stdin.take().unwrap();
    input.write_all(b"write -P 1 0 64K\nflush\n").unwrap();
    // The line says that the disk is open.
    let mut line = [0; 10];
    std::io::Read::read_exact(writer.stdout.as_mut().unwrap(), &mut line).unwrap();
    dir.io("a.qcow2", &[], &["length"]).exits(6).says("a.qcow2").says("--no-lock");
    dir.vellum(&["check", "a.qcow2"]).exits(1);
    dir.vellum(&["info", "--json", "a.qcow2"]).exits(6);
    dir.vellum(&["info", "--json", "-U", "a.qcow2"]).exits(0);
    dir.io("a.qcow2", &["-r", "--no-lock"], &["length"]).exits(0).shows("4194304");
    drop(input);
    assert!(writer.wait().unwrap().success());
    dir.io("a.qcow2", &[], &["read -P 1 0 64K"]).exits(0);
}

#[test]
fn discards_give_space_back_if_they_are_let() {
    let dir = Dir::new();
    dir.vellum(&["create", "-q", "a.qcow2", "16M"]).exits(0);
    let data = |more: &[&str], commands: &[&str]| {
        let report = dir.io("a.qcow2", &[more, &["--json"]].concat(), commands).json();
        let extents =
            report["commands"].as_array().unwrap().last().unwrap()["extents"].as_array().unwrap().clone();
        let data = extents.iter().filter(|extent| extent["kind"] == "data");
        data.map(|extent| extent["length"].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!(data(&[], &["write 0 8M", "map"]), 8 << 20);
    assert_eq!(data(&[], &["discard 0 4M", "map"]), 8 << 20);
    assert_eq!(data(&["--discard"], &["discard 0 4M", "map"]), 4 << 20);
    assert_eq!(data(&[], &["map 7M 1M"]), 1 << 20);
}

#[test]
fn a_discard_that_is_not_let_through_is_said_to_be_ignored() {
    let dir = Dir::new();
    for (format, _) in FORMATS {
        dir.vellum(&["create", "-q", "--force", "-O", format, "a", "4M"]).exits(0);
        let more = ["-f", format];
        // What was written is still expected: nothing was discarded.
        let script =
            ["write -S 1 0 2M", "discard 0 1M", "adiscard 1M 64K", "wait", "verify", "flags discard=on"];
        let ran = dir.io("a", &more, &[&script[..], &["discard 0 1M", "discard -q 1M 1M"]].concat()).exits(0);
        let ignored = |what: &str| format!("{what}: ignored: discard is off; open with --discard");
        assert!(ran.out.contains(&ignored("\ndiscard 0 1M")), "{ran:?}");
        assert!(ran.out.contains(&ignored("adiscard 1M 64K")), "{ran:?}");
        assert!(ran.out.contains("2097152 bytes as written"), "{ran:?}");
        assert!(ran.out.contains("\ndiscard 0 1M: done"), "{ran:?}");
        assert_eq!(ran.out.matches("ignored").count(), 2, "{ran:?}");
        let lines = dir.io("a", &[&more[..], &["--json"]].concat(), &["discard 0 1M"]).json();
        let line = &lines["commands"][0];
        assert_eq!(line["ok"], true);
        assert!(line["ignored"].as_str().is_some_and(|why| why.contains("--discard")), "{line}");
        let lines = dir.io("a", &[&more[..], &["--json", "--discard"]].concat(), &["discard 0 1M"]).json();
        assert!(lines["commands"][0]["ignored"].is_null(), "{lines}");
    }
}

#[test]
fn cache_modes_are_those_of_qemu() {
    let dir = Dir::new();
    dir.vellum(&["create", "-q", "a.vmdk", "16M"]).exits(0);
    for mode in ["writeback", "writethrough", "none", "directsync", "unsafe"] {
        dir.io(
            "a.vmdk",
            &["--cache", mode],
            &["write -S 3 1M 100K", "write -P 9 1000 10", "flush", "verify"],
        )
        .exits(0);
    }
    dir.qemu_io("vmdk", "a.vmdk", &["read -P 9 1000 10"]);
    dir.io("a.vmdk", &["--cache", "writearound"], &[]).exits(2);
}

#[test]
fn shareable_takes_what_has_no_tables_to_change() {
    let dir = Dir::new();
    dir.write("a.raw", &vec![0; 1 << 20]);
    let flags = ["--shareable", "--sequential"];
    let raw = [&["-f", "raw"], &flags[..]].concat();
    dir.io("a.raw", &raw, &["write -P 7 512 4096", "discard 0 512", "write -z 4k 512", "flush"]).exits(0);
    dir.io("a.raw", &["-f", "raw", "-r", "--sequential"], &["read -P 7 512 3584", "read -P 0 4k 512"])
        .exits(0);
    dir.vellum(&["create", "-f", "vdi", "-o", "variant=fixed", "b.vdi", "4M"]).exits(0);
    let before = dir.read("b.vdi");
    dir.io("b.vdi", &flags, &["write -P 9 1M 64K"]).exits(0);
    dir.io("b.vdi", &["-r"], &["read -P 9 1M 64K"]).exits(0);
    assert!(dir.read("b.vdi")[..1 << 20] == before[..1 << 20], "header or map changed");
    dir.vellum(&["create", "-f", "qcow2", "c.qcow2", "4M"]).exits(0);
    let ran = dir.io("c.qcow2", &flags, &["write 0 512"]).says("tables").says("fixed VDI");
    assert!(ran.code != 0);
}
