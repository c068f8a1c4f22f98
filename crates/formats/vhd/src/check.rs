//! Checking: footers, header, BAT, and what lies between the blocks. Data is not read.
//!
//! The footer at the end is mended first, from the copy at the start; no data moves. Wrong BAT entries are cleared: the
//! guest blocks that they named read as zeros, or as the parent, afterwards.

use crate::header::{self, ABSENT, DYNAMIC_BYTES, DiskType, DynamicHeader, FOOTER_BYTES, FORMAT, Footer};
use crate::locator;
use crate::map::Sparse;
use crate::open::{self, Ends, Found};
use crate::repair;
use crate::survey::{Fault, Placed, Survey};
use vellum_core::storage::read_vec;
use vellum_core::{
    CheckReport, CheckRequest, Code, Error, Fix, ImageInfo, Patch, Result, Severity, Storage, bytes,
};
use zerocopy::{FromBytes, IntoBytes};

/// Looks for what is wrong with an image, and plans what would mend it.
///
/// # Errors
/// Where there is nothing that could be a footer, and those of the storage.
pub(crate) async fn check(request: CheckRequest) -> Result<CheckReport> {
    let mut check = Check {
        report: CheckReport {
            format: FORMAT,
            storages: vec![request.storage.clone()],
            ..CheckReport::default()
        },
        plan: request.plan,
    };
    let checked = check.run(&request).await;
    checked.map_err(|e| e.image(&request.location))?;
    Ok(check.report)
}

struct Check {
    report: CheckReport,
    plan: bool,
}

pub(crate) fn patch(offset: u64, bytes: &[u8]) -> Patch {
    Patch { storage: 0, offset, bytes: bytes.to_vec() }
}

impl Check {
    fn error(&mut self, code: Code, message: impl Into<String>, offset: u64) {
        self.report.find(Severity::Error, code, message, Some(offset));
    }

    fn note(&mut self, message: impl Into<String>, offset: u64) {
        self.report.find(Severity::Note, Code::Range, message, Some(offset));
    }

    fn fix(&mut self, fix: Fix) {
        if self.plan {
            self.report.fixes.push(fix);
        }
    }

    /// Notes an error of opening as a finding.
    fn found_error(&mut self, error: &Error) {
        self.report.find(Severity::Error, error.code(), error.to_string(), error.offset());
    }

    async fn run(&mut self, request: &CheckRequest) -> Result<()> {
        let storage = request.storage.as_ref();
        let ends = Ends::read(storage).await?;
        let found = self.footer(&ends)?;
        let disk_type = header::check_footer(&found.footer, found.at)?;
        let (virtual_size, odd) = open::disk_size(&found.footer);
        if let Some(odd) = odd {
            self.note(odd, found.at.saturating_add(48));
        }
        if disk_type == DiskType::Fixed {
            self.fixed(&found, virtual_size);
            return Ok(());
        }
        let at = found.footer.data_offset.get();
        let Some(dynamic) = self.dynamic_header(request, &ends, &found, at).await? else {
            self.footers(&ends, &found, ends.len.saturating_sub(FOOTER_BYTES), false);
            return Ok(());
        };
        let mut info =
            ImageInfo { virtual_size, block_size: dynamic.block_size.get().into(), ..ImageInfo::default() };
        if let Err(error) = open::check_capacity(&info, &dynamic, at) {
            self.found_error(&error);
            return Ok(());
        }
        if disk_type == DiskType::Differencing
            && let Err(error) = locator::hints(storage, ends.len, &dynamic, at, &mut info).await
        {
            self.found_error(&error);
        }
        let layout = open::layout(&ends, &found, &dynamic, virtual_size, disk_type);
        let placed_max = bytes::index(request.limits.table_bytes / 8)?;
        let survey = Survey::read(storage, &layout, found.data_end, placed_max).await?;
        self.blocks(storage, &ends, &found, &layout, survey).await
    }

    /// The footer to go by: a sound one, else one of which only the checksum is wrong.
    fn footer(&mut self, ends: &Ends) -> Result<Found> {
        let error = match ends.footer() {
            Ok(found) => return Ok(found),
            Err(error) => error,
        };
        let end = ends.len.saturating_sub(FOOTER_BYTES);
        let candidates = [(ends.last(FOOTER_BYTES), end), (ends.copy(), 0)];
        for (footer, at) in candidates {
            let Some(footer) = footer.filter(|footer| footer.has_cookie() && footer.is_known()) else {
                continue;
            };
            let is_fixed = footer.disk_type() == Some(DiskType::Fixed);
            // What stands at the start of a fixed image is the guest's.
            if header::check_footer(&footer, at).is_err() || (is_fixed && at != end) {
                continue;
            }
            self.found_error(&error);
            let sealed = footer.sealed();
            self.fix(Fix {
                what: "give the footer the checksum of what it holds".to_owned(),
                is_lossy: true,
                patches: vec![patch(at, sealed.as_bytes())],
                ..Fix::default()
            });
            return Ok(Found::mended(sealed, at, ends.len));
        }
        Err(error)
    }

