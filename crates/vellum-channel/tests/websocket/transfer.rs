//! The transfer of QEMU's channel tests.

use crate::support::{Result, options, pair_with, within};
use std::io::{self, IoSlice, IoSliceMut};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use vellum_channel::{
    Channel, ChannelExt, ErrorKind, Features, Interest, Pair, Pem, Shutdown, Socket, Stream, TlsClient,
    TlsClientOptions, TlsIdentity, TlsServer, TlsServerOptions, WebSocket, WebSocketOptions, kind_of,
};

const CHUNKS: usize = 250;
const CHUNK: usize = 4194;

fn chunks() -> Vec<Vec<u8>> {
    (0..CHUNKS).map(|index| vec![index as u8; CHUNK]).collect()
}

/// Sends all chunks in one direction, as vectors that wait in either mode.
async fn all_at_once(sender: &mut impl Channel, receiver: &mut impl Channel) -> Result {
    let sent = chunks();
    let slices: Vec<_> = sent.iter().map(|chunk| IoSlice::new(chunk)).collect();
    let mut got = vec![vec![0; CHUNK]; CHUNKS];
    let mut room: Vec<_> = got.iter_mut().map(|chunk| IoSliceMut::new(chunk)).collect();
    let sending = async {
        sender.writev_all(&slices).await?;
        sender.flush().await
    };
    let (written, read) = within(async { tokio::join!(sending, receiver.readv_all(&mut room)) }).await;
    written?;
    read?;
    assert!(got == sent);
    Ok(())
}

