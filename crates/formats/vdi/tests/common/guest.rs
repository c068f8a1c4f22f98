//! A guest that writes at random, and a byte array that knows what it must read.
#![allow(dead_code)]

use std::sync::Arc;
use vellum_core::{
    Buf, ChainOptions, CheckReport, CheckRequest, CreateRequest, Disk, DiskTraits, Events, Format,
    FormatRegistry, Limits, Location, OpenFlags, OptionValues, Output, OutputMode, ParentLink, Providers,
    Resolver, Result, Storage, WriteAccess, WriteFlags, ZeroMode, block_on,
};
use vellum_format_vdi::Vdi;

/// A small random number generator; the same seed gives the same run.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let x = (self.0 ^ (self.0 >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        x ^ (x >> 29)
    }
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

/// Opens for writing.
pub fn open_writable(files: &Arc<dyn Resolver>, path: &str, flags: OpenFlags, seed: u64) -> Result<Disk> {
    open_limited(files, path, flags, seed, Limits::default())
}

/// The same with other limits.
pub fn open_limited(
    files: &Arc<dyn Resolver>,
    path: &str,
    flags: OpenFlags,
    seed: u64,
    limits: Limits,
) -> Result<Disk> {
    let mut options = ChainOptions {
        format: Some("vdi".into()),
        write: WriteAccess::Yes,
        providers: Some(Providers::seeded(u128::from(seed) << 3 | 5, 1_700_000_000)),
        limits,
        ..ChainOptions::default()
    };
    options.disk.flags = flags;
    let registry = FormatRegistry::new(vec![Arc::new(Vdi) as Arc<dyn Format>]);
    block_on(registry.open_chain(files, path, &options)).map(|(disk, _)| disk)
}

/// Opens for writing whatever is wrong with the image.
pub fn open_insisting(files: &Arc<dyn Resolver>, path: &str) -> Result<Disk> {
    let mut options = ChainOptions {
        format: Some("vdi".into()),
        write: WriteAccess::Yes,
        skip_consistency_checks: true,
        ..ChainOptions::default()
    };
    options.disk.flags.discard = true;
    let registry = FormatRegistry::new(vec![Arc::new(Vdi) as Arc<dyn Format>]);
    block_on(registry.open_chain(files, path, &options)).map(|(disk, _)| disk)
}

pub fn open_readable(files: &Arc<dyn Resolver>, path: &str) -> Result<Disk> {
    let options = ChainOptions { format: Some("vdi".into()), ..ChainOptions::default() };
    let registry = FormatRegistry::new(vec![Arc::new(Vdi) as Arc<dyn Format>]);
    block_on(registry.open_chain(files, path, &options)).map(|(disk, _)| disk)
}

/// Makes an empty image, a child if there is a parent.
pub fn create(
    files: &Arc<dyn Resolver>,
    path: &str,
    size: u64,
    options: &[(&str, &str)],
    parent: Option<ParentLink>,
) -> Result<()> {
    let output = Output::new(files.clone(), Location(path.to_owned()), OutputMode::Fresh);
    let given = options.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
    // Each image has its own identity.
    let seed = path.bytes().fold(u128::from(size), |sum, byte| sum.wrapping_mul(31) + u128::from(byte));
    let request = CreateRequest {
        output: output.clone(),
        virtual_size: size,
        options: OptionValues::check("vdi", Vdi.create_options(), given)?,
        traits: DiskTraits::default(),
        compress: false,
        level: None,
        providers: Providers::seeded(seed, 1_700_000_000),
        parent,
    };
    block_on(async {
        Vdi.create(request).await?.finish().await?;
        output.put_in_place().await
    })
}

/// The image at `path` as a parent.
pub fn link_to(files: &Arc<dyn Resolver>, path: &str) -> ParentLink {
    let disk = open_readable(files, path).expect("opening the parent");
    let info = disk.layers()[0].image.info();
    ParentLink {
        place: path.to_owned(),
        absolute: path.to_owned(),
        format: "vdi",
        virtual_size: info.virtual_size,
        identity: info.identity,
        modified_unix: None,
    }
}

pub fn check(files: &Arc<dyn Resolver>, path: &str) -> Result<CheckReport> {
    block_on(async {
        let opened = files.open(path, &vellum_core::Asker::User, vellum_core::Access::default()).await?;
        check_storage(opened.storage).await
    })
}

pub async fn check_storage(storage: Arc<dyn Storage>) -> Result<CheckReport> {
    Vdi.check(CheckRequest {
        location: Location(storage.name().to_owned()),
        storage,
        resolver: vellum_sim::MemoryFiles::new(),
        limits: Limits::default(),
        events: Events::default(),
        plan: true,
    })
    .await
}

/// What a check says, in lines.
pub fn findings(report: &CheckReport) -> Vec<String> {
    report.findings.iter().map(|f| format!("{}: {}", f.severity.as_str(), f.message)).collect()
}

