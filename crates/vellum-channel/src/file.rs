//! Files, pipes, terminals and devices as channels.

use crate::channel::{
    Base, Channel, Closed, Features, Interest, ReadFlags, WriteFlags, conditions_to_wait_for,
    stream_of_channel,
};
use crate::control::{Control, WakeReader};
use crate::descriptors::Descriptors;
use crate::error::{ErrorKind, error};
use crate::no_shutdown::NoShutdown;
use crate::poll_fd::closed;
use crate::turns::in_turn;
use disk::Disk;
use rustix::fs::{FileType, Mode, OFlags};
use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::runtime::Handle;
pub(crate) use watched::Watched;

mod disk;
mod options;
mod watched;
mod work;

pub use options::FileOptions;

/// A file, by path or by descriptor: regular files, block and character devices, FIFOs, pipes, terminals.
///
/// * It can [`SEEK`](Features::SEEK) if the system can: regular files and block devices. The position is that of the
///   descriptor, shared by reads and writes (and other processes that have the descriptor); positioned reads and writes
///   leave it alone.
/// * It never blocks the executor: pipes and terminals are watched by it; of other files what is in the system's cache is
///   transferred at once, and the rest in the executor's blocking threads. There, what a write reported as written can
///   still be on its way, and fails with the **next write, flush or close**: flush or close before dropping it.
/// * To flush is to hand everything to the kernel. [`File::sync`] makes it durable.
/// * A positioned read that was dropped and is repeated may answer with the bytes of the first time, unless this channel
///   has written in between.
/// * It has no directions to shut down. Tokio's `shutdown` flushes, and closes a pipe opened for writing.
/// * A pipe or terminal that came in blocking mode is non-blocking while the channel has it, for other processes that
///   have the same open file too. (A terminal is opened again where that is allowed, and so left alone.)
#[derive(Debug)]
pub struct File {
    base: Base,
    medium: Medium,
    /// The directions that it is open for.
    access: Interest,
    is_pipe: bool,
    /// A pipe whose writing was ended in order.
    is_write_ended: bool,
    reader: Arc<WakeReader>,
}

#[derive(Debug)]
enum Medium {
    Disk(Disk),
    Watched(Watched),
    /// And whether something went wrong with it.
    Closed(Result<(), (io::ErrorKind, String)>),
}

impl File {
    /// Opens `path`. A FIFO opened for writing waits until somebody reads it.
    ///
    /// # Errors
    /// Those of the system; [`ErrorKind::WrongDescriptor`] for directories.
    pub async fn open(path: impl AsRef<Path>, options: &FileOptions) -> io::Result<Self> {
        let path = path.as_ref();
        let fd = options.open(path).await?;
        let mut file = Self::from_own(fd).map_err(|error| {
            io::Error::new(error.kind(), format!("cannot use {}: {error}", path.display()))
        })?;
        file.set_name(&path.display().to_string());
        if let Medium::Watched(watched) = &mut file.medium {
            watched.set_own();
        }
        Ok(file)
    }

    /// Opens `path` for writing, makes it with the permissions `mode` (less what the process masks) if it is missing,
    /// and throws away what is in it.
    ///
    /// # Errors
    /// As [`File::open`].
    pub async fn create(path: impl AsRef<Path>, mode: u32) -> io::Result<Self> {
        let options = FileOptions {
            write: true,
            create: true,
            truncate: true,
            mode: Some(mode),
            ..FileOptions::default()
        };
        Self::open(path, &options).await
    }

