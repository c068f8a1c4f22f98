//! Files that count what is done to them.

use parking_lot::Mutex;
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vellum_core::{
    Access, Asker, Buf, Completion, Location, Opened, Preallocate, Resolver, Result, StatusList, Storage,
    StorageId, StorageLimits, WithBuf, WriteFlags, ZeroMode,
};
use vellum_sim::MemoryFiles;

#[derive(Default)]
struct Counts {
    flushes: AtomicU64,
    writes: Mutex<Vec<(u64, usize)>>,
}

/// [`MemoryFiles`] whose flushes and writes are counted.
pub struct CountingFiles {
    files: Arc<MemoryFiles>,
    counts: Arc<Counts>,
}

impl CountingFiles {
    /// Over `files`.
    pub fn new(files: Arc<MemoryFiles>) -> Self {
        CountingFiles { files, counts: Arc::default() }
    }
    /// Counts from zero again.
    pub fn reset(&self) {
        self.counts.flushes.store(0, Ordering::SeqCst);
        self.counts.writes.lock().clear();
    }
    /// Flushes of all files.
    pub fn flushes(&self) -> u64 {
        self.counts.flushes.load(Ordering::SeqCst)
    }
    /// Offset and length of every write.
    pub fn writes(&self) -> Vec<(u64, usize)> {
        self.counts.writes.lock().clone()
    }
}

struct Counting {
    inner: Arc<dyn Storage>,
    counts: Arc<Counts>,
}

impl Storage for Counting {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn limits(&self) -> StorageLimits {
        self.inner.limits()
    }
    fn read_at(&self, buf: Buf, offset: u64) -> Completion<WithBuf> {
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: Buf, offset: u64, flags: WriteFlags) -> Completion<WithBuf> {
        self.counts.writes.lock().push((offset, buf.len()));
        self.inner.write_at(buf, offset, flags)
    }
    fn flush(&self) -> Completion<Result<()>> {
        self.counts.flushes.fetch_add(1, Ordering::SeqCst);
        self.inner.flush()
    }
    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Completion<Result<()>> {
        self.inner.zero(range, mode)
    }
    fn discard(&self, range: Range<u64>) -> Completion<Result<()>> {
        self.inner.discard(range)
    }
    fn status(&self, range: Range<u64>) -> Completion<Result<StatusList>> {
        self.inner.status(range)
    }
    fn set_len(&self, len: u64, preallocate: Preallocate) -> Completion<Result<()>> {
        self.inner.set_len(len, preallocate)
    }
    fn id(&self) -> Option<StorageId> {
        self.inner.id()
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Resolver for CountingFiles {
    fn open(&self, name: &str, asker: &Asker, access: Access) -> Completion<Result<Opened>> {
        let counts = self.counts.clone();
        Completion::ready(self.files.open(name, asker, access).wait().map(|opened| Opened {
            storage: Arc::new(Counting { inner: opened.storage, counts }),
            location: opened.location,
        }))
    }
    fn create(&self, location: &Location, replace: bool) -> Completion<Result<Arc<dyn Storage>>> {
        self.files.create(location, replace)
    }
    fn rename(&self, from: &Location, to: &Location) -> Completion<Result<()>> {
        self.files.rename(from, to)
    }
    fn delete(&self, location: &Location) -> Completion<Result<()>> {
        self.files.delete(location)
    }
    fn exists(&self, location: &Location) -> Completion<Result<bool>> {
        self.files.exists(location)
    }
    fn sync_directory(&self, location: &Location) -> Completion<Result<()>> {
        self.files.sync_directory(location)
    }
    fn siblings(&self, location: &Location) -> Completion<Result<Vec<Location>>> {
        self.files.siblings(location)
    }
    fn beside(&self, location: &Location, file_name: &str) -> Location {
        self.files.beside(location, file_name)
    }
    fn file_name(&self, location: &Location) -> String {
        self.files.file_name(location)
    }
}
