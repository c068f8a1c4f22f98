//! What a guest's requests cost in flushes of files.

use super::cases::Case;
use super::explore::Settings;
use super::guest::GuestOp;
use super::hunt::explorer;
use super::run::run;
use super::workloads::Workloads;
use std::collections::BTreeMap;
use vellum_sim::{Event, FileId, OpKind, RequestKind};

/// The most flushes of one file during a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// A flush of the guest, where nothing was discarded or zeroed before.
    pub flush: usize,
    /// A flush of the guest in workloads that discard: data may move into the holes.
    pub flush_after_discard: usize,
    /// A write or another change, where nothing was discarded or zeroed before.
    pub change: usize,
    /// Requests that were looked at.
    pub requests: usize,
}

/// Runs sequences without faults and counts. The first change of each session is left out: it sets the marks.
pub fn cost(case: Case, workloads: usize) -> Cost {
    let explorer = explorer(case, Settings::default()).unwrap_or_else(|failure| panic!("{failure}"));
    let all = Workloads::new(case, 3);
    let mut cost = Cost::default();
    for number in (0..).filter(|number| number % 10 < 6).take(workloads) {
        let workload = all.get(number);
        let ends = [GuestOp::Close, GuestOp::Snapshot, GuestOp::Apply, GuestOp::Delete];
        let has_close = workload.tasks.iter().flatten().any(|op| ends.contains(op));
        if has_close || workload.is_concurrent() {
            continue;
        }
        let discards = workload
            .tasks
            .iter()
            .flatten()
            .any(|op| matches!(op, GuestOp::Discard(..) | GuestOp::Zero(..) | GuestOp::WriteZeros(..)));
        let run = run(&case, &explorer.start, &workload, None);
        let mut is_begun = false;
        let mut flushes: BTreeMap<FileId, usize> = BTreeMap::new();
        for event in &run.trace.events {
            match event {
                Event::GuestBegins(_) => flushes.clear(),
                Event::Issued(op) if run.trace.ops[*op].kind == OpKind::Flush => {
                    *flushes.entry(run.trace.ops[*op].file).or_default() += 1;
                }
                Event::GuestEnds(request, _) => {
                    let most = flushes.values().copied().max().unwrap_or(0);
                    let kind = &run.oracle.requests()[*request].kind;
                    let is_flush = matches!(kind, RequestKind::Flush);
                    let of_flush = if discards { &mut cost.flush_after_discard } else { &mut cost.flush };
                    match kind {
                        RequestKind::Flush => *of_flush = most.max(*of_flush),
                        RequestKind::Write { fua: true, .. } if is_begun => *of_flush = most.max(*of_flush),
                        RequestKind::Write { fua: true, .. } => {}
                        // VDI may flush to get the slot of a discarded block back, when the disk has no other left.
                        _ if is_begun && !discards => cost.change = cost.change.max(most),
                        _ => {}
                    }
                    is_begun |= !is_flush;
                    cost.requests += 1;
                }
                _ => {}
            }
        }
    }
    cost
}
