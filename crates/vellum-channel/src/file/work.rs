//! Work on a file in a blocking thread.

use crate::error::{ErrorKind, error};
use crate::poll_fd::closed;
use parking_lot::Mutex;
use std::io;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use tokio::runtime::Handle;

/// Bytes of one piece of work at most.
pub(super) const CHUNK: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Read,
    ReadAt(u64),
    Write,
    WriteAt(u64),
    Size,
    Sync,
    Close,
}

#[derive(Debug)]
pub(super) struct Work {
    /// `None` once closed.
    pub(super) fd: Option<Arc<OwnedFd>>,
    pub(super) task: Task,
    /// What to write, or room for what is read.
    pub(super) bytes: Vec<u8>,
}

/// Who waits for the work to be done.
#[derive(Clone, Copy, Debug)]
pub(super) enum Waiter {
    Reader = 0,
    Writer = 1,
    Other = 2,
}

/// The place of the work that is under way.
#[derive(Debug, Default)]
pub(super) struct Slot {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    progress: Progress,
    waiting: [Option<Waker>; 3],
}

#[derive(Debug, Default)]
enum Progress {
    #[default]
    Idle,
    Running,
    Done(Work, io::Result<u64>),
    /// The executor ended before the work began.
    Dropped(Work),
}

impl Slot {
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.state.lock().progress, Progress::Idle)
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.state.lock().progress, Progress::Running)
    }

    /// The executor ended before the work began.
    pub(super) fn is_dropped(&self) -> bool {
        matches!(self.state.lock().progress, Progress::Dropped(_))
    }

    /// Takes out what was done. Waits as long as it is not; must not be called when idle.
    pub(super) fn poll_done(
        &self,
        cx: &mut Context<'_>,
        waiter: Waiter,
    ) -> Poll<io::Result<(Work, io::Result<u64>)>> {
        let mut state = self.state.lock();
        match std::mem::take(&mut state.progress) {
            Progress::Done(work, result) => return Poll::Ready(Ok((work, result))),
            Progress::Dropped(work) => {
                state.progress = Progress::Dropped(work);
                return Poll::Ready(Err(error(
                    ErrorKind::Detached,
                    "the executor of the file has ended: attach the file to another",
                )));
            }
            unchanged => state.progress = unchanged,
        }
        match &mut state.waiting[waiter as usize] {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Has a blocking thread of `executor` do the work.
    pub(super) fn submit(self: &Arc<Self>, executor: &Handle, work: Work) {
        self.state.lock().progress = Progress::Running;
        let job = Job { slot: self.clone(), work: Some(work) };
        drop(executor.spawn_blocking(move || job.run()));
    }

    /// Does the work in this thread.
    pub(super) fn do_now(self: &Arc<Self>, work: Work) {
        Job { slot: self.clone(), work: Some(work) }.run();
    }

    /// Has another executor do the work that one left undone.
    pub(super) fn resubmit(self: &Arc<Self>, executor: &Handle) {
        let mut state = self.state.lock();
        match std::mem::take(&mut state.progress) {
            Progress::Dropped(work) => {
                drop(state);
                self.submit(executor, work);
            }
            unchanged => state.progress = unchanged,
        }
    }

    fn finish(&self, progress: Progress) {
        let mut state = self.state.lock();
        state.progress = progress;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().flatten().for_each(Waker::wake);
    }
}

/// Work on its way to a blocking thread. An executor that ends drops those that have not begun.
struct Job {
    slot: Arc<Slot>,
    work: Option<Work>,
}

impl Job {
    fn run(mut self) {
        if let Some(mut work) = self.work.take() {
            let result = work.run();
            self.slot.finish(Progress::Done(work, result));
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            self.slot.finish(Progress::Dropped(work));
        }
    }
}

impl Work {
    fn run(&mut self) -> io::Result<u64> {
        if self.task == Task::Close {
            return self.close();
        }
        let fd = self.fd.as_ref().ok_or_else(closed)?;
        match self.task {
            Task::Read => retry(|| rustix::io::read(fd, self.bytes.as_mut_slice())),
            Task::ReadAt(offset) => retry(|| rustix::io::pread(fd, self.bytes.as_mut_slice(), offset)),
            Task::Write => write_all(&self.bytes, |rest, _| rustix::io::write(fd, rest)),
            Task::WriteAt(offset) => {
                write_all(&self.bytes, |rest, done| rustix::io::pwrite(fd, rest, offset.saturating_add(done)))
            }
            Task::Size => Ok(u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or_default()),
            Task::Sync | Task::Close => retry(|| rustix::fs::fsync(fd).map(|()| 0)),
        }
    }

    /// Closes the descriptor, and tells what its file system says to that (network file systems write back here).
    fn close(&mut self) -> io::Result<u64> {
        // Nobody else has it, as all other work is done.
        let Some(fd) = self.fd.take().and_then(Arc::into_inner) else { return Ok(0) };
        // SAFETY: the descriptor is owned by nobody any more: `into_raw_fd` gave it up, and it is used only here.
        match unsafe { libc::close(fd.into_raw_fd()) } {
            0 => Ok(0),
            _ => match io::Error::last_os_error() {
                // Linux has closed it all the same.
                error if error.kind() == io::ErrorKind::Interrupted => Ok(0),
                error => Err(error),
            },
        }
    }
}

fn retry(mut call: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<u64> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            done => return Ok(done? as u64),
        }
    }
}

fn write_all(
    bytes: &[u8],
    mut write: impl FnMut(&[u8], u64) -> rustix::io::Result<usize>,
) -> io::Result<u64> {
    let mut done = 0;
    while done < bytes.len() {
        let written = retry(|| write(&bytes[done..], done as u64))?;
        if written == 0 {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "the file takes no more bytes"));
        }
        done += usize::try_from(written).unwrap_or(usize::MAX);
    }
    Ok(done as u64)
}
