//! The command line of the benchmarks.

use super::Result;
use super::variant::{self, Variant};
use std::path::{Path, PathBuf};

pub const USAGE: &str = "\
Usage: cargo xtask bench convert|reflink|empty|io|channel|disk [options]

  convert   a disk with real files through all pairs of formats, beside qemu-img
  reflink   uncompressed pairs on btrfs and XFS, where blocks can be shared (needs root)
  empty     create, info, map and convert of empty 64 TiB disks
  io        scattered 4 KiB reads and writes inside images, beside qemu-img bench
  channel   throughput and round trips of channels, beside raw Tokio, rustls and socat
  disk      only build the disk that the others convert

  --runs N          rounds; medians are reported                               [5]
  --dir DIR         where disk and outputs lie      [target/bench; empty: /dev/shm]
  --pairs A:B,...   only these pairs; * is any, as in raw:*,*:vdi     [all pairs]
  --used MIB        file data on the disk                                    [1638]
  --fs NAME         reflink: only btrfs or only xfs                          [both]
  --vellum FILE     this binary              [cargo build --release -p vellum-cli]
  --vellum-args S   more arguments for vellum convert, as in '--threads 1'
  --no-verify       do not compare the first output of each pair with the source
  --json FILE       every sample
  --resume          convert: keep the pairs that the --json file has, measure the others
  --markdown FILE   the tables; in a file with <!-- begin PART --> and
                    <!-- end PART --> lines only what stands between them is replaced";

/// What the command line asks for.
pub struct Options {
    pub runs: usize,
    pub directory: Option<PathBuf>,
    pub pairs: Vec<(String, String)>,
    pub used_bytes: u64,
    pub file_system: Option<String>,
    pub vellum: Option<PathBuf>,
    pub vellum_arguments: Vec<String>,
    pub verify: bool,
    pub resume: bool,
    pub json: Option<PathBuf>,
    pub markdown: Option<PathBuf>,
}

impl Options {
    pub fn parse(arguments: &[String]) -> Result<Self> {
        let mut options = Options {
            runs: 5,
            directory: None,
            pairs: Vec::new(),
            used_bytes: 1638 << 20,
            file_system: None,
            vellum: None,
            vellum_arguments: Vec::new(),
            verify: true,
            resume: false,
            json: None,
            markdown: None,
        };
        let mut words = arguments.iter();
        while let Some(name) = words.next() {
            if name == "--no-verify" {
                options.verify = false;
                continue;
            }
            if name == "--resume" {
                options.resume = true;
                continue;
            }
            let value = words.next().ok_or_else(|| format!("{name} needs a value\n\n{USAGE}"))?;
            options.set(name, value)?;
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "--runs" => self.runs = number(name, value)?.max(1) as usize,
            "--used" => self.used_bytes = number(name, value)? << 20,
            "--dir" => self.directory = Some(value.into()),
            "--pairs" => self.pairs = value.split(',').map(pair).collect::<Result<_>>()?,
            "--fs" => self.file_system = Some(value.to_owned()),
            "--vellum" => self.vellum = Some(value.into()),
            "--vellum-args" => self.vellum_arguments = value.split_whitespace().map(str::to_owned).collect(),
            "--json" => self.json = Some(value.into()),
            "--markdown" => self.markdown = Some(value.into()),
            _ => return Err(format!("there is no option {name}\n\n{USAGE}")),
        }
        Ok(())
    }

    pub fn directory_or(&self, default: &Path) -> PathBuf {
        self.directory.clone().unwrap_or_else(|| default.to_owned())
    }

    /// Does the user want this pair?
    pub fn wants(&self, source: &Variant, target: &Variant) -> bool {
        let fits = |pattern: &str, name: &str| pattern == "*" || pattern == name;
        self.pairs.is_empty()
            || self.pairs.iter().any(|(from, to)| fits(from, source.name) && fits(to, target.name))
    }
}

fn number(name: &str, value: &str) -> Result<u64> {
    value.parse().map_err(|_| format!("{name} takes a number, not {value:?}"))
}

fn pair(text: &str) -> Result<(String, String)> {
    let (from, to) = text.split_once(':').ok_or_else(|| format!("a pair is SOURCE:TARGET, not {text:?}"))?;
    for name in [from, to] {
        if name != "*" && variant::named(name).is_none() {
            let known: Vec<_> = variant::ALL.iter().map(|variant| variant.name).collect();
            return Err(format!("there is no variant {name:?}; there are {}", known.join(", ")));
        }
    }
    Ok((from.to_owned(), to.to_owned()))
}
