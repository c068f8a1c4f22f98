//! What mends an extent: steps that each leave it no worse, in the order in which they must be carried out.
//!
//! 1. an entry that differs from its copy gets the right value;
//! 2. an entry that leads nowhere is cleared (its grain is lost);
//! 3. a table that is missing or lost is made again at the end of the file, then the directory points to it;
//! 4. a grain that two entries lead to is copied to the end of the file for the second of them;
//! 5. a directory that is lost is given up in the header, which then names the other one;
//! 6. if nothing else was wrong, the last grains are copied into unused places, then their entries point there;
//! 7. the end of the file that belongs to nothing is cut off;
//! 8. the mark "not closed" is taken back.

use crate::check::Survey;
use crate::disputes::Winner;
use crate::extent::SparseExtent;
use crate::header::{FLAG_REDUNDANT, SECTOR, SparseExtentHeader, parse};
use crate::holes::{self, Move};
use crate::session::UNCLEAN_AT;
use vellum_core::bytes::{add, align_up, div, index, mul, narrow, sub, wide};
use vellum_core::storage::read_vec;
use vellum_core::{CheckReport, Code, Fix, Patch, Result, Severity, Storage};
use zerocopy::IntoBytes;

/// Bytes of grains and tables that one plan holds at most.
const PLANNED_BYTES_MAX: u64 = 64 << 20;

/// Plans the repair of one extent.
pub(crate) async fn plan(
    extent: &SparseExtent,
    storage: &dyn Storage,
    survey: &Survey,
    winners: &[Winner],
    report: &mut CheckReport,
    is_whole: bool,
) -> Result<()> {
    let mut plan = Plan {
        extent,
        storage,
        end: align_up(extent.file_len().max(survey.end), extent.grain)?,
        used_end: survey.end,
        is_longer: false,
        is_all: is_whole && !survey.is_cut,
        fixes: Vec::new(),
    };
    plan.settle(survey, winners)?;
    plan.clear(survey)?;
    plan.restore_tables(survey)?;
    plan.separate(survey).await?;
    plan.header().await?;
    if plan.is_all && plan.fixes.is_empty() && report.errors == 0 && survey.single.is_empty() {
        plan.fill_holes(survey).await?;
    }
    plan.cut(is_whole)?;
    plan.unmark();
    if !plan.is_all {
        let message = format!("{}: a repair cannot mend everything that is wrong here", extent.name);
        report.find(Severity::Note, Code::Corrupt, message, None);
    }
    report.fixes.append(&mut plan.fixes);
    Ok(())
}

fn entries(count: usize) -> String {
    if count == 1 { "1 grain table entry".to_owned() } else { format!("{count} grain table entries") }
}

struct Plan<'a> {
    extent: &'a SparseExtent,
    storage: &'a dyn Storage,
    /// Where something new can be put.
    end: u64,
    /// Where the last grain or table ends that is there already.
    used_end: u64,
    is_longer: bool,
    /// Everything that is wrong is mended.
    is_all: bool,
    fixes: Vec<Fix>,
}

