//! Power losses at every moment of random sessions on a small disk: what a flush made durable is there, the rest is old or
//! new, the image can be checked and written again, and its mark of identity changed before its content did.
//!
//! Workloads of every kind, deeper crashes and other programs are the affair of the workspace's `crashsim`; this is what a
//! driver's own tests run.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use vellum_core::{
    Access, Asker, Buf, ChainOptions, CheckReport, CheckRequest, Disk, Events, Finding, FlushPoint, Format,
    FormatRegistry, Limits, Location, OpenFlags, Providers, Resolver, Severity, Storage, WriteAccess,
    WriteFlags, ZeroMode, block_on, mutation,
};
use vellum_sim::{
    Content, Crash, Depth, Fault, FileSet, MemoryFiles, Oracle, Random, RequestKind, SimFiles, hash_of, masks,
};

/// Unit of the disks.
pub const BLOCK: u64 = 4096;
/// Size of the disks, or of the window at their end that is written: the last block is a single sector.
pub const WINDOW: u64 = 12 * BLOCK + 512;

/// An image under test.
pub struct Subject {
    /// What messages call it.
    pub name: &'static str,
    /// Its driver.
    pub format: Arc<dyn Format>,
    /// Its main file.
    pub path: &'static str,
    /// All files at first.
    pub start: FileSet,
    /// What the disk holds at first.
    pub content: Vec<u8>,
    /// The bytes that tell children of a change.
    pub identity: fn(&FileSet) -> Vec<u8>,
    /// What a check may still find after the first session that follows a power loss.
    pub may_stay: fn(&Finding) -> bool,
}

/// All files, for [`Subject::start`].
pub fn file_set(files: &MemoryFiles) -> FileSet {
    let mut set = FileSet::default();
    for path in files.paths() {
        let bytes = files.get(&path).unwrap().to_vec();
        set.put(&path, Content::from_bytes(&bytes));
    }
    set
}

/// A session with everything recorded.
struct Session<'a> {
    subject: &'a Subject,
    files: Arc<SimFiles>,
    oracle: Oracle,
}

impl Subject {
    /// What is written of the disk.
    pub fn window(&self) -> Range<u64> {
        let size = self.content.len() as u64;
        size.saturating_sub(WINDOW)..size
    }

    fn open(&self, files: &Arc<SimFiles>, write: Option<u64>) -> vellum_core::Result<Disk> {
        let mut options = ChainOptions { events: Events::new(|_| ()), ..ChainOptions::default() };
        // Everything else must be recognisable whatever a power loss leaves.
        options.format = (self.format.name() == "raw").then(|| "raw".to_owned());
        if let Some(seed) = write {
            options.write = WriteAccess::Yes;
            options.providers = Some(Providers::seeded(u128::from(seed) << 3 | 5, 1_700_000_000));
        }
        options.disk.flags = OpenFlags { discard: true, ..OpenFlags::default() };
        let registry = FormatRegistry::new(vec![self.format.clone()]);
        block_on(registry.open_chain(&files.resolver(), self.path, &options)).map(|(disk, _)| disk)
    }

    /// What the driver's check says of a state.
    pub fn check(&self, files: &Arc<dyn Resolver>) -> vellum_core::Result<CheckReport> {
        let opened = block_on(files.open(self.path, &Asker::User, Access::default()))?;
        block_on(self.format.check(CheckRequest {
            storage: opened.storage,
            location: Location(self.path.to_owned()),
            resolver: files.clone(),
            limits: Limits::default(),
            events: Events::new(|_| ()),
            plan: true,
        }))
    }

    fn found(&self, files: &Arc<SimFiles>) -> Result<Vec<Finding>, String> {
        self.check(&files.resolver()).map(|report| report.findings).map_err(|e| format!("check: {e:?}"))
    }

    /// A hash for each sector of the disk.
    fn view(&self, files: &Arc<SimFiles>) -> Result<Vec<u64>, String> {
        let disk = self.open(files, None).map_err(|e| format!("{e:?}"))?;
        let (buf, result) = disk.read_at(Buf::zeroed(disk.size() as usize), 0).wait();
        result.map_err(|e| format!("{e:?}"))?;
        Ok(buf.chunks(512).map(hash_of).collect())
    }

    /// Opens what a power loss left, looks at it, writes to it; what the guest saw, or what is wrong.
    fn recover(&self, state: &FileSet) -> Result<Vec<u64>, String> {
        let files = SimFiles::new(state.clone());
        let before = self.view(&files)?;
        if let Some(found) = self.found(&files)?.iter().find(|found| found.severity == Severity::Error) {
            return Err(format!("check finds {found:?}"));
        }
        if files.trace().changed_anything() {
            return Err("reading and checking changed something".into());
        }
        let written = self.write_some(&files).map_err(|e| format!("writing after the power loss: {e:?}"))?;
        if let Some(found) = self.found(&files)?.iter().find(|found| !(self.may_stay)(found)) {
            return Err(format!("after recovery, check finds {found:?}"));
        }
        let mut after = self.view(&files)?;
        for sector in written {
            if after[sector] != hash_of(&[0xcc; 512]) {
                return Err("what was written after recovery is not there".into());
            }
            after[sector] = before[sector];
        }
        if after != before {
            return Err("recovery changed what the guest reads".into());
        }
        let now = files.snapshot();
        // The image's own files change; those of its parents do not.
        let parent = now.names.keys().find(|name| name.starts_with("base."));
        match parent
            .is_some_and(|name| now.get(name).map(Content::hash) != state.get(name).map(Content::hash))
        {
            true => Err("the parent changed".into()),
            false => Ok(before),
        }
    }

