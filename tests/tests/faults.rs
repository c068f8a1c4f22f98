//! The disk under the image fails: no space, I/O errors, flushes that fail. The image stays consistent, nothing that was
//! promised is lost, and after a flush that failed nothing more is written.

use std::sync::Arc;
use vellum::{ChainOptions, Code, CreateDiskRequest, Disk, Vellum, WriteAccess};
use vellum_sim::{Fault, FaultKind, FaultOn, FileSet, Random, SimFiles};
use vellum_tests::parallel::two_at_a_time;
use vellum_tests::variants::{Variant, variant};
use vellum_tests::writing::{Model, Request, SECTOR, qemu_check, writable};

const NAME: &str = "disk.img";

fn create(vellum: &Vellum, variant: &Variant) {
    let request = CreateDiskRequest { reproducible: true, ..variant.empty_disk(NAME) };
    vellum.create(&request).unwrap_or_else(|error| panic!("{}: creating: {error:?}", variant.name));
}

fn options(variant: &Variant, write: bool) -> ChainOptions {
    let write = if write { WriteAccess::Yes } else { WriteAccess::No };
    let mut options = ChainOptions { format: Some(variant.format.into()), write, ..ChainOptions::default() };
    options.disk.flags.discard = true;
    options
}

fn open(files: &Arc<SimFiles>, variant: &Variant, write: bool) -> Disk {
    let opened = Vellum::new(files.resolver()).open(NAME, &options(variant, write));
    opened.unwrap_or_else(|error| panic!("{}: opening (write: {write}): {error:?}", variant.name)).0
}

/// An image with some data, closed properly.
fn prepared(variant: &Variant) -> (FileSet, Model) {
    let files = SimFiles::new(FileSet::default());
    create(&Vellum::new(files.resolver()), variant);
    let disk = open(&files, variant, true);
    // VHD rounds the size up to its geometry.
    let mut model = Model::new(disk.size() / SECTOR);
    let mut random = Random::new(1);
    for tag in 1..8 {
        let request = Request::random(&mut random, model.sectors(), tag, false);
        request.perform(&disk).unwrap_or_else(|error| panic!("{}: {request:?}: {error:?}", variant.name));
        model.answered(&request, true);
    }
    disk.close().wait().unwrap();
    model.answered(&Request::Flush, true);
    model.check_now(&disk).unwrap();
    model.answered(&Request::Flush, true);
    (files.snapshot(), model)
}

/// Sends requests until `count` are answered; says what failed.
fn send(disk: &Disk, model: &mut Model, seed: u64, count: u64) -> Vec<(Request, Code)> {
    let mut random = Random::new(seed);
    let mut failed = Vec::new();
    for number in 0..count {
        let request = match number {
            // So that there is always a flush before and after a fault.
            5 | 10 => Request::Flush,
            _ => Request::random(&mut random, model.sectors(), 100 * seed + number + 1, true),
        };
        let result = request.perform(disk);
        model.answered(&request, result.is_ok());
        if let Err(error) = result {
            failed.push((request, error.code()));
        }
    }
    failed
}

/// No finding of ours is an error, and none of QEMU's.
fn check(files: &Arc<SimFiles>, variant: &Variant, what: &str, ask_qemu: bool) {
    let report = Vellum::new(files.resolver()).check(NAME, &options(variant, false));
    match report {
        Ok(report) => assert_eq!(report.errors, 0, "{what}: {:?}", report.findings),
        Err(error) if error.code() == Code::Feature => {}
        Err(error) => panic!("{what}: checking: {error:?}"),
    }
    if ask_qemu {
        let directory = tempfile::tempdir().unwrap();
        let set = files.snapshot();
        for name in set.names.keys() {
            std::fs::write(directory.path().join(name), set.get(name).unwrap().to_vec()).unwrap();
        }
        qemu_check(variant.qemu, &directory.path().join(NAME), true, what);
    }
}

/// One session in which `fault` strikes; whether it did.
fn session_with(variant: &Variant, start: &(FileSet, Model), fault: Fault, ask_qemu: bool) -> bool {
    let what = format!("{} {fault}", variant.name);
    let (set, mut model) = start.clone();
    let files = SimFiles::new(set);
    let disk = open(&files, variant, true);
    files.arm(Some(fault));
    let failed = send(&disk, &mut model, 2, 14);
    let struck = files.fault_struck();
    let wanted = if fault.kind == FaultKind::NoSpace { Code::NoSpace } else { Code::Io };
    if let Some((request, code)) = failed.first() {
        assert_eq!(*code, wanted, "{what}: {request:?}");
    }
    model.check_now(&disk).unwrap_or_else(|difference| panic!("{what}: while open: {difference}"));
    // Space is there again, but nothing is done for it: neither a flush nor a close.
    files.arm(None);
    drop(disk);
    check(&files, variant, &what, ask_qemu && struck);
    let recovered = model.check_recovered(&open(&files, variant, false));
    recovered.unwrap_or_else(|difference| panic!("{what}: opened again after {failed:?}: {difference}"));
    // It can be written as before.
    let disk = open(&files, variant, true);
    let failed = send(&disk, &mut model, 3, 6);
    assert!(failed.is_empty(), "{what}: written after that: {failed:?}");
    disk.close().wait().unwrap_or_else(|error| panic!("{what}: closing after that: {error:?}"));
    model.answered(&Request::Flush, true);
    let recovered = model.check_recovered(&open(&files, variant, false));
    recovered.unwrap_or_else(|difference| panic!("{what}: written after that: {difference}"));
    check(&files, variant, &what, false);
    struck
}

