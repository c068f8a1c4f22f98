//! Places that a channel leads to, as text.

mod options;
mod parse;
mod part;
mod print;
#[cfg(test)]
mod tests;

pub(crate) use print::{PATH, PrintPath};

use crate::endpoint::Endpoint;
use crate::socket::KeepAlive;
use crate::tls::{ClientCertificates, TlsVersions};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// The longest text that is read as an address, in bytes.
pub const ADDRESS_MAX: usize = 32 * 1024;

/// Where a channel leads, or where to listen: read from text by `FromStr`, printed by `Display`.
///
/// | text | what it is |
/// |---|---|
/// | `tcp://host:port`, `host:port`, `[::1]:port`, `:port` | TCP; no host: every address of this machine, to listen |
/// | `unix:///path`, `unix:path`, `unix:@name` | Unix socket at a path (absolute, relative), or with an abstract name |
/// | `vsock://cid:port` | between a virtual machine and its host; `cid` is a number, `any`, `host` or `local` |
/// | `tls+tcp://host:port`, `tls+unix://...`, ... | TLS over it (also `tls+vsock`, `tls+fd`) |
/// | `ws://host:port/path` | WebSocket over TCP (also `ws+unix`, `ws+vsock`, `ws+fd`); without a port: 80 |
/// | `wss://host:port/path` | WebSocket over TLS over TCP (also `wss+unix`, ...); without a port: 443 |
/// | `exec:command` | standard input and output of `/bin/sh -c command`; all of the rest is the command |
/// | `fd:N` | a descriptor that this process inherited: a socket, a pipe or a file |
/// | `file:///path`, `file:path` | a file |
/// | `stdio:` or `-` | standard input and output of this process |
/// | `null:` | takes everything, gives nothing |
///
/// Options follow as `?name=value&name=value`; those that are on or off may stand alone (`?ipv4&nodelay`). In paths and
/// values `%XX` is the byte with that hexadecimal number: a `?` of a path is written `%3F`, a `%` is `%25`. Those of a
/// `host:port` may also follow as QEMU writes them: `localhost:10809,to=10900,ipv4`.
///
/// | option | of | meaning |
/// |---|---|---|
/// | `ipv4`, `ipv6` | TCP | only this family (`on`), or not this one (`off`) |
/// | `to=PORT` | TCP, to listen | the first free port from the address's own up to this one |
/// | `nodelay=off` | TCP | small writes may wait to be merged |
/// | `keepalive`, `keepalive-idle`, `-interval`, `-count` | TCP | ask a silent peer whether it is still there |
/// | `user-timeout=TIME` | TCP | give up when sent data are not confirmed for this long |
/// | `mode=OCTAL`, `unlink=off` | Unix path, to listen | permissions of the path; leave what is there in place, and fail |
/// | `timeout=TIME` | sockets | to connect, look-up included (`5`, `1.5s`, `500ms`, `2m`) |
/// | `sndbuf`, `rcvbuf=BYTES` | sockets | buffers of the kernel |
/// | `backlog=N` | sockets, to listen | connections that wait to be accepted |
/// | `ca`, `crl=FILE` | TLS | certificate authorities (else the system's; to listen, those of clients, with `client-cert`), revocation lists (may be repeated) |
/// | `cert`, `key=FILE` | TLS | this side's certificate chain and key |
/// | `sni=NAME` | TLS, to connect | name to ask for and to check, if not the host |
/// | `alpn=NAME` | TLS | application protocol, best first (may be repeated) |
/// | `tls=1.3`, `1.2`, `only-1.2` | TLS | the oldest version that is spoken (1.3 is the default), or the only one |
/// | `client-cert=required`, `optional`, `none` | TLS, to listen | whether clients must show a certificate |
/// | `allow=NAME` | TLS, to listen | names that clients' certificates may have (may be repeated) |
/// | `handshake-timeout=TIME` | TLS, WebSocket | for the handshake of each of them |
/// | `protocol=NAME` | WebSocket | subprotocol, best first (may be repeated) |
/// | `query=TEXT` | WebSocket | what follows `?` in the request |
/// | `host=NAME` | WebSocket | the `Host` to ask for, if not the address's own |
/// | `path=/PATH` | WebSocket over Unix or a descriptor | the path to ask for |
/// | `mode=read`, `write`, `read-write`, `append` | file | `read` is the default; `write` begins with an empty file |
///
/// An option that is not known is an error, which names those that are.
///
/// ```
/// use vellum_channel::{Address, Place};
///
/// let address: Address = "tls+tcp://[::1]:10809?ca=/etc/ca.pem&sni=disks.example".parse().unwrap();
/// assert!(matches!(&address.place, Place::Tcp { port: 10809, .. }));
/// assert_eq!(address.to_string(), "tls+tcp://[::1]:10809?ca=/etc/ca.pem&sni=disks.example");
///
/// let wrong = "tcp://localhost:10809?nodely".parse::<Address>().unwrap_err();
/// assert!(wrong.to_string().contains("nodely"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Address {
    /// What the bytes travel over.
    pub place: Place,
    /// TLS on top of it.
    pub tls: Option<TlsPart>,
    /// WebSocket on top of that.
    pub web_socket: Option<WebSocketPart>,
    /// What is set on the socket. Options that the place does not have are neither used nor printed.
    pub socket: SocketPart,
}

