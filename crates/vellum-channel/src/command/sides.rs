//! The pipes to and from a child, which any thread may end.

use crate::channel::{Interest, ReadFlags, Shutdown, WriteFlags};
use crate::control::Controls;
use crate::file::Watched;
use crate::poll_fd::closed;
use parking_lot::Mutex;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use tokio::runtime::Handle;

#[derive(Debug, Default)]
pub(super) struct Sides {
    /// To the child's standard input.
    pub(super) input: Side,
    /// From the child's standard output.
    pub(super) output: Side,
    is_closed: AtomicBool,
}

impl Sides {
    pub(super) fn check_open(&self) -> io::Result<()> {
        if self.is_closed.load(Ordering::Acquire) { Err(closed()) } else { Ok(()) }
    }

    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.input.end();
        self.output.end();
    }
}

/// One pipe. Locked for the length of a call to the kernel, which never waits.
#[derive(Debug, Default)]
pub(super) struct Side {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// `None` when ended, or never there.
    pipe: Option<Watched>,
    waiting: Option<Waker>,
}

impl State {
    /// The pipe. Whoever waits there is woken also when it is taken away.
    fn pipe(&mut self, cx: &Context<'_>) -> Option<&mut Watched> {
        match &mut self.waiting {
            Some(waker) => waker.clone_from(cx.waker()),
            empty => *empty = Some(cx.waker().clone()),
        }
        self.pipe.as_mut()
    }
}

impl Side {
    pub(super) fn set(&self, pipe: OwnedFd) -> io::Result<()> {
        let mut watched = Watched::new(pipe, true)?;
        watched.set_own();
        self.state.lock().pipe = Some(watched);
        Ok(())
    }

    /// Gives the pipe back: the child finds the end of its input, or nobody who reads its output.
    pub(super) fn end(&self) {
        let mut state = self.state.lock();
        let ended = (state.pipe.take(), state.waiting.take());
        drop(state);
        if let (_pipe, Some(waker)) = ended {
            waker.wake();
        }
    }

    pub(super) fn poll_read(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        match self.state.lock().pipe(cx) {
            Some(pipe) => pipe.poll_read(cx, bufs, flags),
            None => Poll::Ready(Ok(0)),
        }
    }

    pub(super) fn poll_write(
        &self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        match self.state.lock().pipe(cx) {
            Some(pipe) => pipe.poll_write(cx, bufs, flags),
            None => {
                let message = "writing to the child process has been shut down";
                Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, message)))
            }
        }
    }

    /// Ready when `interest`, which is of one direction, would not wait.
    pub(super) fn poll_ready(&self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        match self.state.lock().pipe(cx) {
            Some(pipe) => pipe.poll_ready(cx, interest),
            None => Poll::Ready(Ok(interest)),
        }
    }

    pub(super) fn detach(&self) {
        if let Some(pipe) = &mut self.state.lock().pipe {
            pipe.detach();
        }
    }

    pub(super) fn attach(&self, executor: &Handle) -> io::Result<()> {
        match &mut self.state.lock().pipe {
            Some(pipe) => pipe.attach(executor),
            None => Ok(()),
        }
    }
}

/// Half-closes from any thread.
#[derive(Debug)]
pub(super) struct CommandControls(pub(super) Weak<Sides>);

impl Controls for CommandControls {
    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let sides = self.0.upgrade().ok_or_else(closed)?;
        sides.check_open()?;
        if how.reads() {
            sides.output.end();
        }
        if how.writes() {
            sides.input.end();
        }
        Ok(())
    }
}
