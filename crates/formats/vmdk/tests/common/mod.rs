//! What the tests share: making sparse files by hand, running the reference tools.
#![allow(dead_code)]

pub mod model;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use vellum_conformance::format::{Model, Recipe, open_with, pattern, write_image};
use vellum_core::{Buf, ChainOptions, Disk, Error, Events, Format, Storage};
use vellum_format_vmdk::Vmdk;
use vellum_sim::MemoryFiles;

pub const GRAIN: usize = 65_536;

pub fn vmdk() -> Arc<dyn Format> {
    Arc::new(Vmdk)
}

/// Opens the chain at `path`, collecting warnings.
pub fn open_noting(files: &Arc<MemoryFiles>, path: &str) -> (Result<Disk, Error>, Vec<String>) {
    let notes: Arc<std::sync::Mutex<Vec<String>>> = Arc::default();
    let sink = notes.clone();
    let events = Events::new(move |note| sink.lock().unwrap().push(note.to_owned()));
    let options = ChainOptions { format: Some("vmdk".into()), events, ..ChainOptions::default() };
    let disk = open_with(&[vmdk()], files, path, &options);
    let notes = notes.lock().unwrap().clone();
    (disk, notes)
}

pub fn open(files: &Arc<MemoryFiles>, path: &str) -> Result<Disk, Error> {
    open_noting(files, path).0
}

pub fn read(disk: &Disk, offset: u64, len: usize) -> Result<Vec<u8>, Error> {
    let (buf, result) = disk.read_at(Buf::zeroed(len), offset).wait();
    result.map(|()| buf.to_vec())
}

/// Runs a reference tool in `directory`.
pub fn run(directory: &Path, tool: &str, arguments: &[&str]) -> String {
    let package = if tool == "vmdkinfo" { "libvmdk-utils" } else { "qemu-utils" };
    let output = Command::new(tool)
        .args(arguments)
        .current_dir(directory)
        .output()
        .unwrap_or_else(|e| panic!("{tool} cannot be run ({e}): install the Debian package {package}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{tool} {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Copies all files of `directory` into memory.
pub fn load(directory: &Path) -> Arc<MemoryFiles> {
    let files = MemoryFiles::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        files.put(entry.file_name().to_str().unwrap(), &std::fs::read(entry.path()).unwrap());
    }
    files
}

/// Copies all files in memory into `directory`.
pub fn store(files: &MemoryFiles, directory: &Path) {
    for path in files.paths() {
        std::fs::write(directory.join(&path), files.get(&path).unwrap().to_vec()).unwrap();
    }
}

/// A disk with runs of data in several grains and grain tables.
pub fn sample(size: u64) -> Model {
    let runs: Vec<(u64, usize)> = vec![
        (0, 512),
        (3 * 65_536 + 100, 200_000),
        (1 << 20, 65_536),
        ((5 << 20) - 7, 14),
        ((33 << 20) + 5, 100_000),
        (size.saturating_sub(700), 700),
    ];
    Model::with_runs(size, &runs)
}

/// The bytes of our own image of `model` in one file.
pub fn our_file(options: &[(&'static str, &str)], model: &Model) -> Vec<u8> {
    let files = MemoryFiles::new();
    write_image(&vmdk(), &files, "disk.vmdk", &Recipe::options(options), model).unwrap();
    files.get("disk.vmdk").unwrap().to_vec()
}

/// A file that is written sector by sector.
#[derive(Default)]
pub struct Sectors(pub Vec<u8>);

impl Sectors {
    pub fn put(&mut self, offset: usize, bytes: &[u8]) -> &mut Self {
        if self.0.len() < offset + bytes.len() {
            self.0.resize(offset + bytes.len(), 0);
        }
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
        self
    }
    pub fn put32(&mut self, offset: usize, value: u32) -> &mut Self {
        self.put(offset, &value.to_le_bytes())
    }
    pub fn put64(&mut self, offset: usize, value: u64) -> &mut Self {
        self.put(offset, &value.to_le_bytes())
    }
    /// Appends at the next sector border; returns the sector.
    pub fn append(&mut self, bytes: &[u8]) -> u32 {
        let start = self.0.len().next_multiple_of(512);
        self.put(start, bytes);
        let end = self.0.len().next_multiple_of(512);
        self.0.resize(end, 0);
        (start / 512) as u32
    }
}

/// A KDMV header.
pub struct Header {
    pub version: u32,
    pub flags: u32,
    pub capacity: u64,
    pub rgd: u64,
    pub gd: u64,
    pub over_head: u64,
    pub compress: u16,
}

impl Header {
    pub fn bytes(&self) -> Vec<u8> {
        let mut s = Sectors::default();
        s.put(0, b"KDMV").put32(4, self.version).put32(8, self.flags).put64(12, self.capacity);
        s.put64(20, 128).put64(28, 1).put64(36, 20).put32(44, 512).put64(48, self.rgd).put64(56, self.gd);
        s.put64(64, self.over_head).put(73, b"\n \r\n").put(77, &self.compress.to_le_bytes()).put(511, &[0]);
        s.0
    }
}

/// zlib data of a grain.
pub fn deflated(block: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    assert!(vellum_codec::zlib(Some(6)).unwrap().encode(block, &mut out, 2 * block.len() + 64).unwrap());
    out
}

pub fn grain_marker(sector: u64, data: &[u8]) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &(data.len() as u32).to_le_bytes(), data].concat()
}

pub fn meta_marker(sectors: u64, kind: u32) -> Vec<u8> {
    let mut s = Sectors::default();
    s.put64(0, sectors).put32(8, 0).put32(12, kind).put(511, &[0]);
    s.0
}

/// Descriptor of a disk of one file.
pub fn descriptor(create_type: &str, sectors: u64, more: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n\n\
         RW {sectors} SPARSE \"disk.vmdk\"   \n\n#DDB\nddb.adapterType = \"lsilogic\"\n{more}"
    )
}

/// Data of grain `number` of a made disk.
pub fn grain(number: u64) -> Vec<u8> {
    pattern(number * GRAIN as u64, GRAIN)
}
