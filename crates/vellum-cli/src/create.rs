//! `vellum create`: a new, empty image.

use crate::args::{OpenArgs, driver_options, size, target_format};
use crate::failure::Failure;
use crate::terminal::Terminal;
use crate::text::{clean, exact_size};
use clap::Args;
use serde::Serialize;
use vellum::{CreateDiskRequest, DiskTraits};

const AFTER_HELP: &str = "\
Sizes are whole numbers with an optional binary suffix: 512, 64K, 10G, 2T.
`vellum formats FORMAT` lists the options of a format.

Examples:
  vellum create disk.qcow2 10G
  vellum create -O vmdk -o subformat=monolithicFlat disk.vmdk 20G
  vellum create -O raw --preallocation falloc disk.img 1T";

/// Make a new, empty image
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct CreateArgs {
    /// Where the image goes
    target: String,
    /// Size of the disk in bytes, or with a binary suffix such as 10G
    #[arg(value_parser = size)]
    size: u64,
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
}

#[derive(Serialize)]
struct Report<'a> {
    image: &'a str,
    format: &'static str,
    virtual_size: u64,
}

/// Runs the verb.
pub fn run(args: &CreateArgs, terminal: &Terminal) -> Result<(), Failure> {
    let vellum = OpenArgs::default().vellum();
    let format = target_format(args.format.as_deref(), &args.target, terminal)?;
    let name = vellum.formats().by_name(&format)?.name();
    vellum.create(&CreateDiskRequest {
        target: args.target.clone(),
        format,
        virtual_size: args.size,
        options: driver_options(&args.options, args.preallocation.as_deref())?,
        traits: DiskTraits { comment: args.comment.clone(), ..DiskTraits::default() },
        reproducible: args.reproducible,
        force: args.force,
    })?;
    if terminal.wants_json() {
        return terminal.json(&Report { image: &args.target, format: name, virtual_size: args.size });
    }
    if terminal.is_quiet() {
        return Ok(());
    }
    terminal.report(|out, _| writeln!(out, "{}: {name}, {}", clean(&args.target), exact_size(args.size)))
}