    fn fixed(&mut self, found: &Found, virtual_size: u64) {
        if virtual_size > found.data_end {
            let message = format!(
                "the disk has {virtual_size} bytes, the file only {} before its footer",
                found.data_end
            );
            self.error(Code::SizeLie, message, found.at.saturating_add(48));
        } else if virtual_size < found.data_end {
            let slack = found.data_end.saturating_sub(virtual_size);
            self.note(format!("{slack} bytes between the disk and the footer are not used"), virtual_size);
        }
        self.report.allocated_bytes = virtual_size.min(found.data_end);
        self.report.end_offset = found.data_end.saturating_add(FOOTER_BYTES);
    }

    /// The dynamic header; if only its checksum is wrong, as if it were right.
    async fn dynamic_header(
        &mut self,
        request: &CheckRequest,
        ends: &Ends,
        found: &Found,
        at: u64,
    ) -> Result<Option<DynamicHeader>> {
        let storage = request.storage.as_ref();
        let error = match open::read_dynamic(storage, ends, found, at).await {
            Ok(dynamic) => return Ok(Some(dynamic)),
            Err(error) => error,
        };
        self.found_error(&error);
        if error.code() != Code::Checksum {
            return Ok(None);
        }
        let raw = read_vec(storage, at, bytes::index(DYNAMIC_BYTES)?).await?;
        let Ok(dynamic) = DynamicHeader::read_from_bytes(&raw) else { return Ok(None) };
        let sealed = dynamic.sealed();
        if header::parse_dynamic(sealed.as_bytes(), at, ends.len).is_err() {
            return Ok(None);
        }
        self.fix(Fix {
            what: "give the dynamic header the checksum of what it holds (its fields are plausible)"
                .to_owned(),
            is_lossy: true,
            patches: vec![patch(at, sealed.as_bytes())],
            ..Fix::default()
        });
        Ok(Some(sealed))
    }

    /// The footer at the end and its copy, where they differ from each other or are damaged.
    fn footers(&mut self, ends: &Ends, found: &Found, footer_at: u64, lengthens: bool) {
        let footer = found.footer;
        if let Some(torn) = &found.torn {
            // What a power loss leaves while the file grows; nothing is wrong with the disk.
            let at = ends.len.saturating_sub(FOOTER_BYTES);
            self.report.find(Severity::Leak, Code::Checksum, torn.clone(), Some(at));
            let tail = if lengthens { "; blocks that the file ends in are completed with zeros" } else { "" };
            self.fix(Fix {
                what: format!("write the footer at byte {footer_at:#x}, from the copy at the start{tail}"),
                is_lossy: lengthens,
                patches: vec![patch(footer_at, footer.as_bytes())],
                ..Fix::default()
            });
            return;
        }
        if found.data_end.saturating_add(FOOTER_BYTES) != ends.len {
            self.note("the footer has 511 bytes, as Virtual PC before 2004 wrote it", found.at);
        }
        let Some(copy) = ends.copy().filter(|copy| copy.as_bytes() != footer.as_bytes()) else { return };
        let is_sound = copy.is_sound();
        if is_sound && only_time_differs(&footer, &copy) {
            self.note("the times in the footer and in its copy at the start differ", 24);
            return;
        }
        if is_sound {
            self.error(Code::Corrupt, "the footer and its copy at the start differ", 0);
        } else {
            // What a power loss leaves if the disk tears a sector while a session begins. The footer counts: no data is
            // lost. (QEMU reads the copy only, and refuses the image until it is mended or written.)
            let message = "the copy of the footer at the start of the file is missing or damaged";
            self.report.find(Severity::Leak, Code::Checksum, message, Some(0));
        }
        self.fix(Fix {
            what: "write the copy at the start, from the footer at the end".to_owned(),
            is_lossy: is_sound,
            patches: vec![patch(0, footer.as_bytes())],
            ..Fix::default()
        });
    }

