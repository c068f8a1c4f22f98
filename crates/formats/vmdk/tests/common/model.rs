//! A disk that is written at random, beside a model in memory.

use super::*;
use std::ops::Range;
use vellum_conformance::format::pattern as patterned;
use vellum_core::{
    ChainOptions, CheckReport, CheckRequest, CreateRequest, DiskOptions, DiskTraits, FormatRegistry,
    Location, OpenFlags, OptionValues, Output, OutputMode, ParentLink, Providers, Resolver, WriteAccess,
    WriteFlags, ZeroMode, block_on,
};

/// A small generator of random numbers (xorshift).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

/// Options for writing.
pub fn writing(seed: u128, flags: OpenFlags) -> ChainOptions {
    ChainOptions {
        write: WriteAccess::Yes,
        probe_parents: true,
        providers: Some(Providers::seeded(seed, 1_700_000_000)),
        disk: DiskOptions { flags, ..DiskOptions::default() },
        events: Events::new(|_| {}),
        ..ChainOptions::default()
    }
}

pub fn formats() -> Vec<Arc<dyn Format>> {
    vec![vmdk(), Arc::new(RawDisk)]
}

/// Opens for writing.
pub fn open_rw(files: &Arc<MemoryFiles>, path: &str, seed: u128) -> Result<Disk, Error> {
    let flags = OpenFlags { discard: true, ..OpenFlags::default() };
    open_with(&formats(), files, path, &writing(seed, flags))
}

pub fn write(disk: &Disk, offset: u64, bytes: &[u8]) -> Result<(), Error> {
    disk.write(Buf::copy_of(bytes), offset, WriteFlags::default()).wait().1
}

