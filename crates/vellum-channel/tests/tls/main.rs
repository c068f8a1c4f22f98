//! TLS channels: good and bad peers of every kind, what is bounded, and what the contract of channels asks for.

mod certificates;
mod contract;
mod early_data;
mod hostile;
mod openssl;
mod options;
mod pki;
mod sockets;

use std::fmt::Debug;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use vellum_channel::{
    Channel, ChannelExt, ErrorKind, Interest, ReadFlags, Stream, Tls, TlsClient, TlsClientOptions, TlsServer,
    TlsServerOptions, TlsVersions, kind_of,
};

pub(crate) type Wire = Stream<UnixStream>;

/// Nothing here takes that long.
pub(crate) async fn soon<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(30), what).await.expect("done in time")
}

/// Two ends, connected.
pub(crate) fn wires() -> (Wire, Wire) {
    let (near, far) = UnixStream::pair().unwrap();
    (Stream::new(near), Stream::new(far))
}

/// What both ends make of a handshake.
pub(crate) struct Shaken<C> {
    pub(crate) client: io::Result<Tls<C>>,
    pub(crate) server: io::Result<Tls<C>>,
}

impl<C: Debug> Shaken<C> {
    #[track_caller]
    pub(crate) fn both(self) -> (Tls<C>, Tls<C>) {
        match (self.client, self.server) {
            (Ok(client), Ok(server)) => (client, server),
            (client, server) => panic!("not content: {:?} {:?}", client.err(), server.err()),
        }
    }
}

/// Lets a client and a server shake hands over `wires`.
pub(crate) async fn shake_over<C: Channel>(
    wires: (C, C),
    client: &TlsClient,
    server: &TlsServer,
    name: &str,
) -> Shaken<C> {
    let (near, far) = wires;
    let (client, server) = soon(async { tokio::join!(client.connect(near, name), server.accept(far)) }).await;
    Shaken { client, server }
}

pub(crate) async fn shake(client: &TlsClient, server: &TlsServer) -> Shaken<Wire> {
    shake_over(wires(), client, server, "server.test").await
}

/// The error of a handshake, whose kind and words are checked.
#[track_caller]
pub(crate) fn refusal<T: Debug>(result: io::Result<T>, kind: ErrorKind, words: &[&str]) {
    let error = result.expect_err("a refusal");
    let text = error.to_string();
    assert_eq!(kind_of(&error), Some(kind), "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
    assert!(text.len() < 1200 && !text.contains('\n'), "fit for a log line: {text}");
}

/// A client that trusts `ca`.
pub(crate) fn client_of(ca: &pki::Ca) -> TlsClientOptions {
    TlsClientOptions { ca: Some(ca.pem()), ..TlsClientOptions::default() }
}

/// A good server that `ca` vouches for.
pub(crate) fn server_of(ca: &pki::Ca) -> TlsServerOptions {
    TlsServerOptions::new(ca.holder(pki::server).identity())
}

/// A client and a server that are content with each other.
pub(crate) fn good() -> (TlsClient, TlsServer) {
    good_with(TlsVersions::Tls13)
}

/// The same, of certain versions.
pub(crate) fn good_with(versions: TlsVersions) -> (TlsClient, TlsServer) {
    let ca = pki::ca("ca");
    let client = TlsClientOptions { versions, ..client_of(&ca) };
    let server = TlsServerOptions { versions, ..server_of(&ca) };
    (TlsClient::new(client).unwrap(), TlsServer::new(server).unwrap())
}

#[tokio::test]
async fn a_cut_stream_is_an_error_unless_relaxed() {
    let (mut near, far) = contract::pair().await;
    drop(far);
    let mut buf = [0; 10];
    for _ in 0..2 {
        refusal(
            soon(near.readv(&mut [IoSliceMut::new(&mut buf)])).await,
            ErrorKind::TlsTruncated,
            &["close_notify"],
        );
    }
    assert_eq!(soon(near.ready(Interest::READ)).await.unwrap(), Interest::READ);
    let relaxed = near.readv_full(&mut [IoSliceMut::new(&mut buf)], None, ReadFlags::RELAXED_EOF).await;
    assert_eq!(relaxed.unwrap(), 0);
    // Bytes that came before the cut come first.
    let (mut near, mut far) = contract::pair().await;
    far.write_all(b"all there is").await.unwrap();
    drop(far);
    let mut got = Vec::new();
    let error = soon(near.read_to_end(&mut got)).await.unwrap_err();
    assert_eq!((kind_of(&error), got.as_slice()), (Some(ErrorKind::TlsTruncated), &b"all there is"[..]));
}
