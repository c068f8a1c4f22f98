//! The suite that every format passes that can be written in place: whatever is done to the disk, it reads as the
//! byte-array model says, at once and after reopening; a guest flush costs few file flushes and a write none.

use crate::counting::CountingFiles;
use crate::format::{Recipe, pattern};
use std::sync::Arc;
use vellum_core::{
    Buf, ChainOptions, CreateRequest, Disk, Format, FormatRegistry, Identity, Location, OpenFlags,
    OptionValues, Output, OutputMode, ParentLink, Property, Providers, Resolver, Result, Storage,
    WriteAccess, WriteFlags, ZeroMode, block_on,
};
use vellum_sim::MemoryFiles;

/// What is done to a disk. Offsets and lengths in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes patterned data that differs from write to write.
    Write(u64, usize),
    /// Writes a buffer of zeros.
    WriteZeros(u64, usize),
    /// Asks for zeros without sending them.
    Zero(u64, u64),
    /// Gives a range up.
    Discard(u64, u64),
    /// Flushes.
    Flush,
    /// Closes and opens again.
    Reopen,
}

/// A disk under test, beside the model of its content.
pub struct Bench {
    registry: FormatRegistry,
    files: Arc<MemoryFiles>,
    path: String,
    /// Format of the image; `None` where it must be recognised. (A raw image that is not named as one is not written.)
    format: Option<String>,
    flags: OpenFlags,
    counting: Arc<CountingFiles>,
    disk: Disk,
    /// The content as it should be.
    pub model: Vec<u8>,
    writes: u64,
}

impl Bench {
    /// A disk of `size` bytes at `path`; with a parent, the child of the image at that path, whose content is given.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        formats: Vec<Arc<dyn Format>>,
        format: &Arc<dyn Format>,
        files: &Arc<MemoryFiles>,
        path: &str,
        recipe: &Recipe,
        size: u64,
        parent: Option<(&str, &[u8])>,
        flags: OpenFlags,
    ) -> Result<Self> {
        let registry = FormatRegistry::new(formats);
        let mut model = vec![0u8; size as usize];
        let link = match parent {
            None => None,
            Some((parent, content)) => {
                let len = content.len().min(model.len());
                model[..len].copy_from_slice(&content[..len]);
                Some(link(&registry, files, parent)?)
            }
        };
        create(format, files, path, recipe, size, link)?;
        let counting = Arc::new(CountingFiles::new(files.clone()));
        let format = Some(format.name().to_owned());
        let disk = open(&registry, &counting, path, &format, flags)?;
        let path = path.to_owned();
        Ok(Bench { registry, files: files.clone(), path, format, flags, counting, disk, model, writes: 0 })
    }

    /// The disk of the image at `path` of `files`, which somebody made, and whose content is `model`.
    pub fn existing(
        formats: Vec<Arc<dyn Format>>,
        files: &Arc<MemoryFiles>,
        path: &str,
        model: Vec<u8>,
        flags: OpenFlags,
    ) -> Result<Self> {
        let registry = FormatRegistry::new(formats);
        let counting = Arc::new(CountingFiles::new(files.clone()));
        let disk = open(&registry, &counting, path, &None, flags)?;
        let (path, format) = (path.to_owned(), None);
        Ok(Bench { registry, files: files.clone(), path, format, flags, counting, disk, model, writes: 0 })
    }

    /// The open disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Does `op` to the disk and to the model.
    ///
    /// # Panics
    /// If the disk refuses.
    pub fn apply(&mut self, op: &Op) {
        let clip = |offset: u64, len: u64| {
            let start = offset.min(self.model.len() as u64);
            start as usize..(start + len).min(self.model.len() as u64) as usize
        };
        match *op {
            Op::Write(offset, len) => {
                let range = clip(offset, len as u64);
                self.writes += 1;
                let data = pattern(offset + self.writes * 7_777_777, range.len());
                self.write(range, &data);
            }
            Op::WriteZeros(offset, len) => {
                let range = clip(offset, len as u64);
                let zeros = vec![0u8; range.len()];
                self.write(range, &zeros);
            }
            Op::Zero(offset, len) => {
                let range = clip(offset, len);
                let guest = range.start as u64..range.end as u64;
                self.disk.write_zeroes(guest, ZeroMode::MayUnmap).wait().unwrap();
                self.model[range].fill(0);
            }
            Op::Discard(offset, len) => {
                let range = clip(offset, len);
                let guest = range.start as u64..range.end as u64;
                self.disk.discard_range(guest).wait().unwrap();
                self.adopt(range);
            }
            Op::Flush => self.flush(),
            Op::Reopen => self.reopen(),
        }
    }

    fn write(&mut self, range: std::ops::Range<usize>, data: &[u8]) {
        let flushes = self.counting.flushes();
        let first = self.counting.writes().is_empty();
        let (_, result) =
            self.disk.write(Buf::copy_of(data), range.start as u64, WriteFlags::default()).wait();
        result.unwrap();
        if !first {
            let more = self.counting.flushes() - flushes;
            assert!(more <= 4, "a write cost {more} file flushes");
        }
        self.model[range].copy_from_slice(data);
    }

    /// After a discard every sector is as before or zeros; which, is the disk's choice, and stays.
    fn adopt(&mut self, range: std::ops::Range<usize>) {
        let (buf, result) = self.disk.read_at(Buf::zeroed(range.len()), range.start as u64).wait();
        result.unwrap();
        for (new, old) in buf.chunks(512).zip(self.model[range].chunks_mut(512)) {
            assert!(new == old || new.iter().all(|b| *b == 0), "a discard made foreign data appear");
            old.copy_from_slice(new);
        }
    }

    /// Flushes; returns what that cost.
    pub fn flush(&mut self) {
        self.disk.flush_all().wait().unwrap();
    }

    /// File flushes of the top image so far.
    pub fn flushes(&self) -> u64 {
        self.counting.flushes()
    }

    /// Closes the disk and opens it again for writing. What it told of its identity is what stands in the file.
    pub fn reopen(&mut self) {
        let told = marks(&self.disk);
        self.disk.close().wait().unwrap();
        self.disk = open(&self.registry, &self.counting, &self.path, &self.format, self.flags).unwrap();
        assert_eq!(marks(&self.disk), told, "identities in the file, and those that were told");
    }

    /// Compares the whole disk with the model, as it is and as a second opening for reading sees it after a close.
    pub fn verify(&self) {
        self.compare(&self.disk, "the open disk");
    }

    /// Closes, and compares what is in the file with the model.
    pub fn close_and_verify(self) -> Arc<MemoryFiles> {
        self.verify();
        let told = marks(&self.disk);
        self.disk.close().wait().unwrap();
        let resolver: Arc<dyn Resolver> = self.files.clone();
        let options = options(&self.format, OpenFlags::default(), false);
        let (disk, _) = block_on(self.registry.open_chain(&resolver, &self.path, &options)).unwrap();
        assert_eq!(marks(&disk), told, "identities in the file, and those that were told");
        self.compare(&disk, "the closed image");
        self.files
    }

    fn compare(&self, disk: &Disk, what: &str) {
        let (buf, result) = disk.read_at(Buf::zeroed(self.model.len()), 0).wait();
        result.unwrap();
        if buf[..] != self.model[..] {
            let at = buf.iter().zip(&self.model).position(|(a, b)| a != b).unwrap();
            panic!(
                "{what} differs from the model at {at:#x}: {:#04x} instead of {:#04x}",
                buf[at], self.model[at]
            );
        }
    }
}

