//! Files in memory that begin as copies of others. Pages are shared until they are written: a fresh set of files costs
//! next to nothing, and whether a file was changed is seen without reading it.

use std::any::Any;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use vellum::{
    Access, Asker, Buf, Code, Completion, Error, Location, Opened, Preallocate, Resolver, Result, Status,
    StatusList, Storage, StorageId, StorageLimits, WithBuf, WriteFlags, ZeroMode,
};

const PAGE: u64 = 4096;
const PAGE_USIZE: usize = 4096;

/// Longest file, as on ext4: what would reach further fails.
const FILE_MAX: u64 = 16 << 40;

/// What a file holds at one moment: pages that are not holes, by number.
#[derive(Clone, Default)]
pub struct Content {
    pages: Vec<(u64, Arc<[u8; PAGE_USIZE]>)>,
    len: u64,
}

impl Content {
    /// `bytes`, with holes for pages of zeros.
    pub fn of(bytes: &[u8]) -> Self {
        let mut content = Content { pages: Vec::new(), len: bytes.len() as u64 };
        for (number, part) in bytes.chunks(PAGE_USIZE).enumerate() {
            if part.iter().any(|byte| *byte != 0) {
                let mut page = [0; PAGE_USIZE];
                page[..part.len()].copy_from_slice(part);
                content.pages.push((number as u64, Arc::new(page)));
            }
        }
        content
    }

    /// Whether both hold the same bytes and the same holes. Pages that are still shared are not looked into.
    pub fn is_same(&self, other: &Content) -> bool {
        let same = |((a, one), (b, two)): (&(u64, Arc<_>), &(u64, Arc<_>))| {
            a == b && (Arc::ptr_eq(one, two) || one == two)
        };
        self.len == other.len
            && self.pages.len() == other.pages.len()
            && self.pages.iter().zip(&other.pages).all(same)
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Offset of one of the pages that are not holes.
    pub fn page_at(&self, turn: usize) -> u64 {
        self.pages.get(turn % self.pages.len().max(1)).map_or(0, |(number, _)| number * PAGE)
    }

    fn find(&self, number: u64) -> std::result::Result<usize, usize> {
        self.pages.binary_search_by_key(&number, |(number, _)| *number)
    }

    /// Copies what lies at `offset`; past the end there are zeros.
    pub fn read(&self, bytes: &mut [u8], offset: u64) {
        for (number, within, range) in parts(offset, bytes.len()) {
            let len = range.len();
            match self.find(number) {
                Ok(index) => bytes[range].copy_from_slice(&self.pages[index].1[within..within + len]),
                Err(_) => bytes[range].fill(0),
            }
        }
    }

    /// Puts `bytes` at `offset`.
    pub fn write(&mut self, bytes: &[u8], offset: u64) {
        for (number, within, range) in parts(offset, bytes.len()) {
            let index = self.find(number).unwrap_or_else(|index| {
                self.pages.insert(index, (number, Arc::new([0; PAGE_USIZE])));
                index
            });
            let page = Arc::make_mut(&mut self.pages[index].1);
            page[within..within + range.len()].copy_from_slice(&bytes[range]);
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    fn zero(&mut self, range: Range<u64>) {
        let first = self.find(range.start / PAGE).unwrap_or_else(|index| index);
        let end = self.find(range.end.div_ceil(PAGE)).unwrap_or_else(|index| index);
        for (number, page) in &mut self.pages[first..end] {
            let from = range.start.max(*number * PAGE) - *number * PAGE;
            let to = (range.end - *number * PAGE).min(PAGE);
            if to - from < PAGE {
                Arc::make_mut(page)[from as usize..to as usize].fill(0);
            }
        }
        let is_whole = |number: u64| number * PAGE >= range.start && (number + 1) * PAGE <= range.end;
        let first_whole = first + usize::from(first < end && !is_whole(self.pages[first].0));
        let end_whole = end - usize::from(first_whole < end && !is_whole(self.pages[end - 1].0));
        self.pages.drain(first_whole..end_whole);
    }
}

/// The parts of `offset..offset + len` by page: its number, offset in it, range in the caller's bytes.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, Range<usize>)> {
    let mut done = 0usize;
    std::iter::from_fn(move || {
        if done >= len {
            return None;
        }
        let at = offset + done as u64;
        let within = (at % PAGE) as usize;
        let take = (PAGE_USIZE - within).min(len - done);
        let part = (at / PAGE, within, done..done + take);
        done += take;
        Some(part)
    })
}

/// A file. Growing beyond its bounds is a finding.
pub struct File {
    name: String,
    id: StorageId,
    content: Mutex<Content>,
    pages_max: usize,
    len_max: u64,
}

impl File {
    fn lock(&self) -> MutexGuard<'_, Content> {
        self.content.lock().expect("nobody panics with the lock")
    }

    /// What it holds now.
    pub fn content(&self) -> Content {
        self.lock().clone()
    }

    /// Replaces what it holds.
    pub fn set_content(&self, content: Content) {
        *self.lock() = content;
    }

    fn too_large(&self) -> Error {
        Error::new(Code::NoSpace, "the file system has no files as long as that").image(&self.name)
    }

    fn check_growth(&self, content: MutexGuard<'_, Content>) {
        let (pages, len) = (content.pages.len(), content.len);
        drop(content);
        assert!(pages <= self.pages_max, "{} takes {pages} pages: more than {}", self.name, self.pages_max);
        assert!(len <= self.len_max, "{} is {len} bytes long: more than {}", self.name, self.len_max);
    }
}

impl Storage for File {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> Result<u64> {
        Ok(self.lock().len)
    }

