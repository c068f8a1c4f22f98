//! `cargo xtask bench empty`: how long, and with how much memory, empty 64 TiB disks are created, described, mapped and
//! converted. By default on a memory file system: ext4 files end at 16 TiB, and a flush costs nothing there.

use super::measure::{self, Failure, Sample, check_interrupt, median};
use super::options::Options;
use super::report::{facts, number, write_section};
use super::tools::tool;
use super::variant::{self, Variant};
use super::{Result, host, tools};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// No operation on an empty disk may need this long.
const LIMIT: Duration = Duration::from_secs(60);
/// Tried in this order: what a format or tool cannot do at 64 TiB is done at the most that VHD holds.
const SIZES: [&str; 2] = ["64T", "2040G"];
const VARIANTS: [&str; 6] = ["raw", "qcow2", "vmdk-sparse", "vmdk-stream", "vdi", "vhd"];

pub fn run(options: &Options) -> Result<()> {
    let vellum = tools::vellum(options)?;
    let folder = options.directory_or(Path::new("/dev/shm/vellum-bench-empty"));
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let result = measure_in(&folder, &vellum, options);
    for name in ["ours", "theirs", "output", "log"] {
        // The sizes of these files are apparent only, but VDI's table of 256 MiB is not.
        let _ = fs::remove_file(folder.join(name));
    }
    let _ = fs::remove_dir(&folder);
    result
}

fn measure_in(folder: &Path, vellum: &Path, options: &Options) -> Result<()> {
    let mut rows = Vec::new();
    for name in VARIANTS {
        check_interrupt()?;
        if let Some(variant) = variant::named(name) {
            rows.extend(Bench { folder, vellum, variant, runs: options.runs }.rows()?);
        }
        eprintln!("{name} done");
    }
    let mut text = facts(&host::facts(folder, vellum));
    text.push_str(&table(&rows));
    println!("{text}");
    if let Some(path) = &options.markdown {
        write_section(path, "empty", &text)?;
    }
    if let Some(path) = &options.json {
        fs::write(path, json(&rows)).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

/// One operation on one variant by both tools.
struct Row {
    variant: &'static str,
    size: &'static str,
    operation: &'static str,
    ours: Measured,
    theirs: Measured,
}

/// Samples, or why there are none.
type Measured = std::result::Result<Vec<Sample>, String>;

struct Bench<'a> {
    folder: &'a Path,
    vellum: &'a Path,
    variant: &'static Variant,
    runs: usize,
}

impl Bench<'_> {
    fn rows(&self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for size in SIZES {
            let created = self.row(size, "create", |ours| self.create(ours, size))?;
            let created_by_us = created.ours.is_ok();
            rows.push(created);
            if !created_by_us {
                continue;
            }
            rows.push(self.row(size, "info", |ours| self.read(ours, "info"))?);
            rows.push(self.row(size, "map", |ours| self.read(ours, "map"))?);
            rows.push(self.row(size, "to qcow2", |ours| self.convert(ours, "qcow2"))?);
            rows.push(self.row(size, "to itself", |ours| self.convert(ours, self.variant.name))?);
            break;
        }
        Ok(rows)
    }

    fn row(
        &self,
        size: &'static str,
        operation: &'static str,
        command: impl Fn(bool) -> Command,
    ) -> Result<Row> {
        let mut row =
            Row { variant: self.variant.name, size, operation, ours: Ok(Vec::new()), theirs: Ok(Vec::new()) };
        let mut refused = false;
        for _ in 0..self.runs {
            for (ours, measured) in [(true, &mut row.ours), (false, &mut row.theirs)] {
                let Ok(samples) = measured else { continue };
                if !ours && refused {
                    // What the format cannot hold is not asked of qemu-img: it would fill the memory with tables.
                    *measured = Err("not tried".to_owned());
                    continue;
                }
                let output = self.output(ours, operation);
                if let Some(output) = &output {
                    let _ = fs::remove_file(output);
                }
                match measure::run(&mut command(ours), output.as_deref(), &self.folder.join("log"), LIMIT) {
                    Ok(sample) => samples.push(sample),
                    Err(Failure::Broken(text)) => return Err(text),
                    Err(failure) => {
                        refused |= ours && operation == "create";
                        *measured = Err(failure.text());
                    }
                }
            }
        }
        Ok(row)
    }

    /// Each tool works on what it created itself.
    fn image(&self, ours: bool) -> PathBuf {
        self.folder.join(if ours { "ours" } else { "theirs" })
    }

    fn output(&self, ours: bool, operation: &str) -> Option<PathBuf> {
        match operation {
            "create" => Some(self.image(ours)),
            "info" | "map" => None,
            _ => Some(self.folder.join("output")),
        }
    }

    fn start(&self, ours: bool, verb: &str) -> Command {
        let mut command = if ours { Command::new(self.vellum) } else { tool("qemu-img") };
        command.arg(verb);
        command
    }

    fn create(&self, ours: bool, size: &str) -> Command {
        let mut command = self.start(ours, "create");
        // Only -o options: compression is a matter of conversions.
        if ours {
            command.args(["-f", self.variant.vellum]).args(self.variant.vellum_target);
        } else {
            command.args(["-q", "-f", self.variant.qemu]).args(self.variant.qemu_target);
        }
        command.arg(self.image(ours)).arg(size);
        command
    }

    fn read(&self, ours: bool, verb: &str) -> Command {
        let mut command = self.start(ours, verb);
        command
            .args(["-f", if ours { self.variant.vellum } else { self.variant.qemu }])
            .arg(self.image(ours));
        command
    }

    fn convert(&self, ours: bool, target: &str) -> Command {
        let mut command = self.start(ours, "convert");
        let target = variant::named(target).unwrap_or(self.variant);
        if ours {
            command
                .args(["--quiet", "-f", self.variant.vellum, "-O", target.vellum])
                .args(target.vellum_target);
        } else {
            command.args(["-f", self.variant.qemu, "-O", target.qemu]).args(target.qemu_target);
        }
        command.arg(self.image(ours)).arg(self.folder.join("output"));
        command
    }
}

