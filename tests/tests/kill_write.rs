//! A process that writes an image is killed (SIGKILL) again and again: what a flush has acknowledged is there, and no
//! check finds an error. The same image lives through all kills.
//!
//! `VELLUM_KILLS=1000` kills more often than the default of 60 times in all.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use vellum::{ChainOptions, Disk, FilePolicy, Vellum, WriteAccess};
use vellum_sim::Random;
use vellum_tests::parallel::two_at_a_time;
use vellum_tests::tools::text;
use vellum_tests::variants::{Variant, variant};
use vellum_tests::writing::{Model, Request, SECTOR, qemu_check, writable};

/// Requests between two flushes.
const GROUP: u64 = 6;
const CHILD: &str = "VELLUM_KILL_CHILD";

fn open(image: &Path, format: &str, write: bool) -> vellum::Result<Disk> {
    let write = if write { WriteAccess::Yes } else { WriteAccess::No };
    let mut options = ChainOptions { format: Some(format.into()), write, ..ChainOptions::default() };
    options.disk.flags.discard = true;
    Ok(Vellum::local(FilePolicy::default()).open(text(image), &options)?.0)
}

/// The requests of group `number` of the session `seed`.
fn group(seed: u64, number: u64, sectors: u64) -> Vec<Request> {
    let mut random = Random::new(vellum_sim::mix(seed, number));
    let tag = |index| vellum_sim::mix(seed, number * GROUP + index) | 1;
    (0..GROUP).map(|index| Request::random(&mut random, sectors, tag(index), false)).collect()
}

/// Not a test of its own: what the child does. Writes groups for ever and says after each that it was flushed.
#[test]
fn child() {
    let Ok(task) = std::env::var(CHILD) else { return };
    let mut words = task.splitn(3, ' ');
    let mut next = || words.next().unwrap();
    let (format, seed, image) = (next(), next(), next());
    let seed = seed.parse().unwrap();
    let disk = open(Path::new(image), format, true).unwrap_or_else(|error| panic!("opening: {error:?}"));
    for number in 0.. {
        for request in group(seed, number, disk.size() / SECTOR) {
            request.perform(&disk).unwrap_or_else(|error| panic!("{request:?}: {error:?}"));
        }
        disk.flush_all().wait().unwrap();
        let mut out = std::io::stdout().lock();
        writeln!(out, "flushed {number}").unwrap();
        out.flush().unwrap();
    }
}

fn spawn(image: &Path, format: &str, seed: u64) -> (Child, ChildStdout) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(CHILD, format!("{format} {seed} {}", text(image)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let out = child.stdout.take().unwrap();
    (child, out)
}

/// Runs a session and kills it; how many groups were acknowledged.
fn run_and_kill(image: &Path, format: &str, seed: u64, after: Duration) -> u64 {
    let (mut child, out) = spawn(image, format, seed);
    let (send, lines) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            // The harness of the child prints its own lines, and this one may stand behind one of them.
            if let Some((_, number)) = line.split_once("flushed ") {
                let _ = send.send(number.trim().parse::<u64>().unwrap());
            }
        }
    });
    // The clock runs from the first acknowledgement on: until then the process mostly starts.
    let first = lines.recv_timeout(Duration::from_secs(60));
    std::thread::sleep(after);
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    reader.join().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code().is_none(), "{format}: the child ended by itself: {stderr}");
    let first = first.unwrap_or_else(|_| panic!("{format}: no flush in a minute: {stderr}"));
    lines.try_iter().last().unwrap_or(first) + 1
}

struct Case {
    variant: Variant,
    kills: u64,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.variant.name)
    }
}

#[test]
fn what_a_flush_has_acknowledged_survives_every_kill() {
    let total: u64 = std::env::var("VELLUM_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    let names = writable();
    let kills = total.div_ceil(names.len() as u64).max(1);
    let cases: Vec<Case> = names.iter().map(|name| Case { variant: variant(name), kills }).collect();
    let begun = Instant::now();
    two_at_a_time(&cases, |case| {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.img");
        let acknowledged = live_through(case, &image);
        println!("{}: {} kills, {acknowledged} flushes acknowledged", case.variant.name, case.kills);
    });
    println!("{} kills in {:?}", kills * cases.len() as u64, begun.elapsed());
}

fn live_through(case: &Case, image: &Path) -> u64 {
    let variant = &case.variant;
    let request = variant.empty_disk(text(image));
    Vellum::local(FilePolicy::default()).create(&request).unwrap();
    let sectors = open(image, variant.format, false).unwrap().size() / SECTOR;
    let mut model = Model::new(sectors);
    let mut random = Random::new(vellum_sim::mix(7, variant.name.len() as u64));
    let mut all = 0;
    for seed in 1..=case.kills {
        let what = format!("{}, kill {seed}", variant.name);
        let after = Duration::from_micros(random.below(120_000));
        let acknowledged = run_and_kill(image, variant.format, seed, after);
        all += acknowledged;
        for number in 0..acknowledged {
            group(seed, number, sectors).iter().for_each(|request| model.answered(request, true));
            model.answered(&Request::Flush, true);
        }
        // One more may have been flushed without our having heard of it, and yet another one begun.
        for number in acknowledged..acknowledged + 2 {
            group(seed, number, sectors).iter().for_each(|request| model.answered(request, false));
        }
        check(variant, image, true, &what);
        let disk = open(image, variant.format, false).unwrap_or_else(|error| panic!("{what}: {error:?}"));
        model.check_recovered(&disk).unwrap_or_else(|difference| panic!("{what}: {difference}"));
    }
    // A session that ends as it should leaves nothing to excuse.
    let disk = open(image, variant.format, true).unwrap();
    for request in group(0, 0, sectors) {
        request.perform(&disk).unwrap();
        model.answered(&request, true);
    }
    disk.close().wait().unwrap();
    drop(disk);
    model.answered(&Request::Flush, true);
    check(variant, image, false, &format!("{}, closed", variant.name));
    model.check_recovered(&open(image, variant.format, false).unwrap()).unwrap();
    all
}

/// Neither our check nor QEMU's finds an error; leaks are allowed.
fn check(variant: &Variant, image: &Path, was_interrupted: bool, what: &str) {
    let options = ChainOptions { format: Some(variant.format.into()), ..ChainOptions::default() };
    match Vellum::local(FilePolicy::default()).check(text(image), &options) {
        Ok(report) => assert_eq!(report.errors, 0, "{what}: {:?}", report.findings),
        Err(error) if error.code() == vellum::Code::Feature => {}
        Err(error) => panic!("{what}: checking: {error:?}"),
    }
    qemu_check(variant.qemu, image, was_interrupted, what);
}