    fn limits(&self) -> StorageLimits {
        StorageLimits { knows_holes: true, ..StorageLimits::default() }
    }

    fn read_at(&self, mut buf: Buf, offset: u64) -> Completion<WithBuf> {
        let result = self.try_read_at(&mut buf, offset).unwrap_or(Ok(()));
        Completion::ready((buf, result))
    }

    fn write_at(&self, buf: Buf, offset: u64, _flags: WriteFlags) -> Completion<WithBuf> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > FILE_MAX) {
            return Completion::ready((buf, Err(self.too_large())));
        }
        let mut content = self.lock();
        content.write(&buf, offset);
        self.check_growth(content);
        Completion::ready((buf, Ok(())))
    }

    fn flush(&self) -> Completion<Result<()>> {
        Completion::ready(Ok(()))
    }

    fn zero(&self, range: Range<u64>, _mode: ZeroMode) -> Completion<Result<()>> {
        let mut content = self.lock();
        let end = range.end.min(content.len);
        if range.start < end {
            content.zero(range.start..end);
        }
        Completion::ready(Ok(()))
    }

    fn discard(&self, range: Range<u64>) -> Completion<Result<()>> {
        self.zero(range, ZeroMode::MayUnmap)
    }

    fn status(&self, range: Range<u64>) -> Completion<Result<StatusList>> {
        let content = self.lock();
        let mut found: StatusList = Vec::new();
        let mut at = range.start;
        let first = content.find(range.start / PAGE).unwrap_or_else(|index| index);
        for (number, _) in content.pages[first..].iter().take_while(|(number, _)| number * PAGE < range.end) {
            let start = (number * PAGE).max(range.start);
            let end = (number + 1).saturating_mul(PAGE).min(range.end);
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
        if len > FILE_MAX {
            return Completion::ready(Err(self.too_large()));
        }
        let mut content = self.lock();
        let old = content.len;
        if len < old {
            content.zero(len..old.checked_next_multiple_of(PAGE).unwrap_or(old));
        }
        content.len = len;
        self.check_growth(content);
        Completion::ready(Ok(()))
    }

    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Option<Result<()>> {
        let content = self.lock();
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > content.len) {
            let error = Error::new(Code::OutOfFile, "a read goes past the end of the file");
            return Some(Err(error.image(&self.name).at(offset).found(buf.len()).allowed(content.len)));
        }
        content.read(buf, offset);
        Some(Ok(()))
    }

    fn id(&self) -> Option<StorageId> {
        Some(self.id)
    }

    fn allocated_bytes(&self) -> Option<u64> {
        Some(self.lock().pages.len() as u64 * PAGE)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// One directory of files. None is ever made, renamed or deleted: images are written in place.
pub struct Files {
    list: Vec<Arc<File>>,
}

impl Files {
    /// Files with these names and contents, which may take `growth` and be `longer` bytes more.
    pub fn new(contents: &[(String, Content)], growth: u64, longer: u64) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let file = |(name, content): &(String, Content)| {
            Arc::new(File {
                name: name.clone(),
                id: StorageId(u64::MAX, NEXT.fetch_add(1, Ordering::Relaxed)),
                pages_max: content.pages.len() + (growth / PAGE) as usize,
                len_max: content.len.saturating_add(longer),
                content: Mutex::new(content.clone()),
            })
        };
        Arc::new(Files { list: contents.iter().map(file).collect() })
    }

    /// All of them, in the order in which they were given.
    pub fn list(&self) -> &[Arc<File>] {
        &self.list
    }

    fn get(&self, name: &str) -> Option<Arc<File>> {
        self.list.iter().find(|file| file.name == name).cloned()
    }
}

