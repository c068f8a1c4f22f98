//! Listening, and the paths of Unix sockets.

use crate::common::{Ends, all_ends, ends_at, is_alone, within};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_channel::{
    Channel, ChannelExt, Endpoint, ErrorKind, ListenOptions, Socket, SocketListener, SocketOptions, kind_of,
};

fn unix(path: &Path) -> Endpoint {
    Endpoint::UnixPath(path.to_owned())
}

fn listen(path: &Path) -> std::io::Result<SocketListener> {
    SocketListener::bind(&unix(path), &ListenOptions::default())
}

fn new_path() -> (TempDir, PathBuf) {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("socket");
    (directory, path)
}

async fn connect(to: &Endpoint) -> std::io::Result<Socket> {
    within(Socket::connect(to, &SocketOptions::default())).await
}

#[tokio::test]
async fn the_path_lives_as_long_as_the_listener() {
    for is_closed in [false, true] {
        let (directory, path) = new_path();
        let ends = ends_at(&unix(&path), directory, &SocketOptions::default()).await;
        let Ends { near, far, mut listener, directory } = ends;
        assert!(path.metadata().expect("a path").file_type().is_socket());
        drop((near, far));
        assert!(path.exists(), "data channels do not own it");
        if is_closed {
            listener.close().expect("closed");
            assert!(!path.exists());
            listener.close().expect("closed before");
            let refused = within(listener.accept()).await.expect_err("it is closed");
            assert_eq!(kind_of(&refused), Some(ErrorKind::Closed));
        }
        drop(listener);
        assert!(!path.exists());
        drop(directory);
    }
}

#[tokio::test]
async fn a_path_that_is_something_else_by_now_stays() {
    let (_directory, path) = new_path();
    let mut first = listen(&path).expect("a listener");
    std::fs::remove_file(&path).expect("removed");
    let second = listen(&path).expect("another listener");
    first.close().expect("closed");
    assert!(path.exists(), "that is the other listener's");
    connect(&unix(&path)).await.expect("and it listens");
    std::fs::remove_file(&path).expect("removed");
    std::fs::write(&path, "a file").expect("a file");
    drop(second);
    assert_eq!(std::fs::read(&path).expect("the file"), b"a file");
}

#[tokio::test]
async fn only_a_dead_socket_is_replaced() {
    let (_directory, path) = new_path();
    // A socket that was bound, and left behind by a process that is gone.
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a listener"));
    assert!(path.exists());
    let careful = ListenOptions { unlink_existing: false, ..ListenOptions::default() };
    let refused = SocketListener::bind(&unix(&path), &careful).expect_err("it is not to be removed");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Listen));
    let listener = listen(&path).expect("a listener in its place");
    connect(&unix(&path)).await.expect("a connection");

    let refused = listen(&path).expect_err("somebody answers");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Listen));
    assert!(refused.to_string().contains("somebody answers"), "{refused}");
    connect(&unix(&path)).await.expect("a connection, as before");
    drop(listener);

    std::fs::write(&path, "a file").expect("a file");
    let refused = listen(&path).expect_err("a file is there");
    assert!(refused.to_string().contains("not a socket"), "{refused}");
    assert_eq!(std::fs::read(&path).expect("the file"), b"a file");
    std::fs::remove_file(&path).expect("removed");

    // A socket of another type, which is somebody's.
    let datagrams = std::os::unix::net::UnixDatagram::bind(&path).expect("a socket");
    assert_eq!(kind_of(&listen(&path).expect_err("it is in use")), Some(ErrorKind::Listen));
    assert!(path.exists());
    drop(datagrams);
}

#[tokio::test]
async fn the_mode_is_what_was_asked_for() {
    for mode in [0o600, 0o660, 0o666, 0o777, 0o000] {
        let (_directory, path) = new_path();
        let options = ListenOptions { unix_mode: Some(mode), ..ListenOptions::default() };
        let _listener = SocketListener::bind(&unix(&path), &options).expect("a listener");
        assert_eq!(path.metadata().expect("a path").permissions().mode() & 0o7777, mode, "{mode:o}");
    }
}

/// The umask is of the whole process.
#[test]
fn the_mode_does_not_depend_on_the_umask() {
    if !is_alone("listener::the_mode_does_not_depend_on_the_umask") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let _inside = runtime.enter();
    for umask in [0o000, 0o077, 0o777] {
        let (_directory, path) = new_path();
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(umask));
        let options = ListenOptions { unix_mode: Some(0o640), ..ListenOptions::default() };
        let listener = SocketListener::bind(&unix(&path), &options);
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        let _listener = listener.expect("a listener");
        assert_eq!(path.metadata().expect("a path").permissions().mode() & 0o7777, 0o640, "{umask:o}");
    }
}

