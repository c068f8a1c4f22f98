//! The disk that the benchmarks convert: 8 GiB, a GUID partition table, one ext4 with real files of this machine. Built
//! without root, kept between runs, and converted once by qemu-img into every variant that is read.

use super::Result;
use super::tools::{must, tool};
use super::variant::Variant;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Size of the disk in bytes.
const DISK_BYTES: u64 = 8 << 30;
/// Where the partition begins, and how much is left free behind it for the second partition table.
const MARGIN_BYTES: u64 = 1 << 20;
/// The least that a realistic disk holds.
const LEAST_USED_BYTES: u64 = 1 << 30;
/// Larger files would make the disk one long run of a few files.
const LARGEST_FILE_BYTES: u64 = 128 << 20;
/// Where the files come from, in this order.
const ROOTS: [&str; 5] = ["/usr/bin", "/usr/sbin", "/usr/include", "/usr/share", "/usr/lib"];
/// Changes when the disk is built in another way, so that an old one is not taken for a new one.
const RECIPE: &str = "3";
const TABLE_ID: &str = "6D7B5C1E-93C1-4B0A-8A59-52C1E1F0A001";
const PARTITION_ID: &str = "6D7B5C1E-93C1-4B0A-8A59-52C1E1F0A002";
const FILE_SYSTEM_ID: &str = "6d7b5c1e-93c1-4b0a-8a59-52c1e1f0a003";

/// The built disk.
pub struct Disk {
    folder: PathBuf,
    /// Bytes that the raw file takes on the host.
    pub used_bytes: u64,
}

impl Disk {
    /// The disk in `folder`, built if it is not there yet, with at least `file_bytes` of files on it.
    pub fn ready(folder: &Path, file_bytes: u64) -> Result<Disk> {
        fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let folder = folder.canonicalize().map_err(|error| format!("{}: {error}", folder.display()))?;
        let raw = folder.join("disk.raw");
        let key = folder.join("disk.key");
        let wanted = format!("recipe {RECIPE}, {file_bytes} bytes of files\n");
        if fs::read_to_string(&key).ok().as_deref() != Some(wanted.as_str()) || !raw.exists() {
            forget(&folder)?;
            build(&folder, &raw, file_bytes)?;
            fs::write(&key, wanted).map_err(|error| format!("{}: {error}", key.display()))?;
        }
        let used_bytes = allocated_bytes(&raw)?;
        if used_bytes < LEAST_USED_BYTES {
            return Err(format!("only {} MiB of the disk are used: --used is too small", used_bytes >> 20));
        }
        Ok(Disk { folder, used_bytes })
    }

    /// The folder that holds it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The raw file.
    pub fn raw(&self) -> PathBuf {
        self.folder.join("disk.raw")
    }

    /// The disk as `variant`, made by qemu-img, in `folder` (which may be another file system).
    pub fn source(&self, variant: &Variant, folder: &Path) -> Result<PathBuf> {
        let path = folder.join(format!("disk.{}", variant.extension));
        if path.exists() {
            return Ok(path);
        }
        eprintln!("making {}", path.display());
        let part = folder.join("source.tmp");
        let mut convert = tool("qemu-img");
        convert
            .args(["convert", "-m", "16", "-W", "-f", "raw", "-O", variant.qemu])
            .args(variant.qemu_target);
        must(convert.arg(self.raw()).arg(&part))?;
        File::open(&part)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(&part, &path))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(path)
    }
}

/// Bytes that a file takes on its file system.
pub fn allocated_bytes(path: &Path) -> Result<u64> {
    let metadata = fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(metadata.blocks() * 512)
}

/// Reads the data of a file once, so that it is in the page cache. Holes are left out: reading them would fill the
/// cache with zeros that no converter asks for.
pub fn warm(path: &Path) -> Result<()> {
    use rustix::fs::{SeekFrom, seek};
    let explain = |error: std::io::Error| format!("{}: {error}", path.display());
    let file = File::open(path).map_err(explain)?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    // NXIO: no data from there on.
    while let Ok(begin) = seek(&file, SeekFrom::Data(at)) {
        at = seek(&file, SeekFrom::Hole(begin)).map_err(|error| explain(error.into()))?;
        seek(&file, SeekFrom::Start(begin)).map_err(|error| explain(error.into()))?;
        let mut data = (&file).take(at - begin);
        while data.read(&mut buffer).map_err(explain)? > 0 {}
    }
    Ok(())
}

