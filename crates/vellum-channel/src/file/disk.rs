//! Files that no executor can watch: regular files, block devices, a few character devices.
//!
//! What the kernel can do without waiting (pages in its cache) is done at once; the rest goes to the executor's blocking
//! threads, one piece of work at a time, and outlives the operation that asked for it:
//! * bytes that a dropped read has fetched are given to the next one, or are *unread* by moving the position back;
//! * bytes are copied for a write, which is reported with that: an error shows in the next write, flush or close.

use super::work::{CHUNK, Slot, Task, Waiter, Work};
use crate::error::{ErrorKind, error};
use crate::poll_fd::closed;
use crate::stream::scatter;
use rustix::fs::SeekFrom as Seek;
use rustix::io::{Errno, ReadWriteFlags};
use std::io::{self, IoSlice, IoSliceMut, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::runtime::Handle;

/// "At the position of the descriptor", to `preadv2` and `pwritev2`.
const HERE: u64 = u64::MAX;

#[derive(Debug)]
pub(super) struct Disk {
    /// `None` once closed.
    fd: Option<Arc<OwnedFd>>,
    executor: Option<Handle>,
    slot: Arc<Slot>,
    /// It has a position.
    pub(super) is_seekable: bool,
    /// Its size is in its status, as that of regular files.
    has_size: bool,
    /// The kernel can be asked to read, and to write, without waiting.
    reads_now: bool,
    writes_now: bool,
    /// Read at the position and not yet reported: `ahead[taken..]`.
    ahead: Vec<u8>,
    taken: usize,
    /// The reading ahead found this after them: the end, or an error.
    ahead_end: Option<io::Result<()>>,
    /// What the last work other than a write or a read at the position found.
    found: Option<(Task, io::Result<u64>, Vec<u8>)>,
    /// A write that was reported has failed.
    failed: Option<io::Error>,
    /// Memory of the last piece of work, for the next.
    spare: Vec<u8>,
}

impl Disk {
    pub(super) fn new(fd: OwnedFd, has_size: bool) -> io::Result<Self> {
        let executor = Handle::try_current().map_err(|_| {
            error(ErrorKind::Detached, "a channel is made inside of a Tokio runtime: enter one first")
        })?;
        Ok(Self {
            is_seekable: rustix::fs::seek(&fd, Seek::Current(0)).is_ok(),
            has_size,
            fd: Some(Arc::new(fd)),
            executor: Some(executor),
            slot: Arc::default(),
            reads_now: true,
            writes_now: true,
            ahead: Vec::new(),
            taken: 0,
            ahead_end: None,
            found: None,
            failed: None,
            spare: Vec::new(),
        })
    }

    pub(super) fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        Ok(self.fd.as_ref().ok_or_else(closed)?.as_fd())
    }

    /// Waits until no work is under way, and takes in what it found.
    fn poll_settle(&mut self, cx: &mut Context<'_>, waiter: Waiter) -> Poll<io::Result<()>> {
        if self.slot.is_idle() {
            return Poll::Ready(Ok(()));
        }
        if self.slot.is_dropped() {
            self.move_on();
        }
        if self.executor.is_none() && self.slot.is_running() {
            return Poll::Ready(Err(error(
                ErrorKind::Detached,
                "the file is still being worked on, but it is detached from its executor: attach it to one",
            )));
        }
        let (mut work, result) = ready!(self.slot.poll_done(cx, waiter))?;
        match (work.task, result) {
            (Task::Read, Ok(count)) => {
                work.bytes.truncate(usize::try_from(count).unwrap_or(usize::MAX));
                self.ahead_end = work.bytes.is_empty().then_some(Ok(()));
                self.spare = std::mem::replace(&mut self.ahead, work.bytes);
                self.taken = 0;
            }
            (Task::Read, Err(error)) => self.ahead_end = Some(Err(error)),
            (Task::Write | Task::WriteAt(_), result) => {
                self.spare = work.bytes;
                if let Err(error) = result {
                    self.failed.get_or_insert(error);
                }
            }
            (task, result) => self.found = Some((task, result, work.bytes)),
        }
        Poll::Ready(Ok(()))
    }

    /// Takes the work that an executor left undone when it ended to the one that is in use now.
    fn move_on(&mut self) {
        if let Some(ended) = &self.executor
            && let Ok(current) = Handle::try_current()
            && current.id() != ended.id()
        {
            self.attach(&current);
        }
    }

    /// Has a blocking thread do `task`.
    fn submit(&mut self, task: Task, bytes: Vec<u8>) -> io::Result<()> {
        let executor = self.executor.as_ref().ok_or_else(|| {
            error(
                ErrorKind::Detached,
                "the file would have to wait but is detached: attach it to an executor",
            )
        })?;
        self.slot.submit(executor, Work { fd: self.fd.clone(), task, bytes });
        Ok(())
    }

    /// What finished work of exactly this kind found.
    fn take_found(&mut self, task: Task) -> Option<(io::Result<u64>, Vec<u8>)> {
        let (found, result, bytes) = self.found.take()?;
        (found == task).then_some((result, bytes))
    }

    fn room(&mut self, bytes: usize) -> Vec<u8> {
        let mut room = std::mem::take(&mut self.spare);
        room.clear();
        room.resize(bytes.min(CHUNK), 0);
        room
    }

    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        let total = bufs.iter().map(|buf| buf.len()).sum();
        self.fd()?;
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        loop {
            ready!(self.poll_settle(cx, Waiter::Reader))?;
            if self.taken < self.ahead.len() {
                let read = scatter(&self.ahead[self.taken..], bufs);
                self.taken += read;
                return Poll::Ready(Ok(read));
            }
            if let Some(end) = self.ahead_end.take() {
                return Poll::Ready(end.map(|()| 0));
            }
            match self.read_now(bufs, HERE)? {
                Some(read) => return Poll::Ready(Ok(read)),
                None => {
                    let room = self.room(total);
                    self.submit(Task::Read, room)?;
                }
            }
        }
    }

    pub(super) fn poll_read_at(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        let total = bufs.iter().map(|buf| buf.len()).sum();
        self.fd()?;
        check_offset(offset)?;
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        loop {
            ready!(self.poll_settle(cx, Waiter::Reader))?;
            if let Some((result, bytes)) = self.take_found(Task::ReadAt(offset)) {
                let count = usize::try_from(result?).unwrap_or(usize::MAX).min(bytes.len());
                let read = scatter(&bytes[..count], bufs);
                self.spare = bytes;
                return Poll::Ready(Ok(read));
            }
            match self.read_now(bufs, offset)? {
                Some(read) => return Poll::Ready(Ok(read)),
                None => {
                    let room = self.room(total);
                    self.submit(Task::ReadAt(offset), room)?;
                }
            }
        }
    }

    /// Reads what is in the kernel's cache. The end of the file is left to the blocking read: some kernels (5.9 and 5.10)
    /// answer 0 here when nothing is cached.
    fn read_now(&mut self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<Option<usize>> {
        if !self.reads_now {
            return Ok(None);
        }
        let first = bufs.iter().position(|buf| !buf.is_empty()).unwrap_or_default();
        let is_large = bufs.iter().map(|buf| buf.len()).sum::<usize>() > CHUNK;
        let fd = self.fd()?;
        let read = loop {
            let read = if is_large {
                let buf = &mut bufs[first];
                let count = buf.len().min(CHUNK);
                let part = IoSliceMut::new(&mut buf[..count]);
                rustix::io::preadv2(fd, &mut [part], offset, ReadWriteFlags::NOWAIT)
            } else {
                rustix::io::preadv2(fd, bufs, offset, ReadWriteFlags::NOWAIT)
            };
            if read != Err(Errno::INTR) {
                break read;
            }
        };
        match read {
            Ok(0) | Err(Errno::AGAIN) => Ok(None),
            Ok(count) => Ok(Some(count)),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.reads_now = false;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Writes at the position, or at `at`.
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        at: Option<u64>,
    ) -> Poll<io::Result<usize>> {
        self.fd()?;
        if let Some(offset) = at {
            check_offset(offset)?;
        }
        ready!(self.poll_settle(cx, Waiter::Writer))?;
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Err(error));
        }
        if bufs.iter().all(|buf| buf.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        self.found = None;
        if at.is_none() {
            self.unread()?;
        }
        if let Some(written) = self.write_now(bufs, at.unwrap_or(HERE))? {
            return Poll::Ready(Ok(written));
        }
        let mut bytes = std::mem::take(&mut self.spare);
        bytes.clear();
        for buf in bufs {
            bytes.extend_from_slice(&buf[..buf.len().min(CHUNK - bytes.len())]);
        }
        let written = bytes.len();
        self.submit(at.map_or(Task::Write, Task::WriteAt), bytes)?;
        Poll::Ready(Ok(written))
    }

    fn write_now(&mut self, bufs: &[IoSlice<'_>], offset: u64) -> io::Result<Option<usize>> {
        if !self.writes_now {
            return Ok(None);
        }
        let fd = self.fd()?;
        let is_large = bufs.iter().map(|buf| buf.len()).sum::<usize>() > CHUNK;
        let first = bufs.iter().find(|buf| !buf.is_empty()).map(|buf| &buf[..buf.len().min(CHUNK)]);
        let part = [IoSlice::new(first.unwrap_or_default())];
        let bufs = if is_large { &part } else { bufs };
        let written = loop {
            let written = rustix::io::pwritev2(fd, bufs, offset, ReadWriteFlags::NOWAIT);
            if written != Err(Errno::INTR) {
                break written;
            }
        };
        match written {
            Ok(0) => Err(io::Error::new(io::ErrorKind::WriteZero, "the file takes no bytes")),
            Ok(count) => Ok(Some(count)),
            Err(Errno::AGAIN) => Ok(None),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.writes_now = false;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Moves the position back over what was read ahead and not reported.
    fn unread(&mut self) -> io::Result<()> {
        let unread = self.ahead.len() - self.taken;
        if !self.is_seekable {
            return Ok(());
        }
        if unread > 0 {
            rustix::fs::seek(self.fd()?, Seek::Current(-i64::try_from(unread).unwrap_or_default()))?;
        }
        self.taken = self.ahead.len();
        self.ahead_end = None;
        Ok(())
    }

    pub(super) fn poll_seek(&mut self, cx: &mut Context<'_>, to: SeekFrom) -> Poll<io::Result<u64>> {
        self.fd()?;
        let to = loop {
            ready!(self.poll_settle(cx, Waiter::Other))?;
            match to {
                // Regular files: asking for the size can take a round trip to a server, and must not move the position
                // when nobody is there any more to be told.
                SeekFrom::End(distance) if self.has_size => match self.take_found(Task::Size) {
                    None => self.submit(Task::Size, Vec::new())?,
                    Some((size, _)) => {
                        let position = size?.checked_add_signed(distance).ok_or_else(no_position)?;
                        break Seek::Start(position);
                    }
                },
                SeekFrom::End(distance) => break Seek::End(distance),
                SeekFrom::Start(position) => break Seek::Start(position),
                SeekFrom::Current(distance) => break Seek::Current(distance),
            }
        };
        self.unread()?;
        if let Seek::Start(position) = to {
            check_offset(position)?;
        }
        Poll::Ready(rustix::fs::seek(self.fd()?, to).map_err(|error| match error {
            Errno::INVAL => no_position(),
            error => error.into(),
        }))
    }

    /// Waits until all that was written is with the kernel.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.fd()?;
        ready!(self.poll_settle(cx, Waiter::Writer))?;
        Poll::Ready(self.failed.take().map_or(Ok(()), Err))
    }

    /// Waits until all that was written is on the medium.
    pub(super) fn poll_sync(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_flush(cx))?;
            if let Some((result, _)) = self.take_found(Task::Sync) {
                return Poll::Ready(result.map(|_| ()));
            }
            self.submit(Task::Sync, Vec::new())?;
        }
    }

    /// Neither a read nor a write would wait for work that is under way.
    pub(super) fn poll_ready(
        &mut self,
        cx: &mut Context<'_>,
        reads: bool,
        writes: bool,
    ) -> Poll<io::Result<()>> {
        self.fd()?;
        let mut polled = Poll::Ready(Ok(()));
        for (_, waiter) in
            [(reads, Waiter::Reader), (writes, Waiter::Writer)].into_iter().filter(|(is, _)| *is)
        {
            polled = self.poll_settle(cx, waiter);
        }
        polled
    }

    /// Closes the descriptor once all is written, and tells what went wrong with it.
    pub(super) fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_settle(cx, Waiter::Other))?;
            if let Some((result, _)) = self.take_found(Task::Close) {
                let failed = self.failed.take().map_or(Ok(()), Err);
                return Poll::Ready(failed.and(result.map(|_| ())));
            }
            let Some(fd) = self.fd.take() else { return Poll::Ready(Ok(())) };
            let work = Work { fd: Some(fd), task: Task::Close, bytes: Vec::new() };
            match &self.executor {
                Some(executor) => self.slot.submit(executor, work),
                None => self.slot.do_now(work),
            }
        }
    }

    pub(super) fn detach(&mut self) {
        self.executor = None;
    }

    pub(super) fn attach(&mut self, executor: &Handle) {
        self.executor = Some(executor.clone());
        self.slot.resubmit(executor);
    }
}

fn check_offset(offset: u64) -> io::Result<()> {
    if i64::try_from(offset).is_ok() { Ok(()) } else { Err(no_position()) }
}

fn no_position() -> io::Error {
    error(ErrorKind::Invalid, "that is no position in a file: give one between 0 and 2^63 - 1")
}
