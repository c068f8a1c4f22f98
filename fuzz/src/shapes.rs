//! The images that requests are sent to: every variant that can be written, alone and as a child. Small ones are the
//! most by far, because a thousand runs on a small image find more than one on a large one.

use crate::data;
use crate::files::{Content, Files};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use vellum::{
    Buf, ChainOptions, ConvertRequest, CreateDiskRequest, ParentRequest, Providers, Quiet, Vellum,
    WriteAccess, WriteFlags,
};
use vellum_sim::MemoryFiles;

/// The image that is opened.
pub const NAME: &str = "disk.img";
/// The snapshot that some shapes keep.
pub const SNAPSHOT: &str = "kept";

/// How the names of parents begin.
pub const PARENTS: &str = "base";

type Options = &'static [(&'static str, &'static str)];

/// How an image is made.
pub struct Shape {
    /// For messages.
    pub name: &'static str,
    /// Its format.
    pub format: &'static str,
    options: Options,
    size: u64,
    /// Formats of its parents, the base first.
    parents: &'static [&'static str],
    content: Start,
    /// How often it is taken, compared with the others of its format.
    weight: u8,
}

/// How the data that an image begins with comes into it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Start {
    Written,
    /// By converting, compressed.
    Compressed,
    /// Written, and kept in a snapshot.
    Snapshot,
}

/// A shape that was made.
pub struct Made {
    /// Its files, the image first.
    pub files: Vec<(String, Content)>,
    /// What its disk shows.
    pub disk: Vec<u8>,
    /// Bytes of a few pages of its tables: as many as one request needs at once.
    pub few_tables_bytes: usize,
}

const KIB: u64 = 1 << 10;
/// No block divides any of these.
const TINY: u64 = 40 * KIB + 3 * 512;
const SMALL: u64 = 64 * KIB + 3 * 512;
const MIDDLE: u64 = 256 * KIB + 3 * 512;
const LARGE: u64 = 640 * KIB + 3 * 512;
/// More than one extent of the least size.
const SPLIT: u64 = 1536 * KIB + 3 * 512;

const fn image(name: &'static str, format: &'static str, options: Options, size: u64, weight: u8) -> Shape {
    Shape { name, format, options, size, parents: &[], content: Start::Written, weight }
}

impl Shape {
    const fn of(self, parents: &'static [&'static str]) -> Self {
        Shape { parents, ..self }
    }

    const fn with(self, content: Start) -> Self {
        Shape { content, ..self }
    }

    /// Whether it keeps [`SNAPSHOT`].
    pub fn has_snapshot(&self) -> bool {
        self.content == Start::Snapshot
    }
}

