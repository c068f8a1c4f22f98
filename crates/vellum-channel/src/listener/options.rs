//! How to listen, and who connects.

use crate::channel::Channel;
use crate::endpoint::{Endpoint, PeerProcess};
use crate::error::Error;
use crate::socket::ListenOptions;
use crate::tls::TlsServer;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// How to listen. What an [`Address`](crate::Address) says comes before it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ListenerOptions {
    /// Connections that may be open at a time, from when they are accepted until they are closed or dropped. While there
    /// are that many (at least one), further ones wait in the kernel's backlog. Default: no limit.
    pub connections_max: Option<usize>,
    /// Connections that may be accepted and not taken yet: in their handshakes, or ready. Default: 256.
    pub pending_max: usize,
    /// Who is let in. Default: everybody.
    pub admission: Option<Admission>,
    /// How long the admission may think about one connection before it is refused. Default: 10 s.
    pub admission_timeout: Duration,
    /// How long the look-up of a host name may take. Default: 10 s.
    pub lookup_timeout: Duration,
    /// How the sockets are to behave.
    pub listen: ListenOptions,
    /// For addresses with TLS: this in place of one made of the address's options. Its certificates can be exchanged
    /// while it serves.
    pub tls: Option<TlsServer>,
}

impl Default for ListenerOptions {
    fn default() -> Self {
        Self {
            connections_max: None,
            pending_max: 256,
            admission: None,
            admission_timeout: Duration::from_secs(10),
            lookup_timeout: Duration::from_secs(10),
            listen: ListenOptions::default(),
            tls: None,
        }
    }
}

type Rule = dyn Fn(&Peer) -> Result<(), String> + Send + Sync;

/// Decides about each connection, before anything is sent or received on it.
///
/// ```
/// use vellum_channel::{Admission, ListenerOptions};
///
/// let mut options = ListenerOptions::default();
/// options.admission = Some(Admission::new(|peer| match peer.process {
///     Some(process) if process.uid == 0 => Ok(()),
///     Some(process) => Err(format!("user {} may not connect", process.uid)),
///     None => Err("only local processes may connect".to_owned()),
/// }));
/// ```
#[derive(Clone)]
pub struct Admission(Arc<Rule>);

impl Admission {
    /// Asks `rule`, which tells why a connection is refused: the reason is logged; the peer only finds the connection
    /// closed.
    ///
    /// The rule may take its time (within [`ListenerOptions::admission_timeout`]) and block: it runs on a thread for such
    /// work, and others are asked about meanwhile. One that never returns keeps its thread, and its place of
    /// [`ListenerOptions::pending_max`].
    pub fn new(rule: impl Fn(&Peer) -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(rule))
    }

    pub(super) fn ask(&self, peer: &Peer) -> Result<(), String> {
        (self.0)(peer)
    }
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Admission")
    }
}

/// Who connected.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// The address that it connected from.
    pub endpoint: Endpoint,
    /// The address that it connected to.
    pub local: Endpoint,
    /// Of Unix sockets: the process.
    pub process: Option<PeerProcess>,
    /// Once the handshakes are done, what came of them.
    pub agreed: Agreed,
}

/// What the handshakes of a connection agreed on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Agreed {
    /// Of TLS: the application protocol (ALPN).
    pub alpn: Option<String>,
    /// Of TLS: the subject of the client's certificate, if it showed one.
    pub subject: Option<String>,
    /// Of WebSocket: the path that was asked for.
    pub path: Option<String>,
    /// Of WebSocket: the subprotocol.
    pub protocol: Option<String>,
}

impl Peer {
    pub(super) fn of(channel: &impl Channel) -> io::Result<Self> {
        Ok(Self {
            endpoint: channel.peer_endpoint()?,
            local: channel.local_endpoint()?,
            process: channel.peer_process().ok(),
            agreed: Agreed::default(),
        })
    }
}

/// Why a connection came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// By this side's own rule.
    Refused(Error),
    /// Otherwise.
    Failed(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}
