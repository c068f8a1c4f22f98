//! Every kind of channel passes the same suite, on both of its ends, asynchronous and blocking.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;
use vellum_channel::{
    Buffer, Channel, ChannelExt, Command, Direction, Endpoint, Faulty, FaultyOptions, File, FileOptions,
    ListenOptions, Null, Observe, Pair, Pem, Rate, Shared, Socket, SocketListener, SocketOptions, Stream,
    Throttle, Timeout, TimeoutOptions, Tls, TlsClient, TlsClientOptions, TlsIdentity, TlsServer,
    TlsServerOptions, WebSocket, WebSocketOptions, open_fd,
};
use vellum_conformance::channel::{Carries, End, Subject, Traits, passes};

fn boxed<A, B>(ends: (A, B)) -> (End, End)
where
    A: Channel + 'static,
    B: Channel + 'static,
{
    (Box::new(ends.0), Box::new(ends.1))
}

fn tcp(address: &str) -> io::Result<(Socket, Socket)> {
    let listener = TcpListener::bind(address)?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    Ok((Socket::from_fd(OwnedFd::from(near))?, Socket::from_fd(OwnedFd::from(far))?))
}

async fn tls<C: Channel + 'static>(near: C, far: C) -> io::Result<(Tls<C>, Tls<C>)> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let pem = Pem::text(made.cert.pem());
    let identity = TlsIdentity::new(pem.clone(), Pem::text(made.signing_key.serialize_pem()));
    let client = TlsClient::new(TlsClientOptions { ca: Some(pem), ..TlsClientOptions::default() })?;
    let server = TlsServer::new(TlsServerOptions::new(identity))?;
    tokio::try_join!(client.connect(near, "localhost"), server.accept(far))
}

async fn web_socket<C: Channel + 'static>(near: C, far: C) -> io::Result<(WebSocket<C>, WebSocket<C>)> {
    let options = WebSocketOptions::default();
    tokio::try_join!(WebSocket::connect(near, "localhost", &options), WebSocket::accept(far, &options))
}

#[test]
fn any_tokio_stream() {
    let traits = Traits { moves: false, ..Traits::default() };
    passes(&Subject::new("stream", traits, || async {
        let (near, far) = tokio::io::duplex(65_536);
        Ok(boxed((Stream::new(near), Stream::new(far))))
    }));
}

/// Nothing of them has to be watched by an executor.
fn in_memory() -> Traits {
    Traits { needs_executor: false, ..Traits::default() }
}

#[test]
fn pair() {
    passes(&Subject::new("pair", in_memory(), || async { Ok(boxed(Pair::new())) }));
}

#[test]
fn a_narrow_pair() {
    passes(&Subject::new("narrow pair", in_memory(), || async { Ok(boxed(Pair::with_capacity(1000))) }));
}

#[test]
fn tcp_over_ipv4() {
    passes(&Subject::new("tcp", Traits::default(), || async { Ok(boxed(tcp("127.0.0.1:0")?)) }));
}

#[test]
fn tcp_over_ipv6() {
    if TcpListener::bind("[::1]:0").is_err() {
        println!("not run: this machine has no IPv6");
        return;
    }
    passes(&Subject::new("tcp over IPv6", Traits::default(), || async { Ok(boxed(tcp("[::1]:0")?)) }));
}

#[test]
fn unix() {
    passes(&Subject::new("unix", Traits::default(), || async { Ok(boxed(Socket::pair()?)) }));
}

/// Two ends by the kernel's `vsock_loopback`, whose address is 1.
async fn vsock_pair() -> io::Result<(Socket, Socket)> {
    let any = Endpoint::Vsock { cid: u32::MAX, port: u32::MAX };
    let listener = SocketListener::bind(&any, &ListenOptions::default())?;
    let Endpoint::Vsock { port, .. } = listener.local_endpoint()? else {
        return Err(io::Error::other("another kind of address"));
    };
    let to = Endpoint::Vsock { cid: 1, port };
    let near = Socket::connect(&to, &SocketOptions::default()).await?;
    Ok((near, listener.accept().await?))
}

/// Set where there must be a loopback of vsock.
const NEEDS_VSOCK: &str = "VELLUM_TEST_NEEDS_VSOCK";