static SHAPES: &[Shape] = &[
    image("raw", "raw", &[], SMALL, 15),
    image("raw large", "raw", &[], LARGE, 1),
    image("vdi 4k", "vdi", &[("block_size", "4k")], SMALL, 32),
    image("vdi fixed", "vdi", &[("variant", "fixed"), ("block_size", "16k")], SMALL, 4),
    image("vdi child", "vdi", &[("block_size", "8k")], SMALL, 16).of(&["vdi"]),
    image("vdi grandchild", "vdi", &[("block_size", "4k")], SMALL, 2).of(&["vdi", "vdi"]),
    image("vdi 64k", "vdi", &[("block_size", "64k")], MIDDLE, 2),
    image("vdi 256k", "vdi", &[("block_size", "256k")], LARGE, 1),
    image("vhd 4k", "vhd", &[("block_size", "4k"), ("force_size", "on")], SMALL, 32),
    image("vhd fixed", "vhd", &[("subformat", "fixed"), ("force_size", "on")], SMALL, 4),
    image("vhd child", "vhd", &[("block_size", "16k"), ("force_size", "on")], SMALL, 16).of(&["vhd"]),
    image("vhd grandchild", "vhd", &[("block_size", "4k"), ("force_size", "on")], SMALL, 2)
        .of(&["vhd", "vhd"]),
    image("vhd 64k", "vhd", &[("block_size", "64k"), ("force_size", "on")], MIDDLE, 2),
    image("vhd 256k", "vhd", &[("block_size", "256k"), ("force_size", "on")], LARGE, 1),
    image("vmdk 4k", "vmdk", &[("grain_size", "4096")], SMALL, 24),
    image("vmdk zeroed grain", "vmdk", &[("grain_size", "8k"), ("zeroed_grain", "on")], SMALL, 12),
    image("vmdk child", "vmdk", &[("grain_size", "8k")], SMALL, 12).of(&["vmdk"]),
    image("vmdk flat", "vmdk", &[("subformat", "monolithicFlat")], SMALL, 4),
    image("vmdk grandchild", "vmdk", &[("grain_size", "4096")], SMALL, 2).of(&["vmdk", "vmdk"]),
    image("vmdk 64k", "vmdk", &[("grain_size", "64k")], MIDDLE, 2),
    image("vmdk split", "vmdk", &[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "1M")], SPLIT, 1),
    image("vmdk split flat", "vmdk", &[("subformat", "twoGbMaxExtentFlat"), ("extent_size", "1M")], SPLIT, 1),
    image("qcow2 512", "qcow2", &[("cluster_size", "512")], TINY, 12),
    image("qcow2 4k", "qcow2", &[("cluster_size", "4k")], SMALL, 12),
    image("qcow2 1k 1 bit", "qcow2", &[("cluster_size", "1k"), ("refcount_bits", "1")], SMALL, 4),
    image("qcow2 1k 64 bit", "qcow2", &[("cluster_size", "1k"), ("refcount_bits", "64")], SMALL, 4),
    image("qcow2 v2", "qcow2", &[("compat", "v2"), ("cluster_size", "2k")], SMALL, 4),
    image("qcow2 lazy", "qcow2", &[("lazy_refcounts", "on"), ("cluster_size", "4k")], SMALL, 4),
    image("qcow2 extended", "qcow2", &[("extended_l2", "on"), ("cluster_size", "16k")], SMALL, 8),
    image("qcow2 child", "qcow2", &[("cluster_size", "4k")], SMALL, 8).of(&["raw"]),
    image("qcow2 extended child", "qcow2", &[("extended_l2", "on"), ("cluster_size", "16k")], SMALL, 4)
        .of(&["qcow2"]),
    image("qcow2 snapshot", "qcow2", &[("cluster_size", "2k")], SMALL, 6).with(Start::Snapshot),
    image("qcow2 compressed", "qcow2", &[("cluster_size", "4k")], SMALL, 4).with(Start::Compressed),
    image("qcow2 data file", "qcow2", &[("data_file", "disk.data"), ("cluster_size", "4k")], SMALL, 3),
    image(
        "qcow2 raw data file",
        "qcow2",
        &[("data_file", "disk.data"), ("data_file_raw", "on"), ("cluster_size", "4k")],
        SMALL,
        3,
    ),
    image("qcow2 grandchild", "qcow2", &[("cluster_size", "1k")], SMALL, 2).of(&["raw", "qcow2"]),
    image("qcow2 zstd", "qcow2", &[("compression_type", "zstd"), ("cluster_size", "8k")], SMALL, 1)
        .with(Start::Compressed),
    image("qcow2 64k", "qcow2", &[], MIDDLE, 1),
    image("qcow2 64k lazy", "qcow2", &[("lazy_refcounts", "on")], LARGE, 1),
];

/// The shape of `format` that a byte of the input stands for.
pub fn choose(format: &str, byte: u8) -> &'static Shape {
    let all = || SHAPES.iter().filter(|shape| shape.format == format);
    let turns: usize = all().map(|shape| usize::from(shape.weight)).sum();
    let mut turn = usize::from(byte) % turns;
    for shape in all() {
        match turn.checked_sub(shape.weight.into()) {
            None => return shape,
            Some(left) => turn = left,
        }
    }
    unreachable!("{format} has no shape")
}

/// The shape, made once in this process.
pub fn made(shape: &'static Shape) -> Arc<Made> {
    static MADE: Mutex<Option<HashMap<&'static str, Arc<Made>>>> = Mutex::new(None);
    let mut made = MADE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let made = made.get_or_insert_default();
    made.entry(shape.name).or_insert_with(|| Arc::new(Maker::new(shape).make())).clone()
}

/// What is written into each image of a chain, in pieces: offset, length, which data.
fn pieces(size: u64, layer: usize) -> Vec<(u64, u64, u8)> {
    let own = layer as u8 + 2;
    match layer {
        // The base holds most of the disk.
        0 => vec![(0, size * 3 / 4, 1)],
        _ => vec![(4 * KIB + 512, size / 6, own), (size * 5 / 8, 4 * KIB, own), (size - 512, 512, own)],
    }
}

struct Maker {
    shape: &'static Shape,
    files: Arc<MemoryFiles>,
    vellum: Vellum,
    disk: Vec<u8>,
}

impl Maker {
    fn new(shape: &'static Shape) -> Self {
        let files = MemoryFiles::new();
        Maker { shape, vellum: Vellum::new(files.clone()), files, disk: vec![0; shape.size as usize] }
    }

