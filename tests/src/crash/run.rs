//! Running a workload on a fresh image: what was recorded, and what the oracle knows.

use super::cases::Case;
use super::guest::{GuestOp, Workload};
use super::start::{Start, open};
use super::verify::check;
use super::view::{View, content, view};
use parking_lot::Mutex;
use std::sync::Arc;
use vellum::{Buf, Disk, FlushPoint, Result, Storage, WithBuf, WriteFlags, ZeroMode, block_on, mutation};
use vellum_sim::{Content, Oracle, Random, RequestKind, SECTOR, SimFiles, Tag, Trace, hash_of, sector_bytes};

/// What a workload left.
pub struct Run {
    /// Every operation.
    pub trace: Trace,
    /// Every request.
    pub oracle: Oracle,
    /// Internal snapshots that were made.
    pub kept: Vec<Kept>,
    /// What went wrong without any crash.
    pub failure: Option<String>,
}

/// An internal snapshot: what it shows never changes as long as it is there.
#[derive(Clone)]
pub struct Kept {
    /// Its id.
    pub id: String,
    /// What it shows.
    pub content: Content,
    /// The same, as hashes.
    pub view: View,
    /// From this moment on it is there, whatever happens.
    pub from: usize,
    /// Until this moment.
    pub until: usize,
}

struct Shared {
    oracle: Oracle,
    is_busy: Vec<bool>,
    failure: Option<String>,
}

struct Guest<'a> {
    case: &'a Case,
    workload: &'a Workload,
    files: Arc<SimFiles>,
    disk: Option<Disk>,
    shared: Arc<Mutex<Shared>>,
    /// Flushes that had failed when the image was opened.
    failed_flushes: usize,
    kept: Vec<Kept>,
}

/// Flushes are left out as long as this lives.
struct LeftOut;

impl LeftOut {
    fn new(point: Option<FlushPoint>) -> Self {
        mutation::leave_out(point);
        LeftOut
    }
}

impl Drop for LeftOut {
    fn drop(&mut self) {
        mutation::leave_out(None);
    }
}

/// Runs `workload` on the image of `start`. With `left_out`, the driver's flushes of that kind are left out.
pub fn run(case: &Case, start: &Start, workload: &Workload, left_out: Option<FlushPoint>) -> Run {
    let _left_out = LeftOut::new(left_out);
    let files = SimFiles::new(start.files.clone());
    let shared = Shared {
        oracle: Oracle::new(start.disk.clone()),
        is_busy: vec![false; workload.tasks.len()],
        failure: None,
    };
    let shared = Arc::new(Mutex::new(shared));
    let mut guest = Guest { case, workload, files, disk: None, shared, failed_flushes: 0, kept: Vec::new() };
    guest.reopen();
    if guest.files.trace().changed_anything() {
        guest.fail("I8: opening for writing changed the image".to_owned());
    }
    guest.files.arm(workload.fault);
    guest.files.schedule(workload.is_concurrent().then_some(workload.seed));
    guest.all();
    guest.files.schedule(None);
    guest.files.arm(None);
    guest.look_at_the_end();
    let parents = &start.parents;
    let trace = guest.files.trace();
    if left_out.is_none() {
        guest.close_cleanly();
    }
    drop(guest.disk.take());
    if let Some(op) = trace.ops.iter().find(|op| parents.contains(&op.file)) {
        guest.fail(format!("I10: the parent was changed: {:x?}", op.kind));
    }
    let mut shared = guest.shared.lock();
    let oracle = std::mem::replace(&mut shared.oracle, Oracle::new(Default::default()));
    Run { trace, oracle, kept: guest.kept.clone(), failure: shared.failure.take() }
}

