//! Power losses at every moment of random sessions: what a flush made durable is there, the rest is old or new, the tables
//! never contradict themselves, and the content id changed before the content did.

mod common;

use common::model::{check_at, create, create_child, findings, open_at, writing};
use common::*;
use std::collections::HashSet;
use std::sync::Arc;
use vellum_core::{Buf, Disk, Events, FlushPoint, OpenFlags, Severity, WriteFlags, ZeroMode, mutation};
use vellum_sim::{
    Content, Crash, Depth, Fault, FaultKind, FaultOn, FileSet, MemoryFiles, Oracle, Random, RequestKind,
    SimFiles, hash_of, masks,
};

const BLOCK: u64 = 4096;
const FLAGS: OpenFlags = OpenFlags {
    read_only: false,
    honor_zeroes: false,
    honor_same: false,
    inform_zeroes: false,
    discard: true,
    ignore_flush: false,
};

/// Name, options, size, has a parent, has no tables at first.
type Kind = (&'static str, &'static [(&'static str, &'static str)], u64, bool, bool);
const GRAIN: (&str, &str) = ("grain_size", "4096");
const SMALL: u64 = 12 * BLOCK + 512;
const KINDS: [Kind; 7] = [
    ("flat", &[("subformat", "monolithicFlat")], SMALL, false, false),
    ("plain", &[GRAIN], SMALL, false, false),
    ("zeroed", &[GRAIN, ("zeroed_grain", "on")], SMALL, false, false),
    ("child", &[GRAIN], SMALL, true, false),
    ("zeroed child", &[GRAIN, ("zeroed_grain", "on")], SMALL, true, false),
    ("no tables", &[GRAIN], SMALL, false, true),
    (
        "split",
        &[GRAIN, ("subformat", "twoGbMaxExtentSparse"), ("extent_size", "1M")],
        (1 << 20) + 3 * BLOCK,
        false,
        false,
    ),
];

struct Session {
    files: Arc<SimFiles>,
    start: FileSet,
    oracle: Oracle,
    /// Where requests go.
    window: std::ops::Range<u64>,
}

fn start((_, options, size, has_parent, has_no_tables): Kind) -> (FileSet, Vec<u8>) {
    let files = MemoryFiles::new();
    let mut content = vec![0; size as usize];
    if has_parent {
        create(&files, "base.vmdk", size, &[("dialect", "virtualbox")]);
        let base = common::model::open_rw(&files, "base.vmdk", 1).unwrap();
        content = (0..size).map(|at| (at / 512) as u8 | 0x80).collect();
        common::model::write(&base, 0, &content).unwrap();
        base.close().wait().unwrap();
    }
    create_child(&files, "d.vmdk", size, options, has_parent.then_some("base.vmdk")).unwrap();
    if has_no_tables {
        let mut bytes = files.get("d.vmdk").unwrap().to_vec();
        for field in [48, 56] {
            let at = u64::from_le_bytes(bytes[field..field + 8].try_into().unwrap()) as usize * 512;
            bytes[at..at + 4].fill(0);
        }
        files.put("d.vmdk", &bytes);
    }
    let mut set = FileSet::default();
    for path in files.paths() {
        set.put(&path, Content::from_bytes(&files.get(&path).unwrap().to_vec()));
    }
    (set, content)
}

