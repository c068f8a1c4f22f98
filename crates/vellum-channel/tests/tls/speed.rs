//! How fast it is beside tokio-rustls. Not a test of right or wrong: run by
//! `cargo test --release --test tls -- --ignored --nocapture speed`. Beside the rate by the clock it tells the time of
//! processors used, which is the better measure on a machine that does other things too.

use crate::{client_of, pki, server_of, soon};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use vellum_channel::{Stream, TlsClient, TlsServer};

const TOTAL: usize = 128 << 20;

/// Runs of each, in turn.
const RUNS: usize = 9;

/// Seconds of processors that the threads of this process have used.
fn used() -> f64 {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let of_thread = |thread: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
        stat.split(' ').next().and_then(|nanoseconds| nanoseconds.parse::<f64>().ok()).unwrap_or(0.0)
    };
    threads.map(|thread| of_thread(thread.unwrap())).sum::<f64>() / 1e9
}

/// The best of several runs.
#[derive(Clone, Copy)]
struct Best {
    rate: f64,
    used: f64,
}

impl Best {
    const NONE: Self = Self { rate: 0.0, used: f64::INFINITY };

    async fn add(&mut self, run: impl Future<Output = f64>) {
        let before = used();
        self.rate = self.rate.max(run.await);
        self.used = self.used.min(used() - before);
    }

    fn tell(self, raw: Self, what: &str, unit: &str) {
        println!(
            "{what}: tokio-rustls {:.0} {unit}, ours {:.0} ({:.0} %); processors {:.2} s, ours {:.2} s ({:.0} %)",
            raw.rate,
            self.rate,
            100.0 * self.rate / raw.rate,
            raw.used,
            self.used,
            100.0 * raw.used / self.used,
        );
    }
}

/// Megabytes a second from one task to another.
async fn throughput<W, R>(mut writer: W, mut reader: R, block: usize) -> f64
where
    W: AsyncWrite + Unpin + Send + 'static,
    R: AsyncRead + Unpin + Send + 'static,
{
    let begin = Instant::now();
    let writing = tokio::spawn(async move {
        let data = vec![0x5a; block];
        for _ in 0..TOTAL / block {
            writer.write_all(&data).await.unwrap();
        }
        writer.flush().await.unwrap();
        writer
    });
    let mut room = vec![0; block];
    let mut left = TOTAL;
    while left > 0 {
        left -= reader.read(&mut room).await.unwrap();
    }
    drop(writing.await.unwrap());
    TOTAL as f64 / 1e6 / begin.elapsed().as_secs_f64()
}

/// Round trips of `size` bytes a second.
async fn round_trips<A, B>(mut near: A, mut far: B, size: usize) -> f64
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    const ROUNDS: usize = 10_000;
    let echo = tokio::spawn(async move {
        let mut room = vec![0; size];
        for _ in 0..ROUNDS {
            far.read_exact(&mut room).await.unwrap();
            far.write_all(&room).await.unwrap();
            far.flush().await.unwrap();
        }
    });
    let mut room = vec![0; size];
    let begin = Instant::now();
    for _ in 0..ROUNDS {
        near.write_all(&room).await.unwrap();
        near.flush().await.unwrap();
        near.read_exact(&mut room).await.unwrap();
    }
    echo.await.unwrap();
    ROUNDS as f64 / begin.elapsed().as_secs_f64()
}

type Raw<C> = (tokio_rustls::client::TlsStream<C>, tokio_rustls::server::TlsStream<C>);

async fn raw(ca: &pki::Ca) -> Raw<UnixStream> {
    let provider = || Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.issuer.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let holder = ca.holder(pki::server);
    let chain = vec![CertificateDer::from_pem_slice(holder.own.as_bytes()).unwrap()];
    let server = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_slice(holder.key.as_bytes()).unwrap())
        .unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let name = ServerName::try_from("server.test").unwrap();
    let connecting = TlsConnector::from(Arc::new(client)).connect(name, near);
    let accepting = TlsAcceptor::from(Arc::new(server)).accept(far);
    let (client, server) = tokio::join!(connecting, accepting);
    (client.unwrap(), server.unwrap())
}

async fn ours(ca: &pki::Ca) -> (vellum_channel::Tls<crate::Wire>, vellum_channel::Tls<crate::Wire>) {
    let client = TlsClient::new(client_of(ca)).unwrap();
    let server = TlsServer::new(server_of(ca)).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let (near, far) =
        tokio::join!(client.connect(Stream::new(near), "server.test"), server.accept(Stream::new(far)));
    (near.unwrap(), far.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes its time, and tells figures only"]
async fn speed() {
    let ca = pki::ca("ca");
    for block in [4096, 65_536, 1 << 20] {
        let (mut best_raw, mut best_ours) = (Best::NONE, Best::NONE);
        for _ in 0..RUNS {
            let (writer, reader) = raw(&ca).await;
            best_raw.add(throughput(writer, reader, block)).await;
            let (writer, reader) = ours(&ca).await;
            best_ours.add(throughput(writer, reader, block)).await;
        }
        best_ours.tell(best_raw, &format!("{block:>8} bytes a write"), "MB/s");
    }
    for size in [16, 4096] {
        let (mut best_raw, mut best_ours) = (Best::NONE, Best::NONE);
        for _ in 0..RUNS {
            let (near, far) = raw(&ca).await;
            best_raw.add(soon(round_trips(near, far, size))).await;
            let (near, far) = ours(&ca).await;
            best_ours.add(soon(round_trips(near, far, size))).await;
        }
        best_ours.tell(best_raw, &format!("{size:>8} bytes there and back"), "a second");
    }
}
