//! What the tests of this crate share.
#![allow(dead_code, unused_imports)]

pub mod guest;

use std::sync::Arc;
use vellum_conformance::format::{Model, Recipe, open_with, write_image};
pub use vellum_conformance::peers::{Directory, run};
use vellum_core::{ChainOptions, Disk, Format, Result};
use vellum_format_vdi::Vdi;
use vellum_sim::MemoryFiles;

pub fn vdi() -> Arc<dyn Format> {
    Arc::new(Vdi)
}

/// Opens `path` of `files` as VDI, with parents.
pub fn open_vdi(files: &Arc<MemoryFiles>, path: &str) -> Result<Disk> {
    let options = ChainOptions { format: Some("vdi".into()), ..ChainOptions::default() };
    open_with(&[vdi()], files, path, &options)
}

/// The bytes of an image of `model`.
pub fn image_of(recipe: &Recipe, model: &Model) -> Vec<u8> {
    let files = MemoryFiles::new();
    write_image(&vdi(), &files, "d.vdi", recipe, model).expect("writing the image");
    files.get("d.vdi").expect("the image is there").to_vec()
}

pub fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}
