//! Connecting and listening: addresses, several sockets at once, limits, admission, stalling clients, activation.

mod activation;
mod connecting;
mod listening;
mod serving;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::collections::HashSet;
use std::io::ErrorKind as IoKind;
use std::net::{Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};
use vellum_channel::{
    Address, Admission, Channel, ChannelExt, ConnectOptions, Connecting, Connector, Destination, Endpoint,
    ErrorKind, Listener, ListenerOptions, LookupOptions, Peer, Place, SocketListener, Stream, activated,
    connect, connect_through, kind_of, lookup,
};

const LIMIT: Duration = Duration::from_secs(30);

async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(LIMIT, work).await.unwrap_or_else(|_| panic!("{what} takes too long"))
}

fn address(text: &str) -> Address {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn has_ipv6() -> bool {
    let has = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    if !has {
        println!("note: this machine has no IPv6, which is not tested");
    }
    has
}

async fn listen(texts: &[&str], options: ListenerOptions) -> Listener {
    let addresses: Vec<_> = texts.iter().map(|text| address(text)).collect();
    within("listening", Listener::bind(&addresses, options)).await.expect("a listener")
}

async fn connect_to(text: &str) -> Box<dyn Channel> {
    within("connecting", connect(&address(text), &ConnectOptions::default())).await.expect(text)
}

/// Waits until nobody listens there. That may take a moment: children that other tests start have a copy of the socket
/// between `fork` and `exec`.
async fn no_longer(text: &str) {
    let to = address(text);
    let refused = async {
        while connect(&to, &ConnectOptions::default()).await.is_ok() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    within(&format!("the end of {text}"), refused).await;
}

async fn next(listener: &mut Listener) -> (Box<dyn Channel>, Peer) {
    within("a connection", listener.next()).await.expect("a connection")
}

/// Sends a few bytes each way.
async fn talk(near: &mut Box<dyn Channel>, far: &mut Box<dyn Channel>) {
    let talking = async {
        let mut got = [0; 4];
        near.write_all(b"ping").await.expect("sent");
        near.flush().await.expect("sent");
        far.read_exact(&mut got).await.expect("received");
        assert_eq!(&got, b"ping");
        far.write_all(b"pong").await.expect("sent");
        far.flush().await.expect("sent");
        near.read_exact(&mut got).await.expect("received");
        assert_eq!(&got, b"pong");
    };
    within("a talk", talking).await;
}

async fn talk_over(listener: &mut Listener, text: &str) -> Peer {
    let target = address(text);
    let connecting = tokio::spawn(async move { connect(&target, &ConnectOptions::default()).await });
    let (mut far, peer) = next(listener).await;
    let mut near = within("connecting", connecting).await.expect("no panic").expect(text);
    talk(&mut near, &mut far).await;
    peer
}

fn port_of(endpoint: &Endpoint) -> u16 {
    match endpoint {
        Endpoint::Ip(at) => at.port(),
        other => panic!("{other} is not of TCP"),
    }
}

/// A folder with a certificate authority, and a certificate for `localhost` with its key.
struct Credentials {
    folder: tempfile::TempDir,
}

impl Credentials {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_key = KeyPair::generate().expect("a key");
        let authority = params.self_signed(&authority_key).expect("an authority");
        let issuer = Issuer::new(params, authority_key);
        let key = KeyPair::generate().expect("a key");
        let names = vec!["localhost".to_owned()];
        let certificate =
            CertificateParams::new(names).expect("parameters").signed_by(&key, &issuer).expect("signed");
        let folder = tempfile::tempdir().expect("a folder");
        for (name, text) in
            [("ca", authority.pem()), ("cert", certificate.pem()), ("key", key.serialize_pem())]
        {
            std::fs::write(folder.path().join(name), text).expect("written");
        }
        Self { folder }
    }

    fn server(&self) -> String {
        let folder = self.folder.path().display();
        format!("cert={folder}/cert&key={folder}/key")
    }

    fn client(&self) -> String {
        format!("ca={}/ca", self.folder.path().display())
    }
}

/// As if it came from whoever started this process.
fn inherited(fd: impl Into<OwnedFd>) -> i32 {
    let fd: OwnedFd = fd.into();
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).expect("flags");
    fd.into_raw_fd()
}

/// Waits for a child process, and for what it says.
fn finish(mut child: std::process::Child) -> (bool, String) {
    let start = Instant::now();
    while child.try_wait().expect("a child").is_none() {
        if start.elapsed() > LIMIT {
            child.kill().expect("killed");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().expect("output");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}
