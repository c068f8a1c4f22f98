//! Listening on several addresses at once.

mod accept;
mod bind;
mod counted;
mod handshake;
mod options;

pub use options::{Admission, Agreed, ListenerOptions, Peer};

use crate::activation::Activated;
use crate::address::Address;
use crate::channel::Channel;
use crate::endpoint::Endpoint;
use crate::error::{ErrorKind, error};
use crate::socket::SocketListener;
use accept::AcceptLoop;
use bind::Bound;
use handshake::Layers;
use parking_lot::Mutex;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// A connection, or the end of one of the listening sockets.
type Ready = io::Result<(Box<dyn Channel>, Peer)>;

/// Accepts connections on any number of addresses, with TLS and WebSocket where the address says so.
///
/// A task accepts, fairly over the sockets, as long as there is room for connections
/// ([`ListenerOptions::connections_max`]); more wait in the kernel's backlog. What has to be awaited before a connection
/// is of use (admission, the handshakes of TLS and WebSocket) is done for each on a task of its own, within its time
/// limits: one that stalls holds up nobody, and no more than [`ListenerOptions::pending_max`] are under way or waiting to
/// be taken. Those that fail are dropped, counted ([`Listener::counts`]) and logged; they are not
/// [`next`](Listener::next)'s errors.
///
/// Dropping it is [`stop`](Listener::stop) without waiting.
///
/// ```
/// # use vellum_channel::{Address, ConnectOptions, Listener, ListenerOptions, connect};
/// # use tokio::io::{AsyncReadExt, AsyncWriteExt};
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let mut listener = Listener::new(ListenerOptions::default());
/// let at = listener.add(&"tcp://127.0.0.1:0".parse().unwrap()).await?;
/// let mut client = connect(&Address::try_from(&at[0]).unwrap(), &ConnectOptions::default()).await?;
/// client.write_all(b"hello").await?;
///
/// let (mut channel, peer) = listener.next().await?;
/// let mut got = [0; 5];
/// channel.read_exact(&mut got).await?;
/// assert_eq!(&got, b"hello");
/// println!("{} says hello", peer.endpoint);
/// listener.stop().await;
/// # std::io::Result::Ok(())
/// # }).unwrap();
/// ```
pub struct Listener {
    ready: mpsc::Receiver<Ready>,
    handle: ListenerHandle,
}

/// Acts on a [`Listener`] while another task waits for its connections. Clone it, send it anywhere.
#[derive(Clone)]
pub struct ListenerHandle {
    shared: Arc<Shared>,
}

/// What became of the connections of a [`Listener`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListenerCounts {
    /// Open now, those included that are not ready yet or not taken.
    pub open: usize,
    /// Accepted from the kernel.
    pub accepted: u64,
    /// Of those, turned away by the admission.
    pub refused: u64,
    /// Of those, failed in the handshake or before.
    pub failed: u64,
}

/// What the handles, the accepting task and the connections share.
struct Shared {
    options: ListenerOptions,
    stop: watch::Sender<bool>,
    is_gone: watch::Sender<bool>,
    open: watch::Sender<usize>,
    sockets: mpsc::UnboundedSender<Bound>,
    endpoints: Mutex<Vec<Endpoint>>,
    accepted: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
}

impl Listener {
    /// A listener that listens nowhere yet: [`add`](Listener::add) addresses. Its task runs on the current executor.
    ///
    /// # Panics
    /// Outside of a Tokio runtime.
    pub fn new(options: ListenerOptions) -> Self {
        let pending_max = options.pending_max.clamp(1, 1 << 16);
        let (ready_sender, ready) = mpsc::channel(pending_max);
        let (sockets, added) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            options,
            stop: watch::Sender::new(false),
            is_gone: watch::Sender::new(false),
            open: watch::Sender::new(0),
            sockets,
            endpoints: Mutex::default(),
            accepted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        });
        tokio::spawn(AcceptLoop::new(shared.clone(), added, ready_sender).run());
        Self { ready, handle: ListenerHandle { shared } }
    }

    /// A listener on all these addresses.
    ///
    /// # Errors
    /// Those of [`add`](Listener::add), of the first address that cannot be listened on at all.
    pub async fn bind(addresses: &[Address], options: ListenerOptions) -> io::Result<Self> {
        let listener = Self::new(options);
        for address in addresses {
            listener.add(address).await?;
        }
        Ok(listener)
    }

    /// Listens on one more address; tells the endpoints.
    ///
    /// A host name is listened on at all its addresses, no host at all those of this machine (IPv4 and IPv6); with `to=`,
    /// at the first port from the address's own up to that one which is free at all of them. That some fail is logged, as
    /// long as there is one that succeeds.
    ///
    /// # Errors
    /// [`ErrorKind::Listen`] when none could be listened on, with what was wrong at each; [`ErrorKind::Resolve`];
    /// [`ErrorKind::Unsupported`] for places that cannot be listened on; [`ErrorKind::WrongDescriptor`]; those of TLS
    /// credentials; [`ErrorKind::Closed`] after a stop.
    pub async fn add(&self, address: &Address) -> io::Result<Vec<Endpoint>> {
        self.handle.add(address).await
    }

    /// Listens on a socket that listens already. `above` names what is on top of it: its TLS and WebSocket parts and
    /// options are used, its place is not.
    ///
    /// # Errors
    /// Those of TLS credentials; [`ErrorKind::Closed`] after a stop.
    pub async fn add_socket(&self, socket: SocketListener, above: Option<&Address>) -> io::Result<Endpoint> {
        self.handle.add_socket(socket, above).await
    }

    /// Listens on a socket that the service manager passed. See [`add_socket`](Listener::add_socket).
    ///
    /// # Errors
    /// [`ErrorKind::WrongDescriptor`], and those of [`add_socket`](Listener::add_socket).
    pub async fn add_activated(&self, passed: Activated, above: Option<&Address>) -> io::Result<Endpoint> {
        self.handle.add_socket(passed.into_listener()?, above).await
    }

    /// Waits for the next connection that is ready for use.
    ///
    /// Nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] after a stop, when all that were ready have been taken. Any other: one of the listening
    /// sockets broke and was given up; the next call goes on with the others.
    pub async fn next(&mut self) -> io::Result<(Box<dyn Channel>, Peer)> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The same as a poll.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Ready> {
        self.ready.poll_recv(cx).map(|ready| ready.unwrap_or_else(|| Err(stopped())))
    }

    /// Acts on the listener from elsewhere.
    pub fn handle(&self) -> ListenerHandle {
        self.handle.clone()
    }

    /// Where it listens.
    pub fn local_endpoints(&self) -> Vec<Endpoint> {
        self.handle.local_endpoints()
    }

    /// What became of its connections.
    pub fn counts(&self) -> ListenerCounts {
        self.handle.counts()
    }

    /// Stops listening. See [`ListenerHandle::stop`].
    pub async fn stop(&self) {
        self.handle.stop().await;
    }

    /// Waits until all connections are closed. See [`ListenerHandle::wait_closed`].
    pub async fn wait_closed(&self, within: Duration) -> io::Result<()> {
        self.handle.wait_closed(within).await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.handle.shared.stop.send_replace(true);
    }
}

