//! `cargo xtask bench reflink`: uncompressed pairs on file systems that share blocks. A file in the bench folder becomes a
//! btrfs and an XFS in turn; both are unmounted and removed at the end, also after an error or Ctrl-C.

use super::disk::Disk;
use super::measure::check_interrupt;
use super::options::Options;
use super::pair::{Arena, Contender};
use super::report::Report;
use super::tools::{must, tool};
use super::variant::{self, Variant};
use super::{Result, host, tools};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// As in the matrix, and qemu-img with copy offload, its own way to share blocks.
const CONTENDERS: [Contender; 4] =
    [Contender::Vellum, Contender::Qemu(&[]), Contender::Qemu(&["-m", "16", "-W"]), Contender::Qemu(&["-C"])];

/// Pairs whose blocks lie at multiples of 4 KiB on both sides, or could.
const PAIRS: [(&str, &str); 10] = [
    ("raw", "raw"),
    ("raw", "qcow2"),
    ("raw", "vdi"),
    ("raw", "vhd"),
    ("raw", "vmdk-sparse"),
    ("qcow2", "raw"),
    ("qcow2", "vdi"),
    ("vdi", "qcow2"),
    ("vdi", "raw"),
    ("vmdk-sparse", "raw"),
];

/// Room for the sources and one output, whether it shares blocks or not.
const FILE_SYSTEM_BYTES: u64 = 24 << 30;

pub fn run(options: &Options) -> Result<()> {
    // SAFETY: geteuid takes nothing and cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        return Err("bench reflink mounts file systems: run it as root".to_owned());
    }
    let vellum = tools::vellum(options)?;
    let disk = Disk::ready(&options.directory_or(&tools::default_directory()), options.used_bytes)?;
    for (kind, make) in
        [("btrfs", &["mkfs.btrfs", "-q", "-f"][..]), ("xfs", &["mkfs.xfs", "-q", "-f", "-m", "reflink=1"])]
    {
        if options.file_system.as_deref().is_none_or(|wanted| wanted == kind) {
            let mount = Mount::new(disk.folder(), kind, make)?;
            measure_on(&mount, kind, &disk, &vellum, options)?;
        }
    }
    Ok(())
}

fn measure_on(mount: &Mount, kind: &str, disk: &Disk, vellum: &Path, options: &Options) -> Result<()> {
    let arena = Arena {
        folder: mount.point.join("run"),
        vellum,
        vellum_arguments: &options.vellum_arguments,
        contenders: &CONTENDERS,
        runs: options.runs,
        verify: options.verify,
    };
    arena.warm_up(&variant::ALL[0], &source_on(mount, disk, &variant::ALL[0])?)?;
    let part = format!("reflink {kind}");
    let mut report = Report::new(&part, options, host::facts(&mount.point, vellum), disk.used_bytes);
    for (from, to) in PAIRS {
        let (Some(source), Some(target)) = (variant::named(from), variant::named(to)) else { continue };
        if !options.wants(source, target) {
            continue;
        }
        check_interrupt()?;
        let pair = arena.measure(source, target, &source_on(mount, disk, source)?)?;
        eprintln!("{kind:6} {}", super::report::line(&pair));
        report.add(pair)?;
    }
    report.finish()
}

/// The disk as `source`, on the mounted file system.
fn source_on(mount: &Mount, disk: &Disk, source: &Variant) -> Result<PathBuf> {
    if source.name != "raw" {
        return disk.source(source, &mount.point);
    }
    let path = mount.point.join("disk.raw");
    if !path.exists() {
        must(tool("cp").arg("--sparse=always").arg(disk.raw()).arg(&path))?;
        host::settle(&mount.point)?;
    }
    Ok(path)
}

/// A file with a file system in it, mounted as long as this lives.
struct Mount {
    file: PathBuf,
    point: PathBuf,
    mounted: bool,
}

impl Mount {
    fn new(folder: &Path, kind: &str, make: &[&str]) -> Result<Self> {
        let mut mount = Mount {
            file: folder.join(format!("reflink-{kind}.img")),
            point: folder.join(format!("mount-{kind}")),
            mounted: false,
        };
        // Left behind by a run that was killed.
        if must(tool("findmnt").arg("--mountpoint").arg(&mount.point)).is_ok() {
            must(tool("umount").arg(&mount.point))?;
        }
        let explain = |error: std::io::Error| format!("{}: {error}", mount.file.display());
        File::create(&mount.file).and_then(|file| file.set_len(FILE_SYSTEM_BYTES)).map_err(explain)?;
        fs::create_dir_all(&mount.point).map_err(explain)?;
        let (program, arguments) = make.split_first().ok_or("no mkfs")?;
        must(tool(program).args(arguments).arg(&mount.file))?;
        must(tool("mount").args(["-o", "loop"]).arg(&mount.file).arg(&mount.point))?;
        mount.mounted = true;
        Ok(mount)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted
            && let Err(error) = must(tool("umount").arg(&self.point))
                .or_else(|_| must(tool("umount").arg("--lazy").arg(&self.point)))
        {
            eprintln!("{} stays mounted: {error}", self.point.display());
            return;
        }
        // Nothing more can be done about a failure here than to leave the file.
        let _ = fs::remove_file(&self.file);
        let _ = fs::remove_dir(&self.point);
    }
}
