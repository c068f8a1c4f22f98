//! What every channel promises, and what TLS adds to it.

use crate::{Wire, good, good_with, refusal, shake, shake_over, soon, wires};
use std::io::{IoSlice, IoSliceMut};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use vellum_channel::{
    Channel, ChannelExt, ErrorKind, Features, Interest, Stream, Tls, TlsClient, TlsClientOptions, TlsServer,
    TlsServerOptions, TlsVersions, kind_of,
};

const CHUNKS: usize = 250;
const CHUNK: usize = 4194;

pub async fn pair() -> (Tls<Wire>, Tls<Wire>) {
    let (client, server) = good();
    shake(&client, &server).await.both()
}

/// Two ends over memory that holds `size` bytes.
async fn narrow(size: usize) -> (Tls<Stream<DuplexStream>>, Tls<Stream<DuplexStream>>) {
    let (client, server) = good();
    let (near, far) = tokio::io::duplex(size);
    let wires = (Stream::new(near), Stream::new(far));
    shake_over(wires, &client, &server, "server.test").await.both()
}

fn chunks() -> Vec<Vec<u8>> {
    (0..CHUNKS).map(|index| vec![index as u8; CHUNK]).collect()
}

async fn send<C: Channel>(channel: &mut C) {
    let chunks = chunks();
    let slices: Vec<_> = chunks.iter().map(|chunk| IoSlice::new(chunk)).collect();
    channel.writev_all(&slices).await.unwrap();
    channel.flush().await.unwrap();
}

async fn receive<C: Channel>(channel: &mut C) {
    let mut chunks = vec![vec![0; CHUNK]; CHUNKS];
    let mut slices: Vec<_> = chunks.iter_mut().map(|chunk| IoSliceMut::new(chunk)).collect();
    channel.readv_all(&mut slices).await.unwrap();
    assert!(chunks == self::chunks());
}

#[tokio::test]
async fn chunks_arrive_whole_in_both_modes_and_directions() {
    for versions in [TlsVersions::Tls13, TlsVersions::Tls12] {
        for is_blocking in [true, false] {
            let (client, server) = good_with(versions);
            let (mut near, mut far) = shake(&client, &server).await.both();
            near.set_blocking(is_blocking);
            far.set_blocking(is_blocking);
            soon(async { tokio::join!(send(&mut near), receive(&mut far)) }).await;
            soon(async { tokio::join!(receive(&mut near), send(&mut far)) }).await;
        }
    }
}

