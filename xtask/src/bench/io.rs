//! `cargo xtask bench io`: random 4 KiB reads and writes inside an image of each format, with a warm page cache, beside the
//! same on a raw file through Vellum, and beside `qemu-img bench` with the better of two `--aio` settings.
//!
//! Every image is filled first, so that no request allocates. `qemu-img bench` has no random order: it steps through
//! the disk with a stride that is odd in blocks and larger than any cluster.

use super::disk::warm;
use super::measure::{check_interrupt, median};
use super::options::Options;
use super::report::{facts, number, write_section};
use super::tools::{must, tool};
use super::{Result, host, tools};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const FORMATS: [(&str, &str); 5] =
    [("raw", "raw"), ("vdi", "vdi"), ("vhd", "vpc"), ("vmdk", "vmdk"), ("qcow2", "qcow2")];
const SIZE_MIB: u64 = 512;
const REQUESTS: u32 = 20_000;
const DEPTHS: [u32; 2] = [1, 32];
const AIO: [&str; 2] = ["threads", "io_uring"];
/// 4 KiB times an odd number: every block comes once in a round.
const STRIDE: u64 = 4096 * 8191;

/// Seconds of every round.
#[derive(Default)]
struct Row {
    vellum: Vec<f64>,
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
    // Read back in one go: how large the page cache's pieces are depends on how they came in.
    host::settle(folder)?;
    let _ = fs::write("/proc/sys/vm/drop_caches", "1");
    let mut rows: Vec<Row> = (0..FORMATS.len() * 4).map(|_| Row::default()).collect();
    for round in 0..options.runs {
        let mut row = rows.iter_mut();
        for (format, qemu) in FORMATS {
            check_interrupt()?;
            let image = image(folder, format);
            warm(&image)?;
            for is_write in [false, true] {
                for depth in DEPTHS {
                    let Some(row) = row.next() else { continue };
                    row.vellum.push(ours(vellum, &image, format, is_write, depth)?);
                    for (aio, seconds) in AIO.iter().zip(&mut row.qemu) {
                        seconds.extend(theirs(&image, qemu, aio, is_write, depth));
                    }
                }
            }
        }
        eprintln!("round {} done", round + 1);
    }
    let mut text = facts(&host::facts(folder, vellum));
    text.push_str(&table(&rows));
    println!("{text}");
    match &options.markdown {
        Some(path) => write_section(path, "io", &text),
        None => Ok(()),
    }
}

/// Seconds for all requests.
fn ours(vellum: &Path, image: &Path, format: &str, is_write: bool, depth: u32) -> Result<f64> {
    let mut command = Command::new(vellum);
    command.args(["bench", "--json", "-f", format, "-n", &REQUESTS.to_string(), "-d", &depth.to_string()]);
    if is_write {
        command.args(["--write", "--force"]);
    }
    let printed = must(command.arg(image))?;
    let report: serde_json::Value =
        serde_json::from_str(&printed).map_err(|error| format!("{printed}: {error}"))?;
    report["seconds"].as_f64().ok_or_else(|| format!("no seconds in {printed}"))
}

/// The same, if this machine allows the setting.
fn theirs(image: &Path, format: &str, aio: &str, is_write: bool, depth: u32) -> Option<f64> {
    let mut command = tool("qemu-img");
    command.args(["bench", "-f", format, "-t", "writeback", "--aio", aio, "-s", "4096"]);
    command.args(["-S", &STRIDE.to_string(), "-c", &REQUESTS.to_string(), "-d", &depth.to_string()]);
    if is_write {
        command.arg("-w");
    }
    let printed = must(command.arg(image)).ok()?;
    let (_, rest) = printed.split_once("Run completed in ")?;
    rest.split(' ').next()?.parse().ok()
}

fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| image | request | depth | vellum µs | ratio to raw through vellum | qemu-img bench µs | ratio to that |\n\
         |---|---|--:|--:|--:|--:|--:|\n",
    );
    let micros = |seconds: f64| seconds * 1e6 / f64::from(REQUESTS);
    for (index, row) in rows.iter().enumerate() {
        let (format, _) = FORMATS[index / 4];
        let own = micros(median(row.vellum.iter().copied()));
        let raw = rows.get(index % 4).map(|raw| micros(median(raw.vellum.iter().copied())));
        let qemu = row.qemu.iter().filter(|list| !list.is_empty());
        let qemu = qemu.map(|list| micros(median(list.iter().copied()))).min_by(f64::total_cmp);
        let _ = writeln!(
            text,
            "| {format} | {} | {} | {} | **{}** | {} | **{}** |",
            if index % 4 < 2 { "read" } else { "write" },
            DEPTHS[index % 2],
            number(Some(own)),
            number(raw.map(|raw| own / raw)),
            number(qemu),
            number(qemu.map(|qemu| own / qemu)),
        );
    }
    let _ = writeln!(
        text,
        "\n{REQUESTS} requests of 4 KiB over {SIZE_MIB} MiB, medians. Times are those of all requests by their number. Vellum's driver is \
         inline (the caller's thread), so its depth changes nothing but the order. Its times of writes end with a flush of all that was \
         written; `qemu-img bench` makes none."
    );
    text
}
