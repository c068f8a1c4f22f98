//! The files of a case in memory, counted and recorded, and the work that is done on each: open, map, read.

use super::kit::{Check, Content, HostileCase, Sparse};
use parking_lot::Mutex;
use std::any::Any;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vellum::{
    Access, Asker, Buf, ChainOptions, Code, Completion, Disk, Error, Extent, FormatRegistry, Location,
    Memory, Opened, Preallocate, Resolver, Result, Status, Storage, StorageId, StorageLimits, WithBuf,
    WriteFlags, ZeroMode, block_on,
};

/// Lookups that are made at most, and for how long: the map of a disk may be longer than any test can wait, and only the
/// length of one lookup is bounded.
const LOOKUPS_MAX: usize = 2_000;
const MAPPING_MAX: Duration = Duration::from_millis(500);
/// Bytes of a disk that are read at most.
const READ_MAX: u64 = 4 << 20;
/// Bytes of one read.
const STEP: u64 = 64 << 10;

/// The files of a case. Grants what `vellum-io` grants by default, and keeps a list of what it granted.
pub struct CaseFiles {
    files: BTreeMap<String, Arc<Counted>>,
    special: BTreeMap<String, Content>,
    granted: Mutex<Vec<String>>,
    changed: AtomicU64,
    read_bytes: Arc<AtomicU64>,
}

impl CaseFiles {
    /// The files of `case`.
    pub fn new(case: &HostileCase) -> Arc<Self> {
        let read_bytes = Arc::new(AtomicU64::new(0));
        let (mut files, mut special) = (BTreeMap::new(), BTreeMap::new());
        for file in &case.files {
            match &file.content {
                Content::Regular(sparse) => {
                    let memory = in_memory(&file.path, sparse);
                    files.insert(
                        file.path.clone(),
                        Arc::new(Counted { memory, read_bytes: read_bytes.clone() }),
                    );
                }
                other => {
                    special.insert(file.path.clone(), other.clone());
                }
            }
        }
        Arc::new(CaseFiles {
            files,
            special,
            granted: Mutex::default(),
            changed: AtomicU64::new(0),
            read_bytes,
        })
    }

    /// The files that were opened, in order.
    pub fn granted(&self) -> Vec<String> {
        self.granted.lock().clone()
    }

    /// Bytes read from all files.
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    /// Creations, renames and deletions that were asked for.
    pub fn changes(&self) -> u64 {
        self.changed.load(Ordering::Relaxed)
    }

    /// Length and a fingerprint of every file.
    pub fn fingerprints(&self) -> Vec<(String, u64, u64)> {
        self.files
            .iter()
            .map(|(path, file)| (path.clone(), file.len().unwrap_or(0), file.fingerprint()))
            .collect()
    }

    fn local_name(&self, name: &str, of: &Location) -> Result<String> {
        let refuse = |code, what: &str| {
            Err(Error::new(code, what.to_owned())
                .image(of)
                .found(name)
                .hint("name the file with --parent FILE if you trust the image"))
        };
        let bytes = name.as_bytes();
        if bytes.contains(&0) {
            return refuse(Code::NulInName, "the name holds a NUL byte");
        }
        if bytes.get(1) == Some(&b':') {
            return refuse(Code::ExternalRef, "the name is a path of Windows");
        }
        if name.starts_with("\\\\")
            || name.starts_with("//")
            || name.split('/').next().is_some_and(|n| n.contains(':'))
        {
            return refuse(Code::RemoteRef, "the image names something that is not a local file");
        }
        let name = if self.files.contains_key(name) { name.to_owned() } else { name.replace('\\', "/") };
        let mut parts: Vec<&str> = Vec::new();
        for part in name.split('/') {
            match part {
                "" | "." => {}
                ".." if parts.pop().is_some() => {}
                ".." => return refuse(Code::PathEscape, "the image names a file outside its directory"),
                part => parts.push(part),
            }
        }
        if name.starts_with('/') {
            return refuse(Code::PathEscape, "the image names a file outside its directory");
        }
        let path = parts.join("/");
        match self.special.get(&path) {
            Some(Content::Symlink(_)) => {
                refuse(Code::PathEscape, "the image names a link that leaves its directory")
            }
            Some(_) => refuse(Code::ExternalRef, "the image names something that is not a regular file"),
            None => Ok(path),
        }
    }
}

