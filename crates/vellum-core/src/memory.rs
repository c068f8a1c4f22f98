//! Storage in memory. Sparse: what was never written costs nothing, so that one of 1 EiB is free.

use crate::storage::past_end;
use crate::{
    Buf, Code, Completion, Error, Preallocate, Result, Status, Storage, StorageId, StorageLimits, WithBuf,
    WriteFlags, ZeroMode,
};
use parking_lot::RwLock;
use std::any::Any;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: u64 = 4096;
const PAGE_USIZE: usize = 4096;

/// A sparse, growable storage in memory.
pub struct Memory {
    name: String,
    id: StorageId,
    content: RwLock<Content>,
}

#[derive(Default)]
struct Content {
    pages: BTreeMap<u64, Box<[u8; PAGE_USIZE]>>,
    len: u64,
}

impl Memory {
    /// A storage of `len` zero bytes.
    pub fn new(name: impl Into<String>, len: u64) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Memory {
            name: name.into(),
            id: StorageId(u64::MAX, NEXT.fetch_add(1, Ordering::Relaxed)),
            content: RwLock::new(Content { pages: BTreeMap::new(), len }),
        }
    }

    /// A storage with a copy of `bytes`.
    pub fn from_bytes(name: impl Into<String>, bytes: &[u8]) -> Self {
        let memory = Memory::new(name, 0);
        memory.content.write().write(bytes, 0);
        memory
    }

    /// A copy of all bytes. For tests: takes as much memory as the storage is long.
    pub fn to_vec(&self) -> Vec<u8> {
        let content = self.content.read();
        let mut bytes = vec![0u8; usize::try_from(content.len).unwrap_or(usize::MAX)];
        content.read(&mut bytes, 0);
        bytes
    }
}

/// The parts of `offset..offset + len` by page: page number, offset in it, range in the caller's bytes.
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

impl Content {
    fn read(&self, bytes: &mut [u8], offset: u64) {
        for (page, within, range) in parts(offset, bytes.len()) {
            let len = range.len();
            match self.pages.get(&page) {
                Some(data) => bytes[range].copy_from_slice(&data[within..within + len]),
                None => bytes[range].fill(0),
            }
        }
    }

    fn write(&mut self, bytes: &[u8], offset: u64) {
        for (page, within, range) in parts(offset, bytes.len()) {
            let data = self.pages.entry(page).or_insert_with(|| Box::new([0; PAGE_USIZE]));
            data[within..within + range.len()].copy_from_slice(&bytes[range]);
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    fn zero(&mut self, range: Range<u64>) {
        let first_whole = range.start.div_ceil(PAGE);
        let end_whole = range.end / PAGE;
        let mut edges = Vec::new();
        if first_whole <= end_whole {
            let whole: Vec<u64> = self.pages.range(first_whole..end_whole).map(|(page, _)| *page).collect();
            for page in whole {
                self.pages.remove(&page);
            }
            edges.push(range.start..range.end.min(first_whole * PAGE));
            edges.push((end_whole * PAGE).max(range.start)..range.end);
        } else {
            edges.push(range);
        }
        for edge in edges.into_iter().filter(|edge| edge.start < edge.end) {
            if let Some(data) = self.pages.get_mut(&(edge.start / PAGE)) {
                let within = (edge.start % PAGE) as usize;
                data[within..within + (edge.end - edge.start) as usize].fill(0);
            }
        }
    }
}

impl Storage for Memory {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> Result<u64> {
        Ok(self.content.read().len)
    }

    fn limits(&self) -> StorageLimits {
        StorageLimits { knows_holes: true, ..StorageLimits::default() }
    }

    fn read_at(&self, mut buf: Buf, offset: u64) -> Completion<WithBuf> {
        let result = self.try_read_at(&mut buf, offset).unwrap_or(Ok(()));
        Completion::ready((buf, result))
    }

    fn write_at(&self, buf: Buf, offset: u64, _flags: WriteFlags) -> Completion<WithBuf> {
        if offset.checked_add(buf.len() as u64).is_none() {
            let error =
                Error::new(Code::Overflow, "a write goes past what 64 bits can address").image(&self.name);
            return Completion::ready((buf, Err(error)));
        }
        self.content.write().write(&buf, offset);
        Completion::ready((buf, Ok(())))
    }

    fn flush(&self) -> Completion<Result<()>> {
        Completion::ready(Ok(()))
    }

    fn zero(&self, range: Range<u64>, _mode: ZeroMode) -> Completion<Result<()>> {
        let mut content = self.content.write();
        let end = range.end.min(content.len);
        if range.start < end {
            content.zero(range.start..end);
        }
        Completion::ready(Ok(()))
    }

    fn discard(&self, range: Range<u64>) -> Completion<Result<()>> {
        self.zero(range, ZeroMode::MayUnmap)
    }

    fn status(&self, range: Range<u64>) -> Completion<Result<crate::StatusList>> {
        let content = self.content.read();
        let mut found: Vec<(Range<u64>, Status)> = Vec::new();
        let mut at = range.start;
        for (&page, _) in content.pages.range(range.start / PAGE..range.end.div_ceil(PAGE)) {
            let start = (page * PAGE).max(range.start);
            let end = page.saturating_add(1).saturating_mul(PAGE).min(range.end);
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
        let mut content = self.content.write();
        if len < content.len {
            let old = content.len;
            content.zero(len..old.checked_next_multiple_of(PAGE).unwrap_or(old));
        }
        content.len = len;
        Completion::ready(Ok(()))
    }

    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Option<Result<()>> {
        let content = self.content.read();
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > content.len) {
            return Some(Err(past_end(&self.name, offset, buf.len(), content.len)));
        }
        content.read(buf, offset);
        Some(Ok(()))
    }

    fn id(&self) -> Option<StorageId> {
        Some(self.id)
    }

    fn allocated_bytes(&self) -> Option<u64> {
        Some(self.content.read().pages.len() as u64 * PAGE)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exbibyte_costs_nothing() {
        let memory = Memory::new("m", 1 << 60);
        let (_, result) = memory.write_at(Buf::copy_of(b"end"), (1 << 60) - 3, WriteFlags::default()).wait();
        result.unwrap();
        assert_eq!(memory.allocated_bytes(), Some(4096));
        let status = memory.status(0..1 << 60).wait().unwrap();
        assert_eq!(status[0], (0..(1 << 60) - 4096, Status::Hole));
    }

    #[test]
    fn zero_keeps_what_lies_beside_the_range() {
        let memory = Memory::from_bytes("m", &[1u8; 20_000]);
        memory.zero(100..200, ZeroMode::MayUnmap).wait().unwrap();
        memory.zero(5000..17_000, ZeroMode::MayUnmap).wait().unwrap();
        let bytes = memory.to_vec();
        for (i, byte) in bytes.iter().enumerate() {
            let zero = (100..200).contains(&i) || (5000..17_000).contains(&i);
            assert_eq!(*byte, u8::from(!zero), "byte {i}");
        }
    }
}
