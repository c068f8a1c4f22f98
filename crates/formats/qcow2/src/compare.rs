//! Expected reference counts beside the stored ones, for `check`.

use crate::check::{Checker, Found};
use crate::counts;
use crate::stored::Block;
use crate::tally::{CHUNK, COUNT_MAX, Cell, Tally, chunks};
use crate::walk::find;
use std::collections::HashMap;
use std::ops::Range;
use vellum_core::{Buf, CheckReport, Code, Result, Severity, bytes};

/// Stored counts that are compared at most: 2 PiB of clusters of 64 KiB.
const WORK_MAX: u64 = 1 << 35;

/// Compares expected with stored counts, pass by pass.
pub(crate) struct Compare<'a> {
    checker: &'a Checker<'a>,
    /// The clusters of refcount blocks.
    blocks: Vec<u64>,
    /// One more than the highest cluster that is in use.
    pub end: u64,
    /// Leaks of whole blocks that were met before: a block may be named for many areas.
    known: HashMap<u64, u64>,
    suspect: bool,
    /// Counts looked at.
    work: u64,
    /// The block read last.
    last: Option<(u64, Buf)>,
}

impl<'a> Compare<'a> {
    pub fn new(checker: &'a Checker<'a>, blocks: Vec<u64>) -> Self {
        Compare { checker, blocks, end: 0, known: HashMap::new(), suspect: false, work: 0, last: None }
    }

    /// Compares what one pass counted; says whether flags may disagree.
    pub async fn pass(
        &mut self,
        tally: &mut Tally,
        report: &mut CheckReport,
        found: &mut Found,
    ) -> Result<bool> {
        self.suspect = false;
        let (range, table) = (tally.range(), &self.checker.table);
        let until = range.end.min(self.checker.clusters(tally));
        let mut at = range.start;
        while let Some((stretch, block)) = table.next(tally, at, until) {
            at = stretch.end;
            match block {
                Block::Misaligned => found.rebuild = true,
                Block::None => self.stretch(tally, stretch, None, report, found),
                Block::At(offset) => {
                    let whole = table.covers(table.index_of(stretch.start)) == stretch;
                    let is_plain = whole && tally.next_counted(stretch.start, stretch.end).is_none();
                    if let (true, Some(leaks)) = (is_plain, self.known.get(&offset)) {
                        self.leaks(*leaks, stretch.end, report);
                        continue;
                    }
                    let before = report.leaks;
                    self.work = self.work.saturating_add(stretch.end.saturating_sub(stretch.start));
                    if self.work > WORK_MAX {
                        return Err(self.checker.too_scattered());
                    }
                    let raw = match self.last.take() {
                        Some((known, raw)) if known == offset => raw,
                        _ => table.read(&self.checker.source, offset).await?,
                    };
                    if !(is_plain && bytes::is_zero(&raw)) {
                        self.stretch(tally, stretch, Some(&raw), report, found);
                    }
                    self.last = Some((offset, raw));
                    if is_plain {
                        self.known.insert(offset, report.leaks.saturating_sub(before));
                    }
                }
            }
        }
        self.beyond(tally, until).await?;
        self.blocks_of(tally, report, found);
        Ok(self.suspect)
    }

    /// As many leaks again as a block had that was met before.
    fn leaks(&mut self, leaks: u64, end: u64, report: &mut CheckReport) {
        report.leaks = report.leaks.saturating_add(leaks);
        let bytes = leaks.saturating_mul(self.checker.shape.cluster);
        report.leaked_bytes = report.leaked_bytes.saturating_add(bytes);
        if leaks > 0 {
            self.end = self.end.max(end);
        }
    }

    /// Compares clusters that one block counts, or none.
    fn stretch(
        &mut self,
        tally: &mut Tally,
        stretch: Range<u64>,
        block: Option<&[u8]>,
        report: &mut CheckReport,
        found: &mut Found,
    ) {
        let table = &self.checker.table;
        let first = table.covers(table.index_of(stretch.start)).start;
        for part in chunks(stretch) {
            let Some(block) = block else {
                for (cluster, cell) in tally.counted(&part) {
                    self.one(tally, cluster, cell, None, report, found);
                }
                continue;
            };
            let cells = tally.cells(&part);
            for (index, cluster) in part.enumerate() {
                let cell = cells.as_ref().and_then(|cells| cells.get(index)).copied().unwrap_or_default();
                let place = usize::try_from(cluster.saturating_sub(first)).unwrap_or(usize::MAX);
                let stored = counts::get(block, table.order, place).unwrap_or(0);
                if stored > 0 || cell != Cell::default() {
                    self.one(tally, cluster, cell, Some(stored), report, found);
                }
            }
        }
    }

