//! Sockets: TCP, Unix, vsock.

mod address;
mod channel;
mod controls;
mod listen;
mod message;
mod options;
mod system;
mod unix_path;
mod zero_copy;

pub use listen::SocketListener;
pub use options::{KeepAlive, ListenOptions, SocketOptions};

use crate::channel::{Base, Channel, Features};
use crate::control::WakeReader;
use crate::endpoint::Endpoint;
use crate::error::{Error, ErrorKind, error};
use crate::poll_fd::{Direction, PollFd};
use controls::SocketControls;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};
use socket2::{Domain, SockAddr, SockRef, Type};
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use zero_copy::ZeroCopySends;

/// A stream socket: of TCP over IPv4 or IPv6, of Unix (a path or an abstract name), or of vsock (between a virtual
/// machine and its host).
///
/// All peek and can be shut down from any thread. Those of Unix pass descriptors, up to
/// [`MESSAGE_DESCRIPTORS_MAX`](crate::MESSAGE_DESCRIPTORS_MAX) in a message. Those of TCP send without copying if
/// [`SocketOptions::zero_copy`] asks for it and the kernel has it.
///
/// When a read fails for the descriptors that came along (too many, or they could not be made blocking), they are closed
/// and the bytes stay in the channel for the next read.
///
/// # Zero-copy
/// A write with [`WriteFlags::ZERO_COPY`](crate::WriteFlags::ZERO_COPY) hands pages to the kernel, which reads them when
/// it sends them, and again when it has to send them again. Until
/// [`flush_zero_copy`](crate::ChannelExt::flush_zero_copy) has ended, the memory must stay as it is, also when the write's
/// future or the channel is dropped: memory that was changed goes out changed, and memory that was freed and used again
/// goes out with whatever is there by then. Closing the channel waits for it; dropping does not.
///
/// # Waiting to connect
/// A Unix listener whose backlog is full makes [`connect`](Socket::connect) wait until there is room. No connect has a
/// limit of its own on time beyond the kernel's: put one around it.
///
/// ```
/// # use vellum_channel::{ChannelExt, Endpoint, ListenOptions, Socket, SocketListener, SocketOptions};
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let listener = SocketListener::bind(&Endpoint::Ip("127.0.0.1:0".parse().unwrap()), &ListenOptions::default())?;
/// let mut near = Socket::connect(&listener.local_endpoint()?, &SocketOptions::default()).await?;
/// let mut far = listener.accept().await?;
/// near.writev_all(&[std::io::IoSlice::new(b"hello"), std::io::IoSlice::new(b", you")]).await?;
/// let mut got = [0; 10];
/// far.read_all(&mut got).await?;
/// assert_eq!(&got, b"hello, you");
/// # std::io::Result::Ok(())
/// # }).unwrap();
/// ```
#[derive(Debug)]
pub struct Socket {
    base: Base,
    kind: Kind,
    fd: PollFd,
    controls: Arc<SocketControls>,
    reader: Arc<WakeReader>,
    /// Bytes of a read that failed, which the next read gets.
    unreported: Vec<u8>,
    zero_copy: Option<Box<ZeroCopySends>>,
}

/// The families that differ in what they can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tcp,
    Unix,
    Vsock,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
            Self::Vsock => "vsock",
        }
    }

    fn features(self) -> Features {
        let all = Features::SHUTDOWN | Features::PEEK;
        match self {
            Self::Unix => all | Features::DESCRIPTORS,
            Self::Tcp | Self::Vsock => all,
        }
    }

    fn of_endpoint(endpoint: &Endpoint) -> Self {
        match endpoint {
            Endpoint::Ip(_) => Self::Tcp,
            Endpoint::UnixPath(_) | Endpoint::UnixAbstract(_) | Endpoint::UnixUnnamed => Self::Unix,
            Endpoint::Vsock { .. } => Self::Vsock,
        }
    }

    /// The kind of an inherited descriptor.
    fn of_descriptor(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let wrong = |what: String| {
            error(ErrorKind::WrongDescriptor, format!("the descriptor {what}: a stream socket is needed"))
        };
        let socket_type = match sockopt::socket_type(fd) {
            Ok(socket_type) => socket_type,
            Err(rustix::io::Errno::NOTSOCK) => return Err(wrong("is not a socket".to_owned())),
            Err(errno) => return Err(errno.into()),
        };
        match socket_type {
            SocketType::STREAM => {}
            SocketType::DGRAM => return Err(wrong("is a datagram socket".to_owned())),
            other => return Err(wrong(format!("is a socket of type {}", other.as_raw()))),
        }
        match sockopt::socket_domain(fd)? {
            AddressFamily::INET | AddressFamily::INET6 => match sockopt::socket_protocol(fd)? {
                Some(ipproto::TCP | ipproto::MPTCP) => Ok(Self::Tcp),
                protocol => Err(wrong(format!("speaks protocol {protocol:?}, not TCP"))),
            },
            AddressFamily::UNIX => Ok(Self::Unix),
            AddressFamily::VSOCK => Ok(Self::Vsock),
            other => Err(wrong(format!("is a socket of family {}", other.as_raw()))),
        }
    }
}

