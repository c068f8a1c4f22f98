//! What several test files need.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use vellum_io::{Create, Driver, LocalFile, OpenOptions};

pub const DRIVERS: [Driver; 3] = [Driver::Inline, Driver::Pool, Driver::Uring];

/// A directory on the real disk: tmpfs has other rules for direct I/O and holes.
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("vellum-io-").tempdir_in("/var/tmp").unwrap()
}

pub fn options(driver: Driver, direct: bool, create: Create) -> OpenOptions {
    OpenOptions { write: true, create, direct, driver, ..OpenOptions::default() }
}

/// A new file, at whatever driver.
pub fn fresh(path: &Path, driver: Driver, direct: bool) -> LocalFile {
    LocalFile::open(path, &options(driver, direct, Create::Replace)).unwrap()
}

/// Runs a program that the test cannot do without.
pub fn run(program: &str, package: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program} does not run ({e}): install the Debian package {package}"));
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(format!("{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Mounting and loop devices need root, which not every place where tests run has. The test says so, and fails where
/// VELLUM_REQUIRE_MOUNT=1 promises that it works.
pub fn or_say_so<T>(what: Result<T, String>) -> Option<T> {
    match what {
        Ok(value) => Some(value),
        Err(why) => {
            let required = std::env::var_os("VELLUM_REQUIRE_MOUNT").is_some_and(|v| v == "1");
            assert!(!required, "VELLUM_REQUIRE_MOUNT=1, but: {why}");
            eprintln!("NOT TESTED HERE, for this needs root and loop devices: {why}");
            None
        }
    }
}

/// A mounted file system, unmounted when dropped.
pub struct Mounted {
    pub path: PathBuf,
    _scratch: tempfile::TempDir,
}

impl Mounted {
    /// A btrfs of its own: the file system here that can share blocks.
    pub fn btrfs() -> Result<Mounted, String> {
        let scratch = scratch();
        let image = scratch.path().join("btrfs.img");
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(256 << 20).unwrap();
        let image = image.to_str().unwrap();
        run("mkfs.btrfs", "btrfs-progs", &["-q", image])?;
        Mounted::at(scratch, &["-o", "loop", image])
    }

    /// A tmpfs of `bytes` bytes.
    pub fn tmpfs(bytes: u64) -> Result<Mounted, String> {
        Mounted::at(scratch(), &["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
    }

    fn at(scratch: tempfile::TempDir, args: &[&str]) -> Result<Mounted, String> {
        let path = scratch.path().join("mnt");
        std::fs::create_dir(&path).unwrap();
        run("mount", "mount", &[args, &[path.to_str().unwrap()]].concat())?;
        Ok(Mounted { path, _scratch: scratch })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(why) = run("umount", "mount", &[self.path.to_str().unwrap()]) {
            eprintln!("{why}");
        }
    }
}

/// A loop device over a file, detached when dropped.
pub struct LoopDevice {
    pub path: PathBuf,
}

impl LoopDevice {
    pub fn over(file: &Path) -> Result<LoopDevice, String> {
        let path = run("losetup", "mount", &["--find", "--show", file.to_str().unwrap()])?;
        Ok(LoopDevice { path: path.into() })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(why) = run("losetup", "mount", &["--detach", self.path.to_str().unwrap()]) {
            eprintln!("{why}");
        }
    }
}
