//! `vellum convert`

mod common;
use common::{Dir, Ran, noise};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn every_format_into_every_other_as_qemu_reads_it() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 9);
    for (format, qemu) in
        [("qcow2", "qcow2"), ("vmdk", "vmdk"), ("vdi", "vdi"), ("vhd", "vpc"), ("raw", "raw")]
    {
        dir.vellum(&["convert", "--force", "-f", "raw", "-O", format, "a.img", "b"]).exits(0);
        let same = dir.qemu_img(&["compare", "-f", "raw", "-F", qemu, "a.img", "b"]);
        assert!(same.contains("identical"), "{format}: {same}");
        for (back, _) in [("qcow2", ""), ("vmdk", ""), ("raw", "")] {
            let report = dir
                .vellum(&["convert", "--json", "--force", "--verify", "-f", format, "-O", back, "b", "c"])
                .json();
            assert_eq!((&report["source_format"], &report["target_format"]), (&format.into(), &back.into()));
            assert_eq!(report["verified"], true);
            dir.vellum(&["compare", "--strict", "-f", "raw", "a.img", "c"]).exits(0);
        }
    }
    assert_eq!(dir.names(), ["a.img", "b", "c"]);
}

#[test]
fn compressed_variants_read_as_the_source() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 5);
    for options in [
        &["-O", "qcow2", "-c"][..],
        &["-O", "qcow2", "--level", "1", "-o", "compression_type=zstd"],
        &["-O", "vmdk", "-o", "subformat=streamOptimized"],
        &["-O", "vmdk", "--compress"],
    ] {
        dir.vellum(&[&["convert", "--force", "-f", "raw", "a.img", "b"], options].concat()).exits(0);
        let format = options[1];
        let same = dir.qemu_img(&["compare", "-f", "raw", "-F", format, "a.img", "b"]);
        assert!(same.contains("identical"), "{options:?}: {same}");
    }
}

#[test]
fn a_chain_becomes_one_image() {
    let dir = Dir::new();
    dir.raw_disk("base.img", 5);
    dir.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "a.qcow2"]);
    dir.vellum(&["convert", "a.qcow2", "b.vdi"]).exits(0).says("note: writing vdi");
    assert_eq!(dir.digest("b.vdi"), dir.digest("base.img"));
    assert_eq!(dir.vellum(&["info", "--json", "b.vdi"]).json()["parent"], serde_json::Value::Null);
}

#[test]
fn parents_may_be_named_and_other_directories_allowed() {
    let dir = Dir::new();
    let other = Dir::new();
    let base = other.path("base.img").display().to_string();
    other.raw_disk("base.img", 2);
    dir.qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", "a.qcow2"]);
    // A name inside an image leads nowhere that the user did not allow.
    dir.vellum(&["convert", "a.qcow2", "b.img"]).exits(5).says("error: ");
    assert_eq!(dir.names(), ["a.qcow2"]);
    let allowed = other.path("").display().to_string();
    dir.vellum(&["convert", "--allow-dir", &allowed, "a.qcow2", "b.img"]).exits(0);
    dir.vellum(&["convert", "--parent", &base, "a.qcow2", "c.img"]).exits(0);
    assert!(dir.read("b.img") == other.read("base.img") && dir.read("c.img") == other.read("base.img"));
}

#[test]
fn a_source_that_no_format_claims_is_read_as_raw_and_that_is_said() {
    let dir = Dir::new();
    dir.raw_disk("a.qcow2", 1);
    // The name of a source says nothing.
    dir.vellum(&["convert", "-O", "vdi", "a.qcow2", "b.vdi"]).exits(0).says("note: ").says("-f raw");
    let said = dir.vellum(&["convert", "-f", "raw", "-O", "vdi", "a.qcow2", "c.vdi"]).exits(0);
    assert_eq!(said.err, "");
    let report = dir.vellum(&["convert", "--json", "-q", "-O", "vdi", "a.qcow2", "d.vdi"]).json();
    assert_eq!(report["raw_by_default"], true);
}

