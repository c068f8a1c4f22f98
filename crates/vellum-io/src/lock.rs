//! Locks between processes, in QEMU's scheme, so that Vellum and QEMU keep each other out.
//!
//! Every use of an image is a number: 0 read, 1 write, 2 write without changing what a guest sees, 3 change the
//! length. Who uses an image in that way holds byte `100 + number` of the file; who does not let others use it in that
//! way holds byte `200 + number`. All hold these bytes *shared*: bytes are signs, not gates. Whether somebody else holds
//! the opposite byte is asked for with a write lock that is never taken.
//!
//! ```text
//!             holds                  must find nobody at
//!   writer    100 101 103  201 203   101 103  201 203  200
//!   reader    100          201 203   101 103           200
//!   shares    100 101          203       103  201      200
//! ```
//!
//! The last is a writer that shares writing: it does not hold 201, and does not mind others at 101. It never changes the
//! length, so it does not hold 103, but keeps those out that would; a device of QEMU with `share-rw=on` over an image of
//! fixed length does the same, and the two go together.
//!
//! Both signs are set first and then it is looked; so of two that begin at the same time, at least one sees the other.
//! If both do, both take their signs back and try again after a random time.
//!
//! The locks are those of the open file (OFD): they last until its descriptor is closed, whatever becomes of other
//! descriptors of the same file in the process. Two handles in one process are two users like any other.

use crate::holder;
use crate::sys::{self, Found};
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use std::hash::{BuildHasher, Hasher};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vellum_core::{Code, Error, Result};

/// How the user of a file and its users in other processes are kept apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LockMode {
    /// One writer, or any number of readers.
    #[default]
    Normal,
    /// Reads although somebody may be writing: what is read may be inconsistent. For writing the same as
    /// [`LockMode::Normal`].
    SharedRead,
    /// Writes together with others that do so as well (QEMU's `share-rw=on`), and keeps all out that do not; for images
    /// whose writing changes no table and no length. For reading the same as [`LockMode::Normal`].
    SharedWrite,
    /// Locks are neither taken nor looked at. Two writers destroy an image.
    None,
}

/// Bytes that are held, and bytes at which nobody else may be found.
struct Signs {
    hold: &'static [u64],
    test: &'static [u64],
}

// Writers are looked for first: of two reasons this is the one that a user understands.
const WRITER: Signs = Signs { hold: &[100, 101, 103, 201, 203], test: &[101, 103, 201, 203, 200] };
const SHARED_WRITER: Signs = Signs { hold: &[100, 101, 203], test: &[103, 201, 200] };
const READER: Signs = Signs { hold: &[100, 201, 203], test: &[101, 103, 200] };
const SHARED_READER: Signs = Signs { hold: &[100], test: &[] };
/// All bytes that are ever held.
const ALL: (u64, u64) = (100, 104);
/// Bytes from here on say what their holder does not let others do.
const DENIED: u64 = 200;

/// How often it is tried again after somebody was found.
const RETRIES: usize = 3;
/// Milliseconds that are waited before, at random.
const WAIT_MS: std::ops::Range<u64> = 10..51;

/// Takes the locks of a user that opens the file `fd`; they last until it is closed.
///
/// Gives a warning for the user, if there is something to warn of.
pub(crate) fn take(fd: BorrowedFd<'_>, name: &str, write: bool, mode: LockMode) -> Result<Option<String>> {
    let signs = match (mode, write) {
        (LockMode::None, _) => return Ok(None),
        (LockMode::SharedWrite, true) => SHARED_WRITER,
        (_, true) => WRITER,
        (LockMode::Normal | LockMode::SharedWrite, false) => READER,
        (LockMode::SharedRead, false) => {
            // Nothing depends on it: it only tells others that somebody reads.
            let _ = SHARED_READER.set_and_look(fd);
            return Ok(Some(format!(
                "{name}: opened without keeping writers out; what is read may be inconsistent"
            )));
        }
    };
    let mut found = None;
    for attempt in 0..=RETRIES {
        if attempt > 0 {
            std::thread::sleep(random_wait());
        }
        match signs.set_and_look(fd) {
            Ok(None) => return Ok(None),
            Ok(somebody) => found = somebody,
            Err(errno) => return no_locks(name, errno, write),
        }
    }
    Err(refused(fd, name, write, found))
}

impl Signs {
    /// Sets the signs and looks for somebody in the way; if there is somebody, the signs are taken back.
    fn set_and_look(&self, fd: BorrowedFd<'_>) -> rustix::io::Result<Option<InTheWay>> {
        let outcome = self.set(fd).and_then(|in_the_way| match in_the_way {
            None => self.look(fd),
            somebody => Ok(somebody),
        });
        if !matches!(outcome, Ok(None)) {
            // What cannot be taken back goes when the file is closed, which is about to happen.
            let _ = sys::unlock(fd, ALL.0, ALL.1);
        }
        outcome
    }