/// A sparse file as a storage.
pub fn in_memory(name: &str, sparse: &Sparse) -> Memory {
    let memory = Memory::new(name, sparse.len);
    for (offset, bytes) in &sparse.runs {
        let (_, result) = memory.write_at(Buf::copy_of(bytes), *offset, WriteFlags::default()).wait();
        result.expect("memory can be written");
    }
    memory
}

fn denied<T: Send + 'static>(files: &CaseFiles, what: &str) -> Completion<Result<T>> {
    files.changed.fetch_add(1, Ordering::Relaxed);
    Completion::ready(Err(Error::new(Code::Permission, format!("{what} in a read-only test"))))
}

impl Resolver for CaseFiles {
    fn open(&self, name: &str, asker: &Asker, access: Access) -> Completion<Result<Opened>> {
        let open = || {
            let path = match asker {
                Asker::User => name.to_owned(),
                Asker::Parent { of } | Asker::Part { of } => self.local_name(name, of)?,
            };
            let Some(file) = self.files.get(&path) else {
                return Err(Error::new(Code::NotFound, "there is no such file")
                    .image(path)
                    .hint("check the name"));
            };
            self.granted.lock().push(path.clone());
            if access.write {
                self.changed.fetch_add(1, Ordering::Relaxed);
            }
            Ok(Opened { storage: file.clone(), location: Location(path) })
        };
        Completion::ready(open())
    }
    fn create(&self, _location: &Location, _replace: bool) -> Completion<Result<Arc<dyn Storage>>> {
        denied(self, "creating a file")
    }
    fn rename(&self, _from: &Location, _to: &Location) -> Completion<Result<()>> {
        denied(self, "renaming a file")
    }
    fn delete(&self, _location: &Location) -> Completion<Result<()>> {
        denied(self, "deleting a file")
    }
    fn exists(&self, location: &Location) -> Completion<Result<bool>> {
        Completion::ready(Ok(self.files.contains_key(&location.0)))
    }
    fn sync_directory(&self, _location: &Location) -> Completion<Result<()>> {
        denied(self, "changing a directory")
    }
    fn siblings(&self, location: &Location) -> Completion<Result<Vec<Location>>> {
        let others = self.files.keys().filter(|path| **path != location.0);
        Completion::ready(Ok(others.cloned().map(Location).collect()))
    }
    fn beside(&self, _location: &Location, file_name: &str) -> Location {
        Location(file_name.to_owned())
    }
    fn file_name(&self, location: &Location) -> String {
        location.0.rsplit('/').next().unwrap_or_default().to_owned()
    }
}

/// Memory that counts what is read.
struct Counted {
    memory: Memory,
    read_bytes: Arc<AtomicU64>,
}

impl Counted {
    fn fingerprint(&self) -> u64 {
        let len = self.len().unwrap_or(0);
        let status = self.memory.status(0..len).wait().unwrap_or_default();
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for (range, _) in status.into_iter().filter(|(_, status)| *status == Status::Data) {
            let mut page = vec![0u8; 4096];
            let mut at = range.start;
            while at < range.end {
                let step = (range.end - at).min(4096) as usize;
                self.memory
                    .try_read_at(&mut page[..step], at)
                    .expect("memory reads at once")
                    .expect("inside the file");
                for (i, byte) in page[..step].iter().enumerate().filter(|(_, byte)| **byte != 0) {
                    hash = (hash ^ u64::from(*byte) ^ (at + i as u64).rotate_left(17))
                        .wrapping_mul(0x0100_0000_01b3);
                }
                at += step as u64;
            }
        }
        hash
    }
}

