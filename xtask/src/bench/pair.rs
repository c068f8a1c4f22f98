//! One pair of formats: rounds in which every contender converts the same source, one after the other.

use super::disk::{allocated_bytes, warm};
use super::measure::{self, Failure, Sample, median};
use super::tools::{must, tool};
use super::variant::Variant;
use super::{Result, host};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// No conversion of 8 GiB takes this long unless it hangs.
const LIMIT: Duration = Duration::from_secs(1800);

/// Who converts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Contender {
    /// `vellum convert`.
    Vellum,
    /// `qemu-img convert` with these arguments.
    Qemu(&'static [&'static str]),
}

impl Contender {
    /// Name in tables.
    pub fn name(self) -> String {
        match self {
            Contender::Vellum => "vellum".to_owned(),
            Contender::Qemu([]) => "qemu default".to_owned(),
            Contender::Qemu(arguments) => format!("qemu {}", arguments.join(" ")),
        }
    }
}

/// What one contender did with one pair.
pub struct Entry {
    pub contender: Contender,
    /// Its samples, or why it has none.
    pub samples: std::result::Result<Vec<Sample>, String>,
    /// Bytes that the output takes on the file system.
    pub allocated_bytes: u64,
    /// Length of the output.
    pub file_bytes: u64,
    /// Bytes by which the file system's free space fell in each round; few where blocks are shared.
    pub taken_bytes: Vec<f64>,
}

impl Entry {
    fn middle(&self, value: impl Fn(&Sample) -> f64) -> Option<f64> {
        self.samples.as_ref().ok().filter(|list| !list.is_empty()).map(|list| median(list.iter().map(value)))
    }

    /// Median of the time to a durable output.
    pub fn durable_seconds(&self) -> Option<f64> {
        self.middle(|sample| sample.durable_seconds)
    }

    /// Median of the time to the exit.
    pub fn exit_seconds(&self) -> Option<f64> {
        self.middle(|sample| sample.exit_seconds)
    }

    /// Median of the space that the output took.
    pub fn taken_bytes(&self) -> u64 {
        median(self.taken_bytes.iter().copied()) as u64
    }

    /// The largest peak of all rounds.
    pub fn peak_bytes(&self) -> Option<u64> {
        self.samples.as_ref().ok()?.iter().map(|sample| sample.peak_bytes).max()
    }
}

/// The entries of one pair; Vellum's is the first.
pub struct Pair {
    pub source: &'static Variant,
    pub target: &'static Variant,
    pub entries: Vec<Entry>,
    /// `None`: not compared. `Some(Err)`: the output differs from the source.
    pub verified: Option<Result<()>>,
}

impl Pair {
    /// Vellum's time by that of the fastest other, both to a durable output.
    pub fn ratio(&self) -> Option<f64> {
        self.ratio_to(Entry::durable_seconds)
    }

    /// Vellum's durable time by the others' time to their exit, when nothing is on the disk yet.
    pub fn ratio_to_undurable(&self) -> Option<f64> {
        self.ratio_to(Entry::exit_seconds)
    }

    fn ratio_to(&self, other: impl Fn(&Entry) -> Option<f64>) -> Option<f64> {
        let (ours, others) = self.entries.split_first()?;
        Some(ours.durable_seconds()? / others.iter().filter_map(other).min_by(f64::total_cmp)?)
    }

    /// Whether an entry has shown in its first round that it is not the fastest of the others, in a pair that takes long:
    /// the ratio is beside the fastest, and the rest of the time is better spent on other pairs.
    fn is_out(&self, index: usize) -> bool {
        let first = |entry: &Entry| entry.samples.as_ref().ok()?.first().map(|sample| sample.durable_seconds);
        let Some(own) = self.entries.get(index).filter(|_| index > 0).and_then(first) else { return false };
        let fastest = self.entries.iter().skip(1).filter_map(first).min_by(f64::total_cmp);
        fastest.is_some_and(|fastest| fastest > LONG_SECONDS && own > fastest)
    }

    /// Is every output the same disk as its source, as far as compared, and did Vellum convert it?
    pub fn is_good(&self) -> bool {
        let converted = self.entries.first().is_some_and(|entry| entry.samples.is_ok());
        converted && !matches!(self.verified, Some(Err(_)))
    }
}

/// A conversion that takes longer than this is repeated only by Vellum and by the fastest of the others.
const LONG_SECONDS: f64 = 6.0;

/// What a run of the usual disk needs of the page cache.
const TOUCHED_MIB: usize = 1280;

/// What all pairs of a run share.
pub struct Arena<'a> {
    /// Outputs lie here, one at a time.
    pub folder: PathBuf,
    pub vellum: &'a Path,
    pub vellum_arguments: &'a [String],
    pub contenders: &'a [Contender],
    pub runs: usize,
    pub verify: bool,
}

