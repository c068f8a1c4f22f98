//! Zeroing, discarding and changing the length.

use crate::raw::{FileKind, RawFile};
use rustix::fs::{FallocateFlags, fallocate, ftruncate};
use rustix::io::{Errno, retry_on_intr};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use vellum_core::{Code, Error, Preallocate, Result, ZeroMode};

impl RawFile {
    /// Makes `range`, clipped to the file, read as zeros.
    pub(crate) fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Result<()> {
        self.check_writable()?;
        let Some(range) = self.clip(range)? else { return Ok(()) };
        // Devices zero whole blocks only.
        let whole = self.whole_blocks(&range);
        if !self.zero_quickly(&whole, mode)? {
            return self.write_zeros(range);
        }
        for edge in [range.start..whole.start, whole.end..range.end] {
            if edge.start < edge.end {
                self.write_zeros(edge)?;
            }
        }
        Ok(())
    }

    /// Zeroes without sending zeros; `false` if that cannot be done here.
    fn zero_quickly(&self, range: &Range<u64>, mode: ZeroMode) -> Result<bool> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        if mode == ZeroMode::MayUnmap
            && self.try_fallocate(punch, range, &self.can.punch, "punching a hole")?
        {
            return Ok(true);
        }
        self.try_fallocate(zero, range, &self.can.zero_range, "zeroing")
    }

    /// Gives the space of `range` back. What the file system or device cannot do is left undone.
    pub(crate) fn discard(&self, range: Range<u64>) -> Result<()> {
        self.check_writable()?;
        let Some(range) = self.clip(range)? else { return Ok(()) };
        // Not BLKDISCARD: after it a device may return anything. A hole in a device is zeros or an error.
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.try_fallocate(punch, &self.whole_blocks(&range), &self.can.punch, "discarding").map(|_| ())
    }

    fn clip(&self, range: Range<u64>) -> Result<Option<Range<u64>>> {
        let end = range.end.min(self.len()?);
        Ok((range.start < end).then_some(range.start..end))
    }

    /// The part of `range` that one `fallocate` may be asked for; empty at its start if there is none.
    fn whole_blocks(&self, range: &Range<u64>) -> Range<u64> {
        if self.kind == FileKind::Regular {
            return range.clone();
        }
        let unit = u64::from(self.granularity).max(4096);
        let (start, end) = (range.start.next_multiple_of(unit), range.end / unit * unit);
        if start < end { start..end } else { range.start..range.start }
    }

    fn try_fallocate(
        &self,
        flags: FallocateFlags,
        range: &Range<u64>,
        can: &AtomicBool,
        doing: &str,
    ) -> Result<bool> {
        if !can.load(Ordering::Relaxed) {
            return Ok(false);
        }
        if range.start >= range.end {
            return Ok(true);
        }
        let _pass = self.pass(range, true);
        match retry_on_intr(|| fallocate(&self.fd, flags, range.start, range.end - range.start)) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => {
                can.store(false, Ordering::Relaxed);
                Ok(false)
            }
            Err(Errno::INVAL) => Ok(false),
            Err(errno) => Err(self.os(errno, doing).at(range.start)),
        }
    }

    pub(crate) fn set_len(&self, len: u64, preallocate: Preallocate) -> Result<()> {
        self.check_writable()?;
        if self.kind == FileKind::Block {
            return Err(Error::new(Code::Usage, "a device cannot change its length").image(&self.name));
        }
        let old = self.len()?;
        let _pass = self.pass(&(len.min(old)..u64::MAX), true);
        self.truncate(len)?;
        self.note_len_changed();
        drop(_pass);
        if len <= old || preallocate == Preallocate::Off {
            return Ok(());
        }
        let reserved = self.reserve(old..len, preallocate);
        if reserved.is_err() {
            // Nothing half done: the file is as long as it was. The first error is the one that counts.
            let _ = self.truncate(old);
        }
        reserved
    }

    fn truncate(&self, len: u64) -> Result<()> {
        if i64::try_from(len).is_err() {
            return Err(Error::new(Code::NoSpace, "no file can be that long").image(&self.name).found(len));
        }
        retry_on_intr(|| ftruncate(&self.fd, len))
            .map_err(|e| self.os(e, &format!("changing the length to {len} bytes")))
    }

    /// Reserves the space of `range`, which is a hole at the end of the file.
    fn reserve(&self, range: Range<u64>, preallocate: Preallocate) -> Result<()> {
        if preallocate == Preallocate::Falloc {
            let len = range.end - range.start;
            match retry_on_intr(|| fallocate(&self.fd, FallocateFlags::empty(), range.start, len)) {
                Ok(()) => return Ok(()),
                // Then the space can only be reserved by writing to it.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(errno) => return Err(self.os(errno, &format!("reserving {len} bytes"))),
            }
        }
        self.write_zeros(range)
    }
}