    /// Writes a few sectors and closes; which they were.
    fn write_some(&self, files: &Arc<SimFiles>) -> vellum_core::Result<[usize; 3]> {
        let window = self.window();
        let places = [window.start, window.start + 3 * BLOCK, window.end - 512];
        let disk = self.open(files, Some(99))?;
        for at in places {
            disk.write(Buf::copy_of(&[0xcc; 512]), at, WriteFlags::default()).wait().1?;
        }
        disk.close().wait()?;
        Ok(places.map(|at| (at / 512) as usize))
    }

    /// Runs sessions (without the flushes that are `left_out`) and looks at the states that a power loss at any moment can
    /// leave of each; how many there were.
    ///
    /// # Errors
    /// What is wrong with the first bad state.
    pub fn crash(
        &self,
        seeds: Range<u64>,
        depth: Depth,
        left_out: Option<FlushPoint>,
    ) -> Result<usize, String> {
        let mut count = 0;
        let first = ((self.identity)(&self.start), self.view(&SimFiles::new(self.start.clone()))?);
        for seed in seeds {
            mutation::leave_out(left_out);
            let mut session = Session::run(self, seed, 40, None);
            mutation::leave_out(None);
            let trace = session.files.trace();
            let mut seen = HashSet::new();
            let mut random = Random::new(seed);
            for moment in Crash::moments(&trace) {
                let crash = Crash::at(&trace, &self.start, moment);
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
                        None if view != first.1 && (self.identity)(&state) == first.0 => {
                            Err("the content changed and the identity did not".to_owned())
                        }
                        None => Ok(()),
                    };
                    self.recover(&state).and_then(judge).map_err(|wrong| {
                        let explained = crash.explain(&mask);
                        format!("{} seed {seed} moment {moment} mask {mask}: {wrong}\n{explained}", self.name)
                    })?;
                }
            }
        }
        Ok(count)
    }

    /// Runs a session with a fault. The process ended: the files are as it left them. Or the power went: some of it is
    /// there. Either way the image is sound, and what was answered with success is there. Whether the fault struck, and the
    /// states that were looked at.
    ///
    /// # Panics
    /// If the image is not sound.
    pub fn survives(&self, seed: u64, fault: Fault, depth: Depth) -> (bool, usize) {
        let mut session = Session::run(self, seed, 30, Some(fault));
        let struck = session.files.fault_struck();
        session.files.arm(None);
        let (now, trace) = (session.files.now(), session.files.trace());
        let allowed = session.oracle.after_crash(now);
        let judge = |state: &FileSet, explain: &dyn Fn() -> String| {
            let wrong = match self.recover(state) {
                Ok(view) => {
                    allowed.violation(&view).map(|sector| format!("sector {sector} is neither old nor new"))
                }
                Err(wrong) => Some(wrong),
            };
            if let Some(wrong) = wrong {
                panic!("{} seed {seed} {fault}: {wrong}\n{}", self.name, explain());
            }
        };
        judge(&session.files.snapshot(), &|| "the process was killed".to_owned());
        let crash = Crash::at(&trace, &self.start, now);
        let masks = masks(&crash.members, depth, &mut Random::new(seed));
        for mask in &masks {
            judge(&crash.state(mask), &|| crash.explain(mask));
        }
        (struck, masks.len() + 1)
    }
}

impl<'a> Session<'a> {
    fn run(subject: &'a Subject, seed: u64, steps: u64, fault: Option<Fault>) -> Self {
        let files = SimFiles::new(subject.start.clone());
        let oracle = Oracle::new(Content::from_bytes(&subject.content));
        let mut session = Session { subject, files, oracle };
        let mut random = Random::new(seed);
        let mut disk = subject.open(&session.files, Some(seed)).unwrap();
        session.files.arm(fault);
        for step in 0..steps {
            let range = session.range(&mut random);
            match random.below(12) {
                0..=4 => {
                    let data: Arc<[u8]> =
                        range.clone().map(|at| (at / 512 * 7 + step * 13) as u8 | 1).collect();
                    session.request(&disk, RequestKind::Write { offset: range.start, data, fua: false });
                }
                5 => session.request(&disk, RequestKind::Zero(range)),
                6..=8 => session.request(&disk, RequestKind::Discard(range)),
                9 | 10 => session.request(&disk, RequestKind::Flush),
                _ if random.below(3) == 0 => match session.reopen(&disk, seed + step) {
                    Some(again) => disk = again,
                    None => break, // what was not flushed is gone, and the oracle knows one session
                },
                _ => {}
            }
        }
        session.request(&disk, RequestKind::Flush);
        session
    }

    fn range(&self, random: &mut Random) -> Range<u64> {
        let window = self.subject.window();
        let sectors = (window.end - window.start) / 512;
        let start = window.start + random.below(sectors) * 512;
        let len = match random.below(3) {
            0 => 512,
            1 => BLOCK,
            _ => 512 * (1 + random.below(40)),
        };
        let start = if random.below(2) == 0 { (start / BLOCK * BLOCK).max(window.start) } else { start };
        start..(start + len).min(window.end)
    }

    /// Closes, which is a flush, and opens again.
    fn reopen(&mut self, disk: &Disk, seed: u64) -> Option<Disk> {
        let number = self.begin(RequestKind::Flush);
        let closed = disk.close().wait();
        self.end(number, closed.is_ok());
        closed.ok()?;
        match self.subject.open(&self.files, Some(seed)) {
            Ok(again) => Some(again),
            Err(error) => {
                assert!(self.files.fault_struck(), "{error:?}");
                Some(disk.clone())
            }
        }
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