#[test]
fn the_advice_about_a_target_in_use_is_not_how_to_read_it() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 4);
    dir.vellum(&["convert", "a.img", "b.qcow2"]).exits(0);
    let mut holder = Command::new("qemu-io")
        .args(["-f", "qcow2", "b.qcow2"])
        .current_dir(dir.path(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu-io runs (Debian package qemu-utils)");
    // It prompts when it has opened the image.
    holder.stdout.as_mut().unwrap().read_exact(&mut [0; 8]).unwrap();
    let ran = dir.vellum(&["convert", "--force", "a.img", "b.qcow2"]).says("choose another target");
    assert!(ran.err.contains("open for writing by pid") && !ran.err.contains("--shared-read"), "{}", ran.err);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    dir.vellum(&["convert", "--force", "a.img", "b.qcow2"]).exits(0);
}

#[test]
fn nothing_is_overwritten_without_force() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 1);
    dir.write("b.qcow2", b"precious");
    dir.vellum(&["convert", "a.img", "b.qcow2"]).exits(2).says("b.qcow2").says("--force");
    assert_eq!(dir.read("b.qcow2"), b"precious");
    // Not even with --force onto the source itself.
    let before = dir.read("a.img");
    dir.vellum(&["convert", "--force", "a.img", "a.img"]).exits(2).says("part of the source");
    std::os::unix::fs::symlink("a.img", dir.path("link.img")).unwrap();
    dir.vellum(&["convert", "--force", "a.img", "link.img"]).exits(2);
    assert!(dir.read("a.img") == before);
    assert_eq!(dir.names(), ["a.img", "b.qcow2", "link.img"]);
    dir.vellum(&["convert", "--force", "a.img", "b.qcow2"]).exits(0);
    assert_eq!(dir.digest("b.qcow2"), dir.digest("a.img"));
}

#[test]
fn the_other_files_of_an_image_are_not_overwritten_either() {
    let dir = Dir::new();
    let flat = dir.raw_disk("b-flat.vmdk", 1);
    dir.raw_disk("a.img", 2);
    let options = ["-O", "vmdk", "-o", "subformat=monolithicFlat"];
    let convert = |source, more: &[&str]| {
        dir.vellum(&[&["convert", "-f", "raw", source, "b.vmdk"], &options[..], more].concat())
    };
    convert("a.img", &[]).exits(2).says("b-flat.vmdk").says("--force");
    dir.vellum(&[&["create", "b.vmdk", "1M"], &options[..]].concat()).exits(2).says("b-flat.vmdk");
    convert("b-flat.vmdk", &["--force"]).exits(2).says("part of the source");
    assert!(dir.read("b-flat.vmdk") == flat);
    assert_eq!(dir.names(), ["a.img", "b-flat.vmdk"]);
    convert("a.img", &["--force"]).exits(0);
    assert_eq!(dir.names(), ["a.img", "b-flat.vmdk", "b.vmdk"]);
    assert_eq!(dir.digest("b.vmdk"), dir.digest("a.img"));
}

#[test]
fn wrong_options_are_refused_by_name_and_leave_nothing() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 1);
    let convert =
        |options: &[&str]| dir.vellum(&[&["convert", "a.img", "b.qcow2"], options].concat()).exits(2);
    convert(&["-o", "clutser_size=64k"]).says("clutser_size").says("vellum formats qcow2");
    convert(&["-o", "cluster_size=3"]).says("cluster_size");
    convert(&["-O", "vdi", "-c"]).says("VDI");
    convert(&["--preallocation", "full", "-o", "preallocation=off"]).says("contradicts");
    assert_eq!(dir.names(), ["a.img"]);
}

#[test]
fn quiet_says_nothing() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 1);
    let ran = dir.vellum(&["convert", "--quiet", "a.img", "b.qcow2"]).exits(0);
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("", ""));
}

#[test]
fn reproducible_results_are_the_same_with_any_number_of_threads() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 9);
    for (format, more) in [("qcow2", &["-c"][..]), ("vhd", &[]), ("vmdk", &[]), ("vdi", &[])] {
        for (name, threads) in [("a", "1"), ("b", "4")] {
            std::fs::create_dir_all(dir.path(name)).unwrap();
            let target = format!("{name}/disk");
            let arguments =
                ["convert", "--force", "--reproducible", "--threads", threads, "-O", format, "a.img"];
            dir.vellum(&[&arguments, &[target.as_str()][..], more].concat()).exits(0);
        }
        assert!(dir.read("a/disk") == dir.read("b/disk"), "{format}");
    }
}

#[test]
fn direct_gives_the_same() {
    let dir = Dir::new();
    dir.raw_disk("a.img", 3);
    dir.vellum(&["convert", "--direct", "-f", "raw", "a.img", "b.qcow2"]).exits(0);
    assert_eq!(dir.digest("b.qcow2"), dir.digest("a.img"));
}

/// A conversion that takes many seconds: little of it is I/O, so that any machine is slow enough.
const SLOW: [&str; 9] = ["convert", "-f", "raw", "-O", "qcow2", "--level", "12", "a.img", "b.qcow2"];
const JOB: &str = "b.qcow2.convert.vellum-job";

fn slow_source(dir: &Dir) {
    let mut content = vec![0; 128 << 20];
    noise(7, &mut content);
    // Letters: what compresses badly takes no time.
    content.iter_mut().for_each(|byte| *byte = b'a' + *byte % 16);
    dir.write("a.img", &content);
}

