//! `vellum create`: a new, empty image, or a child that shows its parent.

use crate::args::{FileArgs, driver_options, note_read_as_raw, size, target_format};
use crate::failure::Failure;
use crate::terminal::Terminal;
use crate::text::{clean, exact_size};
use clap::Args;
use serde::Serialize;
use vellum::{ChainOptions, CreateDiskRequest, CreateReport, DiskTraits, ParentRequest, Vellum};

const AFTER_HELP: &str = "\
Sizes are whole numbers with an optional binary suffix: 512, 64K, 10G, 2T.
`vellum formats FORMAT` lists the options of a format.
A child shows its parent where nothing was written to it; from then on the parent must not change. It names a parent in \
its own directory, or below, relative to itself, so that both can be moved together; any other by its absolute place, \
and then opening the child needs --allow-dir.

Examples:
  vellum create disk.qcow2 10G
  vellum create -b base.qcow2 child.qcow2
  vellum create --parent base.img --parent-format raw child.qcow2 20G
  vellum create -O vmdk -o subformat=monolithicFlat disk.vmdk 20G
  vellum create -O raw --preallocation falloc disk.img 1T";

/// Make a new, empty image, or a child of another
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct CreateArgs {
    /// Where the image goes
    target: String,
    /// Size of the disk in bytes, or with a binary suffix such as 10G; of a child as its parent if left out
    #[arg(value_parser = size, required_unless_present = "parent")]
    size: Option<u64>,
    /// Make a child of this image; a relative FILE is relative to the working directory
    #[arg(short = 'b', long, value_name = "FILE")]
    parent: Option<String>,
    /// Format of the parent; recognised by content if left out
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "parent")]
    parent_format: Option<String>,
    /// Format of the image; after the extension of TARGET if left out
    #[arg(short = 'O', visible_short_alias = 'f', long, value_name = "FORMAT")]
    format: Option<String>,
    /// Option of the format; may be repeated
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE,...")]
    options: Vec<String>,
    /// Comment kept in the image, if the format can
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    comment: String,
    /// Reserve the space of the disk: the same as -o preallocation=MODE
    #[arg(long, value_name = "MODE")]
    preallocation: Option<String>,
    /// The same command gives the same bytes: no random identities, no clock
    #[arg(long)]
    reproducible: bool,
    /// Replace an existing target
    #[arg(long)]
    force: bool,
    /// Recognise by content the format of the parent's own parent, if it is not stated
    #[arg(long, help_heading = "Opening")]
    probe_parents: bool,
    #[command(flatten)]
    files: FileArgs,
}

#[derive(Serialize)]
struct Report<'a> {
    image: &'a str,
    format: &'static str,
    virtual_size: u64,
    parent: Option<Parent<'a>>,
}

#[derive(Serialize)]
struct Parent<'a> {
    place: &'a str,
    format: &'static str,
}

/// Runs the verb.
pub fn run(args: &CreateArgs, terminal: &Terminal) -> Result<(), Failure> {
    let vellum = args.files.vellum();
    let format = target_format(args.format.as_deref(), &args.target, terminal)?;
    let name = vellum.formats().by_name(&format)?.name();
    let parent = args.parent.as_ref().map(|place| ParentRequest {
        place: place.clone(),
        options: ChainOptions {
            probe_parents: args.probe_parents,
            ..args.files.options(args.parent_format.as_deref(), terminal)
        },
    });
    let made = vellum.create(&CreateDiskRequest {
        target: args.target.clone(),
        format,
        virtual_size: args.size.unwrap_or(0),
        options: driver_options(&args.options, args.preallocation.as_deref())?,
        traits: DiskTraits { comment: args.comment.clone(), ..DiskTraits::default() },
        reproducible: args.reproducible,
        force: args.force,
        parent,
    })?;
    note_parent(args, &made, terminal);
    warn_of_lost_comment(args, &vellum, name, terminal);
    if terminal.wants_json() {
        return terminal.json(&Report {
            image: &args.target,
            format: name,
            virtual_size: made.virtual_size,
            parent: made.parent.as_ref().map(|p| Parent { place: &p.place, format: p.format }),
        });
    }
    if terminal.is_quiet() {
        return Ok(());
    }
    terminal.report(|out, _| {
        write!(out, "{}: {name}, {}", clean(&args.target), exact_size(made.virtual_size))?;
        match &made.parent {
            Some(parent) => writeln!(out, ", child of {} ({})", clean(&parent.place), parent.format),
            None => writeln!(out),
        }
    })
}

/// Not every format has room for a comment, or for so long a one.
fn warn_of_lost_comment(args: &CreateArgs, vellum: &Vellum, format: &str, terminal: &Terminal) {
    if args.comment.is_empty() {
        return;
    }
    let made = vellum.open_alone(&args.target, &args.files.options(Some(format), terminal));
    if made.is_ok_and(|made| made.layer.image.info().comment != args.comment) {
        let what = format!(
            "{}: {format} images keep no comment, or none so long; it was left out or cut",
            args.target
        );
        terminal.warn(&what);
    }
}

/// What the user may not expect of the parent.
fn note_parent(args: &CreateArgs, made: &CreateReport, terminal: &Terminal) {
    let (Some(parent), Some(given)) = (&made.parent, &args.parent) else { return };
    if parent.raw_by_default {
        note_read_as_raw(given, terminal);
    }
    if !parent.is_near {
        terminal.note("the parent lies outside the child's directory: opening the child needs --allow-dir");
    }
}