impl ListenerHandle {
    /// See [`Listener::add`].
    pub async fn add(&self, address: &Address) -> io::Result<Vec<Endpoint>> {
        self.check_not_stopped()?;
        let layers = Arc::new(Layers::of(address, &self.shared.options).await?);
        let mut endpoints = Vec::new();
        let mut bound = Vec::new();
        for socket in bind::bind(address, &self.shared.options).await? {
            let endpoint = socket.local_endpoint()?;
            endpoints.push(endpoint.clone());
            bound.push(Bound { socket, layers: layers.clone(), endpoint });
        }
        bound.into_iter().try_for_each(|one| self.accept_on(one))?;
        Ok(endpoints)
    }

    /// See [`Listener::add_socket`].
    pub async fn add_socket(
        &self,
        mut socket: SocketListener,
        above: Option<&Address>,
    ) -> io::Result<Endpoint> {
        self.check_not_stopped()?;
        let mut layers = Layers::default();
        if let Some(address) = above {
            layers = Layers::of(address, &self.shared.options).await?;
            socket.set_socket_options(address.socket.over(&self.shared.options.listen.socket))?;
        }
        let endpoint = socket.local_endpoint()?;
        self.accept_on(Bound { socket, layers: Arc::new(layers), endpoint: endpoint.clone() })?;
        Ok(endpoint)
    }

    fn accept_on(&self, bound: Bound) -> io::Result<()> {
        let endpoint = bound.endpoint.clone();
        // Before the loop can find it broken, and take it out.
        self.shared.endpoints.lock().push(endpoint);
        self.shared.sockets.send(bound).map_err(|_| stopped())
    }

    fn check_not_stopped(&self) -> io::Result<()> {
        if *self.shared.stop.borrow() { Err(stopped()) } else { Ok(()) }
    }

    /// Where it listens.
    pub fn local_endpoints(&self) -> Vec<Endpoint> {
        let is_gone = *self.shared.is_gone.borrow();
        if is_gone { Vec::new() } else { self.shared.endpoints.lock().clone() }
    }

    /// What became of the connections.
    pub fn counts(&self) -> ListenerCounts {
        ListenerCounts {
            open: *self.shared.open.borrow(),
            accepted: self.shared.accepted.load(Ordering::Relaxed),
            refused: self.shared.refused.load(Ordering::Relaxed),
            failed: self.shared.failed.load(Ordering::Relaxed),
        }
    }

    /// Stops listening: closes the listening sockets, removes the paths that were made for them, and breaks off
    /// handshakes under way. When it returns, all that is done, and the task that accepted is gone. Connections that were
    /// taken live on; those that are ready can still be taken by [`Listener::next`], which then answers
    /// [`ErrorKind::Closed`].
    pub async fn stop(&self) {
        self.shared.stop.send_replace(true);
        // Cannot fail: `shared` holds the sender.
        let _ = self.shared.is_gone.subscribe().wait_for(|is_gone| *is_gone).await;
    }

    /// Waits until all connections are closed or dropped, also those that nobody has taken.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`], which tells how many are still open.
    pub async fn wait_closed(&self, within: Duration) -> io::Result<()> {
        let mut open = self.shared.open.subscribe();
        if timeout(within, open.wait_for(|open| *open == 0)).await.is_ok() {
            return Ok(());
        }
        let open = *self.shared.open.borrow();
        Err(error(ErrorKind::Timeout, format!("{open} connections are still open after {within:?}")))
    }
}

fn stopped() -> io::Error {
    error(ErrorKind::Closed, "the listener was stopped: make a new one")
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener")
            .field("endpoints", &self.local_endpoints())
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ListenerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ListenerHandle")
            .field("endpoints", &self.local_endpoints())
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}
