//! Channels of descriptors that this process was given.

use crate::channel::Channel;
use crate::file::File;
use rustix::fs::FileType;
use std::io;
use std::os::fd::OwnedFd;

/// The channel that fits the descriptor: a [`Socket`](crate::Socket) for sockets, a [`File`] for everything else.
///
/// Must be called inside of a Tokio runtime.
///
/// # Errors
/// [`ErrorKind::WrongDescriptor`](crate::ErrorKind::WrongDescriptor) for what is no stream of bytes: directories,
/// datagram sockets.
pub fn open_fd(fd: OwnedFd) -> io::Result<Box<dyn Channel>> {
    let status = rustix::fs::fstat(&fd)?;
    if FileType::from_raw_mode(status.st_mode) == FileType::Socket {
        return Ok(Box::new(crate::Socket::from_fd(fd)?));
    }
    Ok(Box::new(File::from_fd(fd)?))
}
