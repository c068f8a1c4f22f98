//! The small images that requests are sent to: every variant that can be written, alone and as a child.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use vellum::{
    Buf, ChainOptions, CreateDiskRequest, ParentRequest, Preallocate, Providers, Storage, Vellum,
    WriteAccess, WriteFlags,
};
use vellum_sim::MemoryFiles;
use vellum_tests::corpus::Sparse;

/// The image that is opened.
pub const NAME: &str = "disk.img";
const PARENT: &str = "base.img";

/// How an image is made.
pub struct Shape {
    /// For messages.
    pub name: &'static str,
    /// Its format.
    pub format: &'static str,
    options: &'static [(&'static str, &'static str)],
    size: u64,
    /// Format of the parent, if it has one.
    parent: Option<&'static str>,
}

const KIB: u64 = 1 << 10;
const PAGE: usize = 4096;
/// No block divides it.
const SMALL: u64 = 256 * KIB + 3 * 512;
const MIDDLE: u64 = 640 * KIB + 3 * 512;
/// More than one extent, and more than one block of those formats whose blocks are large.
const LARGE: u64 = 1536 * KIB + 3 * 512;

const fn alone(
    name: &'static str,
    format: &'static str,
    options: &'static [(&'static str, &'static str)],
    size: u64,
) -> Shape {
    Shape { name, format, options, size, parent: None }
}

const fn child(
    name: &'static str,
    format: &'static str,
    options: &'static [(&'static str, &'static str)],
    parent: &'static str,
) -> Shape {
    Shape { name, format, options, size: SMALL, parent: Some(parent) }
}

static SHAPES: &[Shape] = &[
    alone("raw", "raw", &[], SMALL),
    alone("vdi 4k", "vdi", &[("block_size", "4k")], SMALL),
    alone("vdi 64k", "vdi", &[("block_size", "64k")], SMALL),
    alone("vdi 256k", "vdi", &[("block_size", "256k")], MIDDLE),
    alone("vdi fixed", "vdi", &[("variant", "fixed"), ("block_size", "16k")], SMALL),
    child("vdi child", "vdi", &[("block_size", "8k")], "vdi"),
    alone("vhd 4k", "vhd", &[("block_size", "4k"), ("force_size", "on")], SMALL),
    alone("vhd 64k", "vhd", &[("block_size", "64k"), ("force_size", "on")], SMALL),
    alone("vhd 256k", "vhd", &[("block_size", "256k"), ("force_size", "on")], MIDDLE),
    alone("vhd fixed", "vhd", &[("subformat", "fixed"), ("force_size", "on")], SMALL),
    child("vhd child", "vhd", &[("block_size", "16k"), ("force_size", "on")], "vhd"),
    alone("vmdk 4k", "vmdk", &[("grain_size", "4096")], SMALL),
    alone("vmdk 64k", "vmdk", &[("grain_size", "64k")], SMALL),
    alone("vmdk zeroed grain", "vmdk", &[("grain_size", "8k"), ("zeroed_grain", "on")], SMALL),
    alone("vmdk flat", "vmdk", &[("subformat", "monolithicFlat")], SMALL),
    alone("vmdk split", "vmdk", &[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "1M")], LARGE),
    child("vmdk child", "vmdk", &[("grain_size", "8k")], "vmdk"),
    alone("qcow2 512", "qcow2", &[("cluster_size", "512")], SMALL),
    alone("qcow2 4k 1 bit", "qcow2", &[("cluster_size", "4k"), ("refcount_bits", "1")], SMALL),
    alone("qcow2 4k 64 bit", "qcow2", &[("cluster_size", "4k"), ("refcount_bits", "64")], SMALL),
    alone("qcow2 v2", "qcow2", &[("compat", "v2"), ("cluster_size", "4k")], SMALL),
    alone("qcow2 64k lazy", "qcow2", &[("lazy_refcounts", "on")], MIDDLE),
    alone("qcow2 extended", "qcow2", &[("extended_l2", "on"), ("cluster_size", "16k")], SMALL),
    alone("qcow2 data file", "qcow2", &[("data_file", "disk.data"), ("cluster_size", "4k")], SMALL),
    alone(
        "qcow2 raw data file",
        "qcow2",
        &[("data_file", "disk.data"), ("data_file_raw", "on"), ("cluster_size", "4k")],
        SMALL,
    ),
    child("qcow2 child", "qcow2", &[("cluster_size", "8k")], "raw"),
    child("qcow2 extended child", "qcow2", &[("extended_l2", "on"), ("cluster_size", "16k")], "qcow2"),
];

/// The shapes of a format.
pub fn of(format: &str) -> Vec<&'static Shape> {
    SHAPES.iter().filter(|shape| shape.format == format).collect()
}