#[tokio::test]
async fn addresses_that_cannot_be_are_refused_with_a_reason() {
    let long = unix(Path::new(&"p".repeat(200)));
    for refused in [
        SocketListener::bind(&long, &ListenOptions::default()).expect_err("too long"),
        connect(&long).await.expect_err("too long"),
    ] {
        assert_eq!(kind_of(&refused), Some(ErrorKind::Invalid));
        assert!(refused.to_string().contains("107"), "{refused}");
    }
    let nobody = TempDir::new().expect("a directory");
    let refused = connect(&unix(&nobody.path().join("none"))).await.expect_err("nobody is there");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Connect));
    let busy = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let at = Endpoint::Ip(busy.local_addr().expect("an address"));
    let refused = SocketListener::bind(&at, &ListenOptions::default()).expect_err("the port is taken");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Listen));
    drop(busy);
    let refused = connect(&at).await.expect_err("nobody listens any more");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Connect));
    assert!(refused.to_string().contains("refused"), "{refused}");
}

#[tokio::test]
async fn a_port_can_be_taken_again_at_once() {
    let at = Endpoint::Ip("127.0.0.1:0".parse().expect("an address"));
    let ends = ends_at(&at, TempDir::new().expect("a directory"), &SocketOptions::default()).await;
    let at = ends.listener.local_endpoint().expect("an address");
    let Ends { near, far, listener, .. } = ends;
    // This side ends first: the connection lingers in TIME_WAIT.
    drop(far);
    drop(near);
    drop(listener);
    SocketListener::bind(&at, &ListenOptions::default()).expect("the same port");
}

#[tokio::test]
async fn ipv6_alone_or_with_ipv4() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        eprintln!("note: this machine has no IPv6, which is not tested");
        return;
    }
    for ipv6_only in [false, true] {
        let options = ListenOptions { ipv6_only, ..ListenOptions::default() };
        let any = Endpoint::Ip("[::]:0".parse().expect("an address"));
        let listener = SocketListener::bind(&any, &options).expect("a listener");
        let Ok(Endpoint::Ip(at)) = listener.local_endpoint() else { panic!("an address") };
        connect(&Endpoint::Ip(format!("[::1]:{}", at.port()).parse().expect("an address")))
            .await
            .expect("IPv6");
        let old =
            connect(&Endpoint::Ip(format!("127.0.0.1:{}", at.port()).parse().expect("an address"))).await;
        assert_eq!(old.is_ok(), !ipv6_only);
    }
}

#[tokio::test]
async fn a_connect_waits_for_room_in_the_backlog() {
    for index in 0..2 {
        let (_directory, path) = new_path();
        let at = [unix(&path), Endpoint::UnixAbstract(path.as_os_str().as_encoded_bytes().to_vec())][index]
            .clone();
        let options = ListenOptions { backlog: 1, ..ListenOptions::default() };
        let listener = SocketListener::bind(&at, &options).expect("a listener");
        let mut waiting = Vec::new();
        for _ in 0..6 {
            let at = at.clone();
            waiting.push(tokio::spawn(async move { connect(&at).await }));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(waiting.iter().any(|one| !one.is_finished()), "the backlog is full");
        let mut accepted = Vec::new();
        for _ in 0..6 {
            accepted.push(within(listener.accept()).await.expect("a connection"));
        }
        for one in waiting {
            within(one).await.expect("a task").expect("a connection");
        }
    }
}

#[tokio::test]
async fn a_connection_that_went_away_does_not_end_the_listener() {
    for Ends { listener, directory, .. } in all_ends(&SocketOptions::default()).await {
        let to = listener.local_endpoint().expect("an address");
        let gone = connect(&to).await.expect("a connection");
        socket2::SockRef::from(&gone.fd().expect("open"))
            .set_linger(Some(Duration::ZERO))
            .expect("an option");
        drop(gone);
        // Linux gives such a connection, others an error; the next one is good in any case.
        let mut near = connect(&to).await.expect("a connection");
        within(near.write_all(b"here")).await.expect("a write");
        let mut got = [0; 4];
        for _ in 0..2 {
            let Ok(mut far) = within(listener.accept()).await else { continue };
            if within(far.read(&mut got)).await.is_ok_and(|count| count == 4) {
                break;
            }
        }
        assert_eq!(&got, b"here");
        drop(directory);
    }
}

/// The limit is of the whole process.
#[test]
fn without_descriptors_an_accept_fails_slowly_and_the_connection_waits() {
    if !is_alone("listener::without_descriptors_an_accept_fails_slowly_and_the_connection_waits") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let at = Endpoint::Ip("127.0.0.1:0".parse().expect("an address"));
        let listener = SocketListener::bind(&at, &ListenOptions::default()).expect("a listener");
        let mut near = connect(&listener.local_endpoint().expect("an address")).await.expect("a connection");
        within(near.write_all(b"here")).await.expect("a write");
        let before = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..before }).expect("a limit");
        let started = Instant::now();
        for _ in 0..4 {
            let error = within(listener.accept()).await.expect_err("no descriptors");
            assert_eq!(error.raw_os_error(), Some(libc::EMFILE));
        }
        assert!(started.elapsed() >= Duration::from_millis(250), "{:?}", started.elapsed());
        setrlimit(Resource::Nofile, before).expect("a limit");
        let mut far = within(listener.accept()).await.expect("the same connection");
        let mut got = [0; 4];
        within(far.read_all(&mut got)).await.expect("a read");
        assert_eq!(&got, b"here");
    });
}