/// Here if this kernel has the loopback, else the same test in a kernel that has it.
#[test]
fn vsock() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("an executor");
    match runtime.block_on(vsock_pair()) {
        Ok(_) => {
            passes(&Subject::new("vsock", Traits::default(), || async { Ok(boxed(vsock_pair().await?)) }))
        }
        Err(error) if std::env::var_os(NEEDS_VSOCK).is_some() => panic!("no loopback of vsock: {error}"),
        Err(_) => vsock_in_another_kernel(),
    }
}

fn vsock_in_another_kernel() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/in-uml.sh");
    let ran = std::process::Command::new(script)
        .args(["env", &format!("{NEEDS_VSOCK}=1")])
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", "vsock", "--nocapture"])
        .output()
        .expect("a shell");
    let said = format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    match ran.status.code() {
        Some(0) => assert!(said.contains("1 passed"), "{said}"),
        // A machine that does not let a process trace another one.
        Some(125) => {
            println!("not run: no loopback of vsock here, and the kernel that has it does not start: {said}")
        }
        _ => panic!("in a kernel with vsock, {}:\n{said}", ran.status),
    }
}

/// Passes all on between its standard streams and a socket, each direction for itself. (`socat` does not tell its standard
/// output that the socket's direction has ended while the other one goes on.)
const RELAY: &str = r#"
import os, socket, sys, threading
peer = socket.create_connection(("127.0.0.1", sys.argv[1]))
def there():
    try:
        while data := os.read(0, 65536):
            peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
    except OSError:
        os._exit(1)
thread = threading.Thread(target=there)
thread.start()
try:
    while data := peer.recv(65536):
        while data:
            data = data[os.write(1, data):]
except OSError:
    os._exit(1)
os.close(1)
thread.join()
"#;

/// A child is one end: it passes all on to the socket that is the other. (One that is dropped is ended, whatever it has not
/// passed on yet.)
#[test]
fn command() {
    let traits = Traits { delivers_when_dropped: false, ..Traits::default() };
    passes(&Subject::new("command", traits, || async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let mut relay = std::process::Command::new("/usr/bin/python3");
        relay.args(["-c", RELAY, &listener.local_addr()?.port().to_string()]);
        let near = Command::spawn(relay, Direction::Both)?;
        let (far, _) = listener.accept().await?;
        Ok(boxed((near, Socket::from_fd(OwnedFd::from(far.into_std()?))?)))
    }));
}

#[test]
fn tls_over_tcp() {
    passes(&Subject::new("tls over tcp", Traits::default(), || async {
        let (near, far) = tcp("127.0.0.1:0")?;
        Ok(boxed(tls(near, far).await?))
    }));
}

#[test]
fn tls_over_a_pair() {
    passes(&Subject::new("tls over a pair", in_memory(), || async {
        let (near, far) = Pair::with_capacity(3000);
        Ok(boxed(tls(near, far).await?))
    }));
}

/// A WebSocket has no half-close: whoever ends it ends both directions.
fn closing_at_once() -> Traits {
    Traits { half_closes: false, ..Traits::default() }
}

#[test]
fn web_socket_over_tcp() {
    passes(&Subject::new("websocket over tcp", closing_at_once(), || async {
        let (near, far) = tcp("127.0.0.1:0")?;
        Ok(boxed(web_socket(near, far).await?))
    }));
}

#[test]
fn web_socket_over_tls() {
    passes(&Subject::new("websocket over tls", closing_at_once(), || async {
        let (near, far) = Socket::pair()?;
        let (near, far) = tls(near, far).await?;
        Ok(boxed(web_socket(near, far).await?))
    }));
}

#[test]
fn wrapped_four_times() {
    passes(&Subject::new("timeout, throttle, observe and share", Traits::default(), || async {
        let (near, far) = Socket::pair()?;
        Ok(boxed((wrap(near), wrap(far))))
    }));
}

fn wrap<C: Channel>(channel: C) -> Shared<Observe<Throttle<Timeout<C>>>> {
    let long = Some(Duration::from_secs(100));
    let timed = Timeout::new(channel, TimeoutOptions { read: long, write: long });
    let throttled = Throttle::new(timed, Some(Rate::new(1 << 30)), Some(Rate::new(1 << 30)));
    Shared::new(Observe::new(throttled))
}

