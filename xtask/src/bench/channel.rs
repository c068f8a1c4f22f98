//! `cargo xtask bench channel`: throughput and round trips of channels beside raw Tokio streams, rustls and `socat`.
//!
//! Both ends are tasks of one process with two threads, except for the relays, which are processes in the middle.
//! Contenders take turns; medians are compared.

use super::host;
use super::measure::{check_interrupt, median};
use super::options::Options;
use super::report::{facts, number, write_section};
use super::{Result, tools};
use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::{Builder, Runtime};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use vellum_channel::{
    Pem, Socket, TlsClient, TlsClientOptions, TlsIdentity, TlsServer, TlsServerOptions, WebSocket,
    WebSocketOptions,
};

/// Bytes of one write, and of one WebSocket message.
const BLOCK: usize = 256 << 10;
/// Bytes of one run, where nothing is computed and where everything is encrypted or masked.
const PLAIN_BYTES: u64 = 3 << 30;
const WORKED_BYTES: u64 = 1 << 30;
const PING: usize = 64;
const PINGS: u32 = 20_000;
const HANDSHAKES: u32 = 400;

/// Any stream: raw ones and channels go through the same code.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}
type End = Box<dyn Stream>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    RawTcp,
    Tcp,
    RawUnix,
    Unix,
    RawTls,
    Tls,
    WebSocket,
}

/// Name, and what it is compared with: the contender's place in this list.
const CONTENDERS: [(Kind, &str, Option<usize>); 7] = [
    (Kind::RawTcp, "TCP, raw Tokio", None),
    (Kind::Tcp, "TCP channel", Some(0)),
    (Kind::RawUnix, "Unix, raw Tokio", None),
    (Kind::Unix, "Unix channel", Some(2)),
    (Kind::RawTls, "TLS 1.3 over TCP, tokio-rustls", None),
    (Kind::Tls, "TLS 1.3 channel over TCP", Some(4)),
    (Kind::WebSocket, "WebSocket channel over TCP, 256 KiB messages", Some(1)),
];

#[derive(Default)]
struct Row {
    forth: Vec<f64>,
    back: Vec<f64>,
    round_trip: Vec<f64>,
}

pub fn run(options: &Options) -> Result<()> {
    let vellum = tools::vellum(options)?;
    let tls = TlsSetup::new()?;
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| format!("no executor: {error}"))?;
    let mut rows: Vec<Row> = CONTENDERS.iter().map(|_| Row::default()).collect();
    let mut handshakes = [Vec::new(), Vec::new()];
    let mut relays = [Vec::new(), Vec::new()];
    for round in 0..options.runs {
        for ((kind, _, _), row) in CONTENDERS.iter().zip(&mut rows) {
            check_interrupt()?;
            measure(&runtime, *kind, &tls, row)?;
        }
        for (samples, kind) in handshakes.iter_mut().zip([Kind::RawTls, Kind::Tls]) {
            samples.push(shake_hands(&runtime, kind, &tls)?);
        }
        for (samples, program) in relays.iter_mut().zip(["socat", "vellum"]) {
            samples.push(relay(&runtime, program, &vellum)?);
        }
        eprintln!("round {} done", round + 1);
    }
    let mut text = facts(&host::facts(&tools::workspace(), &vellum));
    text.push_str(&table(&rows));
    text.push_str(&second_table(&handshakes, &relays));
    println!("{text}");
    match &options.markdown {
        Some(path) => write_section(path, "channel", &text),
        None => Ok(()),
    }
}

fn explain(error: std::io::Error) -> String {
    format!("a channel failed: {error}")
}

fn measure(runtime: &Runtime, kind: Kind, tls: &TlsSetup, row: &mut Row) -> Result<()> {
    let bytes = match kind {
        Kind::RawTcp | Kind::Tcp | Kind::RawUnix | Kind::Unix => PLAIN_BYTES,
        Kind::RawTls | Kind::Tls | Kind::WebSocket => WORKED_BYTES,
    };
    runtime.block_on(async {
        let (near, far) = ends(kind, tls).await?;
        let (near, far, seconds) = stream(near, far, bytes).await.map_err(explain)?;
        row.forth.push(bytes as f64 / seconds);
        let (far, near, seconds) = stream(far, near, bytes).await.map_err(explain)?;
        row.back.push(bytes as f64 / seconds);
        row.round_trip.push(ping(near, far).await.map_err(explain)?);
        Ok(())
    })
}

/// Two connected sockets, as every contender gets them.
fn tcp() -> Result<(TcpStream, TcpStream)> {
    let make = || {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        let (far, _) = listener.accept()?;
        for end in [&near, &far] {
            end.set_nodelay(true)?;
            end.set_nonblocking(true)?;
        }
        Ok((near, far))
    };
    make().map_err(explain)
}

fn raw_tcp() -> Result<(tokio::net::TcpStream, tokio::net::TcpStream)> {
    let (near, far) = tcp()?;
    let raw = |end| tokio::net::TcpStream::from_std(end).map_err(explain);
    Ok((raw(near)?, raw(far)?))
}

