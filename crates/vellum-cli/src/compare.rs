//! `vellum compare`: the content of two disks, in any two formats.

use crate::args::{OpenArgs, note_raw};
use crate::failure::{ExitStatus, Failure};
use crate::meter::Meter;
use crate::terminal::{Style, Terminal};
use crate::text::{clean, exact_size};
use clap::Args;
use serde::Serialize;
use std::io::{self, Write};
use vellum::{CompareReport, CompareRequest};

const AFTER_HELP: &str = "\
Exits with 0 if the disks are the same, with 1 if they differ; other codes are errors (see `vellum --help`).
Where one disk ends before the other, the rest counts as zeros, unless --strict is given.

Examples:
  vellum compare disk.vmdk disk.qcow2
  vellum compare -f raw -F qcow2 disk.img disk.qcow2
  vellum compare --strict --json a.vdi b.vhd";

/// Compare the content of two disks
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct CompareArgs {
    /// The top image of the first disk
    #[arg(value_name = "A")]
    left: String,
    /// The top image of the second disk
    #[arg(value_name = "B")]
    right: String,
    /// Format of A; recognised by content if left out
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<String>,
    /// Format of B; recognised by content if left out
    #[arg(short = 'F', long, value_name = "FORMAT")]
    second_format: Option<String>,
    /// Different sizes are a difference even if the rest is zeros
    #[arg(long)]
    strict: bool,
    /// Threads to use; one for each processor if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    /// Place of a parent of B; --parent is for A
    #[arg(long = "second-parent", value_name = "FILE", help_heading = "Opening")]
    second_parents: Vec<String>,
    /// Read what B was in this internal snapshot (id or name); --snapshot is for A
    #[arg(long, value_name = "ID", help_heading = "Opening")]
    second_snapshot: Option<String>,
    #[command(flatten)]
    open: OpenArgs,
}

#[derive(Serialize)]
struct Report<'a> {
    same: bool,
    images: [&'a str; 2],
    formats: [Option<&'static str>; 2],
    virtual_sizes: [u64; 2],
    first_difference: Option<u64>,
    different_sectors: u64,
    different_bytes: u64,
    compared_bytes: u64,
}

/// Runs the verb.
pub fn run(args: &CompareArgs, terminal: &Terminal) -> Result<ExitStatus, Failure> {
    let vellum = args.open.vellum();
    let second = OpenArgs {
        parents: args.second_parents.clone(),
        snapshot: args.second_snapshot.clone(),
        ..args.open.clone()
    };
    let (left, left_images) = vellum.open(&args.left, &args.open.chain(args.format.as_deref(), terminal))?;
    let (right, right_images) =
        vellum.open(&args.right, &second.chain(args.second_format.as_deref(), terminal))?;
    note_raw(&left_images, terminal);
    note_raw(&right_images, terminal);
    let meter = Meter::new(terminal)?;
    let request = CompareRequest {
        strict: args.strict,
        threads: args.threads.map(usize::from),
        ..CompareRequest::default()
    };
    let found = meter.end(vellum.compare(&left, &right, &request, &meter))?;
    if terminal.wants_json() {
        let format = |images: &[vellum::OpenedImage]| images.first().map(|image| image.format.name());
        terminal.json(&Report {
            same: found.same,
            images: [&args.left, &args.right],
            formats: [format(&left_images), format(&right_images)],
            virtual_sizes: found.sizes.into(),
            first_difference: found.first_difference,
            different_sectors: found.different_sectors,
            different_bytes: found.different_bytes,
            compared_bytes: found.compared_bytes,
        })?;
    } else {
        terminal.report(|out, style| write_report(out, style, args, &found))?;
    }
    Ok(if found.same { ExitStatus::DONE } else { ExitStatus::DIFFERENT })
}

fn write_report(
    out: &mut dyn Write,
    style: Style,
    args: &CompareArgs,
    found: &CompareReport,
) -> io::Result<()> {
    let verdict =
        if found.same { style.good("the disks are the same") } else { style.bad("the disks differ") };
    writeln!(out, "{verdict}")?;
    if let Some(first) = found.first_difference {
        writeln!(out, "  first difference   {first:#x} (guest byte {first}, sector {})", first / 512)?;
        writeln!(out, "  sectors differing  {} of 512 bytes", found.different_sectors)?;
        writeln!(out, "  bytes differing    {}", exact_size(found.different_bytes))?;
    }
    let (left, right) = found.sizes;
    if left != right {
        let counts = if args.strict { "" } else { "; what exceeds the smaller counts as zeros" };
        writeln!(out, "  sizes differ{counts}")?;
        writeln!(out, "    {}  {}", exact_size(left), clean(&args.left))?;
        writeln!(out, "    {}  {}", exact_size(right), clean(&args.right))?;
    }
    Ok(())
}
