//! [`SimDisk`]: one file of [`SimFiles`], open.

use crate::content::{Content, SECTOR};
use crate::files::SimFiles;
use crate::trace::{FileId, OpKind};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use vellum_core::{
    Buf, Code, Completion, Error, Preallocate, Result, Status, StatusList, Storage, StorageId, StorageLimits,
    WithBuf, WriteFlags, ZeroMode, storage,
};

/// One file of [`SimFiles`], open.
pub struct SimDisk {
    files: Arc<SimFiles>,
    file: FileId,
    name: String,
    is_read_only: bool,
}

impl SimDisk {
    pub(crate) fn new(files: Arc<SimFiles>, file: FileId, name: &str, is_read_only: bool) -> Self {
        SimDisk { files, file, name: name.to_owned(), is_read_only }
    }

    fn change(&self, kind: OpKind) -> Completion<Result<()>> {
        if self.is_read_only {
            return Completion::ready(Err(storage::read_only(&self.name)));
        }
        self.files.submit(self.file, kind)
    }
}

impl Drop for SimDisk {
    fn drop(&mut self) {
        if !self.is_read_only {
            self.files.close(self.file);
        }
    }
}

impl Storage for SimDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> Result<u64> {
        Ok(self.files.with(self.file, Content::len))
    }

    fn limits(&self) -> StorageLimits {
        StorageLimits { knows_holes: true, read_only: self.is_read_only, ..StorageLimits::default() }
    }

    fn read_at(&self, buf: Buf, offset: u64) -> Completion<WithBuf> {
        self.files.submit_read(self.file, buf, offset)
    }

    fn write_at(&self, buf: Buf, offset: u64, flags: WriteFlags) -> Completion<WithBuf> {
        if self.is_read_only {
            return Completion::ready((buf, Err(storage::read_only(&self.name))));
        }
        // A simulated file is small; a driver that writes far out has made a mistake.
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > 1 << 50) {
            let error = Error::new(Code::Overflow, "a write past what a file can hold").image(&self.name);
            return Completion::ready((buf, Err(error)));
        }
        self.files.submit_write(self.file, buf, offset, flags.fua)
    }

    fn flush(&self) -> Completion<Result<()>> {
        if self.is_read_only {
            return Completion::ready(Ok(()));
        }
        self.files.submit(self.file, OpKind::Flush)
    }

    fn zero(&self, range: Range<u64>, _mode: ZeroMode) -> Completion<Result<()>> {
        self.change(OpKind::Zero(range))
    }

    fn discard(&self, range: Range<u64>) -> Completion<Result<()>> {
        self.change(OpKind::Discard(range))
    }

    fn status(&self, range: Range<u64>) -> Completion<Result<StatusList>> {
        let mut found: StatusList = Vec::new();
        let mut at = range.start;
        self.files.with(self.file, |content| {
            for data in content.data_in(range.clone()) {
                if data.start > at {
                    found.push((at..data.start, Status::Hole));
                }
                match found.last_mut() {
                    Some((last, Status::Data)) if last.end == data.start => last.end = data.end,
                    _ => found.push((data.clone(), Status::Data)),
                }
                at = data.end;
            }
        });
        if at < range.end {
            found.push((at..range.end, Status::Hole));
        }
        Completion::ready(Ok(found))
    }

    fn set_len(&self, len: u64, _preallocate: Preallocate) -> Completion<Result<()>> {
        self.change(OpKind::SetLen(len))
    }

    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Option<Result<()>> {
        if !self.files.is_quiet() {
            return None;
        }
        Some(self.files.with(self.file, |content| {
            if offset.checked_add(buf.len() as u64).is_none_or(|end| end > content.len()) {
                return Err(storage::past_end(&self.name, offset, buf.len(), content.len()));
            }
            content.read(buf, offset);
            Ok(())
        }))
    }

    fn id(&self) -> Option<StorageId> {
        Some(StorageId(u64::MAX - self.files.number(), self.file as u64))
    }

    fn allocated_bytes(&self) -> Option<u64> {
        Some(self.files.with(self.file, |content| content.data().count() as u64 * 8 * SECTOR))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
