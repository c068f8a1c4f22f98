//! T01 of RELIABILITY.md, section 1.2: floods of key updates, from either side, stay bounded in memory and time. A test
//! program of its own, with one test: it counts the memory of the process.

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicIsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_channel::{
    ErrorKind, Pem, Socket, Tls, TlsClient, TlsClientOptions, TlsIdentity, TlsServer, TlsServerOptions,
    kind_of,
};

/// Counts the bytes that are in use, and the most that ever were.
struct Counting;

static IN_USE: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);

// SAFETY: every call goes to the system's allocator as it came; counting touches no memory of theirs.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let size = layout.size() as isize;
        let in_use = IN_USE.fetch_add(size, Ordering::Relaxed) + size;
        PEAK.fetch_max(in_use, Ordering::Relaxed);
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

/// Key updates with a byte of data behind each: more of them than any buffer on the way holds.
const UPDATES: usize = 50_000;
/// What both ends may need for that: the buffers of two connections.
const MEMORY_MAX: isize = 512 << 10;
const TIME_MAX: Duration = Duration::from_secs(60);

/// rustls itself as the hostile peer: blocking, on a thread of its own.
struct Hostile {
    tls: rustls::Connection,
    wire: UnixStream,
}

impl Hostile {
    /// Asks for new keys, and for the other side to change its own, too.
    fn update(&mut self) -> io::Result<()> {
        self.tls.refresh_traffic_keys().map_err(io::Error::other)?;
        self.send()
    }

    fn send(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.wire)?;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.tls.writer().write_all(bytes)?;
        self.send()
    }

    fn read(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let mut read = 0;
        while read < bytes.len() {
            match self.tls.reader().read(&mut bytes[read..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => read += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.tls.read_tls(&mut self.wire)?;
                    self.tls.process_new_packets().map_err(io::Error::other)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn shake_hands(&mut self) -> io::Result<()> {
        while self.tls.is_handshaking() {
            self.tls.complete_io(&mut self.wire)?;
        }
        self.send()
    }
}

struct World {
    client: TlsClient,
    server: TlsServer,
    hostile_client: Arc<rustls::ClientConfig>,
    hostile_server: Arc<rustls::ServerConfig>,
}

fn world() -> World {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let (certificate, key) = (cert.pem(), signing_key.serialize_pem());
    let der = CertificateDer::from_pem_slice(certificate.as_bytes()).expect("a certificate");
    let private = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(der.clone()).expect("a root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let hostile_client = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let hostile_server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![der], private)
        .expect("an identity");
    let options = TlsClientOptions { ca: Some(Pem::text(certificate.clone())), ..Default::default() };
    let identity = TlsIdentity::new(Pem::text(certificate), Pem::text(key));
    World {
        client: TlsClient::new(options).expect("a client"),
        server: TlsServer::new(TlsServerOptions::new(identity)).expect("a server"),
        hostile_client: Arc::new(hostile_client),
        hostile_server: Arc::new(hostile_server),
    }
}

/// Our end of a connection whose other end does `what` once hands are shaken.
async fn meet<T: Send + 'static>(
    world: &World,
    is_server_hostile: bool,
    what: impl FnOnce(Hostile) -> T + Send + 'static,
) -> (Tls<Socket>, std::thread::JoinHandle<T>) {
    let (wire, far) = UnixStream::pair().expect("two sockets");
    let tls = if is_server_hostile {
        rustls::Connection::Server(
            rustls::ServerConnection::new(world.hostile_server.clone()).expect("rustls"),
        )
    } else {
        let name = ServerName::try_from("localhost").expect("a name");
        rustls::Connection::Client(
            rustls::ClientConnection::new(world.hostile_client.clone(), name).expect("rustls"),
        )
    };
    let (begin, begins) = std::sync::mpsc::channel::<()>();
    let hostile = std::thread::spawn(move || {
        let mut hostile = Hostile { tls, wire };
        hostile.shake_hands().expect("both are content");
        begins.recv().expect("this side is content, too");
        what(hostile)
    });
    let ours = Socket::from_fd(far.into()).expect("a channel");
    let ours = match is_server_hostile {
        true => world.client.connect(ours, "localhost").await,
        false => world.server.accept(ours).await,
    };
    let ours = ours.expect("both are content");
    begin.send(()).expect("the peer waits");
    (ours, hostile)
}

/// With data between them, updates are no reason to hang up. The peer reads no answer until the end.
async fn updates_with_data(world: &World, is_server_hostile: bool) {
    let (mut ours, hostile) = meet(world, is_server_hostile, |mut hostile| {
        for _ in 0..UPDATES {
            hostile.update().expect("taken");
            hostile.write(&[3]).expect("taken");
        }
        let mut answer = [0; 6];
        hostile.read(&mut answer).expect("an answer");
        answer
    })
    .await;
    let mut room = [0; 1000];
    let mut count = 0;
    while count < UPDATES {
        let read = ours.read(&mut room).await.expect("data");
        assert!(read > 0 && room[..read].iter().all(|&byte| byte == 3));
        count += read;
    }
    ours.write_all(b"enough").await.expect("written");
    ours.flush().await.expect("sent");
    assert_eq!(&hostile.join().expect("the peer"), b"enough");
}

/// Nothing but updates is an error after the first few.
async fn updates_alone(world: &World, is_server_hostile: bool) {
    let (mut ours, hostile) = meet(world, is_server_hostile, |mut hostile| {
        (0..10 * UPDATES).take_while(|_| hostile.update().is_ok()).count()
    })
    .await;
    let error = ours.read(&mut [0; 16]).await.expect_err("a refusal");
    drop(ours);
    assert_eq!(kind_of(&error), Some(ErrorKind::Limit), "{error}");
    assert!(error.to_string().contains("TooManyKeyUpdateRequests"), "{error}");
    let sent = hostile.join().expect("the peer");
    assert!(sent < 10 * UPDATES, "the flood ends when this side hangs up");
}

#[tokio::test]
async fn key_updates_stay_bounded() {
    let world = world();
    for is_server_hostile in [false, true] {
        // What is made once is made now.
        updates_alone(&world, is_server_hostile).await;
        let before = IN_USE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let begun = Instant::now();
        updates_with_data(&world, is_server_hostile).await;
        updates_alone(&world, is_server_hostile).await;
        let (grown, took) = (PEAK.load(Ordering::Relaxed) - before, begun.elapsed());
        println!("{UPDATES} key updates: {grown} bytes at most, {took:?}");
        assert!(grown < MEMORY_MAX, "{grown} bytes were needed");
        assert!(took < TIME_MAX, "took {took:?}");
    }
}
