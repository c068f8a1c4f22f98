//! Connections through the system's network stack.

use super::{ConnectOptions, Connecting, Connector, Destination};
use crate::channel::Channel;
use crate::dns::{LookupOptions, lookup};
use crate::endpoint::Endpoint;
use crate::error::{Error, ErrorKind, error};
use crate::happy_eyeballs::{interleaved, race};
use crate::socket::Socket;
use std::error::Error as _;
use std::io;
use std::net::SocketAddr;
use tokio::time::{Instant, timeout_at};

/// The system's network stack: hosts are looked up off the executor, and their addresses tried by RFC 8305 ("happy
/// eyeballs"): families take turns, the next attempt begins when one has failed or is slow, and the first that succeeds
/// wins.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemConnector;

impl Connector for SystemConnector {
    fn connect<'a>(&'a self, to: &'a Destination, options: &'a ConnectOptions) -> Connecting<'a> {
        Box::pin(async move {
            let socket = match to {
                Destination::Host { name, port } => connect_host(to, name, *port, options).await?,
                Destination::Endpoint(endpoint) => connect_endpoint(endpoint, options).await?,
            };
            Ok(Box::new(socket) as Box<dyn Channel>)
        })
    }
}

async fn connect_endpoint(to: &Endpoint, options: &ConnectOptions) -> io::Result<Socket> {
    let Some(deadline) = Instant::now().checked_add(options.timeout) else {
        return Socket::connect(to, &options.socket).await;
    };
    match timeout_at(deadline, Socket::connect(to, &options.socket)).await {
        Ok(done) => done,
        Err(_) => {
            Err(error(ErrorKind::Timeout, format!("no connection to {to} within {:?}", options.timeout)))
        }
    }
}

async fn connect_host(
    to: &Destination,
    name: &str,
    port: u16,
    options: &ConnectOptions,
) -> io::Result<Socket> {
    let lookup_options = LookupOptions { families: options.families, timeout: options.timeout };
    let deadline = Instant::now().checked_add(options.timeout);
    let addresses = interleaved(&lookup(name, port, &lookup_options).await?);
    let mut errors = Vec::new();
    let connect = |at: SocketAddr| async move {
        let at = Endpoint::Ip(at);
        Socket::connect(&at, &options.socket).await
    };
    let racing = race(&addresses, options.stagger, connect, &mut errors);
    let winner = match deadline {
        None => racing.await,
        Some(deadline) => timeout_at(deadline, racing).await.unwrap_or(None),
    };
    winner.ok_or_else(|| all_failed(to, &addresses, &errors, options).into())
}

/// One error that names what became of each address.
fn all_failed(
    to: &Destination,
    addresses: &[SocketAddr],
    errors: &[(SocketAddr, io::Error)],
    options: &ConnectOptions,
) -> Error {
    let outcome = |at: &SocketAddr| match errors.iter().find(|(failed, _)| failed == at) {
        Some((_, error)) => format!("{at}: {}", cause(error)),
        None => format!("{at}: no answer yet"),
    };
    let outcomes: Vec<String> = addresses.iter().map(outcome).collect();
    let outcomes = outcomes.join("; ");
    if errors.len() < addresses.len() {
        let message = format!("no connection to {to} within {:?}: {outcomes}", options.timeout);
        return Error::new(ErrorKind::Timeout, message);
    }
    Error::new(ErrorKind::Connect, format!("cannot connect to {to}: {outcomes}"))
}

/// What the kernel said, without the address, which is told beside it.
fn cause(error: &io::Error) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    inner.and_then(Error::source).map_or_else(|| error.to_string(), ToString::to_string)
}
