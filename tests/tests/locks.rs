//! Locks between processes: Vellum and QEMU keep each other out, and of many that begin together exactly one writes.

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vellum::io::{FilePolicy, LocalFiles, LockMode, OpenOptions};
use vellum::{ChainOptions, Code, Disk, Error, Result, Vellum, WriteAccess};
use vellum_tests::tools::{qemu_img, qemu_img_in, run, text};

const CHILD: &str = "VELLUM_LOCK_CHILD";
/// Starts of the race: `RELIABILITY.md` asks for as many.
const STARTS: usize = 200;

fn vellum_with(lock: LockMode) -> Vellum {
    let options = OpenOptions { lock, ..OpenOptions::default() };
    Vellum::new(Arc::new(LocalFiles::new(FilePolicy::default(), options)))
}

fn open(image: &Path, format: &str, write: bool) -> Result<Disk> {
    let write = if write { WriteAccess::Yes } else { WriteAccess::No };
    let options = ChainOptions { format: Some(format.into()), write, ..ChainOptions::default() };
    Ok(vellum_with(LockMode::Normal).open(text(image), &options)?.0)
}

fn locked(opened: Result<Disk>) -> Error {
    let error = opened.err().expect("it was opened");
    assert_eq!(error.code(), Code::Locked, "{error:?}");
    error
}

/// A process that holds an image open, or tries to.
struct Holder {
    process: Child,
    is_vellum: bool,
}

impl Holder {
    fn spawn(command: &mut Command, is_vellum: bool) -> Holder {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let process = command.spawn().unwrap_or_else(|e| panic!("{command:?} does not run: {e}"));
        Holder { process, is_vellum }
    }

    /// `qemu-io`, which opens the image and then reads commands.
    fn qemu(image: &Path, format: &str, read_only: bool) -> Holder {
        let mut command = Command::new("qemu-io");
        command.args(["-f", format]).args(read_only.then_some("-r")).arg(image);
        Holder::spawn(&mut command, false)
    }

    /// This test's `child`.
    fn vellum(image: &Path, format: &str) -> Holder {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "child", "--nocapture"]).env(CHILD, format!("{format} {}", text(image)));
        Holder::spawn(&mut command, true)
    }

    /// Waits until it holds the image: `qemu-io` prompts, the child says so.
    fn wait_until_open(mut self) -> Holder {
        let mut out = BufReader::new(self.process.stdout.take().unwrap());
        let mut seen = Vec::new();
        while !seen.ends_with(b"qemu-io> ") && !seen.ends_with(b"holding\n") {
            let mut byte = [0];
            if out.read(&mut byte).unwrap() == 0 {
                panic!("it ended: {} {}", String::from_utf8_lossy(&seen), self.end().1);
            }
            seen.push(byte[0]);
        }
        self.process.stdout = Some(out.into_inner());
        self
    }

    fn is_alive(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    /// Lets it go; whether it succeeded, and what it said.
    fn end(mut self) -> (bool, String) {
        drop(self.process.stdin.take());
        let output = self.process.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    }
}

/// Not a test of its own: what the child does. Opens the image for writing, writes, and holds it until its standard
/// input ends. Exits with 6 if it is locked.
#[test]
fn child() {
    let Ok(task) = std::env::var(CHILD) else { return };
    let (format, image) = task.split_once(' ').unwrap();
    let disk = match open(Path::new(image), format, true) {
        Ok(disk) => disk,
        Err(error) if error.code() == Code::Locked => {
            eprintln!("{error}");
            std::process::exit(6);
        }
        Err(error) => panic!("{error:?}"),
    };
    let own = std::process::id().to_le_bytes();
    disk.write(vellum::Buf::copy_of(&own), 0, vellum::WriteFlags::default()).wait().1.unwrap();
    println!("holding");
    std::io::stdin().lines().for_each(drop);
    disk.close().wait().unwrap();
}

fn image(directory: &Path, format: &str) -> PathBuf {
    let image = directory.join(format!("disk.{format}"));
    qemu_img(&["create", "-q", "-f", format, text(&image), "4M"]);
    image
}

fn qemu_says(image: &Path, format: &str, args: &[&str]) -> (bool, String) {
    let output =
        run("qemu-io", "qemu-utils", &[&["-f", format], args, &["-c", "read 0 512", text(image)]].concat());
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    (output.status.success() && !said.contains("ailed to get"), said)
}

#[test]
fn a_writer_of_qemu_keeps_vellum_out_and_is_named() {
    let directory = tempfile::tempdir().unwrap();
    for format in ["raw", "qcow2", "vdi", "vmdk"] {
        let image = image(directory.path(), format);
        let writer = Holder::qemu(&image, format, false).wait_until_open();
        let who = format!("pid {} (qemu-io)", writer.process.id());
        for write in [false, true] {
            let error = locked(open(&image, format, write));
            assert!(error.to_string().contains(&format!("open for writing by {who}")), "{error}");
            assert_eq!(error.image_name(), Some(text(&image)));
        }
        let options = ChainOptions { format: Some(format.into()), ..ChainOptions::default() };
        let shared = vellum_with(LockMode::SharedRead).open(text(&image), &options).unwrap();
        vellum_with(LockMode::None).open(text(&image), &options).unwrap();
        drop(shared);
        assert!(writer.end().0);
        open(&image, format, true).unwrap();
    }
}

#[test]
fn a_reader_of_qemu_lets_vellum_read_but_not_write() {
    let directory = tempfile::tempdir().unwrap();
    for format in ["qcow2", "vdi", "vmdk"] {
        let image = image(directory.path(), format);
        let reader = Holder::qemu(&image, format, true).wait_until_open();
        open(&image, format, false).unwrap();
        let error = locked(open(&image, format, true));
        let who = format!("in use by pid {} (qemu-io)", reader.process.id());
        assert!(error.to_string().contains(&who), "{error}");
        assert!(reader.end().0);
        open(&image, format, true).unwrap();
    }
}

