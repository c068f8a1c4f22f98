//! Resolvers that stand between the library and its files: they count, fail, falsify.

use parking_lot::Mutex;
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vellum::{
    Access, Asker, Buf, Completion, CopyMode, Error, Location, Offloaded, Opened, Preallocate, Resolver,
    Result, Status, Storage, StorageId, StorageLimits, WithBuf, WriteFlags, ZeroMode,
};

/// What a storage is about to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read this range.
    Read(Range<u64>),
    /// Write this range.
    Write(Range<u64>),
    /// Flush.
    Flush,
    /// Make this range zero, or give it back.
    Zero(Range<u64>),
    /// Change the length.
    SetLen(u64),
}

/// Decides what happens to an operation on a file.
pub trait Hook: Send + Sync + 'static {
    /// An error here is what the operation answers; it is then not carried out.
    fn before(&self, file: &str, op: &Op) -> Result<()>;
    /// A file is about to be opened.
    fn opening(&self, name: &str, access: Access) {
        let _ = (name, access);
    }
    /// May falsify what is written.
    fn falsify(&self, file: &str, offset: u64, bytes: &mut [u8]) {
        let _ = (file, offset, bytes);
    }
    /// Whether the file system shares blocks this time.
    fn shares(&self) -> bool {
        false
    }
}

/// Wraps every storage of another resolver.
pub struct Wrapped<H> {
    inner: Arc<dyn Resolver>,
    hook: Arc<H>,
}

impl<H: Hook> Wrapped<H> {
    /// Puts `hook` before the files of `inner`.
    pub fn over(inner: Arc<dyn Resolver>, hook: Arc<H>) -> Arc<dyn Resolver> {
        Arc::new(Wrapped { inner, hook })
    }

    fn wrap(&self, storage: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(Hooked { inner: storage, hook: self.hook.clone() })
    }
}

impl<H: Hook> Resolver for Wrapped<H> {
    fn open(&self, name: &str, asker: &Asker, access: Access) -> Completion<Result<Opened>> {
        self.hook.opening(name, access);
        let opened = self.inner.open(name, asker, access).wait();
        Completion::ready(opened.map(|o| Opened { storage: self.wrap(o.storage), location: o.location }))
    }
    fn create(&self, location: &Location, replace: bool) -> Completion<Result<Arc<dyn Storage>>> {
        Completion::ready(self.inner.create(location, replace).wait().map(|storage| self.wrap(storage)))
    }
    fn rename(&self, from: &Location, to: &Location) -> Completion<Result<()>> {
        self.inner.rename(from, to)
    }
    fn delete(&self, location: &Location) -> Completion<Result<()>> {
        self.inner.delete(location)
    }
    fn exists(&self, location: &Location) -> Completion<Result<bool>> {
        self.inner.exists(location)
    }
    fn sync_directory(&self, location: &Location) -> Completion<Result<()>> {
        self.inner.sync_directory(location)
    }
    fn siblings(&self, location: &Location) -> Completion<Result<Vec<Location>>> {
        self.inner.siblings(location)
    }
    fn beside(&self, location: &Location, file_name: &str) -> Location {
        self.inner.beside(location, file_name)
    }
    fn file_name(&self, location: &Location) -> String {
        self.inner.file_name(location)
    }
}

struct Hooked<H> {
    inner: Arc<dyn Storage>,
    hook: Arc<H>,
}

fn span(offset: u64, len: usize) -> Range<u64> {
    offset..offset.saturating_add(len as u64)
}

impl<H: Hook> Hooked<H> {
    fn before(&self, op: Op) -> Result<()> {
        self.hook.before(self.inner.name(), &op)
    }
}