#[tokio::test]
async fn an_accept_that_is_dropped_loses_no_connection() {
    let at = Endpoint::Ip("127.0.0.1:0".parse().expect("an address"));
    let listener = SocketListener::bind(&at, &ListenOptions::default()).expect("a listener");
    let to = listener.local_endpoint().expect("an address");
    for _ in 0..20 {
        let impatient = tokio::time::timeout(Duration::from_millis(1), listener.accept()).await;
        assert!(impatient.is_err(), "nobody has connected");
        let near = connect(&to).await.expect("a connection");
        let far = within(listener.accept()).await.expect("a connection");
        assert_eq!(near.local_endpoint().expect("an address"), far.peer_endpoint().expect("an address"));
    }
}

const VSOCK_LOCAL: u32 = 1;

/// All of vsock that needs no peer. Other tests of the same code have peers: the socket is one like any other.
#[tokio::test]
async fn vsock_without_a_peer() {
    let any = Endpoint::Vsock { cid: u32::MAX, port: u32::MAX };
    let listener = SocketListener::bind(&any, &ListenOptions::default()).expect("a kernel with vsock");
    let at = listener.local_endpoint().expect("an address");
    let Endpoint::Vsock { port, .. } = at else { panic!("{at} is not of vsock") };
    assert!(port > 0 && port != u32::MAX, "the kernel chose {port}");
    let again = SocketListener::bind(&at, &ListenOptions::default()).expect_err("the port is taken");
    assert!(again.to_string().contains(&format!(":{port}")), "{again}");
    let impatient = tokio::time::timeout(Duration::from_millis(20), listener.accept()).await;
    assert!(impatient.is_err(), "nobody has connected");

    // An inherited descriptor is known for what it is; it is not connected.
    let fd = socket2::Socket::new(socket2::Domain::VSOCK, socket2::Type::STREAM, None).expect("a socket");
    let mut channel = Socket::from_fd(fd.into()).expect("a channel");
    assert_eq!(channel.kind(), "vsock");
    assert!(channel.peer_endpoint().is_err() && channel.peer_process().is_err());
    channel.set_delay(false);
    channel.set_cork(true);
    assert!(within(channel.write_all(b"to nobody")).await.is_err());
    within(channel.close()).await.expect("closed");
    let closed = channel.peer_endpoint().expect_err("closed");
    assert_eq!(kind_of(&closed), Some(ErrorKind::Closed));
}

/// Machines without the loopback transport of vsock (`CONFIG_VSOCKETS_LOOPBACK`) time out or refuse: the error says so.
#[tokio::test]
async fn vsock_to_itself() {
    let any = Endpoint::Vsock { cid: u32::MAX, port: u32::MAX };
    let listener = SocketListener::bind(&any, &ListenOptions::default()).expect("a kernel with vsock");
    let Ok(Endpoint::Vsock { port, .. }) = listener.local_endpoint() else { panic!("an address") };
    let to = Endpoint::Vsock { cid: VSOCK_LOCAL, port };
    let mut near = match within(Socket::connect(&to, &SocketOptions::default())).await {
        Ok(near) => near,
        Err(error) => {
            eprintln!("note: vsock has no loopback on this machine: {error}");
            assert_eq!(kind_of(&error), Some(ErrorKind::Connect));
            let text = error.to_string();
            for word in [format!("vsock://1:{port}"), "vsock_loopback".to_owned()] {
                assert!(text.contains(&word), "{word} is missing in: {text}");
            }
            return;
        }
    };
    let mut far = within(listener.accept()).await.expect("a connection");
    assert_eq!((near.kind(), far.kind()), ("vsock", "vsock"));
    let data = vec![9; 1_000_000];
    let copy = data.clone();
    let writer = tokio::spawn(async move {
        near.write_all(&copy).await.expect("a write");
        near.shutdown().await.expect("an end");
        near
    });
    let mut got = Vec::new();
    within(far.read_to_end(&mut got)).await.expect("a read");
    assert!(got == data);
    drop(within(writer).await.expect("the writer"));
}
