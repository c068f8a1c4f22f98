//! Power losses at every moment of random sessions: what a flush made durable is there, the rest is old or new, the tables
//! never contradict themselves, and the content id changed before the content did.

mod common;

use common::model::{create, create_child};
use common::*;
use vellum_conformance::power_loss::{BLOCK, Subject, WINDOW, file_set};
use vellum_core::{FlushPoint, Severity};
use vellum_sim::{Depth, Fault, FaultKind, FaultOn, FileSet, MemoryFiles};

/// Name, options, size, has a parent, has no tables at first.
type Kind = (&'static str, &'static [(&'static str, &'static str)], u64, bool, bool);
const GRAIN: (&str, &str) = ("grain_size", "4096");
const KINDS: [Kind; 7] = [
    ("flat", &[("subformat", "monolithicFlat")], WINDOW, false, false),
    ("plain", &[GRAIN], WINDOW, false, false),
    ("zeroed", &[GRAIN, ("zeroed_grain", "on")], WINDOW, false, false),
    ("child", &[GRAIN], WINDOW, true, false),
    ("zeroed child", &[GRAIN, ("zeroed_grain", "on")], WINDOW, true, false),
    ("no tables", &[GRAIN], WINDOW, false, true),
    (
        "split",
        &[GRAIN, ("subformat", "twoGbMaxExtentSparse"), ("extent_size", "1M")],
        (1 << 20) + 3 * BLOCK,
        false,
        false,
    ),
];

fn subject((name, options, size, has_parent, has_no_tables): Kind) -> Subject {
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
    Subject {
        name,
        format: vmdk(),
        path: "d.vmdk",
        start: file_set(&files),
        content,
        identity,
        may_stay: |finding| finding.severity == Severity::Leak,
    }
}

/// The line of the content id.
fn identity(state: &FileSet) -> Vec<u8> {
    let mut text = vec![0; 2048];
    state.get("d.vmdk").unwrap().read(&mut text, 0);
    let at = text.windows(5).position(|window| window == b"\nCID=").unwrap();
    text[at..at + 13].to_vec()
}

#[test]
fn every_power_loss_leaves_old_or_new_data_and_sound_tables() {
    let mut total = 0;
    for kind in KINDS {
        let seeds = if kind.2 > WINDOW { 0..1 } else { 0..3 };
        let depth = Depth { exhaustive: 4, samples: 16 };
        total += subject(kind).crash(seeds, depth, None).unwrap_or_else(|what| panic!("{what}"));
    }
    println!("{total} states");
    assert!(total > 2000, "{total}");
}

#[test]
fn a_flush_that_is_left_out_is_missed() {
    for point in [FlushPoint::Session, FlushPoint::Data, FlushPoint::Tables] {
        let depth = Depth { exhaustive: 4, samples: 16 };
        let missed = KINDS.iter().take(4).any(|kind| subject(*kind).crash(0..6, depth, Some(point)).is_err());
        assert!(missed, "nobody misses {point:?}");
    }
}

#[test]
fn after_any_failure_the_image_is_sound() {
    let depth = Depth { exhaustive: 0, samples: 2 };
    let (mut struck, mut states) = (0, 0);
    for kind in KINDS.into_iter().take(6) {
        let subject = subject(kind);
        for (on, fault) in [
            (FaultOn::Change, FaultKind::NoSpace),
            (FaultOn::Flush, FaultKind::Io),
            (FaultOn::Change, FaultKind::Short),
        ] {
            for nth in (0..60).step_by(3) {
                let fault = Fault { on, kind: fault, nth, is_persistent: nth % 2 == 0 };
                let (has_struck, looked_at) = subject.survives(nth, fault, depth);
                struck += u32::from(has_struck);
                states += looked_at;
            }
        }
    }
    println!("{struck} faults, {states} states");
    assert!(struck > 200, "{struck}");
}
