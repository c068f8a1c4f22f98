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
use common::guest::{Random, check, create, findings, link_to, open_readable, open_writable};
use std::collections::HashSet;
use std::sync::Arc;
use vellum_core::{
    Buf, Disk, FlushPoint, OpenFlags, Resolver, Severity, Storage, WriteFlags, ZeroMode, mutation,
};
use vellum_sim::{
    Content, Crash, Depth, Fault, FaultKind, FaultOn, FileSet, MemoryFiles, Oracle, RequestKind, SimFiles,
    hash_of, masks,
};

const BLOCK: u64 = 4096;
const SIZE: u64 = 12 * BLOCK + 512;
const FLAGS: OpenFlags = OpenFlags {
    read_only: false,
    honor_zeroes: false,
    honor_same: false,
    inform_zeroes: false,
    discard: true,
    ignore_flush: false,
};

/// A session on a fresh image, a child or a fixed one, with everything recorded.
struct Session {
    files: Arc<SimFiles>,
    start: FileSet,
    oracle: Oracle,
}

fn put(set: &mut FileSet, files: &MemoryFiles, path: &str) {
    set.put(path, Content::from_bytes(&files.get(path).unwrap().to_vec()));
}

fn base_content() -> Vec<u8> {
    (0..SIZE).map(|at| (at / 512) as u8 | 0x80).collect()
}

/// The files that a session starts with, and what the disk holds.
fn start(kind: &str) -> (FileSet, Vec<u8>) {
    let files = MemoryFiles::new();
    let resolver: Arc<dyn Resolver> = files.clone();
    let mut set = FileSet::default();
    let block = ("block_size", "4k");
    let variant = ("variant", if kind == "fixed" { "fixed" } else { "dynamic" });
    if kind != "child" {
        create(&resolver, "d.vdi", SIZE, &[block, variant], None).unwrap();
        put(&mut set, &files, "d.vdi");
        return (set, vec![0; SIZE as usize]);
    }
    create(&resolver, "base.vdi", SIZE, &[block], None).unwrap();
    let base = open_writable(&resolver, "base.vdi", FLAGS, 1).unwrap();
    base.write(Buf::copy_of(&base_content()), 0, WriteFlags::default()).wait().1.unwrap();
    base.close().wait().unwrap();
    create(&resolver, "d.vdi", SIZE, &[block], Some(link_to(&resolver, "base.vdi"))).unwrap();
    put(&mut set, &files, "base.vdi");
    put(&mut set, &files, "d.vdi");
    (set, base_content())
}

impl Session {
    fn run(kind: &str, seed: u64, steps: u32, fault: Option<Fault>) -> Session {
        let (start, content) = start(kind);
        let files = SimFiles::new(start.clone());
        let mut session = Session { files, start, oracle: Oracle::new(Content::from_bytes(&content)) };
        let mut random = Random(seed);
        let resolver = session.files.resolver();
        let mut disk = open_writable(&resolver, "d.vdi", FLAGS, seed).unwrap();
        session.files.arm(fault);
        for step in 0..steps {
            let start = random.below(SIZE / 512) * 512;
            let len = match random.below(3) {
                0 => 512,
                1 => BLOCK,
                _ => 512 * (1 + random.below(40)),
            };
            let start = if random.below(2) == 0 { start / BLOCK * BLOCK } else { start };
            let range = start..(start + len).min(SIZE);
            match random.below(12) {
                0..=4 => {
                    let data: Arc<[u8]> =
                        range.clone().map(|at| (at / 512 * 7 + u64::from(step) * 13) as u8 | 1).collect();
                    session.request(&disk, RequestKind::Write { offset: start, data, fua: false });
                }
                5 => session.request(&disk, RequestKind::Zero(range)),
                6..=8 => session.request(&disk, RequestKind::Discard(range)),
                9 | 10 => session.request(&disk, RequestKind::Flush),
                _ if random.below(3) == 0 => {
                    let number = session.begin(RequestKind::Flush);
                    let closed = disk.close().wait();
                    session.end(number, closed.is_ok());
                    if closed.is_err() {
                        break; // what was not flushed is gone, and the oracle knows one session
                    }
                    match open_writable(&resolver, "d.vdi", FLAGS, seed + u64::from(step)) {
                        Ok(again) => disk = again,
                        Err(error) => assert!(session.files.fault_struck(), "{error:?}"),
                    }
                }
                _ => {}
            }
        }
        session.request(&disk, RequestKind::Flush);
        session
    }

    fn begin(&mut self, kind: RequestKind) -> usize {
        let now = self.files.now();
        let number = self.oracle.begin(kind, now);
        self.files.guest_begins(number);
        number
    }

