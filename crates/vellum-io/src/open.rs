//! Opening files without surprises.
//!
//! A name is first turned into a file without opening it (`O_PATH`): a FIFO cannot hang, a device is not touched, and what
//! is checked is what is opened afterwards, whatever happens to the name in between.

use crate::context::{Driver, IoContext};
use crate::file::LocalFile;
use crate::lock::{self, LockMode};
use crate::raw::{Direct, FileKind, RawFile, os};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{
    Advice, AtFlags, CWD, FileType, Mode, OFlags, Stat, StatxFlags, fadvise, fstat, openat, statx,
};
use rustix::io::{Errno, retry_on_intr};
use std::path::{Path, PathBuf};
use vellum_core::{BUF_ALIGN, Code, Error, Events, Result};

/// Whether opening may make the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Create {
    /// The file must exist.
    #[default]
    No,
    /// The file must not exist.
    New,
    /// A regular file that exists is emptied. A symbolic link is refused, never followed.
    Replace,
}

/// How a file is opened.
#[derive(Clone, Default)]
pub struct OpenOptions {
    /// For reading and writing; else for reading. Implied by creating.
    pub write: bool,
    /// Whether the file may be made.
    pub create: Create,
    /// How users of the file in other processes (and other handles in this one) are kept out as long as this handle
    /// lives. `LOCKED` if one is there already.
    pub lock: LockMode,
    /// Go around the page cache (`O_DIRECT`). Where the file system cannot, a warning says so and the cache is used.
    pub direct: bool,
    /// A hint: the file will be read or written mostly from its start to its end, so the system is asked to read further
    /// ahead. Without effect where there is no page cache (`direct`).
    pub sequential: bool,
    /// Who carries requests out.
    pub driver: Driver,
    /// Threads and ring; those that all files share if `None`.
    pub context: Option<IoContext>,
}

impl OpenOptions {
    fn warn(&self, message: &str) {
        match &self.context {
            Some(context) => context.events().warn(message),
            None => Events::default().warn(message),
        }
    }
}

impl LocalFile {
    /// Opens a regular file or a block device. Anything else (directory, FIFO, socket, character device) is refused
    /// without being opened.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<LocalFile> {
        let path = path.as_ref();
        let name = path.display().to_string();
        match options.create {
            Create::No => Found::at(path, OFlags::empty())
                .and_then(|found| found.open(name.clone(), options))
                .map_err(|e| e.image(&name)),
            Create::New => create(path, &name, false, options),
            Create::Replace => create(path, &name, true, options),
        }
    }
}

/// A file that was found by its name and is not open yet.
pub(crate) struct Found {
    handle: OwnedFd,
    stat: Stat,
    path: PathBuf,
}

impl Found {
    /// Finds what is at `path`. Touches nothing.
    pub(crate) fn at(path: &Path, more: OFlags) -> Result<Found> {
        let name = || path.display().to_string();
        if path.as_os_str().as_encoded_bytes().contains(&0) {
            return Err(Error::new(Code::NulInName, "a file name cannot hold a NUL byte").found(name()));
        }
        let flags = OFlags::PATH | OFlags::CLOEXEC | more;
        let handle = retry_on_intr(|| openat(CWD, path, flags, Mode::empty())).map_err(|e| match e {
            Errno::NOENT | Errno::NOTDIR => Error::new(Code::NotFound, "there is no such file").image(name()),
            Errno::NAMETOOLONG => Error::new(Code::NotFound, "no file can have so long a name").image(name()),
            Errno::LOOP => Error::new(Code::NotFound, "its symbolic links lead in a circle").image(name()),
            errno => os(&name(), errno, "opening"),
        })?;
        let stat = fstat(&handle).map_err(|e| os(&name(), e, "asking for the file's attributes"))?;
        Ok(Found { handle, stat, path: path.to_owned() })
    }

