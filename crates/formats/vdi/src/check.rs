//! Checking: what is wrong with an image (sheet vdi.md, section 8). Changes nothing; what would mend it is planned in
//! `repair`.
//!
//! Errors: entries that name no place, a place that another entry names too, or one past the end of the file; a
//! counter that would make the next writer give a block out twice. Leaks: places that no entry names, a counter that
//! is too great, a file that is too long. `qemu-img check` calls every difference between the counter and the number
//! of entries an error, and does not look at the length of the file.

use crate::header::{self, FORMAT, Header};
use crate::layout::Layout;
use crate::open::{oddities, read_head, virtual_size};
use crate::repair;
use crate::scan::{Fault, Survey, survey};
use vellum_core::{CheckReport, CheckRequest, Code, Error, FINDINGS_MAX, Result, Severity, bytes};

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
        repair::plan(&mut image, request.storage.as_ref()).await?;
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
pub(crate) struct Checked {
    pub(crate) header: Header,
    pub(crate) layout: Layout,
    pub(crate) survey: Survey,
    /// The first bad entries.
    pub(crate) faults: Vec<Fault>,
    pub(crate) file_len: u64,
    pub(crate) report: CheckReport,
}

impl Checked {
    /// Where the last block in use ends.
    pub(crate) fn end_offset(&self) -> u64 {
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
}
