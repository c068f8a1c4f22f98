//! Conversions that are stopped or killed and resumed: the same bytes as without interruption, or a refusal.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use vellum::{Code, Control, ConvertRequest, Progress, Quiet, Resolver, Storage, Vellum, block_on};
use vellum_sim::MemoryFiles;
use vellum_tests::conversions::{
    JOB, StopAfter, TARGET, assert_reads_as_source, assert_same_files, convert, convert_with,
    files_with_source, interrupt, request, source_bytes, under,
};
use vellum_tests::disks::noise;
use vellum_tests::variants::{VARIANTS, Variant, variant};
use vellum_tests::wrap::{Op, Sharing, Wrapped, os_error};

#[test]
fn a_stopped_conversion_resumes_to_the_same_bytes() {
    // 24 steps of 75 ms, on any number of threads: a checkpoint after 1 s, and some steps left.
    let mib = 24;
    let cases: Vec<(&str, usize, usize)> = VARIANTS
        .iter()
        .enumerate()
        .map(|(index, variant)| (variant.name, index % 7, 1))
        .chain([("qcow2-v3", 2, 3), ("vdi-dynamic", 3, 3), ("vmdk-stream", 4, 3), ("raw", 1, 3)])
        .collect();
    // Most of the time is sleep.
    std::thread::scope(|scope| {
        for half in cases.chunks(cases.len().div_ceil(4)) {
            scope.spawn(move || {
                for (name, steps, threads) in half {
                    resume_once(mib * threads, &variant(name), *steps, *threads);
                }
            });
        }
    });
}

fn resume_once(mib: usize, variant: &Variant, steps: usize, threads: usize) {
    let files = files_with_source(mib);
    convert(&files, &request(variant, "ref/disk.img"), &Quiet).unwrap();
    let mut interrupted = request(variant, TARGET);
    interrupted.threads = Some(threads);
    interrupt(&files, &interrupted, steps);
    let resumed = ConvertRequest { resume: true, ..request(variant, TARGET) };
    let report = convert(&files, &resumed, &Quiet)
        .unwrap_or_else(|e| panic!("{}: resuming after {steps} steps: {e:?}", variant.name));
    assert!(report.resumed_at.is_some_and(|at| at > 0), "{}: {report:?}", variant.name);
    println!("{} resumed at {:?} of {mib} MiB", variant.name, report.resumed_at);
    assert_reads_as_source(&files, TARGET, variant.format, mib);
    assert_same_files(&under(&files, "out/"), &under(&files, "ref/"));
}

/// Keeps copies of job and output as they stand at some steps: what a kill at that moment leaves.
struct Snapshots<'a> {
    files: &'a MemoryFiles,
    step: Duration,
    taken: Mutex<Vec<BTreeMap<String, Vec<u8>>>>,
    since_job: AtomicUsize,
}

impl Progress for Snapshots<'_> {
    fn begin(&self, _phase: &str, _total: u64) {}
    fn advance(&self, _position: u64, _moved: u64) -> Control {
        std::thread::sleep(self.step);
        // The job first: it claims only what was written before it.
        let Some(job) = self.files.get(JOB).map(|file| file.to_vec()).filter(|job| !job.is_empty()) else {
            return Control::Continue;
        };
        if self.since_job.fetch_add(1, Ordering::Relaxed).is_multiple_of(4) {
            let mut files = under(self.files, "out/");
            files.insert(JOB.trim_start_matches("out/").to_owned(), job);
            self.taken.lock().push(files);
        }
        Control::Continue
    }
}

#[test]
fn a_conversion_killed_at_any_moment_resumes_to_the_same_bytes() {
    let names = [
        "raw",
        "vdi-dynamic",
        "vhd-dynamic",
        "vmdk-sparse",
        "vmdk-split-flat",
        "vmdk-stream",
        "qcow2-v3",
        "qcow2-zstd",
        "qcow2-extended",
        "qcow2-512",
    ];
    std::thread::scope(|scope| {
        for half in names.chunks(3) {
            scope.spawn(move || half.iter().for_each(|name| kill_and_resume(&variant(name), true)));
        }
    });
}

