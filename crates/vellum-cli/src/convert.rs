//! `vellum convert`: a disk, whatever its chain, into a new image of any format and variant.

use crate::args::{OpenArgs, driver_options, note_read_as_raw, sparse_size, target_format};
use crate::failure::Failure;
use crate::meter::Meter;
use crate::terminal::{Style, Terminal};
use crate::text::{clean, exact_size, rate, size, time_taken};
use clap::Args;
use serde::Serialize;
use std::io::{self, Write};
use std::time::Duration;
use vellum::{Code, ConvertReport, ConvertRequest, Error};

const AFTER_HELP: &str = "\
The source is only read. The result is written beside TARGET, as TARGET.part, and renamed when it is durable. \
A conversion that was interrupted after its first second goes on with the same command and --resume.
`vellum formats FORMAT` lists the options of a format.

Examples:
  vellum convert disk.vmdk disk.qcow2
  vellum convert -O qcow2 --compress -o compression_type=zstd disk.img disk.qcow2
  vellum convert -O vmdk -o subformat=streamOptimized --verify disk.vdi disk.vmdk
  vellum convert -f raw -O vhd --reproducible disk.img disk.vhd";

/// Convert a disk, with all its parents, into a new image
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct ConvertArgs {
    /// The top image of the source
    source: String,
    /// Where the new image goes
    target: String,
    /// Format of the source; recognised by content if left out
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<String>,
    /// Format of the target; after the extension of TARGET if left out
    #[arg(short = 'O', long, value_name = "FORMAT")]
    target_format: Option<String>,
    /// Option of the target's format; may be repeated
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE,...")]
    options: Vec<String>,
    /// Compress the content, if the variant can
    #[arg(short, long)]
    compress: bool,
    /// Compression level on the codec's own scale; compresses
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    level: Option<i32>,
    /// Threads to use; one for each processor if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    /// Runs of zeros of at least this many bytes become holes; 0 keeps all data of the source as it is
    #[arg(long, value_name = "SIZE", value_parser = sparse_size)]
    sparse_size: Option<u64>,
    /// Reserve the space of the disk: the same as -o preallocation=MODE
    #[arg(long, value_name = "MODE")]
    preallocation: Option<String>,
    /// Continue a conversion that was interrupted
    #[arg(long)]
    resume: bool,
    /// Read the result back and compare it with the source
    #[arg(long)]
    verify: bool,
    /// The same source and options give the same bytes: no random identities, no clock
    #[arg(long)]
    reproducible: bool,
    /// Replace an existing target
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    open: OpenArgs,
}

#[derive(Serialize)]
struct Report<'a> {
    source: &'a str,
    source_format: &'static str,
    raw_by_default: bool,
    target: &'a str,
    target_format: &'static str,
    virtual_size: u64,
    data_bytes: u64,
    resumed_at: Option<u64>,
    verified: bool,
    left_behind: Vec<LeftBehind<'a>>,
    seconds: f64,
}

#[derive(Serialize)]
struct LeftBehind<'a> {
    image: &'a str,
    what: &'a str,
}

/// Runs the verb.
pub fn run(args: &ConvertArgs, terminal: &Terminal) -> Result<(), Failure> {
    let vellum = args.open.vellum();
    let target_format = target_format(args.target_format.as_deref(), &args.target, terminal)?;
    let target_name = vellum.formats().by_name(&target_format)?.name();
    let request = ConvertRequest {
        source_options: args.open.chain(args.format.as_deref(), terminal),
        options: driver_options(&args.options, args.preallocation.as_deref())?,
        compress: args.compress || args.level.is_some(),
        level: args.level,
        threads: args.threads.map(usize::from),
        sparse_bytes: args.sparse_size,
        verify: args.verify,
        resume: args.resume,
        reproducible: args.reproducible,
        force: args.force,
        ..ConvertRequest::new(&args.source, &args.target, &target_format)
    };
    if args.format.is_none() && vellum.probe(&args.source)?.is_none() {
        // Said before the work, not after: the guess may be what is wrong.
        note_read_as_raw(&args.source, terminal);
    }
    let meter = Meter::new(terminal)?;
    let result = vellum.convert(&request, &meter).map_err(|error| explain(error, &meter, args));
    let report = meter.end(result)?;
    let seconds = meter.elapsed();
    if terminal.wants_json() {
        return terminal.json(&Report {
            source: &args.source,
            source_format: report.source_format,
            raw_by_default: report.raw_by_default,
            target: &args.target,
            target_format: target_name,
            virtual_size: report.virtual_size,
            data_bytes: report.data_bytes,
            resumed_at: report.resumed_at,
            verified: report.verified,
            left_behind: report.left_behind.iter().map(|(image, what)| LeftBehind { image, what }).collect(),
            seconds: seconds.as_secs_f64(),
        });
    }
    if terminal.is_quiet() {
        return Ok(());
    }
    terminal.report(|out, style| write_report(out, style, args, target_name, &report, seconds))
}

/// A stopped conversion says what is left of it. The library's own hint, that it can be resumed, stays.
fn explain(error: Error, meter: &Meter, args: &ConvertArgs) -> Error {
    if error.code() != Code::Cancelled {
        return error;
    }
    if meter.phase() == "verifying" {
        return error.image(&args.target).hint(format!(
            "the target is complete; `vellum compare {} {}` repeats the verification",
            args.source, args.target
        ));
    }
    error.hint("nothing is kept of what was done: --resume would start over")
}

fn write_report(
    out: &mut dyn Write,
    style: Style,
    args: &ConvertArgs,
    target_format: &str,
    report: &ConvertReport,
    time: Duration,
) -> io::Result<()> {
    let source = format!("{} ({})", clean(&args.source), report.source_format);
    writeln!(out, "{source} -> {} ({target_format})", style.title(&clean(&args.target)))?;
    writeln!(out, "  disk  {}", exact_size(report.virtual_size))?;
    let speed = rate(report.data_bytes, time);
    writeln!(out, "  data  {} in {}, {speed}", exact_size(report.data_bytes), time_taken(time))?;
    if let Some(position) = report.resumed_at {
        writeln!(out, "  resumed at {}", size(position))?;
    }
    if report.verified {
        writeln!(out, "  {}", style.good("verified: the same as the source"))?;
    }
    Ok(())
}