impl Guest<'_> {
    fn fail(&self, message: String) {
        self.shared.lock().failure.get_or_insert(message);
    }

    fn has_failed(&self) -> bool {
        self.shared.lock().failure.is_some()
    }

    fn reopen(&mut self) {
        self.failed_flushes = self.files.failed_flushes();
        self.shared.lock().oracle.new_session();
        match open(&self.files, self.case, true, self.workload.flags) {
            Ok(disk) => self.disk = Some(disk),
            Err(_) if self.files.fault_struck() => {}
            Err(error) => self.fail(format!("I1: the image does not open for writing: {error:?}")),
        }
    }

    /// Submits requests and completes operations, in an order that the seed chooses, until all is answered.
    fn all(&mut self) {
        let mut random = Random::new(self.workload.seed ^ 0x5eed);
        let mut next = vec![0usize; self.workload.tasks.len()];
        while !self.has_failed() {
            let busy = self.shared.lock().is_busy.clone();
            let ready: Vec<usize> =
                (0..next.len()).filter(|t| !busy[*t] && next[*t] < self.workload.tasks[*t].len()).collect();
            let waiting = self.files.waiting() > 0;
            if ready.is_empty() && !waiting {
                if busy.contains(&true) {
                    self.fail("a request is never answered although no operation is under way".to_owned());
                }
                return;
            }
            // Requests pile up now and then: that is where they meet.
            if ready.is_empty() || waiting && random.below(3) == 0 {
                self.files.pump();
                continue;
            }
            let task = *random.pick(&ready);
            let op = self.workload.tasks[task][next[task]].clone();
            next[task] += 1;
            if self.disk.is_none() {
                self.reopen();
            }
            let Some(disk) = self.disk.clone() else { return };
            self.submit(&disk, task, &op);
        }
    }

    fn submit(&mut self, disk: &Disk, task: usize, op: &GuestOp) {
        self.shared.lock().is_busy[task] = true;
        let number = self.shared.lock().oracle.requests().len();
        match *op {
            GuestOp::Write(at, len) => self.write(disk, task, at, tagged(at, len, number), false),
            GuestOp::Fua(at, len) => self.write(disk, task, at, tagged(at, len, number), true),
            GuestOp::WriteZeros(at, len) => self.write(disk, task, at, vec![0; len as usize], false),
            GuestOp::WriteSame(at, len) => {
                let (buf, result) = disk.read_at(Buf::zeroed(len as usize), at).wait();
                let same = result.map_or_else(|_| tagged(at, len, number), |()| buf.to_vec());
                self.write(disk, task, at, same, false);
            }
            GuestOp::Zero(at, len) => {
                let end = self.begins(RequestKind::Zero(at..at + len), task);
                disk.write_zeroes(at..at + len, ZeroMode::MayUnmap).on_complete(end);
            }
            GuestOp::ZeroKeep(at, len) => {
                let end = self.begins(RequestKind::Zero(at..at + len), task);
                disk.write_zeroes(at..at + len, ZeroMode::KeepAllocated).on_complete(end);
            }
            GuestOp::Discard(at, len) => {
                let end = self.begins(RequestKind::Discard(at..at + len), task);
                disk.discard_range(at..at + len).on_complete(end);
            }
            GuestOp::Flush => {
                let end = self.begins(RequestKind::Flush, task);
                disk.flush_all().on_complete(end);
            }
            GuestOp::Close => {
                let end = self.begins(RequestKind::Flush, task);
                disk.close().on_complete(end);
                self.disk = None;
            }
            GuestOp::Read(at, len) => self.read(disk, task, at, len),
            GuestOp::Snapshot | GuestOp::Apply | GuestOp::Delete => {
                self.shared.lock().is_busy[task] = false;
                self.submit(disk, task, &GuestOp::Close);
                if let Err(error) = self.change_snapshots(op, task) {
                    self.fail(format!("{op}: {error:?}"));
                }
            }
        }
    }

    /// In a session of its own, while nothing else is under way. Only in sequences without faults.
    fn change_snapshots(&mut self, op: &GuestOp, task: usize) -> Result<()> {
        let disk = open(&self.files, self.case, true, self.workload.flags)?;
        let image = &disk.layers()[0].image;
        let (Some(all), Some(session)) = (image.snapshots(), image.writable()) else { return Ok(()) };
        self.shared.lock().oracle.new_session();
        match op {
            GuestOp::Snapshot => {
                let content = content(&disk)?;
                block_on(session.begin())?;
                let made = block_on(all.create(format!("s{}", self.files.now()), 1_700_000_000))?;
                let (view, from) = (view(&disk)?, self.files.now());
                self.kept.push(Kept { id: made.id, content, view, from, until: usize::MAX });
            }
            GuestOp::Apply => {
                let Some(last) = self.kept.iter().rfind(|kept| kept.until == usize::MAX).cloned() else {
                    return Ok(());
                };
                block_on(session.begin())?;
                let data = last.content.to_vec().into();
                let end = self.begins(RequestKind::Write { offset: 0, data, fua: true }, task);
                end(block_on(all.apply(last.id)));
            }
            _ => {
                let now = self.files.now();
                let Some(first) = self.kept.iter_mut().find(|kept| kept.until == usize::MAX) else {
                    return Ok(());
                };
                first.until = now;
                let id = first.id.clone();
                block_on(session.begin())?;
                block_on(all.delete(id))?;
            }
        }
        block_on(session.close())
    }

    fn write(&mut self, disk: &Disk, task: usize, at: u64, data: Vec<u8>, fua: bool) {
        let buf = Buf::copy_of(&data);
        let end = self.begins(RequestKind::Write { offset: at, data: data.into(), fua }, task);
        let answered = move |(_, result): WithBuf| end(result);
        disk.write(buf, at, WriteFlags { fua }).on_complete(answered);
    }

    /// Notes that a request begins; what is returned notes that it ended.
    fn begins(&mut self, kind: RequestKind, task: usize) -> impl FnOnce(Result<()>) + Send + 'static {
        let mut shared = self.shared.lock();
        let begun = self.files.guest_begins(shared.oracle.requests().len());
        let number = shared.oracle.begin(kind, begun);
        let is_poisoned = self.files.failed_flushes() > self.failed_flushes;
        let (files, shared) = (self.files.clone(), self.shared.clone());
        move |result| {
            let mut shared = shared.lock();
            let ended = files.guest_ends(number, result.is_ok());
            shared.oracle.end(number, ended, result.is_ok());
            shared.is_busy[task] = false;
            match result {
                Ok(())
                    if is_poisoned
                        && !matches!(shared.oracle.requests()[number].kind, RequestKind::Discard(_)) =>
                {
                    let message = format!("G6: request {number} succeeded after a flush had failed");
                    shared.failure.get_or_insert(message);
                }
                Err(error) if !files.fault_struck() => {
                    let message = format!("request {number} failed though nothing was wrong: {error:?}");
                    shared.failure.get_or_insert(message);
                }
                _ => {}
            }
        }
    }

    fn read(&mut self, disk: &Disk, task: usize, at: u64, len: u64) {
        let (files, shared, from) = (self.files.clone(), self.shared.clone(), self.files.now());
        disk.read_at(Buf::zeroed(len as usize), at).on_complete(move |(buf, result)| {
            let mut shared = shared.lock();
            shared.is_busy[task] = false;
            if let Err(error) = result {
                if !files.fault_struck() {
                    shared
                        .failure
                        .get_or_insert(format!("a read failed though nothing was wrong: {error:?}"));
                }
                return;
            }
            let allowed = shared.oracle.readable(from, files.now());
            let first = at / SECTOR;
            for (index, bytes) in buf.chunks(SECTOR as usize).enumerate() {
                let sector = first + index as u64;
                if !allowed.allows(sector, hash_of(bytes)) {
                    let found = describe(bytes);
                    shared.failure.get_or_insert(format!("a read of sector {sector} gave {found}"));
                }
            }
        });
    }

    fn may_lose_space(&self) -> bool {
        let lets_go = |op: &GuestOp| !matches!(op, GuestOp::Write(..) | GuestOp::Fua(..) | GuestOp::Flush);
        matches!(self.case.format, "vhd" | "vmdk") && self.workload.tasks.iter().flatten().any(lets_go)
    }

    /// Without faults and crashes a closed image has no fault either, not even lost space, and shows what it showed.
    fn close_cleanly(&mut self) {
        if self.workload.fault.is_some() || self.has_failed() {
            return;
        }
        if let Some(disk) = self.disk.take()
            && let Err(error) = disk.close().wait()
        {
            return self.fail(format!("closing fails though nothing was wrong: {error:?}"));
        }
        match check(self.case, &self.files) {
            // VHD and VMDK have no place to note free space that lies between data: the next session finds it again.
            Ok(Some(report)) if report.errors == 0 && self.may_lose_space() => {}
            Ok(Some(report)) if !report.is_clean() => {
                self.fail(format!("after a clean close the check finds {:?}", report.findings));
            }
            Err(error) => self.fail(format!("after a clean close the check fails: {error:?}")),
            Ok(_) => {}
        }
        let now = self.files.now();
        let allowed = self.shared.lock().oracle.readable(now, now);
        match open(&self.files, self.case, false, self.workload.flags)
            .and_then(|disk| Ok((view(&disk)?, disk)))
        {
            Err(error) => self.fail(format!("after a clean close the disk cannot be read: {error:?}")),
            Ok((view, disk)) => {
                if let Some(sector) = allowed.violation(&view) {
                    self.fail(format!("after a clean close: {}", found_at(&disk, sector)));
                }
            }
        }
    }

    /// The whole disk, while it is open and after everything was answered.
    fn look_at_the_end(&mut self) {
        let Some(disk) = self.disk.clone().filter(|_| !self.has_failed()) else { return };
        let now = self.files.now();
        let allowed = self.shared.lock().oracle.readable(now, now);
        match view(&disk) {
            Err(error) => self.fail(format!("the disk cannot be read any more: {error:?}")),
            Ok(view) => {
                if let Some(sector) = allowed.violation(&view) {
                    self.fail(format!("before any crash: {}", found_at(&disk, sector)));
                }
            }
        }
    }
}

