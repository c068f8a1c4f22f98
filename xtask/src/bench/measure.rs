//! Runs a command and measures it: time to its exit, time until its output is on the disk, processor time, peak memory.

use super::Result;
use super::tools::words;
use std::fs::File;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// One run of one command.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Until the command ended.
    pub exit_seconds: f64,
    /// Until the output was durable: the exit, plus an fdatasync of the output if there is one.
    pub durable_seconds: f64,
    /// Processor time, user and system.
    pub cpu_seconds: f64,
    /// Largest resident set. Never below that of this process, about 4 MiB, which the kernel hands down over fork.
    pub peak_bytes: u64,
}

/// A command that did not do its work.
#[derive(Debug)]
pub enum Failure {
    /// It said no. What it printed.
    Refused(String),
    /// It ran for longer than this many seconds and was killed.
    TimedOut(u64),
    /// The benchmark itself cannot go on.
    Broken(String),
}

impl Failure {
    /// As a sentence.
    pub fn text(self) -> String {
        match self {
            Failure::Refused(text) | Failure::Broken(text) => text,
            Failure::TimedOut(seconds) => format!("no end after {seconds} s"),
        }
    }
}

/// Runs `command`, then makes `output` durable. `log` takes what the command prints.
pub fn run(
    command: &mut Command,
    output: Option<&Path>,
    log: &Path,
    limit: Duration,
) -> std::result::Result<Sample, Failure> {
    let broken = |what: &str, error: std::io::Error| Failure::Broken(format!("{what}: {error}"));
    let printed = File::create(log).map_err(|error| broken("the log", error))?;
    let also = printed.try_clone().map_err(|error| broken("the log", error))?;
    command.stdin(Stdio::null()).stdout(printed).stderr(also);

    let began = Instant::now();
    let child =
        command.spawn().map_err(|error| broken(&format!("cannot start {}", words(command)), error))?;
    let id = child.id() as libc::pid_t;
    let timed_out = wait_until_ended(id, limit);
    let exit_seconds = began.elapsed().as_secs_f64();
    let (status, usage) = reap(id).map_err(|error| broken("wait4", error))?;
    if interrupted() {
        return Err(Failure::Broken("interrupted".to_owned()));
    }
    if timed_out {
        return Err(Failure::TimedOut(limit.as_secs()));
    }
    if !status.success() {
        let text = std::fs::read(log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).trim().replace('\n', "; ");
        return Err(Failure::Refused(format!("{}: {status}: {text}", words(command))));
    }
    if let Some(output) = output {
        // The file is opened for reading only: its data and length are flushed all the same.
        File::open(output)
            .and_then(|file| file.sync_data())
            .map_err(|error| broken("sync of the output", error))?;
    }
    let durable_seconds = began.elapsed().as_secs_f64();
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    Ok(Sample {
        exit_seconds,
        durable_seconds: if output.is_some() { durable_seconds } else { exit_seconds },
        cpu_seconds: seconds(usage.ru_utime) + seconds(usage.ru_stime),
        peak_bytes: usage.ru_maxrss as u64 * 1024,
    })
}

/// Waits until the child has ended, without reaping it; kills it at the limit. Was it killed?
fn wait_until_ended(id: libc::pid_t, limit: Duration) -> bool {
    let (ended, told) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let guard = scope.spawn(move || {
            let late = told.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
            if late {
                // SAFETY: no memory is passed. The child is not reaped before this thread has ended, so its id
                // cannot belong to another process.
                unsafe { libc::kill(id, libc::SIGKILL) };
            }
            late
        });
        loop {
            // SAFETY: siginfo_t is plain data, for which all zeros is a valid value.
            let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
            // SAFETY: `info` is a live siginfo_t that the kernel fills.
            let answer =
                unsafe { libc::waitid(libc::P_PID, id as _, &mut info, libc::WEXITED | libc::WNOWAIT) };
            if answer == 0 || std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
                break;
            }
        }
        drop(ended);
        guard.join().unwrap_or(false)
    })
}

fn reap(id: libc::pid_t) -> std::io::Result<(ExitStatus, libc::rusage)> {
    let mut status = 0;
    // SAFETY: rusage is plain data, for which all zeros is a valid value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers are to live values of the types that wait4 fills.
        if unsafe { libc::wait4(id, &mut status, 0, &mut usage) } == id {
            return Ok((ExitStatus::from_raw(status), usage));
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note_interrupt(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// From here on Ctrl-C ends the running command and then the benchmark, which unmounts what it mounted on its way out.
pub fn catch_interrupts() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is allowed in a signal handler.
        unsafe { libc::signal(signal, note_interrupt as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    }
}

/// Has the user asked to stop?
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// The same as an error.
pub fn check_interrupt() -> Result<()> {
    if interrupted() { Err("interrupted".to_owned()) } else { Ok(()) }
}

/// The middle value; of an even number the mean of the two in the middle. 0 of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match (values.len(), values.len() / 2) {
        (0, _) => 0.0,
        (count, middle) if count % 2 == 1 => values[middle],
        (_, middle) => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(
        script: &str,
        output: Option<&Path>,
        limit: Duration,
    ) -> std::result::Result<Sample, Failure> {
        let log = std::env::temp_dir().join(format!("vellum-xtask-{}-{}", std::process::id(), script.len()));
        let result = run(Command::new("sh").args(["-c", script]), output, &log, limit);
        std::fs::remove_file(log).unwrap();
        result
    }

    #[test]
    fn time_and_memory_of_a_child_are_measured() {
        let sample = measured("sleep 0.2", None, Duration::from_secs(20)).unwrap();
        assert!(sample.exit_seconds >= 0.2, "{sample:?}");
        assert!(sample.cpu_seconds < sample.exit_seconds, "{sample:?}");
        assert!(sample.peak_bytes > 100_000, "{sample:?}");
    }

    #[test]
    fn a_refusal_carries_what_the_child_said() {
        let failure = measured("echo no such format >&2; exit 3", None, Duration::from_secs(20)).unwrap_err();
        let text = failure.text();
        assert!(text.contains("no such format") && text.contains('3'), "{text}");
    }

    #[test]
    fn a_child_that_never_ends_is_killed_at_the_limit() {
        let began = Instant::now();
        let failure = measured("exec sleep 600", None, Duration::from_millis(300)).unwrap_err();
        assert!(matches!(failure, Failure::TimedOut(_)), "{failure:?}");
        assert!(began.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median([]), 0.0);
    }
}