#[tokio::test]
async fn chunks_arrive_whole_through_a_narrow_pipe() {
    for size in [1, 5] {
        let (mut near, mut far) = narrow(size).await;
        let sending = async {
            near.write_all(&[size as u8; 3000]).await.unwrap();
            near.close().await.unwrap();
        };
        let mut all = Vec::new();
        let (_, read) = soon(async { tokio::join!(sending, far.read_to_end(&mut all)) }).await;
        read.unwrap();
        assert_eq!(all, [size as u8; 3000]);
    }
    for size in [100, 5000, 70_000] {
        let (mut near, mut far) = narrow(size).await;
        soon(async { tokio::join!(send(&mut near), receive(&mut far)) }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_and_a_writer_may_be_different_tasks() {
    for size in [300, 20_000] {
        let (near, far) = narrow(size).await;
        let tasks = [near, far].map(|channel| {
            let (mut reader, mut writer) = tokio::io::split(channel);
            let writing = tokio::spawn(async move {
                for chunk in chunks() {
                    writer.write_all(&chunk).await.unwrap();
                }
                writer.flush().await.unwrap();
                writer
            });
            let reading = tokio::spawn(async move {
                let mut all = vec![0; CHUNK * CHUNKS];
                reader.read_exact(&mut all).await.unwrap();
                assert!(all == chunks().concat());
                reader
            });
            (writing, reading)
        });
        for (writing, reading) in tasks {
            let (writer, reader) = soon(async { tokio::join!(writing, reading) }).await;
            drop((writer.unwrap(), reader.unwrap()));
        }
    }
}

#[tokio::test]
async fn it_knows_what_it_is() {
    let (near, far) = pair().await;
    for channel in [&near, &far] {
        assert_eq!((channel.kind(), channel.version(), channel.is_resumed()), ("tls", "1.3", false));
        assert_eq!(channel.features(), Features::PEEK, "a stream below cannot be shut down from afar");
        assert!(channel.cipher().is_some_and(|cipher| cipher.starts_with("TLS13_")));
        assert_eq!(channel.server_name(), Some("server.test"));
        assert_eq!(channel.alpn(), None);
        assert!(channel.peer_process().is_err(), "as the stream below");
    }
    let (client, server) = good_with(TlsVersions::Tls12AndLater);
    assert_eq!(shake(&client, &server).await.both().0.version(), "1.3", "the highest in common");
}

#[tokio::test]
async fn decrypted_bytes_count_as_readable() {
    let (mut near, mut far) = pair().await;
    near.write_all(&[7; 100]).await.unwrap();
    let mut some = [0; 10];
    soon(far.read_exact(&mut some)).await.unwrap();
    // The socket has nothing any more: the 90 bytes are in the channel.
    for _ in 0..3 {
        let ready = soon(far.ready(Interest::READ)).await.unwrap();
        assert_eq!(ready, Interest::READ);
    }
    assert_eq!(soon(far.peek(&mut [0; 200])).await.unwrap(), 90);
    assert_eq!(soon(far.read(&mut [0; 200])).await.unwrap(), 90);
    let nothing = tokio::time::timeout(Duration::from_millis(50), far.ready(Interest::READ)).await;
    assert!(nothing.is_err(), "there is nothing to read");
    assert_eq!(soon(far.ready(Interest::READ | Interest::WRITE)).await.unwrap(), Interest::WRITE);
}

#[tokio::test]
async fn without_blocking_it_says_so() {
    let (mut near, mut far) = narrow(1000).await;
    near.set_blocking(false);
    let error = near.readv(&mut [IoSliceMut::new(&mut [0; 10])]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    let data = vec![1; 1 << 20];
    let mut sent = 0;
    let error = loop {
        match near.writev(&[IoSlice::new(&data)]).await {
            Ok(count) => sent += count,
            Err(error) => break error,
        }
        assert!(sent < 1 << 20, "the buffer is bounded");
    };
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    let mut all = vec![0; sent];
    let (flushed, read) = soon(async { tokio::join!(near.flush(), far.read_exact(&mut all)) }).await;
    flushed.unwrap();
    read.unwrap();
    assert!(all.iter().all(|&byte| byte == 1));
}

/// What a dropped write has reported arrives; no more.
#[tokio::test]
async fn a_write_that_is_dropped_delivers_what_it_reported() {
    let (mut near, mut far) = narrow(3000).await;
    let data: Vec<u8> = (0..1 << 20).map(|at| (at / 7) as u8).collect();
    let slices = [IoSlice::new(&data)];
    let mut writing = near.writev_all(&slices);
    tokio::select! {
        biased;
        _ = &mut writing => unreachable!("nobody reads"),
        () = std::future::ready(()) => {}
    }
    let reported = writing.transferred();
    drop(writing);
    assert!(reported > 0);
    let mut read = Vec::new();
    let closing = async {
        near.flush().await.unwrap();
        near.close().await.unwrap();
    };
    let (_, end) = soon(async { tokio::join!(closing, far.read_to_end(&mut read)) }).await;
    end.unwrap();
    assert!(read == data[..reported], "{} bytes of {reported}", read.len());
}

/// The reader of a channel delivers what its writer left behind.
#[tokio::test]
async fn a_reader_passes_on_what_a_writer_left() {
    let (mut near, mut far) = narrow(1000).await;
    assert_eq!(near.write(&[1; 50_000]).await.unwrap(), 50_000);
    let mut answer = [0; 1];
    let peer = async {
        far.read_exact(&mut vec![0; 50_000]).await.unwrap();
        far.write_all(&[9]).await.unwrap();
    };
    let (read, ()) = soon(async { tokio::join!(near.read_exact(&mut answer), peer) }).await;
    read.unwrap();
    assert_eq!(answer, [9]);
}

#[tokio::test]
async fn one_direction_can_end_before_the_other() {
    for versions in [TlsVersions::Tls13, TlsVersions::Tls12] {
        let (client, server) = good_with(versions);
        let (mut near, mut far) = shake(&client, &server).await.both();
        near.write_all(b"question").await.unwrap();
        near.shutdown().await.unwrap();
        near.shutdown().await.unwrap();
        let error = near.write_all(b"more").await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
        let mut question = Vec::new();
        soon(far.read_to_end(&mut question)).await.unwrap();
        assert_eq!(question, b"question");
        far.write_all(&[5; 100_000]).await.unwrap();
        far.close().await.unwrap();
        let mut answer = Vec::new();
        soon(near.read_to_end(&mut answer)).await.unwrap();
        assert_eq!(answer, [5; 100_000]);
    }
}

#[tokio::test]
async fn a_channel_is_closed_once() {
    let (mut near, mut far) = pair().await;
    near.write_all(b"last words").await.unwrap();
    near.close().await.unwrap();
    near.close().await.unwrap();
    let mut words = Vec::new();
    soon(far.read_to_end(&mut words)).await.unwrap();
    assert_eq!(words, b"last words");
    for error in [
        near.write_all(b"x").await.unwrap_err(),
        near.read(&mut [0; 1]).await.unwrap_err(),
        near.flush().await.unwrap_err(),
        near.ready(Interest::READ).await.unwrap_err(),
    ] {
        assert_eq!(kind_of(&error), Some(ErrorKind::Closed));
    }
    // The peer has gone: nothing of this side is lost by that.
    soon(far.close()).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_does_not_read_cannot_hold_up_a_close() {
    let ca = crate::pki::ca("ca");
    let close_timeout = Duration::from_millis(200);
    let client = TlsClient::new(TlsClientOptions { close_timeout, ..crate::client_of(&ca) }).unwrap();
    let server = TlsServer::new(TlsServerOptions { close_timeout, ..crate::server_of(&ca) }).unwrap();
    let (near, far) = tokio::io::duplex(2000);
    let wires = (Stream::new(near), Stream::new(far));
    let (mut near, far) = shake_over(wires, &client, &server, "server.test").await.both();
    assert!(near.write(&[0; 50_000]).await.unwrap() > 2000);
    let before = Instant::now();
    refusal(soon(near.close()).await, ErrorKind::Timeout, &["tls channel", "lost"]);
    assert!(before.elapsed() < Duration::from_secs(5));
    near.close().await.unwrap();
    drop(far);
}

#[tokio::test]
async fn many_small_slices_share_records() {
    let (mut near, mut far) = pair().await;
    let bytes: Vec<_> = (0..64u8).collect();
    let slices: Vec<_> = bytes.chunks(1).map(IoSlice::new).collect();
    assert_eq!(near.writev(&slices).await.unwrap(), 64);
    let mut got = [0; 100];
    // One record: one read finds all of it.
    assert_eq!(soon(far.read(&mut got)).await.unwrap(), 64);
    assert_eq!(got[..64], bytes);
    assert_eq!(near.writev(&[]).await.unwrap(), 0);
    assert_eq!(far.readv(&mut []).await.unwrap(), 0);
}

#[tokio::test]
async fn boxed_channels_and_tls_within_tls_work_too() {
    let (client, server) = good();
    let (near, far) = wires();
    let boxed: (Box<dyn Channel>, Box<dyn Channel>) = (Box::new(near), Box::new(far));
    let outer = shake_over(boxed, &client, &server, "server.test").await.both();
    let (mut near, mut far) = shake_over(outer, &client, &server, "server.test").await.both();
    soon(async { tokio::join!(send(&mut near), receive(&mut far)) }).await;
    let mut room = [0; 1];
    let (closed, end) = soon(async { tokio::join!(near.close(), far.read(&mut room)) }).await;
    closed.unwrap();
    assert_eq!(end.unwrap(), 0);
}
