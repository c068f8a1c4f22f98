//! Checking: what is wrong with an image, and what would mend it (sheet vdi.md, section 8). Changes nothing.
//!
//! Errors: entries that name no place, a place that another entry names too, or one past the end of the file; a
//! counter that would make the next writer give a block out twice. Leaks: places that no entry names, a counter that
//! is too great, a file that is too long. `qemu-img check` calls every difference between the counter and the number
//! of entries an error, and does not look at the length of the file.

use crate::header::{self, FORMAT, FREE, Header};
use crate::layout::Layout;
use crate::open::{oddities, read_head, virtual_size};
use crate::scan::{Fault, Survey, survey};
use vellum_core::{
    CheckReport, CheckRequest, Code, Error, FINDINGS_MAX, Fix, Patch, Result, Severity, bytes,
};

/// So many bad entries are mended in one repair; more need another one.
const MENDED_MAX: usize = 1 << 20;

/// Looks an image over.
///
/// # Errors
/// `BAD_MAGIC`, `VERSION` and `TRUNCATED` for what is no VDI image at all, `TABLE_LIMIT`, and those of the storage.
pub(crate) async fn check(request: CheckRequest) -> Result<CheckReport> {
    let mut report =
        CheckReport { format: FORMAT, storages: vec![request.storage.clone()], ..CheckReport::default() };
    let file_len = request.storage.len()?;
    let head = read_head(request.storage.as_ref(), file_len).await?;
    let header = match header::parse_but_counter(&head, file_len) {
        Ok(header) => header,
        Err(error) if is_hopeless(&error) => return Err(error.image(&request.location)),
        Err(error) => {
            // Nothing behind the header can be made sense of.
            let offset = error.offset();
            report.find(Severity::Error, error.code(), describe(&error), offset);
            return Ok(report);
        }
    };
    for odd in oddities(&header) {
        report.find(Severity::Note, Code::Range, odd, None);
    }
    let layout = Layout::new(&header, virtual_size(&header)?, file_len)?;
    let mut faults = Vec::new();
    let found = |fault: Fault| {
        report_fault(&mut report, &layout, fault);
        if faults.len() < MENDED_MAX {
            faults.push(fault);
        }
    };
    let survey = survey(request.storage.as_ref(), &layout, file_len, &request.limits, found)
        .await
        .map_err(|e| e.image(&request.location).context("reading the block map"))?;
    let mut image = Checked { header, layout, survey, faults, file_len, report };
    image.check_counter();
    image.check_space();
    if request.plan {
        image.plan()?;
    }
    Ok(image.report)
}

/// No image, or one of another kind.
fn is_hopeless(error: &Error) -> bool {
    matches!(error.code(), Code::BadMagic | Code::Version)
        || (error.code() == Code::Truncated && error.field_name() == Some("header"))
}

/// The error in one line.
fn describe(error: &Error) -> String {
    let mut text = error.message().to_owned();
    if let Some(field) = error.field_name() {
        text = format!("{field}: {text}");
    }
    match (error.found_value(), error.allowed_values()) {
        (Some(found), Some(allowed)) => format!("{text} (found {found}, allowed {allowed})"),
        (Some(found), None) => format!("{text} (found {found})"),
        _ => text,
    }
}

fn report_fault(report: &mut CheckReport, layout: &Layout, fault: Fault) {
    if report.findings.len() >= FINDINGS_MAX {
        return report.find(Severity::Error, fault.code, String::new(), None);
    }
    let Fault { code, block, slot } = fault;
    let what = match code {
        Code::OutOfFile => "lies past the end of the file",
        Code::Truncated => "is cut by the end of the file",
        Code::Overlap => "is in use by an earlier guest block as well",
        _ => "has a number that the image cannot have",
    };
    let message = format!("block {slot}, the place of guest block {block}, {what}");
    report.find(Severity::Error, code, message, Some(layout.entry_at(block)));
}

/// An image whose map was read.
struct Checked {
    header: Header,
    layout: Layout,
    survey: Survey,
    /// The first bad entries.
    faults: Vec<Fault>,
    file_len: u64,
    report: CheckReport,
}

impl Checked {
    /// Where the last block in use ends.
    fn end_offset(&self) -> u64 {
        self.layout.slot_at(self.survey.slots.end())
    }

