//! Telling holes from data.

use crate::raw::{FileKind, RawFile};
use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, retry_on_intr};
use std::ops::Range;
use std::sync::atomic::Ordering;
use vellum_core::{Result, Status};

/// Extents that one answer holds at most.
const EXTENTS_MAX: usize = 1024;

/// Pieces in order, without gaps; neighbours of one kind are joined.
struct Map(Vec<(Range<u64>, Status)>);

impl Map {
    fn push(&mut self, range: Range<u64>, status: Status) {
        match self.0.last_mut() {
            _ if range.start >= range.end => {}
            Some((last, kind)) if *kind == status => last.end = range.end,
            _ => self.0.push((range, status)),
        }
    }
}

impl RawFile {
    /// What is in `range`, from its start on. Past the end of the file there is a hole.
    ///
    /// The file may change under the question, even shrink: whatever the kernel answers, this returns pieces without
    /// gaps, and calls a hole only what the kernel called one.
    pub(crate) fn status(&self, range: Range<u64>) -> Result<Vec<(Range<u64>, Status)>> {
        let mut map = Map(Vec::new());
        let end = range.end.min(self.len()?);
        let mut at = range.start;
        if at < end && !self.may_have_holes()? {
            map.push(at..end, Status::Data);
            at = end;
        }
        while at < end {
            if map.0.len() + 2 > EXTENTS_MAX {
                return Ok(map.0);
            }
            let Some((data, hole)) = self.next_data(at, end)? else {
                // No data from here on, or the file became shorter.
                map.push(at..range.end, Status::Hole);
                return Ok(map.0);
            };
            map.push(at..data, Status::Hole);
            map.push(data..hole, Status::Data);
            at = hole;
        }
        map.push(at..range.end, Status::Hole);
        Ok(map.0)
    }

    /// Whether asking for holes is worth it: not if the file takes as much space as it is long.
    fn may_have_holes(&self) -> Result<bool> {
        if self.kind == FileKind::Block || !self.can.seek_hole.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let stat = rustix::fs::fstat(&self.fd)
            .map_err(|e| self.os(e, "asking for the space that the file takes"))?;
        let (blocks, size) =
            (u64::try_from(stat.st_blocks).unwrap_or(0), u64::try_from(stat.st_size).unwrap_or(0));
        Ok(blocks.saturating_mul(512) < size)
    }

    /// The next data at or after `at`, both ends inside `at..end`; `None` if there is none up to the end of the file.
    fn next_data(&self, at: u64, end: u64) -> Result<Option<(u64, u64)>> {
        let data = match retry_on_intr(|| seek(&self.fd, SeekFrom::Data(at))) {
            Ok(data) => data.clamp(at, end),
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.can.seek_hole.store(false, Ordering::Relaxed);
                return Ok(Some((at, end)));
            }
            Err(errno) => return Err(self.os(errno, "looking for data").at(at)),
        };
        if data >= end {
            return Ok(Some((end, end)));
        }
        match retry_on_intr(|| seek(&self.fd, SeekFrom::Hole(data))) {
            // A hole that begins where data begins: they contradict each other, so it counts as data.
            Ok(hole) if hole <= data => Ok(Some((data, end))),
            Ok(hole) => Ok(Some((data, hole.min(end)))),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(self.os(errno, "looking for a hole").at(data)),
        }
    }
}