impl Socket {
    /// Connects. Must be called inside of a Tokio runtime, as must whatever makes a socket.
    ///
    /// # Errors
    /// [`ErrorKind::Connect`], with the kernel's error as its source; [`ErrorKind::Invalid`] for an address that none can
    /// have.
    pub async fn connect(to: &Endpoint, options: &SocketOptions) -> io::Result<Self> {
        let address = address::to_system(to)?;
        match Self::connect_to(&address, Kind::of_endpoint(to), options).await {
            Ok(socket) => Ok(socket),
            Err(cause) if crate::error::kind_of(&cause).is_some() => Err(cause),
            Err(cause) => {
                let hint = match to {
                    // With the loopback, a port that nobody listens on is a reset.
                    Endpoint::Vsock { cid: VSOCK_LOCAL, .. }
                        if cause.kind() != io::ErrorKind::ConnectionReset =>
                    {
                        " on this machine itself: that needs the kernel's vsock_loopback"
                    }
                    _ => "",
                };
                let what = format!("cannot connect to {to}{hint}");
                Err(Error::new(ErrorKind::Connect, what).because(cause).into())
            }
        }
    }

    async fn connect_to(address: &SockAddr, kind: Kind, options: &SocketOptions) -> io::Result<Self> {
        let fd = new_socket(address.domain())?;
        // Sizes of buffers count from the first packet on.
        options.set_on(fd.as_fd(), kind)?;
        let mut pause = Duration::from_millis(1);
        let is_done = loop {
            match SockRef::from(&fd).connect(address) {
                Ok(()) => break true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_in_progress(&error) => break false,
                // A full backlog, which nothing tells the end of.
                Err(error) if kind == Kind::Unix && error.kind() == io::ErrorKind::WouldBlock => {
                    let _ = tokio::task::spawn_blocking(move || std::thread::sleep(pause)).await;
                    pause = (pause * 2).min(Duration::from_millis(50));
                }
                Err(error) => return Err(error),
            }
        };
        let mut socket = Self::of_kind(fd, kind)?;
        if !is_done {
            socket.connected().await?;
        }
        socket.offer_zero_copy(options)?;
        Ok(socket)
    }

    /// Waits until the kernel has connected it, or failed to.
    async fn connected(&self) -> io::Result<()> {
        let connected = poll_fn(|cx| {
            self.fd.poll_io(cx, Direction::Write, |fd| {
                sockopt::socket_error(fd)??;
                rustix::net::getpeername(fd)?;
                Ok(((), false))
            })
        });
        connected.await
    }

    /// Takes an inherited or received descriptor, whose type is checked. It need not be connected; one that listens gives
    /// a channel with [`Features::LISTEN`] that [`into_listener`](Socket::into_listener) makes a listener of.
    ///
    /// The descriptor becomes non-blocking, also for other processes that have the same socket.
    ///
    /// # Errors
    /// [`ErrorKind::WrongDescriptor`] for what is not a stream socket of a known family.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let kind = Kind::of_descriptor(fd.as_fd())?;
        let is_listening = sockopt::socket_acceptconn(&fd)?;
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
        if kind == Kind::Unix {
            system::refuse_process_descriptors(fd.as_fd());
        }
        let mut socket = Self::of_kind(fd, kind)?;
        if is_listening {
            socket.base = Base::new(kind.name(), Features::LISTEN);
        }
        Ok(socket)
    }

    /// Two Unix sockets that are connected with each other.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (near, far) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok((Self::of_kind(near, Kind::Unix)?, Self::of_kind(far, Kind::Unix)?))
    }

    fn of_kind(fd: OwnedFd, kind: Kind) -> io::Result<Self> {
        let fd = PollFd::new(fd)?;
        Ok(Self {
            base: Base::new(kind.name(), kind.features()),
            kind,
            controls: Arc::new(SocketControls::new(fd.weak(), kind)),
            fd,
            reader: Arc::default(),
            unreported: Vec::new(),
            zero_copy: None,
        })
    }

    /// Changes how the socket behaves: what `options` leaves to the system stays as it is.
    pub fn set_options(&mut self, options: &SocketOptions) -> io::Result<()> {
        options.set_on(self.fd.fd()?, self.kind)?;
        self.offer_zero_copy(options)
    }

    fn offer_zero_copy(&mut self, options: &SocketOptions) -> io::Result<()> {
        let is_offered = self.zero_copy.is_some() || self.features().contains(Features::LISTEN);
        if options.zero_copy && self.kind == Kind::Tcp && !is_offered {
            self.zero_copy = ZeroCopySends::new(self.fd.fd()?)?.map(Box::new);
            if self.zero_copy.is_some() {
                self.base.add_feature(Features::ZERO_COPY);
            }
        }
        Ok(())
    }

    /// The descriptor, to ask for or set what is not here.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`].
    pub fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.fd.fd()
    }

    /// Makes a listener of a socket that listens, as inherited ones may.
    ///
    /// # Errors
    /// [`ErrorKind::WrongDescriptor`] for one that does not.
    pub fn into_listener(self) -> io::Result<SocketListener> {
        if !self.features().contains(Features::LISTEN) {
            return Err(error(
                ErrorKind::WrongDescriptor,
                format!("the {} does not listen: whoever made it must have called `listen`", self.label()),
            ));
        }
        SocketListener::of_socket(self)
    }
}

/// A non-blocking stream socket that child processes do not inherit.
fn new_socket(domain: Domain) -> io::Result<OwnedFd> {
    Ok(socket2::Socket::new(domain, Type::STREAM.nonblocking(), None)?.into())
}

/// The context identifier by which a machine reaches itself (`VMADDR_CID_LOCAL`).
const VSOCK_LOCAL: u32 = 1;

fn is_in_progress(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error())
}