/// `count` random operations on a disk of `size` bytes whose block is `block`: aligned and not, inside blocks and across.
pub fn random_ops(seed: u64, count: usize, size: u64, block: u64) -> Vec<Op> {
    let random = Providers::seeded(u128::from(seed) << 64 | 0x5eed, 0);
    let below = |limit: u64| random.random_u64() % limit.max(1);
    (0..count)
        .map(|_| {
            let unit = [512, block.max(512), 4096][below(3) as usize];
            let offset = below(size) / unit * unit;
            let len = match below(4) {
                0 => 512,
                1 => block.max(512),
                2 => (1 + below(3 * block.max(512) / 512)) * 512,
                _ => (1 + below(16)) * 512,
            };
            match below(20) {
                0..=8 => Op::Write(offset, len as usize),
                9..=10 => Op::WriteZeros(offset, len as usize),
                11..=12 => Op::Zero(offset, len),
                13..=15 => Op::Discard(offset, len),
                16..=18 => Op::Flush,
                _ => Op::Reopen,
            }
        })
        .collect()
}

/// Makes an empty image.
pub fn create(
    format: &Arc<dyn Format>,
    files: &Arc<MemoryFiles>,
    path: &str,
    recipe: &Recipe,
    size: u64,
    parent: Option<ParentLink>,
) -> Result<()> {
    let resolver: Arc<dyn Resolver> = files.clone();
    let output = Output::new(resolver, Location(path.to_owned()), OutputMode::Fresh);
    let given = recipe.options.iter().map(|(n, v)| ((*n).to_owned(), v.clone()));
    let request = CreateRequest {
        output: output.clone(),
        virtual_size: size,
        options: OptionValues::check(format.name(), format.create_options(), given)?,
        traits: recipe.traits.clone(),
        compress: false,
        level: None,
        providers: Providers::seeded(43, 1_700_000_000),
        parent,
    };
    block_on(async {
        format.create(request).await?.finish().await?;
        output.put_in_place().await
    })
}

/// How a child names the image at `path`.
pub fn link(registry: &FormatRegistry, files: &Arc<MemoryFiles>, path: &str) -> Result<ParentLink> {
    let resolver: Arc<dyn Resolver> = files.clone();
    let image = block_on(registry.open_alone(&resolver, path, &ChainOptions::default()))?;
    let info = image.layer.image.info();
    Ok(ParentLink {
        place: path.rsplit('/').next().unwrap_or(path).to_owned(),
        absolute: path.to_owned(),
        format: info.format,
        virtual_size: info.virtual_size,
        identity: Identity { ..info.identity },
        modified_unix: Some(1_700_000_000),
    })
}

/// By what children recognise the top image of a disk, and its properties of the same meaning.
fn marks(disk: &Disk) -> (Identity, Vec<Property>) {
    const NAMES: [&str; 5] = ["uuidModify", "timestamp", "CID", "ddb.longContentID", "ddb.uuid.modification"];
    let info = disk.layers()[0].image.info();
    let properties = info.properties.iter().filter(|property| NAMES.contains(&property.name));
    (info.identity, properties.cloned().collect())
}

fn options(format: &Option<String>, flags: OpenFlags, write: bool) -> ChainOptions {
    let mut options = ChainOptions {
        format: format.clone(),
        write: if write { WriteAccess::Yes } else { WriteAccess::No },
        providers: Some(Providers::seeded(44, 1_700_000_100)),
        ..ChainOptions::default()
    };
    options.disk.flags = flags;
    options
}

fn open(
    registry: &FormatRegistry,
    counting: &Arc<CountingFiles>,
    path: &str,
    format: &Option<String>,
    flags: OpenFlags,
) -> Result<Disk> {
    let resolver: Arc<dyn Resolver> = counting.clone();
    let (disk, _) = block_on(registry.open_chain(&resolver, path, &options(format, flags, true)))?;
    Ok(disk)
}
