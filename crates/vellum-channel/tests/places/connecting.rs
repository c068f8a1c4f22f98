//! From addresses to channels.

use super::*;

#[tokio::test]
async fn an_error_of_connecting_names_every_address() {
    let free = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = free.local_addr().expect("an address").port();
    drop(free);
    let found = lookup("localhost", port, &LookupOptions::default()).await.expect("localhost");
    let to = address(&format!("localhost:{port}"));
    let failed = connect(&to, &ConnectOptions::default()).await.expect_err("nobody listens");
    assert_eq!(kind_of(&failed), Some(ErrorKind::Connect));
    assert_eq!(failed.kind(), IoKind::ConnectionRefused);
    let message = failed.to_string();
    assert!(message.starts_with(&format!("cannot connect to tcp://localhost:{port}: ")), "{message}");
    for at in found {
        assert!(message.contains(&format!("{at}: ")), "{at} is not in: {message}");
    }
    assert!(message.contains("refused"), "{message}");
}

/// A listener whose backlog is full: the kernel answers no more.
fn black_hole() -> (socket2::Socket, SocketAddr, Vec<socket2::Socket>) {
    let new = || socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    let listener = new();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("bound");
    listener.listen(0).expect("listening");
    let at = listener.local_addr().expect("an address").as_socket().expect("of IP");
    let mut waiting = Vec::new();
    for _ in 0..8 {
        let client = new();
        client.set_nonblocking(true).expect("non-blocking");
        let _ = client.connect(&at.into());
        waiting.push(client);
    }
    std::thread::sleep(Duration::from_millis(50));
    (listener, at, waiting)
}

#[tokio::test]
async fn a_peer_that_does_not_answer_is_given_up() {
    let (_listener, at, _waiting) = black_hole();
    let start = Instant::now();
    let failed = connect(&address(&format!("{at}?timeout=300ms")), &ConnectOptions::default())
        .await
        .expect_err("no answer");
    let took = start.elapsed();
    assert_eq!(kind_of(&failed), Some(ErrorKind::Timeout), "{failed}");
    assert!(failed.to_string().contains(&format!("{at}: no answer yet")), "{failed}");
    assert!((300..3000).contains(&took.as_millis()), "{took:?}");
}

#[tokio::test]
async fn names_are_looked_up() {
    let found = lookup("localhost", 80, &LookupOptions::default()).await.expect("localhost");
    assert!(found.iter().all(|at| at.ip().is_loopback() && at.port() == 80));
    let distinct: HashSet<_> = found.iter().collect();
    assert_eq!(distinct.len(), found.len());
    let failed = connect(&address("no..such:1"), &ConnectOptions::default()).await.expect_err("no such host");
    assert_eq!(kind_of(&failed), Some(ErrorKind::Resolve), "{failed}");
    assert!(failed.to_string().starts_with("address resolution failed for no..such:1: "), "{failed}");
}

/// Every connection leads to an echo in this process.
#[derive(Debug, Default)]
struct Echoes {
    asked: parking_lot::Mutex<Vec<String>>,
}

impl Connector for Echoes {
    fn connect<'a>(&'a self, to: &'a Destination, options: &'a ConnectOptions) -> Connecting<'a> {
        Box::pin(async move {
            self.asked.lock().push(format!("{to} {:?}", options.timeout));
            let (near, far) = tokio::io::duplex(4096);
            tokio::spawn(async move {
                let (mut read, mut write) = tokio::io::split(far);
                tokio::io::copy(&mut read, &mut write).await
            });
            Ok(Box::new(Stream::new(near)) as Box<dyn Channel>)
        })
    }
}

#[tokio::test]
async fn a_network_stack_of_the_callers_own_is_used() {
    let stack = Echoes::default();
    for text in ["far.example:80?timeout=7", "unix:@x", "vsock://3:4"] {
        let mut channel =
            connect_through(&stack, &address(text), &ConnectOptions::default()).await.expect("an echo");
        channel.write_all(b"hello").await.expect("sent");
        let mut got = [0; 5];
        within("an echo", channel.read_exact(&mut got)).await.expect("received");
        assert_eq!(&got, b"hello");
    }
    assert_eq!(*stack.asked.lock(), ["tcp://far.example:80 7s", "unix:@x 30s", "vsock://3:4 30s"]);
}

#[tokio::test]
async fn files_commands_and_nothing_are_channels_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a ?file");
    let text =
        Address::new(Place::File { path: path.clone(), mode: vellum_channel::FileMode::Write }).to_string();
    let mut file = connect_to(&text).await;
    file.write_all(b"hello").await.expect("written");
    file.close().await.expect("closed");
    assert_eq!(std::fs::read(&path).expect("a file"), b"hello");
    let mut file = connect_to(&text.replace("mode=write", "mode=append")).await;
    file.write_all(b", you").await.expect("written");
    file.close().await.expect("closed");
    let mut file = connect_to(&text.replace("mode=write", "mode=read")).await;
    let mut all = String::new();
    within("reading", file.read_to_string(&mut all)).await.expect("read");
    assert_eq!(all, "hello, you");
    let missing =
        connect(&address("file:/no/such/file"), &ConnectOptions::default()).await.expect_err("missing");
    assert_eq!(missing.kind(), IoKind::NotFound);
    assert!(missing.to_string().contains("/no/such/file"), "{missing}");

    let mut command = connect_to("exec:tr a-z A-Z; exit 3").await;
    command.write_all(b"hello").await.expect("written");
    command.shutdown().await.expect("ended");
    let mut all = String::new();
    within("reading", command.read_to_string(&mut all)).await.expect("read");
    assert_eq!(all, "HELLO");
    let closed = within("closing", command.close()).await.expect("closed");
    assert_eq!(closed.exit_status.and_then(|status| status.code()), Some(3));

    let mut null = connect_to("null:").await;
    null.write_all(b"hello").await.expect("written");
    assert_eq!(null.read(&mut [0; 4]).await.expect("the end"), 0);
}

