//! [`RawFile`]: one open file or block device, and the calls on it that wait.
//!
//! Positional calls only, so that any number of threads may use one descriptor. Every loop copes with interruption
//! and with short transfers.

use crate::gate::{Gate, Pass};
use parking_lot::Mutex;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, ReadWriteFlags, pread, preadv2, pwrite, pwritev2, retry_on_intr};
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vellum_core::storage::{past_end, read_only};
use vellum_core::{Buf, Code, Error, Result, StorageId};

/// An open file or block device.
pub(crate) struct RawFile {
    pub(crate) name: String,
    /// Through the page cache.
    pub(crate) fd: OwnedFd,
    pub(crate) direct: Option<Direct>,
    pub(crate) kind: FileKind,
    pub(crate) id: StorageId,
    pub(crate) write: bool,
    /// Other processes may write it at the same time.
    shares_writing: bool,
    /// A power of two.
    pub(crate) granularity: u32,
    pub(crate) gate: Arc<Gate>,
    pub(crate) can: Abilities,
    /// Length at the last flush, as far as known.
    flushed_len: AtomicU64,
    /// The length may have changed since the last flush.
    len_changed: AtomicBool,
    /// What the first failed flush said.
    poison: Mutex<Option<Errno>>,
}

/// The second descriptor of a file that goes around the page cache.
pub(crate) struct Direct {
    pub(crate) fd: OwnedFd,
    /// Bytes that offsets and lengths must be multiples of. A power of two.
    pub(crate) alignment: u64,
    /// Bytes that addresses must be multiples of. A power of two.
    pub(crate) memory_alignment: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    Regular,
    Block,
}

/// What the file system has not yet refused.
pub(crate) struct Abilities {
    pub(crate) read_nowait: AtomicBool,
    pub(crate) punch: AtomicBool,
    pub(crate) zero_range: AtomicBool,
    pub(crate) seek_hole: AtomicBool,
}

impl Default for Abilities {
    fn default() -> Self {
        let yes = || AtomicBool::new(true);
        Abilities { read_nowait: yes(), punch: yes(), zero_range: yes(), seek_hole: yes() }
    }
}

/// Bytes that a bounce buffer or a buffer of zeros holds.
const STEP: usize = 1 << 20;
/// Changes of one page of the page cache are kept apart, whatever the alignment of the device.
const PAGE: u64 = 4096;

impl RawFile {
    pub(crate) fn new(
        name: String,
        fd: OwnedFd,
        direct: Option<Direct>,
        kind: FileKind,
        write: bool,
        shares_writing: bool,
    ) -> Result<Self> {
        let stat = rustix::fs::fstat(&fd).map_err(|e| os(&name, e, "asking for the file's attributes"))?;
        let id = match kind {
            FileKind::Regular => StorageId(stat.st_dev, stat.st_ino),
            // Every node of a device is the same device. No file has inode number zero.
            FileKind::Block => StorageId(stat.st_rdev, 0),
        };
        let block = u32::try_from(stat.st_blksize).unwrap_or(4096).clamp(512, 1 << 20);
        let granularity = if block.is_power_of_two() { block } else { 4096 };
        let file = RawFile {
            name,
            fd,
            direct,
            kind,
            id,
            write,
            shares_writing,
            granularity,
            gate: Arc::default(),
            can: Abilities::default(),
            flushed_len: AtomicU64::new(0),
            len_changed: AtomicBool::new(false),
            poison: Mutex::new(None),
        };
        file.flushed_len.store(file.len()?, Ordering::Relaxed);
        Ok(file)
    }

    pub(crate) fn len(&self) -> Result<u64> {
        let len = match self.kind {
            FileKind::Regular => {
                rustix::fs::fstat(&self.fd).map(|stat| u64::try_from(stat.st_size).unwrap_or(0))
            }
            // The cursor that this moves is used by nobody.
            FileKind::Block => rustix::fs::seek(&self.fd, rustix::fs::SeekFrom::End(0)),
        };
        len.map_err(|e| self.os(e, "asking for the length"))
    }

    pub(crate) fn os(&self, errno: Errno, doing: &str) -> Error {
        os(&self.name, errno, doing)
    }

