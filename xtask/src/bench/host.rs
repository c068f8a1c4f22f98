//! What a result must say about the machine and the day.

use super::Result;
use super::tools::{must, tool, workspace};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Name and value, in the order of printing.
pub fn facts(folder: &Path, vellum: &Path) -> Vec<(&'static str, String)> {
    let cores = std::thread::available_parallelism().map_or(0, |number| number.get());
    vec![
        ("date", now()),
        ("processor", format!("{cores} cores, {}", field("/proc/cpuinfo", "model name"))),
        ("memory", memory()),
        ("kernel", read("/proc/sys/kernel/osrelease")),
        ("file system", file_system(folder)),
        ("vellum", format!("{}, commit {}", first_line(Command::new(vellum).arg("--version")), commit())),
        ("qemu-img", first_line(tool("qemu-img").arg("--version"))),
        ("load before", read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" ")),
    ]
}

fn first_line(command: &mut Command) -> String {
    must(command)
        .ok()
        .and_then(|text| text.lines().next().map(str::to_owned))
        .unwrap_or_else(|| "unknown".to_owned())
}

fn commit() -> String {
    let git = |arguments: &[&str]| must(Command::new("git").current_dir(workspace()).args(arguments));
    let Ok(id) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_ok_and(|text| !text.trim().is_empty());
    format!("{}{}", id.trim(), if changed { " with changes" } else { "" })
}

fn read(path: &str) -> String {
    fs::read_to_string(path).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

fn field(path: &str, name: &str) -> String {
    let text = read(path);
    let line = text.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_once(':'))
        .map_or("unknown".to_owned(), |(_, value)| value.trim().to_owned())
}

fn memory() -> String {
    let text = field("/proc/meminfo", "MemTotal");
    match text.trim_end_matches("kB").trim().parse::<u64>() {
        Ok(kib) => format!("{:.1} GiB", kib as f64 / f64::from(1 << 20)),
        Err(_) => text,
    }
}

/// Type of the file system that holds `folder`: the mount with the longest path above it, the last of equals.
fn file_system(folder: &Path) -> String {
    let mounts = read("/proc/self/mountinfo");
    let of_line = |line: &str| -> Option<(usize, String)> {
        let (before, after) = line.split_once(" - ")?;
        let point = before.split(' ').nth(4)?;
        folder
            .starts_with(point)
            .then(|| (point.len(), after.split(' ').next().unwrap_or_default().to_owned()))
    };
    mounts
        .lines()
        .filter_map(of_line)
        .max_by_key(|(length, _)| *length)
        .map_or("unknown".to_owned(), |(_, kind)| kind)
}

/// Free bytes of the file system that holds `folder`.
pub fn free_bytes(folder: &Path) -> Result<u64> {
    let all = rustix::fs::statvfs(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(all.f_bfree * all.f_frsize)
}

/// Waits until everything written to the file system that holds `folder` is on the disk, and what was deleted is free:
/// XFS and btrfs free the blocks of a deleted file later, in the background.
pub fn settle(folder: &Path) -> Result<()> {
    let explain = |error: std::io::Error| format!("{}: {error}", folder.display());
    let open = fs::File::open(folder).map_err(explain)?;
    let mut free = None;
    // Others may write to the same file system all the time; do not wait for them for long.
    for _ in 0..20 {
        rustix::fs::syncfs(&open).map_err(|error| explain(error.into()))?;
        let before = free.replace(free_bytes(folder)?);
        if before == free {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Date and time in UTC.
fn now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    let (year, month, day) = civil(seconds / 86_400);
    let minute = seconds % 86_400 / 60;
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", minute / 60, minute % 60)
}

/// Days since 1970-01-01 as year, month and day.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month as u64 + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::civil;

    #[test]
    fn days_become_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_777), (2026, 11, 20));
        assert_eq!(civil(20_818), (2026, 12, 31));
        assert_eq!(civil(20_819), (2027, 1, 1));
    }
}
