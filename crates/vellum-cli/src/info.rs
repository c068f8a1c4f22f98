//! `vellum info`: everything that an image keeps of itself, and what it costs on its host.

mod json;
mod table;

use crate::args::OpenArgs;
use crate::failure::Failure;
use crate::terminal::Terminal;
use clap::Args;
use std::sync::{Arc, Mutex, PoisonError};
use vellum::{ChainOptions, Events, OpenedImage, Storage};

const AFTER_HELP: &str = "\
Without --chain only IMAGE itself is opened: no parent, extent or data file needs to be there.

Examples:
  vellum info disk.vmdk
  vellum info --chain snapshot.qcow2
  vellum info --json disk.vdi";

/// Show everything that an image says of itself
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct InfoArgs {
    /// The image
    image: String,
    /// Open the parents too, and show every image of the chain
    #[arg(long)]
    chain: bool,
    /// Format of the image; recognised by content if left out
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<String>,
    #[command(flatten)]
    open: OpenArgs,
}

/// Runs the verb.
pub fn run(args: &InfoArgs, terminal: &Terminal) -> Result<(), Failure> {
    let vellum = args.open.vellum();
    let warnings = Warnings::default();
    let options =
        ChainOptions { events: warnings.events(), ..args.open.chain(args.format.as_deref(), terminal) };
    let images = if args.chain {
        vellum.open(&args.image, &options).map(|(_, images)| images)
    } else {
        vellum.open_alone(&args.image, &options).map(|image| vec![image])
    };
    let images = match images {
        Ok(images) => images,
        Err(error) => {
            // What was odd may explain what is wrong.
            warnings.take().iter().for_each(|warning| terminal.warn(warning));
            return Err(error.into());
        }
    };
    let warnings = warnings.take_others(&images);
    if !terminal.wants_json() {
        return terminal.report(|out, style| table::write(out, style, &images, &warnings));
    }
    if args.chain {
        terminal.json(&json::ChainReport::new(&images, &warnings))
    } else {
        // Without --chain there is one image.
        images.iter().try_for_each(|image| terminal.json(&json::ImageReport::new(image, &warnings)))
    }
}

/// The files of an image that are open: the one that was named first.
fn open_files(image: &OpenedImage) -> Vec<&dyn Storage> {
    let mut files: Vec<&dyn Storage> = vec![image.storage.as_ref()];
    for part in image.layer.image.storages() {
        let known = files.iter().any(|file| match (file.id(), part.id()) {
            (Some(a), Some(b)) => a == b,
            _ => file.name() == part.name(),
        });
        if !known {
            files.push(part.as_ref());
        }
    }
    files
}

/// Collects what drivers warn of while images are opened.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl Warnings {
    fn events(&self) -> Events {
        let sink = self.0.clone();
        Events::new(move |message| {
            sink.lock().unwrap_or_else(PoisonError::into_inner).push(message.to_owned());
        })
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What no image of `images` says itself.
    fn take_others(&self, images: &[OpenedImage]) -> Vec<String> {
        let mut others = self.take();
        others.retain(|warning| {
            !images.iter().any(|image| image.layer.image.info().warnings.contains(warning))
        });
        others.dedup();
        others
    }
}