    /// Makes a channel of a descriptor of anything but a socket. Must be called inside of a Tokio runtime.
    ///
    /// # Errors
    /// [`ErrorKind::WrongDescriptor`] for sockets ([`open_fd`](crate::open_fd) takes either) and directories.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        match reopen_terminal(&fd) {
            Some(own) => Self::from_own(own),
            None => Self::from_own(fd),
        }
    }

    /// The same with a duplicate of a descriptor, which stays the caller's.
    ///
    /// # Errors
    /// As [`File::from_fd`].
    pub fn from_dup(fd: impl AsFd) -> io::Result<Self> {
        Self::from_fd(fd.as_fd().try_clone_to_owned()?)
    }

    fn from_own(fd: OwnedFd) -> io::Result<Self> {
        let status = rustix::fs::fstat(&fd)?;
        let mode = rustix::fs::fcntl_getfl(&fd)?;
        let kind = FileType::from_raw_mode(status.st_mode);
        let refused = match kind {
            FileType::Socket => Some("is a socket: use `Socket::from_fd` or `open_fd`"),
            FileType::Directory => Some("is a directory, which is no stream of bytes"),
            _ if mode.contains(OFlags::PATH) => Some("only names a file: open it for reading or writing"),
            _ => None,
        };
        if let Some(why) = refused {
            let message = format!("descriptor {} {why}", fd.as_raw_fd());
            return Err(error(ErrorKind::WrongDescriptor, message));
        }
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
        let is_pipe = kind == FileType::Fifo;
        let has_size = kind == FileType::RegularFile;
        let medium = match kind {
            FileType::RegularFile | FileType::BlockDevice => Medium::Disk(Disk::new(fd, has_size)?),
            _ => watch_or_not(fd, is_pipe)?,
        };
        let mut base = Base::new("file", Features::empty());
        if matches!(&medium, Medium::Disk(disk) if disk.is_seekable) {
            base.add_feature(Features::SEEK);
        }
        let access = match mode & OFlags::ACCMODE {
            OFlags::WRONLY => Interest::WRITE,
            OFlags::RDWR => Interest::all(),
            _ => Interest::READ,
        };
        Ok(Self { base, medium, access, is_pipe, is_write_ended: false, reader: Arc::default() })
    }

    /// The descriptor.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`].
    pub fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        match &self.medium {
            Medium::Disk(disk) => disk.fd(),
            Medium::Watched(watched) => watched.fd(),
            Medium::Closed(_) => Err(closed()),
        }
    }

    /// Waits until all that was written is on the medium, so that it outlives a power cut (`fsync`). For pipes and
    /// terminals the same as flush.
    pub async fn sync(&mut self) -> io::Result<()> {
        poll_fn(|cx| match &mut self.medium {
            Medium::Disk(disk) => disk.poll_sync(cx),
            Medium::Watched(_) => Poll::Ready(Ok(())),
            Medium::Closed(_) => Poll::Ready(Err(closed())),
        })
        .await
    }

    fn check_open(&self) -> io::Result<()> {
        if matches!(self.medium, Medium::Closed(_)) { Err(closed()) } else { Ok(()) }
    }

    fn check_read(&self) -> io::Result<()> {
        self.check_open()?;
        match self.access.contains(Interest::READ) {
            true => Ok(()),
            false => Err(self.unsupported("is open for writing only")),
        }
    }

    fn check_write(&self) -> io::Result<()> {
        self.check_open()?;
        if self.is_write_ended {
            let message = format!("writing to {} has been ended", self.label());
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, message));
        }
        match self.access.contains(Interest::WRITE) {
            true => Ok(()),
            false => Err(self.unsupported("is open for reading only")),
        }
    }

    fn poll_send_buffered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.medium {
            Medium::Disk(disk) => disk.poll_flush(cx),
            Medium::Watched(_) => Poll::Ready(Ok(())),
            Medium::Closed(_) => Poll::Ready(Err(closed())),
        }
    }

    fn poll_end_writing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send_buffered(cx))?;
        if self.is_pipe
            && self.access == Interest::WRITE
            && let Medium::Watched(watched) = &mut self.medium
        {
            self.is_write_ended = true;
            watched.close();
        }
        Poll::Ready(Ok(()))
    }
}

/// A terminal of the system opened anew, so that its mode can be changed without changing that of the programs it is
/// shared with. `None` if it is none, or may not be opened.
fn reopen_terminal(fd: &OwnedFd) -> Option<OwnedFd> {
    let status = rustix::fs::fstat(fd).ok()?;
    let is_character = FileType::from_raw_mode(status.st_mode) == FileType::CharacterDevice;
    // Consoles and the terminals' ends of pseudo-terminals. (Their other ends would be new ones when opened again.)
    if !is_character || !matches!(rustix::fs::major(status.st_rdev), 4 | 136..=143) {
        return None;
    }
    let access = rustix::fs::fcntl_getfl(fd).ok()? & OFlags::ACCMODE;
    let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    rustix::fs::open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags, Mode::empty()).ok()
}

