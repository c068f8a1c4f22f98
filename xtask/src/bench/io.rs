//! `cargo xtask bench io`: scattered 4 KiB reads and writes inside an image of each format, with a warm page cache, beside the
//! same on a raw file through Vellum, and beside `qemu-img bench` with the better of two `--aio` settings.
//!
//! Every image is filled first, so that no request allocates. `qemu-img bench` has no random order: both programs step
//! through the disk with one stride, which comes near no earlier place soon, like a random order. It measures neither
//! opening nor closing the image, and flushes when it closes; of Vellum's runs, too, only the requests are compared.
//! What Vellum's writes take besides, at the beginning and at the end, has columns of its own.
//!
//! A write into the page cache costs the kernel more the larger the cache's piece (folio) is that it meets: ext4 walks
//! all blocks of the piece. How large they are is up to whoever read the file, and to what memory was free then. So
//! each image's pieces are made anew in each round, of one page, as random requests make them; and, in a table of its
//! own, as large as readahead makes them.

use super::measure::{check_interrupt, median};
use super::options::Options;
use super::report::{facts, number, write_section};
use super::tools::{must, tool};
use super::{Result, host, tools};
use rustix::fs::Advice;
use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const FORMATS: [(&str, &str); 5] =
    [("raw", "raw"), ("vdi", "vdi"), ("vhd", "vpc"), ("vmdk", "vmdk"), ("qcow2", "qcow2")];
const SIZE_MIB: u64 = 512;
const REQUESTS: u32 = 20_000;
/// Write, and depth.
const KINDS: [(bool, u32); 4] = [(false, 1), (false, 32), (true, 1), (true, 32)];
/// Runs of Vellum in a round, each beside one on the raw file: they are short.
const REPEATS: usize = 3;
const AIO: [&str; 2] = ["threads", "io_uring"];
/// A setting of qemu-img that takes so much longer than the other in the first round is not tried again.
const HOPELESS: f64 = 1.25;
/// Nor is one that takes so many seconds: qemu-img flushes at each write into a VHD that leaves a block.
const LONG: f64 = 2.0;
/// 4 KiB times an odd number: every block comes once before one comes again. By the golden ratio of the disk, so that
/// a step comes within 2 MiB, the largest piece of the page cache, of an earlier one after 144 steps only: 8191 blocks
/// would come back after 16, where what the kernel keeps of a piece is still in the processor's cache.
const STRIDE: u64 = 4096 * 81_007;

/// How a file's bytes lie in the page cache.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pieces {
    /// A page each: what random requests leave.
    Pages,
    /// As large as readahead could make them: what reading in order leaves.
    Readahead,
}

/// Seconds of every run.
#[derive(Default)]
struct Row {
    /// The requests.
    vellum: Vec<f64>,
    /// What writing takes besides them.
    first_write: Vec<f64>,
    last_flush: Vec<f64>,
    /// By setting of `--aio`; empty where it refuses.
    qemu: [Vec<f64>; 2],
}

pub fn run(options: &Options) -> Result<()> {
    let vellum = tools::vellum(options)?;
    let folder = options.directory_or(&tools::default_directory()).join("io");
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let result = measure_in(&folder, &vellum, options);
    let _ = fs::remove_dir_all(&folder);
    result
}

fn image(folder: &Path, format: &str) -> PathBuf {
    folder.join(format!("disk.{format}"))
}

fn measure_in(folder: &Path, vellum: &Path, options: &Options) -> Result<()> {
    for (format, _) in FORMATS {
        let image = image(folder, format);
        must(
            Command::new(vellum)
                .args(["create", "-q", "--force", "-O", format])
                .arg(&image)
                .arg(format!("{SIZE_MIB}M")),
        )?;
        let fill =
            ["--write", "--force", "--fill", "--order", "sequential", "-b", "1M", "-n", "1", "-f", format];
        must(Command::new(vellum).args(["bench", "-q"]).args(fill).arg(&image))?;
    }
    let mut small = Rows::new(Pieces::Pages);
    let mut large = Rows::new(Pieces::Readahead);
    for round in 0..options.runs {
        for rows in [&mut small, &mut large] {
            rows.round(folder, vellum)?;
        }
        eprintln!("round {} done", round + 1);
    }
    let mut text = facts(&host::facts(folder, vellum));
    text.push_str(&small.table());
    text.push_str(&notes(&small));
    text.push_str(&large.table());
    println!("{text}");
    match &options.markdown {
        Some(path) => write_section(path, "io", &text),
        None => Ok(()),
    }
}

