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