#[test]
fn vellum_keeps_qemu_out() {
    let directory = tempfile::tempdir().unwrap();
    for format in ["raw", "qcow2", "vdi", "vmdk", "vpc"] {
        let image = image(directory.path(), format);
        let own = if format == "vpc" { "vhd" } else { format };
        let disk = open(&image, own, true).unwrap_or_else(|error| panic!("{format}: {error:?}"));
        // Who reads raw in QEMU lets others write.
        let refused: &[&[&str]] = if format == "raw" { &[&[]] } else { &[&[], &["-r"]] };
        for args in refused {
            let (opened, said) = qemu_says(&image, format, args);
            assert!(!opened && said.contains("lock"), "{format} {args:?}: {said}");
        }
        // QEMU's own way to read all the same.
        assert!(qemu_says(&image, format, &["-r", "-U"]).0);
        drop(disk);
        let reader = open(&image, own, false).unwrap();
        assert!(qemu_says(&image, format, &["-r"]).0);
        let (opened, said) = qemu_says(&image, format, &[]);
        assert!(!opened && said.contains("lock"), "{format}: {said}");
        drop(reader);
        assert!(qemu_says(&image, format, &[]).0);
    }
}

#[test]
fn the_parents_of_an_open_chain_can_be_read_but_not_written() {
    let directory = tempfile::tempdir().unwrap();
    let base = image(directory.path(), "qcow2");
    let child = directory.path().join("child.qcow2");
    qemu_img_in(
        directory.path(),
        &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "disk.qcow2", text(&child)],
    );
    let chain = open(&child, "qcow2", true).unwrap();
    assert!(!qemu_says(&base, "qcow2", &[]).0, "QEMU writes the parent of an open chain");
    assert!(qemu_says(&base, "qcow2", &["-r"]).0);
    // A second child of the same parent is no harm.
    drop(open(&base, "qcow2", false).unwrap());
    locked(open(&base, "qcow2", true));
    drop(chain);
    let writer = Holder::qemu(&base, "qcow2", false).wait_until_open();
    let error = locked(open(&child, "qcow2", false));
    let about = error.image_name().unwrap().to_owned();
    assert!(
        about.ends_with("disk.qcow2") || error.found_value().is_some_and(|found| found == "disk.qcow2"),
        "{error:?}"
    );
    assert!(writer.end().0);
    open(&child, "qcow2", false).unwrap();
}

#[test]
fn an_image_that_is_its_own_parent_is_a_cycle_also_for_a_writer() {
    let directory = tempfile::tempdir().unwrap();
    let ring = image(directory.path(), "qcow2");
    qemu_img_in(
        directory.path(),
        &["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "disk.qcow2", text(&ring)],
    );
    for write in [false, true] {
        let error = open(&ring, "qcow2", write).err().unwrap();
        assert_eq!(error.code(), Code::Cycle, "write: {write}: {error:?}");
    }
}

#[test]
fn the_same_image_twice_in_one_process() {
    let directory = tempfile::tempdir().unwrap();
    let image = image(directory.path(), "qcow2");
    let (one, two) = (open(&image, "qcow2", false).unwrap(), open(&image, "qcow2", false).unwrap());
    assert_eq!(one.size(), two.size());
    locked(open(&image, "qcow2", true));
}

#[test]
fn of_those_that_begin_together_exactly_one_writes() {
    let directory = tempfile::tempdir().unwrap();
    let image = image(directory.path(), "qcow2");
    let (mut vellum_won, mut slowest) = (0, Duration::ZERO);
    for start in 0..STARTS {
        // Two of different kinds as a rule; now and then two of Vellum's, or two of each. (Two of QEMU's alone may both
        // give up: it does not try again.)
        let (vellums, qemus) = match start % 10 {
            3 => (2, 0),
            6 => (2, 2),
            _ => (1, 1),
        };
        let mut starters: Vec<Holder> = (0..qemus).map(|_| Holder::qemu(&image, "qcow2", false)).collect();
        // QEMU takes longer to come to its locks; so that they meet there, Vellum begins at different times after it.
        std::thread::sleep(Duration::from_millis(start as u64 * 7 % 40));
        starters.extend((0..vellums).map(|_| Holder::vellum(&image, "qcow2")));
        let begun = Instant::now();
        while starters.iter_mut().map(Holder::is_alive).filter(|is_alive| *is_alive).count() > 1 {
            assert!(begun.elapsed() < Duration::from_secs(30), "start {start}: two hold the image, or hang");
            std::thread::sleep(Duration::from_millis(2));
        }
        slowest = slowest.max(begun.elapsed());
        let (alive, dead): (Vec<_>, Vec<_>) =
            starters.into_iter().map(|mut s| (s.is_alive(), s)).partition(|s| s.0);
        let said: Vec<String> = dead.into_iter().map(|(_, loser)| loser.end().1).collect();
        assert!(
            said.iter().all(|said| said.contains("lock") || said.contains("open for writing")),
            "{start}: {said:?}"
        );
        let Some((_, winner)) = alive.into_iter().next() else {
            panic!("start {start}: nobody holds the image: {said:?}");
        };
        let winner = winner.wait_until_open();
        vellum_won += usize::from(winner.is_vellum);
        let (succeeded, said) = winner.end();
        assert!(succeeded, "start {start}: {said}");
    }
    println!("{STARTS} starts, {vellum_won} won by Vellum, the slowest took {slowest:?}");
    qemu_img(&["check", "-q", text(&image)]);
}
