//! Case T02: what is sent before a handshake is complete can be sent again by anybody who saw it, so nobody does, and nobody
//! is told that they may. rustls itself stands at the other end, where it would.

use crate::{client_of, pki, server_of, soon};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, HandshakeKind, RootCertStore, ServerConfig};
use std::io::Write;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use vellum_channel::{Stream, TlsClient, TlsServer};

fn eager_client(ca: &pki::Ca) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.issuer.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.enable_early_data = true;
    Arc::new(config)
}

fn eager_server(ca: &pki::Ca) -> Arc<ServerConfig> {
    let holder = ca.holder(pki::server);
    let chain = vec![CertificateDer::from_pem_slice(holder.own.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(holder.key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.max_early_data_size = 1000;
    Arc::new(config)
}

/// Connects; says whether it could send something ahead of the handshake.
async fn connect(config: &Arc<ClientConfig>, wire: UnixStream) -> (client::TlsStream<UnixStream>, bool) {
    let mut has_sent = false;
    let name = ServerName::try_from("server.test").unwrap();
    let connecting = TlsConnector::from(config.clone()).connect_with(name, wire, |connection| {
        has_sent = connection.early_data().is_some_and(|mut early| early.write(b"early").unwrap() == 5);
    });
    (connecting.await.unwrap(), has_sent)
}

async fn accept(config: &Arc<ServerConfig>, wire: UnixStream) -> server::TlsStream<UnixStream> {
    TlsAcceptor::from(config.clone()).accept(wire).await.unwrap()
}

/// Has the client read something, and with it the tickets that let it come back.
async fn give_tickets(near: &mut (impl AsyncReadExt + Unpin), far: &mut (impl AsyncWriteExt + Unpin)) {
    far.write_all(b"x").await.unwrap();
    far.flush().await.unwrap();
    soon(near.read_exact(&mut [0; 1])).await.unwrap();
}

/// What the two tests below rule out does happen where both sides want it.
#[tokio::test]
async fn both_would_if_they_were_rustls_itself() {
    let ca = pki::ca("ca");
    let (client, server) = (eager_client(&ca), eager_server(&ca));
    for comes_back in [false, true] {
        let (near, far) = UnixStream::pair().unwrap();
        let ((mut near, has_sent), mut far) =
            soon(async { tokio::join!(connect(&client, near), accept(&server, far)) }).await;
        assert_eq!((has_sent, far.get_mut().1.early_data().is_some()), (comes_back, comes_back));
        give_tickets(&mut near, &mut far).await;
    }
}

#[tokio::test]
async fn a_server_offers_nobody_to_send_early() {
    let ca = pki::ca("ca");
    let (client, server) = (eager_client(&ca), TlsServer::new(server_of(&ca)).unwrap());
    for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let (near, far) = UnixStream::pair().unwrap();
        let ((mut near, has_sent), far) =
            soon(async { tokio::join!(connect(&client, near), server.accept(Stream::new(far))) }).await;
        assert_eq!(near.get_ref().1.handshake_kind(), Some(kind));
        assert!(!has_sent);
        give_tickets(&mut near, &mut far.unwrap()).await;
    }
}

#[tokio::test]
async fn a_client_sends_nothing_early() {
    let ca = pki::ca("ca");
    let (client, server) = (TlsClient::new(client_of(&ca)).unwrap(), eager_server(&ca));
    for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let (near, far) = UnixStream::pair().unwrap();
        let connecting = client.connect(Stream::new(near), "server.test");
        let (near, mut far) = soon(async { tokio::join!(connecting, accept(&server, far)) }).await;
        assert_eq!(far.get_ref().1.handshake_kind(), Some(kind));
        assert!(far.get_mut().1.early_data().is_none());
        give_tickets(&mut near.unwrap(), &mut far).await;
    }
}
