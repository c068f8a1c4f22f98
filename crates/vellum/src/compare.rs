//! `compare`: the content of two disks, in any two formats. Ranges that neither disk holds cost nothing.

use crate::scan::CHUNK_BYTES;
use crate::{Control, Progress, Vellum};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use vellum_core::{Buf, Code, Disk, Error, Piece, PieceKind, Result, block_on};

/// How two disks are compared.
#[derive(Clone, Debug)]
pub struct CompareRequest {
    /// Different sizes are a difference even if the longer tail is zero.
    pub strict: bool,
    /// Threads; `None` is one for each processor.
    pub threads: Option<usize>,
    /// What progress calls the phase.
    pub phase: &'static str,
}

impl Default for CompareRequest {
    fn default() -> Self {
        CompareRequest { strict: false, threads: None, phase: "comparing" }
    }
}

/// What a comparison found. Sizes and offsets in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompareReport {
    /// Sizes of the two disks.
    pub sizes: (u64, u64),
    /// The first guest byte that differs; where one disk ends, the other counts as zero beyond.
    pub first_difference: Option<u64>,
    /// 512-byte sectors that differ.
    pub different_sectors: u64,
    /// Bytes that differ.
    pub different_bytes: u64,
    /// Bytes that had to be read from either disk.
    pub compared_bytes: u64,
    /// Whether this counts as the same.
    pub same: bool,
}

/// Bytes of the unit in which differences are counted.
const SECTOR: usize = 512;

impl Vellum {
    /// Compares two disks to the end.
    pub fn compare(
        &self,
        left: &Disk,
        right: &Disk,
        request: &CompareRequest,
        progress: &dyn Progress,
    ) -> Result<CompareReport> {
        let sizes = (left.size(), right.size());
        progress.begin(request.phase, sizes.0.max(sizes.1));
        let walk = Walk { sides: [Side::new(left), Side::new(right)], end: sizes.0.max(sizes.1), at: 0 };
        let work =
            Work { walk: Mutex::new(walk), found: Mutex::default(), moved: AtomicU64::new(0), progress };
        let threads = request.threads.unwrap_or_else(default_threads).clamp(1, 256);
        let results = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| work.run(left, right))).collect();
            workers.into_iter().map(|worker| worker.join()).collect::<Vec<_>>()
        });
        for result in results {
            result.unwrap_or_else(|_| Err(Error::new(Code::Lost, "a comparing thread ended early")))?;
        }
        let mut report = work.found.into_inner();
        report.sizes = sizes;
        report.compared_bytes = work.moved.into_inner();
        report.same = report.first_difference.is_none() && (!request.strict || sizes.0 == sizes.1);
        progress.advance(sizes.0.max(sizes.1), report.compared_bytes);
        Ok(report)
    }
}

pub(crate) fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(16)
}

/// One disk and the pieces of it that lie ahead.
struct Side {
    disk: Disk,
    ahead: std::collections::VecDeque<Piece>,
}

impl Side {
    fn new(disk: &Disk) -> Self {
        Side { disk: disk.clone(), ahead: Default::default() }
    }

    /// What is at `at`, and how far that reaches.
    fn piece(&mut self, at: u64) -> Result<(u64, PieceKind)> {
        if at >= self.disk.size() {
            return Ok((u64::MAX, PieceKind::Zero));
        }
        while self.ahead.front().is_some_and(|piece| piece.range.end <= at) {
            self.ahead.pop_front();
        }
        if self.ahead.is_empty() {
            self.ahead.extend(block_on(self.disk.pieces(at..self.disk.size(), 256))?);
        }
        let found = self.ahead.front().map(|piece| (piece.range.end, piece.kind.clone()));
        found.ok_or_else(|| Error::new(Code::Corrupt, "the map of the disk has a gap").at(at))
    }
}

/// Walks both disks and hands out the ranges that must be looked at.
struct Walk {
    sides: [Side; 2],
    end: u64,
    at: u64,
}

impl Walk {
    fn next(&mut self) -> Result<Option<Range<u64>>> {
        let mut wanted: Option<Range<u64>> = None;
        while self.at < self.end {
            let [left, right] = &mut self.sides;
            let ((left_end, left_kind), (right_end, right_kind)) =
                (left.piece(self.at)?, right.piece(self.at)?);
            let end = left_end.min(right_end).min(self.end);
            let nothing = matches!((&left_kind, &right_kind), (PieceKind::Zero, PieceKind::Zero));
            if nothing {
                if wanted.is_some() {
                    break;
                }
                self.at = end;
                continue;
            }
            let start = wanted.as_ref().map_or(self.at, |range| range.start);
            let stop = end.min((start / CHUNK_BYTES + 1) * CHUNK_BYTES);
            wanted = Some(start..stop);
            self.at = stop;
            if stop.is_multiple_of(CHUNK_BYTES) {
                break;
            }
        }
        Ok(wanted)
    }
}

struct Work<'a> {
    walk: Mutex<Walk>,
    found: Mutex<CompareReport>,
    moved: AtomicU64,
    progress: &'a dyn Progress,
}

impl Work<'_> {
    fn run(&self, left: &Disk, right: &Disk) -> Result<()> {
        let (mut a, mut b) = (Buf::zeroed(CHUNK_BYTES as usize), Buf::zeroed(CHUNK_BYTES as usize));
        loop {
            let Some(range) = self.walk.lock().next()? else { return Ok(()) };
            a = read_padded(left, a, &range)?;
            b = read_padded(right, b, &range)?;
            if *a != *b {
                self.count(range.start, &a, &b);
            }
            let len = range.end - range.start;
            let moved = self.moved.fetch_add(len, Ordering::Relaxed) + len;
            if self.progress.advance(range.end, moved) == Control::Stop {
                return Err(Error::new(Code::Cancelled, "stopped before the end"));
            }
        }
    }

    fn count(&self, start: u64, a: &[u8], b: &[u8]) {
        let mut found = self.found.lock();
        // Ranges begin at sectors unless an image maps finer; a range's own sectors are counted from its start.
        for (index, (x, y)) in a.chunks(SECTOR).zip(b.chunks(SECTOR)).enumerate() {
            if x == y {
                continue;
            }
            found.different_sectors += 1;
            found.different_bytes += x.iter().zip(y).filter(|(p, q)| p != q).count() as u64;
            let within = x.iter().zip(y).position(|(p, q)| p != q).unwrap_or(0);
            let at = start + (index * SECTOR + within) as u64;
            found.first_difference = Some(found.first_difference.map_or(at, |first| first.min(at)));
        }
    }
}

/// Reads `range` of a disk; what lies beyond its end is zero.
fn read_padded(disk: &Disk, mut buf: Buf, range: &Range<u64>) -> Result<Buf> {
    let len = (range.end - range.start) as usize;
    let inside = disk.size().saturating_sub(range.start).min(len as u64) as usize;
    buf.set_window(inside..len);
    buf.fill(0);
    buf.set_window(0..inside);
    if inside > 0 {
        let (back, result) = block_on(disk.read(buf, range.start));
        result.map_err(|e| e.context(format!("reading guest bytes at {:#x}", range.start)))?;
        buf = back;
    }
    buf.set_window(0..len);
    Ok(buf)
}
