//! Power losses at every moment of a random session: what a flush made durable is there, the rest is old or new, the
//! map never contradicts itself, and the counter covers it for every other program.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod common;
use common::guest::{check, create, findings, link_to, open_readable, open_writable};
use std::collections::HashSet;
use std::sync::Arc;
use vellum_conformance::power_loss::{Subject, WINDOW, file_set};
use vellum_core::{Buf, FlushPoint, OpenFlags, Resolver, Severity, WriteFlags};
use vellum_format_vdi::Vdi;
use vellum_sim::{Crash, Depth, Fault, FaultKind, FaultOn, FileSet, MemoryFiles, SimFiles, masks};

/// An image that is `dynamic`, `fixed` or the `child` of another.
fn subject(name: &'static str) -> Subject {
    let files = MemoryFiles::new();
    let resolver: Arc<dyn Resolver> = files.clone();
    let block = ("block_size", "4k");
    let mut content = vec![0; WINDOW as usize];
    let mut parent = None;
    if name == "child" {
        create(&resolver, "base.vdi", WINDOW, &[block], None).unwrap();
        let flags = OpenFlags { discard: true, ..OpenFlags::default() };
        let base = open_writable(&resolver, "base.vdi", flags, 1).unwrap();
        content = (0..WINDOW).map(|at| (at / 512) as u8 | 0x80).collect();
        base.write(Buf::copy_of(&content), 0, WriteFlags::default()).wait().1.unwrap();
        base.close().wait().unwrap();
        parent = Some(link_to(&resolver, "base.vdi"));
    }
    let variant = ("variant", if name == "fixed" { "fixed" } else { "dynamic" });
    create(&resolver, "d.vdi", WINDOW, &[block, variant], parent).unwrap();
    Subject {
        name,
        format: Arc::new(Vdi),
        path: "d.vdi",
        start: file_set(&files),
        content,
        identity,
        may_stay: |finding| finding.severity != Severity::Error && finding.message.contains("at the end"),
    }
}

/// `uuidModify` of the image.
fn identity(state: &FileSet) -> Vec<u8> {
    let mut uuid = vec![0; 16];
    state.get("d.vdi").unwrap().read(&mut uuid, 0x198);
    uuid
}

#[test]
fn power_losses_cost_space_at_most() {
    let depth = Depth { exhaustive: 6, samples: 12 };
    let mut all = 0;
    for (name, seeds) in [("dynamic", 0..5), ("child", 10..13), ("fixed", 20..22)] {
        let count = subject(name).crash(seeds, depth, None).unwrap_or_else(|wrong| panic!("{wrong}"));
        println!("{name}: {count} states");
        all += count;
    }
    assert!(all > 1000, "{all}");
}

/// A test of the test: without any one of the flushes, a bad state is found.
#[test]
fn every_flush_is_needed() {
    let depth = Depth { exhaustive: 6, samples: 12 };
    for point in [FlushPoint::Session, FlushPoint::Data, FlushPoint::Tables] {
        let wrong = ["dynamic", "fixed"]
            .into_iter()
            .find_map(|name| subject(name).crash(0..4, depth, Some(point)).err());
        println!("without {point:?}: {}", wrong.as_deref().unwrap_or("nothing is missed"));
        assert!(wrong.is_some(), "{point:?} is not needed");
    }
}

#[test]
fn a_failing_operation_leaves_a_sound_image() {
    let depth = Depth { exhaustive: 2, samples: 4 };
    let (mut struck, mut states) = (0, 0);
    for (name, seed) in [("dynamic", 31), ("child", 32)] {
        let subject = subject(name);
        for (on, kind) in [
            (FaultOn::Change, FaultKind::NoSpace),
            (FaultOn::Change, FaultKind::Io),
            (FaultOn::Flush, FaultKind::Io),
            (FaultOn::Read, FaultKind::Io),
        ] {
            for nth in 0..14 {
                let fault = Fault { on, nth: nth * 5, kind, is_persistent: nth % 3 == 2 };
                let (has_struck, looked_at) = subject.survives(seed, fault, depth);
                struck += u32::from(has_struck);
                states += looked_at;
            }
        }
    }
    println!("{struck} faults, {states} states");
    assert!(struck > 60, "{struck}");
}

/// Whether `qemu-img check` says one thing only: that the counter is greater than the number of entries.
fn is_count_ahead(said: &str) -> bool {
    let errors: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("ERROR: ")).collect();
    let [error] = errors[..] else { return false };
    let counts =
        error.strip_prefix("allocated blocks mismatch, is ").and_then(|rest| rest.split_once(", should be "));
    counts.is_some_and(|(entries, counter)| entries.parse::<u32>().unwrap() < counter.parse::<u32>().unwrap())
}

/// Of what a power loss leaves, `qemu-img` reads the same as we do, and where its check finds fault, ours finds lost
/// space: a counter that is greater than the number of blocks.
#[test]
fn qemu_img_reads_what_a_power_loss_leaves() {
    const MIB: u64 = 1 << 20;
    let memory = MemoryFiles::new();
    let resolver: Arc<dyn Resolver> = memory.clone();
    create(&resolver, "d.vdi", 6 * MIB, &[], None).unwrap();
    let start = file_set(&memory);
    let files = SimFiles::new(start.clone());
    let flags = OpenFlags { discard: true, ..OpenFlags::default() };
    let disk = open_writable(&files.resolver(), "d.vdi", flags, 5).unwrap();
    let write =
        |at: u64| disk.write(Buf::copy_of(&[at as u8 | 1; 700]), at, WriteFlags::default()).wait().1.unwrap();
    let flush = || disk.flush_all().wait().unwrap();
    [5 * MIB, 100, 2 * MIB + 9].into_iter().for_each(write);
    flush();
    write(MIB);
    disk.discard_range(0..MIB).wait().unwrap();
    flush();
    [9, 3 * MIB].into_iter().for_each(write);
    flush();
    disk.close().wait().unwrap();
    let directory = common::Directory::new();
    let trace = files.trace();
    let (mut states, mut lost) = (0, 0);
    let mut seen = HashSet::new();
    for moment in Crash::moments(&trace) {
        let crash = Crash::at(&trace, &start, moment);
        for mask in
            masks(&crash.members, Depth { exhaustive: 2, samples: 2 }, &mut vellum_sim::Random::new(1))
        {
            let state = crash.state(&mask);
            if !seen.insert(state.hash()) || seen.len() > 120 {
                continue;
            }
            states += 1;
            let ours = SimFiles::new(state.clone()).resolver();
            let report = check(&ours, "d.vdi").unwrap();
            assert_eq!(report.errors, 0, "{:?}", findings(&report));
            let path = directory.write("d.vdi", &state.get("d.vdi").unwrap().to_vec());
            let theirs =
                std::process::Command::new("qemu-img").args(["check", "-f", "vdi", &path]).output().unwrap();
            let is_counted =
                findings(&report).iter().all(|what| what.contains("bytes at the end of the file belong"));
            assert_eq!(theirs.status.success(), is_counted, "{:?}", findings(&report));
            if !is_counted {
                let said = String::from_utf8_lossy(&theirs.stderr).into_owned();
                assert!(is_count_ahead(&said), "{said}");
                lost += 1;
            }
            let (raw, read) = (directory.path("raw"), open_readable(&ours, "d.vdi").unwrap());
            common::run("qemu-img", &["convert", "-f", "vdi", "-O", "raw", &path, &raw]);
            assert!(vellum_conformance::format::read_all(&read) == std::fs::read(&raw).unwrap());
        }
    }
    println!("{states} states, lost space in {lost}");
    assert!(states > 30);
}
