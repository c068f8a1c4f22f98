//! From an address to a channel.

use super::{ConnectOptions, Connector, Destination, SystemConnector};
use crate::address::{Address, FileMode, Place};
use crate::channel::Channel;
use crate::command::Command;
use crate::endpoint::Endpoint;
use crate::error::{Error, ErrorKind, error, kind_of};
use crate::file::{File, FileOptions};
use crate::inherited::open_fd;
use crate::null::Null;
use crate::passed;
use crate::socket::{Socket, SocketOptions};
use crate::stream::Stream;
use crate::tls::TlsClient;
use crate::websocket::WebSocket;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Opens the channel that leads to `address`, through the system's network stack.
///
/// ```no_run
/// # async fn example() -> std::io::Result<()> {
/// use vellum_channel::{ConnectOptions, connect};
/// let address = "tls+tcp://disks.example:10809?ca=/etc/ca.pem".parse().map_err(std::io::Error::from)?;
/// let mut channel = connect(&address, &ConnectOptions::default()).await?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// Those of [`connect_through`].
pub async fn connect(address: &Address, options: &ConnectOptions) -> io::Result<Box<dyn Channel>> {
    connect_through(&SystemConnector, address, options).await
}

/// Opens the channel that leads to `address`; what is TCP, a Unix socket or vsock through `connector`.
///
/// # Errors
/// Those of [`Connector::connect`]; those of the handshakes of [`TlsClient::connect`] and [`WebSocket::connect`];
/// [`ErrorKind::Invalid`] for an address that can only be listened on; [`ErrorKind::WrongDescriptor`] for an inherited
/// descriptor that is not there or of another type; [`ErrorKind::Command`].
pub async fn connect_through(
    connector: &dyn Connector,
    address: &Address,
    options: &ConnectOptions,
) -> io::Result<Box<dyn Channel>> {
    // Wrong credentials are found before anybody is called.
    let tls = tls_client(address, options).await?;
    let mut channel = open_place(connector, address, options).await?;
    if let Some(tls) = tls {
        channel = Box::new(tls.connect(channel, address.tls_name()).await?);
    }
    if let Some(part) = &address.web_socket {
        let options = part.client_options(&address.socket);
        channel = Box::new(WebSocket::connect(channel, &address.web_socket_host(), &options).await?);
    }
    Ok(channel)
}

async fn tls_client(address: &Address, options: &ConnectOptions) -> io::Result<Option<TlsClient>> {
    let Some(part) = &address.tls else { return Ok(None) };
    if let Some(tls) = &options.tls {
        return Ok(Some(tls.clone()));
    }
    let options = part.client_options(&address.socket)?;
    // It reads files.
    let making = tokio::task::spawn_blocking(move || TlsClient::new(options));
    making.await.map_err(io::Error::other)?.map(Some)
}

async fn open_place(
    connector: &dyn Connector,
    address: &Address,
    options: &ConnectOptions,
) -> io::Result<Box<dyn Channel>> {
    let to = match &address.place {
        Place::Tcp { host, port, to, .. } => {
            if host.is_empty() || *port == 0 || to.is_some() {
                return Err(error(
                    ErrorKind::Invalid,
                    format!(
                        "{address} can only be listened on: to connect, name a host and one port from 1 to 65535"
                    ),
                ));
            }
            Destination::Host { name: host.clone(), port: *port }
        }
        Place::UnixPath { path, .. } => Destination::Endpoint(Endpoint::UnixPath(path.clone())),
        Place::UnixAbstract { name } => Destination::Endpoint(Endpoint::UnixAbstract(name.clone())),
        Place::Vsock { cid, port } => Destination::Endpoint(Endpoint::Vsock { cid: *cid, port: *port }),
        Place::Exec { command } => return Ok(Box::new(Command::shell(command)?)),
        Place::Fd { number } => return open_passed(*number, address, options),
        Place::File { path, mode } => return open_file(path, *mode).await,
        Place::Stdio => return standard_streams(),
        Place::Null => return Ok(Box::new(Null::new())),
    };
    connector.connect(&to, &for_address(address, options)?).await
}

/// `options`, with what the address says instead.
fn for_address(address: &Address, options: &ConnectOptions) -> io::Result<ConnectOptions> {
    let mut options = options.clone();
    options.socket = address.socket.over(&options.socket);
    options.timeout = address.socket.timeout.unwrap_or(options.timeout);
    if let Place::Tcp { families, .. } = address.place {
        options.families = options.families.and(families).ok_or_else(|| {
            error(
                ErrorKind::Invalid,
                format!("{address} and the options of the caller leave neither IPv4 nor IPv6"),
            )
        })?;
    }
    Ok(options)
}

/// A socket, pipe or file that this process inherited.
fn open_passed(number: i32, address: &Address, options: &ConnectOptions) -> io::Result<Box<dyn Channel>> {
    let fd = passed::take(number)?;
    let what = passed::type_of(&fd)?;
    let opened = if what == "socket" {
        let set = |mut socket: Socket| {
            socket.set_options(&address.socket.over(&options.socket))?;
            Ok(Box::new(socket) as Box<dyn Channel>)
        };
        Socket::from_fd(fd).and_then(set)
    } else if address.socket.over(&SocketOptions::default()) != SocketOptions::default() {
        Err(error(
            ErrorKind::Invalid,
            format!("a {what} has none of the options of sockets that {address} names"),
        ))
    } else {
        open_fd(fd)
    };
    opened.map_err(|cause| match kind_of(&cause) {
        Some(kind) => Error::new(kind, format!("descriptor {number}")).because(cause).into(),
        None => cause,
    })
}

async fn open_file(path: &Path, mode: FileMode) -> io::Result<Box<dyn Channel>> {
    let mut how = FileOptions::default();
    match mode {
        FileMode::Read => how.read = true,
        FileMode::Write => (how.write, how.create, how.truncate) = (true, true, true),
        FileMode::ReadWrite => (how.read, how.write, how.create) = (true, true, true),
        FileMode::Append => (how.append, how.create) = (true, true),
    }
    Ok(Box::new(File::open(path, &how).await?))
}

/// Standard input and output as one channel; if they are the same socket (inetd), that.
fn standard_streams() -> io::Result<Box<dyn Channel>> {
    let (input, output) = (passed::take(0)?, passed::take(1)?);
    let is_socket = passed::type_of(&input)? == "socket";
    let mut channel: Box<dyn Channel> = if is_socket && is_same(&input, &output)? {
        open_fd(input)?
    } else {
        Box::new(Stream::new(tokio::io::join(open_fd(input)?, open_fd(output)?)))
    };
    channel.set_name("stdio");
    Ok(channel)
}

fn is_same(one: &OwnedFd, other: &OwnedFd) -> io::Result<bool> {
    let (one, other) = (rustix::fs::fstat(one)?, rustix::fs::fstat(other)?);
    Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}