#[test]
fn short_and_slow() {
    passes(&Subject::new("faulty", in_memory(), || async {
        let (near, far) = Pair::new();
        let faults =
            FaultyOptions { seed: 7, short_percent: 60, pending_percent: 30, ..FaultyOptions::default() };
        Ok(boxed((Faulty::new(near, faults), Faulty::new(far, faults))))
    }));
}

/// A pipe's ends, the one that is written first.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    Ok((writer.into(), reader.into()))
}

fn one_way() -> Traits {
    Traits { carries: Carries::OneWay, ..Traits::default() }
}

#[test]
fn pipes() {
    passes(&Subject::new("pipe", one_way(), || async {
        let (near, far) = pipe()?;
        Ok(boxed((File::from_fd(near)?, File::from_fd(far)?)))
    }));
}

#[test]
fn wrapped_pipes() {
    passes(&Subject::new("pipe in timeout, throttle, observe and share", one_way(), || async {
        let (near, far) = pipe()?;
        Ok(boxed((wrap(File::from_fd(near)?), wrap(File::from_fd(far)?))))
    }));
}

#[test]
fn fifos() {
    let directory = tempfile::tempdir().expect("a directory");
    let number = std::sync::atomic::AtomicUsize::new(0);
    let directory_path = directory.path().to_owned();
    passes(&Subject::new("fifo", one_way(), move || {
        let number = number.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = directory_path.join(number.to_string());
        async move {
            make_fifo(&path)?;
            let (reading, writing) = (FileOptions::read_only(), FileOptions::write_only());
            let (far, near) = tokio::try_join!(File::open(&path, &reading), File::open(&path, &writing))?;
            Ok(boxed((near, far)))
        }
    }));
}

fn make_fifo(path: &Path) -> io::Result<()> {
    let made = std::process::Command::new("mkfifo").arg(path).status()?;
    if made.success() { Ok(()) } else { Err(io::Error::other(format!("mkfifo: {made}"))) }
}

/// What `stdio:` opens when the standard streams of a process are two pipes, at both ends.
#[test]
fn standard_streams_that_are_pipes() {
    let traits = Traits { moves: false, ..Traits::default() };
    passes(&Subject::new("standard streams", traits, || async {
        let ((near_output, far_input), (far_output, near_input)) = (pipe()?, pipe()?);
        let near = Stream::new(tokio::io::join(open_fd(near_input)?, open_fd(near_output)?));
        let far = Stream::new(tokio::io::join(open_fd(far_input)?, open_fd(far_output)?));
        Ok(boxed((near, far)))
    }));
}

/// QEMU's pair of children with a FIFO between them: one is only written to, the other only read from.
#[test]
fn commands_of_one_direction() {
    let directory = tempfile::tempdir().expect("a directory");
    let number = std::sync::atomic::AtomicUsize::new(0);
    let directory_path = directory.path().to_owned();
    let traits = Traits { delivers_when_dropped: false, ..one_way() };
    passes(&Subject::new("commands of one direction", traits, move || {
        let number = number.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = directory_path.join(number.to_string());
        async move {
            make_fifo(&path)?;
            let child = |script: &str, direction| {
                let mut shell = std::process::Command::new("sh");
                shell.args(["-c", script, "sh"]).arg(&path);
                Command::spawn(shell, direction)
            };
            let mut near = child("exec cat > \"$1\"", Direction::Write)?;
            let mut far = child("exec cat < \"$1\"", Direction::Read)?;
            // A byte goes through: both children have opened the FIFO, and neither waits there for the other for ever.
            near.writev_all(&[io::IoSlice::new(b"!")]).await?;
            far.read_all(&mut [0]).await?;
            Ok(boxed((near, far)))
        }
    }));
}

/// Kinds of which each end is a whole.
fn alone(carries: Carries) -> Traits {
    Traits { carries, ..Traits::default() }
}

#[test]
fn nowhere() {
    passes(&Subject::new("null", alone(Carries::Nothing), || async {
        Ok(boxed((Null::new(), Null::new())))
    }));
}

#[test]
fn memory() {
    passes(&Subject::new("buffer", alone(Carries::ToItself), || async {
        Ok(boxed((Buffer::new(), Buffer::new())))
    }));
}

#[test]
fn regular_file() {
    passes(&Subject::new("file", alone(Carries::ToItself), || async {
        let file = || File::from_fd(tempfile::tempfile()?.into());
        Ok(boxed((file()?, file()?)))
    }));
}
