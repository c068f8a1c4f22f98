//! A part of another storage: a partition, an extent inside a file.

use crate::storage::past_end;
use crate::{
    Buf, Code, Completion, CopyMode, Error, Offloaded, Preallocate, Result, Storage, StorageLimits, WithBuf,
    WriteFlags, ZeroMode,
};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// `range` of another storage, as a storage of fixed length.
pub struct Slice {
    inner: Arc<dyn Storage>,
    range: Range<u64>,
}

impl Slice {
    /// The bytes `range` of `inner`, which must lie inside it.
    pub fn new(inner: Arc<dyn Storage>, range: Range<u64>) -> Result<Self> {
        let len = inner.len()?;
        if range.start > range.end || range.end > len {
            return Err(Error::new(Code::OutOfFile, "a slice reaches outside its storage")
                .image(inner.name())
                .found(format!("{}..{}", range.start, range.end))
                .allowed(format!("0..{len}")));
        }
        Ok(Slice { inner, range })
    }

    /// `range` of the slice as a range of the inner storage, clipped.
    fn inside(&self, range: Range<u64>) -> Range<u64> {
        let clip = |at: u64| self.range.start.saturating_add(at).min(self.range.end);
        clip(range.start)..clip(range.end)
    }

    fn check(&self, offset: u64, len: usize) -> Result<u64> {
        let own = self.range.end - self.range.start;
        match offset.checked_add(len as u64) {
            Some(end) if end <= own => Ok(self.range.start + offset),
            _ => Err(past_end(self.inner.name(), offset, len, own)),
        }
    }
}

impl Storage for Slice {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn len(&self) -> Result<u64> {
        Ok(self.range.end - self.range.start)
    }
    fn limits(&self) -> StorageLimits {
        StorageLimits { resizable: false, ..self.inner.limits() }
    }
    fn read_at(&self, buf: Buf, offset: u64) -> Completion<WithBuf> {
        match self.check(offset, buf.len()) {
            Ok(at) => self.inner.read_at(buf, at),
            Err(error) => Completion::ready((buf, Err(error))),
        }
    }
    fn write_at(&self, buf: Buf, offset: u64, flags: WriteFlags) -> Completion<WithBuf> {
        match self.check(offset, buf.len()) {
            Ok(at) => self.inner.write_at(buf, at, flags),
            Err(error) => Completion::ready((buf, Err(error))),
        }
    }
    fn flush(&self) -> Completion<Result<()>> {
        self.inner.flush()
    }
    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Completion<Result<()>> {
        self.inner.zero(self.inside(range), mode)
    }
    fn discard(&self, range: Range<u64>) -> Completion<Result<()>> {
        self.inner.discard(self.inside(range))
    }
    fn status(&self, range: Range<u64>) -> Completion<Result<crate::StatusList>> {
        let start = self.range.start;
        let inner = self.inner.status(self.inside(range));
        Completion::from_future(async move {
            let parts = inner.await?;
            Ok(parts.into_iter().map(|(r, status)| (r.start - start..r.end - start, status)).collect())
        })
    }
    fn set_len(&self, _len: u64, _preallocate: Preallocate) -> Completion<Result<()>> {
        Completion::ready(Err(
            Error::new(Code::Usage, "a slice cannot change its length").image(self.inner.name())
        ))
    }
    fn copy_from(
        &self,
        source: &dyn Storage,
        source_offset: u64,
        offset: u64,
        len: u64,
        mode: CopyMode,
    ) -> Completion<Result<Offloaded>> {
        match self.check(offset, usize::try_from(len).unwrap_or(usize::MAX)) {
            Ok(at) => self.inner.copy_from(source, source_offset, at, len, mode),
            Err(error) => Completion::ready(Err(error)),
        }
    }
    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Option<Result<()>> {
        match self.check(offset, buf.len()) {
            Ok(at) => self.inner.try_read_at(buf, at),
            Err(error) => Some(Err(error)),
        }
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memory;

    #[test]
    fn a_slice_shows_its_range_and_nothing_else() {
        let inner: Arc<dyn Storage> = Arc::new(Memory::from_bytes("m", b"0123456789"));
        let slice = Slice::new(inner.clone(), 3..7).unwrap();
        let (buf, result) = slice.read_at(Buf::zeroed(4), 0).wait();
        result.unwrap();
        assert_eq!(&*buf, b"3456");
        assert_eq!(slice.read_at(Buf::zeroed(4), 1).wait().1.unwrap_err().code(), Code::OutOfFile);
        slice.zero(2..100, ZeroMode::MayUnmap).wait().unwrap();
        assert_eq!(&*inner.read_at(Buf::zeroed(10), 0).wait().0, b"01234\x00\x00789");
        assert!(Slice::new(inner, 8..11).is_err());
    }
}