/// The same by operations that do not wait, and by waiting for readiness.
async fn by_readiness(sender: &mut impl Channel, receiver: &mut impl Channel) -> Result {
    let sent = chunks();
    let writing = async {
        for chunk in &sent {
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                match sender.writev(&[IoSlice::new(rest)]).await {
                    Ok(count) => rest = &rest[count..],
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        sender.ready(Interest::WRITE).await?;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        sender.flush().await
    };
    let mut got = vec![0; CHUNKS * CHUNK];
    let reading = async {
        let mut at = 0;
        while at < got.len() {
            match receiver.readv(&mut [IoSliceMut::new(&mut got[at..])]).await {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => at += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    receiver.ready(Interest::READ).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    };
    let (written, read) = within(async { tokio::join!(writing, reading) }).await;
    written?;
    read?;
    assert!(got == sent.concat());
    Ok(())
}

async fn both_modes(mut one: impl Channel, mut other: impl Channel) -> Result {
    for is_blocking in [true, false] {
        one.set_blocking(is_blocking);
        other.set_blocking(is_blocking);
        all_at_once(&mut one, &mut other).await?;
        all_at_once(&mut other, &mut one).await?;
    }
    by_readiness(&mut one, &mut other).await?;
    by_readiness(&mut other, &mut one).await?;
    let (one, other) = within(async { tokio::join!(one.close(), other.close()) }).await;
    one?;
    other?;
    Ok(())
}

#[tokio::test]
async fn chunks_over_memory() -> Result {
    for room in [1, 1000, 1 << 16, 1 << 22] {
        if room == 1 {
            // Byte by byte takes long: one direction of one mode.
            let (mut client, mut server) = pair_with(&options(), room).await;
            let data = crate::support::pattern(20_000);
            let mut got = vec![0; data.len()];
            let sending = async {
                client.write_all(&data).await?;
                client.flush().await
            };
            let (sent, read) = within(async { tokio::join!(sending, server.read_all(&mut got)) }).await;
            sent?;
            read?;
            assert!(got == data);
            continue;
        }
        let (client, server) = pair_with(&options(), room).await;
        both_modes(client, server).await?;
    }
    Ok(())
}

async fn tcp() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let (near, far) = tokio::try_join!(TcpStream::connect(listener.local_addr()?), listener.accept())?;
    near.set_nodelay(true)?;
    far.0.set_nodelay(true)?;
    Ok((near, far.0))
}

async fn join<C: Channel>(near: C, far: C) -> io::Result<(WebSocket<C>, WebSocket<C>)> {
    let options = options();
    let connecting = WebSocket::connect(near, "localhost", &options);
    let (client, server) = within(async { tokio::join!(connecting, WebSocket::accept(far, &options)) }).await;
    Ok((client?, server?))
}

#[tokio::test]
async fn chunks_over_tcp() -> Result {
    let (near, far) = tcp().await?;
    let (client, server) = join(Stream::new(near), Stream::new(far)).await?;
    both_modes(client, server).await
}

async fn socket() -> io::Result<(Socket, Socket)> {
    let (near, far) = tcp().await?;
    let take = |stream: TcpStream| Socket::from_fd(stream.into_std()?.into());
    Ok((take(near)?, take(far)?))
}

#[tokio::test]
async fn chunks_over_sockets_and_a_pair() -> Result {
    let (near, far) = socket().await?;
    let (client, server) = join(near, far).await?;
    assert!(client.features().contains(Features::SHUTDOWN | Features::PEEK));
    assert_eq!(client.local_endpoint()?, server.peer_endpoint()?);
    both_modes(client, server).await?;
    let (near, far) = Socket::pair()?;
    let (client, server) = join(near, far).await?;
    assert_eq!(server.peer_process()?.pid, std::process::id());
    both_modes(client, server).await?;
    let (near, far) = Pair::with_capacity(1000);
    let (client, server) = join(near, far).await?;
    both_modes(client, server).await
}

#[tokio::test]
async fn chunks_over_tls() -> Result {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let pem = Pem::text(made.cert.pem());
    let identity = TlsIdentity::new(pem.clone(), Pem::text(made.signing_key.serialize_pem()));
    let client = TlsClient::new(TlsClientOptions { ca: Some(pem), ..TlsClientOptions::default() })?;
    let server = TlsServer::new(TlsServerOptions::new(identity))?;
    let (near, far) = socket().await?;
    let (near, far) =
        within(async { tokio::join!(client.connect(near, "localhost"), server.accept(far)) }).await;
    let (client, server) = join(near?, far?).await?;
    both_modes(client, server).await
}

/// A shutdown from elsewhere acts on the inner channel, and wakes who waits.
#[tokio::test]
async fn shutdown_from_another_task() -> Result {
    let (near, far) = socket().await?;
    let (mut client, mut server) = join(near, far).await?;
    let control = client.control();
    let waiting = async { client.read_u8().await };
    let ending = async {
        tokio::task::yield_now().await;
        control.shutdown(Shutdown::Both)
    };
    let (read, ended) = within(async { tokio::join!(waiting, ending) }).await;
    ended?;
    // This side has ended it: that is the end of the stream. The other side was not told goodbye.
    assert_eq!(read.expect_err("nothing to read").kind(), io::ErrorKind::UnexpectedEof);
    let mut room = [0; 1];
    assert_eq!(within(client.read(&mut room)).await?, 0);
    let error = within(server.read(&mut room)).await.expect_err("no close frame");
    assert_eq!(kind_of(&error), Some(ErrorKind::UnexpectedEof), "{error}");
    Ok(())
}

/// From one executor to another with data in all buffers: nothing is lost.
#[test]
fn moves_between_executors() -> Result {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
    let (first, second) = (runtime()?, runtime()?);
    let data = crate::support::pattern(2 << 20);
    let (mut client, mut server, written) = first.block_on(async {
        let (near, far) = socket().await?;
        let (mut client, mut server) = join(near, far).await?;
        client.set_blocking(false);
        let written = within(client.writev(&[IoSlice::new(&data)])).await?;
        let mut start = [0; 1000];
        within(server.read_all(&mut start)).await?;
        assert!(start == data[..1000]);
        client.detach()?;
        server.detach()?;
        io::Result::Ok((client, server, written))
    })?;
    drop(first);
    client.attach(second.handle())?;
    server.attach(second.handle())?;
    second.block_on(async {
        let mut rest = vec![0; written - 1000];
        let (flushed, read) =
            within(async { tokio::join!(client.flush(), server.read_all(&mut rest)) }).await;
        flushed?;
        read?;
        assert!(rest == data[1000..written]);
        Ok(())
    })
}

/// WebSocket over WebSocket: any channel will do.
#[tokio::test]
async fn chunks_over_another_websocket() -> Result {
    let (near, far) = pair_with(&options(), 1 << 16).await;
    let (client, server) = join(near, far).await?;
    both_modes(client, server).await
}

#[tokio::test]
async fn chunks_over_a_boxed_channel() -> Result {
    let (near, far) = tokio::io::duplex(1 << 16);
    let near: Box<dyn Channel> = Box::new(Stream::new(near));
    let far: Box<dyn Channel> = Box::new(Stream::new(far));
    let (client, server) = join(near, far).await?;
    both_modes(client, server).await
}

/// Random sizes in both directions at once, with pings.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_directions_at_once() -> Result {
    let (near, far) = tcp().await?;
    let options = WebSocketOptions { keep_alive: Some(Duration::from_millis(20)), ..options() };
    let (near, far) = (Stream::new(near), Stream::new(far));
    let connecting = WebSocket::connect(near, "localhost", &options);
    let (client, server) = within(async { tokio::join!(connecting, WebSocket::accept(far, &options)) }).await;
    let mut tasks = Vec::new();
    for (seed, channel) in [(1_u32, client?), (1, server?)] {
        let pinger = channel.pinger();
        let (mut reader, mut writer) = tokio::io::split(channel);
        tasks.push(tokio::spawn(async move {
            let data = crate::support::pattern(1 << 20);
            let (mut state, mut at) = (seed, 0);
            while at < data.len() {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let end = data.len().min(at + 1 + (state >> 16) as usize % 70_000);
                writer.write_all(&data[at..end]).await?;
                at = end;
            }
            writer.flush().await?;
            pinger.ping().await?;
            writer.shutdown().await
        }));
        tasks.push(tokio::spawn(async move {
            let mut got = Vec::new();
            reader.read_to_end(&mut got).await?;
            assert!(got == crate::support::pattern(1 << 20)[..got.len()]);
            Ok(())
        }));
    }
    for task in tasks {
        // The one that is told goodbye first may find its writing ended.
        if let Err(error) = within(task).await.expect("no panic") {
            assert_eq!(
                vellum_channel::kind_of(&error),
                Some(vellum_channel::ErrorKind::WebSocketClosed),
                "{error}"
            );
        }
    }
    Ok(())
}