#[tokio::test]
async fn inherited_descriptors_are_what_they_are() {
    let (near, far) = UnixStream::pair().expect("a pair");
    let mut far_channel = connect_to(&format!("fd:{}", inherited(far))).await;
    assert_eq!(far_channel.kind(), "unix");
    far_channel.write_all(b"x").await.expect("written");
    let mut got = [0];
    std::io::Read::read_exact(&mut &near, &mut got).expect("received");

    let (read, write) = std::io::pipe().expect("a pipe");
    let mut reader = connect_to(&format!("fd:{}", inherited(read))).await;
    let mut writer = connect_to(&format!("fd:{}", inherited(write))).await;
    writer.write_all(b"through a pipe").await.expect("written");
    writer.close().await.expect("closed");
    let mut all = String::new();
    within("reading", reader.read_to_string(&mut all)).await.expect("read");
    assert_eq!(all, "through a pipe");

    let own = std::fs::File::open("/dev/null").expect("a file");
    let folder = std::fs::File::open("/").expect("a folder");
    let datagram = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    for number in [own.as_raw_fd(), inherited(folder), inherited(datagram), 1 << 20] {
        let refused = connect(&address(&format!("fd:{number}")), &ConnectOptions::default()).await;
        let refused = refused.expect_err("not a stream");
        assert_eq!(kind_of(&refused), Some(ErrorKind::WrongDescriptor), "{refused}");
    }
}

/// A child process that does not outlive its test.
struct Socat(std::process::Child);

impl Drop for Socat {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn socat(arguments: &[&str]) -> Socat {
    let child = Command::new("socat").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    Socat(child.expect("socat (scripts/install-test-deps.sh)"))
}

/// Connects as soon as somebody listens there.
async fn connect_when_there(text: &str) -> Box<dyn Channel> {
    let connecting = async {
        loop {
            match connect(&address(text), &ConnectOptions::default()).await {
                Ok(channel) => break channel,
                Err(_) => sleep(Duration::from_millis(10)).await,
            }
        }
    };
    within("a listener", connecting).await
}

#[tokio::test]
async fn socat_connects() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket").display().to_string();
    let mut listener =
        listen(&["tcp://127.0.0.1:0", &format!("unix:{path}")], ListenerOptions::default()).await;
    let port = port_of(&listener.local_endpoints()[0]);
    for to in [format!("TCP4:127.0.0.1:{port}"), format!("UNIX-CONNECT:{path}")] {
        let mut child = socat(&["-", &to]);
        let (mut channel, peer) = next(&mut listener).await;
        if to.starts_with("UNIX") {
            assert_eq!(peer.process.map(|process| process.pid), Some(child.0.id()));
        }
        std::io::Write::write_all(child.0.stdin.as_mut().expect("its input"), b"from socat")
            .expect("written");
        let mut got = [0; 10];
        within("a message", channel.read_exact(&mut got)).await.expect("received");
        assert_eq!(&got, b"from socat");
        channel.write_all(b"to socat").await.expect("sent");
        channel.close().await.expect("closed");
        let output = child.0.stdout.take().expect("its output");
        let reading = tokio::task::spawn_blocking(|| std::io::read_to_string(output));
        assert_eq!(within("its output", reading).await.expect("no panic").expect("text"), "to socat");
    }
}

#[tokio::test]
async fn socat_listens() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let mut child = socat(&[&format!("UNIX-LISTEN:{}", path.display()), "EXEC:cat"]);
    let mut channel = connect_when_there(&format!("unix:{}", path.display())).await;
    channel.write_all(b"there and back").await.expect("sent");
    let mut got = [0; 14];
    within("an echo", channel.read_exact(&mut got)).await.expect("received");
    assert_eq!(&got, b"there and back");
    channel.close().await.expect("closed");
    let ending = tokio::task::spawn_blocking(move || child.0.wait());
    let status = within("its end", ending).await.expect("no panic").expect("a status");
    assert!(status.success());
}

#[tokio::test]
async fn standard_streams_are_a_channel() {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["connecting::echo_on_standard_streams", "--exact", "--ignored", "--nocapture"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a child");
    let mut input = child.stdin.take().expect("its input");
    std::io::Write::write_all(&mut input, b"<through the standard streams>").expect("written");
    drop(input);
    let (is_good, output) = tokio::task::spawn_blocking(|| finish(child)).await.expect("no panic");
    assert!(is_good && output.contains("<THROUGH THE STANDARD STREAMS>"), "{output}");
}

#[tokio::test]
#[ignore = "standard_streams_are_a_channel runs it in a process of its own"]
async fn echo_on_standard_streams() {
    let mut channel = connect_to("-").await;
    assert_eq!(channel.name(), "stdio");
    let mut text = String::new();
    within("its input", channel.read_to_string(&mut text)).await.expect("read");
    channel.write_all(text.to_uppercase().as_bytes()).await.expect("written");
    within("its output", channel.close()).await.expect("closed");
}
