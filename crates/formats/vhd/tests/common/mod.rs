//! What the tests of this crate share.
#![allow(dead_code, unused_imports)]

pub mod guest;

use std::sync::Arc;
use vellum_conformance::format::{Model, Recipe, open_with, write_image};
pub use vellum_conformance::peers::{Directory, run};
use vellum_core::{ChainOptions, Disk, Format, Result};
use vellum_format_vhd::Vhd;
use vellum_sim::MemoryFiles;

pub fn vhd() -> Arc<dyn Format> {
    Arc::new(Vhd)
}

/// Opens `path` of `files` as VHD, with parents.
pub fn open_vhd(files: &Arc<MemoryFiles>, path: &str) -> Result<Disk> {
    let options = ChainOptions { format: Some("vhd".into()), ..ChainOptions::default() };
    open_with(&[vhd()], files, path, &options)
}

/// The bytes of an image of `model`.
pub fn image_of(recipe: &Recipe, model: &Model) -> Vec<u8> {
    let files = MemoryFiles::new();
    write_image(&vhd(), &files, "d.vhd", recipe, model).expect("writing the image");
    files.get("d.vhd").expect("the image is there").to_vec()
}

pub fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

/// Where the footer of `bytes` starts.
pub fn footer_at(bytes: &[u8]) -> usize {
    bytes.len() - 512
}

fn checksum(bytes: &[u8], field: usize) -> u32 {
    let counted = bytes.iter().enumerate().filter(|(i, _)| !(field..field + 4).contains(i));
    !counted.map(|(_, byte)| u32::from(*byte)).sum::<u32>()
}

/// Makes the checksum of the footer at `at` right again.
pub fn seal_footer(bytes: &mut [u8], at: usize) {
    let sum = checksum(&bytes[at..at + 512], 64);
    put32(bytes, at + 64, sum);
}

/// Makes the checksum of the dynamic header at `at` right again.
pub fn seal_header(bytes: &mut [u8], at: usize) {
    let sum = checksum(&bytes[at..at + 1024], 36);
    put32(bytes, at + 36, sum);
}

/// Changes the footer at the end and, if there is one, its copy at the start.
pub fn edit_footers(bytes: &mut [u8], edit: impl Fn(&mut [u8])) {
    let end = footer_at(bytes);
    let starts = if &bytes[..8] == b"conectix" { vec![0, end] } else { vec![end] };
    for at in starts {
        edit(&mut bytes[at..at + 512]);
        seal_footer(bytes, at);
    }
}

/// Changes the dynamic header at 0x200.
pub fn edit_header(bytes: &mut [u8], edit: impl Fn(&mut [u8])) {
    edit(&mut bytes[0x200..0x600]);
    seal_header(bytes, 0x200);
}

/// Options for opening a disk for writing.
pub fn write_options(flags: vellum_core::OpenFlags) -> ChainOptions {
    let mut options = ChainOptions {
        write: vellum_core::WriteAccess::Yes,
        providers: Some(vellum_core::Providers::seeded(44, 1_700_000_100)),
        ..ChainOptions::default()
    };
    options.disk.flags = flags;
    options
}

/// What `check` says of the image at `path`, with a plan.
pub fn check_of(files: &Arc<MemoryFiles>, path: &str) -> vellum_core::CheckReport {
    try_check(files, path).expect("checking the image")
}

pub fn try_check(files: &Arc<MemoryFiles>, path: &str) -> Result<vellum_core::CheckReport> {
    let request = vellum_core::CheckRequest {
        storage: files.get(path).expect("the image is there"),
        location: vellum_core::Location(path.to_owned()),
        resolver: files.clone(),
        limits: vellum_core::Limits::default(),
        events: vellum_core::Events::default(),
        plan: true,
    };
    vellum_core::block_on(vhd().check(request))
}

/// Carries out what a check planned.
pub fn repair(report: &vellum_core::CheckReport) {
    vellum_conformance::mending::carry_out(report, true);
}
