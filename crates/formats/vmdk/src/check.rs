//! Checking a disk: all tables of all sparse extents, and what stands around them. What would mend it is planned in
//! `repair`.

use crate::audit::{self, Pair, Side, Slots};
use crate::disputes::Dispute;
use crate::extent::{Grain, Kind, SparseExtent};
use crate::header::SECTOR;
use crate::image::{Source, VmdkImage};
use crate::tables::PAGE;
use crate::{NAME, open, repair};
use std::collections::HashSet;
use std::sync::Arc;
use vellum_core::bytes::{add, div, mul, rem, sub, wide};
use vellum_core::{
    Access, CheckReport, CheckRequest, Code, Error, Image, OpenRequest, Providers, Result, Severity, Storage,
};

/// Things of one kind that a repair is planned for, at most.
const PLANNED_MAX: usize = 1 << 18;

/// Checks the disk whose descriptor (or only file) is named.
pub(crate) async fn check(request: CheckRequest) -> Result<CheckReport> {
    let plan = request.plan;
    let limits = request.limits;
    let mut image = open::open(OpenRequest {
        storage: request.storage,
        location: request.location,
        resolver: request.resolver,
        limits,
        events: request.events,
        open_parts: true,
        write: false,
        access: Access::default(),
        skip_consistency_checks: true,
        snapshot: None,
        providers: Providers::seeded(0, 0),
    })
    .await?;
    let mut report = CheckReport { format: NAME, storages: image.storages.clone(), ..CheckReport::default() };
    for warning in &image.info.warnings {
        report.find(Severity::Note, Code::Corrupt, warning.clone(), None);
    }
    check_identity(&image, &mut report);
    for part in &mut image.parts {
        let len = sub(part.end, part.start)?;
        match &mut part.source {
            Source::Flat { offset, .. } => {
                report.allocated_bytes = add(report.allocated_bytes, len)?;
                report.end_offset = report.end_offset.max(add(*offset, len)?);
            }
            Source::Sparse(extent) => {
                let storage = image.storages.get(extent.file).cloned();
                let storage = storage.ok_or_else(|| Error::new(Code::Usage, "a file that was not opened"))?;
                check_extent(extent, &storage, &mut report, limits.table_bytes, plan)
                    .await
                    .map_err(|e| e.image(&extent.name).context("checking an extent"))?;
            }
            _ => {}
        }
    }
    Ok(report)
}

fn check_identity(image: &VmdkImage, report: &mut CheckReport) {
    let info = image.info();
    if matches!(info.identity.cid, None | Some(0xffff_fffe | 0xffff_ffff)) {
        let message = "the descriptor has no content id of its own (CID): children cannot recognise the disk";
        report.find(Severity::Note, Code::Range, message, None);
    }
    if let Some(parent) = &info.parent
        && parent.hints.is_empty()
        && parent.expected.uuid.is_none()
    {
        let message = "the descriptor names the content id of a parent (parentCID), but not where it is";
        report.find(Severity::Note, Code::ParentMissing, message, None);
    }
}

/// What walking through the tables of one extent brings to light.
pub(crate) struct Survey {
    pub claimed: Slots,
    /// Entries that differ from their copies, and where either stands.
    pub disputes: Vec<(Dispute, [u64; 2])>,
    /// Entries that lead nowhere: where they and their copies stand.
    pub bad: Vec<Vec<u64>>,
    /// Entries that lead to the grain of another entry: where they stand, and where the grain is.
    pub shared: Vec<(Vec<u64>, u64)>,
    /// Tables that are not there twice.
    pub single: Vec<Single>,
    /// Grains that only compressed extents share, where places are no multiples of anything.
    exact: HashSet<u64>,
    /// Where the last grain or table ends.
    pub end: u64,
    /// Not all could be kept for a repair.
    pub is_cut: bool,
}