/// Puts all of `image` into the page cache, which is to hold it in such pieces.
fn warm(image: &Path, pieces: Pieces) -> Result<()> {
    let explain = |error: std::io::Error| format!("{}: {error}", image.display());
    let advise = |file: &fs::File, advice| rustix::fs::fadvise(file, 0, None, advice);
    let mut file = fs::File::open(image).map_err(explain)?;
    file.sync_data().map_err(explain)?;
    advise(&file, Advice::DontNeed).map_err(|error| explain(error.into()))?;
    if pieces == Pieces::Pages {
        advise(&file, Advice::Random).map_err(|error| explain(error.into()))?;
    }
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer).map_err(explain)? > 0 {}
    Ok(())
}

/// The measurements over one state of the page cache.
struct Rows {
    pieces: Pieces,
    kinds: &'static [(bool, u32)],
    /// By format, then kind.
    rows: Vec<Row>,
}

impl Rows {
    fn new(pieces: Pieces) -> Self {
        let kinds = match pieces {
            Pieces::Pages => &KINDS[..],
            // Reads do not walk through a piece.
            Pieces::Readahead => &KINDS[2..],
        };
        Rows { pieces, kinds, rows: (0..FORMATS.len() * kinds.len()).map(|_| Row::default()).collect() }
    }

    fn round(&mut self, folder: &Path, vellum: &Path) -> Result<()> {
        let count = self.kinds.len();
        for (format, _) in FORMATS {
            warm(&image(folder, format), self.pieces)?;
        }
        for (kind, (is_write, depth)) in self.kinds.iter().copied().enumerate() {
            // What disturbs the machine disturbs the raw file and the formats alike.
            for (number, (format, _)) in (0..REPEATS).flat_map(|_| FORMATS.iter().enumerate()) {
                let row = &mut self.rows[number * count + kind];
                ours(row, vellum, &image(folder, format), format, is_write, depth)?;
            }
            for (number, (format, qemu)) in FORMATS.iter().enumerate() {
                let row = &mut self.rows[number * count + kind];
                theirs(row, &image(folder, format), qemu, is_write, depth)?;
            }
        }
        Ok(())
    }
}

/// Nobody pays for another's writes.
fn clean(image: &Path) -> Result<()> {
    check_interrupt()?;
    let explain = |error: std::io::Error| format!("{}: {error}", image.display());
    fs::File::open(image).and_then(|file| file.sync_data()).map_err(explain)
}

fn ours(row: &mut Row, vellum: &Path, image: &Path, format: &str, is_write: bool, depth: u32) -> Result<()> {
    clean(image)?;
    let mut command = Command::new(vellum);
    command.args(["bench", "--json", "-f", format, "-n", &REQUESTS.to_string(), "-d", &depth.to_string()]);
    command.args(["--stride", &STRIDE.to_string()]);
    if is_write {
        command.args(["--write", "--force"]);
    }
    let printed = must(command.arg(image))?;
    let report: serde_json::Value =
        serde_json::from_str(&printed).map_err(|error| format!("{printed}: {error}"))?;
    let seconds = |name: &str| report[name].as_f64();
    row.vellum.push(seconds("seconds").ok_or_else(|| format!("no seconds in {printed}"))?);
    row.first_write.extend(seconds("first_write_seconds"));
    row.last_flush.extend(seconds("last_flush_seconds"));
    Ok(())
}

