//! From an address to listening sockets.

use super::handshake::Layers;
use super::options::ListenerOptions;
use crate::address::{Address, Families, Place};
use crate::dns::{LookupOptions, lookup};
use crate::endpoint::Endpoint;
use crate::error::{Error, ErrorKind, error};
use crate::passed;
use crate::socket::{ListenOptions, SocketListener};
use std::error::Error as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

/// How often a free port is asked for until it is free at all addresses.
const FREE_PORT_TRIES: u32 = 16;

/// A listening socket, with what is on top of its connections.
pub(super) struct Bound {
    pub socket: SocketListener,
    pub layers: Arc<Layers>,
    pub endpoint: Endpoint,
}

/// Listens on `address`: on at least one socket.
pub(super) async fn bind(address: &Address, options: &ListenerOptions) -> io::Result<Vec<SocketListener>> {
    let mut listen = options.listen.clone();
    listen.socket = address.socket.over(&listen.socket);
    listen.backlog = address.socket.backlog.unwrap_or(listen.backlog);
    let endpoint = match &address.place {
        Place::Tcp { host, port, to, families } => {
            let at = candidates(host, *port, *families, options).await?;
            return bind_tcp(address, &at, *port..=to.unwrap_or(*port), &listen);
        }
        Place::UnixPath { path, mode, unlink } => {
            listen.unix_mode = mode.or(listen.unix_mode);
            listen.unlink_existing = unlink.unwrap_or(listen.unlink_existing);
            Endpoint::UnixPath(path.clone())
        }
        Place::UnixAbstract { name } => Endpoint::UnixAbstract(name.clone()),
        Place::Vsock { cid, port } => Endpoint::Vsock { cid: *cid, port: *port },
        Place::Fd { number } => return inherited_listener(*number, &listen).map(|one| vec![one]),
        Place::Exec { .. } | Place::File { .. } | Place::Stdio | Place::Null => {
            return Err(error(
                ErrorKind::Unsupported,
                format!("{address} cannot be listened on: TCP, Unix sockets, vsock and fd:N can"),
            ));
        }
    };
    Ok(vec![SocketListener::bind(&endpoint, &listen)?])
}

fn inherited_listener(number: i32, listen: &ListenOptions) -> io::Result<SocketListener> {
    let fd = passed::take(number)?;
    let mut socket = SocketListener::from_fd(fd).map_err(|cause| {
        Error::new(ErrorKind::WrongDescriptor, format!("descriptor {number}")).because(cause)
    })?;
    socket.set_socket_options(listen.socket.clone())?;
    Ok(socket)
}

/// An address to listen on, and whether IPv4 is left alone there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Candidate {
    at: SocketAddr,
    ipv6_only: bool,
}

/// The addresses of a host; of none, all of this machine, each family with a socket of its own.
async fn candidates(
    host: &str,
    port: u16,
    families: Families,
    options: &ListenerOptions,
) -> io::Result<Vec<Candidate>> {
    if host.is_empty() {
        let all = [IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)];
        let wanted = all.into_iter().filter(|ip| families.contains(*ip));
        return Ok(wanted.map(|ip| Candidate { at: SocketAddr::new(ip, port), ipv6_only: true }).collect());
    }
    let lookup_options = LookupOptions { families, timeout: options.lookup_timeout };
    let found = lookup(host, port, &lookup_options).await?;
    // `[::]` by name takes IPv4 too, unless that is not wanted.
    let ipv6_only = families == Families::Ipv6 || options.listen.ipv6_only;
    Ok(found.into_iter().map(|at| Candidate { at, ipv6_only }).collect())
}

/// What came of listening on all candidates at one port.
#[derive(Default)]
struct Attempt {
    sockets: Vec<SocketListener>,
    errors: Vec<(SocketAddr, io::Error)>,
}

impl Attempt {
    fn is_in_use(&self) -> bool {
        self.errors.iter().any(|(_, error)| is_in_use(error))
    }
}

/// Listens at the first port that is free at all candidates, or else at as many as there are.
fn bind_tcp(
    address: &Address,
    candidates: &[Candidate],
    ports: std::ops::RangeInclusive<u16>,
    listen: &ListenOptions,
) -> io::Result<Vec<SocketListener>> {
    let mut best = Attempt::default();
    let tries = if *ports.start() == 0 && *ports.end() == 0 { FREE_PORT_TRIES } else { 1 };
    for port in (0..tries).flat_map(|_| ports.clone()) {
        let attempt = bind_all(candidates, port, listen);
        let is_final = !attempt.is_in_use();
        if attempt.sockets.len() > best.sockets.len() || best.errors.is_empty() {
            best = attempt;
        }
        if is_final {
            break;
        }
    }
    let why: Vec<String> = best.errors.iter().map(|(at, error)| format!("{at}: {}", cause(error))).collect();
    if best.sockets.is_empty() {
        return Err(error(ErrorKind::Listen, format!("cannot listen on {address}: {}", why.join("; "))));
    }
    if !why.is_empty() {
        tracing::warn!(%address, why = why.join("; "), "listening on some of the addresses only");
    }
    Ok(best.sockets)
}

/// Listens on all candidates that can be, at one port; at the same one also if the system is to choose it.
fn bind_all(candidates: &[Candidate], mut port: u16, listen: &ListenOptions) -> Attempt {
    let mut attempt = Attempt::default();
    for candidate in candidates {
        let at = SocketAddr::new(candidate.at.ip(), port);
        let at = match (at, candidate.at) {
            (SocketAddr::V6(mut at), SocketAddr::V6(zoned)) => {
                at.set_scope_id(zoned.scope_id());
                SocketAddr::V6(at)
            }
            (at, _) => at,
        };
        let mut listen = listen.clone();
        listen.ipv6_only = candidate.ipv6_only;
        match SocketListener::bind(&Endpoint::Ip(at), &listen) {
            Ok(socket) => {
                if let (0, Ok(Endpoint::Ip(chosen))) = (port, socket.local_endpoint()) {
                    port = chosen.port();
                }
                attempt.sockets.push(socket);
            }
            Err(error) => attempt.errors.push((at, error)),
        }
    }
    attempt
}

/// What the kernel said, without the address, which is told beside it.
fn kernels(error: &io::Error) -> Option<&io::Error> {
    let inner = error.get_ref()?.downcast_ref::<Error>()?;
    inner.source()?.downcast_ref::<io::Error>()
}

fn cause(error: &io::Error) -> String {
    kernels(error).unwrap_or(error).to_string()
}

fn is_in_use(error: &io::Error) -> bool {
    kernels(error).unwrap_or(error).kind() == io::ErrorKind::AddrInUse
}
