//! `convert`: a disk, whatever its chain, into a new image of any format and variant.
//!
//! The result is written beside its final name and renamed into place when it is durable. A conversion that lasts
//! longer than a second keeps a job file (`journal.rs`) from which it can be resumed: the writer's placements are a
//! function of the blocks placed so far, so repeating them restores its state.

use crate::journal::{self, Journal, Progressed};
use crate::pipeline::{Pipeline, Placed, Plan};
use crate::scan::{Scan, chunk_bytes};
use crate::seed::Seed;
use crate::stamp::SourceStamp;
use crate::{CompareRequest, Progress, Vellum, target};
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vellum_core::storage::read_vec;
use vellum_core::{
    Buf, ChainOptions, Code, CopyMode, CreateRequest, Disk, DiskTraits, Error, Format, ImageWriter, Location,
    Offloaded, OpenedImage, OptionValues, Output, OutputMode, Payload, Piece, PieceKind, Place, Preallocate,
    Result, Storage, block_on, write_all,
};

/// What to convert into what.
#[derive(Clone)]
pub struct ConvertRequest {
    /// The top image of the source.
    pub source: String,
    /// How the source is opened.
    pub source_options: ChainOptions,
    /// Where the new image goes.
    pub target: String,
    /// Its format.
    pub target_format: String,
    /// Options of the target's driver: name and value.
    pub options: Vec<(String, String)>,
    /// Compress, if the variant can.
    pub compress: bool,
    /// Compression level, on the codec's own scale.
    pub level: Option<i32>,
    /// Threads; `None` is one for each processor.
    pub threads: Option<usize>,
    /// Runs of zeros of at least this many bytes become holes; 0 keeps all data of the source as it is.
    /// `None` is 4096, and lets the host share whole blocks without looking at them.
    pub sparse_bytes: Option<u64>,
    /// Read the result back and compare it with the source.
    pub verify: bool,
    /// Continue a conversion that was interrupted.
    pub resume: bool,
    /// The same input and options give the same bytes: no random identities, no clock.
    pub reproducible: bool,
    /// Replace an existing target.
    pub force: bool,
}

impl ConvertRequest {
    /// A conversion with defaults.
    pub fn new(source: &str, target: &str, target_format: &str) -> Self {
        ConvertRequest {
            source: source.to_owned(),
            source_options: ChainOptions::default(),
            target: target.to_owned(),
            target_format: target_format.to_owned(),
            options: Vec::new(),
            compress: false,
            level: None,
            threads: None,
            sparse_bytes: None,
            verify: false,
            resume: false,
            reproducible: false,
            force: false,
        }
    }
}

/// What a conversion did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvertReport {
    /// Name of the source's format.
    pub source_format: &'static str,
    /// The source was read as raw because no format claims it.
    pub raw_by_default: bool,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Bytes of the source that were read or shared.
    pub data_bytes: u64,
    /// Guest position from which an interrupted conversion was continued.
    pub resumed_at: Option<u64>,
    /// The result was read back and is the same.
    pub verified: bool,
    /// Images of the source that keep more than the disk, and what of it (snapshots, bitmaps) the new image does not have.
    pub left_behind: Vec<(String, String)>,
}

/// A job file is begun, and brought up to date, this often.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(1);

/// Blocks before the point of resumption that are compared with the source.
const REPLAY_CHECKED_BLOCKS: usize = 16;

impl Vellum {
    /// Converts a disk. On an error, or when `progress` says stop, nothing that looks finished is left.
    pub fn convert(&self, request: &ConvertRequest, progress: &dyn Progress) -> Result<ConvertReport> {
        let (disk, images) = self.open(&request.source, &request.source_options)?;
        let format = self.formats.by_name(&request.target_format)?;
        let at = Location(request.target.clone());
        let mode = target::mode(self.resolver.as_ref(), &at, request.force, &images)?;
        let options =
            OptionValues::check(format.name(), format.create_options(), request.options.iter().cloned())?;
        let left_behind = left_behind(&images, request.source_options.snapshot.is_some());
        for (image, what) in &left_behind {
            let message = format!("{image}: only the disk is copied; left behind: {what}");
            request.source_options.events.warn(&message);
        }
        let job = Job { vellum: self, request, disk, images, format, options, mode };
        Ok(ConvertReport { left_behind, ..job.run(progress)? })
    }
}