/// Watches the descriptor if the system can, else leaves it to blocking threads.
fn watch_or_not(fd: OwnedFd, is_pipe: bool) -> io::Result<Medium> {
    let mode = rustix::fs::fcntl_getfl(&fd)?;
    match Watched::new(fd.try_clone()?, is_pipe) {
        Ok(watched) => Ok(Medium::Watched(watched)),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            rustix::fs::fcntl_setfl(&fd, mode - OFlags::NONBLOCK)?;
            Ok(Medium::Disk(Disk::new(fd, false)?))
        }
        Err(error) => Err(error),
    }
}

impl Channel for File {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    fn control(&self) -> Control {
        Control::new(Arc::new(NoShutdown("file")), self.reader.clone())
    }

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        _fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        self.check_read()?;
        match &mut self.medium {
            Medium::Watched(watched) => watched.poll_read(cx, bufs, flags),
            Medium::Disk(disk) => {
                in_turn(cx, !flags.contains(ReadFlags::NO_WAIT), |cx| disk.poll_read(cx, bufs))
            }
            Medium::Closed(_) => Poll::Ready(Err(closed())),
        }
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        _fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        self.check_write()?;
        match &mut self.medium {
            Medium::Watched(watched) => watched.poll_write(cx, bufs, flags),
            Medium::Disk(disk) => {
                in_turn(cx, !flags.contains(WriteFlags::NO_WAIT), |cx| disk.poll_write(cx, bufs, None))
            }
            Medium::Closed(_) => Poll::Ready(Err(closed())),
        }
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        self.check_open()?;
        let interest = conditions_to_wait_for(self, interest, self.access)?;
        // Writing that was ended fails at once.
        if self.is_write_ended && interest.contains(Interest::WRITE) {
            return Poll::Ready(Ok(Interest::WRITE));
        }
        match &mut self.medium {
            Medium::Watched(watched) => watched.poll_ready(cx, interest),
            Medium::Disk(disk) => {
                let (reads, writes) = (interest.contains(Interest::READ), interest.contains(Interest::WRITE));
                in_turn(cx, true, |cx| disk.poll_ready(cx, reads, writes)).map_ok(|()| interest)
            }
            Medium::Closed(_) => Poll::Ready(Err(closed())),
        }
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        let outcome = match &mut self.medium {
            Medium::Disk(disk) => ready!(disk.poll_close(cx)),
            Medium::Watched(watched) => {
                watched.close();
                Ok(())
            }
            Medium::Closed(Ok(())) => return Poll::Ready(Ok(Closed::default())),
            Medium::Closed(Err((kind, message))) => {
                return Poll::Ready(Err(io::Error::new(*kind, message.clone())));
            }
        };
        self.medium = Medium::Closed(match &outcome {
            Ok(()) => Ok(()),
            Err(error) => Err((error.kind(), error.to_string())),
        });
        Poll::Ready(outcome.map(|()| Closed::default()))
    }

    fn poll_seek(&mut self, cx: &mut Context<'_>, to: SeekFrom) -> Poll<io::Result<u64>> {
        match &mut self.medium {
            Medium::Disk(disk) if disk.is_seekable => disk.poll_seek(cx, to),
            Medium::Closed(_) => Poll::Ready(Err(closed())),
            _ => Poll::Ready(Err(self.unsupported("cannot seek"))),
        }
    }

    fn poll_preadv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        self.check_read()?;
        match &mut self.medium {
            Medium::Disk(disk) if disk.is_seekable => {
                in_turn(cx, true, |cx| disk.poll_read_at(cx, bufs, offset))
            }
            Medium::Closed(_) => Poll::Ready(Err(closed())),
            _ => Poll::Ready(Err(self.unsupported("has no positions to read at"))),
        }
    }

    fn poll_pwritev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        self.check_write()?;
        match &mut self.medium {
            Medium::Disk(disk) if disk.is_seekable => {
                in_turn(cx, true, |cx| disk.poll_write(cx, bufs, Some(offset)))
            }
            Medium::Closed(_) => Poll::Ready(Err(closed())),
            _ => Poll::Ready(Err(self.unsupported("has no positions to write at"))),
        }
    }

    fn detach(&mut self) -> io::Result<()> {
        match &mut self.medium {
            Medium::Disk(disk) => disk.detach(),
            Medium::Watched(watched) => watched.detach(),
            Medium::Closed(_) => {}
        }
        Ok(())
    }

    fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        match &mut self.medium {
            Medium::Disk(disk) => disk.attach(executor),
            Medium::Watched(watched) => watched.attach(executor)?,
            Medium::Closed(_) => return Err(closed()),
        }
        Ok(())
    }
}

stream_of_channel!([] File);
