//! `vellum check`: whether an image is what its format says.

use crate::args::FileArgs;
use crate::failure::{ExitStatus, Failure};
use crate::terminal::{Style, Terminal};
use crate::text::{clean, exact_size, size};
use clap::Args;
use serde::Serialize;
use std::io::{self, Write};
use vellum::{CheckReport, FINDINGS_MAX, Severity};

const AFTER_HELP: &str = "\
Looks at the image alone, not at its parents, and changes nothing.

Exits with 0 if nothing is wrong, 1 if the image could not be checked, 2 if there are errors, 3 if there are only leaks \
(lost space, no lost data): the codes of `qemu-img check`.

Examples:
  vellum check disk.qcow2
  vellum check -f vmdk --json disk.vmdk";

/// Look for what is wrong with an image
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct CheckArgs {
    /// The image
    image: String,
    /// Format of the image; recognised by content if left out
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<String>,
    #[command(flatten)]
    files: FileArgs,
}

/// What was found, as scripts see it.
#[derive(Serialize)]
pub struct Report<'a> {
    image: &'a str,
    format: &'static str,
    clean: bool,
    errors: u64,
    leaks: u64,
    leaked_bytes: u64,
    allocated_bytes: u64,
    compressed_bytes: u64,
    end_offset: u64,
    findings: Vec<FindingReport<'a>>,
}

#[derive(Serialize)]
struct FindingReport<'a> {
    severity: &'static str,
    code: &'static str,
    message: &'a str,
    offset: Option<u64>,
}

impl<'a> Report<'a> {
    /// Of the image `image`.
    pub fn new(image: &'a str, found: &'a CheckReport) -> Self {
        let finding = |finding: &'a vellum::Finding| FindingReport {
            severity: finding.severity.as_str(),
            code: finding.code.as_str(),
            message: &finding.message,
            offset: finding.offset,
        };
        Report {
            image,
            format: found.format,
            clean: found.is_clean(),
            errors: found.errors,
            leaks: found.leaks,
            leaked_bytes: found.leaked_bytes,
            allocated_bytes: found.allocated_bytes,
            compressed_bytes: found.compressed_bytes,
            end_offset: found.end_offset,
            findings: found.findings.iter().map(finding).collect(),
        }
    }
}

/// Runs the verb.
pub fn run(args: &CheckArgs, terminal: &Terminal) -> Result<ExitStatus, Failure> {
    let options = args.files.options(args.format.as_deref(), terminal);
    let found = args.files.vellum().check(&args.image, &options)?;
    if terminal.wants_json() {
        terminal.json(&Report::new(&args.image, &found))?;
    } else if !terminal.is_quiet() || !found.is_clean() {
        terminal.report(|out, style| {
            write_findings(out, style, &args.image, &found)?;
            write_use(out, &found)
        })?;
        if !found.is_clean() {
            terminal.note(&format!("`vellum repair --dry-run {}` says what would mend it", args.image));
        }
    }
    Ok(match (found.errors, found.leaks) {
        (0, 0) => ExitStatus::DONE,
        (0, _) => ExitStatus::CHECK_LEAKS,
        _ => ExitStatus::CHECK_ERRORS,
    })
}

/// Findings that people are shown; more of the same says nothing new.
const SHOWN_MAX: usize = 30;

/// What is wrong, the worst in bold.
pub fn write_findings(out: &mut dyn Write, style: Style, image: &str, found: &CheckReport) -> io::Result<()> {
    let verdict = verdict(found);
    let verdict = match (found.errors, found.leaks) {
        (0, 0) => style.good(&verdict),
        (0, _) => style.warning(&verdict),
        _ => style.bad(&verdict),
    };
    writeln!(out, "{} ({}): {verdict}", style.title(&clean(image)), found.format)?;
    for finding in found.findings.iter().take(SHOWN_MAX) {
        let word = format!("{:5}", finding.severity.as_str());
        let word = match finding.severity {
            Severity::Note => style.dim(&word),
            Severity::Leak => style.warning(&word),
            Severity::Error => style.bad(&word),
        };
        let place = finding.offset.map_or(String::new(), |offset| format!(" (at byte {offset:#x})"));
        writeln!(out, "  {word}  {}{place}", clean(&finding.message))?;
    }
    let shown = found.findings.iter().take(SHOWN_MAX);
    let counted = shown.filter(|finding| finding.severity != Severity::Note).count() as u64;
    match (found.errors + found.leaks).saturating_sub(counted) {
        0 => Ok(()),
        more => writeln!(out, "  ... and {more} more; --json lists up to {FINDINGS_MAX}"),
    }
}

/// In a few words.
pub fn verdict(found: &CheckReport) -> String {
    let count = |number: u64, what: &str| match number {
        0 => None,
        1 => Some(format!("1 {what}")),
        _ => Some(format!("{number} {what}s")),
    };
    let leaked = (found.leaked_bytes > 0).then(|| format!(" ({} lost)", size(found.leaked_bytes)));
    let leaks = count(found.leaks, "leak").map(|text| text + leaked.as_deref().unwrap_or_default());
    let parts: Vec<String> = count(found.errors, "error").into_iter().chain(leaks).collect();
    if parts.is_empty() { "no errors were found".to_owned() } else { parts.join(", ") }
}

fn write_use(out: &mut dyn Write, found: &CheckReport) -> io::Result<()> {
    writeln!(out, "  in use      {}", exact_size(found.allocated_bytes))?;
    if found.compressed_bytes > 0 {
        writeln!(out, "  compressed  {}", exact_size(found.compressed_bytes))?;
    }
    writeln!(out, "  ends at     {}", exact_size(found.end_offset))
}