    fn make(mut self) -> Made {
        for (layer, format) in self.shape.parents.iter().enumerate() {
            let name = format!("{PARENTS}{layer}.img");
            self.create(layer, &name, format, &[]);
            self.fill(layer, &name, format);
        }
        let (own, format) = (self.shape.parents.len(), self.shape.format);
        match self.shape.content {
            Start::Compressed => self.compress(own),
            _ => {
                self.create(own, NAME, format, self.shape.options);
                self.fill(own.max(1), NAME, format);
            }
        }
        if self.shape.has_snapshot() {
            let options = open_options(format);
            self.vellum.create_snapshot(NAME, &options, SNAPSHOT).expect("making the snapshot");
        }
        let mut paths = self.files.paths();
        paths.sort_by_key(|path| path != NAME);
        let content = |path: String| {
            let bytes = self.files.get(&path).expect("it is there").to_vec();
            (path, Content::of(&bytes))
        };
        let files = paths.into_iter().map(content).collect();
        let options = ChainOptions { write: WriteAccess::No, ..open_options(format) };
        let (disk, images) = self.vellum.open(NAME, &options).expect("opening a new image");
        // Formats may round sizes.
        self.disk.resize(disk.size() as usize, 0);
        let block = images.iter().map(|image| image.layer.image.info().block_size).max().unwrap_or(0);
        Made { files, disk: self.disk, few_tables_bytes: 4 * block.clamp(512, 64 * KIB) as usize }
    }

    fn create(&self, layer: usize, name: &str, format: &str, options: Options) {
        let mut request = CreateDiskRequest {
            target: name.into(),
            format: format.into(),
            virtual_size: self.shape.size,
            reproducible: true,
            ..CreateDiskRequest::default()
        };
        request.options = options.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        if format == "vhd" && options.is_empty() {
            request.options = vec![("force_size".into(), "on".into())];
        }
        if let Some(parent) = layer.checked_sub(1).and_then(|below| self.shape.parents.get(below)) {
            let options = ChainOptions { write: WriteAccess::No, ..open_options(parent) };
            request.parent = Some(ParentRequest { place: format!("{PARENTS}{}.img", layer - 1), options });
        }
        self.vellum.create(&request).unwrap_or_else(|error| panic!("{}: {error:?}", self.shape.name));
    }

    fn fill(&mut self, layer: usize, name: &str, format: &str) {
        let (disk, _) = self.vellum.open(name, &open_options(format)).expect("opening a new image");
        for (at, len, which) in pieces(self.shape.size, layer) {
            let mut buf = Buf::zeroed(len as usize);
            data::fill(&mut buf, at, which);
            self.disk[at as usize..(at + len) as usize].copy_from_slice(&buf);
            disk.write(buf, at, WriteFlags::default()).wait().1.expect("writing a new image");
        }
        disk.close().wait().expect("closing a new image");
    }

    fn compress(&mut self, layer: usize) {
        self.create(layer, "source", "raw", &[]);
        self.fill(0, "source", "raw");
        // Noise does not become smaller.
        let (disk, _) = self.vellum.open("source", &open_options("raw")).expect("opening the source");
        for (at, byte) in (0..self.shape.size / 2).step_by(1536).zip(1..) {
            self.disk[at as usize..at as usize + 1400].fill(byte);
            let buf = Buf::copy_of(&self.disk[at as usize..at as usize + 1400]);
            disk.write(buf, at, WriteFlags::default()).wait().1.expect("writing the source");
        }
        disk.close().wait().expect("closing the source");
        let mut request = ConvertRequest::new("source", NAME, self.shape.format);
        request.source_options.format = Some("raw".into());
        request.options =
            self.shape.options.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        (request.compress, request.reproducible, request.threads) = (true, true, Some(1));
        self.vellum.convert(&request, &Quiet).expect("compressing");
        self.vellum.resolver().delete(&"source".into()).wait().expect("it is there");
    }
}

fn open_options(format: &str) -> ChainOptions {
    ChainOptions {
        format: Some(format.into()),
        write: WriteAccess::Yes,
        providers: Some(Providers::seeded(2, 1_600_000_000)),
        probe_parents: true,
        ..ChainOptions::default()
    }
}

/// Puts the checksums of a format that has some right, so that mutations get past them.
pub fn seal(shape: &Shape, files: &Files) {
    if shape.format != "vhd" {
        return;
    }
    for file in files.list() {
        let mut content = file.content();
        let len = content.len();
        if len < 512 {
            continue;
        }
        let mut header = [0; 8];
        content.read(&mut header, 16);
        let header = u64::from_be_bytes(header);
        sum(&mut content, 0, 512, 64);
        sum(&mut content, len - 512, 512, 64);
        if header.checked_add(1024).is_some_and(|end| end <= len) {
            sum(&mut content, header, 1024, 36);
        }
        file.set_content(content);
    }
}

/// The one's complement of the sum of all bytes but those of the checksum itself.
fn sum(content: &mut Content, at: u64, len: usize, field: usize) {
    let mut bytes = [0; 1024];
    content.read(&mut bytes[..len], at);
    bytes[field..field + 4].fill(0);
    let sum: u32 = bytes[..len].iter().map(|byte| u32::from(*byte)).sum();
    content.write(&(!sum).to_be_bytes(), at + field as u64);
}
