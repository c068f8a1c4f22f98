//! What the tests of this crate share.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use vellum_conformance::format::{Model, Recipe, open_with, write_image};
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

/// Runs a tool and returns what it printed; the test fails if the tool is missing or fails.
pub fn run(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{tool} is needed (Debian package qemu-utils): {e}"));
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A directory for files of other tools.
pub struct Directory(tempfile::TempDir);

impl Directory {
    pub fn new() -> Self {
        Directory(tempfile::tempdir().expect("a temporary directory"))
    }
    pub fn path(&self, name: &str) -> String {
        let path: PathBuf = self.0.path().join(name);
        path.to_str().expect("a path in UTF-8").to_owned()
    }
    pub fn write(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        std::fs::write(Path::new(&path), bytes).expect("writing a temporary file");
        path
    }
}