fn start_slowly(dir: &Dir, more: &[&str]) -> Child {
    dir.start(&[&SLOW[..], &["--threads=1"], more].concat())
}

fn job_bytes(dir: &Dir) -> u64 {
    std::fs::metadata(dir.path(JOB)).map_or(0, |job| job.len())
}

/// Waits until the job file says how far the job is: its first record is only its beginning.
fn wait_for_a_checkpoint(dir: &Dir) {
    let before = job_bytes(dir).max(4096);
    wait_for("a checkpoint", || job_bytes(dir) > before);
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status();
    assert!(status.expect("kill (Debian package procps)").success());
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(60), "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ran(child: Child) -> Ran {
    Ran::new(child.wait_with_output().expect("vellum ends"))
}

#[test]
fn an_interrupted_conversion_leaves_no_result_and_resumes() {
    let dir = Dir::new();
    slow_source(&dir);
    for (name, code) in [("-INT", 130), ("-TERM", 143)] {
        let child = start_slowly(&dir, &["--resume"]);
        wait_for_a_checkpoint(&dir);
        signal(&child, name);
        ran(child).exits(code).says("--resume");
        assert_eq!(dir.names(), ["a.img", JOB, "b.qcow2.part"]);
    }
    // Another conversion does not go on with this one.
    let other = ["convert", "-f", "raw", "-O", "vdi", "--resume", "a.img", "b.qcow2"];
    dir.vellum(&other).exits(5).says("without --resume");
    assert_eq!(dir.names(), ["a.img", JOB, "b.qcow2.part"]);

    let report = dir.vellum(&[&SLOW[..], &["--resume", "--json", "--quiet"]].concat()).json();
    assert!(report["resumed_at"].as_u64().is_some_and(|position| position > 0), "{report}");
    assert_eq!(dir.names(), ["a.img", "b.qcow2"]);
    assert_eq!(dir.digest("b.qcow2"), dir.digest("a.img"));
    dir.qemu_img(&["check", "-q", "b.qcow2"]);
}

#[test]
fn a_job_file_is_not_believed_after_the_conversion_was_begun_anew() {
    let dir = Dir::new();
    slow_source(&dir);
    let child = start_slowly(&dir, &[]);
    wait_for_a_checkpoint(&dir);
    signal(&child, "-KILL");
    ran(child).exits(137);
    assert!(job_bytes(&dir) > 4096);
    // Begun anew: what was done is thrown away, and then there is a new `.part` with next to nothing in it.
    let child = start_slowly(&dir, &[]);
    wait_for("the end of the old job file", || !dir.exists(JOB));
    signal(&child, "-KILL");
    ran(child).exits(137);
    dir.vellum(&[&SLOW[..], &["--resume"]].concat()).exits(0);
    assert_eq!(dir.digest("b.qcow2"), dir.digest("a.img"));
}

#[test]
fn what_is_interrupted_at_once_leaves_nothing() {
    let dir = Dir::new();
    slow_source(&dir);
    let child = start_slowly(&dir, &[]);
    wait_for("the target's first file", || dir.exists("b.qcow2.part"));
    signal(&child, "-INT");
    let ran = ran(child).exits(130).says("hint: ");
    // On a machine that stood still for a second the job file is there already.
    match dir.names().len() {
        1 => assert!(ran.err.contains("nothing is kept"), "{ran:?}"),
        _ => assert!(dir.exists(JOB) && !dir.exists("b.qcow2"), "{:?}", dir.names()),
    }
}

#[test]
fn a_second_signal_ends_the_process_at_once() {
    let dir = Dir::new();
    slow_source(&dir);
    let mut child = start_slowly(&dir, &[]);
    wait_for("the target's first file", || dir.exists("b.qcow2.part"));
    // As fast as possible one after the other; one may also have been enough.
    let started = Instant::now();
    while child.try_wait().expect("vellum can be asked").is_none() {
        let _ = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
        assert!(started.elapsed() < Duration::from_secs(10));
    }
    ran(child).exits(130);
    assert!(!dir.exists("b.qcow2"));
}

#[test]
fn progress_is_plain_lines_where_there_is_no_terminal() {
    let dir = Dir::new();
    slow_source(&dir);
    let mut child = start_slowly(&dir, &[]);
    let lines = BufReader::new(child.stderr.take().expect("standard error"));
    let line = lines.lines().map_while(Result::ok).find(|line| line.starts_with("converting: "));
    // A machine that is done within five seconds shows none.
    if let Some(line) = line {
        assert!(line.contains(" %, ") && line.contains("MiB/s"), "{line}");
        assert!(!line.contains(['\r', '\x1b']), "{line:?}");
        signal(&child, "-KILL");
    }
    child.wait().expect("vellum ends");
}
