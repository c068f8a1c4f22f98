//! From a channel to a TLS channel, or to an error that says why not.

use super::channel::Tls;
use super::failure::{Failure, Peer};
use super::session::Session;
use super::verify::ClientCheck;
use crate::channel::{Channel, ReadFlags};
use crate::error::{ErrorKind, error};
use rustls::Connection;
use rustls::pki_types::UnixTime;
use rustls::server::danger::ClientCertVerifier;
use std::future::poll_fn;
use std::io::{self, IoSliceMut};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::timeout;

/// How long a peer that is refused has to read why.
const LINGER: Duration = Duration::from_millis(500);

/// The most that is read, and thrown away, of a peer that is refused.
const LINGER_BYTES: usize = 256 << 10;

/// What is agreed beyond what rustls sees to.
pub(super) struct Terms {
    pub handshake_timeout: Duration,
    pub close_timeout: Duration,
    /// The application protocols of this side, of which one must be agreed on if there are any.
    pub alpn: Vec<String>,
    /// Looks again at clients that come back with a ticket: rustls takes their word.
    pub returning: Option<Arc<ClientCheck>>,
}

/// Shakes hands over `below`.
pub(super) async fn shake<C: Channel>(
    mut below: C,
    connection: Connection,
    peer: Peer,
    terms: &Terms,
) -> io::Result<Tls<C>> {
    let mut session = Session::new(connection, peer);
    let shaking = poll_fn(|cx| session.poll_handshake(&mut below, cx));
    let Ok(shaken) = timeout(terms.handshake_timeout, shaking).await else {
        return Err(stalled(&session, terms.handshake_timeout));
    };
    if let Err(error) = shaken.and_then(|()| check(&mut session, terms)) {
        tell_why(&mut session, &mut below).await;
        return Err(session.hung_up_by(error));
    }
    Ok(Tls::new(below, session, terms.close_timeout))
}

fn stalled(session: &Session, allowed: Duration) -> io::Error {
    let whom = session.peer().whom();
    let far = if session.has_heard_nothing() { "it sent nothing" } else { "it stopped in the middle" };
    error(ErrorKind::Timeout, format!("the TLS handshake with {whom} was not done in {allowed:?}: {far}"))
}

/// What must hold once rustls is content.
fn check(session: &mut Session, terms: &Terms) -> io::Result<()> {
    if !terms.alpn.is_empty() && session.connection().alpn_protocol().is_none() {
        let (whom, ours) = (session.peer().whom(), terms.alpn.join(", "));
        let what =
            format!("{whom} knows no application protocols (ALPN), and one of these is needed: {ours}");
        session.fail(Failure::new(ErrorKind::TlsNoCommonProtocol, what));
    }
    if let (Some(check), true) = (&terms.returning, session.is_resumed()) {
        let chain = session.connection().peer_certificates().unwrap_or_default();
        if let Some((own, issuers)) = chain.split_first()
            && let Err(found) = check.verify_client_cert(own, issuers, UnixTime::now())
        {
            session.say_goodbye();
            session.fail_by(&found);
        }
    }
    session.failure().map_or(Ok(()), |failure| Err(failure.to_error()))
}

/// Sends the alert of a refusal, and stays long enough for the peer to read it: a socket that is closed while it holds
/// unread bytes is reset, and the alert lost with it.
async fn tell_why<C: Channel>(session: &mut Session, below: &mut C) {
    if !session.wants_send() {
        return;
    }
    let mut is_ended = false;
    let mut left = LINGER_BYTES;
    let telling = poll_fn(|cx| {
        ready!(session.poll_flush(below, cx))?;
        if !is_ended {
            ready!(Pin::new(&mut *below).poll_shutdown(cx))?;
            is_ended = true;
        }
        poll_discard(below, cx, &mut left)
    });
    // Whether it got there or not: the refusal is what is reported.
    let _ = timeout(LINGER, telling).await;
}

fn poll_discard<C: Channel>(below: &mut C, cx: &mut Context<'_>, left: &mut usize) -> Poll<io::Result<()>> {
    let mut room = [0; 4096];
    while *left > 0 {
        let bufs = &mut [IoSliceMut::new(&mut room)];
        let read = ready!(below.poll_readv(cx, bufs, None, ReadFlags::empty()))?;
        *left = left.saturating_sub(read);
        if read == 0 {
            break;
        }
    }
    Poll::Ready(Ok(()))
}
