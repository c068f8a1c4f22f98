//! `vellum bench`

mod common;
use common::{Dir, FORMATS};

#[test]
fn requests_are_counted_in_every_format_and_by_every_driver() {
    let dir = Dir::new();
    for (format, _) in FORMATS {
        dir.vellum(&["create", "-q", "--force", "-O", format, "a", "16M"]).exits(0);
        for more in [
            &["--write", "--force", "--fill", "--depth", "8"][..],
            &["--write", "--force", "--order", "sequential", "--flush-every", "100", "--threads", "2"],
            &["--depth", "32", "--driver", "uring"],
            &["--order", "sequential", "-b", "64K", "--threads", "2", "--cache", "none"],
        ] {
            let report =
                dir.vellum(&[&["bench", "--json", "-f", format, "-n", "1000", "a"], more].concat()).json();
            assert_eq!(report["requests"], 1000, "{format} {more:?}");
            let latency = |name: &str| report["latency_ns"][name].as_u64().unwrap();
            assert!(latency("p50") <= latency("p99") && latency("p99") <= latency("max"), "{report}");
            assert!(report["iops"].as_f64().unwrap() > 0.0);
            let flushes = if more.contains(&"100") { 11 } else { u64::from(more.contains(&"--write")) };
            assert_eq!(report["flushes"], flushes, "{format} {more:?}");
            for besides in ["first_write_seconds", "last_flush_seconds"] {
                let time = report[besides].as_f64();
                assert_eq!(time.is_some_and(|seconds| seconds > 0.0), more.contains(&"--write"), "{report}");
            }
        }
        let check = dir.vellum(&["check", "-f", format, "a"]);
        assert!(check.code == 0 || format == "raw", "{check:?}");
    }
}

#[test]
fn nothing_is_written_without_being_told_twice() {
    let dir = Dir::new();
    let before = dir.raw_disk("a", 4);
    dir.vellum(&["bench", "-f", "raw", "--write", "-n", "10", "a"]).exits(2).says("--force");
    dir.vellum(&["bench", "-f", "raw", "--fill", "-n", "10", "a"]).exits(2).says("--force");
    dir.vellum(&["bench", "-f", "raw", "--force", "-n", "10", "a"])
        .exits(0)
        .shows("10 requests")
        .shows("p99");
    assert!(dir.read("a") == before);
    dir.vellum(&["bench", "-f", "raw", "-b", "8M", "-n", "1", "a"]).exits(2).says("smaller than one block");
    dir.vellum(&["bench", "-f", "raw", "-b", "0", "a"]).exits(2);
    dir.vellum(&["bench", "-f", "raw", "-s", "1", "-n", "1", "a"]).exits(2);
}

#[test]
fn a_span_keeps_the_rest_untouched_and_a_time_is_kept() {
    let dir = Dir::new();
    let before = dir.raw_disk("a", 4);
    dir.vellum(&["bench", "-f", "raw", "-w", "--force", "--span", "1M", "-s", "1", "a"])
        .exits(0)
        .shows("first write of the session")
        .shows("last flush");
    let after = dir.read("a");
    assert!(after[1 << 20..] == before[1 << 20..] && after[..1 << 20] != before[..1 << 20]);
}

/// As `qemu-img bench -S` goes: every block once before one comes again, if the stride is odd in blocks.
#[test]
fn a_stride_visits_what_it_says() {
    let dir = Dir::new();
    let touched = |stride: &str, requests: &str, threads: &str| -> Vec<usize> {
        dir.vellum(&["create", "-q", "--force", "-O", "raw", "a", "1M"]).exits(0);
        let stride = ["--stride", stride, "-n", requests, "--threads", threads];
        let report = dir
            .vellum(&[&["bench", "--json", "-f", "raw", "-w", "--force", "a"], &stride[..]].concat())
            .json();
        assert_eq!(report["order"], "stride");
        let blocks = dir.read("a");
        (0..256).filter(|block| blocks[block * 4096..][..4096].iter().any(|byte| *byte != 0)).collect()
    };
    assert_eq!(touched("12K", "256", "1"), (0..256).collect::<Vec<_>>());
    assert_eq!(touched("12K", "4", "1"), [0, 3, 6, 9]);
    assert_eq!(touched("8K", "1000", "1"), (0..256).step_by(2).collect::<Vec<_>>());
    // Past the end from the beginning on, however long the stride is.
    assert_eq!(touched("1020K", "3", "1"), [0, 254, 255]);
    assert_eq!(touched("5M", "100", "1"), [0]);
    assert_eq!(touched("4K", "4", "2"), [0, 1, 128, 129]);
    for bad in ["2000", "0"] {
        dir.vellum(&["bench", "-f", "raw", "--stride", bad, "-n", "1", "a"]).exits(2).says("multiple");
    }
    dir.vellum(&["bench", "-f", "raw", "--stride", "8K", "--order", "random", "-n", "1", "a"]).exits(2);
}