    fn end(&mut self, number: usize, is_ok: bool) {
        assert!(is_ok || self.files.fault_struck(), "a request failed for no reason");
        let now = self.files.guest_ends(number, is_ok);
        self.oracle.end(number, now, is_ok);
    }

    fn request(&mut self, disk: &Disk, kind: RequestKind) {
        let number = self.begin(kind.clone());
        let result = match kind {
            RequestKind::Write { offset, data, .. } => {
                disk.write(Buf::copy_of(&data), offset, WriteFlags::default()).wait().1
            }
            RequestKind::Zero(range) => disk.write_zeroes(range, ZeroMode::MayUnmap).wait(),
            RequestKind::Discard(range) => disk.discard_range(range).wait(),
            RequestKind::Flush => disk.flush_all().wait(),
        };
        self.end(number, result.is_ok());
    }
}

/// A hash for each sector of the disk.
fn view(files: &Arc<SimFiles>) -> Result<Vec<u64>, String> {
    let disk = open_readable(&files.resolver(), "d.vdi").map_err(|e| format!("{e:?}"))?;
    let (buf, result) = disk.read_at(Buf::zeroed(SIZE as usize), 0).wait();
    result.map_err(|e| format!("{e:?}"))?;
    Ok(buf.chunks(512).map(hash_of).collect())
}

/// Opens what a power loss left, looks at it, writes to it; says what is wrong.
fn recover(state: &FileSet, base: Option<&Content>) -> Result<Vec<u64>, String> {
    let files = SimFiles::new(state.clone());
    let resolver = files.resolver();
    let before = view(&files)?;
    let report = check(&resolver, "d.vdi").map_err(|e| format!("check: {e:?}"))?;
    if report.findings.iter().any(|finding| finding.severity == Severity::Error) {
        return Err(format!("check finds {:?}", findings(&report)));
    }
    if files.trace().changed_anything() {
        return Err("reading and checking changed something".into());
    }
    let disk = open_writable(&resolver, "d.vdi", FLAGS, 99).map_err(|e| format!("{e:?}"))?;
    for block in [3u64, 12] {
        disk.write(Buf::copy_of(&[0xcc; 512]), block * BLOCK, WriteFlags::default())
            .wait()
            .1
            .map_err(|e| format!("{e:?}"))?;
    }
    disk.close().wait().map_err(|e| format!("{e:?}"))?;
    let report = check(&resolver, "d.vdi").map_err(|e| format!("check: {e:?}"))?;
    if report.errors > 0 || report.findings.iter().any(|finding| !finding.message.contains("at the end")) {
        return Err(format!("after recovery: {:?}", findings(&report)));
    }
    let mut after = view(&files)?;
    for block in [3, 12] {
        let sector = (block * BLOCK / 512) as usize;
        after[sector] = before[sector];
    }
    if after != before {
        return Err("recovery changed what the guest reads".into());
    }
    let base_now = base.map(|_| files.snapshot().get("base.vdi").unwrap().hash());
    if base_now != base.map(Content::hash) {
        return Err("the parent changed".into());
    }
    Ok(before)
}

/// `uuidModify` of the image.
fn identity(state: &FileSet) -> [u8; 16] {
    let mut uuid = [0; 16];
    state.get("d.vdi").unwrap().read(&mut uuid, 0x198);
    uuid
}

/// Runs sessions (without the flushes that are `left_out`) and looks at the states of each; returns how many there
/// were, or what is wrong with the first bad one.
fn crash(
    kind: &str,
    seeds: std::ops::Range<u64>,
    depth: Depth,
    left_out: Option<FlushPoint>,
) -> Result<usize, String> {
    let mut count = 0;
    for seed in seeds {
        mutation::leave_out(left_out);
        let mut session = Session::run(kind, seed, 40, None);
        mutation::leave_out(None);
        let trace = session.files.trace();
        let base = session.start.get("base.vdi").cloned();
        let first = (identity(&session.start), view(&SimFiles::new(session.start.clone()))?);
        let mut seen = HashSet::new();
        let mut random = vellum_sim::Random::new(seed);
        for moment in Crash::moments(&trace) {
            let crash = Crash::at(&trace, &session.start, moment);
            let allowed = session.oracle.after_crash(moment);
            for mask in masks(&crash.members, depth, &mut random) {
                let state = crash.state(&mask);
                // What is allowed differs from moment to moment; the rest is the same for the same bytes.
                if !seen.insert((moment, state.hash())) {
                    continue;
                }
                count += 1;
                let judge = |view: Vec<u64>| match allowed.violation(&view) {
                    Some(sector) => Err(format!("sector {sector} is neither old nor new")),
                    None if view != first.1 && identity(&state) == first.0 => {
                        Err("the content changed and uuidModify did not".to_owned())
                    }
                    None => Ok(()),
                };
                recover(&state, base.as_ref()).and_then(judge).map_err(|wrong| {
                    let explained = crash.explain(&mask);
                    format!("{kind} seed {seed} moment {moment} mask {mask}: {wrong}\n{explained}")
                })?;
            }
        }
    }
    Ok(count)
}