#[test]
fn a_killed_conversion_that_may_share_blocks_resumes_to_the_same_bytes() {
    // Such a conversion places blocks without a look at them if the host shares them. What the interrupted one placed
    // and what the resumed one places must not differ, even if the host changes its mind.
    type Host = fn(Arc<MemoryFiles>) -> Arc<dyn Resolver>;
    let hosts: [Host; 3] = [
        |files| files,
        |files| Wrapped::over(files, Sharing::new(false)),
        |files| Wrapped::over(files, Sharing::new(true)),
    ];
    std::thread::scope(|scope| {
        for host in hosts {
            scope.spawn(move || {
                for name in ["qcow2-2m", "vdi-dynamic", "vmdk-sparse"] {
                    kill_and_resume_on(&variant(name), false, host);
                }
            });
        }
    });
}

fn kill_and_resume(variant: &Variant, reproducible: bool) {
    kill_and_resume_on(variant, reproducible, |files| files);
}

fn kill_and_resume_on(
    variant: &Variant,
    reproducible: bool,
    host: impl Fn(Arc<MemoryFiles>) -> Arc<dyn Resolver>,
) {
    let mib = 26;
    let files = files_with_source(mib);
    let vellum = Vellum::new(host(files.clone()));
    let request = |variant, target| ConvertRequest { reproducible, ..request(variant, target) };
    let (step, taken, since_job) = (Duration::from_millis(75), Mutex::default(), AtomicUsize::new(0));
    let progress = Snapshots { files: &files, step, taken, since_job };
    vellum.convert(&request(variant, TARGET), &progress).unwrap();
    assert_reads_as_source(&files, TARGET, variant.format, mib);
    let expected = under(&files, "out/");
    let snapshots = progress.taken.into_inner();
    assert!(snapshots.len() >= 2, "{}: {} snapshots", variant.name, snapshots.len());
    for snapshot in snapshots {
        for path in files.paths().into_iter().filter(|path| path.starts_with("out/")) {
            block_on(files.delete(&path.as_str().into()).into_future()).unwrap();
        }
        for (name, bytes) in &snapshot {
            files.put(&format!("out/{name}"), bytes);
        }
        let resumed = ConvertRequest { resume: true, ..request(variant, TARGET) };
        let report =
            vellum.convert(&resumed, &Quiet).unwrap_or_else(|e| panic!("{}: resuming: {e:?}", variant.name));
        println!("{} resumed at {:?} of {mib} MiB", variant.name, report.resumed_at);
        assert_reads_as_source(&files, TARGET, variant.format, mib);
        assert_same_files(&under(&files, "out/"), &expected);
    }
}

#[test]
fn blocks_are_shared_with_the_source_where_the_host_can() {
    let files = files_with_source(8);
    for (name, moody) in [("raw", false), ("raw", true), ("vdi-dynamic", false), ("qcow2-v3", true)] {
        let host = Sharing::new(moody);
        let vellum = Vellum::new(Wrapped::over(files.clone(), host.clone()));
        let target = format!("{name}-{moody}");
        let request = ConvertRequest { reproducible: false, ..request(&variant(name), &target) };
        vellum.convert(&request, &Quiet).unwrap();
        assert!(host.asked() > 4, "{name}: asked {} times", host.asked());
        assert_reads_as_source(&files, &target, variant(name).format, 8);
    }
}

