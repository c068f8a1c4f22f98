//! The path of a listening Unix socket: made with its permissions, removed by who made it.

use super::{address, new_socket};
use crate::endpoint::Endpoint;
use crate::error::{ErrorKind, error};
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use socket2::{SockAddr, SockRef};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

/// A path that this process has bound a socket to, and the inode that it made there. Removed when dropped, which must be
/// before the socket is: as long as it is open, no other file gets the same inode.
#[derive(Debug)]
pub(super) struct BoundPath {
    path: PathBuf,
    device: u64,
    inode: u64,
    is_removed: bool,
}

impl BoundPath {
    /// Binds `socket` to `path`. Nobody can connect yet: that takes `listen`.
    pub fn bind(
        socket: BorrowedFd<'_>,
        path: &Path,
        mode: Option<u32>,
        unlink_existing: bool,
    ) -> io::Result<Self> {
        let address = address::to_system(&Endpoint::UnixPath(path.to_owned()))?;
        // The path may be removed from another working directory.
        let absolute = std::path::absolute(path)?;
        let mode = mode.map(Mode::from_raw_mode);
        if let Some(mode) = mode {
            // The kernel makes the inode with the socket's own mode, less the umask: never with more than was asked for.
            rustix::fs::fchmod(socket, mode)?;
        }
        match SockRef::from(&socket).bind(&address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && unlink_existing => {
                remove_dead(path, &address)?;
                SockRef::from(&socket).bind(&address)?;
            }
            done => done?,
        }
        let made = rustix::fs::lstat(&absolute)?;
        let bound = Self { path: absolute, device: made.st_dev, inode: made.st_ino, is_removed: false };
        if let Some(mode) = mode
            && Mode::from_raw_mode(made.st_mode) != mode
        {
            bound.set_mode(mode)?;
        }
        Ok(bound)
    }

    /// Gives back the bits that the umask took. By the inode, not by the path: that could be something else by now.
    fn set_mode(&self, mode: Mode) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::open(&self.path, flags, Mode::empty())?;
        if self.is_made(&rustix::fs::fstat(&made)?) {
            rustix::fs::chmod(format!("/proc/self/fd/{}", made.as_raw_fd()), mode)?;
        }
        Ok(())
    }

    /// Removes the path if what is there is what was made.
    pub fn remove(mut self) -> io::Result<()> {
        self.remove_made()
    }

    fn remove_made(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.is_removed, true) {
            return Ok(());
        }
        let removed = match rustix::fs::lstat(&self.path) {
            Ok(found) if self.is_made(&found) => rustix::fs::unlink(&self.path),
            found => found.map(drop),
        };
        match removed {
            Err(Errno::NOENT) => Ok(()),
            done => Ok(done?),
        }
    }

    fn is_made(&self, stat: &Stat) -> bool {
        is_socket(stat) && (stat.st_dev, stat.st_ino) == (self.device, self.inode)
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        if let Err(error) = self.remove_made() {
            tracing::warn!(path = %self.path.display(), %error, "the path of a listening socket stays");
        }
    }
}

fn is_socket(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Socket
}

/// Removes a socket on which nobody answers.
fn remove_dead(path: &Path, address: &SockAddr) -> io::Result<()> {
    let in_use = |why: &str| {
        error(
            ErrorKind::Listen,
            format!("{path:?} {why}: choose another path, or remove it if it is not needed"),
        )
    };
    let before = match rustix::fs::lstat(path) {
        Err(Errno::NOENT) => return Ok(()),
        found => found?,
    };
    if !is_socket(&before) {
        return Err(in_use("exists and is not a socket"));
    }
    let probe = new_socket(address.domain())?;
    match SockRef::from(&probe).connect(address) {
        Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        // Somebody answered, or has a full backlog, or is a socket of another type.
        _ => return Err(in_use("is in use: somebody answers there")),
    }
    match rustix::fs::lstat(path) {
        Ok(now) if (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino) => {
            Ok(rustix::fs::unlink(path)?)
        }
        Ok(_) => Err(in_use("has just been made by somebody else")),
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
