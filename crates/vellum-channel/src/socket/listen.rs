//! Listening sockets.

use super::unix_path::BoundPath;
use super::{Kind, ListenOptions, Socket, SocketOptions, address, new_socket};
use crate::endpoint::Endpoint;
use crate::error::{Error, ErrorKind, kind_of};
use crate::poll_fd::{Direction, PollFd};
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with, sockopt};
use socket2::SockRef;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// How long an accept waits after one that failed for want of descriptors or memory. The connection is still there: an
/// accept at once would fail again.
const PAUSE: Duration = Duration::from_millis(100);

/// A socket that accepts connections.
///
/// It stays usable whatever an accept answers. The path of a Unix socket that it has bound itself is removed when it is
/// closed or dropped, if what is there is still the socket that it made.
#[derive(Debug)]
pub struct SocketListener {
    // Before the descriptor: see `BoundPath::remove`.
    bound: Option<BoundPath>,
    fd: PollFd,
    kind: Kind,
    options: SocketOptions,
    pause: Mutex<Option<JoinHandle<()>>>,
}

impl SocketListener {
    /// Listens. Port 0 takes a free one: [`local_endpoint`](SocketListener::local_endpoint) tells which.
    ///
    /// # Errors
    /// [`ErrorKind::Listen`], with the kernel's error as its source; [`ErrorKind::Invalid`] for an address that none can
    /// have.
    pub fn bind(at: &Endpoint, options: &ListenOptions) -> io::Result<Self> {
        match Self::bind_at(at, options) {
            Err(cause) if kind_of(&cause).is_none() => {
                Err(Error::new(ErrorKind::Listen, format!("cannot listen on {at}")).because(cause).into())
            }
            done => done,
        }
    }

    fn bind_at(at: &Endpoint, options: &ListenOptions) -> io::Result<Self> {
        let kind = Kind::of_endpoint(at);
        let address = address::to_system(at)?;
        let fd = new_socket(address.domain())?;
        if kind == Kind::Tcp {
            // A port is not blocked by connections of an earlier listener that linger in TIME_WAIT.
            sockopt::set_socket_reuseaddr(&fd, true)?;
        }
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&fd, options.ipv6_only)?;
        }
        // Accepted sockets of TCP inherit them.
        options.socket.set_on(fd.as_fd(), kind)?;
        let bound = match at {
            Endpoint::UnixPath(path) => {
                Some(BoundPath::bind(fd.as_fd(), path, options.unix_mode, options.unlink_existing)?)
            }
            _ => {
                SockRef::from(&fd).bind(&address)?;
                None
            }
        };
        rustix::net::listen(&fd, i32::try_from(options.backlog).unwrap_or(i32::MAX))?;
        let options = options.socket.clone();
        Ok(Self { bound, fd: PollFd::new(fd)?, kind, options, pause: Mutex::new(None) })
    }

    /// Takes an inherited descriptor that listens.
    ///
    /// # Errors
    /// [`ErrorKind::WrongDescriptor`] for what is not a listening stream socket of a known family.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        Socket::from_fd(fd)?.into_listener()
    }

    pub(super) fn of_socket(socket: Socket) -> io::Result<Self> {
        socket.fd.fd()?;
        let Socket { fd, kind, .. } = socket;
        Ok(Self { bound: None, fd, kind, options: SocketOptions::default(), pause: Mutex::new(None) })
    }

    /// How sockets accepted from now on are to behave.
    pub fn set_socket_options(&mut self, options: SocketOptions) -> io::Result<()> {
        options.set_on(self.fd.fd()?, self.kind)?;
        self.options = options;
        Ok(())
    }

    /// Waits for the next connection.
    ///
    /// Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// Those of the kernel, of which none ends the listener: a connection that went away before it was accepted, no
    /// descriptors or memory left (the next accept then waits for a moment, so that one who goes on at once does not keep
    /// a processor busy).
    pub async fn accept(&self) -> io::Result<Socket> {
        poll_fn(|cx| self.poll_accept(cx)).await
    }

    /// The same as a poll. The last task to poll is the one that is woken.
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Socket>> {
        ready!(self.poll_pause(cx));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accepted = self.fd.poll_io(cx, Direction::Read, |fd| Ok((accept_with(fd, flags)?, false)));
        let made = ready!(accepted).and_then(|fd| self.make(fd));
        if let Err(error) = &made
            && is_exhausted(error)
        {
            self.start_pause();
        }
        Poll::Ready(made)
    }

    fn make(&self, fd: OwnedFd) -> io::Result<Socket> {
        if self.kind != Kind::Tcp {
            self.options.set_on(fd.as_fd(), self.kind)?;
        }
        let mut socket = Socket::of_kind(fd, self.kind)?;
        socket.offer_zero_copy(&self.options)?;
        Ok(socket)
    }

    fn poll_pause(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut pause = self.pause.lock();
        if let Some(sleeper) = &mut *pause {
            // A sleeper cannot fail, and one whose executor ended is over as well.
            let _ = ready!(Pin::new(sleeper).poll(cx));
            *pause = None;
        }
        Poll::Ready(())
    }

    /// By a thread, as an executor need not have timers.
    fn start_pause(&self) {
        if let Ok(executor) = Handle::try_current() {
            *self.pause.lock() = Some(executor.spawn_blocking(|| std::thread::sleep(PAUSE)));
        }
    }

    /// The address that it listens on.
    pub fn local_endpoint(&self) -> io::Result<Endpoint> {
        address::local(self.fd.fd()?)
    }

    /// The descriptor, to ask for or set what is not here, or to pass it to a child process.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`].
    pub fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.fd.fd()
    }

    /// Takes the listener off its executor. Connections go on to queue.
    pub fn detach(&mut self) -> io::Result<()> {
        self.fd.fd()?;
        self.fd.detach();
        *self.pause.lock() = None;
        Ok(())
    }

    /// Puts the listener on an executor.
    pub fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        self.detach()?;
        self.fd.attach(executor)
    }

    /// Stops listening and removes the path that it made. Connections that were not accepted are broken off. Closing it
    /// again does nothing.
    ///
    /// # Errors
    /// The path could not be removed; the listener is closed all the same.
    pub fn close(&mut self) -> io::Result<()> {
        let removed = self.bound.take().map_or(Ok(()), BoundPath::remove);
        self.fd.close();
        removed
    }
}

/// Whether an accept failed because this process or the machine has no more of something.
fn is_exhausted(error: &io::Error) -> bool {
    [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::NOSPC]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}
