//! Who keeps whom out. Two handles of one process are two users, as two processes are.

mod common;

use common::scratch;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vellum_core::{Access, Asker, Buf, Code, Error, Location, Resolver, Storage, WriteFlags};
use vellum_io::{Create, Driver, FilePolicy, LocalFile, LocalFiles, LockMode, OpenOptions};

fn open(path: &Path, write: bool, lock: LockMode) -> Result<LocalFile, Error> {
    LocalFile::open(path, &OpenOptions { write, lock, ..OpenOptions::default() })
}

fn locked(opened: Result<LocalFile, Error>) -> Error {
    let error = opened.err().expect("it was opened");
    assert_eq!(error.code(), Code::Locked, "{error:?}");
    error
}

/// Another process with a classic lock of the whole file.
struct Other(Child);

impl Other {
    fn lock(path: &Path) -> Other {
        const SCRIPT: &str = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); \
                              print('locked', flush=True); sys.stdin.read()";
        let (child, line) = python(SCRIPT, path, &[]);
        assert_eq!(line, "locked");
        Other(child)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

#[test]
fn one_writer_or_any_number_of_readers() {
    let scratch = scratch();
    let path = scratch.path().join("disk.raw");
    std::fs::write(&path, [0; 4096]).unwrap();
    let readers: Vec<_> = (0..20).map(|_| open(&path, false, LockMode::Normal).unwrap()).collect();
    let error = locked(open(&path, true, LockMode::Normal));
    assert!(error.to_string().contains("in use by this process itself"), "{error}");
    assert!(error.hint_text().unwrap().contains("--no-lock"), "{error:?}");
    drop(readers);
    let writer = open(&path, true, LockMode::Normal).unwrap();
    locked(open(&path, true, LockMode::Normal));
    let error = locked(open(&path, false, LockMode::Normal));
    assert!(error.to_string().contains("open for writing by this process itself"), "{error}");
    assert!(error.hint_text().unwrap().contains("--shared-read"), "{error:?}");
    drop(writer);
    open(&path, false, LockMode::Normal).unwrap();
    open(&path, true, LockMode::Normal).unwrap();
}

#[test]
fn a_shared_reader_reads_beside_a_writer_and_nobody_writes_beside_one_with_a_lock() {
    let scratch = scratch();
    let path = scratch.path().join("disk.raw");
    std::fs::write(&path, [7; 4096]).unwrap();
    let writer = open(&path, true, LockMode::Normal).unwrap();
    let reader = open(&path, false, LockMode::SharedRead).unwrap();
    let (buf, result) = reader.read_at(Buf::zeroed(4096), 0).wait();
    result.unwrap();
    assert_eq!(buf[..], [7; 4096]);
    // For writing it is no privilege.
    locked(open(&path, true, LockMode::SharedRead));
    drop(writer);
    // It keeps no writer out either.
    let writer = open(&path, true, LockMode::Normal).unwrap();
    open(&path, true, LockMode::None).unwrap();
    drop((reader, writer));
}

#[test]
fn handles_with_other_descriptors_of_the_file_do_not_lose_the_lock() {
    let scratch = scratch();
    let path = scratch.path().join("disk.raw");
    std::fs::write(&path, [0; 4096]).unwrap();
    let direct = OpenOptions { write: true, direct: true, ..OpenOptions::default() };
    let writer = LocalFile::open(&path, &direct).unwrap();
    // A lock of the classic kind would be gone with the first descriptor of the file that is closed.
    drop(std::fs::File::open(&path).unwrap());
    drop(open(&path, false, LockMode::None).unwrap());
    locked(open(&path, true, LockMode::Normal));
    drop(writer);
    open(&path, true, LockMode::Normal).unwrap();
}

#[test]
fn an_output_is_not_emptied_by_a_second_writer() {
    let scratch = scratch();
    let path = scratch.path().join("disk.raw.part");
    let options = OpenOptions { create: Create::Replace, ..OpenOptions::default() };
    let first = LocalFile::open(&path, &options).unwrap();
    first.write_at(Buf::copy_of(b"mine"), 0, WriteFlags::default()).wait().1.unwrap();
    locked(LocalFile::open(&path, &options));
    assert_eq!(first.len().unwrap(), 4, "the second did not empty it");
    drop(first);
    assert_eq!(LocalFile::open(&path, &options).unwrap().len().unwrap(), 0);
}

#[test]
fn a_write_lock_of_a_program_that_knows_no_scheme_is_respected() {
    // cloud-hypervisor locks the whole file so; the kernel names the process of such a lock.
    let scratch = scratch();
    let path = scratch.path().join("disk.raw");
    std::fs::write(&path, [0; 4096]).unwrap();
    let other = Other::lock(&path);
    for write in [false, true] {
        let error = locked(open(&path, write, LockMode::Normal));
        let who = format!("open for writing by pid {} (python3", other.0.id());
        assert!(error.to_string().contains(&who), "{error}");
    }
    open(&path, false, LockMode::SharedRead).unwrap();
    drop(other);
    open(&path, true, LockMode::Normal).unwrap();
}

#[test]
fn it_is_tried_again_before_it_is_given_up_and_not_for_long() {
    let scratch = scratch();
    let path = scratch.path().join("disk.raw");
    std::fs::write(&path, [0; 4096]).unwrap();
    let writer = open(&path, true, LockMode::Normal).unwrap();
    let start = Instant::now();
    locked(open(&path, true, LockMode::Normal));
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(30) && took < Duration::from_secs(2), "{took:?}");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(5));
            drop(writer);
        });
        open(&path, true, LockMode::Normal).unwrap();
    });
}