impl Resolver for Files {
    fn open(&self, name: &str, _asker: &Asker, _access: Access) -> Completion<Result<Opened>> {
        let plain = name.replace('\\', "/");
        let plain = plain.trim_start_matches("./");
        Completion::ready(match self.get(plain) {
            Some(storage) => Ok(Opened { storage, location: Location(plain.to_owned()) }),
            None => Err(Error::new(Code::NotFound, "no such file").image(name)),
        })
    }

    fn create(&self, location: &Location, _replace: bool) -> Completion<Result<Arc<dyn Storage>>> {
        panic!("{location} is made, where an image is written in place")
    }

    fn rename(&self, from: &Location, to: &Location) -> Completion<Result<()>> {
        panic!("{from} is renamed to {to}, where an image is written in place")
    }

    fn delete(&self, location: &Location) -> Completion<Result<()>> {
        panic!("{location} is deleted, where an image is written in place")
    }

    fn exists(&self, location: &Location) -> Completion<Result<bool>> {
        Completion::ready(Ok(self.get(&location.0).is_some()))
    }

    fn sync_directory(&self, _location: &Location) -> Completion<Result<()>> {
        Completion::ready(Ok(()))
    }

    fn siblings(&self, location: &Location) -> Completion<Result<Vec<Location>>> {
        let others = self.list.iter().filter(|file| file.name != location.0);
        Completion::ready(Ok(others.map(|file| Location(file.name.clone())).collect()))
    }

    fn beside(&self, _location: &Location, file_name: &str) -> Location {
        Location(file_name.to_owned())
    }

    fn file_name(&self, location: &Location) -> String {
        location.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vellum_tests::disks::noise;

    /// The same requests as an array of bytes gets.
    #[test]
    fn content_does_as_an_array_does() {
        let mut model = noise(1, 50_000);
        model[8192..24_576].fill(0);
        let start = Content::of(&model);
        assert_eq!(start.pages.len(), 9);
        let mut content = start.clone();
        let places = noise(2, 4000);
        for (turn, place) in places.chunks(4).enumerate() {
            let at = usize::from(place[0]) << 8 | usize::from(place[1]);
            let len = (usize::from(place[2] & 0x3f) << 8 | usize::from(place[3])).max(1);
            let (at, end) = (at.min(model.len() - 1), (at + len).min(model.len()));
            if at >= end {
                continue;
            }
            if place[2] & 0x40 == 0 {
                model[at..end].fill(turn as u8);
                content.write(&vec![turn as u8; end - at], at as u64);
            } else {
                model[at..end].fill(0);
                content.zero(at as u64..end as u64);
            }
            let mut found = vec![1; model.len()];
            content.read(&mut found, 0);
            assert!(found == model, "turn {turn}");
        }
        assert!(!start.is_same(&content) && start.is_same(&start.clone()));
    }
}