/// Whoever asks for one snapshot of the top image knows that it is all that is copied.
fn left_behind(images: &[OpenedImage], is_of_a_snapshot: bool) -> Vec<(String, String)> {
    let left = images.iter().skip(usize::from(is_of_a_snapshot)).map(|image| &image.layer);
    left.filter(|layer| !layer.image.info().besides.is_empty())
        .map(|layer| (layer.location.0.clone(), layer.image.info().besides.join(", ")))
        .collect()
}

/// One conversion.
struct Job<'a> {
    vellum: &'a Vellum,
    request: &'a ConvertRequest,
    disk: Disk,
    images: Vec<OpenedImage>,
    format: Arc<dyn Format>,
    options: OptionValues,
    mode: OutputMode,
}

impl Job<'_> {
    fn run(&self, progress: &dyn Progress) -> Result<ConvertReport> {
        let target = Location(self.request.target.clone());
        let job_location = journal::location(self.vellum.resolver.as_ref(), &target);
        // Before it is opened for writing, which keeps other readers out.
        target::check_not_source(self.vellum.resolver.as_ref(), &job_location, &self.images)?;
        let resumed = self.find_resumable(&job_location)?;
        let stamp = SourceStamp::take(&self.images);
        let providers = self.providers(resumed.as_ref().map(|(_, p)| p.begin.as_str()))?;
        let begin = self.begin_text(&providers, &stamp)?;
        let mode = match &resumed {
            Some((_, progressed)) => {
                check_same_job(&job_location, &progressed.begin, &begin)?;
                OutputMode::Resume
            }
            None => self.mode.clone(),
        };
        if resumed.is_none() && self.mode != OutputMode::Device {
            // An old job file would claim progress of another `.part` than the one that is made now.
            journal::forget(self.vellum.resolver.as_ref(), &job_location)?;
        }
        let output = Output::new(self.vellum.resolver.clone(), target, mode);
        output.protect(target::storage_ids(&self.images));
        let (journal, progressed) = match resumed {
            Some((journal, progressed)) => (Some(journal), Some(progressed)),
            None => (None, None),
        };
        let keeper = Keeper {
            location: job_location.clone(),
            begin: Mutex::new(begin),
            journal: Mutex::new(journal),
            resolver: self.vellum.resolver.clone(),
            possible: self.mode != OutputMode::Device,
        };
        let result = self.write(&output, &providers, &keeper, progressed.as_ref(), progress);
        let report = match result.and_then(|report| stamp.check(&self.images).map(|()| report)) {
            Ok(report) => report,
            Err(error) => return Err(self.give_up(error, &output, &keeper)),
        };
        self.check_siblings(&output).map_err(|error| self.give_up(error, &output, &keeper))?;
        block_on(output.put_in_place()).map_err(|error| self.give_up(error, &output, &keeper))?;
        keeper.delete();
        // Its files are locked against readers until it is gone.
        drop(output);
        if self.request.verify { self.verify(report, progress) } else { Ok(report) }
    }

    fn check_siblings(&self, output: &Output) -> Result<()> {
        target::check_siblings(self.vellum.resolver.as_ref(), output, self.request.force, &self.images)
    }

    fn find_resumable(&self, job: &Location) -> Result<Option<(Journal, Progressed)>> {
        if !self.request.resume || self.mode == OutputMode::Device {
            return Ok(None);
        }
        // A job file whose work is gone (a crash after it was put in place, or a deleted .part) has nothing to go on with.
        let part = Location(format!("{}.part", self.request.target));
        if !block_on(self.vellum.resolver.exists(&part))? {
            return Ok(None);
        }
        block_on(Journal::resume(self.vellum.resolver.as_ref(), job))
    }

    /// Time and randomness of the new image: fixed if it must be reproducible, the old ones if resumed.
    fn providers(&self, resumed_begin: Option<&str>) -> Result<Seed> {
        if let Some(begin) = resumed_begin {
            let seed = begin_value(begin, "seed").and_then(|v| u128::from_str_radix(v, 16).ok());
            let unix_time = begin_value(begin, "time").and_then(|v| v.parse().ok());
            return match (seed, unix_time) {
                (Some(seed), Some(unix_time)) => Ok(Seed { seed, unix_time }),
                _ => Err(Error::new(Code::JournalMismatch, "the job file holds no seed")),
            };
        }
        if self.request.reproducible {
            let beginning = self.beginning()?;
            return Ok(Seed::reproducible(self.format.name(), self.disk.size(), &self.options, &beginning));
        }
        Seed::random()
    }

    /// The first mebibyte: partition tables and their identifiers tell disks of the same size apart.
    fn beginning(&self) -> Result<Buf> {
        let len = self.disk.size().min(1 << 20);
        let (buf, result) = block_on(self.disk.read(Buf::zeroed(len as usize), 0));
        result.map(|()| buf)
    }

    /// What identifies the job: a resumed one must be asked for with the same words over the same source.
    fn begin_text(&self, seed: &Seed, stamp: &SourceStamp) -> Result<String> {
        use std::fmt::Write;
        let mut text = String::new();
        let _ = writeln!(text, "operation=convert");
        let _ = writeln!(text, "target={}", self.request.target.escape_debug());
        let _ = writeln!(text, "format={}", self.format.name());
        for (name, value) in self.options.list() {
            let _ = writeln!(text, "option {name}={}", value.escape_debug());
        }
        let _ = writeln!(text, "compress={} level={:?}", self.request.compress, self.request.level);
        // Both decide what is placed, and a resumed job writes over what the interrupted one placed.
        let _ = writeln!(text, "sparse={:?}", self.request.sparse_bytes);
        let _ = writeln!(text, "writer={} {}", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
        let _ = writeln!(text, "size={}", self.disk.size());
        for (image, stamp) in self.images.iter().zip(&stamp.0) {
            let location = image.layer.location.0.escape_debug();
            let _ = writeln!(text, "source={location} format={} {stamp:?}", image.format.name());
        }
        let _ = writeln!(text, "seed={:x}\ntime={}", seed.seed, seed.unix_time);
        Ok(text)
    }

    fn write(
        &self,
        output: &Output,
        seed: &Seed,
        keeper: &Keeper,
        progressed: Option<&Progressed>,
        progress: &dyn Progress,
    ) -> Result<ConvertReport> {
        let request = CreateRequest {
            output: output.clone(),
            virtual_size: self.disk.size(),
            options: self.options.clone(),
            traits: self.traits(),
            compress: self.request.compress,
            level: self.request.level,
            providers: seed.providers(),
            parent: None,
        };
        if self.mode == OutputMode::Device {
            target::wipe(self.vellum.resolver.as_ref(), output.location())?;
        }
        let mut writer = block_on(self.format.create(request))?;
        self.check_siblings(output)?;
        let start = progressed.map_or(0, |p| p.position);
        if let Some(progressed) = progressed {
            replay(&self.disk, writer.as_mut(), progressed)?;
        }
        let decided = progressed.and_then(|p| begin_value(&p.begin, "share"));
        let share = decided.map_or_else(|| self.shares(writer.as_ref()), |share| share == "true");
        keeper.begin.lock().push_str(&format!("share={share}\n"));
        let layers = self.disk.layers().iter().map(|layer| layer.image.info().block_size);
        let encoded_block = writer.shape().codec.as_ref().map(|_| writer.shape().block_size);
        // Blocks of uncompressed sources need no whole chunk; compressed ones are at most 2 MiB in practice.
        let chunk = chunk_bytes(layers.map(|block| block.min(2 << 20)).chain(encoded_block));
        let pipeline = Pipeline::new(Plan {
            disk: self.disk.clone(),
            scan: Scan::new(self.disk.clone(), chunk, start),
            writer,
            sparse_bytes: self.request.sparse_bytes.unwrap_or(4096),
            share,
            threads: self.threads(),
            progress,
            keep_log: keeper.possible,
        });
        progress.begin("converting", self.disk.size());
        keeper.run(&pipeline, output)?;
        let data_bytes = pipeline.moved();
        block_on(pipeline.into_writer().finish())?;
        progress.advance(self.disk.size(), data_bytes);
        let source = self.images.first();
        Ok(ConvertReport {
            source_format: source.map_or("", |image| image.format.name()),
            raw_by_default: source.is_some_and(|image| image.raw_by_default),
            virtual_size: self.disk.size(),
            data_bytes,
            resumed_at: progressed.map(|p| p.position),
            verified: false,
            left_behind: Vec::new(),
        })
    }

    /// What the source keeps besides its content and the target can keep too.
    fn traits(&self) -> DiskTraits {
        let Some(top) = self.images.first() else { return DiskTraits::default() };
        let info = top.layer.image.info();
        DiskTraits { comment: info.comment.clone(), pchs: info.pchs, lchs: info.lchs, uuid: None }
    }

    /// Whether blocks are placed without a look at what is in them, for the host to share.
    ///
    /// Decided once, by a trial, and kept in the job file: what is placed must not depend on when the host says that it
    /// cannot share. Above all a resumed job must place as the interrupted one did, because it writes over what that
    /// one left.
    fn shares(&self, writer: &dyn ImageWriter) -> bool {
        match self.request.sparse_bytes {
            Some(bytes) => bytes == 0,
            None if self.request.reproducible => false,
            None => can_share(&self.disk, writer.storages()),
        }
    }

    fn threads(&self) -> usize {
        let processors = || std::thread::available_parallelism().map_or(1, usize::from).min(16);
        self.request.threads.unwrap_or_else(processors).clamp(1, 256)
    }

    /// Leaves what can be resumed, deletes what cannot, and says which in the error.
    fn give_up(&self, error: Error, output: &Output, keeper: &Keeper) -> Error {
        if keeper.is_begun() {
            return error.hint("what is done so far is kept: repeat the command with --resume to go on");
        }
        block_on(output.discard());
        error
    }

    fn verify(&self, report: ConvertReport, progress: &dyn Progress) -> Result<ConvertReport> {
        let compare = CompareRequest { strict: false, threads: self.request.threads, phase: "verifying" };
        let options = ChainOptions { format: Some(self.format.name().to_owned()), ..ChainOptions::default() };
        let (target, _) = self.vellum.open(&self.request.target, &options)?;
        let compared = self.vellum.compare(&self.disk, &target, &compare, progress)?;
        if let Some(first) = compared.first_difference {
            let target = Location(self.request.target.clone());
            let set_aside = Location(format!("{}.part", target.0));
            block_on(self.vellum.resolver.rename(&target, &set_aside))?;
            return Err(Error::new(Code::Mismatch, "the result differs from the source")
                .image(&self.request.target)
                .at(first)
                .hint(format!("it was set aside as {set_aside}; suspect memory or disk of this machine")));
        }
        Ok(ConvertReport { verified: true, ..report })
    }
}

