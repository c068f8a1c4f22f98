//! Who holds a lock: `/proc` knows, as far as this process may look.
//!
//! A lock of an open file (OFD) belongs to no process, and the kernel says so: its process is -1. But the descriptors
//! of every process are listed in `/proc/PID/fdinfo`, each with the locks of its open file.

use rustix::fd::BorrowedFd;
use rustix::fs::{Stat, fstat};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

/// Descriptors that are looked at, at most.
const DESCRIPTORS_MAX: usize = 100_000;
/// Time that is spent on it, at most. It is for a message only.
const TIME_MAX: Duration = Duration::from_millis(300);

/// Names the holder of `byte` of the file `fd`: `pid 4711 (qemu-system-x86)`, or "another process".
pub(crate) fn name(fd: BorrowedFd<'_>, byte: u64, pid: Option<u32>) -> String {
    let found = pid.or_else(|| fstat(fd).ok().and_then(|stat| find(&stat, byte)));
    match found {
        None => "another process".to_owned(),
        Some(pid) if pid == std::process::id() => "this process itself, through another handle".to_owned(),
        Some(pid) => match command(pid) {
            Some(command) => format!("pid {pid} ({command})"),
            None => format!("pid {pid}"),
        },
    }
}

/// The name of a process, as `ps` shows it.
fn command(pid: u32) -> Option<String> {
    let text = read_some(Path::new(&format!("/proc/{pid}/comm")))?;
    let command: String = text.trim_end().chars().filter(|c| !c.is_control()).take(64).collect();
    (!command.is_empty()).then_some(command)
}

/// Looks through the descriptors of all processes.
fn find(file: &Stat, byte: u64) -> Option<u32> {
    let until = Instant::now() + TIME_MAX;
    let mut left = DESCRIPTORS_MAX;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // Other users' processes cannot be looked into.
        let Ok(descriptors) = fs::read_dir(process.path().join("fdinfo")) else { continue };
        for descriptor in descriptors.flatten() {
            left = left.checked_sub(1)?;
            if Instant::now() > until {
                return None;
            }
            let holds = read_some(&descriptor.path())
                .is_some_and(|text| text.lines().any(|line| is_lock_at(line, file.st_ino, byte)));
            // Only now, because this may wait if the file is of a network that does not answer.
            if holds && is_open_as(&process.path(), &descriptor.file_name(), file) {
                return Some(pid);
            }
        }
    }
    None
}

/// Whether the descriptor is open on this very file: inode numbers alone are not unique.
fn is_open_as(process: &Path, descriptor: &std::ffi::OsStr, file: &Stat) -> bool {
    rustix::fs::stat(process.join("fd").join(descriptor))
        .is_ok_and(|found| (found.st_dev, found.st_ino) == (file.st_dev, file.st_ino))
}

/// Whether a line of `fdinfo` tells of a lock on `byte` of the inode:
/// `lock: 1: OFDLCK ADVISORY READ -1 fe:00:10011161 100 101`.
fn is_lock_at(line: &str, inode: u64, byte: u64) -> bool {
    let Some(lock) = line.strip_prefix("lock:") else { return false };
    let words: Vec<&str> = lock.split_whitespace().collect();
    let [.., file, start, end] = words.as_slice() else { return false };
    let same_inode = file.rsplit(':').next().and_then(|number| number.parse().ok()) == Some(inode);
    let start = start.parse().ok().is_some_and(|start: u64| start <= byte);
    let end = *end == "EOF" || end.parse().ok().is_some_and(|end: u64| byte <= end);
    same_inode && start && end
}

fn read_some(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(64 << 10).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_fdinfo() {
        let line = "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10011161 100 101";
        assert!(is_lock_at(line, 10_011_161, 100) && is_lock_at(line, 10_011_161, 101));
        assert!(!is_lock_at(line, 10_011_161, 102) && !is_lock_at(line, 7, 100));
        assert!(is_lock_at("lock:\t1: POSIX  ADVISORY  WRITE 12 00:1b:7 0 EOF", 7, 203));
        assert!(!is_lock_at("ino:\t10011161", 10_011_161, 100) && !is_lock_at("lock:", 7, 0));
    }
}