/// Carries a plan out.
pub fn repair(report: &CheckReport) {
    vellum_conformance::mending::carry_out(report, true);
}

/// A guest at work on the image at `path`.
pub struct Guest {
    pub files: Arc<dyn Resolver>,
    pub path: String,
    pub disk: Disk,
    pub model: Vec<u8>,
    /// Discarded since it was written: reads as before or as zeros.
    pub loose: Vec<bool>,
    pub random: Random,
    pub flags: OpenFlags,
}

impl Guest {
    pub fn new(files: &Arc<dyn Resolver>, path: &str, model: Vec<u8>, flags: OpenFlags, seed: u64) -> Self {
        let disk = open_writable(files, path, flags, seed).expect("opening for writing");
        let loose = vec![false; model.len()];
        Guest { files: files.clone(), path: path.to_owned(), disk, model, loose, random: Random(seed), flags }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let (_, result) = self.disk.write(Buf::copy_of(data), offset, WriteFlags::default()).wait();
        result.expect("writing");
        let range = offset as usize..offset as usize + data.len();
        self.model[range.clone()].copy_from_slice(data);
        self.loose[range].fill(false);
    }

    pub fn zero(&mut self, offset: u64, len: usize, mode: ZeroMode) {
        self.disk.write_zeroes(offset..offset + len as u64, mode).wait().expect("writing zeros");
        self.model[offset as usize..offset as usize + len].fill(0);
        self.loose[offset as usize..offset as usize + len].fill(false);
    }

    pub fn discard(&mut self, offset: u64, len: usize) {
        self.disk.discard_range(offset..offset + len as u64).wait().expect("discarding");
        if self.flags.discard {
            self.loose[offset as usize..offset as usize + len].fill(true);
        }
    }

    pub fn flush(&self) {
        self.disk.flush_all().wait().expect("flushing");
    }

    /// Closes the image, has it checked, and opens it again.
    pub fn reopen(&mut self) {
        self.disk.close().wait().expect("closing");
        let report = check(&self.files, &self.path).expect("checking");
        assert!(report.is_clean(), "{:?}", findings(&report));
        assert!(report.fixes.is_empty());
        let seed = self.random.next();
        self.disk = open_writable(&self.files, &self.path, self.flags, seed).expect("opening again");
    }

    #[track_caller]
    pub fn compare(&self, bytes: &[u8], offset: usize) {
        let bad = bytes.iter().enumerate().position(|(i, byte)| {
            let at = offset + i;
            *byte != self.model[at] && !(self.loose[at] && *byte == 0)
        });
        assert_eq!(bad.map(|i| offset + i), None, "the first byte that differs");
    }

    #[track_caller]
    pub fn verify(&self) {
        for offset in (0..self.model.len()).step_by(1 << 20) {
            let len = (self.model.len() - offset).min(1 << 20);
            let (buf, result) = self.disk.read_at(Buf::zeroed(len), offset as u64).wait();
            result.expect("reading");
            self.compare(&buf, offset);
        }
    }

    /// A range of up to `longest` bytes, now and then aligned to `unit`.
    fn range(&mut self, unit: u64, longest: u64) -> (u64, usize) {
        let size = self.model.len() as u64;
        let (mut start, mut end) = (self.random.below(size), 0);
        let longest = longest.min(size);
        match self.random.below(4) {
            0 => {}
            1 => (start, end) = (start / 512 * 512, 512),
            2 => (start, end) = (start / unit * unit, unit * (1 + self.random.below(5))),
            _ => {}
        }
        if end == 0 {
            end = 1 + self.random.below(longest);
        }
        let end = (start + end).min(size);
        (start, (end - start) as usize)
    }

    /// One random request.
    pub fn step(&mut self, unit: u64, longest: u64) {
        let (start, len) = self.range(unit, longest);
        match self.random.below(16) {
            0..=5 => {
                let mut data = vec![0u8; len];
                let key = self.random.next();
                data.iter_mut().enumerate().for_each(|(i, b)| *b = (key >> (i % 7 * 8)) as u8 | 1);
                self.write(start, &data);
            }
            6 => self.write(start, &vec![0u8; len]),
            7 => {
                // What is there already.
                let same = self.disk.read_at(Buf::zeroed(len), start).wait().0.to_vec();
                self.write(start, &same);
            }
            8 => self.zero(start, len, ZeroMode::MayUnmap),
            9 => self.zero(start, len, ZeroMode::KeepAllocated),
            10..=12 => self.discard(start, len),
            13 => self.flush(),
            _ => {
                let (buf, result) = self.disk.read_at(Buf::zeroed(len), start).wait();
                result.expect("reading");
                self.compare(&buf, start as usize);
            }
        }
    }
}
