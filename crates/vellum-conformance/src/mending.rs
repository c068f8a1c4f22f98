//! Carrying out what a check planned, and what a power loss in the middle of that leaves.

use vellum_core::{Buf, CheckReport, Fix, Preallocate, WriteFlags};

/// Carries out the plan of a check, in its order; `lossy` steps too if they may.
///
/// # Panics
/// If a file refuses.
pub fn carry_out(report: &CheckReport, lossy: bool) {
    report.fixes.iter().filter(|fix| lossy || !fix.is_lossy).for_each(|fix| step(report, fix, usize::MAX));
}

/// Carries out the first `steps` steps, and of the next one the first half of its writes.
///
/// # Panics
/// If a file refuses.
pub fn carry_out_in_part(report: &CheckReport, steps: usize) {
    report.fixes.iter().take(steps).for_each(|fix| step(report, fix, usize::MAX));
    if let Some(fix) = report.fixes.get(steps) {
        step(report, fix, fix.patches.len().div_ceil(2));
    }
}

/// The first `patches` writes of a step; if that is more than it has, the change of length, too.
fn step(report: &CheckReport, fix: &Fix, patches: usize) {
    for patch in fix.patches.iter().take(patches) {
        let storage = &report.storages[patch.storage];
        storage.write_at(Buf::copy_of(&patch.bytes), patch.offset, WriteFlags::default()).wait().1.unwrap();
    }
    if let Some((storage, len)) = fix.set_len.filter(|_| patches > fix.patches.len()) {
        report.storages[storage].set_len(len, Preallocate::Off).wait().unwrap();
    }
}