fn tcp_channels() -> Result<(Socket, Socket)> {
    let (near, far) = tcp()?;
    let channel = |end| Socket::from_fd(OwnedFd::from(end)).map_err(explain);
    Ok((channel(near)?, channel(far)?))
}

async fn ends(kind: Kind, tls: &TlsSetup) -> Result<(End, End)> {
    let boxed = |near, far| -> (End, End) { (near, far) };
    Ok(match kind {
        Kind::RawTcp => {
            let (near, far) = raw_tcp()?;
            boxed(Box::new(near), Box::new(far))
        }
        Kind::Tcp => {
            let (near, far) = tcp_channels()?;
            boxed(Box::new(near), Box::new(far))
        }
        Kind::RawUnix => {
            let (near, far) = tokio::net::UnixStream::pair().map_err(explain)?;
            boxed(Box::new(near), Box::new(far))
        }
        Kind::Unix => {
            let (near, far) = UnixStream::pair().map_err(explain)?;
            let channel = |end| Socket::from_fd(OwnedFd::from(end)).map_err(explain);
            boxed(Box::new(channel(near)?), Box::new(channel(far)?))
        }
        Kind::RawTls => {
            let (near, far) = raw_tcp()?;
            let (near, far) =
                tokio::try_join!(tls.connector.connect(tls.name.clone(), near), tls.acceptor.accept(far))
                    .map_err(explain)?;
            boxed(Box::new(near), Box::new(far))
        }
        Kind::Tls => {
            let (near, far) = tcp_channels()?;
            let (near, far) = tokio::try_join!(tls.client.connect(near, "localhost"), tls.server.accept(far))
                .map_err(explain)?;
            boxed(Box::new(near), Box::new(far))
        }
        Kind::WebSocket => {
            let (near, far) = tcp_channels()?;
            let options = WebSocketOptions::default();
            let (near, far) = tokio::try_join!(
                WebSocket::connect(near, "localhost", &options),
                WebSocket::accept(far, &options)
            )
            .map_err(explain)?;
            boxed(Box::new(near), Box::new(far))
        }
    })
}

/// Sends `bytes` and waits until they have been read; gives the ends back, and the seconds.
async fn stream(mut from: End, mut to: End, bytes: u64) -> std::io::Result<(End, End, f64)> {
    let started = Instant::now();
    let sending = tokio::spawn(async move {
        let block = vec![0x5A; BLOCK];
        for _ in 0..bytes / BLOCK as u64 {
            from.write_all(&block).await?;
        }
        from.flush().await?;
        std::io::Result::Ok(from)
    });
    let receiving = tokio::spawn(async move {
        let mut block = vec![0; BLOCK];
        let mut left = bytes;
        while left > 0 {
            let read = to.read(&mut block).await? as u64;
            if read == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            left -= read;
        }
        std::io::Result::Ok(to)
    });
    let (from, to) = (sending.await.expect("no panic")?, receiving.await.expect("no panic")?);
    Ok((from, to, started.elapsed().as_secs_f64()))
}

/// Seconds of one small message there and back.
async fn ping(mut near: End, mut far: End) -> std::io::Result<f64> {
    let echoing = tokio::spawn(async move {
        let mut message = [0; PING];
        for _ in 0..PINGS {
            far.read_exact(&mut message).await?;
            far.write_all(&message).await?;
            far.flush().await?;
        }
        std::io::Result::Ok(())
    });
    let asking = tokio::spawn(async move {
        let mut message = [7; PING];
        let started = Instant::now();
        for _ in 0..PINGS {
            near.write_all(&message).await?;
            near.flush().await?;
            near.read_exact(&mut message).await?;
        }
        std::io::Result::Ok(started.elapsed().as_secs_f64())
    });
    let seconds = asking.await.expect("no panic")?;
    echoing.await.expect("no panic")?;
    Ok(seconds / f64::from(PINGS))
}

/// Full TLS handshakes a second, connections included.
fn shake_hands(runtime: &Runtime, kind: Kind, tls: &TlsSetup) -> Result<f64> {
    runtime.block_on(async {
        let started = Instant::now();
        for _ in 0..HANDSHAKES {
            drop(ends(kind, tls).await?);
        }
        Ok(f64::from(HANDSHAKES) / started.elapsed().as_secs_f64())
    })
}