impl Plan<'_> {
    fn patch(&self, offset: u64, bytes: &[u8]) -> Patch {
        Patch { storage: self.extent.file, offset, bytes: bytes.to_vec() }
    }

    fn entry(&self, offset: u64, value: u64) -> Result<Patch> {
        Ok(self.patch(offset, &narrow(value)?.to_le_bytes()))
    }

    fn step(&mut self, what: String, patches: Vec<Patch>) -> Option<&mut Fix> {
        if patches.is_empty() {
            return None;
        }
        let what = format!("{}: {what}", self.extent.name);
        self.fixes.push(Fix { what, patches, ..Fix::default() });
        self.fixes.last_mut()
    }

    /// Copies the right entry over the wrong one.
    fn settle(&mut self, survey: &Survey, winners: &[Winner]) -> Result<()> {
        let (mut clear, mut close) = (Vec::new(), Vec::new());
        for ((dispute, places), winner) in survey.disputes.iter().zip(winners) {
            let is_usable = self.extent.meaning(winner.value).is_ok();
            let value = if is_usable { winner.value } else { 0 };
            let patches = if winner.is_close || !is_usable { &mut close } else { &mut clear };
            for (place, old) in places.iter().zip([dispute.primary, dispute.copy]) {
                if old != value {
                    patches.push(self.entry(*place, value)?);
                }
            }
        }
        let what = format!("copy {} over the other copy, which is wrong", entries(clear.len()));
        self.step(what, clear);
        let what = format!(
            "settle {} of which both copies are equally good or equally bad (the primary is kept, or nothing)",
            entries(close.len())
        );
        if let Some(fix) = self.step(what, close) {
            fix.is_lossy = true;
        }
        Ok(())
    }

    fn clear(&mut self, survey: &Survey) -> Result<()> {
        let mut patches = Vec::new();
        for place in survey.bad.iter().flatten() {
            patches.push(self.entry(*place, 0)?);
        }
        let what = format!(
            "clear {} without a place in the file (what was there cannot be read anyway)",
            entries(survey.bad.len())
        );
        if let Some(fix) = self.step(what, patches) {
            fix.is_lossy = true;
        }
        Ok(())
    }

    /// Takes `bytes` from the end of the file; `None` if the plan would become too large.
    fn take(&mut self, bytes: u64) -> Result<Option<u64>> {
        let planned = sub(self.end, align_up(self.extent.file_len(), self.extent.grain)?.min(self.end))?;
        if add(planned, bytes)? > PLANNED_BYTES_MAX {
            self.is_all = false;
            return Ok(None);
        }
        let place = self.end;
        self.end = add(place, bytes)?;
        self.is_longer = true;
        Ok(Some(place))
    }

    fn restore_tables(&mut self, survey: &Survey) -> Result<()> {
        let (mut tables, mut pointers, mut cleared) = (Vec::new(), Vec::new(), Vec::new());
        for single in &survey.single {
            let at = add(single.directory, mul(single.number, 4)?)?;
            let Some(entries) = &single.entries else {
                cleared.push(self.entry(at, 0)?);
                continue;
            };
            let mut bytes = Vec::new();
            for entry in entries {
                // What leads nowhere is cleared in the table that is there, and not copied.
                let entry = if self.extent.meaning(*entry).is_ok() { *entry } else { 0 };
                bytes.extend_from_slice(&narrow(entry)?.to_le_bytes());
            }
            if let Some(place) = self.take(align_up(wide(bytes.len()), SECTOR)?)? {
                pointers.push(self.entry(at, self.extent.entry_of(place)?)?);
                tables.push(self.patch(place, &bytes));
            }
        }
        self.end = align_up(self.end, self.extent.grain)?;
        let count = tables.len();
        self.step(format!("write lost grain tables again from their other copy: {count}"), tables);
        self.step(format!("let the directory point to the tables written again: {count}"), pointers);
        let what = format!("clear directory entries whose grain tables are lost: {}", cleared.len());
        if let Some(fix) = self.step(what, cleared) {
            fix.is_lossy = true;
        }
        Ok(())
    }

    /// Gives the second of two entries that lead to the same grain a copy of its own.
    async fn separate(&mut self, survey: &Survey) -> Result<()> {
        let (mut grains, mut entries) = (Vec::new(), Vec::new());
        for (places, old) in &survey.shared {
            let len = self.extent.grain.min(self.extent.file_len().saturating_sub(*old));
            let Some(place) = self.take(self.extent.grain)? else { break };
            let mut bytes = read_vec(self.storage, *old, index(len)?).await?.to_vec();
            bytes.resize(index(self.extent.grain)?, 0);
            grains.push(self.patch(place, &bytes));
            for entry in places {
                entries.push(self.entry(*entry, self.extent.entry_of(place)?)?);
            }
        }
        let count = grains.len();
        self.step(format!("copy grains that two table entries lead to: {count}"), grains);
        self.step(
            format!("let the second entry of each shared grain point to its own copy: {count}"),
            entries,
        );
        Ok(())
    }

    /// A header that names a lost directory names the other one only.
    async fn header(&mut self) -> Result<()> {
        if self.extent.has_sound_directories {
            return Ok(());
        }
        let bytes = read_vec(self.storage, 0, index(SECTOR)?).await?;
        let mut header: SparseExtentHeader = parse(&bytes, 0)?;
        header.flags = (header.flags.get() & !FLAG_REDUNDANT).into();
        header.rgd_offset = 0.into();
        header.gd_offset = self.extent.entry_of(self.extent.gd)?.into();
        let patch = self.patch(0, header.as_bytes());
        self.step("name only the grain directory that is left in the header".to_owned(), vec![patch]);
        Ok(())
    }

    /// Moves the last grains into holes. Old and new place hold the same: it does not matter which of them an
    /// interrupted repair leaves in either table.
    async fn fill_holes(&mut self, survey: &Survey) -> Result<()> {
        let most = index(div(PLANNED_BYTES_MAX, self.extent.grain)?)?;
        if survey.claimed.unmarked(self.used_end)? < self.extent.grain || !self.storage.limits().resizable {
            return Ok(());
        }
        let found = holes::moves(self.extent, self.storage, survey, most).await?;
        if found.moves.is_empty() {
            return Ok(());
        }
        let (mut grains, mut entries) = (Vec::new(), Vec::new());
        for Move { from, to, entries: places } in &found.moves {
            let len = self.extent.grain.min(self.extent.file_len().saturating_sub(*from));
            let mut bytes = read_vec(self.storage, *from, index(len)?).await?.to_vec();
            bytes.resize(index(self.extent.grain)?, 0);
            grains.push(self.patch(*to, &bytes));
            for place in places {
                entries.push(self.entry(*place, self.extent.entry_of(*to)?)?);
            }
        }
        let (count, rest) =
            (grains.len(), if found.has_more { " (there may be more: repair again)" } else { "" });
        for (what, patches) in [
            (format!("copy the last {count} grains into places that nobody uses{rest}"), grains),
            (format!("let the table entries of these {count} grains point to the copies"), entries),
        ] {
            if let Some(fix) = self.step(what, patches) {
                fix.is_leak = true;
            }
        }
        self.used_end = found.end;
        Ok(())
    }

    fn cut(&mut self, is_whole: bool) -> Result<()> {
        let end = align_up(self.used_end, self.extent.grain)?;
        if is_whole && !self.is_longer && end < self.extent.file_len() && self.storage.limits().resizable {
            let bytes = sub(self.extent.file_len(), end)?;
            self.fixes.push(Fix {
                what: format!(
                    "{}: cut off the last {bytes} bytes, which belong to nothing",
                    self.extent.name
                ),
                is_leak: true,
                set_len: Some((self.extent.file, end)),
                ..Fix::default()
            });
        }
        Ok(())
    }

    fn unmark(&mut self) {
        if self.extent.is_unclean && self.is_all {
            let patch = self.patch(wide(UNCLEAN_AT), &[0]);
            let what = "take the mark back that says \"not closed cleanly\" (uncleanShutdown)";
            self.step(what.to_owned(), vec![patch]);
        }
    }
}
