//! One case from end to end: workloads until enough states were seen, a small failure if there is one, counts.

use super::cases::Case;
use super::explore::{Explorer, Failure, Settings};
use super::guest::Workload;
use super::peer::Peer;
use super::shrink::shrink;
use super::workloads::Workloads;
use std::fmt;
use std::time::Instant;
use vellum::FlushPoint;
use vellum_sim::Mask;

/// What was gone through.
#[derive(Clone, Debug)]
pub struct Report {
    /// The case.
    pub name: &'static str,
    /// Distinct crash states.
    pub states: usize,
    /// Of these, crashes inside a recovery.
    pub recovery_states: usize,
    /// Workloads.
    pub workloads: usize,
    /// States that QEMU looked at.
    pub peer: usize,
    /// Time.
    pub seconds: f64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:16} {:>8} states ({:>6} in recovery), {:>6} workloads, {:>3} seen by qemu-img, {:6.1} s, {:>6.0} states/s",
            self.name,
            self.states,
            self.recovery_states,
            self.workloads,
            self.peer,
            self.seconds,
            self.states as f64 / self.seconds.max(0.001)
        )
    }
}

/// Goes through at least `states` distinct crash states of `case`.
///
/// # Errors
/// The first failure, made small.
pub fn hunt(case: Case, states: usize, seed: u64) -> Result<Report, Box<Failure>> {
    let began = Instant::now();
    let mut explorer = explorer(case, Settings::default())?;
    explorer.peer = case.peer.map(|_| Peer::new(20, (states as u64 / 60).max(1)));
    let workloads = Workloads::new(case, seed);
    let mut number = 0;
    while explorer.distinct.len() < states {
        let workload = workloads.get(number);
        number += 1;
        if let Err(failure) = explorer.explore(&workload) {
            return Err(Box::new(shrink(&mut explorer, *failure)));
        }
    }
    Ok(Report {
        name: case.name,
        states: explorer.distinct.len(),
        recovery_states: explorer.recovery_states,
        workloads: explorer.workloads,
        peer: explorer.peer.as_ref().map_or(0, |peer| peer.looked),
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// Leaves out the flushes of one kind and looks for a broken promise, in at most so many workloads.
///
/// # Errors
/// None: what is found is what was looked for. `None` if nothing was.
pub fn mutate(case: Case, point: FlushPoint, workloads: usize) -> Option<Failure> {
    let settings = Settings { left_out: Some(point), again: 0, ..Settings::default() };
    let mut explorer = explorer(case, settings).unwrap_or_else(|failure| panic!("{failure}"));
    let all = Workloads::new(case, 1);
    // Without faults: those are another matter.
    let numbers = (0..).filter(|number| number % 10 < 8).take(workloads);
    for number in numbers {
        if let Err(failure) = explorer.explore(&all.get(number)) {
            return Some(*failure);
        }
    }
    None
}

/// An explorer of `case`.
///
/// # Errors
/// The image cannot be made.
pub fn explorer(case: Case, settings: Settings) -> Result<Explorer, Box<Failure>> {
    Explorer::new(case, settings).map_err(|error| {
        Box::new(Failure {
            case,
            workload: Workload::default(),
            path: Vec::new(),
            message: format!("the image cannot be made: {error:?}"),
            explanation: String::new(),
        })
    })
}

/// Follows a replay line: `case=..;work=..;at=cut:mask>cut:mask`. Without `at` all states of the workload are gone
/// through.
///
/// # Errors
/// The failure, if it is still there.
pub fn replay(line: &str) -> Result<(), Box<Failure>> {
    let value = |key: &str| {
        let found = line.split(';').filter_map(|word| word.split_once('=')).find(|(name, _)| *name == key);
        found.map(|(_, value)| value).filter(|value| !value.is_empty())
    };
    let case = Case::named(value("case").expect("a replay line names its case"));
    let workload: Workload = line.parse().expect("a replay line has a workload");
    let left_out = value("without").map(|name| match name {
        "Session" => FlushPoint::Session,
        "Data" => FlushPoint::Data,
        "Tables" => FlushPoint::Tables,
        _ => FlushPoint::Other,
    });
    let mut explorer = explorer(case, Settings { left_out, ..Settings::default() })?;
    match value("at") {
        None => explorer.explore(&workload),
        Some(path) => {
            let step = |step: &str| {
                let (cut, mask) = step.split_once(':').expect("a step is cut:mask");
                (cut.parse().expect("a cut is a number"), mask.parse::<Mask>().expect("a mask"))
            };
            explorer.replay(&workload, &path.split('>').map(step).collect())
        }
    }
}
