//! Peers that mean harm, or speak something else: bounded time, bounded memory, a clear error.

use crate::pki;
use crate::{client_of, good, refusal, server_of, shake_over, soon, wires};
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use vellum_channel::{
    ChannelExt, ClientCertificates, ErrorKind, Pem, Stream, TlsClient, TlsClientOptions, TlsIdentity,
    TlsServer, TlsServerOptions, kind_of,
};

/// Has a client and a server of ours meet a peer that only ever says `words`, then closes or stays.
async fn meet(words: &[u8], stays: bool) -> [std::io::Result<()>; 2] {
    let ca = pki::ca("ca");
    let handshake_timeout = Duration::from_millis(300);
    let client = TlsClient::new(TlsClientOptions { handshake_timeout, ..client_of(&ca) }).unwrap();
    let server = TlsServer::new(TlsServerOptions { handshake_timeout, ..server_of(&ca) }).unwrap();
    let peer = async |mut wire: UnixStream| {
        wire.write_all(words).await.unwrap();
        if stays {
            // Takes what comes, and answers nothing.
            let _ = wire.read_to_end(&mut Vec::new()).await;
        }
    };
    let (near, far) = UnixStream::pair().unwrap();
    let (met, ()) =
        soon(async { tokio::join!(client.connect(Stream::new(near), "server.test"), peer(far)) }).await;
    let (near, far) = UnixStream::pair().unwrap();
    let (meeting, ()) = soon(async { tokio::join!(server.accept(Stream::new(near)), peer(far)) }).await;
    [met.map(drop), meeting.map(drop)]
}

#[tokio::test]
async fn other_protocols_are_recognized() {
    for (words, told) in [
        (&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], "plain HTTP"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "plain HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
        (b"NBDMAGICIHAVEOPT\0\x03", "plain NBD"),
        (b"\x1b[31mhello there", "begins with \"\\x1b[31mhel\""),
    ] {
        for stays in [true, false] {
            for met in meet(words, stays).await {
                refusal(met, ErrorKind::TlsNotTls, &[told, "not TLS"]);
            }
        }
    }
}