/// The same, with the settings that this machine allows.
fn theirs(row: &mut Row, image: &Path, format: &str, is_write: bool, depth: u32) -> Result<()> {
    let [threads, ring] = &row.qemu;
    let is_hopeless = |mine: &[f64], other: &[f64]| match (mine.first(), other.first()) {
        (Some(mine), Some(other)) => *mine > other * HOPELESS || *mine > LONG,
        (Some(mine), None) => *mine > LONG,
        _ => false,
    };
    let skipped = [is_hopeless(threads, ring), is_hopeless(ring, threads)];
    for ((aio, seconds), skip) in AIO.iter().zip(&mut row.qemu).zip(skipped) {
        if skip {
            continue;
        }
        clean(image)?;
        let mut command = tool("qemu-img");
        command.args(["bench", "-f", format, "-t", "writeback", "--aio", aio, "-s", "4096"]);
        command.args(["-S", &STRIDE.to_string(), "-c", &REQUESTS.to_string(), "-d", &depth.to_string()]);
        if is_write {
            command.arg("-w");
        }
        let printed = must(command.arg(image)).unwrap_or_default();
        let rest = printed.split_once("Run completed in ").map(|(_, rest)| rest);
        seconds.extend(rest.and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok()));
    }
    Ok(())
}

impl Rows {
    fn table(&self) -> String {
        let mut text = String::from(match self.pieces {
            Pieces::Pages => "",
            Pieces::Readahead => {
                "\nWrites where the page cache holds the images in the pieces of readahead, up to 2 MiB. Which image got the larger ones is chance: this compares the\n\
                 two programs, not the images:\n\n"
            }
        });
        text.push_str(
            "| image | request | depth | vellum µs | ratio to raw through vellum | qemu-img bench µs | ratio to that | vellum's first write ms | last flush µs |\n\
             |---|---|--:|--:|--:|--:|--:|--:|--:|\n",
        );
        let middle = |list: &[f64]| (!list.is_empty()).then(|| median(list.iter().copied()));
        let micros = |seconds: f64| seconds * 1e6 / f64::from(REQUESTS);
        let count = self.kinds.len();
        for (index, row) in self.rows.iter().enumerate() {
            let (format, _) = FORMATS[index / count];
            let (is_write, depth) = self.kinds[index % count];
            let own = middle(&row.vellum).map(micros);
            let raw = self.rows.get(index % count).and_then(|raw| middle(&raw.vellum)).map(micros);
            let qemu = row.qemu.iter().filter_map(|list| middle(list)).map(micros).min_by(f64::total_cmp);
            let by = |other: Option<f64>| number(own.zip(other).map(|(own, other)| own / other));
            let _ = writeln!(
                text,
                "| {format} | {} | {depth} | {} | **{}** | {} | **{}** | {} | {} |",
                if is_write { "write" } else { "read" },
                number(own),
                by(raw),
                number(qemu),
                by(qemu),
                number(middle(&row.first_write).map(|seconds| seconds * 1e3)),
                number(middle(&row.last_flush).map(micros)),
            );
        }
        text
    }
}

fn notes(rows: &Rows) -> String {
    let runs = |list: fn(&Row) -> usize| rows.rows.iter().map(list).max().unwrap_or(0);
    let (own, theirs) = (runs(|row| row.vellum.len()), runs(|row| row.qemu[0].len().max(row.qemu[1].len())));
    format!(
        "\n{REQUESTS} requests of 4 KiB over {SIZE_MIB} MiB, in the same scattered order for both programs (a stride by the golden ratio), of an image of which the page cache holds each page apart; medians of {own} runs of Vellum and \
         {theirs} of `qemu-img bench`, with its faster `--aio` (one of those that take more than {LONG} s). Both are times of the requests alone, by \
         their number: neither program counts opening, closing and flushing. What Vellum's writes take besides: before them one more, which also sets \
         the marks of a writing session and makes them durable; after them the flush of all that they wrote, here by the number of requests, too. \
         (`qemu-img bench` makes that flush when it closes the image, and does not tell how long it took.) Small writes into the page cache are done \
         on the thread that asks, so the depth changes little for Vellum.\n"
    )
}