    async fn blocks(
        &mut self,
        storage: &dyn Storage,
        ends: &Ends,
        found: &Found,
        layout: &Sparse,
        mut survey: Survey,
    ) -> Result<()> {
        let completed = match found.torn {
            Some(_) => self.complete(layout, &mut survey),
            None => 0,
        };
        let footer_at = found.footer_at(ends.len, survey.end)?;
        self.footers(ends, found, footer_at, completed > 0);
        let mut faults = std::mem::take(&mut survey.faults);
        for fault in &faults {
            self.bad_entry(layout, fault, found.data_end);
        }
        if survey.is_cut_short {
            self.note("more blocks than are held at once: not all was looked at", layout.table_offset);
        } else {
            let overlaps = survey.take_overlaps(layout);
            for fault in &overlaps {
                self.bad_entry(layout, fault, found.data_end);
            }
            faults.extend(overlaps);
        }
        faults.sort_unstable_by_key(|fault| fault.block);
        self.clear(layout, &faults)?;
        self.report.allocated_bytes = survey.guest_bytes;
        self.report.end_offset = footer_at.saturating_add(FOOTER_BYTES);
        if survey.is_cut_short {
            return Ok(());
        }
        self.leaks(layout, &survey, footer_at);
        if self.plan && faults.is_empty() {
            // With a footer that is missing only the end is cut: what moves needs a sound file.
            if self.report.errors == 0 && found.torn.is_none() {
                repair::fill_holes(storage, layout, &mut survey, footer_at, &mut self.report.fixes).await?;
            }
            repair::cut(found, layout, &survey, footer_at, &mut self.report.fixes);
        }
        Ok(())
    }

    /// Without a footer, blocks that the file ends in need not be given up: the file is lengthened.
    fn complete(&mut self, layout: &Sparse, survey: &mut Survey) -> usize {
        let (cut, rest): (Vec<Fault>, Vec<Fault>) =
            survey.faults.drain(..).partition(|fault| fault.code == Code::Truncated);
        survey.faults = rest;
        for fault in &cut {
            self.bad_entry(layout, fault, layout.file_len);
            let extent = layout.extent(fault.block.into(), fault.entry);
            survey.end = survey.end.max(extent.end);
            survey.placed.push(Placed { sector: fault.entry, block: fault.block });
        }
        survey.placed.sort_unstable();
        cut.len()
    }

    fn bad_entry(&mut self, layout: &Sparse, fault: &Fault, data_end: u64) {
        let (block, entry) = (fault.block, fault.entry);
        let what = match fault.code {
            Code::Overlap => "lies on headers, the BAT or another block",
            Code::OutOfFile => "lies past the end of the data",
            _ => "goes past the end of the data",
        };
        let at = layout.table_offset.saturating_add(u64::from(block).saturating_mul(4));
        let message =
            format!("guest block {block}, at sector {entry}, {what} (data ends at byte {data_end:#x})");
        self.error(fault.code, message, at);
    }

    /// Plans to make wrong entries absent.
    fn clear(&mut self, layout: &Sparse, faults: &[Fault]) -> Result<()> {
        if faults.is_empty() {
            return Ok(());
        }
        let mut patches: Vec<Patch> = Vec::new();
        for fault in faults {
            let offset = bytes::add(layout.table_offset, bytes::mul(fault.block.into(), 4)?)?;
            let absent = ABSENT.to_be_bytes();
            match patches.last_mut() {
                Some(last) if last.offset.saturating_add(bytes::wide(last.bytes.len())) == offset => {
                    last.bytes.extend(absent);
                }
                _ => patches.push(patch(offset, &absent)),
            }
        }
        let reads = if layout.differencing { "the parent" } else { "zeros" };
        self.fix(Fix {
            what: format!(
                "clear {} wrong BAT entries; their guest blocks read as {reads} then",
                faults.len()
            ),
            is_lossy: true,
            patches,
            ..Fix::default()
        });
        Ok(())
    }

    /// Room that could hold blocks and that no entry names.
    fn leaks(&mut self, layout: &Sparse, survey: &Survey, footer_at: u64) {
        for gap in survey.gaps(layout, footer_at) {
            let len = gap.end.saturating_sub(gap.start);
            let message = format!("{len} bytes that no BAT entry names");
            self.report.find(Severity::Leak, Code::Corrupt, message, Some(gap.start));
            self.report.leaked_bytes = self.report.leaked_bytes.saturating_add(len);
        }
    }
}

/// Whether the footers are the same but for their time (a power loss between the two writes of a session's begin).
fn only_time_differs(footer: &Footer, copy: &Footer) -> bool {
    let mut same = *copy;
    same.timestamp = footer.timestamp;
    same.sealed().as_bytes() == footer.as_bytes()
}
