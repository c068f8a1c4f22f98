//! Sequences of guest requests against an image that is written in place.
//!
//! On a *valid* image every request must succeed, and what is read must be what a plain array of bytes holds after the
//! same requests. On a *mutated* one requests may fail; nothing may panic or hang, the files may not grow beyond reason,
//! and an image that is refused is not changed by a byte.

use crate::shapes::{self, Shape};
use arbitrary::Arbitrary;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;
use vellum::{
    Buf, ChainOptions, Code, Disk, Memory, OpenFlags, Providers, Result, Status, Storage, Vellum,
    WriteAccess, WriteFlags, ZeroMode,
};
use vellum_sim::MemoryFiles;

/// Requests of one run.
const OPS_MAX: usize = 64;
/// Reopenings of one run: each compares the whole disk.
const REOPENED_MAX: usize = 4;
/// Bytes that all files of one run may grow by, as space and as length.
const GROWTH_MAX: u64 = 48 << 20;
const LENGTH_MAX: u64 = 1 << 30;
/// Bytes of one request to a mutated disk, which may be of any size.
const REQUEST_MAX: u64 = 1 << 20;

/// What the fuzzer chooses.
#[derive(Arbitrary, Clone, Debug)]
pub struct Input {
    shape: u8,
    flags: u8,
    mutations: Vec<Mutation>,
    ops: Vec<Op>,
}

/// A place in a file of the image, and what is put there.
#[derive(Arbitrary, Clone, Debug)]
struct Mutation {
    file: bool,
    place: Place,
    value: Value,
}

#[derive(Arbitrary, Clone, Debug)]
enum Place {
    Head(u16),
    Tail(u16),
    Anywhere(u32),
}

#[derive(Arbitrary, Clone, Debug)]
enum Value {
    Byte(u8),
    Flip(u8),
    Word(u32),
    WordBe(u32),
    Long(u64),
    LongBe(u64),
    /// A number that another part of the same file is near to.
    Sectors(u16),
}

/// One request. Offsets are fractions of the disk.
#[derive(Arbitrary, Clone, Debug)]
pub enum Op {
    Write { at: u16, near: u16, len: u16, fill: u8 },
    Zero { at: u16, near: u16, len: u32, unmap: bool },
    Discard { at: u16, near: u16, len: u32 },
    Read { at: u16, len: u16 },
    Flush,
    Reopen { clean: bool },
    Flags(u8),
}

/// Carries the input out against one of the shapes of `format`.
pub fn run(input: Input, format: &'static str) {
    let all = shapes::of(format);
    let shape = &all[usize::from(input.shape) % all.len()];
    let files = shapes::files(shape);
    let flags = flags(input.flags);
    // Guests write sectors; the library takes bytes.
    let grain = if input.flags & 0x80 != 0 { 1 } else { 512 };
    let ops = &input.ops[..input.ops.len().min(OPS_MAX)];
    if input.mutations.is_empty() {
        Valid::new(shape, files, flags, grain).run(ops);
    } else {
        mutated(shape, &files, &input.mutations, flags, grain, ops);
    }
}

fn flags(bits: u8) -> OpenFlags {
    OpenFlags {
        read_only: false,
        honor_zeroes: bits & 1 != 0,
        honor_same: bits & 2 != 0,
        inform_zeroes: bits & 4 != 0,
        discard: bits & 8 == 0,
        ignore_flush: false,
    }
}

fn open(shape: &Shape, files: &Arc<MemoryFiles>, flags: OpenFlags, skip_checks: bool) -> Result<Disk> {
    let mut options = ChainOptions {
        format: Some(shape.format.into()),
        write: WriteAccess::Yes,
        skip_consistency_checks: skip_checks,
        providers: Some(Providers::seeded(1, 1_700_000_000)),
        probe_parents: true,
        ..ChainOptions::default()
    };
    options.disk.flags = flags;
    Ok(Vellum::new(files.clone()).open(shapes::NAME, &options)?.0)
}

