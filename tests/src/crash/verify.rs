//! What must hold of every crash state (RELIABILITY.md section 3.3, I1 to I11).

use super::cases::Case;
use super::run::{Kept, found_at};
use super::start::{DISK, Start, formats, open, open_state, storage, usual_flags};
use super::view::{Marks, View, content, marks, overlap, view};
use std::sync::Arc;
use vellum::{
    Buf, CheckReport, CheckRequest, Code, Disk, Events, Limits, Location, Severity, WriteFlags, block_on,
};
use vellum_sim::{
    Allowed, FileSet, Oracle, RequestKind, SECTOR, SimFiles, Tag, Trace, hash_of, mix, sector_bytes,
};

/// A crash state that kept every promise.
pub struct Survivor {
    /// What its guest sees, and the marks of the image.
    pub seen: (View, Marks),
    /// Everything that the first writing session after the crash did.
    pub recovery: Trace,
    /// The oracle of that session, for crashes inside it.
    pub oracle: Oracle,
    /// The files after that session was closed.
    pub recovered: FileSet,
}

/// What a crash state is held to.
#[derive(Clone, Copy)]
pub struct Promise<'a> {
    /// The contents of each sector.
    pub allowed: &'a Allowed,
    /// What was seen before the writing began.
    pub before: &'a (View, Marks),
    /// Snapshots were made or deleted: a QCOW2 image is marked dirty meanwhile, and right after recovery only.
    pub changes_snapshots: bool,
}

/// Checks one crash state: reading, opening for writing, the format's own check, one write, and all again.
pub fn verify(case: &Case, start: &Start, set: &FileSet, promise: Promise<'_>) -> Result<Survivor, String> {
    let Promise { allowed, before, changes_snapshots } = promise;
    let files = SimFiles::new(set.clone());
    let (seen, seen_marks) = read_only(case, &files, "after the crash")?;
    if let Some(sector) = allowed.violation(&seen) {
        let disk = open(&files, case, false, usual_flags()).map_err(|e| format!("{e:?}"))?;
        return Err(format!("I2/I3/I4/I11: {}", found_at(&disk, sector)));
    }
    is_marked(before, &seen, &seen_marks)?;
    if !(changes_snapshots && is_dirty(case, &files)) {
        no_errors(case, &files, "after the crash")?;
    }
    let disk = open(&files, case, true, usual_flags())
        .map_err(|e| format!("I1: the image does not open for writing: {e:?}"))?;
    let again =
        view(&disk).map_err(|e| format!("I1: the image cannot be read when open for writing: {e:?}"))?;
    if again != seen {
        return Err("opened for writing, the disk differs from what a reader sees".to_owned());
    }
    if files.trace().changed_anything() {
        return Err("I8: opening changed the image".to_owned());
    }
    let base = content(&disk).map_err(|e| format!("{e:?}"))?;
    let mut oracle = Oracle::new(base);
    let written = write_one(&files, &disk, &mut oracle, set.hash())?;
    drop(disk);
    let recovery = files.take_trace();
    if let Some(op) = recovery.ops.iter().find(|op| start.parents.contains(&op.file)) {
        return Err(format!("I10: recovery changed the parent: {:x?}", op.kind));
    }
    let (after, after_marks) = read_only(case, &files, "after recovery")?;
    let mut expected = seen.clone();
    expected[written as usize] = hash_of(&sector_bytes(written, Tag::RECOVERY));
    if let Some(sector) = after.iter().zip(&expected).position(|(a, b)| a != b) {
        let disk = open(&files, case, false, usual_flags()).map_err(|e| format!("{e:?}"))?;
        return Err(format!(
            "after sector {written} was written in recovery: {}",
            found_at(&disk, sector as u64)
        ));
    }
    let seen = (seen, seen_marks);
    is_marked(&seen, &after, &after_marks)?;
    no_errors(case, &files, "after recovery")?;
    idempotent(case, &files)?;
    Ok(Survivor { seen, recovery, oracle, recovered: files.snapshot() })
}

/// What internal snapshots show does not change.
pub fn snapshots(case: &Case, set: &FileSet, kept: &[Kept], moment: usize) -> Result<(), String> {
    for kept in kept.iter().filter(|kept| kept.from <= moment && moment <= kept.until) {
        let files = SimFiles::new(set.clone());
        let shown = open_state(&files, case, false, usual_flags(), Some(kept.id.clone()))
            .and_then(|disk| Ok((view(&disk)?, disk)));
        let (seen, disk) = shown.map_err(|e| format!("snapshot {}: {e:?}", kept.id))?;
        if let Some(sector) = seen.iter().zip(&kept.view).position(|(a, b)| a != b) {
            return Err(format!("snapshot {}: {}", kept.id, found_at(&disk, sector as u64)));
        }
    }
    Ok(())
}

