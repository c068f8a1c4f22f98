//! A child process as a channel.

use crate::channel::{
    Base, Channel, Closed, Features, Interest, ReadFlags, WriteFlags, conditions_to_wait_for,
    stream_of_channel,
};
use crate::control::{Control, WakeReader};
use crate::descriptors::Descriptors;
use crate::error::{Error, ErrorKind, error};
use crate::poll_fd::{PollFd, closed};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use sides::{CommandControls, Sides};
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tail::{Tail, Waiter};
use tokio::runtime::Handle;

mod reaper;
mod sides;
mod tail;

/// Which of a child's streams make the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Its standard output is read; its standard input is empty (`/dev/null`).
    Read,
    /// Its standard input is written; its standard output goes to `/dev/null`.
    Write,
    /// Both.
    Both,
}

impl Direction {
    fn reads(self) -> bool {
        self != Self::Write
    }

    fn writes(self) -> bool {
        self != Self::Read
    }

    fn interest(self) -> Interest {
        match self {
            Self::Read => Interest::READ,
            Self::Write => Interest::WRITE,
            Self::Both => Interest::all(),
        }
    }
}

/// How a child process is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandOptions {
    /// Time that a child has to end by itself, after `SIGTERM`, when the channel is dropped without being closed.
    pub grace: Duration,
    /// Keep the last bytes that the child writes to its standard error, at most this many, for messages. `None` leaves
    /// its standard error as the command has it: inherited, unless it was told otherwise.
    pub stderr_tail: Option<usize>,
}

impl Default for CommandOptions {
    fn default() -> Self {
        Self { grace: Duration::from_secs(1), stderr_tail: None }
    }
}

/// A child process, its standard input and output as one channel.
///
/// * To shut down writing closes the child's standard input, from any thread; to shut down reading its standard output.
/// * [`close`](crate::ChannelExt::close) closes both, waits for the child to exit and tells how it did. It waits for as
///   long as the child takes; dropped meanwhile, it can be called again.
/// * Dropped without close, the child gets `SIGTERM` and, when it has not ended after [`CommandOptions::grace`],
///   `SIGKILL`; nobody waits for that and no zombie is left. Signals go to the child, not to what it has started.
/// * A write to a child that no longer reads fails with `BrokenPipe`.
///
/// ```
/// use vellum_channel::{ChannelExt, Command, Shutdown};
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let mut sort = Command::shell("sort")?;
/// sort.writev_all(&[std::io::IoSlice::new(b"b\na\n")]).await?;
/// sort.shut_down(Shutdown::Write)?;
/// let mut sorted = [0; 4];
/// sort.read_all(&mut sorted).await?;
/// assert_eq!(&sorted, b"a\nb\n");
/// assert!(sort.close().await?.exit_status.is_some_and(|status| status.success()));
/// # std::io::Result::Ok(()) }).unwrap();
/// ```
#[derive(Debug)]
pub struct Command {
    base: Base,
    direction: Direction,
    sides: Arc<Sides>,
    child: Option<Child>,
    /// Readable when the child has exited.
    exit: PollFd,
    status: Option<ExitStatus>,
    stderr: Option<Tail>,
    grace: Duration,
    reader: Arc<WakeReader>,
}

impl Command {
    /// Starts `command`, whose standard input and output become the channel. (From a `tokio::process::Command`:
    /// `into_std`.) Must be called inside of a Tokio runtime.
    ///
    /// # Errors
    /// [`ErrorKind::Command`] when it cannot be started.
    pub fn spawn(command: std::process::Command, direction: Direction) -> io::Result<Self> {
        Self::spawn_with(command, direction, &CommandOptions::default())
    }

    /// The same with options.
    ///
    /// # Errors
    /// As [`Command::spawn`].
    pub fn spawn_with(
        mut command: std::process::Command,
        direction: Direction,
        options: &CommandOptions,
    ) -> io::Result<Self> {
        if Handle::try_current().is_err() {
            let message = "a command channel is made inside of a Tokio runtime: enter one first";
            return Err(error(ErrorKind::Detached, message));
        }
        command.stdin(if direction.writes() { Stdio::piped() } else { Stdio::null() });
        command.stdout(if direction.reads() { Stdio::piped() } else { Stdio::null() });
        if options.stderr_tail.is_some() {
            command.stderr(Stdio::piped());
        }
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command.spawn().map_err(|cause| {
            Error::new(ErrorKind::Command, format!("cannot start `{program}`")).because(cause)
        })?;
        match Self::watch(&mut child, direction, options) {
            Ok(mut channel) => {
                channel.child = Some(child);
                channel.set_name(&program);
                Ok(channel)
            }
            Err(error) => {
                reaper::finish(child, options.grace);
                Err(error)
            }
        }
    }

    /// Has the system's shell (`sh -c`) carry out `text`, reading and writing.
    ///
    /// # Errors
    /// As [`Command::spawn`].
    pub fn shell(text: &str) -> io::Result<Self> {
        let mut command = std::process::Command::new("sh");
        command.arg("-c").arg(text);
        let mut channel = Self::spawn(command, Direction::Both)?;
        channel.set_name(text);
        Ok(channel)
    }

