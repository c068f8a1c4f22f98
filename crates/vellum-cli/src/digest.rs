//! `vellum digest`: one hash of what a guest sees.

use crate::args::{OpenArgs, note_raw};
use crate::failure::Failure;
use crate::meter::Meter;
use crate::terminal::Terminal;
use crate::text::clean;
use clap::Args;
use serde::Serialize;
use vellum::DigestRequest;

const AFTER_HELP: &str = "\
The same content gives the same digest in every format and variant. The default is a tree of SHA-256 hashes over \
blocks of 64 KiB, in which empty parts cost nothing; --flat is plain SHA-256 over every byte, as `sha256sum` makes \
it of a raw image.

Examples:
  vellum digest disk.vmdk
  vellum digest --flat disk.qcow2
  vellum digest --json disk.vdi";

/// Hash what a guest sees: the same for every format
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct DigestArgs {
    /// The top image of the disk
    image: String,
    /// Format of the image; recognised by content if left out
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<String>,
    /// Plain SHA-256 over all bytes, zeros included
    #[arg(long)]
    flat: bool,
    /// Threads to use; one for each processor if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: Option<u16>,
    #[command(flatten)]
    open: OpenArgs,
}

#[derive(Serialize)]
struct Report<'a> {
    image: &'a str,
    format: Option<&'static str>,
    algorithm: &'static str,
    digest: &'a str,
    virtual_size: u64,
    data_bytes: u64,
}

/// Runs the verb.
pub fn run(args: &DigestArgs, terminal: &Terminal) -> Result<(), Failure> {
    let vellum = args.open.vellum();
    let (disk, images) = vellum.open(&args.image, &args.open.chain(args.format.as_deref(), terminal))?;
    note_raw(&images, terminal);
    let meter = Meter::new(terminal)?;
    let request = DigestRequest { flat: args.flat, threads: args.threads.map(usize::from) };
    let found = meter.end(vellum.digest(&disk, &request, &meter))?;
    if terminal.wants_json() {
        return terminal.json(&Report {
            image: &args.image,
            format: images.first().map(|image| image.format.name()),
            algorithm: found.algorithm,
            digest: &found.digest,
            virtual_size: found.size,
            data_bytes: found.data_bytes,
        });
    }
    terminal.report(|out, _| {
        // As `sha256sum` writes it; another algorithm is named, so that the two are never confused.
        let prefix = if args.flat { String::new() } else { format!("{}:", found.algorithm) };
        writeln!(out, "{prefix}{}  {}", found.digest, clean(&args.image))
    })
}