/// A grain table of which the copy (or the primary) is missing or bad.
pub(crate) struct Single {
    pub number: u64,
    /// The directory whose entry must change.
    pub directory: u64,
    /// What the table must hold; `None`: both are bad, and there is nothing.
    pub entries: Option<Vec<u64>>,
}

async fn check_extent(
    extent: &mut SparseExtent,
    storage: &Arc<dyn Storage>,
    report: &mut CheckReport,
    table_bytes_max: u64,
    plan: bool,
) -> Result<()> {
    if !extent.has_sound_directories {
        let message = format!("{}: one of the two grain directories is lost", extent.name);
        report.find(Severity::Error, Code::OutOfFile, message, Some(48));
    }
    let is_table_sound = check_tables(extent, storage, report, table_bytes_max).await?;
    let mut survey = Survey {
        claimed: Slots::new(extent),
        disputes: Vec::new(),
        bad: Vec::new(),
        shared: Vec::new(),
        single: Vec::new(),
        exact: HashSet::new(),
        end: extent.data_start,
        is_cut: false,
    };
    let whole = audit::walk(extent, storage.as_ref(), |pair| survey.look(extent, pair, report)).await?;
    if !whole {
        let message = format!("{}: grain tables lie over each other; not all were looked at", extent.name);
        report.find(Severity::Error, Code::Overlap, message, None);
    }
    let disputes: Vec<&Dispute> = survey.disputes.iter().map(|(dispute, _)| dispute).collect();
    let winners = extent.decide(&disputes, &survey.claimed)?;
    for (dispute, winner) in disputes.iter().zip(&winners) {
        count_grain(extent, dispute.number, winner.value, &mut survey.claimed, &mut survey.end, report)?;
    }
    check_space(extent, &mut survey, report, whole && is_table_sound)?;
    if extent.is_unclean {
        let message = format!("{}: the extent was not closed cleanly (uncleanShutdown is set)", extent.name);
        report.find(Severity::Note, Code::Dirty, message, Some(wide(crate::session::UNCLEAN_AT)));
    }
    report.end_offset = report.end_offset.max(survey.end);
    if plan && extent.framing.is_none() && matches!(extent.kind, Kind::Hosted { .. }) {
        repair::plan(extent, storage.as_ref(), &survey, &winners, report, whole && is_table_sound).await?;
    }
    Ok(())
}

/// Looks at the places of all tables; notes those among the grains in the extent.
async fn check_tables(
    extent: &mut SparseExtent,
    storage: &Arc<dyn Storage>,
    report: &mut CheckReport,
    table_bytes_max: u64,
) -> Result<bool> {
    let count = extent.tables()?;
    if mul(count, extent.entry_bytes())? > table_bytes_max {
        let message = format!("{}: the grain directory is larger than the limit", extent.name);
        report.find(Severity::Note, Code::TableLimit, message, None);
        return Ok(false);
    }
    let directory_bytes = mul(count, extent.entry_bytes())?;
    let header = 0..SECTOR;
    let mut places = vec![header];
    for directory in [Some(extent.gd), extent.rgd].into_iter().flatten() {
        places.push(directory..add(directory, directory_bytes)?);
        let entries = audit::directory(extent, storage.as_ref(), directory, 0, count).await?;
        for value in entries {
            if let Ok(Some(place)) = extent.table_place(value) {
                places.push(place..add(place, extent.table_bytes()?)?);
            }
        }
    }
    places.sort_unstable_by_key(|range| (range.start, range.end));
    let mut is_sound = true;
    for (one, next) in places.iter().zip(places.iter().skip(1)) {
        if next.start < one.end && !next.is_empty() {
            is_sound = false;
            let message = format!("{}: two tables stand on the same bytes", extent.name);
            report.find(Severity::Error, Code::Overlap, message, Some(next.start));
        }
    }
    if extent.framing.is_none() && matches!(extent.kind, Kind::Hosted { .. }) {
        places.retain(|range| range.end > extent.data_start);
        extent.reserved = places;
    }
    Ok(is_sound)
}

