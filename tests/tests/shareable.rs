//! Images that several processes write at the same time, and those that are read from their start to their end.

use parking_lot::Mutex;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use vellum::io::{FilePolicy, LocalFiles, OpenOptions};
use vellum::{
    Access, Buf, ChainOptions, Code, CreateDiskRequest, Disk, Error, ParentRequest, Result, Vellum,
    WriteAccess, WriteFlags, ZeroMode, block_on,
};
use vellum_sim::Random;
use vellum_tests::tools::text;
use vellum_tests::variants::variant;
use vellum_tests::wrap::{Hook, Op, Wrapped};
use vellum_tests::writing::{SECTOR, qemu_check, read, sector_bytes};

const CHILD: &str = "VELLUM_SHARE_CHILD";
/// What several processes can write at once.
const SHAREABLE: [&str; 5] = ["raw", "vdi-fixed", "vhd-fixed", "vmdk-flat", "vmdk-split-flat"];

fn local() -> Vellum {
    Vellum::local(FilePolicy::default())
}

fn create(directory: &Path, name: &str) -> PathBuf {
    let variant = variant(name);
    let image = directory.join(format!("{name}.{}", variant.format));
    let request = variant.empty_disk(text(&image));
    local().create(&request).unwrap();
    image
}

/// `share`, `write` or `read`.
fn open(name: &str, image: &Path, how: &str) -> Result<Disk> {
    let options = ChainOptions {
        format: Some(variant(name).format.into()),
        write: if how == "read" { WriteAccess::No } else { WriteAccess::Yes },
        shareable: how == "share",
        ..ChainOptions::default()
    };
    Ok(local().open(text(image), &options)?.0)
}

fn refused(opened: Result<Disk>, code: Code) -> Error {
    let error = opened.err().expect("it was opened");
    assert_eq!(error.code(), code, "{error:?}");
    error
}

/// Another process that has the image open.
struct Other {
    process: Child,
    says: BufReader<std::process::ChildStdout>,
}