#[test]
fn a_conversion_stopped_twice_still_resumes() {
    let files = files_with_source(60);
    let variant = variant("qcow2-v3");
    convert(&files, &request(&variant, "ref/disk.img"), &Quiet).unwrap();
    interrupt(&files, &request(&variant, TARGET), 1);
    // A job file is there from the start now: stop after some steps.
    let resumed = ConvertRequest { resume: true, ..request(&variant, TARGET) };
    let error = convert(&files, &resumed, &StopAfter(AtomicUsize::new(7))).unwrap_err();
    assert_eq!(error.code(), Code::Cancelled);
    let report = convert(&files, &resumed, &Quiet).unwrap();
    assert!(report.resumed_at.unwrap() > 14 << 20, "the second part is kept too: {report:?}");
    assert_same_files(&under(&files, "out/"), &under(&files, "ref/"));
}

#[test]
fn only_the_same_job_is_resumed() {
    let files = files_with_source(24);
    let asked = request(&variant("qcow2-v3"), TARGET);
    interrupt(&files, &asked, 2);
    let before = under(&files, "out/");
    let other = |change: fn(&mut ConvertRequest)| {
        let mut request = ConvertRequest { resume: true, ..asked.clone() };
        change(&mut request);
        request
    };
    let others = [
        ("another option", other(|r| r.options = vec![("cluster_size".into(), "128k".into())])),
        ("one option less", other(|r| r.options.clear())),
        ("compressed", other(|r| r.compress = true)),
        ("another format", other(|r| (r.target_format, r.options) = ("vdi".into(), Vec::new()))),
        ("other holes", other(|r| r.sparse_bytes = Some(0))),
        ("holes by content", other(|r| r.sparse_bytes = Some(65_536))),
    ];
    for (what, request) in others {
        let error = convert(&files, &request, &Quiet).expect_err(what);
        assert_eq!(error.code(), Code::JournalMismatch, "{what}: {error:?}");
        assert!(error.hint_text().is_some());
        assert_same_files(&under(&files, "out/"), &before);
    }
    // Another source, even with the same content; and the same after a change.
    files.put("other.raw", &source_bytes(24));
    let error = convert(&files, &ConvertRequest { source: "other.raw".into(), ..other(|_| ()) }, &Quiet);
    assert_eq!(error.unwrap_err().code(), Code::JournalMismatch);
    let source = files.get("source.raw").unwrap();
    block_on(source.set_len(25 << 20, Default::default()).into_future()).unwrap();
    assert_eq!(convert(&files, &other(|_| ()), &Quiet).unwrap_err().code(), Code::JournalMismatch);
    block_on(source.set_len(24 << 20, Default::default()).into_future()).unwrap();
    assert_same_files(&under(&files, "out/"), &before);
    assert!(convert(&files, &other(|_| ()), &Quiet).unwrap().resumed_at.is_some());
}

#[test]
fn a_forged_or_broken_job_file_is_refused_or_ignored_never_believed() {
    let files = files_with_source(24);
    let asked = request(&variant("qcow2-v3"), TARGET);
    convert(&files, &request(&variant("qcow2-v3"), "ref/disk.img"), &Quiet).unwrap();
    interrupt(&files, &asked, 3);
    let (part, job) = (files.get("out/disk.img.part").unwrap().to_vec(), files.get(JOB).unwrap().to_vec());
    let resumed = ConvertRequest { resume: true, ..asked };
    let mut broken: Vec<Vec<u8>> = vec![Vec::new(), vec![0; 4096], noise(5, 8192), b"BEGIN\n".to_vec()];
    for at in (0..job.len()).step_by(job.len() / 10 + 1).chain([0, 4, 8, 16, 20, 4096, 4100, 4116, 4120]) {
        let mut flipped = job.clone();
        flipped[at] ^= 0x41;
        broken.push(flipped);
        broken.push(job[..at].to_vec());
    }
    for (number, bytes) in broken.iter().enumerate() {
        files.put("out/disk.img.part", &part);
        files.put(JOB, bytes);
        match convert(&files, &resumed, &Quiet) {
            // What could be used of it was enough, or padding was hit: the result is right.
            Ok(_) => {
                assert_same_files(&under(&files, "out/"), &under(&files, "ref/"));
                block_on(files.delete(&TARGET.into()).into_future()).unwrap();
            }
            Err(error) => {
                assert_eq!(error.code(), Code::JournalMismatch, "{number}: {error:?}");
                assert!(files.get(TARGET).is_none());
            }
        }
    }
}