impl<H: Hook> Storage for Hooked<H> {
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
        match self.before(Op::Read(span(offset, buf.len()))) {
            Ok(()) => self.inner.read_at(buf, offset),
            Err(error) => Completion::ready((buf, Err(error))),
        }
    }
    fn write_at(&self, buf: Buf, offset: u64, flags: WriteFlags) -> Completion<WithBuf> {
        if let Err(error) = self.before(Op::Write(span(offset, buf.len()))) {
            return Completion::ready((buf, Err(error)));
        }
        let mut written = Buf::copy_of(&buf);
        self.hook.falsify(self.inner.name(), offset, &mut written);
        let (_, result) = self.inner.write_at(written, offset, flags).wait();
        Completion::ready((buf, result))
    }
    fn flush(&self) -> Completion<Result<()>> {
        match self.before(Op::Flush) {
            Ok(()) => self.inner.flush(),
            Err(error) => Completion::ready(Err(error)),
        }
    }
    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Completion<Result<()>> {
        match self.before(Op::Zero(range.clone())) {
            Ok(()) => self.inner.zero(range, mode),
            Err(error) => Completion::ready(Err(error)),
        }
    }
    fn discard(&self, range: Range<u64>) -> Completion<Result<()>> {
        match self.before(Op::Zero(range.clone())) {
            Ok(()) => self.inner.discard(range),
            Err(error) => Completion::ready(Err(error)),
        }
    }
    fn status(&self, range: Range<u64>) -> Completion<Result<Vec<(Range<u64>, Status)>>> {
        self.inner.status(range)
    }
    fn set_len(&self, len: u64, preallocate: Preallocate) -> Completion<Result<()>> {
        match self.before(Op::SetLen(len)) {
            Ok(()) => self.inner.set_len(len, preallocate),
            Err(error) => Completion::ready(Err(error)),
        }
    }
    fn copy_from(
        &self,
        source: &dyn Storage,
        source_offset: u64,
        offset: u64,
        len: u64,
        _mode: CopyMode,
    ) -> Completion<Result<Offloaded>> {
        let from = source.as_any().downcast_ref::<Hooked<H>>().filter(|_| self.hook.shares());
        let Some(from) = from else { return Completion::ready(Ok(Offloaded::Cannot)) };
        let (buf, result) = from.inner.read_at(Buf::zeroed(len as usize), source_offset).wait();
        let copied = result.and_then(|()| self.inner.write_at(buf, offset, WriteFlags::default()).wait().1);
        Completion::ready(copied.map(|()| Offloaded::Done))
    }
    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Option<Result<()>> {
        match self.before(Op::Read(span(offset, buf.len()))) {
            Ok(()) => self.inner.try_read_at(buf, offset),
            Err(error) => Some(Err(error)),
        }
    }
    fn id(&self) -> Option<StorageId> {
        self.inner.id()
    }
    fn allocated_bytes(&self) -> Option<u64> {
        self.inner.allocated_bytes()
    }
    fn modified_ns(&self) -> Option<u128> {
        self.inner.modified_ns()
    }
    fn start_writeback(&self, range: Range<u64>) {
        self.inner.start_writeback(range);
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Counts what is read and written.
#[derive(Default)]
pub struct Counter {
    read_bytes: AtomicU64,
    reads: AtomicU64,
    written_bytes: AtomicU64,
}

impl Counter {
    /// Bytes and requests read since the last call.
    pub fn take_reads(&self) -> (u64, u64) {
        (self.read_bytes.swap(0, Ordering::Relaxed), self.reads.swap(0, Ordering::Relaxed))
    }
    /// Bytes written since the last call.
    pub fn take_written(&self) -> u64 {
        self.written_bytes.swap(0, Ordering::Relaxed)
    }
}

impl Hook for Counter {
    fn before(&self, _file: &str, op: &Op) -> Result<()> {
        match op {
            Op::Read(range) => {
                self.read_bytes.fetch_add(range.end - range.start, Ordering::Relaxed);
                self.reads.fetch_add(1, Ordering::Relaxed);
            }
            Op::Write(range) => {
                self.written_bytes.fetch_add(range.end - range.start, Ordering::Relaxed);
            }
            Op::Flush | Op::Zero(_) | Op::SetLen(_) => {}
        }
        Ok(())
    }
}

/// A file system that shares blocks: always, or on every other request (the first is one of them).
#[derive(Default)]
pub struct Sharing {
    /// Not always.
    pub moody: bool,
    asked: AtomicU64,
}

impl Sharing {
    /// Shares always, or `moody`.
    pub fn new(moody: bool) -> Arc<Self> {
        Arc::new(Sharing { moody, asked: AtomicU64::new(0) })
    }
    /// Requests to share so far.
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Hook for Sharing {
    fn before(&self, _file: &str, _op: &Op) -> Result<()> {
        Ok(())
    }
    fn shares(&self) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) || !self.moody
    }
}

