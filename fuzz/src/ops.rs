//! Sequences of guest requests against an image that is written in place.
//!
//! On a *valid* image every request must succeed, and what is read must be what a plain array of bytes holds after the
//! same requests. On a *mutated* one (`mutated.rs`) requests may fail; nothing may panic or hang, the files may not
//! grow beyond reason, and opening an image, or refusing to, changes no byte.

use crate::data;
use crate::files::Files;
use crate::input::{Input, Op};
use crate::mutated;
use crate::shapes::{self, Made, Shape};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vellum::{
    Buf, ChainOptions, CheckReport, Code, Disk, Limits, OpenFlags, Providers, Result, Storage, Vellum,
    WriteAccess, WriteFlags, ZeroMode,
};

/// Reopenings of one run: each compares the whole disk.
pub(crate) const REOPENED_MAX: usize = 4;
/// Data is compared so many bytes at a time.
const STEP: usize = 512;
static ZEROS: [u8; STEP] = [0; STEP];
static LOOSE: [bool; STEP] = [true; STEP];

/// How a run opens its image.
pub(crate) struct Session {
    pub(crate) shape: &'static Shape,
    pub(crate) files: Arc<Files>,
    pub(crate) flags: OpenFlags,
    /// Guests write sectors; the library takes bytes.
    pub(crate) grain: u64,
    /// Few pages of tables, so that some are evicted and written before their time.
    cache_bytes: Option<usize>,
}

/// Carries the input out against one of the shapes of `format`.
pub fn run(input: Input, format: &'static str) {
    let shape = shapes::choose(format, input.shape);
    let made = shapes::made(shape);
    let session = |files| Session {
        shape,
        files,
        flags: flags(input.flags),
        grain: if input.flags & 0x80 != 0 { 1 } else { 512 },
        cache_bytes: (input.flags & 0x40 != 0).then_some(made.few_tables_bytes),
    };
    if input.mutations.is_empty() {
        count(true);
        let size = made.disk.len() as u64;
        // What a killed process leaves behind may be lost for good, once for each reopening.
        // Formats make the file a MiB or two longer ahead of need; that is a hole.
        let sessions = REOPENED_MAX as u64 + 2;
        let (growth, longer) = (sessions * size + (2 << 20), sessions * (2 * size + (2 << 20)));
        let files = Files::new(&made.files, growth, longer);
        Valid::new(session(files), &made).run(&input.ops);
    } else {
        count(false);
        let files = Files::new(&made.files, mutated::GROWTH_MAX, u64::MAX);
        mutated::run(session(files), &input, input.flags & 0x10 != 0, input.flags & 0x20 != 0);
    }
}

/// Says now and then how many runs were of which kind.
fn count(is_valid: bool) {
    static RUNS: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];
    RUNS[usize::from(is_valid)].fetch_add(1, Ordering::Relaxed);
    let [mutated, valid] = [0, 1].map(|kind| RUNS[kind].load(Ordering::Relaxed));
    if (mutated + valid).is_multiple_of(1_000_000) {
        eprintln!("{valid} runs on valid images, {mutated} on mutated ones");
    }
}

pub(crate) fn flags(bits: u8) -> OpenFlags {
    OpenFlags {
        read_only: false,
        honor_zeroes: bits & 1 != 0,
        honor_same: bits & 2 != 0,
        inform_zeroes: bits & 4 != 0,
        discard: bits & 8 == 0,
        ignore_flush: false,
    }
}

impl Session {
    pub(crate) fn open(&self, skip_checks: bool) -> Result<Disk> {
        let mut options = self.options();
        options.write = WriteAccess::Yes;
        options.skip_consistency_checks = skip_checks;
        options.disk.flags = self.flags;
        Ok(self.vellum().open(shapes::NAME, &options)?.0)
    }

    pub(crate) fn check(&self) -> Result<CheckReport> {
        self.vellum().check(shapes::NAME, &self.options())
    }