/// The lowest layer of an [`Address`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Place {
    /// TCP.
    Tcp {
        /// Name or number. Empty, to listen: every address of this machine.
        host: String,
        /// Port. 0, to listen: one that is free.
        port: u16,
        /// To listen: the last port of the range that is tried.
        to: Option<u16>,
        /// Which addresses of the host.
        families: Families,
    },
    /// A Unix socket at a path.
    UnixPath {
        /// Where.
        path: PathBuf,
        /// To listen: the permissions of the path.
        mode: Option<u32>,
        /// To listen: whether a path that is there already is removed. `None`: as the listener's options say.
        unlink: Option<bool>,
    },
    /// A Unix socket with an abstract name.
    UnixAbstract {
        /// The name, without the zero byte that the kernel puts in front.
        name: Vec<u8>,
    },
    /// A socket between a virtual machine and its host.
    Vsock {
        /// Context identifier.
        cid: u32,
        /// Port.
        port: u32,
    },
    /// A child process.
    Exec {
        /// For `/bin/sh -c`.
        command: String,
    },
    /// An inherited descriptor.
    Fd {
        /// Its number.
        number: i32,
    },
    /// A file.
    File {
        /// Where.
        path: PathBuf,
        /// For what.
        mode: FileMode,
    },
    /// Standard input and output.
    Stdio,
    /// Nothing.
    Null,
}

/// Which kinds of IP addresses are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Families {
    /// Both.
    #[default]
    Any,
    /// Only IPv4.
    Ipv4,
    /// Only IPv6.
    Ipv6,
}

impl Families {
    /// Whether `address` is of one of them.
    pub fn contains(self, address: IpAddr) -> bool {
        match self {
            Self::Any => true,
            Self::Ipv4 => address.is_ipv4(),
            Self::Ipv6 => address.is_ipv6(),
        }
    }

    /// Those in both.
    pub(crate) fn and(self, other: Self) -> Option<Self> {
        match (self, other) {
            (Self::Any, one) | (one, Self::Any) => Some(one),
            (a, b) => (a == b).then_some(a),
        }
    }
}

/// For what a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FileMode {
    /// To read; it must exist.
    #[default]
    Read,
    /// To write, from an empty file on; made if it is not there.
    Write,
    /// For both, as it is; made if it is not there.
    ReadWrite,
    /// To write at its end; made if it is not there.
    Append,
}

/// What is set on the socket of an [`Address`]. `None`: as the caller's options say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct SocketPart {
    /// To connect, look-up included.
    pub timeout: Option<Duration>,
    /// For the handshake of TLS, and for that of WebSocket.
    pub handshake_timeout: Option<Duration>,
    /// `TCP_NODELAY`.
    pub no_delay: Option<bool>,
    /// `SO_KEEPALIVE`.
    pub keep_alive: Option<KeepAlivePart>,
    /// `TCP_USER_TIMEOUT`.
    pub user_timeout: Option<Duration>,
    /// `SO_SNDBUF`, in bytes.
    pub send_buffer: Option<u32>,
    /// `SO_RCVBUF`, in bytes.
    pub receive_buffer: Option<u32>,
    /// Connections that wait to be accepted.
    pub backlog: Option<u32>,
}

