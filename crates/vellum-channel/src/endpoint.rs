//! The addresses of a connection's ends, as the kernel tells them.

use crate::address::{PATH, PrintPath};
use percent_encoding::percent_encode;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

/// One end of a connection. Prints as the text that [`Address`](crate::Address) reads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Endpoint {
    /// TCP over IPv4 or IPv6.
    Ip(SocketAddr),
    /// A Unix socket bound to a path.
    UnixPath(PathBuf),
    /// A Unix socket bound to an abstract name.
    UnixAbstract(Vec<u8>),
    /// A Unix socket bound to nothing, as connecting ends are.
    UnixUnnamed,
    /// A socket between a virtual machine and its host.
    Vsock {
        /// Context identifier of the machine.
        cid: u32,
        /// Port.
        port: u32,
    },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // RFC 6874: the % before a zone is itself written %25.
            Self::Ip(SocketAddr::V6(at)) if at.scope_id() != 0 => {
                write!(f, "tcp://[{}%25{}]:{}", at.ip(), at.scope_id(), at.port())
            }
            Self::Ip(address) => write!(f, "tcp://{address}"),
            Self::UnixPath(path) => write!(f, "unix:{}", PrintPath(path)),
            Self::UnixAbstract(name) => write!(f, "unix:@{}", percent_encode(name, PATH)),
            Self::UnixUnnamed => f.write_str("unix:"),
            Self::Vsock { cid, port } => write!(f, "vsock://{}:{port}", PrintCid(*cid)),
        }
    }
}

/// A context identifier; that of whoever listens for any is a word.
pub(crate) struct PrintCid(pub u32);

impl fmt::Display for PrintCid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == u32::MAX { f.write_str("any") } else { self.0.fmt(f) }
    }
}

/// The process at the other end of a local socket, when the connection was made (`SO_PEERCRED`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PeerProcess {
    /// Process identifier, as this process's namespace sees it.
    pub pid: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}