impl Storage for Counted {
    fn name(&self) -> &str {
        self.memory.name()
    }
    fn len(&self) -> Result<u64> {
        self.memory.len()
    }
    fn limits(&self) -> StorageLimits {
        self.memory.limits()
    }
    fn read_at(&self, buf: Buf, offset: u64) -> Completion<WithBuf> {
        self.read_bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.memory.read_at(buf, offset)
    }
    fn write_at(&self, buf: Buf, offset: u64, flags: WriteFlags) -> Completion<WithBuf> {
        self.memory.write_at(buf, offset, flags)
    }
    fn flush(&self) -> Completion<Result<()>> {
        self.memory.flush()
    }
    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Completion<Result<()>> {
        self.memory.zero(range, mode)
    }
    fn discard(&self, range: Range<u64>) -> Completion<Result<()>> {
        self.memory.discard(range)
    }
    fn status(&self, range: Range<u64>) -> Completion<Result<Vec<(Range<u64>, Status)>>> {
        self.memory.status(range)
    }
    fn set_len(&self, len: u64, preallocate: Preallocate) -> Completion<Result<()>> {
        self.memory.set_len(len, preallocate)
    }
    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Option<Result<()>> {
        self.read_bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.memory.try_read_at(buf, offset)
    }
    fn id(&self) -> Option<StorageId> {
        self.memory.id()
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Opens the image `name` of `resolver` with its chain, maps all of it and reads a sample. The first error ends it.
pub fn open_map_read(
    resolver: Arc<dyn Resolver>,
    name: &str,
    format: Option<&str>,
    check: Option<&Check>,
) -> Result<Disk> {
    let registry = FormatRegistry::new(vellum::formats());
    let options = ChainOptions { format: format.map(str::to_owned), ..ChainOptions::default() };
    let (disk, _) = block_on(registry.open_chain(&resolver, name, &options))?;
    let data = map(&disk)?;
    read_sample(&disk, &data)?;
    if let Some(check) = check {
        compare(&disk, check)?;
    }
    Ok(disk)
}

/// Maps the disk; the ranges that hold data.
fn map(disk: &Disk) -> Result<Vec<Range<u64>>> {
    let (mut at, mut data, started) = (0, Vec::new(), Instant::now());
    for _ in 0..LOOKUPS_MAX {
        if at == disk.size() || started.elapsed() > MAPPING_MAX {
            break;
        }
        let found = block_on(disk.lookup(at..disk.size()))?;
        assert!(found.range.start == at && found.range.end > at, "extents without gaps, none empty");
        assert!(found.range.end <= disk.size(), "an extent goes past the end of the disk");
        at = found.range.end;
        if matches!(found.extent, Extent::Raw { .. } | Extent::Encoded(_)) && data.len() < 64 {
            data.push(found.range);
        }
    }
    Ok(data)
}

/// Reads the first bytes, the last bytes and the start of every range with data.
fn read_sample(disk: &Disk, data: &[Range<u64>]) -> Result<()> {
    let size = disk.size();
    let ends = [0..size.min(STEP), size.saturating_sub(STEP)..size];
    let mut left = READ_MAX;
    for range in ends.into_iter().chain(data.iter().cloned()) {
        // The range itself, and a little across both its borders.
        let wanted = range.start.saturating_sub(7)..range.end.saturating_add(7).min(size);
        let mut at = wanted.start;
        while at < wanted.end && at - wanted.start < 8 * STEP && left > 0 {
            let len = (wanted.end - at).min(STEP).min(left);
            read(disk, at, len as usize)?;
            at += len;
            left -= len;
        }
    }
    Ok(())
}

fn read(disk: &Disk, offset: u64, len: usize) -> Result<Buf> {
    let (buf, result) = disk.read_at(Buf::zeroed(len), offset).wait();
    result.map(|()| buf)
}

/// Holds the disk to what the case says of it.
fn compare(disk: &Disk, check: &Check) -> Result<()> {
    assert_eq!(disk.size(), check.size, "virtual size");
    for (offset, bytes) in &check.data {
        let found = read(disk, *offset, bytes.len())?;
        assert!(*found == bytes[..], "guest data at {offset:#x} differs");
    }
    for range in &check.zeros {
        let last = range.end.saturating_sub(STEP).max(range.start);
        for at in [range.start, last] {
            let len = (range.end - at).min(STEP) as usize;
            assert!(read(disk, at, len)?.iter().all(|byte| *byte == 0), "zeros of {range:x?} are not");
        }
    }
    Ok(())
}