struct Relay(Child);

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Bytes a second through a process that joins two TCP connections.
fn relay(runtime: &Runtime, program: &str, vellum: &std::path::Path) -> Result<f64> {
    let sink = TcpListener::bind("127.0.0.1:0").map_err(explain)?;
    let to = sink.local_addr().map_err(explain)?;
    let at = free_port()?;
    let mut command = if program == "socat" {
        let mut command = Command::new("socat");
        command
            .arg("-b262144")
            .arg(format!("TCP-LISTEN:{},bind=127.0.0.1", at.port()))
            .arg(format!("TCP:{to}"));
        command
    } else {
        let mut command = Command::new(vellum);
        command.args(["channel", "-q", &format!("listen:tcp://{at}"), &format!("tcp://{to}")]);
        command
    };
    let spawned = command.stdin(Stdio::null()).stderr(Stdio::null()).stdout(Stdio::null()).spawn();
    let _relay = Relay(spawned.map_err(|error| format!("{program}: {error}"))?);
    let source = connect_when_there(at)?;
    let (drain, _) = sink.accept().map_err(explain)?;
    for end in [&source, &drain] {
        end.set_nonblocking(true).map_err(explain)?;
    }
    runtime.block_on(async {
        let raw = |end| tokio::net::TcpStream::from_std(end).map_err(explain);
        let (source, drain) = (raw(source)?, raw(drain)?);
        let (_, _, seconds) =
            stream(Box::new(source), Box::new(drain), PLAIN_BYTES).await.map_err(explain)?;
        Ok(PLAIN_BYTES as f64 / seconds)
    })
}

fn free_port() -> Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).map_err(explain)
}

fn connect_when_there(at: SocketAddr) -> Result<TcpStream> {
    for _ in 0..200 {
        if let Ok(stream) = TcpStream::connect(at) {
            return Ok(stream);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(format!("nothing listens on {at}"))
}

/// One certificate for all.
struct TlsSetup {
    connector: TlsConnector,
    acceptor: TlsAcceptor,
    name: ServerName<'static>,
    client: TlsClient,
    server: TlsServer,
}

impl TlsSetup {
    fn new() -> Result<Self> {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])
            .map_err(|error| format!("no certificate: {error}"))?;
        let (certificate, key) =
            (made.cert.pem().into_bytes(), made.signing_key.serialize_pem().into_bytes());
        let tls = |error: tokio_rustls::rustls::Error| format!("TLS cannot be set up: {error}");
        let pem = |error: tokio_rustls::rustls::pki_types::pem::Error| format!("PEM: {error}");
        let der = CertificateDer::from_pem_slice(&certificate).map_err(pem)?;
        let private = PrivateKeyDer::from_pem_slice(&key).map_err(pem)?;
        let mut roots = RootCertStore::empty();
        roots.add(der.clone()).map_err(tls)?;
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        // Full handshakes, on both sides of the comparison.
        client.resumption = tokio_rustls::rustls::client::Resumption::disabled();
        let server = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .with_no_client_auth()
            .with_single_cert(vec![der], private)
            .map_err(tls)?;
        let identity = TlsIdentity::new(Pem::text(certificate.clone()), Pem::text(key));
        let ours = TlsClientOptions {
            ca: Some(Pem::text(certificate)),
            resumption: false,
            ..TlsClientOptions::default()
        };
        Ok(Self {
            connector: TlsConnector::from(Arc::new(client)),
            acceptor: TlsAcceptor::from(Arc::new(server)),
            name: ServerName::try_from("localhost").map_err(|error| error.to_string())?,
            client: TlsClient::new(ours).map_err(explain)?,
            server: TlsServer::new(TlsServerOptions::new(identity)).map_err(explain)?,
        })
    }
}

fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "\n| | MiB/s, client to server | by what it is compared with | MiB/s, server to client | by that | round trip us | by that |\n\
         |---|--:|--:|--:|--:|--:|--:|\n",
    );
    let mib = |samples: &[f64]| median(samples.iter().copied()) / f64::from(1 << 20);
    for ((_, name, peer), row) in CONTENDERS.iter().zip(rows) {
        let by = |pick: fn(&Row) -> &Vec<f64>| {
            let ratio = peer
                .map(|peer| median(pick(row).iter().copied()) / median(pick(&rows[peer]).iter().copied()));
            ratio.map_or(String::new(), |ratio| format!("**{}**", number(Some(ratio))))
        };
        let _ = writeln!(
            text,
            "| {name} | {:.0} | {} | {:.0} | {} | {:.1} | {} |",
            mib(&row.forth),
            by(|row| &row.forth),
            mib(&row.back),
            by(|row| &row.back),
            median(row.round_trip.iter().copied()) * 1e6,
            by(|row| &row.round_trip)
        );
    }
    text
}

fn second_table(handshakes: &[Vec<f64>; 2], relays: &[Vec<f64>; 2]) -> String {
    let of = |samples: &[f64]| median(samples.iter().copied());
    let mib = |samples: &[f64]| of(samples) / f64::from(1 << 20);
    format!(
        "\n| | theirs | ours | ours by theirs |\n|---|--:|--:|--:|\n\
         | full TLS handshakes a second, tokio-rustls and TLS channel | {:.0} | {:.0} | **{}** |\n\
         | relay between two TCP connections, `socat -b262144` and `vellum channel`, MiB/s | {:.0} | {:.0} | **{}** |\n",
        of(&handshakes[0]),
        of(&handshakes[1]),
        number(Some(of(&handshakes[1]) / of(&handshakes[0]))),
        mib(&relays[0]),
        mib(&relays[1]),
        number(Some(of(&relays[1]) / of(&relays[0]))),
    )
}