fn seconds(measured: &Measured) -> Option<f64> {
    let samples = measured.as_ref().ok()?;
    Some(median(samples.iter().map(|sample| sample.durable_seconds)))
}

fn peak_mib(measured: &Measured) -> String {
    let peak =
        measured.as_ref().ok().and_then(|samples| samples.iter().map(|sample| sample.peak_bytes).max());
    peak.map_or("-".to_owned(), |bytes| bytes.div_ceil(1 << 20).to_string())
}

fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| format | size | operation | vellum s | qemu s | ratio | vellum MiB RAM | qemu MiB RAM |\n",
    );
    text.push_str("|---|--:|---|--:|--:|--:|--:|--:|\n");
    for row in rows {
        let (ours, theirs) = (seconds(&row.ours), seconds(&row.theirs));
        let cell = |value: Option<f64>| value.map_or("no, see below".to_owned(), |value| number(Some(value)));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            row.variant,
            row.size,
            row.operation,
            cell(ours),
            cell(theirs),
            number(ours.zip(theirs).map(|(ours, theirs)| ours / theirs)),
            peak_mib(&row.ours),
            peak_mib(&row.theirs)
        );
    }
    for row in rows {
        for (name, measured) in [("vellum", &row.ours), ("qemu-img", &row.theirs)] {
            if let Err(reason) = measured {
                let _ = writeln!(text, "\n{} {}, {}, {name}: {reason}", row.variant, row.size, row.operation);
            }
        }
    }
    text
}

fn json(rows: &[Row]) -> String {
    let measured = |measured: &Measured| {
        let list: Vec<_> = measured
            .iter()
            .flatten()
            .map(|sample| format!("[{:.5}, {}]", sample.durable_seconds, sample.peak_bytes))
            .collect();
        format!("[{}]", list.join(", "))
    };
    let lines: Vec<_> = rows
        .iter()
        .map(|row| {
            format!(
                "{{\"format\": \"{}\", \"size\": \"{}\", \"operation\": \"{}\", \"vellum\": {}, \"qemu\": {}}}",
                row.variant,
                row.size,
                row.operation,
                measured(&row.ours),
                measured(&row.theirs)
            )
        })
        .collect();
    format!("{{\"samples\": \"[seconds, peak bytes]\", \"rows\": [\n{}\n]}}\n", lines.join(",\n"))
}