impl Survey {
    /// Looks at one table and its copy.
    fn look(&mut self, extent: &SparseExtent, pair: Pair, report: &mut CheckReport) -> Result<()> {
        let number = pair.number;
        match (pair.primary, pair.copy) {
            (Side::Table(at, entries), Some(Side::Table(copy_at, copy))) => {
                let first = mul(number, extent.gtes)?;
                for (place, (value, copy)) in entries.iter().zip(&copy).enumerate() {
                    let within = mul(wide(place), extent.entry_bytes())?;
                    let places = [add(at, within)?, add(copy_at, within)?];
                    let number = add(first, wide(place))?;
                    if value == copy {
                        self.entry(extent, number, *value, &places, report)?;
                    } else {
                        self.dispute(
                            extent,
                            Dispute { number, primary: *value, copy: *copy },
                            places,
                            report,
                        );
                    }
                }
                Ok(())
            }
            (Side::Table(at, entries), None) => self.entries(extent, number, at, &entries, report),
            (Side::Table(at, entries), Some(lost)) => {
                self.entries(extent, number, at, &entries, report)?;
                self.lost(extent, number, extent.rgd, &lost, Some(entries), report);
                Ok(())
            }
            (lost, Some(Side::Table(at, entries))) => {
                self.entries(extent, number, at, &entries, report)?;
                self.lost(extent, number, Some(extent.gd), &lost, Some(entries), report);
                Ok(())
            }
            (primary, copy) => {
                self.lost(extent, number, Some(extent.gd), &primary, None, report);
                if let Some(copy) = copy {
                    self.lost(extent, number, extent.rgd, &copy, None, report);
                }
                Ok(())
            }
        }
    }

    fn entries(
        &mut self,
        extent: &SparseExtent,
        table: u64,
        at: u64,
        entries: &[u64],
        report: &mut CheckReport,
    ) -> Result<()> {
        let first = mul(table, extent.gtes)?;
        for (place, value) in entries.iter().enumerate() {
            let within = mul(wide(place), extent.entry_bytes())?;
            self.entry(extent, add(first, wide(place))?, *value, &[add(at, within)?], report)?;
        }
        Ok(())
    }

    /// Looks at an entry of which both copies (if there are two) say the same.
    fn entry(
        &mut self,
        extent: &SparseExtent,
        number: u64,
        value: u64,
        places: &[u64],
        report: &mut CheckReport,
    ) -> Result<()> {
        let offset = places.first().copied();
        match extent.meaning(value) {
            Ok(Grain::At(place)) => {
                let is_shared = if extent.framing.is_some() {
                    self.end = self.end.max(add(place, SECTOR)?);
                    !self.exact.insert(place)
                } else {
                    self.claimed.is_marked(place)?
                };
                count_grain(extent, number, value, &mut self.claimed, &mut self.end, report)?;
                if is_shared {
                    let message = format!("{}: two table entries lead to the same grain", extent.name);
                    report.find(Severity::Error, Code::Overlap, message, offset);
                    let kept = self.shared.len();
                    self.keep(|survey| survey.shared.push((places.to_vec(), place)), kept);
                } else if extent.framing.is_none() && !self.claimed.is_aligned(place) {
                    let message = format!("{}: a grain is not aligned to the size of grains", extent.name);
                    report.find(Severity::Note, Code::Misaligned, message, offset);
                }
            }
            Ok(_) => {}
            Err(error) => {
                let message = format!("{}: {}", extent.name, error.message());
                report.find(Severity::Error, error.code(), message, offset);
                let kept = self.bad.len();
                self.keep(|survey| survey.bad.push(places.to_vec()), kept);
            }
        }
        Ok(())
    }