    fn check_counter(&mut self) {
        let (counter, claimed) = (self.header.c_blocks_allocated, self.survey.claimed);
        let (severity, what) = if counter < claimed {
            (Severity::Error, "other programs would use a place of the file twice")
        } else if counter > self.header.c_blocks {
            (Severity::Error, "there are not as many blocks")
        } else if counter > claimed {
            (Severity::Leak, "places at the end are lost")
        } else {
            return;
        };
        let message = format!("cBlocksAllocated is {counter}, the map needs {claimed}: {what}");
        self.report.find(severity, Code::Range, message, Some(self.header.counter_at()));
    }

    /// Places that nobody uses, and the figures of the report.
    fn check_space(&mut self) {
        let slots = &self.survey.slots;
        let stride = self.layout.stride;
        let (end, used) = (self.end_offset(), slots.used());
        for hole in slots.hole_runs() {
            let bytes = bytes::wide(hole.len()).saturating_mul(stride);
            self.report.leaked_bytes = self.report.leaked_bytes.saturating_add(bytes);
            let message = match hole.len() {
                1 => format!("block {} of the file is used by no guest block", hole.start),
                count => {
                    format!("{count} blocks of the file from {} on are used by no guest block", hole.start)
                }
            };
            self.report.find(Severity::Leak, Code::Corrupt, message, Some(self.layout.slot_at(hole.start)));
        }
        if self.file_len > end {
            let lost = self.file_len.saturating_sub(end);
            self.report.leaked_bytes = self.report.leaked_bytes.saturating_add(lost);
            let message = format!("{lost} bytes at the end of the file belong to no block");
            self.report.find(Severity::Leak, Code::Corrupt, message, Some(end));
        }
        self.report.allocated_bytes = u64::from(used).saturating_mul(self.layout.block);
        self.report.end_offset = end;
    }

    /// What would mend the image. A counter that is too small comes first: raising it is right whatever else is done.
    fn plan(&mut self) -> Result<()> {
        let mut counter = self.header.c_blocks_allocated;
        if counter < self.survey.claimed {
            self.plan_counter(self.survey.claimed, false);
            counter = self.survey.claimed;
        }
        let is_lossy = !self.faults.is_empty();
        self.plan_entries()?;
        let all = bytes::wide(self.faults.len()) == self.survey.faults;
        if counter != self.survey.slots.end() && all {
            self.plan_counter(self.survey.slots.end(), is_lossy);
        }
        if self.file_len > self.end_offset() && all {
            self.report.fixes.push(Fix {
                what: format!(
                    "cut the file from {} to {} bytes, behind its last block",
                    self.file_len,
                    self.end_offset()
                ),
                is_lossy,
                is_leak: true,
                patches: Vec::new(),
                set_len: Some((0, self.end_offset())),
            });
        }
        Ok(())
    }

    fn plan_counter(&mut self, to: u32, is_lossy: bool) {
        let from = self.header.c_blocks_allocated;
        self.report.fixes.push(Fix {
            what: format!("set cBlocksAllocated (now {from}) to {to}, as the map has it"),
            is_lossy,
            is_leak: to < from && from <= self.header.c_blocks,
            patches: vec![Patch {
                storage: 0,
                offset: self.header.counter_at(),
                bytes: to.to_le_bytes().to_vec(),
            }],
            set_len: None,
        });
    }

    /// Bad entries become FREE; a last block that is cut gets its missing part back, as zeros.
    fn plan_entries(&mut self) -> Result<()> {
        let is_cut = |fault: &&Fault| fault.code == Code::Truncated;
        if let Some(cut) = self.faults.iter().find(is_cut) {
            let end = self.layout.slot_at(cut.slot.saturating_add(1));
            self.report.fixes.push(Fix {
                what: format!(
                    "make the file {end} bytes long; the missing part of guest block {} reads as zeros",
                    cut.block
                ),
                is_lossy: true,
                set_len: Some((0, end)),
                ..Fix::default()
            });
        }
        let mut patches: Vec<Patch> = Vec::new();
        let mut count = 0u64;
        for fault in self.faults.iter().filter(|fault| !is_cut(fault)) {
            count = bytes::add(count, 1)?;
            let offset = self.layout.entry_at(fault.block);
            match patches.last_mut() {
                Some(last) if last.offset.saturating_add(bytes::wide(last.bytes.len())) == offset => {
                    last.bytes.extend(FREE.to_le_bytes());
                }
                _ => patches.push(Patch { storage: 0, offset, bytes: FREE.to_le_bytes().to_vec() }),
            }
        }
        if count != 0 {
            let instead = if self.header.has_parent() { "what the parent holds" } else { "zeros" };
            self.report.fixes.push(Fix {
                what: format!("clear {count} bad entries of the block map; their blocks read as {instead}"),
                is_lossy: true,
                patches,
                ..Fix::default()
            });
        }
        Ok(())
    }
}