#[test]
fn power_losses_cost_space_at_most() {
    let depth = Depth { exhaustive: 6, samples: 12 };
    let mut all = 0;
    for (kind, seeds) in [("dynamic", 0..5), ("child", 10..13), ("fixed", 20..22)] {
        let count = crash(kind, seeds, depth, None).unwrap_or_else(|wrong| panic!("{wrong}"));
        println!("{kind}: {count} states");
        all += count;
    }
    assert!(all > 1000, "{all}");
}

/// A test of the test: without any one of the flushes, a bad state is found.
#[test]
fn every_flush_is_needed() {
    let depth = Depth { exhaustive: 6, samples: 12 };
    for point in [FlushPoint::Session, FlushPoint::Data, FlushPoint::Tables] {
        let wrong =
            ["dynamic", "fixed"].into_iter().find_map(|kind| crash(kind, 0..4, depth, Some(point)).err());
        println!("without {point:?}: {}", wrong.as_deref().unwrap_or("nothing is missed"));
        assert!(wrong.is_some(), "{point:?} is not needed");
    }
}

/// Whatever operation fails, and with or without a power loss afterwards: the image is sound, and what was answered
/// with success is there.
#[test]
fn a_failing_operation_leaves_a_sound_image() {
    let depth = Depth { exhaustive: 2, samples: 4 };
    let (mut struck, mut states) = (0, 0);
    for (kind, seed) in [("dynamic", 31), ("child", 32)] {
        for (on, fault) in [
            (FaultOn::Change, FaultKind::NoSpace),
            (FaultOn::Change, FaultKind::Io),
            (FaultOn::Flush, FaultKind::Io),
            (FaultOn::Read, FaultKind::Io),
        ] {
            for nth in 0..14 {
                let is_persistent = nth % 3 == 2;
                let fault = Fault { on, nth: nth * 5, kind: fault, is_persistent };
                let mut session = Session::run(kind, seed, 30, Some(fault));
                struck += u32::from(session.files.fault_struck());
                session.files.arm(None);
                let base = session.start.get("base.vdi").cloned();
                let (now, trace) = (session.files.now(), session.files.trace());
                let allowed = session.oracle.after_crash(now);
                // The process ended: the file is as it left it. And the power went: some of it is.
                let killed = recover(&session.files.snapshot(), base.as_ref())
                    .unwrap_or_else(|e| panic!("{fault}: {e}"));
                assert_eq!(allowed.violation(&killed), None, "{kind} {fault}");
                let crash = Crash::at(&trace, &session.start, now);
                for mask in masks(&crash.members, depth, &mut vellum_sim::Random::new(nth)) {
                    states += 1;
                    let view = recover(&crash.state(&mask), base.as_ref())
                        .unwrap_or_else(|e| panic!("{fault}: {e}\n{}", crash.explain(&mask)));
                    assert_eq!(allowed.violation(&view), None, "{kind} {fault}\n{}", crash.explain(&mask));
                }
            }
        }
    }
    println!("{struck} faults, {states} states");
    assert!(struck > 60, "{struck}");
}

/// Of what a power loss leaves, `qemu-img` reads the same as we do, and where its check finds fault, ours finds lost
/// space: a counter that is greater than the number of blocks.
#[test]
fn qemu_img_reads_what_a_power_loss_leaves() {
    const MIB: u64 = 1 << 20;
    let memory = MemoryFiles::new();
    let resolver: Arc<dyn Resolver> = memory.clone();
    create(&resolver, "d.vdi", 6 * MIB, &[], None).unwrap();
    let mut start = FileSet::default();
    put(&mut start, &memory, "d.vdi");
    let files = SimFiles::new(start.clone());
    let disk = open_writable(&files.resolver(), "d.vdi", FLAGS, 5).unwrap();
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
            lost += u32::from(!is_counted);
            let (raw, read) = (directory.path("raw"), open_readable(&ours, "d.vdi").unwrap());
            common::run("qemu-img", &["convert", "-f", "vdi", "-O", "raw", &path, &raw]);
            assert!(vellum_conformance::format::read_all(&read) == std::fs::read(&raw).unwrap());
        }
    }
    println!("{states} states, lost space in {lost}");
    assert!(states > 30);
}
