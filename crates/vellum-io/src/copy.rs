//! Copies that the kernel makes: shared blocks (reflink) and `copy_file_range`.

use crate::raw::{FileKind, RawFile};
use crate::sys;
use parking_lot::Mutex;
use rustix::fd::AsFd;
use rustix::io::{Errno, retry_on_intr};
use std::collections::HashSet;
use vellum_core::storage::past_end;
use vellum_core::{CopyMode, Offloaded, Result};

/// Pairs of file systems (source, target) between which blocks cannot be shared, or the kernel cannot copy.
static CANNOT_SHARE: Mutex<Option<HashSet<(u64, u64)>>> = Mutex::new(None);
static CANNOT_COPY: Mutex<Option<HashSet<(u64, u64)>>> = Mutex::new(None);

/// Pairs remembered at most; file systems come and go, and it is only a shortcut.
const PAIRS_MAX: usize = 1024;
/// Bytes asked for in one call, so that one call does not take for ever.
const STEP: u64 = 128 << 20;

/// One copy: where from and where to.
pub(crate) struct Copy<'a> {
    pub(crate) source: &'a RawFile,
    pub(crate) source_offset: u64,
    pub(crate) target: &'a RawFile,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Copy<'_> {
    /// Carries the copy out as `mode` allows.
    pub(crate) fn run(&self, mode: CopyMode) -> Result<Offloaded> {
        let (source, target) = (self.source, self.target);
        target.check_writable()?;
        let source_len = source.len()?;
        let Some(source_end) = self.source_offset.checked_add(self.len).filter(|end| *end <= source_len)
        else {
            let len = usize::try_from(self.len).unwrap_or(usize::MAX);
            return Err(past_end(&source.name, self.source_offset, len, source_len));
        };
        let Some(end) = self.offset.checked_add(self.len).filter(|end| i64::try_from(*end).is_ok()) else {
            return Err(target.overflow(self.offset));
        };
        if self.len == 0 {
            return Ok(Offloaded::Done);
        }
        if source.kind != FileKind::Regular || target.kind != FileKind::Regular {
            return Ok(Offloaded::Cannot);
        }
        let _pass = target.pass(&(self.offset..end), true);
        let mut outcome = self.share(source_end == source_len)?;
        if outcome == Offloaded::Cannot && mode == CopyMode::InKernel {
            outcome = self.copy()?;
        }
        if outcome == Offloaded::Done {
            target.note_end(end);
        }
        Ok(outcome)
    }

    fn pair(&self) -> (u64, u64) {
        (self.source.id.0, self.target.id.0)
    }

    /// Shares blocks. Only whole blocks can be shared; the last one of the source may be short.
    fn share(&self, to_source_end: bool) -> Result<Offloaded> {
        if known(&CANNOT_SHARE, self.pair()) {
            return Ok(Offloaded::Cannot);
        }
        let block = rustix::fs::fstatfs(&self.target.fd)
            .map_err(|e| self.target.os(e, "asking for the block size of the file system"))?
            .f_bsize;
        let block = u64::try_from(block).unwrap_or(0).max(512);
        if !(self.source_offset | self.offset).is_multiple_of(block)
            || !(self.len.is_multiple_of(block) || to_source_end)
        {
            return Ok(Offloaded::Cannot);
        }
        let (source, target) = (self.source.fd.as_fd(), self.target.fd.as_fd());
        match retry_on_intr(|| sys::clone_range(source, self.source_offset, target, self.offset, self.len)) {
            Ok(()) => Ok(Offloaded::Done),
            Err(errno) => self.refused(errno, &CANNOT_SHARE, "sharing blocks"),
        }
    }

    fn copy(&self) -> Result<Offloaded> {
        if known(&CANNOT_COPY, self.pair()) {
            return Ok(Offloaded::Cannot);
        }
        let mut done = 0;
        while done < self.len {
            let (mut from, mut to) = (self.source_offset + done, self.offset + done);
            let step = usize::try_from((self.len - done).min(STEP)).unwrap_or(usize::MAX);
            let copied = retry_on_intr(|| {
                let (from, to) = (Some(&mut from), Some(&mut to));
                rustix::fs::copy_file_range(&self.source.fd, from, &self.target.fd, to, step)
            });
            match copied {
                // The source became shorter, or its file system has no idea; reading will tell.
                Ok(0) => return Ok(Offloaded::Cannot),
                Ok(copied) => done += copied as u64,
                Err(errno) => return self.refused(errno, &CANNOT_COPY, "copying inside the kernel"),
            }
        }
        Ok(Offloaded::Done)
    }

    /// Tells "not like this" from "never between these two" and from what is wrong.
    fn refused(
        &self,
        errno: Errno,
        never: &Mutex<Option<HashSet<(u64, u64)>>>,
        doing: &str,
    ) -> Result<Offloaded> {
        match errno {
            Errno::XDEV | Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS => {
                let mut never = never.lock();
                let pairs = never.get_or_insert_default();
                if pairs.len() < PAIRS_MAX {
                    pairs.insert(self.pair());
                }
                Ok(Offloaded::Cannot)
            }
            // These depend on the files or the offsets (overlap, no copy-on-write, swap file).
            Errno::INVAL | Errno::PERM | Errno::TXTBSY | Errno::OVERFLOW | Errno::BADF => {
                Ok(Offloaded::Cannot)
            }
            errno => {
                Err(self.target.os(errno, &format!("{doing} from {}", self.source.name)).at(self.offset))
            }
        }
    }
}

fn known(pairs: &Mutex<Option<HashSet<(u64, u64)>>>, pair: (u64, u64)) -> bool {
    pairs.lock().as_ref().is_some_and(|pairs| pairs.contains(&pair))
}
