//! The command is killed (SIGKILL) in the middle of conversions, again and again: its target is there only when it is
//! complete, and `--resume` completes it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vellum_tests::disks::{noise, prose};
use vellum_tests::tools::{assert_qemu_same, text, vellum_binary};

const MIB: usize = 1 << 20;

/// 64 MiB: noise, text, and zeros that are stored as such.
fn write_source(path: &Path) {
    let mut disk = noise(9, 64 * MIB);
    for (number, part) in disk.chunks_mut(MIB).enumerate() {
        match number % 4 {
            0 => part[(number % 12) * 65_536..][..196_608].fill(0),
            1 => part.copy_from_slice(&prose(number as u64, MIB)),
            2 if number % 3 == 0 => part.fill(0),
            _ => {}
        }
    }
    std::fs::write(path, disk).unwrap();
}

struct Case {
    name: &'static str,
    format: &'static str,
    qemu: &'static str,
    arguments: &'static [&'static str],
    reproducible: bool,
}

const CASES: [Case; 5] = [
    Case { name: "qcow2", format: "qcow2", qemu: "qcow2", arguments: &[], reproducible: false },
    Case { name: "vdi", format: "vdi", qemu: "vdi", arguments: &["--reproducible"], reproducible: true },
    Case {
        name: "stream",
        format: "vmdk",
        qemu: "vmdk",
        arguments: &["--reproducible", "-o", "subformat=streamOptimized"],
        reproducible: true,
    },
    Case {
        name: "vhd",
        format: "vhd",
        qemu: "vpc",
        arguments: &["-o", "force_size=on"],
        reproducible: false,
    },
    Case {
        name: "zstd",
        format: "qcow2",
        qemu: "qcow2",
        arguments: &["--reproducible", "--compress", "-o", "compression_type=zstd"],
        reproducible: true,
    },
];

fn command(case: &Case, source: &Path, target: &Path) -> Command {
    let mut command = Command::new(vellum_binary());
    command.args(["convert", "-f", "raw", "-O", case.format]).args(case.arguments);
    command.args([source, target]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn signal(child: &Child, name: &str) {
    // The shell's own `kill`: no package is needed for it.
    let command = format!("kill -{name} {} 2>/dev/null", child.id());
    let status = Command::new("sh").args(["-c", &command]).status().unwrap();
    // It may have ended by itself in the meantime.
    let _ = status;
}

/// Runs it for `run`, then lets the clock go on without it, so that a checkpoint is due, then for `more`.
/// Whether it ended by itself.
fn run_and_kill(mut child: Child, run: Duration, more: Duration) -> bool {
    std::thread::sleep(run);
    signal(&child, "STOP");
    std::thread::sleep(Duration::from_millis(1020));
    signal(&child, "CONT");
    let until = Instant::now() + more;
    while Instant::now() < until {
        if child.try_wait().unwrap().is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    signal(&child, "KILL");
    let output = child.wait_with_output().unwrap();
    match output.status.code() {
        Some(0) => true,
        // Killed.
        None => false,
        Some(code) => panic!("exit code {code}: {}", String::from_utf8_lossy(&output.stderr)),
    }
}

/// Kills and resumes a conversion until it is complete; how often it was killed, and how often it was really resumed.
fn kill_until_done(case: &Case, source: &Path, target: &Path, seed: u64) -> (usize, usize) {
    let job = PathBuf::from(format!("{}.convert.vellum-job", text(target)));
    let (mut kills, mut resumed) = (0, 0);
    loop {
        let mut command = command(case, source, target);
        if kills > 0 {
            command.arg("--resume");
        }
        resumed += usize::from(kills > 0 && job.exists());
        let luck = noise(seed.wrapping_mul(1000) + kills as u64, 2);
        // After many kills it is let through: a slow machine may never get far enough.
        let patience = if kills < 30 { 1 } else { 1000 };
        let run = Duration::from_millis(5 + u64::from(luck[0]) / 2);
        let more = Duration::from_millis((20 + u64::from(luck[1]) / 2) * patience);
        if run_and_kill(command.spawn().unwrap(), run, more) {
            break;
        }
        kills += 1;
        assert!(!target.exists() || target.metadata().unwrap().len() > 0, "an empty target");
        if target.exists() {
            // Killed between putting the file in place and the end: it must be complete.
            break;
        }
    }
    (kills, resumed)
}

#[test]
fn a_killed_command_never_leaves_a_target_that_is_not_complete() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source.raw");
    write_source(&source);
    let _ = vellum_binary();
    let (mut kills, mut resumed) = (0, 0);
    for round in 0.. {
        // All cases at once: most of the time they stand still.
        let counts = std::thread::scope(|scope| {
            let running: Vec<_> = CASES
                .iter()
                .enumerate()
                .map(|(index, case)| {
                    let own = directory.path().join(format!("{}-{round}", case.name));
                    let source = &source;
                    scope.spawn(move || {
                        std::fs::create_dir(&own).unwrap();
                        let target = own.join("disk.img");
                        let counts = kill_until_done(case, source, &target, round * 10 + index as u64);
                        check(case, source, &target);
                        std::fs::remove_dir_all(own).unwrap();
                        counts
                    })
                })
                .collect();
            running.into_iter().map(|case| case.join().expect("a case failed")).collect::<Vec<_>>()
        });
        kills += counts.iter().map(|(kills, _)| kills).sum::<usize>();
        resumed += counts.iter().map(|(_, resumed)| resumed).sum::<usize>();
        println!("{kills} kills, {resumed} resumptions: {counts:?}");
        if kills >= 20 && resumed >= 10 {
            return;
        }
        assert!(
            round < 12,
            "{kills} kills and {resumed} resumptions in all: this machine is too fast or too slow"
        );
    }
}

/// The target is the source, and nothing else is left.
fn check(case: &Case, source: &Path, target: &Path) {
    assert_qemu_same((source, "raw"), (target, case.qemu));
    if case.reproducible {
        let whole = target.with_file_name("uninterrupted");
        std::fs::create_dir(&whole).unwrap();
        let whole = whole.join("disk.img");
        assert!(command(case, source, &whole).status().unwrap().success());
        let (found, expected) = (std::fs::read(target).unwrap(), std::fs::read(&whole).unwrap());
        assert!(found == expected, "{}: other bytes than without interruption", case.name);
    }
    let left: Vec<_> = std::fs::read_dir(target.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "disk.img" && name != "uninterrupted")
        .collect();
    // A kill in the last instant, after the rename, leaves the job file; it does no harm.
    assert!(left.iter().all(|name| name.ends_with(".vellum-job")), "left over: {left:?}");
}