    fn watch(child: &mut Child, direction: Direction, options: &CommandOptions) -> io::Result<Self> {
        let sides = Sides::default();
        if let Some(pipe) = child.stdin.take() {
            sides.input.set(pipe.into())?;
        }
        if let Some(pipe) = child.stdout.take() {
            sides.output.set(pipe.into())?;
        }
        let stderr = match (child.stderr.take(), options.stderr_tail) {
            (Some(pipe), Some(limit)) => Some(Tail::new(pipe, limit)?),
            _ => None,
        };
        let exit = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).map_err(|cause| {
            Error::new(ErrorKind::Command, "cannot watch a child process (Linux 5.3 or later is needed)")
                .because(io::Error::from(cause))
        })?;
        Ok(Self {
            base: Base::new("command", Features::SHUTDOWN),
            direction,
            sides: Arc::new(sides),
            child: None,
            exit: PollFd::new(exit)?,
            status: None,
            stderr,
            grace: options.grace,
            reader: Arc::default(),
        })
    }

    /// The child's process identifier. It means nothing once the exit status is known.
    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// How the child exited, if it has. Does not wait, and does not need the channel to be closed.
    ///
    /// # Errors
    /// [`ErrorKind::Command`] when somebody else has taken the exit status (`SIGCHLD` ignored by this process).
    pub fn exit_status(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none()
            && let Some(child) = &mut self.child
        {
            self.status = child.try_wait().map_err(|cause| {
                let message = "cannot tell how a child process exited: does this process ignore SIGCHLD?";
                Error::new(ErrorKind::Command, message).because(cause)
            })?;
        }
        Ok(self.status)
    }

    /// Waits for the child to exit, without closing anything: a child that waits for more input, or for its output to
    /// be read, does not.
    pub fn wait(&mut self) -> impl Future<Output = io::Result<ExitStatus>> {
        poll_fn(|cx| self.poll_exit(cx))
    }

    /// Ends the child at once (`SIGKILL`).
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] when it has been waited for already.
    pub fn kill(&self) -> io::Result<()> {
        if self.status.is_some() {
            return Err(closed());
        }
        Ok(pidfd_send_signal(self.exit.fd()?, Signal::KILL)?)
    }

    /// The last that the child wrote to its standard error, if that was asked for in [`CommandOptions::stderr_tail`].
    pub fn stderr_tail(&self) -> String {
        self.stderr.as_ref().map(Tail::text).unwrap_or_default()
    }

    /// The child's exit as an error, if it was anything but a success: known after close, [`wait`](Command::wait) or
    /// [`exit_status`](Command::exit_status).
    pub fn failure(&self) -> Option<io::Error> {
        let status = self.status.filter(|status| !status.success())?;
        let mut message = format!("{} failed: {status}", self.label());
        let said = self.stderr_tail();
        if !said.is_empty() {
            message.push_str("; the last it said: ");
            message.push_str(&said);
        }
        Some(error(ErrorKind::Command, message))
    }

    fn poll_exit(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<ExitStatus>> {
        loop {
            if let Some(status) = self.exit_status()? {
                return Poll::Ready(Ok(status));
            }
            self.read_along(cx, Waiter::Other);
            ready!(self.exit.poll_ready(cx, Interest::READ))?;
        }
    }

    /// Keeps the child from waiting for its standard error to be read while this side waits for the child.
    fn read_along(&mut self, cx: &mut Context<'_>, waiter: Waiter) {
        if let Some(stderr) = &mut self.stderr {
            stderr.drain(cx, waiter);
        }
    }

    fn poll_send_buffered(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.sides.check_open())
    }

    fn poll_end_writing(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.sides.check_open()?;
        self.sides.input.end();
        Poll::Ready(Ok(()))
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        self.sides.close();
        if self.status.is_none()
            && let Some(child) = self.child.take()
        {
            reaper::finish(child, self.grace);
        }
    }
}

impl Channel for Command {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    fn control(&self) -> Control {
        Control::new(Arc::new(CommandControls(Arc::downgrade(&self.sides))), self.reader.clone())
    }

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        _fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        self.sides.check_open()?;
        if !self.direction.reads() {
            return Poll::Ready(Err(self.unsupported("is for writing only")));
        }
        let polled = self.sides.output.poll_read(cx, bufs, flags);
        if polled.is_pending() {
            self.read_along(cx, Waiter::Reader);
        }
        polled
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        _fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        self.sides.check_open()?;
        if !self.direction.writes() {
            return Poll::Ready(Err(self.unsupported("is for reading only")));
        }
        let polled = self.sides.input.poll_write(cx, bufs, flags);
        if polled.is_pending() {
            self.read_along(cx, Waiter::Writer);
        }
        polled
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        self.sides.check_open()?;
        let interest = conditions_to_wait_for(self, interest, self.direction.interest())?;
        let mut found = Interest::empty();
        if interest.contains(Interest::READ)
            && let Poll::Ready(is_ready) = self.sides.output.poll_ready(cx, Interest::READ)
        {
            found |= is_ready?;
        }
        if interest.contains(Interest::WRITE)
            && let Poll::Ready(is_ready) = self.sides.input.poll_ready(cx, Interest::WRITE)
        {
            found |= is_ready?;
        }
        if !found.is_empty() {
            return Poll::Ready(Ok(found));
        }
        let waiter = if interest.contains(Interest::READ) { Waiter::Reader } else { Waiter::Writer };
        self.read_along(cx, waiter);
        Poll::Pending
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        self.sides.close();
        let status = ready!(self.poll_exit(cx))?;
        if let Some(stderr) = &mut self.stderr {
            stderr.drain_rest();
        }
        self.exit.close();
        Poll::Ready(Ok(Closed { exit_status: Some(status) }))
    }

    fn detach(&mut self) -> io::Result<()> {
        self.sides.input.detach();
        self.sides.output.detach();
        self.exit.detach();
        if let Some(stderr) = &mut self.stderr {
            stderr.detach();
        }
        Ok(())
    }

    fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        self.exit.attach(executor)?;
        self.sides.input.attach(executor)?;
        self.sides.output.attach(executor)?;
        match &mut self.stderr {
            Some(stderr) => stderr.attach(executor),
            None => Ok(()),
        }
    }
}

stream_of_channel!([] Command);