#[test]
fn a_job_without_its_part_file_starts_from_the_beginning() {
    // What a crash leaves after the result was put in place, or somebody who tidied up.
    let files = files_with_source(24);
    let asked = request(&variant("vdi-dynamic"), TARGET);
    interrupt(&files, &asked, 2);
    block_on(files.delete(&"out/disk.img.part".into()).into_future()).unwrap();
    let report = convert(&files, &ConvertRequest { resume: true, ..asked }, &Quiet).unwrap();
    assert_eq!(report.resumed_at, None);
    assert!(files.get(JOB).is_none());
    assert_reads_as_source(&files, TARGET, "vdi", 24);
}

#[test]
fn resuming_where_nothing_was_interrupted_starts_from_the_beginning() {
    let files = files_with_source(3);
    let resumed = ConvertRequest { resume: true, ..request(&variant("qcow2-v3"), TARGET) };
    let report = convert(&files, &resumed, &Quiet).unwrap();
    assert_eq!(report.resumed_at, None);
    assert_reads_as_source(&files, TARGET, "qcow2", 3);
}

#[test]
fn starting_over_forgets_the_interrupted_job() {
    let files = files_with_source(24);
    let asked = request(&variant("qcow2-v3"), TARGET);
    interrupt(&files, &asked, 2);
    // Started over and stopped before the first checkpoint: nothing may be left that claims progress.
    let error = convert(&files, &asked, &StopAfter(AtomicUsize::new(3))).unwrap_err();
    assert_eq!(error.code(), Code::Cancelled);
    assert_eq!(under(&files, "out/").keys().collect::<Vec<_>>(), Vec::<&String>::new());
    let resumed = ConvertRequest { resume: true, ..asked.clone() };
    assert_eq!(convert(&files, &resumed, &Quiet).unwrap().resumed_at, None);
    assert_reads_as_source(&files, TARGET, "qcow2", 24);
    // Started over and finished: the old job file is gone.
    block_on(files.delete(&TARGET.into()).into_future()).unwrap();
    interrupt(&files, &asked, 1);
    convert(&files, &asked, &Quiet).unwrap();
    assert_eq!(under(&files, "out/").keys().collect::<Vec<_>>(), ["disk.img"]);
}

#[test]
fn a_disk_that_fills_up_after_a_checkpoint_can_be_resumed() {
    let files = files_with_source(24);
    let asked = request(&variant("qcow2-v3"), TARGET);
    convert(&files, &request(&variant("qcow2-v3"), "ref/disk.img"), &Quiet).unwrap();
    let (slow, seen) = (Duration::from_millis(75), files.clone());
    let error = convert_with(&files, &asked, move |file, op| {
        let Op::Write(range) = op else { return Ok(()) };
        if file.ends_with(".part") && range.end - range.start > 100_000 {
            std::thread::sleep(slow);
            if seen.get(JOB).is_some_and(|job| !job.is_empty().unwrap()) {
                return Err(os_error(28));
            }
        }
        Ok(())
    })
    .unwrap_err();
    assert_eq!(error.code(), Code::NoSpace, "{error:?}");
    assert!(error.hint_text().is_some_and(|hint| hint.contains("--resume")), "{error:?}");
    assert!(files.get(TARGET).is_none());
    let resumed = ConvertRequest { resume: true, ..asked };
    assert!(convert(&files, &resumed, &Quiet).unwrap().resumed_at.is_some());
    assert_same_files(&under(&files, "out/"), &under(&files, "ref/"));
}
