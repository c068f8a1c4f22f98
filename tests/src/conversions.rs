//! What the tests of interrupted, starved and falsified conversions share.

use crate::disks::{noise, prose};
use crate::variants::Variant;
use crate::wrap::{HookFn, Op, Wrapped};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use vellum::{ChainOptions, Code, Control, ConvertReport, ConvertRequest, Progress, Quiet, Result, Vellum};
use vellum_sim::MemoryFiles;

/// 1 MiB.
pub const MIB: usize = 1 << 20;
/// Where conversions go.
pub const TARGET: &str = "out/disk.img";
/// Their job file.
pub const JOB: &str = "out/disk.img.convert.vellum-job";

/// A raw source of `mib` MiB in which every MiB has data, and zeros that are stored as such: in runs of a cluster, in
/// the middle of clusters, and one whole MiB. (A writer that forgot what it had placed would put data in their place.)
pub fn source_bytes(mib: usize) -> Vec<u8> {
    let mut disk = noise(77, mib * MIB);
    for (number, part) in disk.chunks_mut(MIB).enumerate() {
        let at = (number % 12) * (64 << 10);
        part[at..at + (192 << 10)].fill(0);
        let text = prose(number as u64, 100 << 10);
        part[(900 << 10)..(1000 << 10)].copy_from_slice(&text);
        if number % 5 == 3 {
            part.fill(0);
        }
    }
    disk
}

/// Files with the source of `mib` MiB as `source.raw`.
pub fn files_with_source(mib: usize) -> Arc<MemoryFiles> {
    let files = MemoryFiles::new();
    files.put("source.raw", &source_bytes(mib));
    files
}

/// A conversion of the source, reproducible and on one thread.
pub fn request(variant: &Variant, target: &str) -> ConvertRequest {
    let mut request = ConvertRequest { reproducible: true, ..variant.request("source.raw", target) };
    request.source_options.format = Some("raw".into());
    request.threads = Some(1);
    request
}

/// Converts over files in memory.
pub fn convert(
    files: &Arc<MemoryFiles>,
    request: &ConvertRequest,
    progress: &dyn Progress,
) -> Result<ConvertReport> {
    Vellum::new(files.clone()).convert(request, progress)
}

/// The files under `directory`, without it.
pub fn under(files: &MemoryFiles, directory: &str) -> BTreeMap<String, Vec<u8>> {
    let paths = files.paths().into_iter();
    let inside = paths.filter_map(|path| path.strip_prefix(directory).map(str::to_owned));
    inside.map(|name| (name.clone(), files.get(&format!("{directory}{name}")).unwrap().to_vec())).collect()
}

/// Asserts that two directories hold the same.
#[track_caller]
pub fn assert_same_files(found: &BTreeMap<String, Vec<u8>>, expected: &BTreeMap<String, Vec<u8>>) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "names of the files");
    for (name, bytes) in expected {
        let found = &found[name];
        let differs = found.iter().zip(bytes).position(|(a, b)| a != b);
        assert!(
            found == bytes,
            "{name}: {} bytes, not {}, first difference {differs:x?}",
            found.len(),
            bytes.len()
        );
    }
}

/// Asserts that an image holds the source.
#[track_caller]
pub fn assert_reads_as_source(files: &Arc<MemoryFiles>, path: &str, format: &str, mib: usize) {
    let options = ChainOptions { format: Some(format.to_owned()), ..ChainOptions::default() };
    let (disk, _) = Vellum::new(files.clone()).open(path, &options).unwrap();
    let content = vellum_conformance::format::read_all(&disk);
    let expected = source_bytes(mib);
    let at = crate::disks::difference(&content, &expected);
    assert_eq!(at.map(|at| at / 512), None, "first sector that differs");
}

/// Slows a conversion down so that it writes a job file, and stops it some steps after that.
pub struct StopAfterJob<'a> {
    /// Where the job file appears.
    pub files: &'a MemoryFiles,
    /// How long each step takes.
    pub step: Duration,
    /// Steps to go on after the job file appeared.
    pub steps: AtomicUsize,
}

impl Progress for StopAfterJob<'_> {
    fn begin(&self, _phase: &str, _total: u64) {}
    fn advance(&self, _position: u64, _moved: u64) -> Control {
        std::thread::sleep(self.step);
        if self.files.get(JOB).is_none() {
            return Control::Continue;
        }
        let left = self.steps.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        if left.is_ok() { Control::Continue } else { Control::Stop }
    }
}

/// Stops at once when asked for the first time after `steps` steps.
pub struct StopAfter(pub AtomicUsize);

impl Progress for StopAfter {
    fn begin(&self, _phase: &str, _total: u64) {}
    fn advance(&self, _position: u64, _moved: u64) -> Control {
        let left = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        if left.is_ok() { Control::Continue } else { Control::Stop }
    }
}

/// Interrupts a conversion to [`TARGET`] after its job file was begun.
pub fn interrupt(files: &Arc<MemoryFiles>, request: &ConvertRequest, steps: usize) {
    let step = Duration::from_millis(75);
    let progress = StopAfterJob { files, step, steps: AtomicUsize::new(steps) };
    let error = convert(files, request, &progress).expect_err("the conversion was stopped");
    assert_eq!(error.code(), Code::Cancelled, "{error:?}");
    assert!(error.hint_text().is_some_and(|hint| hint.contains("--resume")), "{error:?}");
    let paths = files.paths();
    assert!(!paths.iter().any(|path| path == TARGET), "nothing looks finished: {paths:?}");
    assert!(paths.iter().any(|path| path == JOB), "{paths:?}");
}

/// A conversion over files in which `hook` decides what works.
pub fn convert_with(
    files: &Arc<MemoryFiles>,
    request: &ConvertRequest,
    hook: impl Fn(&str, &Op) -> Result<()> + Send + Sync + 'static,
) -> Result<ConvertReport> {
    let resolver = Wrapped::over(files.clone(), Arc::new(HookFn(hook)));
    Vellum::new(resolver).convert(request, &Quiet)
}