/// Tagged data for the bytes `at..at + len`.
fn tagged(at: u64, len: u64, number: usize) -> Vec<u8> {
    let first = at / SECTOR;
    let last = (at + len).div_ceil(SECTOR);
    let sectors: Vec<u8> = (first..last).flat_map(|sector| sector_bytes(sector, number as u64)).collect();
    let skip = (at - first * SECTOR) as usize;
    sectors[skip..skip + len as usize].to_vec()
}

/// What a sector holds, for people.
pub fn describe(bytes: &[u8]) -> String {
    match Tag::of(bytes) {
        Some(tag) => tag.to_string(),
        None if bytes.iter().all(|byte| *byte == 0) => "zeros".to_owned(),
        None => format!("something else ({:02x?} ...)", bytes.get(..24).unwrap_or_default()),
    }
}

/// What a sector of a disk holds, for people.
pub fn found_at(disk: &Disk, sector: u64) -> String {
    let len = SECTOR.min(disk.size().saturating_sub(sector * SECTOR)) as usize;
    let (buf, result) = disk.read_at(Buf::zeroed(len), sector * SECTOR).wait();
    let found = result.map_or_else(|error| format!("{error:?}"), |()| describe(&buf));
    format!("sector {sector} holds {found}, which is not allowed there")
}
