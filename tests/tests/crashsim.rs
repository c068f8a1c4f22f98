//! Crash simulation of every writable format: RELIABILITY.md section 3.3.
//!
//! `cargo test -p vellum-tests --test crashsim` checks 20 000 distinct crash states of each format that issue 3 names.
//! `VELLUM_CRASHSIM_STATES=1000000` asks for another number, `VELLUM_CRASHSIM_CASES=vdi,qcow2-child` for certain cases,
//! `VELLUM_CRASHSIM_SEED=7` for other random workloads. `VELLUM_CRASHSIM='case=..;..'` replays a failure (test `replay`).

use std::io::Write as _;
use std::sync::Mutex;
use vellum::FlushPoint;
use vellum_tests::crash::cases::{CASES, Case};
use vellum_tests::crash::cost::cost;
use vellum_tests::crash::hunt::{Report, hunt, mutate, replay};
use vellum_tests::parallel::two_at_a_time;

/// Prints past the test harness, which keeps what passing tests print to itself: the counts are part of the result.
macro_rules! tell {
    ($($what:tt)*) => { writeln!(std::io::stderr(), $($what)*).expect("standard error") };
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

fn cases() -> Vec<Case> {
    match std::env::var("VELLUM_CRASHSIM_CASES") {
        Ok(names) => names.split(',').map(Case::named).collect(),
        Err(_) => CASES.to_vec(),
    }
}

/// I1 to I11 hold of every crash state; failures come with a line that replays them.
#[test]
fn every_crash_state_keeps_what_was_promised() {
    let states = number("VELLUM_CRASHSIM_STATES", 20_000) as usize;
    let seed = number("VELLUM_CRASHSIM_SEED", 1);
    let reports: Mutex<Vec<Report>> = Mutex::default();
    let cases = cases();
    let names: Vec<&str> = cases.iter().map(|case| case.name).collect();
    two_at_a_time(&names, |name| {
        let case = Case::named(name);
        match hunt(case, states * case.share / 100, seed) {
            Ok(report) => {
                tell!("{report}");
                reports.lock().expect("no panic").push(report);
            }
            Err(failure) => panic!("{failure}"),
        }
    });
    let reports = reports.into_inner().expect("no panic");
    let states: usize = reports.iter().map(|report| report.states).sum();
    tell!("{states} distinct crash states of {} cases, no violation", reports.len());
}

/// Which flushes a format needs, as far as this simulator can see.
///
/// Session: raw and fixed VHD have no marks. QCOW2's must be durable before pointers are (the dirty bit) or before an image with
/// bitmaps changes; the first follows from the data flush, the second is not simulated. Tables: raw and flat images have
/// none; with a raw external data file QCOW2 maps all clusters from the start. Other: only QCOW2 has such flushes; here those
/// of internal snapshots are seen (refcount tables that grow: `writing_crash` of its crate).
fn needs(case: &Case, point: FlushPoint) -> bool {
    match point {
        FlushPoint::Session => !matches!(case.format, "raw" | "qcow2") && case.name != "vhd-fixed",
        FlushPoint::Tables => !matches!(case.name, "raw" | "vhd-fixed" | "vmdk-flat" | "qcow2-data-raw"),
        FlushPoint::Other => case.has_snapshots(),
        FlushPoint::Data => true,
    }
}

/// Each flush of each driver is needed: without it, the simulator finds a broken promise.
#[test]
fn no_flush_can_be_left_out() {
    let points = [FlushPoint::Session, FlushPoint::Data, FlushPoint::Tables, FlushPoint::Other];
    // The same code flushes whatever the size of the unit: large units show nothing more.
    let small = cases()
        .into_iter()
        .filter(|case| case.block <= 16 << 10 && case.name != "qcow2-512" || case.name == "vmdk-split");
    let all = small.flat_map(|case| points.map(|point| (case, point)));
    // Nobody else has others.
    let all: Vec<(&str, FlushPoint)> = all
        .filter(|(case, point)| *point != FlushPoint::Other || case.format == "qcow2")
        .map(|(case, point)| (case.name, point))
        .collect();
    two_at_a_time(&all, |(name, point)| {
        let case = Case::named(name);
        let is_needed = needs(&case, *point);
        let found = mutate(case, *point, if is_needed { 400 } else { 60 });
        match (&found, is_needed) {
            (Some(failure), true) => tell!("{name:16} without {point:?}: {}", failure.message),
            (None, false) => tell!("{name:16} without {point:?}: not missed; the format does not need it"),
            (None, true) => panic!("nobody misses the flush"),
            (Some(failure), false) => panic!("the flush is needed after all: {failure}"),
        }
    });
}

/// However many writes went before, a guest flush costs at most two flushes of a file, and a guest write none (but for
/// the first of a session, which sets the marks that the format has).
#[test]
fn a_guest_flush_costs_two_file_flushes_and_a_write_none() {
    for case in cases() {
        let cost = cost(case, 100);
        tell!(
            "{:16} at most {} flushes of a file for a guest flush, {} where space was let go, {} for a change ({} requests)",
            case.name,
            cost.flush,
            cost.flush_after_discard,
            cost.change,
            cost.requests
        );
        assert!(cost.flush <= 2 && cost.change == 0, "{}: {cost:?}", case.name);
        assert!(cost.flush_after_discard <= 4, "{}: {cost:?}", case.name);
    }
}

/// Workloads in which the simulator found something once, shrunk; all their crash states are gone through.
const FOUND: [&str; 2] = [
    // A map that a failed flush did not save was believed by the next session: it gave a block's place out again.
    "case=vdi;seed=0;flags=d;fault=flush.2.nospace.once;work=d8192+4096,c,W4096+512",
    // Requests that waited together for the session to begin tried it again one after the other, though its flush failed.
    "case=vhd;seed=277712296024147;flags=d;fault=flush.1.io.ever;work=w14336+4096/x0+2048/z7680+4096/w3584+1536/\
     w4096+4096/W2048+512/w14336+2048/z8704+4096",
];

#[test]
fn what_was_found_stays_mended() {
    for line in FOUND {
        replay(line).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

/// Replays the failure that `VELLUM_CRASHSIM` names.
#[test]
fn replay_of_a_failure() {
    if let Ok(line) = std::env::var("VELLUM_CRASHSIM")
        && let Err(failure) = replay(&line)
    {
        panic!("{failure}");
    }
}
