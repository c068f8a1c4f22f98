//! Making a failure small: requests are taken away first, then what was lost is given back.

use super::explore::{Explorer, Failure};
use super::guest::Workload;
use std::time::{Duration, Instant};
use vellum_sim::Part;

/// Shrinking stops after so long.
const TIME_MAX: Duration = Duration::from_secs(20);

/// A failure of the same case with fewer requests, fewer tasks and less that was lost.
pub fn shrink(explorer: &mut Explorer, failure: Failure) -> Failure {
    let began = Instant::now();
    let peer = explorer.peer.take();
    let mut best = failure;
    let mut changed = true;
    while changed && began.elapsed() < TIME_MAX {
        changed = false;
        for smaller in smaller(&best.workload) {
            if began.elapsed() >= TIME_MAX {
                break;
            }
            if let Err(found) = explorer.explore(&smaller) {
                best = *found;
                changed = true;
                break;
            }
        }
    }
    let best = give_back(explorer, best);
    explorer.peer = peer;
    best
}

/// Workloads with one thing less.
fn smaller(workload: &Workload) -> Vec<Workload> {
    let mut found = Vec::new();
    if workload.fault.is_some() {
        found.push(Workload { fault: None, ..workload.clone() });
    }
    for task in 0..workload.tasks.len() {
        if workload.tasks.len() > 1 {
            let mut less = workload.clone();
            less.tasks.remove(task);
            found.push(less);
        }
    }
    for task in 0..workload.tasks.len() {
        for op in 0..workload.tasks[task].len() {
            let mut less = workload.clone();
            less.tasks[task].remove(op);
            if !less.is_empty() {
                found.push(less);
            }
        }
    }
    found
}

/// Leaves of the last crash only what is needed for the failure.
fn give_back(explorer: &mut Explorer, failure: Failure) -> Failure {
    let mut best = failure;
    let Some(last) = best.path.len().checked_sub(1) else { return best };
    for member in 0..best.path[last].1.0.len() {
        if best.path[last].1.0[member] == Part::Whole {
            continue;
        }
        let mut path = best.path.clone();
        path[last].1.0[member] = Part::Whole;
        if let Err(found) = explorer.replay(&best.workload.clone(), &path) {
            // The replay may fail earlier on the path; then it is another failure.
            if found.path.len() == best.path.len() {
                best = *found;
            }
        }
    }
    best
}
