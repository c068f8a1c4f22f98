//! Walking all tables of an image: counting what they refer to, and looking at flags when the counts are known.

use crate::entry::{COPIED, OFFSET_MASK};
use crate::judge::{Entry, Judged, Kind, Shape};
use crate::roots::{L2, Roots, STEP, bitmap_cluster};
use crate::stored::{Block, RefTable, Source};
use crate::tally::Tally;
use vellum_core::{Buf, CheckReport, Code, Error, Result, Severity, bytes};

/// Findings of one kind in one table that are listed one by one; the rest is only counted.
const LISTED_MAX: u32 = 1000;

/// Walks the tables below some roots.
pub(crate) struct Walk<'a> {
    pub source: &'a Source<'a>,
    pub shape: &'a Shape,
    pub roots: &'a Roots,
    /// Active entries count as they would be once mended.
    pub mended: bool,
}

/// Adds `times` findings, of which some are listed.
pub(crate) fn find(report: &mut CheckReport, times: u32, code: Code, message: &str, at: Option<u64>) {
    let listed = times.min(LISTED_MAX);
    (0..listed).for_each(|_| report.find(Severity::Error, code, message, at));
    report.errors = report.errors.saturating_add(times.saturating_sub(listed).into());
}

impl Walk<'_> {
    /// Adds everything that is referred to. With `notes`, the faults met on the way are noted, and what the disk uses.
    pub async fn count(
        &self,
        tally: &mut Tally,
        table: Option<(&RefTable, u64)>,
        mut notes: Option<&mut CheckReport>,
    ) -> Result<()> {
        for (offset, len, named) in &self.roots.regions {
            self.region(tally, (*offset, *len), *named, notes.as_deref_mut());
        }
        for l2 in &self.roots.l2 {
            self.l2(tally, l2, notes.as_deref_mut()).await?;
        }
        self.bitmaps(tally, notes.as_deref_mut()).await?;
        if let Some((table, offset)) = table {
            self.refcounts(tally, table, offset, notes);
        }
        Ok(())
    }

    fn region(
        &self,
        tally: &mut Tally,
        (offset, len): (u64, u64),
        named: u32,
        notes: Option<&mut CheckReport>,
    ) {
        if len == 0 {
            return;
        }
        match self.shape.region(offset, len) {
            Some((offset, len)) => self.add(tally, offset, len, named),
            None => {
                if let Some(report) = notes {
                    let message = format!("a table of {len} bytes reaches past the end of the file");
                    find(report, named, Code::OutOfFile, &message, Some(offset));
                }
            }
        }
    }

    fn add(&self, tally: &mut Tally, offset: u64, len: u64, times: u32) {
        let last = offset.saturating_add(len).saturating_sub(1);
        tally.add(self.shape.number(offset), self.shape.number(last), times);
    }

    /// An L2 table and what its entries refer to.
    async fn l2(&self, tally: &mut Tally, l2: &L2, mut notes: Option<&mut CheckReport>) -> Result<()> {
        if let Some((offset, len)) = self.shape.region(l2.offset, self.shape.cluster) {
            self.add(tally, offset, len, l2.named);
        }
        if l2.offset != 0 {
            let number = self.shape.number(l2.offset);
            [(l2.copied, true), (l2.plain, false)].iter().filter(|(times, _)| *times > 0).for_each(
                |(_, copied)| {
                    tally.flag(number, *copied);
                },
            );
        }
        let Some(raw) = self.read(l2).await? else { return Ok(()) };
        self.each(&raw, &mut |place, entry| {
            let judged = self.judge(l2, place, entry);
            if let Some(report) = notes.as_deref_mut() {
                self.note(report, l2, place, entry, judged);
            }
            let counted = self.counted(l2, place, entry, judged);
            if let Some((offset, len)) = counted.1.refers {
                self.add(tally, offset, len, l2.named);
            }
            let offset = counted.0.word & OFFSET_MASK;
            let has_flag = counted.1.kind == Kind::Cluster && !self.shape.data_file && l2.offset != 0;
            if has_flag && l2.active() > 0 {
                tally.flag(self.shape.number(offset), counted.0.word & COPIED != 0);
            }
        });
        Ok(())
    }

    /// The table, unless it is all zeros.
    pub async fn read(&self, l2: &L2) -> Result<Option<Buf>> {
        if self.source.is_hole(l2.offset, self.shape.cluster).await {
            return Ok(None);
        }
        let read = self.source.read(l2.offset, self.shape.cluster).await;
        read.map(Some).map_err(|e: Error| e.context("reading an L2 table"))
    }

    /// Calls `what` for every entry that is not 0, with its number.
    pub fn each(&self, raw: &[u8], what: &mut dyn FnMut(u64, Entry)) {
        if self.shape.extended {
            for (place, pair) in raw.as_chunks::<16>().0.iter().enumerate() {
                let word = bytes::be64(pair, 0).unwrap_or(0);
                let bitmap = bytes::be64(pair, 1).unwrap_or(0);
                if word | bitmap != 0 {
                    what(bytes::wide(place), Entry { word, bitmap });
                }
            }
        } else {
            for (place, word) in raw.as_chunks::<8>().0.iter().enumerate() {
                let word = u64::from_be_bytes(*word);
                if word != 0 {
                    what(bytes::wide(place), Entry { word, bitmap: 0 });
                }
            }
        }
    }

    /// The guest offset of an entry, if the table has one place on the disk.
    fn guest(&self, l2: &L2, place: u64) -> Option<u64> {
        if l2.active() != 1 || l2.named != 1 {
            return None;
        }
        let entries = self.shape.cluster.checked_div(bytes::wide(self.shape.entry_len()))?;
        u64::from(l2.first).checked_mul(entries)?.checked_add(place)?.checked_mul(self.shape.cluster)
    }

    pub fn judge(&self, l2: &L2, place: u64, entry: Entry) -> Judged {
        self.shape.judge(entry, self.guest(l2, place))
    }

    /// The entry that counts, and what it is: mended or as it stands.
    pub fn counted(&self, l2: &L2, place: u64, entry: Entry, judged: Judged) -> (Entry, Judged) {
        if !self.mended || judged.faults.is_empty() || l2.active() == 0 {
            return (entry, judged);
        }
        let guest = self.guest(l2, place);
        let mended = self.shape.mend(entry, judged.faults, guest);
        (mended, self.shape.judge(mended, guest))
    }

    /// File offset of an entry.
    pub fn at(&self, l2: &L2, place: u64) -> u64 {
        l2.offset.saturating_add(place.saturating_mul(bytes::wide(self.shape.entry_len())))
    }

    fn note(&self, report: &mut CheckReport, l2: &L2, place: u64, entry: Entry, judged: Judged) {
        if self.mended && l2.active() > 0 {
            return;
        }
        let active = u64::from(l2.active());
        let at = Some(self.at(l2, place));
        for fault in judged.faults.errors() {
            let message = format!("L2 entry {:#018x}: {}", entry.word, fault.what);
            find(report, l2.named, fault.code, &message, at);
        }
        let is_flagged = entry.word & COPIED != 0;
        // QEMU looks for flags in no table at offset 0.
        if self.shape.data_file && judged.kind == Kind::Cluster && !is_flagged && l2.offset != 0 {
            let message =
                format!("L2 entry {:#018x}: no COPIED flag, in an image with a data file", entry.word);
            find(report, l2.active(), Code::Corrupt, &message, at);
        }
        let bytes = active.saturating_mul(self.shape.cluster);
        if judged.is_allocated() {
            report.allocated_bytes = report.allocated_bytes.saturating_add(bytes);
            if judged.kind == Kind::Compressed {
                report.compressed_bytes = report.compressed_bytes.saturating_add(bytes);
            }
        }
    }

    /// The clusters that hold bitmaps.
    async fn bitmaps(&self, tally: &mut Tally, mut notes: Option<&mut CheckReport>) -> Result<()> {
        for table in &self.roots.bitmaps {
            let len = bytes::mul(table.entries.into(), 8)?;
            let mut done = 0u64;
            while done < len {
                let at = table.offset.saturating_add(done);
                let part = self.source.read(at, STEP.min(bytes::sub(len, done)?)).await?;
                for (index, word) in part.as_chunks::<8>().0.iter().enumerate() {
                    let word = u64::from_be_bytes(*word);
                    match bitmap_cluster(word, self.shape.cluster) {
                        Ok(None) => {}
                        Ok(Some(offset)) => {
                            let place = (offset, self.shape.cluster);
                            self.region(tally, place, table.named, notes.as_deref_mut());
                        }
                        Err(()) => {
                            if let Some(report) = notes.as_deref_mut().filter(|_| !self.mended) {
                                let message = format!("bitmap table entry {word:#018x} means nothing");
                                let at = at.saturating_add(bytes::wide(index).saturating_mul(8));
                                find(report, table.named, Code::Corrupt, &message, Some(at));
                            }
                        }
                    }
                }
                done = bytes::add(done, bytes::wide(part.len()))?;
            }
        }
        Ok(())
    }

    /// The refcount table and its blocks.
    fn refcounts(
        &self,
        tally: &mut Tally,
        table: &RefTable,
        offset: u64,
        mut notes: Option<&mut CheckReport>,
    ) {
        let len = bytes::wide(table.entries.len()).saturating_mul(8);
        self.region(tally, (offset, len), 1, notes.as_deref_mut());
        let clusters = self.shape.file_len.div_ceil(self.shape.cluster.max(1)).max(tally.end());
        for (index, entry) in table.entries.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            let at = offset.saturating_add(bytes::wide(index).saturating_mul(8));
            let wrong = match table.usable(bytes::wide(index), clusters) {
                Ok(Some(block)) => {
                    let number = self.shape.number(block);
                    tally.add(number, number, 1);
                    continue;
                }
                Ok(None) => continue,
                Err(wrong) => wrong,
            };
            if let Some(report) = notes.as_deref_mut() {
                let message = format!("refcount table entry {index} ({entry:#018x}): {wrong}");
                find(report, 1, Code::Corrupt, &message, Some(at));
            }
        }
    }

    /// Looks at every active entry whose cluster was counted in this pass, with what it says now, and what it would
    /// say once mended, but for COPIED.
    pub async fn flags(
        &self,
        tally: &Tally,
        table: Option<&RefTable>,
        look: &mut (dyn FnMut(Look) + Send),
    ) -> Result<()> {
        let range = tally.range();
        let readable =
            |number: u64| table.is_none_or(|table| table.block(table.index_of(number)) != Block::Misaligned);
        for (index, word) in self.roots.active.iter().enumerate() {
            let number = self.shape.number(word & OFFSET_MASK);
            if word & OFFSET_MASK != 0 && range.contains(&number) && readable(number) {
                look(Look::L1 { index: bytes::wide(index), word: *word, number });
            }
        }
        for l2 in self.roots.l2.iter().filter(|l2| l2.active() > 0 && l2.offset != 0) {
            let own_pass = range.contains(&self.shape.number(l2.offset));
            let Some(raw) = self.read(l2).await? else { continue };
            self.each(&raw, &mut |place, entry| {
                let judged = self.judge(l2, place, entry);
                let (mended, after) = self.counted(l2, place, entry, judged);
                let number = (after.kind == Kind::Cluster && !self.shape.data_file)
                    .then(|| self.shape.number(mended.word & OFFSET_MASK));
                let is_due = match number {
                    Some(number) => range.contains(&number) && readable(number),
                    None => own_pass,
                };
                if is_due {
                    let at = self.at(l2, place);
                    let lossy = judged.faults.is_lossy();
                    look(Look::L2 { at, entry, mended, number, kind: after.kind, lossy, times: l2.active() });
                }
            });
        }
        Ok(())
    }
}

/// An active entry whose flag is looked at.
pub(crate) enum Look {
    L1 {
        index: u64,
        word: u64,
        number: u64,
    },
    L2 {
        at: u64,
        entry: Entry,
        mended: Entry,
        /// The cluster that decides about COPIED, if one does.
        number: Option<u64>,
        kind: Kind,
        lossy: bool,
        times: u32,
    },
}