    /// An error unless the file may be changed: opened for writing, and no flush has failed.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if !self.write {
            return Err(read_only(&self.name));
        }
        match *self.poison.lock() {
            None => Ok(()),
            Some(errno) => Err(self
                .os(errno, "an earlier flush failed, so what was written since the one before may be lost")
                .hint("open the file again and check it; do not trust what was written")),
        }
    }

    fn poison(&self, errno: Errno) {
        self.poison.lock().get_or_insert(errno);
    }

    /// Holds `range` against read-modify-writes (direct files only).
    pub(crate) fn pass(&self, range: &Range<u64>, alone: bool) -> Option<Pass> {
        let unit = self.direct.as_ref()?.alignment.max(PAGE);
        let end = range.end.checked_next_multiple_of(unit).unwrap_or(u64::MAX);
        Some(self.gate.enter(range.start / unit * unit..end, alone))
    }

    /// The descriptor for requests that need no bouncing, if this request needs none.
    pub(crate) fn plain_fd(&self, bytes: *const u8, len: usize, offset: u64) -> Option<BorrowedFd<'_>> {
        match &self.direct {
            None => Some(self.fd.as_fd()),
            Some(direct) if direct.suits(bytes, len, offset) => Some(direct.fd.as_fd()),
            Some(_) => None,
        }
    }

    /// Reads what the page cache holds, without waiting; returns the bytes read. Stops early for any reason at all.
    pub(crate) fn read_cached(&self, buf: &mut [u8], offset: u64) -> usize {
        if self.direct.is_some()
            || self.span(offset, buf.len()).is_none()
            || !self.can.read_nowait.load(Ordering::Relaxed)
        {
            return 0;
        }
        let mut parts = [IoSliceMut::new(buf)];
        match preadv2(&self.fd, &mut parts, offset, ReadWriteFlags::NOWAIT) {
            Ok(read) => read,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.can.read_nowait.store(false, Ordering::Relaxed);
                0
            }
            Err(_) => 0,
        }
    }

    /// `offset..offset + len`, if the kernel can count that far.
    pub(crate) fn span(&self, offset: u64, len: usize) -> Option<Range<u64>> {
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        i64::try_from(end).is_ok().then_some(offset..end)
    }

    /// Fills `buf` from `offset` on.
    pub(crate) fn read_exact(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if self.span(offset, buf.len()).is_none() {
            return Err(past_end(&self.name, offset, buf.len(), self.len()?));
        }
        if buf.is_empty() {
            let len = self.len()?;
            return if offset <= len { Ok(()) } else { Err(past_end(&self.name, offset, 0, len)) };
        }
        let Some(direct) = &self.direct else {
            return self.read_through_cache(buf, offset, offset);
        };
        if !direct.suits(buf.as_ptr(), buf.len(), offset) {
            return self.read_bounced(direct, buf, offset);
        }
        let read = self.read_direct(direct, buf, offset)?;
        if read < buf.len() {
            return Err(past_end(&self.name, offset, buf.len(), self.len()?));
        }
        Ok(())
    }

    fn read_through_cache(&self, buf: &mut [u8], mut at: u64, requested: u64) -> Result<()> {
        let len = buf.len();
        let mut rest = buf;
        while !rest.is_empty() {
            match retry_on_intr(|| pread(&self.fd, &mut *rest, at)) {
                Ok(0) => return Err(past_end(&self.name, requested, len, self.len()?)),
                Ok(read) => {
                    at += read as u64;
                    rest = rest.get_mut(read..).unwrap_or_default();
                }
                Err(errno) => return Err(self.os(errno, "reading").at(at)),
            }
        }
        Ok(())
    }

    /// Reads until `buf` is full or the file ends. The request is aligned.
    fn read_direct(&self, direct: &Direct, buf: &mut [u8], offset: u64) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            match retry_on_intr(|| pread(&direct.fd, &mut buf[done..], at)) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(errno) => return Err(self.os(errno, "reading").at(at)),
            }
            // Only the end of the file makes a direct read end off its alignment, and from there it cannot go on.
            if !(done as u64).is_multiple_of(direct.alignment) {
                break;
            }
        }
        Ok(done)
    }

    fn read_bounced(&self, direct: &Direct, buf: &mut [u8], offset: u64) -> Result<()> {
        let len = buf.len();
        let mut bounce = Buf::zeroed(direct.bounce_len(offset, len));
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let start = at / direct.alignment * direct.alignment;
            let skip = (at - start) as usize;
            let want = direct.round_up(skip + (len - done)).min(bounce.capacity());
            bounce.set_window(0..want);
            let read = self.read_direct(direct, &mut bounce, start)?;
            let take = read.saturating_sub(skip).min(len - done);
            if take == 0 {
                return Err(past_end(&self.name, offset, len, self.len()?));
            }
            buf[done..done + take].copy_from_slice(&bounce[skip..skip + take]);
            done += take;
        }
        Ok(())
    }

    /// Writes all of `buf` at `offset`; durable when it returns if `fua`.
    pub(crate) fn write_all(&self, buf: &[u8], offset: u64, fua: bool) -> Result<()> {
        self.check_writable()?;
        let Some(span) = self.span(offset, buf.len()) else { return Err(self.overflow(offset)) };
        if buf.is_empty() {
            return Ok(());
        }
        match &self.direct {
            None => self.write_to(self.fd.as_fd(), buf, offset, fua)?,
            Some(direct) if direct.suits(buf.as_ptr(), buf.len(), offset) => {
                let _pass = self.pass(&span, false);
                self.write_to(direct.fd.as_fd(), buf, offset, fua)?;
            }
            Some(direct) if self.shares_writing => return Err(self.would_undo(direct, offset, buf.len())),
            Some(direct) => {
                let _pass = self.pass(&span, true);
                self.write_bounced(direct, buf, &span, fua)?;
            }
        }
        self.note_end(span.end);
        Ok(())
    }

    #[cold]
    pub(crate) fn overflow(&self, offset: u64) -> Error {
        Error::new(Code::Overflow, "a write goes past what a file can hold").image(&self.name).found(offset)
    }

    /// A direct write of a part of a block reads the block, changes it and writes it back. What another process writes there
    /// in between would be lost, and no lock of ours keeps it from doing so.
    #[cold]
    fn would_undo(&self, direct: &Direct, offset: u64, len: usize) -> Error {
        Error::new(
            Code::Usage,
            "a write around the page cache that is not whole blocks could undo what another process writes beside it",
        )
        .image(&self.name)
        .at(offset)
        .found(format!("{len} bytes"))
        .allowed(format!("multiples of {} bytes", direct.alignment))
        .hint("write whole blocks, or use the page cache (without --direct)")
    }

    /// Remembers that the file may have become longer.
    pub(crate) fn note_end(&self, end: u64) {
        if end > self.flushed_len.load(Ordering::Relaxed) {
            self.len_changed.store(true, Ordering::Release);
        }
    }

    fn write_to(&self, fd: BorrowedFd<'_>, buf: &[u8], offset: u64, fua: bool) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let rest = &buf[done..];
            let written = retry_on_intr(|| match fua {
                true => pwritev2(fd, &[IoSlice::new(rest)], at, ReadWriteFlags::DSYNC),
                false => pwrite(fd, rest, at),
            });
            match written {
                Ok(0) => {
                    return Err(Error::new(Code::Io, "the system wrote nothing and gave no reason")
                        .image(&self.name)
                        .at(at));
                }
                Ok(written) => done += written,
                Err(Errno::OPNOTSUPP | Errno::NOSYS) if fua => {
                    self.write_to(fd, rest, at, false)?;
                    return self.flush();
                }
                Err(errno) => {
                    if fua {
                        // It may be the flush that failed, and then it is not to be tried again.
                        self.poison(errno);
                    }
                    return Err(self.os(errno, "writing").at(at));
                }
            }
        }
        Ok(())
    }

    /// Writes a request that is not aligned. The caller holds its blocks alone.
    fn write_bounced(&self, direct: &Direct, buf: &[u8], span: &Range<u64>, fua: bool) -> Result<()> {
        let unit = direct.alignment;
        let end = span.end.next_multiple_of(unit);
        if self.kind == FileKind::Regular && end != span.end && end > self.len()? {
            // A whole last block would make the file longer than it is to be. The kernel keeps the page cache and
            // direct requests of one file coherent as long as they do not run at the same time; the pass sees to that.
            return self.write_to(self.fd.as_fd(), buf, span.start, fua);
        }
        let mut bounce = Buf::zeroed(direct.bounce_len(span.start, buf.len()));
        let mut done = 0;
        while done < buf.len() {
            let at = span.start + done as u64;
            let start = at / unit * unit;
            let skip = (at - start) as usize;
            let whole = direct.round_up(skip + (buf.len() - done)).min(bounce.capacity());
            let take = (whole - skip).min(buf.len() - done);
            let block = unit as usize;
            if skip != 0 {
                bounce.set_window(0..block);
                self.read_block(direct, &mut bounce, start)?;
            }
            if skip + take != whole && (skip == 0 || whole > block) {
                bounce.set_window(whole - block..whole);
                self.read_block(direct, &mut bounce, start + (whole - block) as u64)?;
            }
            bounce.set_window(0..whole);
            bounce[skip..skip + take].copy_from_slice(&buf[done..done + take]);
            self.write_to(direct.fd.as_fd(), &bounce, start, fua)?;
            done += take;
        }
        Ok(())
    }

    /// Reads one block; what lies past the end of the file is zero.
    fn read_block(&self, direct: &Direct, block: &mut Buf, offset: u64) -> Result<()> {
        let read = self.read_direct(direct, block, offset)?;
        block[read..].fill(0);
        Ok(())
    }

    /// Writes zeros over `range`.
    pub(crate) fn write_zeros(&self, range: Range<u64>) -> Result<()> {
        let zeros = Buf::zeroed(STEP.min(usize::try_from(range.end - range.start).unwrap_or(STEP)));
        let mut at = range.start;
        while at < range.end {
            let len = zeros.len().min(usize::try_from(range.end - at).unwrap_or(usize::MAX));
            self.write_all(&zeros[..len], at, false)?;
            at += len as u64;
        }
        Ok(())
    }

    /// Makes every completed write durable. The first failure is final: after it, pages that never reached the disk
    /// may count as clean, and a second flush would succeed without them.
    pub(crate) fn flush(&self) -> Result<()> {
        if !self.write {
            return Ok(());
        }
        self.check_writable()?;
        let len_changed = self.len_changed.swap(false, Ordering::AcqRel);
        let len = if len_changed { self.len()? } else { 0 };
        let done = retry_on_intr(|| match len_changed {
            true => rustix::fs::fsync(&self.fd),
            false => rustix::fs::fdatasync(&self.fd),
        });
        match done {
            Ok(()) if len_changed => self.flushed_len.store(len, Ordering::Relaxed),
            Ok(()) => {}
            Err(errno) => {
                self.poison(errno);
                return Err(self
                    .os(errno, "flushing")
                    .hint("the disk or its file system has a problem: see dmesg"));
            }
        }
        Ok(())
    }

    /// Remembers that the length was changed on purpose.
    pub(crate) fn note_len_changed(&self) {
        self.len_changed.store(true, Ordering::Release);
    }
}