/// Whether the host shares blocks of all of the disk's files with a new image.
fn can_share(disk: &Disk, targets: &[Arc<dyn Storage>]) -> bool {
    // All files of a new image stand in one directory.
    let Some(target) = targets.first() else { return false };
    let unit = u64::from(target.limits().granularity.max(1));
    let sources = disk.layers().iter().flat_map(|layer| layer.image.storages());
    first_data_is_aligned(disk, unit).unwrap_or(false)
        && sources.into_iter().all(|source| try_share(source.as_ref(), target.as_ref()).unwrap_or(false))
}

/// Whether the first data of the disk stands in its file as it stands on the disk, to a multiple of `unit`; the rest
/// stands as the first does. Looks no farther than a disk's beginning: the map of an empty one is not read twice.
fn first_data_is_aligned(disk: &Disk, unit: u64) -> Result<bool> {
    let pieces = block_on(disk.pieces(0..disk.size().min(1 << 30), 64))?;
    let first = pieces.iter().find(|piece| !matches!(piece.kind, PieceKind::Zero));
    Ok(match first {
        Some(Piece { range, kind: PieceKind::Raw { offset, .. } }) => offset % unit == range.start % unit,
        _ => true,
    })
}

/// Shares one block beyond the end of `target`, and takes it back.
fn try_share(source: &dyn Storage, target: &dyn Storage) -> Result<bool> {
    let unit = u64::from(target.limits().granularity.max(1));
    let end = target.len()?;
    let Some(at) = end.checked_next_multiple_of(unit) else { return Ok(false) };
    if !target.limits().resizable || source.len()? < unit {
        return Ok(false);
    }
    let outcome = block_on(target.copy_from(source, 0, at, unit, CopyMode::ShareOnly));
    block_on(target.set_len(end, Preallocate::Off))?;
    Ok(outcome? == Offloaded::Done)
}