impl Session {
    fn run(kind: Kind, seed: u64, steps: u64, fault: Option<Fault>) -> Session {
        let (start, content) = start(kind);
        let files = SimFiles::new(start.clone());
        let window = content.len() as u64 - SMALL.min(content.len() as u64)..content.len() as u64;
        let oracle = Oracle::new(Content::from_bytes(&content));
        let mut session = Session { files, start, oracle, window };
        let mut random = Random::new(seed);
        let resolver = session.files.resolver();
        let mut disk = open_at(&resolver, "d.vmdk", &writing(seed.into(), FLAGS)).unwrap();
        session.files.arm(fault);
        for step in 0..steps {
            let start = session.window.start + random.below(SMALL / 512) * 512;
            let len = match random.below(3) {
                0 => 512,
                1 => BLOCK,
                _ => 512 * (1 + random.below(40)),
            };
            let start = if random.below(2) == 0 { start / BLOCK * BLOCK } else { start };
            let range = start..(start + len).min(session.window.end);
            match random.below(12) {
                0..=4 => {
                    let data: Arc<[u8]> =
                        range.clone().map(|at| (at / 512 * 7 + step * 13) as u8 | 1).collect();
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
                        break; // the oracle knows one session
                    }
                    match open_at(&resolver, "d.vmdk", &writing(u128::from(seed + step), FLAGS)) {
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
        let number = self.oracle.begin(kind, self.files.now());
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
    let options = vellum_core::ChainOptions { events: Events::new(|_| {}), ..Default::default() };
    let disk = open_at(&files.resolver(), "d.vmdk", &options).map_err(|e| format!("{e:?}"))?;
    let bytes = read(&disk, 0, disk.size() as usize).map_err(|e| format!("{e:?}"))?;
    Ok(bytes.chunks(512).map(hash_of).collect())
}

/// Opens what a power loss left, looks at it, writes to it; what the guest sees, or what is wrong.
fn recover(state: &FileSet, window: &std::ops::Range<u64>) -> Result<Vec<u64>, String> {
    let files = SimFiles::new(state.clone());
    let resolver = files.resolver();
    let before = view(&files)?;
    let report = check_at(&resolver, "d.vmdk");
    if report.findings.iter().any(|finding| finding.severity == Severity::Error) {
        return Err(format!("check finds {:?}", findings(&report)));
    }
    if files.trace().changed_anything() {
        return Err("reading and checking changed something".into());
    }
    let disk = open_at(&resolver, "d.vmdk", &writing(99, FLAGS)).map_err(|e| format!("{e:?}"))?;
    let places = [window.start, window.start + 3 * BLOCK, window.end - 512];
    for at in places {
        common::model::write(&disk, at, &[0xcc; 512]).map_err(|e| format!("{e:?}"))?;
    }
    disk.close().wait().map_err(|e| format!("{e:?}"))?;
    let report = check_at(&resolver, "d.vmdk");
    if report.findings.iter().any(|finding| finding.severity != Severity::Leak) {
        return Err(format!("after recovery: {:?}", findings(&report)));
    }
    let mut after = view(&files)?;
    for at in places {
        let sector = (at / 512) as usize;
        if after[sector] != hash_of(&[0xcc; 512]) {
            return Err("what was written after recovery is not there".into());
        }
        after[sector] = before[sector];
    }
    if after != before {
        return Err("recovery changed what the guest reads".into());
    }
    if files.snapshot().get("base.vmdk").map(Content::hash) != state.get("base.vmdk").map(Content::hash) {
        return Err("the parent changed".into());
    }
    Ok(before)
}

/// The line of the content id.
fn identity(state: &FileSet) -> Vec<u8> {
    let mut text = vec![0; 2048];
    state.get("d.vmdk").unwrap().read(&mut text, 0);
    let at = text.windows(5).position(|window| window == b"\nCID=").unwrap();
    text[at..at + 13].to_vec()
}

fn crash(
    kind: Kind,
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
        let first = (identity(&session.start), view(&SimFiles::new(session.start.clone()))?);
        let mut seen = HashSet::new();
        let mut random = Random::new(seed);
        for moment in Crash::moments(&trace) {
            let crash = Crash::at(&trace, &session.start, moment);
            let allowed = session.oracle.after_crash(moment);
            for mask in masks(&crash.members, depth, &mut random) {
                let state = crash.state(&mask);
                if !seen.insert((moment, state.hash())) {
                    continue;
                }
                count += 1;
                let judge = |view: Vec<u64>| match allowed.violation(&view) {
                    Some(sector) => Err(format!("sector {sector} is neither old nor new")),
                    None if view != first.1 && identity(&state) == first.0 => {
                        Err("the content changed and the CID did not".to_owned())
                    }
                    None => Ok(()),
                };
                recover(&state, &session.window).and_then(judge).map_err(|what| {
                    format!(
                        "{} seed {seed} moment {moment} mask {mask}: {what}\n{}",
                        kind.0,
                        crash.explain(&mask)
                    )
                })?;
            }
        }
    }
    Ok(count)
}

#[test]
fn every_power_loss_leaves_old_or_new_data_and_sound_tables() {
    let mut total = 0;
    for kind in KINDS {
        let seeds = if kind.2 > SMALL { 0..1 } else { 0..3 };
        let depth = Depth { exhaustive: 4, samples: 16 };
        total += crash(kind, seeds, depth, None).unwrap_or_else(|what| panic!("{what}"));
    }
    println!("{total} states");
    assert!(total > 2000, "{total}");
}

#[test]
fn a_flush_that_is_left_out_is_missed() {
    for point in [FlushPoint::Session, FlushPoint::Data, FlushPoint::Tables] {
        let depth = Depth { exhaustive: 4, samples: 16 };
        let missed = KINDS.iter().take(4).any(|kind| crash(*kind, 0..6, depth, Some(point)).is_err());
        assert!(missed, "nobody misses {point:?}");
    }
}

#[test]
fn after_any_failure_the_image_is_sound() {
    for kind in KINDS.into_iter().take(6) {
        for (on, fault) in [
            (FaultOn::Change, FaultKind::NoSpace),
            (FaultOn::Flush, FaultKind::Io),
            (FaultOn::Change, FaultKind::Short),
        ] {
            for nth in (0..60).step_by(3) {
                let fault = Fault { on, kind: fault, nth, is_persistent: nth % 2 == 0 };
                let session = Session::run(kind, nth, 30, Some(fault));
                let state = session.files.snapshot();
                recover(&state, &session.window)
                    .unwrap_or_else(|what| panic!("{} {fault:?}: {what}", kind.0));
            }
        }
    }
}