/// Removes a disk of another recipe, with what was made from it.
fn forget(folder: &Path) -> Result<()> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with("disk.") {
            fs::remove_file(entry.path()).map_err(|error| format!("{}: {error}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn build(folder: &Path, raw: &Path, file_bytes: u64) -> Result<()> {
    eprintln!("building {} with {} MiB of files", raw.display(), file_bytes >> 20);
    let stage = folder.join("stage");
    clear(&stage)?;
    let result = fill(&stage, file_bytes).and_then(|()| write_disk(folder, raw, &stage));
    clear(&stage)?;
    result
}

fn clear(stage: &Path) -> Result<()> {
    match fs::remove_dir_all(stage) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("{}: {error}", stage.display()))
        }
        _ => Ok(()),
    }
}

/// Copies files from the roots, in the order of their names, until there are enough.
fn fill(stage: &Path, file_bytes: u64) -> Result<()> {
    let mut missing_bytes = file_bytes;
    for root in ROOTS {
        let target = stage.join(root.trim_start_matches('/'));
        copy_tree(Path::new(root), &target, &mut missing_bytes)
            .map_err(|error| format!("copying {root} to {}: {error}", stage.display()))?;
    }
    if missing_bytes > 0 {
        return Err(format!(
            "this machine has {} MiB of files too few; ask for less with --used",
            missing_bytes >> 20
        ));
    }
    Ok(())
}

fn copy_tree(from: &Path, to: &Path, missing_bytes: &mut u64) -> std::io::Result<()> {
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    fs::create_dir_all(to)?;
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        if *missing_bytes == 0 || super::measure::interrupted() {
            break;
        }
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            copy_tree(&source, &target, missing_bytes)?;
        } else if metadata.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&source)?, &target)?;
        } else if metadata.is_file() && metadata.len() <= LARGEST_FILE_BYTES && File::open(&source).is_ok() {
            *missing_bytes = missing_bytes.saturating_sub(fs::copy(&source, &target)?);
        }
    }
    Ok(())
}

/// Partition table and file system, in a file that gets its name when it is complete.
fn write_disk(folder: &Path, raw: &Path, stage: &Path) -> Result<()> {
    super::measure::check_interrupt()?;
    let part = folder.join("raw.tmp");
    let table = folder.join("table.tmp");
    let explain = |error: std::io::Error| format!("{}: {error}", part.display());
    File::create(&part).and_then(|file| file.set_len(DISK_BYTES)).map_err(explain)?;

    let partition_bytes = DISK_BYTES - 2 * MARGIN_BYTES;
    let script = format!(
        "label: gpt\nlabel-id: {TABLE_ID}\nstart={}, size={}, type=linux, uuid={PARTITION_ID}, name=root\n",
        MARGIN_BYTES / 512,
        partition_bytes / 512,
    );
    fs::write(&table, script).map_err(explain)?;
    must(tool("sfdisk").arg("--quiet").arg(&part).stdin(File::open(&table).map_err(explain)?))?;
    fs::remove_file(&table).map_err(explain)?;

    let layout = format!("offset={MARGIN_BYTES},nodiscard,hash_seed={FILE_SYSTEM_ID},root_owner=0:0");
    must(
        tool("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-L", "vellum-bench", "-U", FILE_SYSTEM_ID])
            .args(["-E", &layout, "-d"])
            .arg(stage)
            .arg(&part)
            .arg(format!("{}k", partition_bytes >> 10)),
    )?;
    must(tool("e2fsck").arg("-fn").arg(format!("{}?offset={MARGIN_BYTES}", part.display())))?;
    File::open(&part).and_then(|file| file.sync_all()).and_then(|()| fs::rename(&part, raw)).map_err(explain)
}