#[test]
fn of_many_that_begin_together_exactly_one_writes() {
    let scratch = scratch();
    let path = scratch.path().join("disk.raw");
    std::fs::write(&path, [0; 4096]).unwrap();
    for round in 0..20 {
        let barrier = std::sync::Barrier::new(4);
        let opened: Vec<_> = std::thread::scope(|scope| {
            let begin = || {
                barrier.wait();
                open(&path, true, LockMode::Normal)
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(begin)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(opened.iter().filter(|opened| opened.is_ok()).count(), 1, "round {round}");
    }
}

#[test]
fn a_disk_that_vmware_uses_is_locked_and_its_host_is_named() {
    let scratch = scratch();
    let (path, lck) = (scratch.path().join("disk.vmdk"), scratch.path().join("disk.vmdk.lck"));
    std::fs::write(&path, [0; 4096]).unwrap();
    std::fs::create_dir(&lck).unwrap();
    let error = locked(open(&path, false, LockMode::Normal));
    assert!(error.found_value().unwrap().ends_with("disk.vmdk.lck"), "{error:?}");
    let mut member = b"workstation-7 4132-131234567(vmware-vmx) 12 X 131234567 lc=0102".to_vec();
    member.resize(512, 0);
    std::fs::write(lck.join("M60310.lck"), member).unwrap();
    for write in [false, true] {
        let error = locked(open(&path, write, LockMode::Normal));
        assert!(error.to_string().contains("the host workstation-7"), "{error}");
    }
    locked(open(&path, true, LockMode::SharedRead));
    open(&path, false, LockMode::SharedRead).unwrap();
    open(&path, true, LockMode::None).unwrap();
    // A file of that name is nothing, nor is the directory beside another kind of image.
    std::fs::write(scratch.path().join("other.vmdk.lck"), []).unwrap();
    std::fs::write(scratch.path().join("other.vmdk"), []).unwrap();
    open(&scratch.path().join("other.vmdk"), true, LockMode::Normal).unwrap();
}

/// Another process that holds these bytes as QEMU does, or tells which of them are held.
fn signs(path: &Path, hold: &[u64]) -> (Child, String) {
    const SCRIPT: &str = "
import fcntl, struct, sys
f = open(sys.argv[1], 'r+b')
def lock(command, kind, byte):
    answer = fcntl.fcntl(f, command, struct.pack('hhqqi4x', kind, 0, byte, 1, 0))
    return struct.unpack('hhqqi4x', answer)[0]
for byte in sys.argv[2:]: lock(37, fcntl.F_RDLCK, int(byte))
held = [b for b in (100, 101, 102, 103, 104, 200, 201, 202, 203, 204) if lock(36, fcntl.F_WRLCK, b) != fcntl.F_UNLCK]
print(*held, flush=True)
sys.stdin.read()";
    python(SCRIPT, path, hold)
}

/// Runs `script` with the file and numbers as its arguments; gives it, still running, and the line that it printed first.
fn python(script: &str, path: &Path, numbers: &[u64]) -> (Child, String) {
    let mut child = Command::new("/usr/bin/python3")
        .args(["-c", script, path.to_str().unwrap()])
        .args(numbers.iter().map(u64::to_string))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("/usr/bin/python3 is needed (Debian package python3): {e}"));
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    (child, line.trim_end().to_owned())
}

#[test]
fn writers_that_share_go_together_and_with_nobody_else() {
    let scratch = scratch();
    let path = scratch.path().join("disk.raw");
    std::fs::write(&path, [0; 4096]).unwrap();
    let share = || open(&path, true, LockMode::SharedWrite);
    let sharers: Vec<_> = (0..20).map(|_| share().unwrap()).collect();
    let error = locked(open(&path, true, LockMode::Normal));
    assert!(error.to_string().contains("open for writing by this process itself"), "{error}");
    locked(open(&path, false, LockMode::Normal));
    // Who reads in this mode depends on nobody's writing.
    locked(open(&path, false, LockMode::SharedWrite));
    open(&path, false, LockMode::SharedRead).unwrap();
    drop(sharers);
    let writer = open(&path, true, LockMode::Normal).unwrap();
    let error = locked(share());
    assert!(error.to_string().contains("open for writing"), "{error}");
    drop(writer);
    let reader = open(&path, false, LockMode::Normal).unwrap();
    let error = locked(share());
    assert!(error.to_string().contains("lets nobody else write it"), "{error}");
    drop(reader);
    share().unwrap();
}

#[test]
fn who_shares_writing_gives_the_signs_of_a_qemu_device_that_does() {
    let scratch = scratch();
    let path = scratch.path().join("disk.raw");
    std::fs::write(&path, [0; 4096]).unwrap();
    let end = |(mut child, _): (Child, String)| {
        drop(child.stdin.take());
        child.wait().unwrap();
    };
    let sharer = open(&path, true, LockMode::SharedWrite).unwrap();
    let looking = signs(&path, &[]);
    assert_eq!(looking.1, "100 101 203");
    end(looking);
    drop(sharer);
    // Beside such a device; beside one that does not share writing, lets nobody read, or changes the length: not.
    for (hold, is_welcome) in [
        (&[100, 101, 203][..], true),
        (&[100, 101], true),
        (&[100, 101, 201, 203], false),
        (&[100, 201], false),
        (&[200], false),
        (&[100, 101, 103], false),
    ] {
        let device = signs(&path, hold);
        match is_welcome {
            true => drop(open(&path, true, LockMode::SharedWrite).unwrap()),
            false => drop(locked(open(&path, true, LockMode::SharedWrite))),
        }
        if hold.contains(&101) {
            locked(open(&path, true, LockMode::Normal));
        }
        end(device);
    }
}

#[test]
fn who_shares_writing_around_the_cache_writes_whole_blocks_only() {
    let scratch = scratch();
    let path = scratch.path().join("disk.raw");
    std::fs::write(&path, [7; 65536]).unwrap();
    for driver in [Driver::Inline, Driver::Pool, Driver::Uring] {
        let direct = |lock| {
            let options = OpenOptions { write: true, direct: true, driver, lock, ..OpenOptions::default() };
            LocalFile::open(&path, &options).unwrap()
        };
        let write = |file: &LocalFile, at, bytes: &[u8]| {
            file.write_at(Buf::copy_of(bytes), at, WriteFlags::default()).wait().1
        };
        let sharer = direct(LockMode::SharedWrite);
        write(&sharer, 8192, &[1; 8192]).unwrap();
        let error = write(&sharer, 4096, &[2; 100]).unwrap_err();
        assert_eq!((error.code(), error.offset()), (Code::Usage, Some(4096)), "{error:?}");
        drop(sharer);
        write(&direct(LockMode::Normal), 4096, &[3; 100]).unwrap();
        let mut expected = vec![7; 65536];
        expected[8192..16384].fill(1);
        expected[4096..4196].fill(3);
        assert!(std::fs::read(&path).unwrap() == expected, "{driver:?}");
        std::fs::write(&path, [7; 65536]).unwrap();
    }
}

#[test]
fn the_resolver_locks_what_it_opens() {
    let scratch = scratch();
    let at = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("top"), [0; 512]).unwrap();
    std::fs::write(at("base"), [0; 512]).unwrap();
    let resolver = LocalFiles::new(FilePolicy::default(), OpenOptions::default());
    let open = |name: &str, asker: &Asker, write: bool| {
        resolver.open(name, asker, Access { write, ..Access::default() }).wait()
    };
    let parent = Asker::Parent { of: Location(at("top")) };
    let top = open(&at("top"), &Asker::User, true).unwrap();
    let base = open("base", &parent, false).unwrap();
    // The parent may have other children, but nobody may write it.
    open("base", &parent, false).unwrap();
    let error = open(&at("base"), &Asker::User, true).err().unwrap();
    assert_eq!(error.code(), Code::Locked);
    // A locked parent is about the parent.
    let error = open("top", &parent, false).err().unwrap();
    assert_eq!((error.code(), error.image_name()), (Code::Locked, Some(at("top").as_str())));
    drop((top, base));
    open(&at("base"), &Asker::User, true).unwrap();
    for lock in [LockMode::None, LockMode::SharedRead] {
        let options = OpenOptions { lock, driver: Driver::Inline, ..OpenOptions::default() };
        let unlocked = LocalFiles::new(FilePolicy::default(), options);
        let writer = open(&at("top"), &Asker::User, true).unwrap();
        unlocked.open(&at("top"), &Asker::User, Access::default()).wait().unwrap();
        drop(writer);
    }
}