    /// What kind of storage it is, or in words what it is instead.
    pub(crate) fn kind(&self) -> std::result::Result<FileKind, &'static str> {
        match FileType::from_raw_mode(self.stat.st_mode) {
            FileType::RegularFile => Ok(FileKind::Regular),
            FileType::BlockDevice => Ok(FileKind::Block),
            FileType::Directory => Err("a directory"),
            FileType::Fifo => Err("a FIFO"),
            FileType::Socket => Err("a socket"),
            FileType::CharacterDevice => Err("a character device"),
            FileType::Symlink => Err("a symbolic link"),
            _ => Err("no regular file"),
        }
    }

    /// Where it is: absolute, without symbolic links. The kernel's own answer if there is `/proc`.
    pub(crate) fn canonical(&self) -> Result<PathBuf> {
        let here = |path: &PathBuf| {
            rustix::fs::stat(path).is_ok_and(|s| (s.st_dev, s.st_ino) == (self.stat.st_dev, self.stat.st_ino))
        };
        // The link of a deleted file names something that is not there, or not this file.
        let found = std::fs::read_link(self.link()).ok().filter(here);
        found.or_else(|| std::fs::canonicalize(&self.path).ok().filter(here)).ok_or_else(|| {
            Error::new(Code::NotFound, "the file was moved or deleted while it was being opened")
                .image(self.path.display())
        })
    }

    fn link(&self) -> String {
        format!("/proc/self/fd/{}", self.handle.as_raw_fd())
    }

    /// Opens exactly this file.
    fn descriptor(&self, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        match retry_on_intr(|| openat(CWD, self.link(), flags, Mode::empty())) {
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            opened => return opened,
        }
        // No /proc: by name, then, and see whether it is still the same file. O_NONBLOCK in case it is a FIFO by now.
        let flags = flags | OFlags::NONBLOCK;
        let opened = retry_on_intr(|| openat(CWD, &self.path, flags, Mode::empty()))?;
        let stat = fstat(&opened)?;
        if (stat.st_dev, stat.st_ino) != (self.stat.st_dev, self.stat.st_ino) {
            return Err(Errno::STALE);
        }
        rustix::fs::fcntl_setfl(&opened, flags - OFlags::NONBLOCK)?;
        Ok(opened)
    }

    /// Opens it as a storage that messages call `name`.
    pub(crate) fn open(&self, name: String, options: &OpenOptions) -> Result<LocalFile> {
        let kind = self.kind().map_err(|what| {
            Error::new(Code::Usage, format!("this is {what}; an image is a regular file or a block device"))
                .image(&name)
        })?;
        let write = options.write || options.create != Create::No;
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let doing = if write { "opening for writing" } else { "opening" };
        let fd = self.descriptor(access).map_err(|e| os(&name, e, doing))?;
        self.lock(&fd, &name, write, options)?;
        if options.sequential {
            // Advice: a file system that takes none is as good without. It counts for this handle only.
            let _ = advise(&fd, Advice::Sequential);
        }
        let direct = match options.direct {
            false => None,
            true => {
                let direct = self.descriptor(access | OFlags::DIRECT);
                let direct = direct.ok().and_then(|fd| around_the_cache(fd, kind));
                if direct.is_none() {
                    options.warn(&format!("{name}: direct I/O is not possible here; using the page cache"));
                }
                direct
            }
        };
        let shares_writing = write && options.lock == LockMode::SharedWrite;
        let file = RawFile::new(name, fd, direct, kind, write, shares_writing)?;
        Ok(LocalFile::new(file, options.driver, options.context.as_ref()))
    }

    /// Keeps others out until `fd` is closed.
    fn lock(&self, fd: &OwnedFd, name: &str, write: bool, options: &OpenOptions) -> Result<()> {
        if options.lock == LockMode::Normal || (write && options.lock != LockMode::None) {
            lock::check_vmware(&self.canonical().unwrap_or_else(|_| self.path.clone()), name)?;
        }
        if let Some(warning) = lock::take(fd.as_fd(), name, write, options.lock)? {
            options.warn(&warning);
        }
        Ok(())
    }
}

/// Says how the whole file will be used.
fn advise(fd: &OwnedFd, advice: Advice) -> rustix::io::Result<()> {
    #[cfg(test)]
    tests::ADVISED.set(tests::ADVISED.get() + 1);
    fadvise(fd, 0, None, advice)
}