    fn vellum(&self) -> Vellum {
        Vellum::new(self.files.clone())
    }

    fn options(&self) -> ChainOptions {
        let mut limits = Limits::default();
        limits.table_cache_bytes = self.cache_bytes.unwrap_or(limits.table_cache_bytes);
        ChainOptions {
            format: Some(self.shape.format.into()),
            providers: Some(Providers::seeded(1, 1_700_000_000)),
            probe_parents: true,
            limits,
            ..ChainOptions::default()
        }
    }
}

/// A disk that must do as an array does.
struct Valid<'a> {
    session: Session,
    made: &'a Made,
    disk: Disk,
    model: Vec<u8>,
    /// Discarded, and maybe not zero yet: that may come when the rest of its unit is discarded, too. Empty if nothing is.
    loose: Vec<bool>,
    reopened: usize,
    is_clean: bool,
}

impl<'a> Valid<'a> {
    fn new(session: Session, made: &'a Made) -> Self {
        let disk = session.open(false).unwrap_or_else(|error| panic!("{}: {error:?}", session.shape.name));
        let model = made.disk.clone();
        Valid { session, made, disk, model, loose: Vec::new(), reopened: 0, is_clean: true }
    }

    fn name(&self) -> &'static str {
        self.session.shape.name
    }

    fn run(mut self, ops: &[Op]) {
        for op in ops {
            self.step(op).unwrap_or_else(|error| panic!("{}: {op:?}: {error:?}", self.name()));
        }
        self.reopen(true).unwrap_or_else(|error| panic!("{}: at the end: {error:?}", self.name()));
        self.check();
        self.check_parents();
        if self.session.shape.has_snapshot() {
            self.check_snapshot().unwrap_or_else(|error| panic!("{}: the snapshot: {error:?}", self.name()));
        }
    }

    fn step(&mut self, op: &Op) -> Result<()> {
        let (size, grain) = (self.model.len() as u64, self.session.grain);
        match *op {
            Op::Write { at, choice, fua } => {
                let range = at.range(size, grain);
                let mut buf = Buf::zeroed((range.end - range.start) as usize);
                data::fill(&mut buf, range.start, choice);
                self.model[places(&range)].copy_from_slice(&buf);
                self.disk.write(buf, range.start, WriteFlags { fua }).wait().1?;
                self.set_loose(&range, false);
            }
            Op::Zero { at, unmap } => {
                let range = at.range(size, grain);
                let mode = if unmap { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
                self.disk.write_zeroes(range.clone(), mode).wait()?;
                self.model[places(&range)].fill(0);
                self.set_loose(&range, false);
            }
            Op::Discard { at } => {
                let range = at.range(size, grain);
                self.disk.discard_range(range.clone()).wait()?;
                self.set_loose(&range, true);
                self.compare(places(&range), "discarded")?;
            }
            Op::Read { at } => self.compare(places(&at.range(size, grain)), "read")?,
            Op::Flush => self.disk.flush_all().wait()?,
            Op::Reopen { clean } => {
                if self.reopened < REOPENED_MAX {
                    self.reopened += 1;
                    self.reopen(clean)?;
                }
            }
            Op::Flags(bits) => {
                self.session.flags = flags(bits);
                self.disk.set_flags(self.session.flags)?;
            }
        }
        Ok(())
    }

    fn set_loose(&mut self, range: &Range<u64>, is_loose: bool) {
        if is_loose {
            self.loose.resize(self.model.len(), false);
        }
        if !self.loose.is_empty() {
            self.loose[places(range)].fill(is_loose);
        }
    }

    /// Closes, or only flushes and forgets, as a process that is killed after a flush; then compares all.
    fn reopen(&mut self, clean: bool) -> Result<()> {
        if clean {
            self.disk.close().wait()?;
        } else {
            self.disk.flush_all().wait()?;
            self.is_clean = false;
        }
        self.disk = self.session.open(false)?;
        self.compare(0..self.model.len(), "opened again")
    }

    /// Reads `range` and compares; what was discarded may have become zero.
    fn compare(&mut self, range: Range<usize>, what: &str) -> Result<()> {
        let (found, result) = self.disk.read_at(Buf::zeroed(range.len()), range.start as u64).wait();
        result?;
        if found[..] == self.model[range.clone()] {
            return Ok(());
        }
        for (at, found) in range.clone().step_by(STEP).zip(found.chunks(STEP)) {
            let (here, is_zero) = (at..at + found.len(), found == &ZEROS[..found.len()]);
            if self.model[here.clone()] == *found {
                continue;
            }
            // The usual case, and a quick look: all of it was let go, and went.
            if is_zero && self.loose.get(here.clone()) == Some(&LOOSE[..found.len()]) {
                self.model[here].fill(0);
            } else {
                self.compare_bytes(at, found, what);
            }
        }
        Ok(())
    }

    fn compare_bytes(&mut self, start: usize, found: &[u8], what: &str) {
        for (at, found) in (start..).zip(found.iter().copied()) {
            let known = self.model[at];
            let is_loose = self.loose.get(at).is_some_and(|loose| *loose);
            let is_right = found == known || found == 0 && is_loose;
            assert!(is_right, "{}: {what}: byte {at:#x} is {found:#x}, not {known:#x}", self.name());
            self.model[at] = found;
        }
    }

    fn check(&self) {
        match self.session.check() {
            Ok(report) => {
                assert_eq!(report.errors, 0, "{}: {:?}", self.name(), report.findings);
                // VMDK and VHD have no list of free blocks: what was freed and not used again is known to nobody later.
                let has_free_list = !matches!(self.session.shape.format, "vmdk" | "vhd");
                let leaks_allowed = !self.is_clean || !has_free_list;
                assert!(leaks_allowed || report.leaks == 0, "{}: {:?}", self.name(), report.findings);
            }
            Err(error) => assert_eq!(error.code(), Code::Feature, "{error:?}"),
        }
    }

    /// Parents are only read.
    fn check_parents(&self) {
        for (file, (name, before)) in self.session.files.list().iter().zip(&self.made.files) {
            let is_parent = name.starts_with(shapes::PARENTS);
            assert!(!is_parent || file.content().is_same(before), "{}: {name} was changed", self.name());
        }
    }

    /// What a snapshot keeps does not change.
    fn check_snapshot(&self) -> Result<()> {
        let options = ChainOptions { snapshot: Some(shapes::SNAPSHOT.into()), ..self.session.options() };
        let disk = self.session.vellum().open(shapes::NAME, &options)?.0;
        let (found, result) = disk.read_at(Buf::zeroed(self.made.disk.len()), 0).wait();
        result?;
        assert!(found[..] == self.made.disk, "{}: the snapshot was changed", self.name());
        Ok(())
    }
}

fn places(range: &Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use arbitrary::{Arbitrary, Unstructured};
    use vellum_tests::disks::noise;

    /// A few hundred inputs without a fuzzer: enough to see that the targets themselves are right.
    fn some(format: &'static str) {
        let count: u64 =
            std::env::var("VELLUM_INPUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(1000);
        for seed in 1..=count {
            let bytes = noise(seed, 40 + seed as usize * 7 % 350);
            let mut input = Input::arbitrary(&mut Unstructured::new(&bytes)).expect("bytes are enough");
            if seed % 2 == 0 {
                input.mutations.clear();
            }
            let outcome = std::panic::catch_unwind(|| run(input.clone(), format));
            assert!(outcome.is_ok(), "seed {seed}: {input:?}");
        }
    }

    #[test]
    fn raw() {
        some("raw");
    }

    #[test]
    fn vdi() {
        some("vdi");
    }

    #[test]
    fn vhd() {
        some("vhd");
    }

    #[test]
    fn vmdk() {
        some("vmdk");
    }

    #[test]
    fn qcow2() {
        some("qcow2");
    }
}