/// Repeats the placements of an interrupted job: the writer is then where it was. Then looks whether the last blocks
/// of the target are what the source says, as the job file claims.
fn replay(disk: &Disk, writer: &mut dyn ImageWriter, progressed: &Progressed) -> Result<()> {
    let mut writes = Vec::new();
    let unchecked = progressed.placed.len().saturating_sub(REPLAY_CHECKED_BLOCKS);
    let mut last = Vec::new();
    for (index, placed) in progressed.placed.iter().enumerate() {
        let place = writer.place(placed.block, placed.payload, &mut writes)?;
        if index >= unchecked {
            last.push((*placed, place));
        }
        if writes.len() > 256 {
            block_on(write_all(writer.storages(), std::mem::take(&mut writes)))?;
        }
    }
    block_on(write_all(writer.storages(), writes))?;
    for (placed, place) in last {
        if !is_there(disk, writer, progressed.position, placed, place).unwrap_or(false) {
            return Err(Error::new(
                Code::JournalMismatch,
                "the unfinished target is not what the job file says",
            )
            .found(format!("other data for guest bytes at {:#x}", placed.block * writer.shape().block_size))
            .hint("start over without --resume"));
        }
    }
    Ok(())
}

/// Whether the target holds at `place` what the source holds in that block, as far as it lies below `position`.
fn is_there(
    disk: &Disk,
    writer: &dyn ImageWriter,
    position: u64,
    placed: Placed,
    place: Place,
) -> Result<bool> {
    let shape = writer.shape();
    let start = placed.block * shape.block_size;
    let len = disk.size().min(position).saturating_sub(start).min(shape.block_size) as usize;
    let (source, result) = block_on(disk.read(Buf::zeroed(len), start));
    result?;
    let Some(storage) = writer.storages().get(place.storage) else { return Ok(false) };
    let mut target = vec![0u8; shape.block_size as usize];
    match (placed.payload, &shape.codec) {
        (Payload::Encoded { len }, Some(codec)) => {
            let encoded = block_on(read_vec(storage.as_ref(), place.offset, len))?;
            codec.decode(&encoded, &mut target)?;
        }
        _ => {
            // A block whose end is zero need not be there whole yet.
            let have = storage.len()?.saturating_sub(place.offset).min(len as u64) as usize;
            let data = block_on(read_vec(storage.as_ref(), place.offset, have))?;
            target[..have].copy_from_slice(&data);
        }
    }
    Ok(target[..len] == *source)
}