    fn set(&self, fd: BorrowedFd<'_>) -> rustix::io::Result<Option<InTheWay>> {
        for byte in self.hold {
            match sys::lock_shared(fd, *byte, 1) {
                Ok(()) => {}
                // Not a sign but a real write lock: somebody wants the file for himself.
                Err(Errno::AGAIN | Errno::ACCESS) => {
                    let pid = sys::find_lock(fd, *byte).ok().flatten().and_then(|found| found.pid);
                    return Ok(Some(InTheWay { byte: *byte, pid }));
                }
                Err(errno) => return Err(errno),
            }
        }
        Ok(None)
    }

    fn look(&self, fd: BorrowedFd<'_>) -> rustix::io::Result<Option<InTheWay>> {
        for byte in self.test {
            if let Some(Found { pid }) = sys::find_lock(fd, *byte)? {
                return Ok(Some(InTheWay { byte: *byte, pid }));
            }
        }
        Ok(None)
    }
}

/// Who was found.
#[derive(Clone, Copy)]
struct InTheWay {
    byte: u64,
    /// Known for locks that belong to a process, not for those of an open file.
    pid: Option<u32>,
}

fn random_wait() -> Duration {
    // Seeded by the system anew for every state.
    let random = std::hash::RandomState::new().build_hasher().finish();
    Duration::from_millis(WAIT_MS.start + random % (WAIT_MS.end - WAIT_MS.start))
}

/// The file system has no locks (NFS without its lock daemon, for one).
fn no_locks(name: &str, errno: Errno, write: bool) -> Result<Option<String>> {
    let known = matches!(errno, Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL);
    match (known, write) {
        (false, _) => Err(crate::raw::os(name, errno, "locking the image")),
        (true, false) => {
            Ok(Some(format!("{name}: there are no locks here ({errno}); nobody is kept from writing")))
        }
        (true, true) => Err(Error::new(
            Code::Locked,
            "there are no locks here, so nobody can be kept from writing at the same time",
        )
        .image(name)
        .found(errno)
        .hint("write to a copy on a local disk; if it is certain that nobody else writes it, use --no-lock")),
    }
}

#[cold]
fn refused(fd: BorrowedFd<'_>, name: &str, write: bool, found: Option<InTheWay>) -> Error {
    let byte = found.map_or(0, |found| found.byte);
    let who = holder::name(fd, byte, found.and_then(|found| found.pid));
    let what = match (byte >= DENIED, write) {
        (false, _) => format!("the image is open for writing by {who}"),
        (true, true) => format!("the image is in use by {who}, which lets nobody else write it"),
        (true, false) => format!("the image is in use by {who}, which lets nobody else read it"),
    };
    Error::new(Code::Locked, what).image(name).hint(match write {
        true => "wait until that has ended; --no-lock would go on all the same, and two writers destroy an image",
        false => "wait until that has ended; --shared-read reads all the same, but maybe inconsistent data (or --no-lock)",
    })
}

/// Refuses what VMware has locked: it puts a directory `disk.vmdk.lck` beside a disk that it uses.
pub(crate) fn check_vmware(path: &Path, name: &str) -> Result<()> {
    let is_vmdk = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("vmdk"));
    if !is_vmdk {
        return Ok(());
    }
    let mut directory = path.as_os_str().to_owned();
    directory.push(".lck");
    let directory = PathBuf::from(directory);
    if !std::fs::symlink_metadata(&directory).is_ok_and(|found| found.is_dir()) {
        return Ok(());
    }
    let who = vmware_holder(&directory).unwrap_or_else(|| "a VMware product".to_owned());
    Err(Error::new(Code::Locked, format!("the image is locked by {who}"))
        .image(name)
        .found(directory.display())
        .hint("shut the virtual machine down; if there is none any more, delete the directory, or use --no-lock"))
}

/// What the lock files in VMware's directory say: machine, process, and more, divided by spaces.
fn vmware_holder(directory: &Path) -> Option<String> {
    for entry in std::fs::read_dir(directory).ok()?.take(64).flatten() {
        let file_name = entry.file_name();
        let is_member = file_name.as_encoded_bytes().first() == Some(&b'M');
        if !is_member || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        let mut text = Vec::new();
        std::fs::File::open(entry.path()).ok()?.take(512).read_to_end(&mut text).ok()?;
        let text = String::from_utf8_lossy(&text);
        let mut words = text.trim_end_matches('\0').split_whitespace();
        let machine = words.next()?;
        return Some(match words.next() {
            Some(process) => format!("VMware on the host {machine} (process {process})"),
            None => format!("VMware on the host {machine}"),
        });
    }
    None
}
