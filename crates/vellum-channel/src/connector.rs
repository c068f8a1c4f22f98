//! Connecting: to addresses, through the caller's own network stack or the system's.

mod open;
mod system;

pub use open::{connect, connect_through};
pub use system::SystemConnector;

use crate::address::Families;
use crate::channel::Channel;
use crate::endpoint::Endpoint;
use crate::socket::SocketOptions;
use crate::tls::TlsClient;
use std::fmt::{self, Debug, Display, Formatter};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::time::Duration;

/// A connection that is being made.
pub type Connecting<'a> = Pin<Box<dyn Future<Output = io::Result<Box<dyn Channel>>> + Send + 'a>>;

/// Where a [`Connector`] connects to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Destination {
    /// A port of a host that is still to be looked up. The name may be a number.
    Host {
        /// Name.
        name: String,
        /// Port.
        port: u16,
    },
    /// An end whose address is known.
    Endpoint(Endpoint),
}

impl Display for Destination {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host { name, port } if name.contains(':') => write!(f, "tcp://[{name}]:{port}"),
            Self::Host { name, port } => write!(f, "tcp://{name}:{port}"),
            Self::Endpoint(endpoint) => Display::fmt(endpoint, f),
        }
    }
}

/// Makes connections: the way by which a caller brings its own network stack (a user-space TCP, a proxy, a simulation).
/// [`SystemConnector`] is the system's; [`connect_through`] puts TLS and WebSocket on top of either.
///
/// Dropping the future gives the attempt up, and leaves nothing behind.
///
/// It stands for VirtualBox's `VDINTERFACETCPNET`: what that does with a socket's handle is what a [`Channel`] does.
///
/// | `VDINTERFACETCPNET` | here |
/// |---|---|
/// | `pfnSocketCreate` with `VD_INTERFACETCPNET_CONNECT_*` | [`Connector::connect`]: a socket exists when it is connected |
/// | `pfnSocketDestroy` | drop of the channel |
/// | `pfnClientConnect` | [`Connector::connect`], with [`ConnectOptions::timeout`] |
/// | `pfnClientClose` | [`ChannelExt::close`](crate::ChannelExt::close) |
/// | `pfnIsClientConnected` | [`ChannelExt::peek`](crate::ChannelExt::peek) in non-blocking mode: `WouldBlock` or bytes while it is, 0 at the end |
/// | `pfnSelectOne` | [`ChannelExt::ready`](crate::ChannelExt::ready) with [`Interest::READ`](crate::Interest), in a `tokio::time::timeout`, or [`Blocking::wait`](crate::Blocking::wait) |
/// | `pfnRead` | [`ChannelExt::readv`](crate::ChannelExt::readv); without `pcbRead` [`ChannelExt::read_all`](crate::ChannelExt::read_all) |
/// | `pfnWrite` | `AsyncWriteExt::write_all` |
/// | `pfnSgWrite` | [`ChannelExt::writev_all`](crate::ChannelExt::writev_all) |
/// | `pfnReadNB` | [`ChannelExt::readv`](crate::ChannelExt::readv) in non-blocking mode ([`Channel::set_blocking`]) |
/// | `pfnWriteNB`, `pfnSgWriteNB` | [`ChannelExt::writev`](crate::ChannelExt::writev) in non-blocking mode |
/// | `pfnFlush` | `AsyncWriteExt::flush`; of what is held back, [`ChannelExt::set_cork`](crate::ChannelExt::set_cork) off |
/// | `pfnSetSendCoalescing` | [`ChannelExt::set_delay`](crate::ChannelExt::set_delay) (true: coalesces) |
/// | `pfnGetLocalAddress` | [`Channel::local_endpoint`] |
/// | `pfnGetPeerAddress` | [`Channel::peer_endpoint`] |
/// | `pfnSelectOneEx` | [`ChannelExt::ready`](crate::ChannelExt::ready) |
/// | `pfnPoke` | [`Control::wake_reader`](crate::Control::wake_reader), from any thread |
///
/// A connector over any Tokio stream:
///
/// ```
/// use vellum_channel::{Channel, ConnectOptions, Connecting, Connector, Destination, Stream};
///
/// /// Every connection leads to an echo in this process.
/// #[derive(Debug)]
/// struct Loopback;
///
/// impl Connector for Loopback {
///     fn connect<'a>(&'a self, _to: &'a Destination, _options: &'a ConnectOptions) -> Connecting<'a> {
///         Box::pin(async {
///             let (near, far) = tokio::io::duplex(4096);
///             tokio::spawn(async move {
///                 let (mut read, mut write) = tokio::io::split(far);
///                 tokio::io::copy(&mut read, &mut write).await
///             });
///             Ok(Box::new(Stream::new(near)) as Box<dyn Channel>)
///         })
///     }
/// }
/// ```
pub trait Connector: Debug + Send + Sync {
    /// Connects.
    ///
    /// # Errors
    /// [`ErrorKind::Resolve`](crate::ErrorKind::Resolve), [`ErrorKind::Connect`](crate::ErrorKind::Connect),
    /// [`ErrorKind::Timeout`](crate::ErrorKind::Timeout), and
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for destinations and options that the stack lacks.
    fn connect<'a>(&'a self, to: &'a Destination, options: &'a ConnectOptions) -> Connecting<'a>;
}

impl<T: Connector + ?Sized> Connector for std::sync::Arc<T> {
    fn connect<'a>(&'a self, to: &'a Destination, options: &'a ConnectOptions) -> Connecting<'a> {
        (**self).connect(to, options)
    }
}

/// How to connect. What an [`Address`](crate::Address) says comes before it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ConnectOptions {
    /// For the look-up and all attempts together. Handshakes of TLS and WebSocket have their own. Default: 30 s.
    pub timeout: Duration,
    /// Which addresses of a host are tried.
    pub families: Families,
    /// How long an attempt goes alone before the next address is tried beside it (RFC 8305). Default: 250 ms.
    pub stagger: Duration,
    /// How the socket is to behave.
    pub socket: SocketOptions,
    /// For addresses with TLS: this in place of one made of the address's options. One that is used again resumes
    /// sessions.
    pub tls: Option<TlsClient>,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            families: Families::Any,
            stagger: Duration::from_millis(250),
            socket: SocketOptions::default(),
            tls: None,
        }
    }
}