    fn one(
        &mut self,
        tally: &mut Tally,
        cluster: u64,
        cell: Cell,
        stored: Option<u64>,
        report: &mut CheckReport,
        found: &mut Found,
    ) {
        let most = counts::greatest(self.checker.table.order);
        let expected = u64::from(cell.count).min(most);
        let count = stored.unwrap_or(0);
        let offset = Some(cluster.saturating_mul(self.checker.shape.cluster));
        if count > 0 || expected > 0 {
            self.end = self.end.max(cluster.saturating_add(1));
        }
        if u64::from(cell.count) > most || cell.count == COUNT_MAX {
            let times = u64::from(cell.count).saturating_sub(most);
            let message =
                format!("cluster {cluster}: {} references exceed what its refcount can hold", cell.count);
            find(report, u32::try_from(times).unwrap_or(u32::MAX).max(1), Code::Overflow, &message, offset);
        }
        if count < expected {
            found.rebuild |= stored.is_none();
            let message = format!("cluster {cluster}: refcount {count}, but {expected} references");
            report.find(Severity::Error, Code::Corrupt, message, offset);
        }
        if count > expected {
            let message = format!("cluster {cluster}: refcount {count}, but {expected} references");
            report.find(Severity::Leak, Code::Corrupt, message, offset);
            if expected == 0 {
                report.leaked_bytes = report.leaked_bytes.saturating_add(self.checker.shape.cluster);
            }
        }
        self.flag(tally, cluster, count, cell);
    }

    fn flag(&mut self, tally: &mut Tally, cluster: u64, stored: u64, cell: Cell) {
        if stored == 1 {
            tally.set_single(cluster);
        }
        self.suspect |= if stored == 1 { cell.seen_plain } else { cell.seen_copied };
    }

    /// Flags of entries that point past the end of the file are compared with stored counts, too.
    async fn beyond(&mut self, tally: &mut Tally, clusters: u64) -> Result<()> {
        let (range, table) = (tally.range(), &self.checker.table);
        let mut at = clusters.max(range.start);
        let mut last: Option<(u64, Buf)> = None;
        while let Some(start) = tally.next_counted(at, range.end) {
            let end = start.saturating_add(1).checked_next_multiple_of(CHUNK);
            at = end.unwrap_or(u64::MAX).min(range.end);
            // Most of a chunk is empty: looking up each of its clusters took most of the time of checking a damaged image.
            for (cluster, cell) in tally.counted(&(start..at)) {
                if !(cell.seen_copied || cell.seen_plain) {
                    continue;
                }
                let index = table.index_of(cluster);
                let mut stored = 0;
                if let Block::At(offset) = table.block(index) {
                    if last.as_ref().is_none_or(|(known, _)| *known != offset) {
                        last = Some((offset, table.read(&self.checker.source, offset).await?));
                    }
                    let place = bytes::index(cluster.saturating_sub(table.covers(index).start))?;
                    stored =
                        last.as_ref().and_then(|(_, raw)| counts::get(raw, table.order, place)).unwrap_or(0);
                }
                self.flag(tally, cluster, stored, cell);
            }
        }
        Ok(())
    }

    /// A refcount block that anything else refers to, too, cannot be relied on.
    fn blocks_of(&self, tally: &Tally, report: &mut CheckReport, found: &mut Found) {
        let range = tally.range();
        let most = counts::greatest(self.checker.table.order);
        for same in self.blocks.chunk_by(|a, b| a == b) {
            let Some(cluster) = same.first().filter(|cluster| range.contains(cluster)) else { continue };
            let count = u64::from(tally.cell(*cluster).count);
            let times = bytes::wide(same.len());
            let others = count.saturating_sub(times);
            let errors = if others > 0 { times } else { times.saturating_sub(1) };
            if errors == 0 {
                continue;
            }
            found.rebuild = true;
            if most > 1 {
                let message = format!("the refcount block in cluster {cluster} is referred to {count} times");
                let offset = Some(cluster.saturating_mul(self.checker.shape.cluster));
                find(report, u32::try_from(errors).unwrap_or(u32::MAX), Code::Overlap, &message, offset);
            }
        }
    }
}
