//! The suite that every format passes: what is written through its `ImageWriter` reads back through its
//! `Image`, against a byte-array model; the same calls give the same bytes; opening changes nothing.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::collections::BTreeMap;
use std::sync::Arc;
use vellum_core::{
    Buf, ChainOptions, CreateRequest, Disk, DiskTraits, Format, FormatRegistry, ImageWriter, Location,
    OptionValues, Output, OutputMode, Payload, Providers, Resolver, Result, Storage, WriteFlags, block_on,
    bytes, write_all,
};
use vellum_sim::MemoryFiles;

/// A disk as a model: its size and the data written to it.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Bytes of the disk.
    pub size: u64,
    /// Data by offset; everything else is zero. Ranges do not overlap.
    pub data: BTreeMap<u64, Vec<u8>>,
}

impl Model {
    /// The bytes of `start..start + len`.
    pub fn read(&self, start: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0u8; len];
        for (&at, data) in &self.data {
            let from = at.max(start);
            let to = (at + data.len() as u64).min(start + len as u64);
            if from < to {
                let source = &data[(from - at) as usize..(to - at) as usize];
                bytes[(from - start) as usize..(to - start) as usize].copy_from_slice(source);
            }
        }
        bytes
    }

    /// A disk of `size` bytes with runs of patterned data at `runs` (offset, length), clipped and kept apart.
    pub fn with_runs(size: u64, runs: &[(u64, usize)]) -> Self {
        let mut model = Model { size, data: BTreeMap::new() };
        let mut end = 0;
        let mut sorted = runs.to_vec();
        sorted.sort_unstable();
        for (offset, len) in sorted {
            let start = offset.max(end);
            let stop = offset.saturating_add(len as u64).min(size);
            if start < stop {
                model.data.insert(start, pattern(start, (stop - start) as usize));
                end = stop;
            }
        }
        model
    }
}