impl Arena<'_> {
    /// One conversion that nobody times. The first to fill the page cache pays for memory that a virtual machine gets from
    /// its host at the first touch; that must not be Vellum's first round.
    pub fn warm_up(&self, raw: &Variant, input: &Path) -> Result<()> {
        self.clear()?;
        warm(input)?;
        must(&mut self.command(Contender::Qemu(&[]), raw, raw, input, &self.folder.join("output.raw")))?;
        self.clear()
    }

    /// Measures one pair. `input` is the disk as `source`.
    pub fn measure(&self, source: &'static Variant, target: &'static Variant, input: &Path) -> Result<Pair> {
        let new = |contender| Entry {
            contender,
            samples: Ok(Vec::new()),
            allocated_bytes: 0,
            file_bytes: 0,
            taken_bytes: Vec::new(),
        };
        let entries = self.contenders.iter().copied().map(new).collect();
        let mut pair = Pair { source, target, entries, verified: None };
        warm(input)?;
        for round in 0..self.runs {
            // Each round another contender is first: who follows whom must not matter.
            let count = pair.entries.len();
            for turn in 0..count {
                let index = (round + turn) % count;
                if round > 0 && pair.is_out(index) {
                    continue;
                }
                let Some(entry) = pair.entries.get_mut(index) else { continue };
                let verdict = self.one(entry, source, target, input, round)?;
                pair.verified = pair.verified.take().or(verdict);
            }
        }
        self.clear()?;
        Ok(pair)
    }

    /// One conversion by one contender. Vellum's first output is compared with the source.
    fn one(
        &self,
        entry: &mut Entry,
        source: &Variant,
        target: &Variant,
        input: &Path,
        round: usize,
    ) -> Result<Option<Result<()>>> {
        let Ok(samples) = &mut entry.samples else { return Ok(None) };
        self.touch_memory()?;
        self.clear()?;
        let free_bytes = host::free_bytes(&self.folder)?;
        let output = self.folder.join(format!("output.{}", target.extension));
        let mut command = self.command(entry.contender, source, target, input, &output);
        match measure::run(&mut command, Some(&output), &self.folder.join("log"), LIMIT) {
            Ok(sample) => samples.push(sample),
            Err(Failure::Broken(text)) => return Err(text),
            Err(failure) => {
                entry.samples = Err(failure.text());
                return Ok(None);
            }
        }
        host::settle(&self.folder)?;
        entry.taken_bytes.push(free_bytes.saturating_sub(host::free_bytes(&self.folder)?) as f64);
        if round > 0 {
            return Ok(None);
        }
        entry.allocated_bytes = allocated_bytes(&output)?;
        entry.file_bytes =
            fs::metadata(&output).map_err(|error| format!("{}: {error}", output.display()))?.len();
        if !self.verify || entry.contender != Contender::Vellum {
            return Ok(None);
        }
        let mut compare = tool("qemu-img");
        compare.args(["compare", "-f", source.qemu, "-F", target.qemu]).arg(input).arg(&output);
        Ok(Some(must(&mut compare).map(drop)))
    }

    fn command(
        &self,
        contender: Contender,
        source: &Variant,
        target: &Variant,
        input: &Path,
        output: &Path,
    ) -> Command {
        let mut command;
        match contender {
            Contender::Vellum => {
                command = Command::new(self.vellum);
                command.args(["convert", "--quiet", "-f", source.vellum, "-O", target.vellum]);
                command.args(target.vellum_target).args(self.vellum_arguments);
            }
            Contender::Qemu(arguments) => {
                command = tool("qemu-img");
                command.arg("convert").args(arguments).args(["-f", source.qemu, "-O", target.qemu]);
                command.args(target.qemu_target);
            }
        }
        command.arg(input).arg(output);
        command
    }

    /// Fills page cache and gives it back. A virtual machine returns free memory to its host after a moment, and whoever
    /// touches it next pays up to a second for it; so everybody starts with memory that was just used.
    fn touch_memory(&self) -> Result<()> {
        let scratch = self.folder.join("scratch");
        let fill = || {
            let mut file = fs::File::create(&scratch)?;
            let block = vec![1u8; 1 << 20];
            (0..TOUCHED_MIB).try_for_each(|_| std::io::Write::write_all(&mut file, &block))?;
            drop(file);
            fs::remove_file(&scratch)
        };
        fill().map_err(|error| format!("{}: {error}", scratch.display()))
    }

    /// Removes the last output and lets the file system come to rest, so that no run pays for the one before.
    fn clear(&self) -> Result<()> {
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("{}: {error}", self.folder.display()));
            }
            _ => {}
        }
        fs::create_dir_all(&self.folder).map_err(|error| format!("{}: {error}", self.folder.display()))?;
        host::settle(&self.folder)
    }
}