/// A closure as a hook.
pub struct HookFn<F>(pub F);

impl<F: Fn(&str, &Op) -> Result<()> + Send + Sync + 'static> Hook for HookFn<F> {
    fn before(&self, file: &str, op: &Op) -> Result<()> {
        (self.0)(file, op)
    }
}

/// Flips a bit of one byte of a file whenever that byte is written.
pub struct BitRot {
    /// How the file's name ends.
    pub suffix: &'static str,
    /// Which byte.
    pub at: u64,
}

impl Hook for BitRot {
    fn before(&self, _file: &str, _op: &Op) -> Result<()> {
        Ok(())
    }
    fn falsify(&self, file: &str, offset: u64, bytes: &mut [u8]) {
        if file.ends_with(self.suffix) && (offset..offset + bytes.len() as u64).contains(&self.at) {
            bytes[(self.at - offset) as usize] ^= 0x10;
        }
    }
}

/// An error as the operating system gives it.
pub fn os_error(number: i32) -> Error {
    Error::from_io(std::io::Error::from_raw_os_error(number), "injected")
}

const PAGE: u64 = 4096;

/// Files in memory in which a page of equal bytes costs next to nothing: a filled table of 256 MiB is free.
#[derive(Default)]
pub struct ThinFiles {
    files: Mutex<std::collections::BTreeMap<String, Arc<Thin>>>,
}

enum Page {
    Fill(u8),
    Bytes(Box<[u8; PAGE as usize]>),
}

/// A file of [`ThinFiles`].
pub struct Thin {
    name: String,
    id: u64,
    content: Mutex<(u64, std::collections::BTreeMap<u64, Page>)>,
}

impl ThinFiles {
    /// No files.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }
    /// All paths.
    pub fn paths(&self) -> Vec<String> {
        self.files.lock().keys().cloned().collect()
    }
    fn find(&self, path: &str) -> Result<Arc<Thin>> {
        let found = self.files.lock().get(path).cloned();
        found.ok_or_else(|| Error::new(vellum::Code::NotFound, "no such file").image(path))
    }
}

impl Resolver for ThinFiles {
    fn open(&self, name: &str, _asker: &Asker, _access: Access) -> Completion<Result<Opened>> {
        Completion::ready(self.find(name).map(|storage| Opened { storage, location: name.into() }))
    }
    fn create(&self, location: &Location, _replace: bool) -> Completion<Result<Arc<dyn Storage>>> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let file = Arc::new(Thin { name: location.0.clone(), id, content: Mutex::default() });
        self.files.lock().insert(location.0.clone(), file.clone());
        Completion::ready(Ok(file))
    }
    fn rename(&self, from: &Location, to: &Location) -> Completion<Result<()>> {
        let mut files = self.files.lock();
        let file = files.remove(&from.0);
        file.into_iter().for_each(|file| drop(files.insert(to.0.clone(), file)));
        Completion::ready(Ok(()))
    }
    fn delete(&self, location: &Location) -> Completion<Result<()>> {
        self.files.lock().remove(&location.0);
        Completion::ready(Ok(()))
    }
    fn exists(&self, location: &Location) -> Completion<Result<bool>> {
        Completion::ready(Ok(self.find(&location.0).is_ok()))
    }
    fn sync_directory(&self, _location: &Location) -> Completion<Result<()>> {
        Completion::ready(Ok(()))
    }
    fn siblings(&self, _location: &Location) -> Completion<Result<Vec<Location>>> {
        Completion::ready(Ok(Vec::new()))
    }
    fn beside(&self, _location: &Location, file_name: &str) -> Location {
        Location(file_name.to_owned())
    }
    fn file_name(&self, location: &Location) -> String {
        location.0.clone()
    }
}

/// The parts of a range by page: page number, range within the page, range within the caller's bytes.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let mut done = 0usize;
    std::iter::from_fn(move || {
        (done < len).then(|| {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let take = (PAGE as usize - within).min(len - done);
            done += take;
            (at / PAGE, within..within + take, done - take..done)
        })
    })
}

