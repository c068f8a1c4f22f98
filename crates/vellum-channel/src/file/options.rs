//! How a file is opened.

use crate::error::{ErrorKind, error};
use rustix::fs::{FileType, OFlags};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::runtime::Handle;

/// How often a FIFO is looked at that is opened for writing and that nobody reads yet.
const FIFO_RETRY: Duration = Duration::from_millis(10);

/// How [`File::open`](crate::File::open) opens. The default opens for nothing: say at least `read` or `write`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// For reading.
    pub read: bool,
    /// For writing.
    pub write: bool,
    /// For writing, every write to the end of what is there.
    pub append: bool,
    /// Make it if it is missing.
    pub create: bool,
    /// Make it, and fail if it is there.
    pub create_new: bool,
    /// Throw away what is in it.
    pub truncate: bool,
    /// Permissions of a file that is made, less what the process masks (`umask`); 0666 if not given.
    pub mode: Option<u32>,
}

impl FileOptions {
    /// For reading.
    pub fn read_only() -> Self {
        Self { read: true, ..Self::default() }
    }

    /// For writing to what exists.
    pub fn write_only() -> Self {
        Self { write: true, ..Self::default() }
    }

    /// For reading and writing what exists.
    pub fn read_write() -> Self {
        Self { read: true, write: true, ..Self::default() }
    }

    fn system(&self) -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(self.read).write(self.write).append(self.append);
        options.create(self.create).create_new(self.create_new).truncate(self.truncate);
        // Never wait for the other end of a FIFO, or the carrier of a line, in a thread that nobody can interrupt; and
        // never become the session that a terminal controls.
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        options.custom_flags(flags.bits().cast_signed()).mode(self.mode.unwrap_or(0o666));
        options
    }

    /// Opens `path` in a blocking thread. A FIFO for writing waits for its reader.
    pub(super) async fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        if Handle::try_current().is_err() {
            let message =
                format!("{} must be opened inside of a Tokio runtime: enter one first", path.display());
            return Err(error(ErrorKind::Detached, message));
        }
        loop {
            match self.open_now(path.to_owned()).await? {
                Some(fd) => return Ok(fd),
                None => tokio::time::sleep(FIFO_RETRY).await,
            }
        }
    }

    /// `None` for a FIFO that nobody reads yet.
    async fn open_now(&self, path: PathBuf) -> io::Result<Option<OwnedFd>> {
        let options = self.system();
        let opening = tokio::task::spawn_blocking(move || match options.open(&path) {
            Ok(file) => Ok(Some(OwnedFd::from(file))),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) && is_fifo(&path) => Ok(None),
            Err(error) => {
                let message = format!("cannot open {}: {error}", path.display());
                Err(io::Error::new(error.kind(), message))
            }
        });
        let fd = opening.await.map_err(io::Error::other)??;
        if let Some(fd) = &fd {
            set_blocking_if_regular(fd)?;
        }
        Ok(fd)
    }
}

fn is_fifo(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo())
}

/// Non-blocking mode means nothing to regular files; takes it back all the same, for those the descriptor is passed to.
fn set_blocking_if_regular(fd: &OwnedFd) -> io::Result<()> {
    if FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) == FileType::RegularFile {
        let mode = rustix::fs::fcntl_getfl(fd)?;
        rustix::fs::fcntl_setfl(fd, mode - OFlags::NONBLOCK)?;
    }
    Ok(())
}