/// The value of a line `name=value` of a job's beginning.
fn begin_value<'a>(begin: &'a str, name: &str) -> Option<&'a str> {
    begin.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

fn check_same_job(location: &Location, old: &str, new: &str) -> Result<()> {
    // Found out while the job ran, not asked for.
    let old: Vec<&str> = old.lines().filter(|line| !line.starts_with("share=")).collect();
    let differs = old.iter().zip(new.lines()).find(|(a, b)| *a != b);
    let (found, allowed) = match differs {
        Some((old, new)) => ((*old).to_owned(), new.to_owned()),
        None if old.len() == new.lines().count() => return Ok(()),
        None => ("another number of options or sources".to_owned(), String::new()),
    };
    Err(Error::new(Code::JournalMismatch, "the interrupted conversion was another one")
        .image(location)
        .found(found)
        .allowed(allowed)
        .hint("start over without --resume, or repeat the command exactly as it was"))
}

/// Keeps the job file while the pipeline runs.
struct Keeper {
    location: Location,
    begin: Mutex<String>,
    journal: Mutex<Option<Journal>>,
    resolver: Arc<dyn vellum_core::Resolver>,
    possible: bool,
}

impl Keeper {
    fn run(&self, pipeline: &Pipeline<'_>, output: &Output) -> Result<()> {
        if !self.possible {
            return pipeline.run();
        }
        let ended = (Mutex::new(false), Condvar::new());
        let (result, kept) = std::thread::scope(|scope| {
            let keeping = scope.spawn(|| self.keep(pipeline, output, &ended));
            let result = pipeline.run();
            *ended.0.lock() = true;
            ended.1.notify_all();
            let kept = keeping.join();
            (result, kept)
        });
        let kept =
            kept.unwrap_or_else(|_| Err(Error::new(Code::Lost, "the thread of the job file ended early")));
        if result.is_err() {
            // The last second's work is kept too.
            let _ = if self.is_begun() { self.checkpoint(pipeline, output) } else { Ok(()) };
        }
        result.and(kept)
    }