    fn dispute(
        &mut self,
        extent: &SparseExtent,
        dispute: Dispute,
        places: [u64; 2],
        report: &mut CheckReport,
    ) {
        // What an interrupted write leaves; any other difference is damage.
        let is_usual = extent.is_unclean
            && extent.meaning(dispute.primary).is_ok()
            && extent.meaning(dispute.copy).is_ok();
        let severity = if is_usual { Severity::Note } else { Severity::Error };
        let message = format!(
            "{}: a grain table entry differs from its redundant copy ({:#x}, {:#x})",
            extent.name, dispute.primary, dispute.copy
        );
        report.find(severity, Code::Corrupt, message, places.first().copied());
        let kept = self.disputes.len();
        self.keep(|survey| survey.disputes.push((dispute, places)), kept);
    }

    fn lost(
        &mut self,
        extent: &SparseExtent,
        number: u64,
        directory: Option<u64>,
        side: &Side,
        entries: Option<Vec<u64>>,
        report: &mut CheckReport,
    ) {
        let Some(directory) = directory else { return };
        let offset = number.checked_mul(extent.entry_bytes()).and_then(|at| at.checked_add(directory));
        let (severity, message) = match side {
            Side::Missing if entries.is_none() => return,
            Side::Missing if extent.is_unclean => {
                (Severity::Note, "one of a grain table and its copy is missing")
            }
            Side::Missing => (Severity::Error, "one of a grain table and its copy is missing"),
            _ => (Severity::Error, "a directory entry leads to no grain table"),
        };
        report.find(severity, Code::OutOfFile, format!("{}: {message}", extent.name), offset);
        let kept = self.single.len();
        self.keep(|survey| survey.single.push(Single { number, directory, entries }), kept);
    }

    fn keep(&mut self, push: impl FnOnce(&mut Self), kept: usize) {
        if kept < PLANNED_MAX {
            push(self);
        } else {
            self.is_cut = true;
        }
    }
}

/// Counts a grain that an entry leads to.
fn count_grain(
    extent: &SparseExtent,
    number: u64,
    value: u64,
    claimed: &mut Slots,
    end: &mut u64,
    report: &mut CheckReport,
) -> Result<()> {
    let Ok(Grain::At(place)) = extent.meaning(value) else { return Ok(()) };
    let guest = extent.capacity.saturating_sub(mul(number, extent.grain)?).min(extent.grain);
    report.allocated_bytes = add(report.allocated_bytes, guest)?;
    if extent.framing.is_some() {
        report.compressed_bytes = add(report.compressed_bytes, guest)?;
        return Ok(());
    }
    claimed.mark(place, extent.grain)?;
    let stop = add(place, extent.grain)?;
    if stop > extent.file_len() {
        let message = format!("{}: the last grain is cut off by the end of the file", extent.name);
        report.find(Severity::Note, Code::Truncated, message, Some(place));
    }
    *end = (*end).max(stop);
    Ok(())
}

/// What of the file belongs to nothing.
fn check_space(
    extent: &SparseExtent,
    survey: &mut Survey,
    report: &mut CheckReport,
    is_whole: bool,
) -> Result<()> {
    let is_plain = extent.framing.is_none() && matches!(extent.kind, Kind::Hosted { .. });
    for table in &extent.reserved {
        // Tables that are made later stand in pages of their own.
        let start = sub(table.start, rem(table.start, PAGE)?)?.max(extent.data_start.min(table.start));
        let end = vellum_core::bytes::align_up(table.end, PAGE)?.min(extent.file_len().max(table.end));
        survey.claimed.mark(start, sub(end, start)?)?;
        survey.end = survey.end.max(end);
    }
    if !is_plain || !is_whole {
        return Ok(());
    }
    let lost = survey.claimed.unmarked(extent.file_len())?;
    if lost > 0 {
        let message = format!("{}: {lost} bytes of the file belong to no grain", extent.name);
        report.find(Severity::Leak, Code::Corrupt, message, None);
        report.leaks = add(report.leaks, div(lost, extent.grain)?.saturating_sub(1))?;
        report.leaked_bytes = add(report.leaked_bytes, lost)?;
    }
    Ok(())
}
