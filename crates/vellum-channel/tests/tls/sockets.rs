//! Over sockets, which can be shut down from afar, moved between executors, and reset by their peers.

use crate::pki;
use crate::{client_of, good, refusal, server_of, shake_over, soon};
use std::io::{self, IoSliceMut};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_channel::{
    Channel, ChannelExt, ClientCertificates, ErrorKind, Features, Interest, ReadFlags, Shutdown, Socket, Tls,
    TlsClient, TlsServer, TlsServerOptions, kind_of,
};

fn tcp() -> (Socket, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    (Socket::from_fd(OwnedFd::from(near)).unwrap(), Socket::from_fd(OwnedFd::from(far)).unwrap())
}

async fn over(wires: (Socket, Socket)) -> (Tls<Socket>, Tls<Socket>) {
    let (client, server) = good();
    shake_over(wires, &client, &server, "server.test").await.both()
}

#[tokio::test]
async fn it_can_what_the_socket_below_can() {
    let (near, far) = over(Socket::pair().unwrap()).await;
    for channel in [&near, &far] {
        assert_eq!(channel.features(), Features::SHUTDOWN | Features::PEEK);
        assert_eq!(channel.peer_process().unwrap().pid, std::process::id());
        assert!(channel.get_ref().kind() == "unix");
    }
    let (near, far) = over(tcp()).await;
    assert_eq!(near.local_endpoint().unwrap(), far.peer_endpoint().unwrap());
    near.control().set_delay(false);
    near.control().set_cork(false);
}

#[tokio::test]
async fn reading_can_be_shut_down_from_another_thread() {
    for wires in [Socket::pair().unwrap(), tcp()] {
        let (mut near, far) = over(wires).await;
        let control = near.control();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            control.shutdown(Shutdown::Read)
        });
        // The end that was asked for is no cut.
        assert_eq!(soon(near.read(&mut [0; 10])).await.unwrap(), 0);
        assert_eq!(soon(near.ready(Interest::READ)).await.unwrap(), Interest::READ);
        thread.join().unwrap().unwrap();
        near.write_all(b"still").await.unwrap();
        drop(far);
    }
}

#[tokio::test]
async fn writing_that_is_shut_down_from_afar_is_a_cut_for_the_peer() {
    let (mut near, mut far) = over(Socket::pair().unwrap()).await;
    near.write_all(b"some").await.unwrap();
    near.control().shutdown(Shutdown::Write).unwrap();
    assert_eq!(near.write_all(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(soon(near.ready(Interest::WRITE)).await.unwrap(), Interest::WRITE);
    let mut got = Vec::new();
    let error = soon(far.read_to_end(&mut got)).await.unwrap_err();
    assert_eq!((kind_of(&error), got.as_slice()), (Some(ErrorKind::TlsTruncated), &b"some"[..]));
    let mut room = [0; 4];
    let mut rooms = [IoSliceMut::new(&mut room)];
    assert_eq!(soon(far.readv_full(&mut rooms, None, ReadFlags::RELAXED_EOF)).await.unwrap(), 0);
    // The other direction is as before.
    far.write_all(b"back").await.unwrap();
    soon(near.read_exact(&mut room)).await.unwrap();
    soon(near.close()).await.unwrap();
}

#[tokio::test]
async fn a_detached_channel_says_so_and_moves() {
    let (mut near, mut far) = over(Socket::pair().unwrap()).await;
    far.write_all(b"12").await.unwrap();
    soon(near.read_exact(&mut [0; 1])).await.unwrap();
    near.detach().unwrap();
    // What was decrypted is still there; then it would have to wait.
    soon(near.read_exact(&mut [0; 1])).await.unwrap();
    let error = soon(near.read(&mut [0; 1])).await.unwrap_err();
    assert_eq!(kind_of(&error), Some(ErrorKind::Detached));
    let full = soon(async {
        loop {
            if let Err(error) = near.write_all(&[0; 65_536]).await {
                break error;
            }
        }
    });
    assert_eq!(kind_of(&full.await), Some(ErrorKind::Detached));
    let reading = tokio::spawn(async move {
        let mut all = Vec::new();
        far.read_to_end(&mut all).await.unwrap();
        all.len()
    });
    let other = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        near.attach(runtime.handle()).unwrap();
        runtime.block_on(async { near.close().await }).unwrap();
    });
    // What was taken before arrives, in whole writes of up to 64 KiB.
    let read = soon(reading).await.unwrap();
    assert!(read > 65_536, "{read}");
    other.join().unwrap();
}

/// The alert is not lost when the server hangs up on bytes that it did not read.
#[tokio::test]
async fn a_refusal_survives_bytes_that_crossed_it() {
    let ca = pki::ca("ca");
    let asking = TlsServerOptions {
        client_certificates: ClientCertificates::Required,
        ca: Some(ca.pem()),
        ..server_of(&ca)
    };
    let (client, server) = (TlsClient::new(client_of(&ca)).unwrap(), TlsServer::new(asking).unwrap());
    for _ in 0..20 {
        let (near, far) = tcp();
        let client_side = async {
            let mut channel = client.connect(near, "server.test").await.unwrap();
            // May fail already.
            let _ = channel.write_all(&[0; 20_000]).await;
            let _ = channel.flush().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            channel.read(&mut [0; 1]).await
        };
        let (told, refused) = soon(async { tokio::join!(client_side, server.accept(far)) }).await;
        refusal(refused, ErrorKind::TlsCertificateMissing, &[]);
        refusal(told, ErrorKind::TlsAlert, &["certificate_required"]);
    }
}

/// A client that never reads leaves the server's tickets unread: its socket must not be reset for that.
#[tokio::test]
async fn a_client_that_only_writes_loses_nothing() {
    for _ in 0..20 {
        let (mut near, mut far) = over(tcp()).await;
        let writing = tokio::spawn(async move {
            near.write_all(&[7; 2_000_000]).await.unwrap();
            near.close().await.unwrap();
        });
        tokio::time::sleep(Duration::from_millis(5)).await;
        let mut all = Vec::new();
        soon(far.read_to_end(&mut all)).await.unwrap();
        assert_eq!(all.len(), 2_000_000);
        writing.await.unwrap();
    }
}