#[tokio::test]
async fn a_handshake_has_its_time() {
    let before = Instant::now();
    for (words, told) in [(&b""[..], "it sent nothing"), (b"\x16\x03\x01\x02\x00\x01", "in the middle")] {
        for met in meet(words, true).await {
            refusal(met, ErrorKind::Timeout, &["TLS handshake", "300ms", told]);
        }
    }
    assert!(before.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_peer_that_hangs_up_is_told_from_one_that_is_slow() {
    for (words, told) in [(&b""[..], "without a word"), (b"\x16\x03\x01\x02\x00\x01", "in the middle")] {
        for met in meet(words, false).await {
            refusal(met, ErrorKind::TlsTruncated, &["hung up", told]);
        }
    }
}

#[tokio::test]
async fn a_chain_of_a_megabyte_is_refused() {
    let ca = pki::ca("ca");
    let long = |mut holder: pki::Holder| {
        let filler = ca.issuer.pem();
        holder.chain.extend(std::iter::repeat_n(filler.as_str(), (1 << 20) / ca.issuer.der().len() + 1));
        TlsIdentity::new(Pem::text(holder.chain), Pem::text(holder.key))
    };
    let server = TlsServer::new(TlsServerOptions::new(long(ca.holder(pki::server)))).unwrap();
    let client = TlsClient::new(client_of(&ca)).unwrap();
    let shaken = shake_over(wires(), &client, &server, "server.test").await;
    refusal(shaken.client, ErrorKind::Limit, &["64 KiB"]);
    assert!(shaken.server.is_err());

    let identity = Some(long(ca.holder(pki::client)));
    let client = TlsClient::new(TlsClientOptions { identity, ..client_of(&ca) }).unwrap();
    let asking = TlsServerOptions {
        client_certificates: ClientCertificates::Required,
        ca: Some(ca.pem()),
        ..server_of(&ca)
    };
    let shaken = shake_over(wires(), &client, &TlsServer::new(asking).unwrap(), "server.test").await;
    refusal(shaken.server, ErrorKind::Limit, &["64 KiB"]);
}

/// rustls itself as the client, which does as it is told.
async fn raw_client(ca: &pki::Ca, wire: UnixStream) -> TlsStream<UnixStream> {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(rustls::pki_types::CertificateDer::from_pem_slice(ca.issuer.pem().as_bytes()).unwrap())
        .unwrap();
    let config =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
    let name = ServerName::try_from("server.test").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, wire).await.unwrap()
}

#[tokio::test]
async fn a_flood_of_key_updates_is_cut_off() {
    let ca = pki::ca("ca");
    let server = TlsServer::new(server_of(&ca)).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let (mut client, server) =
        soon(async { tokio::join!(raw_client(&ca, near), server.accept(Stream::new(far))) }).await;
    let mut server = server.unwrap();
    let flood = async {
        for _ in 0..100_000 {
            client.get_mut().1.refresh_traffic_keys().map_err(std::io::Error::other)?;
            client.flush().await?;
        }
        std::io::Result::Ok(())
    };
    let reading = async {
        let read = server.read(&mut [0; 16]).await;
        drop(server);
        read
    };
    let (flooded, read) = soon(async { tokio::join!(flood, reading) }).await;
    refusal(read, ErrorKind::Limit, &["the client", "TooManyKeyUpdateRequests"]);
    assert!(flooded.is_err(), "the flood ends when the server hangs up");
}

/// Updates with data between are allowed, and cost nothing that stays: answers are merged.
#[tokio::test]
async fn key_updates_with_data_between_go_on_for_ever() {
    let ca = pki::ca("ca");
    let server = TlsServer::new(server_of(&ca)).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let (mut client, server) =
        soon(async { tokio::join!(raw_client(&ca, near), server.accept(Stream::new(far))) }).await;
    let mut server = server.unwrap();
    const ROUNDS: usize = 5000;
    let flood = async {
        for _ in 0..ROUNDS {
            client.get_mut().1.refresh_traffic_keys().unwrap();
            client.write_all(&[3]).await.unwrap();
            client.flush().await.unwrap();
        }
        let mut answer = [0; 6];
        client.read_exact(&mut answer).await.unwrap();
        answer
    };
    let reading = async {
        let mut all = vec![0; ROUNDS];
        server.read_exact(&mut all).await.unwrap();
        server.write_all(b"enough").await.unwrap();
        all
    };
    let (answer, all) = soon(async { tokio::join!(flood, reading) }).await;
    assert_eq!(&answer, b"enough");
    assert!(all.iter().all(|&byte| byte == 3));
}

/// Repeatable numbers that look random.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Copies from `from` to `to`, and changes one bit on the way.
async fn copy_with_a_wrong_bit(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    wrong: Option<(usize, u8)>,
) {
    let (mut at, mut buf) = (0, [0; 512]);
    while let Ok(count @ 1..) = from.read(&mut buf).await {
        if let Some((place, bit)) = wrong
            && (at..at + count).contains(&place)
        {
            buf[place - at] ^= bit;
        }
        at += count;
        if to.write_all(&buf[..count]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

/// A wrong bit anywhere makes an error or nothing at all, never other data, a hang or a panic.
#[tokio::test]
async fn bits_changed_on_the_way_are_noticed() {
    let (client, server) = good();
    let mut numbers = Numbers(0x5eed);
    let mut noticed = 0;
    for round in 0..150 {
        let mut wrong = |within: u64| Some(((numbers.next() % within) as usize, 1 << (numbers.next() % 8)));
        // Hello, finish, data and goodbye one way; the handshake without the tickets the other way.
        let (to_server, to_client) = if round % 2 == 0 { (wrong(1300), None) } else { (None, wrong(600)) };
        let (near, between_near) = UnixStream::pair().unwrap();
        let (between_far, far) = UnixStream::pair().unwrap();
        let (from_near, to_near) = between_near.into_split();
        let (from_far, to_far) = between_far.into_split();
        let one_way = tokio::spawn(copy_with_a_wrong_bit(from_near, to_far, to_server));
        let other_way = tokio::spawn(copy_with_a_wrong_bit(from_far, to_near, to_client));
        let of_client = async {
            let mut channel = client.connect(Stream::new(near), "server.test").await?;
            channel.writev_all(&[IoSlice::new(&[1; 1000])]).await?;
            channel.close().await?;
            std::io::Result::Ok(())
        };
        let of_server = async {
            let mut channel = server.accept(Stream::new(far)).await?;
            let mut all = Vec::new();
            channel.read_to_end(&mut all).await?;
            assert_eq!(all, [1; 1000], "round {round}");
            std::io::Result::Ok(())
        };
        let (client_end, server_end) = soon(async { tokio::join!(of_client, of_server) }).await;
        noticed += usize::from(client_end.is_err() || server_end.is_err());
        soon(async { tokio::join!(one_way, other_way) }).await.0.unwrap();
    }
    assert!(noticed > 100, "{noticed} of 150");
}

/// Rubbish with a header of TLS before it.
#[tokio::test]
async fn rubbish_is_an_error() {
    let server = good().1;
    let mut numbers = Numbers(77);
    for round in 0..500 {
        let mut rubbish: Vec<u8> = (0..numbers.next() % 600).map(|_| numbers.next() as u8).collect();
        let length = rubbish.len() as u16;
        let kind = [0x16, 0x15, 0x14, 0x17][round % 4];
        rubbish.splice(..0, [kind, 3, 1].into_iter().chain(length.to_be_bytes()));
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(&rubbish).await.unwrap();
        far.shutdown().await.unwrap();
        let error = soon(server.accept(Stream::new(near))).await.map(drop).expect_err("rubbish");
        assert!(kind_of(&error).is_some(), "{error}");
    }
}

/// Nothing stays behind when connections die at any point.
#[tokio::test]
async fn handshakes_that_are_dropped_leave_nothing() {
    let (client, server) = good();
    let open = || std::fs::read_dir("/proc/self/fd").map(|all| all.count()).unwrap_or_default();
    let before = open();
    for steps in 0..60 {
        let (near, far) = wires();
        let both = async { tokio::join!(client.connect(near, "server.test"), server.accept(far)) };
        tokio::select! {
            biased;
            _ = both => {}
            () = async { for _ in 0..steps { tokio::task::yield_now().await } } => {}
        }
    }
    // Other tests of this process open descriptors too: far fewer than this one has.
    assert!(open() < before + 60, "{} descriptors, {before} before", open());
}