/// Whether and how a silent peer is asked if it is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeepAlivePart {
    /// Not.
    Off,
    /// It is, at these times (in whole seconds).
    On(KeepAlive),
}

/// TLS on top of an [`Address`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TlsPart {
    /// File of certificate authorities (PEM). `None`: the system's, to connect; nobody's, to listen.
    pub ca: Option<PathBuf>,
    /// File of this side's certificate chain (PEM).
    pub certificate: Option<PathBuf>,
    /// File of its key (PEM).
    pub key: Option<PathBuf>,
    /// Files of certificate revocation lists (PEM).
    pub crls: Vec<PathBuf>,
    /// The name to ask for and to check, if it is not the host.
    pub server_name: Option<String>,
    /// Application protocols, best first.
    pub alpn: Vec<String>,
    /// The versions that are spoken.
    pub versions: Option<TlsVersions>,
    /// To listen: whether clients show a certificate.
    pub client_certificate: Option<ClientCertificates>,
    /// To listen: the names that clients' certificates may have; empty: any.
    pub allowed_names: Vec<String>,
}

/// WebSocket on top of an [`Address`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct WebSocketPart {
    /// The path to ask for, as it is sent; begins with `/`.
    pub path: String,
    /// What follows `?` in the request, as it is sent.
    pub query: Option<String>,
    /// The `Host` to ask for, if it is not the address's own.
    pub host: Option<String>,
    /// Subprotocols, best first.
    pub protocols: Vec<String>,
}

impl Default for WebSocketPart {
    fn default() -> Self {
        Self { path: "/".to_owned(), query: None, host: None, protocols: Vec::new() }
    }
}

impl Address {
    /// An address with nothing on top, and no options.
    pub fn new(place: Place) -> Self {
        Self { place, tls: None, web_socket: None, socket: SocketPart::default() }
    }

    /// A TCP port of a host.
    pub fn tcp(host: impl Into<String>, port: u16) -> Self {
        Self::new(Place::Tcp { host: host.into(), port, to: None, families: Families::Any })
    }

    /// A Unix socket at a path.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self::new(Place::UnixPath { path: path.into(), mode: None, unlink: None })
    }

    /// The same with TLS on top.
    #[must_use]
    pub fn with_tls(mut self, tls: TlsPart) -> Self {
        self.tls = Some(tls);
        self
    }

    /// The same with WebSocket on top.
    #[must_use]
    pub fn with_web_socket(mut self, web_socket: WebSocketPart) -> Self {
        self.web_socket = Some(web_socket);
        self
    }

    /// The host that TLS and WebSocket ask for where nothing else is said.
    pub(crate) fn own_host(&self) -> &str {
        match &self.place {
            Place::Tcp { host, .. } if !host.is_empty() => host,
            _ => "localhost",
        }
    }
}

impl TryFrom<&Endpoint> for Address {
    type Error = crate::Error;

    /// The address that leads to `endpoint`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for a Unix socket without a name.
    fn try_from(endpoint: &Endpoint) -> Result<Self, crate::Error> {
        Ok(match endpoint {
            Endpoint::Ip(at) => {
                let host = match at {
                    std::net::SocketAddr::V6(at) if at.scope_id() != 0 => {
                        format!("{}%{}", at.ip(), at.scope_id())
                    }
                    at => at.ip().to_string(),
                };
                Self::tcp(host, at.port())
            }
            Endpoint::UnixPath(path) => Self::unix(path),
            Endpoint::UnixAbstract(name) => Self::new(Place::UnixAbstract { name: name.clone() }),
            Endpoint::Vsock { cid, port } => Self::new(Place::Vsock { cid: *cid, port: *port }),
            Endpoint::UnixUnnamed => {
                return Err(crate::Error::new(
                    crate::ErrorKind::Invalid,
                    "a Unix socket without a name cannot be connected to: bind it to a path first",
                ));
            }
        })
    }
}