/// An image whose content changed must not look unchanged to its children: the marks go first.
fn is_marked(before: &(View, Marks), now: &View, marks: &Marks) -> Result<(), String> {
    let has_marks = *marks != (None, None, None);
    match has_marks && before.0 != *now && before.1 == *marks {
        true => Err(format!("the content changed, but the marks that tell so did not: {marks:?}")),
        false => Ok(()),
    }
}

/// I1, I5, I8: opens for reading, lays nothing over anything, changes nothing.
fn read_only(case: &Case, files: &Arc<SimFiles>, when: &str) -> Result<(View, Marks), String> {
    let disk = open(files, case, false, usual_flags())
        .map_err(|e| format!("I1: the image does not open {when}: {e:?}"))?;
    let seen = view(&disk).map_err(|e| format!("I1: the disk cannot be read {when}: {e:?}"))?;
    match overlap(&disk) {
        Ok(None) => {}
        Ok(Some(what)) => return Err(format!("I5, {when}: {what}")),
        Err(error) => return Err(format!("I5, {when}: {error:?}")),
    }
    match files.trace().changed_anything() {
        true => Err(format!("I8: opening for reading changed the image {when}")),
        false => Ok((seen, marks(&disk))),
    }
}

/// Whether the image says that its counts must not be trusted.
fn is_dirty(case: &Case, files: &Arc<SimFiles>) -> bool {
    let disk = open(files, case, false, usual_flags());
    disk.is_ok_and(|disk| disk.layers()[0].image.info().dirty.is_some())
}

/// I6: leaks at most.
fn no_errors(case: &Case, files: &Arc<SimFiles>, when: &str) -> Result<(), String> {
    let Some(report) = check(case, files).map_err(|e| format!("I6: the check fails {when}: {e:?}"))? else {
        return Ok(());
    };
    let first = report.findings.iter().find(|finding| finding.severity == Severity::Error);
    match first {
        Some(finding) => Err(format!("I6, {when}: the check finds an error: {finding:?}")),
        None if report.errors > 0 => Err(format!("I6, {when}: the check counts {} errors", report.errors)),
        None => Ok(()),
    }
}

/// The format's check; `None` if it has none.
pub fn check(case: &Case, files: &Arc<SimFiles>) -> vellum::Result<Option<CheckReport>> {
    let request = CheckRequest {
        storage: storage(files)?,
        location: Location(DISK.to_owned()),
        resolver: files.resolver(),
        limits: Limits::default(),
        events: Events::default(),
        plan: false,
    };
    match block_on(formats().by_name(case.format)?.check(request)) {
        Ok(report) => Ok(Some(report)),
        Err(error) if error.code() == Code::Feature => Ok(None),
        Err(error) => Err(error),
    }
}

/// The first write after the crash: one sector, where the state says; flushed, closed. Returns the sector.
fn write_one(files: &Arc<SimFiles>, disk: &Disk, oracle: &mut Oracle, salt: u64) -> Result<u64, String> {
    let failed = |what: &str, e: vellum::Error| format!("I1: {what} fails after the crash: {e:?}");
    let sector = mix(salt, 3) % oracle.sectors();
    let data = sector_bytes(sector, Tag::RECOVERY);
    let kind = RequestKind::Write { offset: sector * SECTOR, data: data.as_slice().into(), fua: false };
    let write = oracle.begin(kind, files.guest_begins(0));
    disk.write(Buf::copy_of(&data), sector * SECTOR, WriteFlags::default())
        .wait()
        .1
        .map_err(|e| failed("writing", e))?;
    oracle.end(write, files.guest_ends(0, true), true);
    // Not always: closing must do by itself.
    if salt.is_multiple_of(2) {
        let flush = oracle.begin(RequestKind::Flush, files.guest_begins(1));
        disk.flush_all().wait().map_err(|e| failed("flushing", e))?;
        oracle.end(flush, files.guest_ends(1, true), true);
    }
    let close = oracle.begin(RequestKind::Flush, files.guest_begins(2));
    disk.close().wait().map_err(|e| failed("closing", e))?;
    oracle.end(close, files.guest_ends(2, true), true);
    Ok(sector)
}

/// I7: opened and closed once more, nothing changes.
fn idempotent(case: &Case, files: &Arc<SimFiles>) -> Result<(), String> {
    let before = files.snapshot().hash();
    let disk = open(files, case, true, usual_flags())
        .map_err(|e| format!("I7: the recovered image does not open again: {e:?}"))?;
    disk.close().wait().map_err(|e| format!("I7: the recovered image cannot be closed: {e:?}"))?;
    match files.snapshot().hash() == before {
        true => Ok(()),
        false => Err("I7: opening and closing the recovered image changed it".to_owned()),
    }
}