impl Storage for Thin {
    fn name(&self) -> &str {
        &self.name
    }
    fn len(&self) -> Result<u64> {
        Ok(self.content.lock().0)
    }
    fn limits(&self) -> StorageLimits {
        StorageLimits { knows_holes: true, ..StorageLimits::default() }
    }
    fn read_at(&self, mut buf: Buf, offset: u64) -> Completion<WithBuf> {
        let result = self.try_read_at(&mut buf, offset).unwrap_or(Ok(()));
        Completion::ready((buf, result))
    }
    fn write_at(&self, buf: Buf, offset: u64, _flags: WriteFlags) -> Completion<WithBuf> {
        let mut content = self.content.lock();
        for (page, within, range) in parts(offset, buf.len()) {
            let bytes = &buf[range];
            let whole = bytes.len() as u64 == PAGE;
            if whole && bytes[1..] == bytes[..bytes.len() - 1] {
                content.1.insert(page, Page::Fill(bytes[0]));
                continue;
            }
            let entry = content.1.entry(page).or_insert(Page::Fill(0));
            if let Page::Fill(byte) = entry {
                *entry = Page::Bytes(Box::new([*byte; PAGE as usize]));
            }
            if let Page::Bytes(data) = entry {
                data[within].copy_from_slice(bytes);
            }
        }
        content.0 = content.0.max(offset + buf.len() as u64);
        drop(content);
        Completion::ready((buf, Ok(())))
    }
    fn flush(&self) -> Completion<Result<()>> {
        Completion::ready(Ok(()))
    }
    fn zero(&self, range: Range<u64>, _mode: ZeroMode) -> Completion<Result<()>> {
        let len = range.end.min(self.content.lock().0).saturating_sub(range.start);
        let (_, result) = self.write_at(Buf::zeroed(len as usize), range.start, WriteFlags::default()).wait();
        Completion::ready(result)
    }
    fn discard(&self, range: Range<u64>) -> Completion<Result<()>> {
        self.zero(range, ZeroMode::MayUnmap)
    }
    fn status(&self, range: Range<u64>) -> Completion<Result<Vec<(Range<u64>, Status)>>> {
        let content = self.content.lock();
        let (mut found, mut at) = (Vec::<(Range<u64>, Status)>::new(), range.start);
        for (page, _) in content.1.range(range.start / PAGE..range.end.div_ceil(PAGE)) {
            let (start, end) = ((page * PAGE).max(range.start), ((page + 1) * PAGE).min(range.end));
            if start > at {
                found.push((at..start, Status::Hole));
            }
            match found.last_mut() {
                Some((last, Status::Data)) if last.end == start => last.end = end,
                _ => found.push((start..end, Status::Data)),
            }
            at = end;
        }
        if at < range.end {
            found.push((at..range.end, Status::Hole));
        }
        Completion::ready(Ok(found))
    }
    fn set_len(&self, len: u64, _preallocate: Preallocate) -> Completion<Result<()>> {
        let mut content = self.content.lock();
        let beyond = content.1.split_off(&len.div_ceil(PAGE));
        drop(beyond);
        let within = (len % PAGE) as usize;
        if let Some(page) = content.1.get_mut(&(len / PAGE)) {
            let mut bytes = match page {
                Page::Fill(byte) => Box::new([*byte; PAGE as usize]),
                Page::Bytes(bytes) => bytes.clone(),
            };
            bytes[within..].fill(0);
            *page = Page::Bytes(bytes);
        }
        content.0 = len;
        Completion::ready(Ok(()))
    }
    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Option<Result<()>> {
        let content = self.content.lock();
        if offset + buf.len() as u64 > content.0 {
            return Some(Err(vellum::storage::past_end(&self.name, offset, buf.len(), content.0)));
        }
        for (page, within, range) in parts(offset, buf.len()) {
            match content.1.get(&page) {
                None => buf[range].fill(0),
                Some(Page::Fill(byte)) => buf[range].fill(*byte),
                Some(Page::Bytes(data)) => buf[range].copy_from_slice(&data[within]),
            }
        }
        Some(Ok(()))
    }
    fn id(&self) -> Option<StorageId> {
        Some(StorageId(u64::MAX - 1, self.id))
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}