/// What direct requests to `fd` must look like; `None` if there can be none.
fn around_the_cache(fd: OwnedFd, kind: FileKind) -> Option<Direct> {
    let told = statx(&fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let told = told.filter(|stat| stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    let (offset, memory) = match told {
        Some(stat) => (stat.stx_dio_offset_align, stat.stx_dio_mem_align),
        // Kernels before 6.1 do not say. A device's own blocks are right for it, 4 KiB for any file system.
        None if kind == FileKind::Block => (rustix::fs::ioctl_blksszget(&fd).ok()?, 4096),
        None => (4096, 4096),
    };
    let (alignment, memory_alignment) = (u64::from(offset).max(512), usize::try_from(memory).ok()?.max(1));
    let usable = offset != 0
        && alignment.is_power_of_two()
        && alignment <= 64 << 10
        && memory_alignment.is_power_of_two()
        && memory_alignment <= BUF_ALIGN;
    usable.then_some(Direct { fd, alignment, memory_alignment })
}

fn create(path: &Path, name: &str, replace: bool, options: &OpenOptions) -> Result<LocalFile> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOCTTY;
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(Error::new(Code::NulInName, "a file name cannot hold a NUL byte").found(name));
    }
    // Between finding and making, the file may come and go; not for ever.
    for _ in 0..16 {
        match retry_on_intr(|| openat(CWD, path, flags, Mode::from_raw_mode(0o666))) {
            Ok(made) => return made_file(made, path)?.open(name.to_owned(), options),
            Err(Errno::EXIST) if replace => {}
            Err(errno) => return Err(os(name, errno, "creating")),
        }
        let found = match Found::at(path, OFlags::NOFOLLOW) {
            Err(error) if error.code() == Code::NotFound => continue,
            found => found?,
        };
        if found.kind() != Ok(FileKind::Regular) {
            let what = found.kind().err().unwrap_or("a block device");
            return Err(Error::new(Code::Usage, format!("cannot replace this: it is {what}")).image(name));
        }
        let file = found.open(name.to_owned(), options)?;
        vellum_core::Storage::set_len(&file, 0, vellum_core::Preallocate::Off).wait()?;
        return Ok(file);
    }
    Err(Error::new(Code::Locked, "another process keeps creating and deleting it").image(name))
}

/// A file that was just made, as one that was found.
fn made_file(handle: OwnedFd, path: &Path) -> Result<Found> {
    let stat = fstat(&handle).map_err(|e| os(&path.display().to_string(), e, "creating"))?;
    Ok(Found { handle, stat, path: path.to_owned() })
}

/// Makes names in the directory at `path` durable.
pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    let name = || path.display().to_string();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = retry_on_intr(|| openat(CWD, path, flags, Mode::empty()))
        .map_err(|e| os(&name(), e, "opening the directory"))?;
    match retry_on_intr(|| rustix::fs::fsync(&directory)) {
        // Some network file systems have nothing to flush there and say so.
        Ok(()) | Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(()),
        Err(errno) => Err(os(&name(), errno, "flushing the directory")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        /// How often the system was told how a file will be used, on this thread.
        pub(super) static ADVISED: Cell<usize> = const { Cell::new(0) };
    }

    #[test]
    fn a_file_that_is_read_in_order_is_said_to_be_and_no_other() {
        let directory = std::env::temp_dir().join(format!("vellum-advice-{}", std::process::id()));
        std::fs::write(&directory, [7; 4096]).unwrap();
        let told = |sequential| {
            let before = ADVISED.get();
            LocalFile::open(&directory, &OpenOptions { sequential, ..OpenOptions::default() }).unwrap();
            ADVISED.get() - before
        };
        assert_eq!((told(false), told(true)), (0, 1));
        // What is advised is understood.
        let file: OwnedFd = std::fs::File::open(&directory).unwrap().into();
        advise(&file, Advice::Sequential).unwrap();
        std::fs::remove_file(&directory).unwrap();
    }
}