/// Makes an empty disk.
pub fn create(files: &Arc<MemoryFiles>, path: &str, size: u64, options: &[(&'static str, &str)]) {
    create_child(files, path, size, options, None).unwrap();
}

/// Makes an empty disk over a parent: its path and its image's info are looked up.
pub fn create_child(
    files: &Arc<MemoryFiles>,
    path: &str,
    size: u64,
    options: &[(&'static str, &str)],
    parent: Option<&str>,
) -> Result<(), Error> {
    let resolver: Arc<dyn Resolver> = files.clone();
    let parent = parent.map(|parent| {
        let registry = FormatRegistry::new(formats());
        let found = block_on(registry.open_alone(&resolver, parent, &ChainOptions::default())).unwrap();
        let info = found.layer.image.info();
        ParentLink {
            place: parent.to_owned(),
            absolute: format!("/{parent}"),
            format: info.format,
            virtual_size: info.virtual_size,
            identity: info.identity,
            modified_unix: None,
        }
    });
    let output = Output::new(resolver, Location(path.to_owned()), OutputMode::Fresh);
    let given = options.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
    let request = CreateRequest {
        output: output.clone(),
        virtual_size: size,
        options: OptionValues::check("vmdk", vmdk().create_options(), given).unwrap(),
        traits: DiskTraits::default(),
        compress: false,
        level: None,
        providers: Providers::seeded(path.len() as u128 * 77 + size as u128, 1_700_000_000),
        parent,
    };
    block_on(async {
        vmdk().create(request).await?.finish().await?;
        output.put_in_place().await
    })
}

/// The report of a check.
pub fn check(files: &Arc<MemoryFiles>, path: &str, plan: bool) -> CheckReport {
    let request = CheckRequest {
        storage: files.get(path).unwrap(),
        location: path.into(),
        resolver: files.clone(),
        limits: Default::default(),
        events: Events::new(|_| {}),
        plan,
    };
    block_on(vmdk().check(request)).unwrap()
}

pub fn findings(report: &CheckReport) -> Vec<String> {
    report.findings.iter().map(|f| format!("{:?} {:?} {}", f.severity, f.code, f.message)).collect()
}

/// Random operations on a disk and on a model, side by side.
pub struct Worker {
    pub random: Random,
    pub model: Vec<u8>,
    /// Ranges that are never written with data.
    pub zero_only: Vec<Range<u64>>,
    count: u64,
}

impl Worker {
    pub fn new(seed: u64, model: Vec<u8>) -> Self {
        Worker {
            random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            model,
            zero_only: Vec::new(),
            count: 0,
        }
    }

    fn range(&mut self, max: u64) -> Range<u64> {
        let size = self.model.len() as u64;
        let len = match self.random.below(4) {
            0 => 1 + self.random.below(600),
            1 => 512 * (1 + self.random.below(64)),
            _ => 1 + self.random.below(max),
        }
        .min(size);
        let mut start = self.random.below(size - len + 1);
        if self.random.below(2) == 0 {
            start = start / 4096 * 4096;
        }
        start..start + len
    }

    /// One operation.
    pub fn step(&mut self, disk: &Disk) {
        match self.random.below(10) {
            0..6 => {
                let range = self.range(200_000);
                let mut bytes =
                    patterned(self.count * 4096 + range.start, (range.end - range.start) as usize);
                if self.random.below(6) == 0 {
                    bytes.fill(0);
                }
                self.count += 1;
                for part in &self.zero_only {
                    let (from, to) = (range.start.max(part.start), range.end.min(part.end));
                    if from < to {
                        bytes[(from - range.start) as usize..(to - range.start) as usize].fill(0);
                    }
                }
                write(disk, range.start, &bytes).unwrap();
                self.model[range.start as usize..range.end as usize].copy_from_slice(&bytes);
            }
            6 => {
                let range = self.range(500_000);
                let mode =
                    if self.random.below(2) == 0 { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
                disk.write_zeroes(range.clone(), mode).wait().unwrap();
                self.model[range.start as usize..range.end as usize].fill(0);
            }
            7 => {
                let range = self.range(500_000);
                disk.discard_range(range.clone()).wait().unwrap();
                // Zeros or as before: what the disk says now is what it must stay.
                let (mut at, end) = (range.start, range.end);
                while at < end {
                    let len = 4096.min(end - at) as usize;
                    let now = read(disk, at, len).unwrap();
                    let old = &mut self.model[at as usize..at as usize + len];
                    for (old, now) in old.iter_mut().zip(&now) {
                        assert!(*now == 0 || now == old, "a discard gave neither zeros nor the old data");
                        *old = *now;
                    }
                    at += len as u64;
                }
            }
            8 => disk.flush_all().wait().unwrap(),
            _ => {
                let range = self.range(300_000);
                let len = (range.end - range.start) as usize;
                let found = read(disk, range.start, len).unwrap();
                self.same(&found, range.start);
            }
        }
    }

    pub fn same(&self, found: &[u8], start: u64) {
        let expected = &self.model[start as usize..start as usize + found.len()];
        if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
            panic!("byte {:#x} is {:#x}, expected {:#x}", start + at as u64, found[at], expected[at]);
        }
    }

    pub fn verify(&self, disk: &Disk) {
        for (number, part) in self.model.chunks(1 << 20).enumerate() {
            let start = (number as u64) << 20;
            self.same(&read(disk, start, part.len()).unwrap(), start);
        }
    }
}

/// Raw images, as a stand-in (the crate of the format is not a dependency here).
pub struct RawDisk;

impl Format for RawDisk {
    fn name(&self) -> &'static str {
        "raw"
    }
    fn description(&self) -> &'static str {
        "raw"
    }
    fn extensions(&self) -> &'static [&'static str] {
        &[]
    }
    fn probe(&self, _: &vellum_core::Sample<'_>) -> vellum_core::Confidence {
        vellum_core::Confidence::No
    }
    fn open(
        &self,
        _: vellum_core::OpenRequest,
    ) -> vellum_core::BoxFuture<'static, Result<Arc<dyn vellum_core::Image>, Error>> {
        Box::pin(async { Err(Error::new(vellum_core::Code::Feature, "not here")) })
    }
    fn create_options(&self) -> &'static [vellum_core::OptionSpec] {
        &[]
    }
    fn create(
        &self,
        _: CreateRequest,
    ) -> vellum_core::BoxFuture<'static, Result<Box<dyn vellum_core::ImageWriter>, Error>> {
        Box::pin(async { Err(Error::new(vellum_core::Code::Feature, "not here")) })
    }
}