/// Bytes that differ from place to place, compress to about a third and are never zero.
pub fn pattern(offset: u64, len: usize) -> Vec<u8> {
    (offset..offset + len as u64)
        .map(|i| {
            let word = (i / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            if i % 8 < 3 { (word >> 40) as u8 | 1 } else { b'a' + (i % 8) as u8 }
        })
        .collect()
}

/// How an image is made.
#[derive(Clone, Debug, Default)]
pub struct Recipe {
    /// Options of the driver.
    pub options: Vec<(&'static str, String)>,
    /// Compress.
    pub compress: bool,
    /// Compression level.
    pub level: Option<i32>,
    /// What is kept besides the content.
    pub traits: DiskTraits,
}

impl Recipe {
    /// A recipe with these options.
    pub fn options(options: &[(&'static str, &str)]) -> Self {
        Recipe { options: options.iter().map(|(n, v)| (*n, (*v).to_owned())).collect(), ..Recipe::default() }
    }

    /// The same recipe, compressed.
    pub fn compressed(mut self) -> Self {
        self.compress = true;
        self
    }
}

/// Makes an image of `model` at `path` of `files`, in the way in which convert does it.
pub fn write_image(
    format: &Arc<dyn Format>,
    files: &Arc<MemoryFiles>,
    path: &str,
    recipe: &Recipe,
    model: &Model,
) -> Result<()> {
    let resolver: Arc<dyn Resolver> = files.clone();
    let output = Output::new(resolver, Location(path.to_owned()), OutputMode::Fresh);
    let given = recipe.options.iter().map(|(n, v)| ((*n).to_owned(), v.clone()));
    let request = CreateRequest {
        output: output.clone(),
        virtual_size: model.size,
        options: OptionValues::check(format.name(), format.create_options(), given)?,
        traits: recipe.traits.clone(),
        compress: recipe.compress,
        level: recipe.level,
        providers: Providers::seeded(42, 1_700_000_000),
        parent: None,
    };
    block_on(async {
        let mut writer = format.create(request).await?;
        feed(writer.as_mut(), model).await?;
        writer.finish().await?;
        output.put_in_place().await
    })
}

/// Feeds the blocks of `model` that are not zero, in ascending order.
async fn feed(writer: &mut dyn ImageWriter, model: &Model) -> Result<()> {
    let shape = writer.shape().clone();
    let block_size = shape.block_size;
    let mut blocks: Vec<u64> = model
        .data
        .iter()
        .flat_map(|(at, data)| at / block_size..(at + data.len() as u64).div_ceil(block_size))
        .collect();
    blocks.dedup();
    let mut encoded = Vec::new();
    for block in blocks {
        let start = block * block_size;
        let content = model.read(start, block_size as usize);
        if bytes::is_zero(&content) {
            continue;
        }
        let fits = match &shape.codec {
            Some(codec) => codec.encode(&content, &mut encoded, shape.encoded_limit)?,
            None => false,
        };
        let payload = if fits { Payload::Encoded { len: encoded.len() } } else { Payload::Data };
        let mut writes = Vec::new();
        let place = writer.place(block, payload, &mut writes)?;
        let again = writer.place(block, payload, &mut Vec::new())?;
        assert_eq!(place, again, "placing the same block again gives the same place");
        // The last block of a disk is written short.
        let len = block_size.min(model.size - start) as usize;
        let source = if fits { &encoded[..] } else { &content[..len] };
        let storage = writer.storages()[place.storage].clone();
        storage.write_at(Buf::copy_of(source), place.offset, WriteFlags::default()).await.1?;
        write_all(writer.storages(), writes).await?;
    }
    Ok(())
}

/// Opens the image at `path` with its parents. `formats` are the formats that may occur.
pub fn open(formats: &[Arc<dyn Format>], files: &Arc<MemoryFiles>, path: &str) -> Result<Disk> {
    open_with(formats, files, path, &ChainOptions::default())
}

/// Opens with options.
pub fn open_with(
    formats: &[Arc<dyn Format>],
    files: &Arc<MemoryFiles>,
    path: &str,
    options: &ChainOptions,
) -> Result<Disk> {
    let resolver: Arc<dyn Resolver> = files.clone();
    let registry = FormatRegistry::new(formats.to_vec());
    block_on(registry.open_chain(&resolver, path, options)).map(|(disk, _)| disk)
}

/// Reads a whole disk (for small ones).
pub fn read_all(disk: &Disk) -> Vec<u8> {
    let mut content = vec![0u8; disk.size() as usize];
    for (index, part) in content.chunks_mut(1 << 20).enumerate() {
        let (buf, result) = disk.read_at(Buf::zeroed(part.len()), (index as u64) << 20).wait();
        result.expect("reading the disk");
        part.copy_from_slice(&buf);
    }
    content
}

/// Asserts that `disk` is `model`: the data, its surroundings, and zero elsewhere by `map`.
pub fn assert_same(disk: &Disk, model: &Model, exact_size: bool) {
    if exact_size {
        assert_eq!(disk.size(), model.size, "virtual size");
    } else {
        assert!(disk.size() >= model.size, "virtual size {} of {}", disk.size(), model.size);
    }
    for (&at, data) in &model.data {
        let start = at.saturating_sub(3000);
        let end = (at + data.len() as u64 + 3000).min(disk.size());
        let (buf, result) = disk.read_at(Buf::zeroed((end - start) as usize), start).wait();
        result.expect("reading the disk");
        let expected = model.read(start, buf.len());
        let difference = buf.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(difference, None, "content differs near guest offset {at:#x}");
    }
    let mut at = 0;
    while at < disk.size() {
        let pieces = block_on(disk.pieces(at..disk.size(), 1000)).expect("mapping the disk");
        for piece in pieces {
            assert_eq!(piece.range.start, at, "pieces leave no gap");
            assert!(piece.range.end > at, "pieces are not empty");
            at = piece.range.end;
            if matches!(piece.kind, vellum_core::PieceKind::Zero) {
                let overlap = model.data.iter().any(|(&start, data)| {
                    start < piece.range.end && start + data.len() as u64 > piece.range.start
                });
                assert!(!overlap, "data is mapped as zero in {:?}", piece.range);
            }
        }
    }
}

/// One round trip: written, opened by content, equal to the model, unchanged by opening, the same bytes again.
pub fn round_trip(format: &Arc<dyn Format>, recipe: &Recipe, model: &Model, exact_size: bool) {
    let files = MemoryFiles::new();
    write_image(format, &files, "disk.img", recipe, model).expect("writing the image");
    assert!(files.paths().iter().all(|path| !path.ends_with(".part")), "left over: {:?}", files.paths());
    let before: Vec<_> = files.paths().iter().map(|p| (p.clone(), digest(&files, p))).collect();
    let formats = formats_for(format);
    let disk = if format.name() == "raw" {
        let options = ChainOptions { format: Some("raw".into()), ..ChainOptions::default() };
        open_with(&formats, &files, "disk.img", &options)
    } else {
        open(&formats, &files, "disk.img")
    }
    .expect("opening the image");
    assert_eq!(disk.layers()[0].image.info().format, format.name());
    assert_same(&disk, model, exact_size);
    let after: Vec<_> = files.paths().iter().map(|p| (p.clone(), digest(&files, p))).collect();
    assert_eq!(before, after, "opening and reading changes nothing");

    let again = MemoryFiles::new();
    write_image(format, &again, "disk.img", recipe, model).expect("writing the image again");
    let repeated: Vec<_> = again.paths().iter().map(|p| (p.clone(), digest(&again, p))).collect();
    assert_eq!(before, repeated, "the same request and calls give the same bytes");
}

fn formats_for(format: &Arc<dyn Format>) -> Vec<Arc<dyn Format>> {
    vec![format.clone(), Arc::new(RawStandIn)]
}

/// A cheap fingerprint of a sparse file: its length and its pages that are not holes.
fn digest(files: &MemoryFiles, path: &str) -> (u64, u64) {
    let file = files.get(path).expect("the file is there");
    let len = file.len().expect("memory has a length");
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for (range, status) in file.status(0..len).wait().expect("memory tells holes") {
        if status == vellum_core::Status::Data {
            let mut at = range.start;
            while at < range.end {
                let step = (range.end - at).min(1 << 20);
                let (buf, result) = file.read_at(Buf::zeroed(step as usize), at).wait();
                result.expect("reading memory");
                for word in buf.chunks(8) {
                    let mut bytes = [0u8; 8];
                    bytes[..word.len()].copy_from_slice(word);
                    let word = u64::from_le_bytes(bytes);
                    if word != 0 {
                        hash = (hash ^ word ^ at).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
                    }
                }
                at += step;
            }
        }
    }
    (len, hash)
}

/// Round trips of random disks made by `recipe`.
pub fn random_round_trips(format: &Arc<dyn Format>, recipe: &Recipe, cases: u32, exact_size: bool) {
    let mut runner = TestRunner::new_with_rng(
        Config { cases, failure_persistence: None, ..Config::default() },
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let disks = (1u64..24 << 20, proptest::collection::vec((0u64..24 << 20, 1usize..300_000), 0..8));
    runner
        .run(&disks.prop_map(|(size, runs)| Model::with_runs(size.next_multiple_of(512), &runs)), |model| {
            round_trip(format, recipe, &model, exact_size);
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{} with {recipe:?}: {failure}", format.name()));
}

/// An empty disk of `size` bytes is made, opened and mapped with few calls and little memory.
pub fn empty_disk(format: &Arc<dyn Format>, recipe: &Recipe, size: u64) {
    let files = MemoryFiles::new();
    let model = Model { size, data: BTreeMap::new() };
    write_image(format, &files, "disk.img", recipe, &model).expect("writing the image");
    let format_name = Some(format.name().to_owned());
    let options = ChainOptions { format: format_name, ..ChainOptions::default() };
    let disk = open_with(&formats_for(format), &files, "disk.img", &options).expect("opening the image");
    let pieces = block_on(disk.pieces(0..size, 10)).expect("mapping the disk");
    assert_eq!(pieces.len(), 1, "one piece of zeros: {pieces:?}");
}

/// Stands for raw where a registry needs one, so that this crate depends on no format.
struct RawStandIn;

impl Format for RawStandIn {
    fn name(&self) -> &'static str {
        "raw"
    }
    fn description(&self) -> &'static str {
        "stands for raw in tests"
    }
    fn extensions(&self) -> &'static [&'static str] {
        &[]
    }
    fn probe(&self, _sample: &vellum_core::Sample<'_>) -> vellum_core::Confidence {
        vellum_core::Confidence::No
    }
    fn open(
        &self,
        request: vellum_core::OpenRequest,
    ) -> vellum_core::BoxFuture<'static, Result<Arc<dyn vellum_core::Image>>> {
        Box::pin(async move {
            let info = vellum_core::ImageInfo {
                format: "raw",
                name: request.location.0.clone(),
                virtual_size: request.storage.len()?,
                ..Default::default()
            };
            let image: Arc<dyn vellum_core::Image> = Arc::new(RawImage { info, storages: [request.storage] });
            Ok(image)
        })
    }
    fn create_options(&self) -> &'static [vellum_core::OptionSpec] {
        &[]
    }
    fn create(
        &self,
        _request: CreateRequest,
    ) -> vellum_core::BoxFuture<'static, Result<Box<dyn ImageWriter>>> {
        Box::pin(async {
            Err(vellum_core::Error::new(vellum_core::Code::Usage, "the stand-in creates nothing"))
        })
    }
}

struct RawImage {
    info: vellum_core::ImageInfo,
    storages: [Arc<dyn Storage>; 1],
}

impl vellum_core::Image for RawImage {
    fn info(&self) -> &vellum_core::ImageInfo {
        &self.info
    }
    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }
    fn map(&self, range: std::ops::Range<u64>) -> Result<vellum_core::Lookup> {
        let extent = vellum_core::Extent::Raw { storage: 0, offset: range.start };
        Ok(vellum_core::Lookup::Found { len: range.end - range.start, extent })
    }
    fn load(&self, _range: std::ops::Range<u64>) -> vellum_core::BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}