/// What a fresh copy of the shape shows: data of the parent, if it has one, and some of its own.
pub fn data(shape: &Shape, size: u64) -> Vec<(u64, Vec<u8>)> {
    let noise = |seed: u64, len: u64| vellum_tests::disks::noise(seed, len as usize);
    let mut data = Vec::new();
    if shape.parent.is_some() {
        data.push((0, noise(1, shape.size * 3 / 4)));
    }
    data.push((8 * KIB + 512, noise(2, 20 * KIB)));
    data.push((100 * KIB, noise(3, 4 * KIB)));
    data.push((size - 512, noise(4, 512)));
    data
}

/// A file without its zeros: length, and runs of pages by offset.
struct Kept {
    path: String,
    len: u64,
    runs: Vec<(u64, Vec<u8>)>,
}

impl Kept {
    fn new(path: String, bytes: &[u8]) -> Self {
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        for (number, page) in
            bytes.chunks(PAGE).enumerate().filter(|(_, page)| page.iter().any(|byte| *byte != 0))
        {
            let at = (number * PAGE) as u64;
            match runs.last_mut() {
                Some((start, run)) if *start + run.len() as u64 == at => run.extend_from_slice(page),
                _ => runs.push((at, page.to_vec())),
            }
        }
        Kept { path, len: bytes.len() as u64, runs }
    }
}

/// Fresh files of the shape.
pub fn files(shape: &'static Shape) -> Arc<MemoryFiles> {
    thread_local! {
        static MADE: RefCell<HashMap<&'static str, Vec<Kept>>> = RefCell::default();
    }
    let files = MemoryFiles::new();
    MADE.with_borrow_mut(|made| {
        for kept in made.entry(shape.name).or_insert_with(|| make(shape)) {
            let file = files.put(&kept.path, &[]);
            for (at, run) in &kept.runs {
                file.write_at(Buf::copy_of(run), *at, WriteFlags::default()).wait().1.expect("memory");
            }
            file.set_len(kept.len, Preallocate::Off).wait().expect("memory");
        }
    });
    files
}

fn make(shape: &Shape) -> Vec<Kept> {
    let files = MemoryFiles::new();
    let vellum = Vellum::new(files.clone());
    let options = |write| ChainOptions {
        write,
        providers: Some(Providers::seeded(2, 1_600_000_000)),
        probe_parents: true,
        ..ChainOptions::default()
    };
    let request = |target: &str, format: &str, size| CreateDiskRequest {
        target: target.into(),
        format: format.into(),
        virtual_size: size,
        reproducible: true,
        ..CreateDiskRequest::default()
    };
    let fill = |target: &str, format: &str, data: &[(u64, Vec<u8>)]| {
        let options = ChainOptions { format: Some(format.into()), ..options(WriteAccess::Yes) };
        let (disk, _) = vellum.open(target, &options).expect("opening a new image");
        for (at, bytes) in data {
            let written = disk.write(Buf::copy_of(bytes), *at, WriteFlags::default()).wait().1;
            written.expect("writing a new image");
        }
        disk.close().wait().expect("closing a new image");
        disk.size()
    };
    let mut create = request(NAME, shape.format, shape.size);
    create.options = shape.options.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    if let Some(format) = shape.parent {
        let mut parent = request(PARENT, format, shape.size);
        if format == "vhd" {
            parent.options = vec![("force_size".into(), "on".into())];
        }
        vellum.create(&parent).expect("making the parent");
        fill(PARENT, format, &data(shape, shape.size)[..1]);
        let options = ChainOptions { format: Some(format.into()), ..options(WriteAccess::No) };
        create.parent = Some(ParentRequest { place: PARENT.into(), options });
    }
    vellum.create(&create).unwrap_or_else(|error| panic!("{}: {error:?}", shape.name));
    let own = usize::from(shape.parent.is_some());
    let size = fill(NAME, shape.format, &[]);
    fill(NAME, shape.format, &data(shape, size)[own..]);
    let bytes = |path: &str| files.get(path).expect("it is there").to_vec();
    files.paths().into_iter().map(|path| Kept::new(path.clone(), &bytes(&path))).collect()
}

/// Puts the checksums of a format that has some right, so that mutations get past them.
pub fn seal(shape: &Shape, files: &Arc<MemoryFiles>) {
    if shape.format != "vhd" {
        return;
    }
    for path in files.paths() {
        let Some(file) = files.get(&path) else { continue };
        let bytes = file.to_vec();
        let sealed = vellum_tests::corpus::seal_vhd(Sparse::default().put(0, &bytes));
        let sealed = sealed.read(0, bytes.len());
        let _ = file.write_at(Buf::copy_of(&sealed), 0, WriteFlags::default()).wait();
    }
}