/// The range of a request, in whole `grain`s.
fn range(at: u16, near: u16, len: u64, size: u64, grain: u64) -> Range<u64> {
    let start = (u64::from(at) * size / 65_536 + u64::from(near) * grain).min(size - 1) / grain * grain;
    let end = start.saturating_add(len.max(1).div_ceil(grain) * grain).min(size);
    start..end.max(start)
}

fn pattern(range: &Range<u64>, fill: u8) -> Vec<u8> {
    // Zero stays zero: those are what formats treat in their own way.
    let byte = |at: u64| if fill == 0 { 0 } else { fill ^ (at >> 9) as u8 ^ (at as u8).wrapping_mul(31) };
    range.clone().map(byte).collect()
}

/// A disk that must do as an array does.
struct Valid<'a> {
    shape: &'a Shape,
    files: Arc<MemoryFiles>,
    flags: OpenFlags,
    grain: u64,
    disk: Disk,
    model: Vec<u8>,
    /// Discarded, and maybe not zero yet: that may come when the rest of its unit is discarded, too.
    loose: Vec<bool>,
    reopened: usize,
    is_clean: bool,
    space: u64,
}

impl<'a> Valid<'a> {
    fn new(shape: &'a Shape, files: Arc<MemoryFiles>, flags: OpenFlags, grain: u64) -> Self {
        let disk =
            open(shape, &files, flags, false).unwrap_or_else(|error| panic!("{}: {error:?}", shape.name));
        let mut model = vec![0; disk.size() as usize];
        for (at, bytes) in shapes::data(shape, disk.size()) {
            model[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        }
        let (space, loose) = (space(&files), vec![false; model.len()]);
        Valid { shape, files, flags, grain, disk, model, loose, reopened: 0, is_clean: true, space }
    }

    fn run(mut self, ops: &[Op]) {
        for op in ops {
            self.step(op).unwrap_or_else(|error| panic!("{}: {op:?}: {error:?}", self.shape.name));
            let growth = space(&self.files).saturating_sub(self.space);
            assert!(growth <= GROWTH_MAX, "{}: grew by {growth} bytes", self.shape.name);
        }
        self.reopen(true).unwrap_or_else(|error| panic!("{}: at the end: {error:?}", self.shape.name));
        self.check();
    }

    fn step(&mut self, op: &Op) -> Result<()> {
        let size = self.model.len() as u64;
        let at = |range: &Range<u64>| range.start as usize..range.end as usize;
        match *op {
            Op::Write { at: place, near, len, fill } => {
                let range = range(place, near, len.into(), size, self.grain);
                let data = pattern(&range, fill);
                let flags = WriteFlags { fua: fill == 0x77 };
                self.disk.write(Buf::copy_of(&data), range.start, flags).wait().1?;
                self.model[at(&range)].copy_from_slice(&data);
                self.loose[at(&range)].fill(false);
            }
            Op::Zero { at: place, near, len, unmap } => {
                let range = range(place, near, u64::from(len) % size, size, self.grain);
                let mode = if unmap { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
                self.disk.write_zeroes(range.clone(), mode).wait()?;
                self.model[at(&range)].fill(0);
                self.loose[at(&range)].fill(false);
            }
            Op::Discard { at: place, near, len } => {
                let range = range(place, near, u64::from(len) % size, size, self.grain);
                self.disk.discard_range(range.clone()).wait()?;
                self.loose[at(&range)].fill(true);
                self.compare(at(&range), "discarded")?;
            }
            Op::Read { at: place, len } => {
                let range = range(place, 0, len.into(), size, 1);
                self.compare(at(&range), "read")?;
            }
            Op::Flush => self.disk.flush_all().wait()?,
            Op::Reopen { clean } => {
                if self.reopened < REOPENED_MAX {
                    self.reopened += 1;
                    self.reopen(clean)?;
                }
            }
            Op::Flags(bits) => {
                self.flags = flags(bits);
                self.disk.set_flags(self.flags)?;
            }
        }
        Ok(())
    }

    /// Closes, or only flushes and forgets, as a process that is killed after a flush; then compares all.
    fn reopen(&mut self, clean: bool) -> Result<()> {
        if clean {
            self.disk.close().wait()?;
        } else {
            self.disk.flush_all().wait()?;
            self.is_clean = false;
        }
        self.disk = open(self.shape, &self.files, self.flags, false)?;
        self.compare(0..self.model.len(), "opened again")
    }

    /// Reads `range` and compares; what was discarded may have become zero.
    fn compare(&mut self, range: Range<usize>, what: &str) -> Result<()> {
        let (found, result) = self.disk.read_at(Buf::zeroed(range.len()), range.start as u64).wait();
        result?;
        if found[..] == self.model[range.clone()] {
            return Ok(());
        }
        for (at, found) in range.zip(found.iter().copied()) {
            let known = self.model[at];
            let is_right = found == known || found == 0 && self.loose[at];
            assert!(is_right, "{}: {what}: byte {at:#x} is {found:#x}, not {known:#x}", self.shape.name);
            self.model[at] = found;
        }
        Ok(())
    }

    fn check(&self) {
        let options = ChainOptions { format: Some(self.shape.format.into()), ..ChainOptions::default() };
        match Vellum::new(self.files.clone()).check(shapes::NAME, &options) {
            Ok(report) => {
                assert_eq!(report.errors, 0, "{}: {:?}", self.shape.name, report.findings);
                // VMDK and VHD have no list of free blocks: what was freed and not used again is known to nobody later.
                let has_free_list = !matches!(self.shape.format, "vmdk" | "vhd");
                let leaks_allowed = !self.is_clean || !has_free_list;
                assert!(leaks_allowed || report.leaks == 0, "{}: {:?}", self.shape.name, report.findings);
            }
            Err(error) => assert_eq!(error.code(), Code::Feature, "{error:?}"),
        }
    }
}

fn space(files: &MemoryFiles) -> u64 {
    let sizes = files.paths().into_iter().filter_map(|path| files.get(&path)?.allocated_bytes());
    sizes.sum()
}

fn length(files: &MemoryFiles) -> u64 {
    let sizes = files.paths().into_iter().filter_map(|path| files.get(&path)?.len().ok());
    sizes.fold(0, u64::saturating_add)
}

/// Tells contents apart.
fn fingerprint(files: &MemoryFiles) -> u64 {
    let mut hasher = DefaultHasher::new();
    for path in files.paths() {
        let Some(file) = files.get(&path) else { continue };
        let len = file.len().unwrap_or(0);
        (path, len).hash(&mut hasher);
        for (range, status) in file.status(0..len).wait().unwrap_or_default() {
            if status == Status::Data {
                let len = (range.end - range.start) as usize;
                file.read_at(Buf::zeroed(len), range.start).wait().0[..].hash(&mut hasher);
            }
        }
    }
    hasher.finish()
}

/// An image that somebody damaged, on purpose or not.
fn mutated(
    shape: &Shape,
    files: &Arc<MemoryFiles>,
    mutations: &[Mutation],
    flags: OpenFlags,
    grain: u64,
    ops: &[Op],
) {
    for mutation in mutations.iter().take(16) {
        mutate(files, mutation);
    }
    if flags.honor_same {
        shapes::seal(shape, files);
    }
    let before = fingerprint(files);
    let (space_before, length_before) = (space(files), length(files));
    let opened = open(shape, files, flags, flags.honor_zeroes);
    assert!(fingerprint(files) == before, "{}: opening changed a file", shape.name);
    let Ok(mut disk) = opened else { return };
    let mut reopened = 0;
    for op in ops {
        // What fails, fails; it is the last state that counts.
        let _ = apply(&disk, op, grain);
        if let Op::Reopen { clean } = op
            && reopened < REOPENED_MAX
        {
            reopened += 1;
            let _ = if *clean { disk.close().wait() } else { disk.flush_all().wait() };
            match open(shape, files, flags, true) {
                Ok(again) => disk = again,
                Err(_) => break,
            }
        }
        let (space, length) = (space(files), length(files));
        assert!(space - space_before.min(space) <= GROWTH_MAX, "{}: grew to {space} bytes", shape.name);
        assert!(length.saturating_sub(length_before) <= LENGTH_MAX, "{}: grew to {length} long", shape.name);
    }
    let _ = disk.close().wait();
}

fn apply(disk: &Disk, op: &Op, grain: u64) -> Result<()> {
    let size = disk.size().min(1 << 62);
    if size == 0 {
        return Ok(());
    }
    let short = |range: Range<u64>| range.start..range.end.min(range.start + REQUEST_MAX);
    match *op {
        Op::Write { at, near, len, fill } => {
            let range = short(wide(at, near, len.into(), size, grain));
            disk.write(Buf::copy_of(&pattern(&range, fill)), range.start, WriteFlags::default()).wait().1
        }
        Op::Zero { at, near, len, unmap } => {
            let mode = if unmap { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
            disk.write_zeroes(short(wide(at, near, len.into(), size, grain)), mode).wait()
        }
        Op::Discard { at, near, len } => {
            disk.discard_range(short(wide(at, near, len.into(), size, grain))).wait()
        }
        Op::Read { at, len } => {
            let range = short(wide(at, 0, len.into(), size, 1));
            disk.read_at(Buf::zeroed((range.end - range.start) as usize), range.start).wait().1
        }
        Op::Flush => disk.flush_all().wait(),
        Op::Flags(bits) => disk.set_flags(flags(bits)),
        Op::Reopen { .. } => Ok(()),
    }
}

/// [`range`] for sizes of which a fraction does not fit in 64 bits.
fn wide(at: u16, near: u16, len: u64, size: u64, grain: u64) -> Range<u64> {
    let start = (u128::from(at) * u128::from(size) / 65_536) as u64 + u64::from(near) * grain;
    let start = start.min(size - 1) / grain * grain;
    start..start.saturating_add(len.max(1).div_ceil(grain) * grain).min(size).max(start)
}

fn mutate(files: &Arc<MemoryFiles>, mutation: &Mutation) {
    let mut paths = files.paths();
    paths.sort_by_key(|path| path != shapes::NAME);
    let Some(file) =
        paths.get(usize::from(mutation.file && paths.len() > 1)).and_then(|path| files.get(path))
    else {
        return;
    };
    let len = file.len().unwrap_or(0);
    let at = match mutation.place {
        Place::Head(at) => u64::from(at),
        Place::Tail(back) => len.saturating_sub(u64::from(back)),
        Place::Anywhere(at) => u64::from(at) * len.max(1) / (1 << 32),
    };
    let bytes = match mutation.value {
        Value::Byte(byte) => vec![byte],
        Value::Flip(bits) => vec![byte_at(&file, at) ^ bits],
        Value::Word(word) => word.to_le_bytes().to_vec(),
        Value::WordBe(word) => word.to_be_bytes().to_vec(),
        Value::Long(long) => long.to_le_bytes().to_vec(),
        Value::LongBe(long) => long.to_be_bytes().to_vec(),
        Value::Sectors(count) => (u64::from(count) * 512).to_be_bytes().to_vec(),
    };
    if at + bytes.len() as u64 <= len {
        let _ = file.write_at(Buf::copy_of(&bytes), at, WriteFlags::default()).wait();
    }
}

fn byte_at(file: &Memory, at: u64) -> u8 {
    let (buf, result) = file.read_at(Buf::zeroed(1), at).wait();
    if result.is_ok() { buf[0] } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arbitrary::Unstructured;
    use vellum_tests::disks::noise;

    /// A few hundred inputs without a fuzzer: enough to see that the targets themselves are right.
    fn some(format: &'static str) {
        let count: u64 =
            std::env::var("VELLUM_INPUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(300);
        for seed in 1..=count {
            let bytes = noise(seed, 700);
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