/// All points at first, then fewer and fewer; all of them with `VELLUM_ALL_POINTS=1`.
fn next_point(nth: u64) -> u64 {
    let all = std::env::var("VELLUM_ALL_POINTS").is_ok_and(|value| value == "1");
    nth + 1 + if all { 0 } else { nth / 24 }
}

/// Every operation of a session fails, one after the other.
fn each_change_fails(kind: FaultKind) {
    two_at_a_time(&writable(), |name| {
        let variant = variant(name);
        let start = prepared(&variant);
        let mut points = 0;
        for is_persistent in [false, true] {
            let mut nth = 0;
            loop {
                let fault = Fault { on: FaultOn::Change, nth, kind, is_persistent };
                if !session_with(&variant, &start, fault, points % 16 == 5) {
                    break;
                }
                points += 1;
                nth = next_point(nth);
            }
        }
        println!("{name}: {points} points");
        assert!(points > 10, "{name}: the fault struck at {points} points only");
    });
}

#[test]
fn no_space_at_any_operation_leaves_a_consistent_image() {
    each_change_fails(FaultKind::NoSpace);
}

#[test]
fn an_io_error_at_any_operation_leaves_a_consistent_image() {
    each_change_fails(FaultKind::Io);
}

#[test]
fn after_the_first_flush_that_failed_nothing_is_written_and_everything_fails() {
    two_at_a_time(&writable(), |name| {
        let variant = variant(name);
        let start = prepared(&variant);
        let mut points = 0;
        let mut nth = 0;
        loop {
            let fault = Fault { on: FaultOn::Flush, nth, kind: FaultKind::Io, is_persistent: false };
            if !one_flush_fails(&variant, &start, fault) {
                break;
            }
            points += 1;
            nth = next_point(nth);
        }
        assert!(points > 1, "{name}: {points} flushes only");
        println!("{name}: {points} flushes");
    });
}

/// The flush fails once; whether there was one.
fn one_flush_fails(variant: &Variant, start: &(FileSet, Model), fault: Fault) -> bool {
    let what = format!("{} {fault}", variant.name);
    let (set, mut model) = start.clone();
    let files = SimFiles::new(set);
    let disk = open(&files, variant, true);
    files.arm(Some(fault));
    let mut random = Random::new(4);
    for number in 0..40 {
        let request = match number % 5 {
            4 => Request::Flush,
            _ => Request::random(&mut random, model.sectors(), 1000 + number, false),
        };
        let result = request.perform(&disk);
        model.answered(&request, result.is_ok());
        if !files.fault_struck() {
            result.unwrap_or_else(|error| panic!("{what}: {request:?}: {error:?}"));
            continue;
        }
        // The flush may have been for a discard in the background of another request, but never goes unnoticed.
        let first = result.err().or_else(|| disk.flush_all().wait().err());
        assert_eq!(
            first.as_ref().map(|error| error.code()),
            Some(Code::Io),
            "{what}: {request:?}: {first:?}"
        );
        let what = format!("{what}: after {request:?}, {first:?}");
        let before = files.now();
        for request in [
            Request::Write(0..8, 1),
            Request::Write(4096..4097, 2),
            Request::Zero(0..4096, vellum::ZeroMode::MayUnmap),
            Request::Discard(0..4096),
            Request::Flush,
        ] {
            let error =
                request.perform(&disk).err().unwrap_or_else(|| panic!("{what}: {request:?} succeeded"));
            assert_eq!(error.code(), Code::Io, "{what}: {request:?}: {error:?}");
            assert!(error.hint_text().is_some(), "{what}: {error:?}");
        }
        disk.close().wait().expect_err("closing");
        assert_eq!(files.now(), before, "{what}: something was still sent to the file");
        model.check_now(&disk).unwrap_or_else(|difference| panic!("{what}: while open: {difference}"));
        drop(disk);
        check_opened_again(&files, variant, &mut model, &what);
        return true;
    }
    let closed = disk.close().wait();
    assert_eq!(closed.is_err(), files.fault_struck(), "{what}: closing: {closed:?}");
    drop(disk);
    check_opened_again(&files, variant, &mut model, &what);
    files.fault_struck()
}

fn check_opened_again(files: &Arc<SimFiles>, variant: &Variant, model: &mut Model, what: &str) {
    let recovered = model.check_recovered(&open(files, variant, false));
    recovered.unwrap_or_else(|difference| panic!("{what}: opened again: {difference}"));
    check(files, variant, what, false);
}
