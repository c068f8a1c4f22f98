//! `vellum repair`: mends an image, after it said how and kept every byte that it changes.

use crate::args::FileArgs;
use crate::check::{self, verdict, write_findings};
use crate::failure::{ExitStatus, Failure};
use crate::meter::Meter;
use crate::terminal::{Style, Terminal};
use crate::text::{clean, exact_size};
use crate::writing::confirm;
use clap::Args;
use serde::Serialize;
use std::io::{self, Write};
use vellum::{Code, Error, Fix, RepairChoice, RepairReport};

const AFTER_HELP: &str = "\
Says first what it will do, and asks. Before the first change it keeps a backup of every byte that changes beside the \
image, as IMAGE.vellum-backup-TIME; --undo puts these bytes back, as long as nobody wrote to the image meanwhile.

Steps that lose guest data (which could not be read correctly anyway) need --force. Repair the image alone: its parents \
are not looked at. Exits with 5 if errors remain.

Examples:
  vellum repair --dry-run disk.vmdk
  vellum repair --yes disk.qcow2
  vellum repair --leaks-only disk.qcow2
  vellum repair --undo disk.vmdk.vellum-backup-1763600000 disk.vmdk";

/// Mend an image, with a backup of what changes
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct RepairArgs {
    /// The image
    image: String,
    /// Format of the image; recognised by content if left out
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<String>,
    /// Only say what would be done
    #[arg(long, conflicts_with = "undo")]
    dry_run: bool,
    /// Only give lost space back
    #[arg(long, conflicts_with = "undo")]
    leaks_only: bool,
    /// Carry out steps that lose guest data, too
    #[arg(long, conflicts_with = "undo")]
    force: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Put back what an earlier repair changed
    #[arg(long, value_name = "BACKUP")]
    undo: Option<String>,
    #[command(flatten)]
    files: FileArgs,
}

#[derive(Serialize)]
struct Report<'a> {
    before: check::Report<'a>,
    dry_run: bool,
    steps: Vec<Step<'a>>,
    carried_out: usize,
    written_bytes: u64,
    backup: Option<&'a str>,
    after: Option<check::Report<'a>>,
}

#[derive(Serialize)]
struct Step<'a> {
    what: &'a str,
    lossy: bool,
    leak: bool,
    bytes: u64,
    length: Option<u64>,
}

#[derive(Serialize)]
struct Undone<'a> {
    image: &'a str,
    backup: &'a str,
    restored_bytes: u64,
    files: Vec<String>,
}

/// Runs the verb.
pub fn run(args: &RepairArgs, terminal: &Terminal) -> Result<ExitStatus, Failure> {
    if let Some(backup) = &args.undo {
        return undo(args, backup, terminal);
    }
    let vellum = args.files.vellum();
    let options = args.files.options(args.format.as_deref(), terminal);
    let plan = vellum.plan_repair(&args.image, &options, !args.dry_run)?;
    let choice = RepairChoice { leaks_only: args.leaks_only, lossy: args.force };
    let before = plan.report().clone();
    let steps: Vec<Fix> = plan.steps(choice).into_iter().cloned().collect();
    if !terminal.wants_json() && !terminal.is_quiet() {
        terminal.report(|out, style| {
            write_findings(out, style, &args.image, &before)?;
            write_steps(out, style, &steps, args.dry_run)
        })?;
    }
    let done = match args.dry_run || steps.is_empty() {
        true => None,
        false => {
            let lossy = steps.iter().any(|step| step.is_lossy);
            if !lossy || args.force {
                let losing = if lossy { ", some of which lose data" } else { "" };
                let question = format!("Change {} in {} steps{losing}?", clean(&args.image), steps.len());
                confirm(terminal, &question, args.yes)?;
            }
            let meter = Meter::new(terminal)?;
            Some(meter.end(plan.carry_out(choice, &meter))?)
        }
    };
    let after = done.as_ref().map(|done| &done.after);
    if terminal.wants_json() {
        terminal.json(&Report {
            before: check::Report::new(&args.image, &before),
            dry_run: args.dry_run,
            steps: steps.iter().map(step_report).collect(),
            carried_out: done.as_ref().map_or(0, |done| done.steps),
            written_bytes: done.as_ref().map_or(0, |done| done.written_bytes),
            backup: done.as_ref().and_then(|done| done.backup.as_ref()).map(|backup| backup.0.as_str()),
            after: after.map(|after| check::Report::new(&args.image, after)),
        })?;
    } else if let Some(done) = &done {
        terminal.report(|out, style| write_done(out, style, args, done))?;
    }
    let mended = match after {
        Some(after) => after.errors == 0,
        None => before.errors == 0 || (args.dry_run && !steps.is_empty()),
    };
    if steps.is_empty() && before.errors == 0 && before.leaks > 0 {
        terminal.note("this space is used again by later writes; `vellum convert` leaves it out");
    }
    if !mended && steps.is_empty() && !args.leaks_only {
        terminal.warn(&format!("{}: there are errors that no repair is known for", args.image));
    }
    Ok(if mended { ExitStatus::DONE } else { ExitStatus::DAMAGED })
}

fn step_report(step: &Fix) -> Step<'_> {
    Step {
        what: &step.what,
        lossy: step.is_lossy,
        leak: step.is_leak,
        bytes: step.patches.iter().map(|patch| patch.bytes.len() as u64).sum(),
        length: step.set_len.map(|(_, len)| len),
    }
}

fn write_steps(out: &mut dyn Write, style: Style, steps: &[Fix], dry_run: bool) -> io::Result<()> {
    if steps.is_empty() {
        return writeln!(out, "Nothing is to be done.");
    }
    writeln!(out, "{}", style.title(if dry_run { "A repair would:" } else { "To be done:" }))?;
    for (number, step) in steps.iter().enumerate() {
        let bytes: usize = step.patches.iter().map(|patch| patch.bytes.len()).sum();
        let mut what = clean(&step.what);
        what.push_str(&style.dim(&format!(" ({})", exact_size(bytes as u64))));
        if step.is_lossy {
            what.push_str(&format!(" {}", style.bad("loses data")));
        }
        writeln!(out, "  {}. {what}", number + 1)?;
    }
    Ok(())
}

fn write_done(out: &mut dyn Write, style: Style, args: &RepairArgs, done: &RepairReport) -> io::Result<()> {
    let result = verdict(&done.after);
    let result = if done.after.is_clean() { style.good(&result) } else { style.warning(&result) };
    writeln!(out, "{}: {} steps carried out, {result}", clean(&args.image), done.steps)?;
    match &done.backup {
        Some(backup) => writeln!(out, "  what was there before is in {}", clean(&backup.0)),
        None => Ok(()),
    }
}

fn undo(args: &RepairArgs, backup: &str, terminal: &Terminal) -> Result<ExitStatus, Failure> {
    let question = format!("Make {} what it was before the repair?", clean(&args.image));
    confirm(terminal, &question, args.yes)?;
    let undone =
        args.files.vellum().undo_repair(&args.image, backup).map_err(|error| match error.code() {
            Code::NotFound => error,
            _ => Error::context(error, format!("undoing the repair that {backup} is of")),
        })?;
    if terminal.wants_json() {
        let (image, restored_bytes) = (args.image.as_str(), undone.restored_bytes);
        terminal.json(&Undone { image, backup, restored_bytes, files: undone.files })?;
    } else if !terminal.is_quiet() {
        let restored = exact_size(undone.restored_bytes);
        terminal.report(|out, _| writeln!(out, "{}: put back {restored}", clean(&args.image)))?;
    }
    Ok(ExitStatus::DONE)
}
