//! Ten thousand connections, of which a third die midway, leave nothing behind: no descriptor, no task, no memory.

use rcgen::{CertifiedKey, generate_simple_self_signed};
use std::alloc::{GlobalAlloc, Layout, System};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicIsize, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::runtime::{Builder, Handle};
use vellum_channel::{
    Channel, ChannelExt, Endpoint, ListenOptions, Pem, Socket, SocketListener, SocketOptions, TlsClient,
    TlsClientOptions, TlsIdentity, TlsServer, TlsServerOptions, WebSocket, WebSocketOptions,
};

/// Counts the bytes that are in use.
struct Counting;

static IN_USE: AtomicIsize = AtomicIsize::new(0);

// SAFETY: every call goes to the system's allocator as it came; counting touches no memory of theirs.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CONNECTIONS: usize = 10_000;
const AT_ONCE: usize = 50;
/// Caches of the runtime and of TLS sessions may grow a little after the first thousand.
const MEMORY_SLACK: isize = 256 << 10;

type End = Box<dyn Channel>;

#[derive(Clone)]
struct World {
    to: Endpoint,
    tls_client: TlsClient,
    tls_server: TlsServer,
    died: Arc<AtomicUsize>,
    served: Arc<AtomicUsize>,
}

#[test]
fn nothing_is_left_of_ten_thousand_connections() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("an executor");
    runtime.block_on(async {
        let options = ListenOptions::default();
        let any = Endpoint::Ip("127.0.0.1:0".parse().expect("an address"));
        let listener = SocketListener::bind(&any, &options).expect("listening");
        let world = world(listener.local_endpoint().expect("an address"));
        let serving = tokio::spawn(serve(listener, world.clone()));

        // What is made once is made now.
        connections(&world, 1000).await;
        let before = settled().await;
        world.died.store(0, Ordering::Relaxed);
        world.served.store(0, Ordering::Relaxed);
        connections(&world, CONNECTIONS).await;
        let after = settled().await;

        let (died, served) = (world.died.load(Ordering::Relaxed), world.served.load(Ordering::Relaxed));
        println!("{served} connections served, {died} died midway");
        println!("before: {before:?}, after: {after:?}");
        assert!((CONNECTIONS / 3 - 1..=CONNECTIONS / 3 + 1).contains(&died), "{died} died midway");
        assert_eq!(before.descriptors, after.descriptors);
        assert_eq!(before.tasks, after.tasks);
        let grown = after.memory - before.memory;
        assert!(grown < MEMORY_SLACK, "{grown} bytes are left");
        serving.abort();
    });
}

fn world(to: Endpoint) -> World {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let identity = TlsIdentity::new(Pem::text(cert.pem()), Pem::text(signing_key.serialize_pem()));
    let client = TlsClientOptions { ca: Some(Pem::text(cert.pem())), ..TlsClientOptions::default() };
    World {
        to,
        tls_client: TlsClient::new(client).expect("a client"),
        tls_server: TlsServer::new(TlsServerOptions::new(identity)).expect("a server"),
        died: Arc::default(),
        served: Arc::default(),
    }
}

/// The kinds of connection take turns; a client says by its first byte which one it is.
const KINDS: [u8; 3] = [b'P', b'T', b'W'];

async fn serve(listener: SocketListener, world: World) {
    loop {
        let socket = listener.accept().await.expect("accepted");
        let world = world.clone();
        tokio::spawn(async move {
            // Clients that die are errors here.
            let _: io::Result<()> = echo(socket, &world).await;
            world.served.fetch_add(1, Ordering::Relaxed);
        });
    }
}

async fn echo(mut socket: Socket, world: &World) -> io::Result<()> {
    let mut kind = [0];
    socket.read_all(&mut kind).await?;
    let mut channel: End = match kind {
        [b'P'] => Box::new(socket),
        [b'T'] => Box::new(world.tls_server.accept(socket).await?),
        _ => Box::new(WebSocket::accept(socket, &WebSocketOptions::default()).await?),
    };
    let mut block = vec![0; 10_000];
    while channel.read_all_eof(&mut block).await? {
        channel.write_all(&block).await?;
        channel.flush().await?;
    }
    channel.close().await?;
    Ok(())
}

async fn connections(world: &World, count: usize) {
    let mut running = tokio::task::JoinSet::new();
    for number in 0..count {
        if running.len() >= AT_ONCE {
            running.join_next().await.expect("one runs").expect("no client fails");
        }
        let world = world.clone();
        running.spawn(async move { client(number, &world).await });
    }
    while let Some(ended) = running.join_next().await {
        ended.expect("no client fails");
    }
}

async fn client(number: usize, world: &World) {
    let mut socket = Socket::connect(&world.to, &SocketOptions::default()).await.expect("connected");
    let kind = KINDS[number / 3 % 3];
    socket.write_all(&[kind]).await.expect("written");
    let dies = number.is_multiple_of(3);
    if dies {
        world.died.fetch_add(1, Ordering::Relaxed);
        // At its first word, in the middle of the handshake, or later.
        if number.is_multiple_of(2) {
            let _: io::Result<()> = socket.write_all(b"\x16\x03\x01").await;
            return;
        }
    }
    let mut channel: End = match kind {
        b'P' => Box::new(socket),
        b'T' => Box::new(world.tls_client.connect(socket, "localhost").await.expect("TLS")),
        _ => Box::new(
            WebSocket::connect(socket, "localhost", &WebSocketOptions::default()).await.expect("WebSocket"),
        ),
    };
    let mut block = vec![number as u8; 10_000];
    for _ in 0..2 {
        channel.write_all(&block).await.expect("written");
        channel.flush().await.expect("flushed");
        channel.read_all(&mut block).await.expect("read");
    }
    if dies {
        // In the middle of a block.
        channel.write_all(&block[..5000]).await.expect("written");
        return;
    }
    channel.close().await.expect("closed");
}

#[derive(Debug)]
struct Left {
    descriptors: usize,
    tasks: usize,
    memory: isize,
}

/// What is in use once nothing changes any more.
async fn settled() -> Left {
    let started = Instant::now();
    let mut last = left();
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = left();
        let is_calm = now.tasks == last.tasks && now.descriptors == last.descriptors;
        if is_calm && now.tasks <= 1 || started.elapsed() > Duration::from_secs(30) {
            return now;
        }
        last = now;
    }
}

fn left() -> Left {
    Left {
        descriptors: std::fs::read_dir("/proc/self/fd").expect("a list").count(),
        tasks: Handle::current().metrics().num_alive_tasks(),
        memory: IN_USE.load(Ordering::Relaxed),
    }
}
