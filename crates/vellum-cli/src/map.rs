//! `vellum map`: which layer, file and offset each range of a disk comes from.

use crate::args::{OpenArgs, note_raw};
use crate::failure::{ErrorBody, Failure};
use crate::terminal::{Style, Terminal, escape_controls};
use crate::text::{clean, size};
use clap::Args;
use serde::Serialize;
use std::io::{self, Write};
use vellum::{Code, Disk, Error, MapEntry, MapKind, Vellum};

const AFTER_HELP: &str = "\
Kinds: data (as it is in the file), hole (data in a hole of the file), compressed, zero (marked so in that layer), \
absent (in no layer). Holes, zero and absent read as zeros. Layer 0 is the top image.

Examples:
  vellum map disk.qcow2
  vellum map --json snapshot.vmdk
  vellum map disk.vdi | grep data";

/// Show where each range of a disk is stored
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct MapArgs {
    /// The top image of the disk
    image: String,
    /// Format of the image; recognised by content if left out
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<String>,
    #[command(flatten)]
    open: OpenArgs,
}

#[derive(Serialize)]
struct Layer<'a> {
    layer: usize,
    image: &'a str,
    format: &'static str,
}

#[derive(Serialize)]
struct Extent<'a> {
    start: u64,
    length: u64,
    kind: &'static str,
    layer: usize,
    file: Option<&'a str>,
    offset: Option<u64>,
}

/// Runs the verb.
pub fn run(args: &MapArgs, terminal: &Terminal) -> Result<(), Failure> {
    let vellum = args.open.vellum();
    let (disk, images) = vellum.open(&args.image, &args.open.chain(args.format.as_deref(), terminal))?;
    note_raw(&images, terminal);
    let layers: Vec<Layer<'_>> = images
        .iter()
        .enumerate()
        .map(|(layer, image)| Layer { layer, image: &image.layer.location.0, format: image.format.name() })
        .collect();
    let mut failed = None;
    terminal.report(|out, style| {
        let result = if terminal.wants_json() {
            write_json(out, &vellum, &disk, &layers)?
        } else {
            write_table(out, style, &vellum, &disk, &layers)?
        };
        failed = result.err();
        Ok(())
    })?;
    match failed {
        // With JSON the error is the last member of the report.
        Some(error) if terminal.wants_json() => Err(Failure::Reported(error)),
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}

/// Calls `each` for every entry. The outer error is one of the output, the inner one of the disk.
fn walk(
    vellum: &Vellum,
    disk: &Disk,
    mut each: impl FnMut(&MapEntry) -> io::Result<()>,
) -> io::Result<Result<(), Error>> {
    let mut output = Ok(());
    let result = vellum.map(disk, |entry| {
        output = each(&entry);
        match output {
            Ok(()) => Ok(()),
            Err(_) => Err(Error::new(Code::Cancelled, "nobody reads the map")),
        }
    });
    output.map(|()| result)
}

fn write_json(
    out: &mut dyn Write,
    vellum: &Vellum,
    disk: &Disk,
    layers: &[Layer<'_>],
) -> io::Result<Result<(), Error>> {
    let layers = serde_json::to_string(layers)?;
    write!(out, "{{\n\"virtual_size\": {},\n\"layers\": {},\n", disk.size(), escape_controls(&layers))?;
    write!(out, "\"extents\": [")?;
    let mut separator = "\n";
    let result = walk(vellum, disk, |entry| {
        let (file, offset) = match &entry.place {
            Some((file, offset)) => (Some(file.as_str()), Some(*offset)),
            None => (None, None),
        };
        let extent = Extent {
            start: entry.range.start,
            length: entry.range.end - entry.range.start,
            kind: entry.kind.as_str(),
            layer: entry.layer,
            file,
            offset,
        };
        write!(out, "{separator}{}", escape_controls(&serde_json::to_string(&extent)?))?;
        separator = ",\n";
        Ok(())
    })?;
    write!(out, "\n]")?;
    if let Err(error) = &result {
        let body = serde_json::to_string(&ErrorBody::new(error))?;
        write!(out, ",\n\"error\": {}", escape_controls(&body))?;
    }
    writeln!(out, "\n}}")?;
    Ok(result)
}

fn write_table(
    out: &mut dyn Write,
    style: Style,
    vellum: &Vellum,
    disk: &Disk,
    layers: &[Layer<'_>],
) -> io::Result<Result<(), Error>> {
    for layer in layers {
        let name = style.title(&clean(layer.image));
        writeln!(out, "{} {name} ({})", style.key(&format!("layer {}", layer.layer)), layer.format)?;
    }
    let digits = format!("{:x}", disk.size()).len().max(8);
    let width = digits + 2;
    let heading = format!("{:width$}  {:>14}  {:10}  {:>5}  place", "start", "length", "kind", "layer");
    writeln!(out, "{}", style.key(&heading))?;
    walk(vellum, disk, |entry| {
        let length = size(entry.range.end - entry.range.start);
        let kind = entry.kind.as_str();
        let layer = match entry.kind {
            MapKind::Absent => "-".to_owned(),
            _ => entry.layer.to_string(),
        };
        let line = format!("{:#0width$x}  {length:>14}  {kind:10}  {layer:>5}", entry.range.start);
        match &entry.place {
            Some((file, offset)) if entry.kind != MapKind::Hole => {
                writeln!(out, "{line}  {:#x} {}", offset, clean(file))
            }
            Some((file, offset)) => {
                writeln!(out, "{}", style.dim(&format!("{line}  {offset:#x} {}", clean(file))))
            }
            None => writeln!(out, "{}", style.dim(&line)),
        }
    })
}
