//! `vellum snapshot`: states of a disk that an image keeps inside itself.

use crate::args::FileArgs;
use crate::failure::Failure;
use crate::terminal::{Style, Terminal};
use crate::text::{clean, date, size};
use crate::writing::confirm;
use clap::{Args, Subcommand};
use serde::Serialize;
use std::io::{self, Write};
use vellum::SnapshotInfo;

const AFTER_HELP: &str = "\
Of the formats only qcow2 keeps snapshots inside an image. --snapshot ID lets info, convert, compare, map and digest read \
one without applying it.

Examples:
  vellum snapshot list disk.qcow2
  vellum snapshot create disk.qcow2 before-upgrade
  vellum snapshot apply --yes disk.qcow2 before-upgrade
  vellum snapshot delete --yes disk.qcow2 1";

/// Keep, list, bring back and delete states inside an image
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// List the snapshots of an image, oldest first
    #[command(
        after_help = "Examples:\n  vellum snapshot list disk.qcow2\n  vellum snapshot list --json disk.qcow2"
    )]
    List(ImageArgs),
    /// Keep the present state
    #[command(after_help = "Examples:\n  vellum snapshot create disk.qcow2 before-upgrade")]
    Create {
        #[command(flatten)]
        image: ImageArgs,
        /// Name of the snapshot
        name: String,
    },
    /// Make the disk what it was; what it is now is lost
    #[command(
        after_help = "Examples:\n  vellum snapshot apply disk.qcow2 before-upgrade\n  vellum snapshot apply --yes disk.qcow2 1"
    )]
    Apply {
        #[command(flatten)]
        image: ImageArgs,
        /// Id or name of the snapshot
        snapshot: String,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
    /// Delete a snapshot
    #[command(
        after_help = "Examples:\n  vellum snapshot delete disk.qcow2 before-upgrade\n  vellum snapshot delete --yes disk.qcow2 1"
    )]
    Delete {
        #[command(flatten)]
        image: ImageArgs,
        /// Id or name of the snapshot
        snapshot: String,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
}

#[derive(Args)]
struct ImageArgs {
    /// The image
    image: String,
    /// Format of the image; recognised by content if left out
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<String>,
    /// Write although the image is marked as damaged or as not closed cleanly
    #[arg(long, help_heading = "Opening")]
    skip_checks: bool,
    #[command(flatten)]
    files: FileArgs,
}

#[derive(Serialize)]
struct ListReport<'a> {
    image: &'a str,
    snapshots: Vec<Entry<'a>>,
}

#[derive(Serialize)]
struct Entry<'a> {
    id: &'a str,
    name: &'a str,
    created: u64,
    virtual_size: u64,
    vm_state_size: u64,
}

#[derive(Serialize)]
struct ChangeReport<'a> {
    image: &'a str,
    action: &'static str,
    snapshot: &'a str,
    id: Option<&'a str>,
}

/// Runs the verb.
pub fn run(args: &SnapshotArgs, terminal: &Terminal) -> Result<(), Failure> {
    match &args.action {
        Action::List(image) => list(image, terminal),
        Action::Create { image, name } => {
            let made = image.files.vellum().create_snapshot(&image.image, &image.options(terminal), name)?;
            tell(image, terminal, "create", name, Some(&made.id))
        }
        Action::Apply { image, snapshot, yes } => {
            let (shown, of) = (clean(snapshot), clean(&image.image));
            let question = format!("Make {of} what it was in {shown}? What it is now is lost.");
            confirm(terminal, &question, *yes)?;
            image.files.vellum().apply_snapshot(&image.image, &image.options(terminal), snapshot)?;
            tell(image, terminal, "apply", snapshot, None)
        }
        Action::Delete { image, snapshot, yes } => {
            let question = format!("Delete the snapshot {} of {}?", clean(snapshot), clean(&image.image));
            confirm(terminal, &question, *yes)?;
            image.files.vellum().delete_snapshot(&image.image, &image.options(terminal), snapshot)?;
            tell(image, terminal, "delete", snapshot, None)
        }
    }
}

impl ImageArgs {
    fn options(&self, terminal: &Terminal) -> vellum::ChainOptions {
        vellum::ChainOptions {
            skip_consistency_checks: self.skip_checks,
            ..self.files.options(self.format.as_deref(), terminal)
        }
    }
}

fn list(args: &ImageArgs, terminal: &Terminal) -> Result<(), Failure> {
    let all = args.files.vellum().snapshots(&args.image, &args.options(terminal))?;
    if terminal.wants_json() {
        let entries = all.iter().map(|one| {
            let SnapshotInfo { id, name, created_unix, disk_size, vm_state_size } = one;
            let (virtual_size, vm_state_size, created) = (*disk_size, *vm_state_size, *created_unix);
            Entry { id, name, created, virtual_size, vm_state_size }
        });
        return terminal.json(&ListReport { image: &args.image, snapshots: entries.collect() });
    }
    terminal.report(|out, style| write_list(out, style, &args.image, &all))
}

fn write_list(out: &mut dyn Write, style: Style, image: &str, all: &[SnapshotInfo]) -> io::Result<()> {
    if all.is_empty() {
        return writeln!(out, "{}: no snapshots", clean(image));
    }
    let width = |text: fn(&SnapshotInfo) -> &str, least: usize| {
        all.iter().map(|one| clean(text(one)).chars().count()).max().unwrap_or(0).max(least)
    };
    let (ids, names) = (width(|one| &one.id, 2), width(|one| &one.name, 4));
    let heading =
        format!("{:ids$}  {:names$}  {:19}  {:>12}  {:>12}", "id", "name", "made (UTC)", "disk", "machine");
    writeln!(out, "{}", style.key(&heading))?;
    for one in all {
        let machine = if one.vm_state_size == 0 { "-".to_owned() } else { size(one.vm_state_size) };
        let (id, name, made) = (clean(&one.id), clean(&one.name), date(one.created_unix));
        writeln!(out, "{id:ids$}  {name:names$}  {made}  {:>12}  {machine:>12}", size(one.disk_size))?;
    }
    Ok(())
}

fn tell(
    args: &ImageArgs,
    terminal: &Terminal,
    action: &'static str,
    snapshot: &str,
    id: Option<&str>,
) -> Result<(), Failure> {
    if terminal.wants_json() {
        return terminal.json(&ChangeReport { image: &args.image, action, snapshot, id });
    }
    if terminal.is_quiet() {
        return Ok(());
    }
    let (image, snapshot) = (clean(&args.image), clean(snapshot));
    terminal.report(|out, _| match (action, id) {
        ("create", Some(id)) => writeln!(out, "{image}: kept as {snapshot} (id {})", clean(id)),
        ("apply", _) => writeln!(out, "{image}: is what it was in {snapshot}"),
        _ => writeln!(out, "{image}: {snapshot} is deleted"),
    })
}