/// After a failed flush, pages that never reached the disk may count as clean: whoever opened the file next would build on
/// what the disk does not hold. So the kernel is asked to forget what it has cached, before the locks on the file go.
impl Drop for RawFile {
    fn drop(&mut self) {
        if self.poison.get_mut().is_some() {
            // A hint; where it is not taken nothing else can be done.
            let _ = rustix::fs::fadvise(&self.fd, 0, None, rustix::fs::Advice::DontNeed);
        }
    }
}

impl Direct {
    fn suits(&self, bytes: *const u8, len: usize, offset: u64) -> bool {
        (offset | len as u64).is_multiple_of(self.alignment)
            && bytes.addr().is_multiple_of(self.memory_alignment)
    }

    fn round_up(&self, len: usize) -> usize {
        len.next_multiple_of(self.alignment as usize)
    }

    fn bounce_len(&self, offset: u64, len: usize) -> usize {
        let skip = (offset % self.alignment) as usize;
        self.round_up(skip + len.min(STEP)).min(STEP.max(self.alignment as usize * 2))
    }
}

/// An error of the operating system about a file.
#[cold]
pub(crate) fn os(name: &str, errno: Errno, doing: &str) -> Error {
    let error = Error::from_io(errno.into(), doing).image(name);
    match errno {
        Errno::NOSPC | Errno::DQUOT => error.hint("free some space, or write to another place"),
        Errno::IO => error.hint("the disk reports an error: see dmesg"),
        _ => error,
    }
}