impl Other {
    fn start(name: &str, image: &Path, how: &str, part: u64) -> Other {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env(CHILD, format!("{name} {how} {part} {}", text(image)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let says = BufReader::new(process.stdout.take().unwrap());
        let mut other = Other { process, says };
        other.wait_for("open");
        other
    }

    fn wait_for(&mut self, word: &str) {
        let mut line = String::new();
        while line.trim_end() != word {
            line.clear();
            assert!(self.says.read_line(&mut line).unwrap() != 0, "it ended before it said {word:?}");
        }
    }

    fn tell(&mut self) {
        self.process.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }

    fn end(mut self) {
        drop(self.process.stdin.take());
        assert!(self.process.wait().unwrap().success());
    }
}

/// Not a test of its own: what the other process does. Opens the image, and for each line that it gets writes every third
/// sector, in any order.
#[test]
fn child() {
    let Ok(task) = std::env::var(CHILD) else { return };
    let words: Vec<&str> = task.splitn(4, ' ').collect();
    let disk = open(words[0], Path::new(words[3]), words[1]).unwrap();
    println!("\nopen");
    let part: u64 = words[2].parse().unwrap();
    for (round, line) in (1..).zip(std::io::stdin().lines()) {
        line.unwrap();
        write_part(&disk, part, round);
        println!("\nwritten");
    }
    disk.close().wait().unwrap();
}

/// Writes every third sector, from `part` on.
fn write_part(disk: &Disk, part: u64, round: u64) {
    let mut random = Random::new(part * 77 + round);
    let mut mine: Vec<u64> = (0..disk.size() / SECTOR).filter(|sector| sector % 3 == part).collect();
    for index in (1..mine.len()).rev() {
        mine.swap(index, random.below(index as u64 + 1) as usize);
    }
    for sector in mine {
        let flags = WriteFlags { fua: random.below(2000) == 0 };
        let buf = Buf::copy_of(&sector_bytes(round * 3 + part, sector));
        disk.write(buf, sector * SECTOR, flags).wait().1.unwrap();
    }
    disk.flush_all().wait().unwrap();
}

fn files(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn three_processes_write_one_image_at_the_same_time_and_each_sees_the_others() {
    for name in SHAREABLE {
        let directory = tempfile::tempdir().unwrap();
        let image = create(directory.path(), name);
        let before = files(directory.path());
        let identity = open(name, &image, "read").unwrap().layers()[0].image.info().identity;
        let mut others: Vec<Other> = (0..2).map(|part| Other::start(name, &image, "share", part)).collect();
        let disk = open(name, &image, "share").unwrap();
        for round in 1..=2 {
            others.iter_mut().for_each(Other::tell);
            write_part(&disk, 2, round);
            others.iter_mut().for_each(|other| other.wait_for("written"));
            // Nothing is opened again: what the others wrote is seen.
            let all = read(&disk).unwrap();
            for (sector, bytes) in (0..).zip(all.chunks_exact(SECTOR as usize)) {
                let expected = sector_bytes(round * 3 + sector % 3, sector);
                assert!(bytes == expected, "{name}, round {round}, sector {sector:#x}");
            }
        }
        disk.close().wait().unwrap();
        drop(disk);
        others.into_iter().for_each(Other::end);
        qemu_check(variant(name).qemu, &image, false, name);
        // Zeros, by one that shares, and all is as at the beginning, marks and identity included.
        let disk = open(name, &image, "share").unwrap();
        disk.write_zeroes(0..disk.size(), ZeroMode::KeepAllocated).wait().unwrap();
        disk.close().wait().unwrap();
        drop(disk);
        assert!(files(directory.path()) == before, "{name}: more than the disk's bytes changed");
        assert_eq!(open(name, &image, "read").unwrap().layers()[0].image.info().identity, identity);
    }
}

#[test]
fn who_shares_and_who_does_not_keep_each_other_out() {
    for name in SHAREABLE {
        let directory = tempfile::tempdir().unwrap();
        let image = create(directory.path(), name);
        let sharer = Other::start(name, &image, "share", 0);
        open(name, &image, "share").unwrap();
        for how in ["write", "read"] {
            let error = refused(open(name, &image, how), Code::Locked);
            let who = format!("open for writing by pid {}", sharer.process.id());
            assert!(error.to_string().contains(&who), "{name}, {how}: {error}");
        }
        sharer.end();
        for how in ["write", "read"] {
            let other = Other::start(name, &image, how, 0);
            let error = refused(open(name, &image, "share"), Code::Locked);
            assert!(
                error.to_string().contains(&format!("pid {}", other.process.id())),
                "{name}, {how}: {error}"
            );
            other.end();
        }
        open(name, &image, "share").unwrap();
    }
}

#[test]
fn qemu_and_who_shares_keep_each_other_out_where_qemu_does_not_share() {
    let qemu = |name: &str, image: &Path, commands: &[&str]| {
        let mut command = Command::new("qemu-io");
        command.args(["-f", variant(name).qemu]);
        commands.iter().for_each(|one| {
            command.args(["-c", one]);
        });
        command.arg(image).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("qemu-io runs (Debian package qemu-utils)")
    };
    for name in ["vdi-fixed", "vhd-fixed", "vmdk-flat"] {
        let directory = tempfile::tempdir().unwrap();
        let image = create(directory.path(), name);
        let sharer = open(name, &image, "share").unwrap();
        let output = qemu(name, &image, &["read 0 512"]).wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("lock"), "{name}: {said}");
        drop(sharer);
        let mut holder = qemu(name, &image, &[]);
        // It prompts when it has opened the image.
        std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut [0; 8]).unwrap();
        let error = refused(open(name, &image, "share"), Code::Locked);
        assert!(error.to_string().contains("(qemu-io)"), "{name}: {error}");
        drop(holder.stdin.take());
        holder.wait().unwrap();
        open(name, &image, "share").unwrap();
    }
    // qemu-io says of a raw image that it shares writing.
    let directory = tempfile::tempdir().unwrap();
    let image = create(directory.path(), "raw");
    let sharer = open("raw", &image, "share").unwrap();
    sharer.write(Buf::copy_of(&[5; 512]), 0, WriteFlags::default()).wait().1.unwrap();
    let output = qemu("raw", &image, &["read -P 5 0 512", "write -P 6 0 512"]).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (buf, result) = block_on(sharer.read(Buf::zeroed(512), 0));
    result.unwrap();
    assert_eq!(buf[..], [6; 512]);
}

#[test]
fn images_with_tables_or_parents_are_refused_and_not_touched() {
    for name in ["vdi-dynamic", "vhd-dynamic", "vmdk-sparse", "qcow2-v3", "qcow2-data-file"] {
        let directory = tempfile::tempdir().unwrap();
        let image = create(directory.path(), name);
        let before = files(directory.path());
        let error = refused(open(name, &image, "share"), Code::Usage);
        let said = error.to_string();
        assert!(said.contains("changes its tables"), "{said}");
        assert!(error.hint_text().is_some_and(|hint| hint.contains("raw")), "{error:?}");
        assert_eq!(error.image_name(), Some(text(&image)));
        assert!(files(directory.path()) == before, "{name}");
        // No lock is left behind.
        open(name, &image, "write").unwrap();
        // Who only reads changes nothing, whatever the flag says.
        let options = ChainOptions { shareable: true, ..ChainOptions::default() };
        local().open(text(&image), &options).unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let parent = create(directory.path(), "vdi-fixed");
    for format in ["vdi", "vhd", "qcow2"] {
        let child = directory.path().join(format!("child.{format}"));
        local()
            .create(&CreateDiskRequest {
                target: text(&child).into(),
                format: format.into(),
                parent: Some(ParentRequest { place: text(&parent).into(), ..ParentRequest::default() }),
                ..CreateDiskRequest::default()
            })
            .unwrap();
        let options = ChainOptions { write: WriteAccess::Yes, shareable: true, ..ChainOptions::default() };
        let error = local().open(text(&child), &options).err().unwrap();
        assert_eq!(error.code(), Code::Usage);
        assert!(error.to_string().contains("has a parent"), "{error}");
    }
}

#[test]
fn a_shared_disk_holds_what_the_model_has() {
    for name in SHAREABLE {
        let directory = tempfile::tempdir().unwrap();
        let image = create(directory.path(), name);
        let lengths =
            |files: Vec<(PathBuf, Vec<u8>)>| files.into_iter().map(|f| f.1.len()).collect::<Vec<_>>();
        let before = lengths(files(directory.path()));
        let disk = open(name, &image, "share").unwrap();
        let mut flags = disk.flags();
        flags.discard = true;
        disk.set_flags(flags).unwrap();
        let mut model = vec![0u8; disk.size() as usize];
        let mut random = Random::new(0x5a4e);
        for step in 0..400u64 {
            let len = random.below(200_000);
            let start = random.below(disk.size() - len + 1);
            let place = start as usize..(start + len) as usize;
            match random.below(6) {
                0 => {
                    disk.write_zeroes(start..start + len, ZeroMode::MayUnmap).wait().unwrap();
                    model[place].fill(0);
                }
                1 => {
                    disk.discard_range(start..start + len).wait().unwrap();
                    model[place].fill(0);
                }
                2 => disk.flush_all().wait().unwrap(),
                _ => {
                    let flags = WriteFlags { fua: step % 9 == 0 };
                    disk.write(Buf::copy_of(&vec![step as u8; len as usize]), start, flags).wait().1.unwrap();
                    model[place].fill(step as u8);
                }
            }
        }
        assert!(read(&disk).unwrap() == model, "{name}");
        disk.close().wait().unwrap();
        drop(disk);
        assert!(read(&open(name, &image, "read").unwrap()).unwrap() == model, "{name}: opened again");
        assert_eq!(lengths(files(directory.path())), before, "{name}: a file has another length");
        qemu_check(variant(name).qemu, &image, false, name);
    }
}

/// Remembers how files were opened.
#[derive(Default)]
struct Accesses(Mutex<Vec<(String, Access)>>);

impl Hook for Accesses {
    fn before(&self, _file: &str, _op: &Op) -> Result<()> {
        Ok(())
    }
    fn opening(&self, name: &str, access: Access) {
        self.0.lock().push((name.rsplit('/').next().unwrap_or(name).to_owned(), access));
    }
}

#[test]
fn every_file_of_a_chain_is_told_how_it_is_used() {
    let directory = tempfile::tempdir().unwrap();
    let parent = create(directory.path(), "vmdk-split-flat");
    let child = directory.path().join("child.qcow2");
    let request = CreateDiskRequest {
        target: text(&child).into(),
        format: "qcow2".into(),
        options: vec![("data_file".to_owned(), "child.data".to_owned())],
        parent: Some(ParentRequest { place: text(&parent).into(), ..ParentRequest::default() }),
        ..CreateDiskRequest::default()
    };
    let child = match local().create(&request) {
        Ok(_) => child,
        Err(error) => panic!("{error:?}"),
    };
    let accesses = Arc::new(Accesses::default());
    let files = Arc::new(LocalFiles::new(FilePolicy::default(), OpenOptions::default()));
    let vellum = Vellum::new(Wrapped::over(files, accesses.clone()));
    for sequential in [false, true] {
        for write in [WriteAccess::No, WriteAccess::Yes] {
            accesses.0.lock().clear();
            let options = ChainOptions { sequential, write, ..ChainOptions::default() };
            let (disk, _) = vellum.open(text(&child), &options).unwrap();
            assert_eq!(read(&disk).unwrap().len() as u64, disk.size());
            let opened = accesses.0.lock().clone();
            assert!(opened.len() >= 3, "{opened:?}");
            assert!(opened.iter().all(|(_, access)| access.sequential == sequential), "{opened:?}");
            assert!(opened.iter().all(|(_, access)| !access.shareable), "{opened:?}");
        }
    }
    // And every file that is written is said to be shared.
    accesses.0.lock().clear();
    let options = ChainOptions { shareable: true, write: WriteAccess::Yes, ..ChainOptions::default() };
    drop(vellum.open(text(&parent), &options).unwrap());
    let opened = accesses.0.lock().clone();
    assert!(
        opened.len() >= 2 && opened.iter().all(|(_, access)| access.shareable == access.write),
        "{opened:?}"
    );
}