    fn keep(&self, pipeline: &Pipeline<'_>, output: &Output, ended: &(Mutex<bool>, Condvar)) -> Result<()> {
        let mut next = Instant::now() + CHECKPOINT_INTERVAL;
        let mut over = ended.0.lock();
        while !*over {
            if !ended.1.wait_until(&mut over, next).timed_out() {
                continue;
            }
            drop(over);
            self.checkpoint(pipeline, output)?;
            next = Instant::now() + CHECKPOINT_INTERVAL;
            over = ended.0.lock();
        }
        Ok(())
    }

    /// Flushes what is written and then records it.
    fn checkpoint(&self, pipeline: &Pipeline<'_>, output: &Output) -> Result<()> {
        let Some(checkpoint) = pipeline.checkpoint() else { return Ok(()) };
        let mut journal = self.journal.lock();
        block_on(async {
            if journal.is_none() {
                let begin = self.begin.lock().clone();
                *journal = Some(Journal::begin(self.resolver.as_ref(), &self.location, &begin).await?);
            }
            for storage in output.storages() {
                storage.flush().await?;
            }
            match journal.as_mut() {
                Some(journal) => journal.done(checkpoint.position, &checkpoint.placed).await,
                None => Ok(()),
            }
        })
        .map_err(|error| error.context("keeping the job file"))
    }

    fn is_begun(&self) -> bool {
        self.journal.lock().is_some()
    }

    fn delete(&self) {
        if self.journal.lock().take().is_some() {
            // A job file that cannot be deleted does no harm: its target is complete.
            let _ = block_on(self.resolver.delete(&self.location));
        }
    }
}
