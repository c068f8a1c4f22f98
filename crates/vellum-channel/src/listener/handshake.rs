//! What happens to a connection between the accept and its use.

use super::Ready;
use super::counted::Counted;
use super::options::{Failure, ListenerOptions, Peer};
use crate::address::Address;
use crate::channel::Channel;
use crate::error::{Error, ErrorKind};
use crate::socket::Socket;
use crate::tls::TlsServer;
use crate::websocket::{WebSocket, WebSocketOptions};
use std::io;
use tokio::sync::mpsc::OwnedPermit;
use tokio::time::timeout;

/// What is on top of a listening socket's connections.
#[derive(Debug, Default)]
pub(super) struct Layers {
    tls: Option<TlsServer>,
    web_socket: Option<WebSocketOptions>,
}

impl Layers {
    pub async fn of(address: &Address, options: &ListenerOptions) -> io::Result<Self> {
        let tls = match (&address.tls, &options.tls) {
            (None, _) => None,
            (Some(_), Some(given)) => Some(given.clone()),
            (Some(part), None) => {
                let options = part.server_options(&address.socket)?;
                // It reads files.
                let making = tokio::task::spawn_blocking(move || TlsServer::new(options));
                Some(making.await.map_err(io::Error::other)??)
            }
        };
        let web_socket = address.web_socket.as_ref().map(|part| part.options(&address.socket));
        Ok(Self { tls, web_socket })
    }

    pub fn is_none(&self) -> bool {
        self.tls.is_none() && self.web_socket.is_none()
    }

    async fn put_on(&self, channel: Counted<Socket>, peer: &mut Peer) -> io::Result<Box<dyn Channel>> {
        match (&self.tls, &self.web_socket) {
            (None, None) => Ok(Box::new(channel)),
            (None, Some(options)) => with_web_socket(channel, options, peer).await,
            (Some(tls), web_socket) => {
                let channel = tls.accept(channel).await?;
                peer.agreed.alpn = channel.alpn().map(str::to_owned);
                peer.agreed.subject = channel.peer_certificate().map(|certificate| certificate.subject);
                match web_socket {
                    None => Ok(Box::new(channel)),
                    Some(options) => with_web_socket(channel, options, peer).await,
                }
            }
        }
    }
}

async fn with_web_socket<C: Channel + 'static>(
    channel: C,
    options: &WebSocketOptions,
    peer: &mut Peer,
) -> io::Result<Box<dyn Channel>> {
    let channel = WebSocket::accept(channel, options).await?;
    peer.agreed.path = Some(channel.path().to_owned());
    peer.agreed.protocol = channel.protocol().map(str::to_owned);
    Ok(Box::new(channel))
}

/// Asks the admission, does the handshakes, and puts the connection into its slot.
pub(super) async fn prepare(
    options: &ListenerOptions,
    layers: &Layers,
    channel: Counted<Socket>,
    mut peer: Peer,
    slot: OwnedPermit<Ready>,
) -> Result<(), Failure> {
    let slot = admit(options, &peer, slot).await?;
    let channel = layers.put_on(channel, &mut peer).await?;
    drop(slot.send(Ok((channel, peer))));
    Ok(())
}

/// Asks the admission on a thread that may block. The thread has the slot: one that never ends keeps it, so that their
/// number is bounded.
async fn admit(
    options: &ListenerOptions,
    peer: &Peer,
    slot: OwnedPermit<Ready>,
) -> Result<OwnedPermit<Ready>, Failure> {
    let Some(admission) = options.admission.clone() else { return Ok(slot) };
    let asked = peer.clone();
    let asking = tokio::task::spawn_blocking(move || (admission.ask(&asked), slot));
    let refused = |why: String| {
        Failure::Refused(Error::new(ErrorKind::Refused, format!("{} is refused: {why}", peer.endpoint)))
    };
    match timeout(options.admission_timeout, asking).await {
        Ok(Ok((Ok(()), slot))) => Ok(slot),
        Ok(Ok((Err(why), _))) => Err(refused(why)),
        Ok(Err(panicked)) => Err(refused(format!("the admission failed: {panicked}"))),
        Err(_) => {
            Err(refused(format!("the admission did not decide within {:?}", options.admission_timeout)))
        }
    }
}
