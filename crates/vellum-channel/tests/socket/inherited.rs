//! Descriptors that were made elsewhere.

use crate::common::within;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_channel::{
    Channel, ChannelExt, Endpoint, ErrorKind, Features, Socket, SocketListener, SocketOptions, kind_of,
};

#[tokio::test]
async fn a_connected_socket_is_one_as_any_other() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let peer = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
    let tcp = OwnedFd::from(listener.accept().expect("a connection").0);
    let (unix, unix_peer) = UnixStream::pair().expect("a pair");
    for (fd, peer, kind, descriptors) in [
        (tcp, OwnedFd::from(peer), "tcp", Features::empty()),
        (unix.into(), unix_peer.into(), "unix", Features::DESCRIPTORS),
    ] {
        let mut channel = Socket::from_fd(fd).expect("a stream socket");
        assert_eq!(channel.kind(), kind);
        assert_eq!(channel.features(), Features::PEEK | Features::SHUTDOWN | descriptors);
        rustix::io::write(&peer, b"seven b").expect("a write");
        let mut got = [0; 16];
        assert_eq!(within(channel.peek(&mut got)).await.expect("a peek"), 7);
        assert_eq!(within(channel.read(&mut got)).await.expect("a read"), 7);
        within(channel.write_all(b"answer")).await.expect("a write");
        assert_eq!(rustix::io::read(&peer, &mut got).expect("a read"), 6);
    }
}

#[tokio::test]
async fn a_bound_tcp_socket_that_is_not_connected_is_taken() {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    let any = "127.0.0.1:0".parse::<std::net::SocketAddr>().expect("an address");
    socket.bind(&any.into()).expect("a port");
    let mut channel = Socket::from_fd(socket.into()).expect("a stream socket");
    assert_eq!(channel.kind(), "tcp");
    assert!(matches!(channel.local_endpoint(), Ok(Endpoint::Ip(at)) if at.port() != 0));
    assert_eq!(channel.peer_endpoint().expect_err("no peer").kind(), std::io::ErrorKind::NotConnected);
    assert_eq!(
        within(channel.read(&mut [0; 4])).await.expect_err("no peer").kind(),
        std::io::ErrorKind::NotConnected
    );
    within(channel.close()).await.expect("closed");
}

#[tokio::test]
async fn a_bound_unix_socket_that_does_not_listen_keeps_its_path() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("bound");
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).expect("a socket");
    socket.bind(&socket2::SockAddr::unix(&path).expect("an address")).expect("a path");
    let mut channel = Socket::from_fd(socket.into()).expect("a stream socket");
    assert_eq!(channel.local_endpoint().expect("an address"), Endpoint::UnixPath(path.clone()));
    let refused = channel.peer_process().expect_err("no peer");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Unsupported));
    within(channel.close()).await.expect("closed");
    drop(channel);
    assert!(path.exists());
}

#[tokio::test]
async fn what_is_no_stream_socket_is_refused() {
    let (reader, _writer) = rustix::pipe::pipe().expect("a pipe");
    let packets =
        socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::SEQPACKET, None).expect("a socket");
    for (fd, word) in [
        (OwnedFd::from(std::fs::File::open("/proc/self/exe").expect("a file")), "not a socket"),
        (reader, "not a socket"),
        (UdpSocket::bind("127.0.0.1:0").expect("a socket").into(), "datagram"),
        (UnixDatagram::unbound().expect("a socket").into(), "datagram"),
        (packets.into(), "type"),
    ] {
        let refused = Socket::from_fd(fd).expect_err("no stream socket");
        assert_eq!(kind_of(&refused), Some(ErrorKind::WrongDescriptor));
        assert!(refused.to_string().contains(word), "{refused}");
    }
}

#[tokio::test]
async fn a_listening_one_becomes_a_listener() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("inherited");
    let tcp = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let unix = UnixListener::bind(&path).expect("a listener");
    for (fd, kind) in [(OwnedFd::from(tcp), "tcp"), (unix.into(), "unix")] {
        let channel = Socket::from_fd(fd).expect("a stream socket");
        assert_eq!((channel.kind(), channel.features()), (kind, Features::LISTEN));
        let listener = channel.into_listener().expect("a listener");
        let to = listener.local_endpoint().expect("an address");
        let mut near = within(Socket::connect(&to, &SocketOptions::default())).await.expect("a connection");
        let mut far = within(listener.accept()).await.expect("a connection");
        within(near.write_all(b"hello")).await.expect("a write");
        let mut got = [0; 5];
        within(far.read_all(&mut got)).await.expect("a read");
        assert!(!far.features().contains(Features::LISTEN));
    }
    assert!(path.exists(), "who made the path removes it");

    let (near, _far) = Socket::pair().expect("a pair");
    let refused = near.into_listener().expect_err("it does not listen");
    assert_eq!(kind_of(&refused), Some(ErrorKind::WrongDescriptor));
    let refused =
        SocketListener::from_fd(UnixStream::pair().expect("a pair").0.into()).expect_err("no listener");
    assert_eq!(kind_of(&refused), Some(ErrorKind::WrongDescriptor));
}

/// The process that called `listen` is the peer's process of those who connect.
#[tokio::test]
async fn the_process_of_a_listener_is_told() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("python");
    let script = "import socket, sys\n\
                  s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print('up', flush=True)\n\
                  c, _ = s.accept(); c.sendall(c.recv(5).upper()); c.recv(1)\n";
    let mut child = tokio::process::Command::new("python3")
        .args(["-c", script])
        .arg(&path)
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("python3");
    let mut up = [0; 3];
    within(child.stdout.as_mut().expect("a pipe").read_exact(&mut up)).await.expect("it is up");
    let to = Endpoint::UnixPath(path);
    let mut channel = within(Socket::connect(&to, &SocketOptions::default())).await.expect("a connection");
    assert_eq!(Some(channel.peer_process().expect("a process").pid), child.id());
    within(channel.write_all(b"hello")).await.expect("a write");
    let mut got = [0; 5];
    within(channel.read_all(&mut got)).await.expect("a read");
    assert_eq!(&got, b"HELLO");
    within(channel.close()).await.expect("closed");
    assert!(within(child.wait()).await.expect("an end").success());
}
