//! Where a listener listens.

use super::*;

#[tokio::test]
async fn one_listener_takes_connections_of_all_its_addresses() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let unix = format!("unix:{}?mode=600", path.display());
    let abstract_name = format!("unix:@vellum-places-{}", std::process::id());
    let mut listener =
        listen(&["tcp://127.0.0.1:0", &unix, &abstract_name], ListenerOptions::default()).await;
    assert_eq!(std::fs::metadata(&path).expect("a path").permissions().mode() & 0o777, 0o600);
    let endpoints = listener.local_endpoints();
    assert_eq!(endpoints.len(), 3);
    for endpoint in &endpoints {
        let peer = talk_over(&mut listener, &endpoint.to_string()).await;
        assert_eq!(peer.local, *endpoint);
        if let Endpoint::Ip(_) = endpoint {
            assert_eq!(peer.process, None);
        } else {
            assert_eq!(peer.process.map(|process| process.pid), Some(std::process::id()));
        }
    }
    let counts = listener.counts();
    assert_eq!((counts.accepted, counts.refused, counts.failed), (3, 0, 0));
    within("closing", listener.wait_closed(LIMIT)).await.expect("all were dropped");
    within("stopping", listener.stop()).await;
    assert!(!path.exists(), "the path goes with the listener");
    assert!(listener.local_endpoints().is_empty());
    let ended = within("the end", listener.next()).await.expect_err("stopped");
    assert_eq!(kind_of(&ended), Some(ErrorKind::Closed));
    let late = listener.add(&address("tcp://127.0.0.1:0")).await.expect_err("stopped");
    assert_eq!(kind_of(&late), Some(ErrorKind::Closed));
    for endpoint in &endpoints {
        no_longer(&endpoint.to_string()).await;
    }
}

#[tokio::test]
async fn tls_and_websocket_go_on_top_of_any_of_them() {
    let credentials = Credentials::new();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket").display().to_string();
    let server = credentials.server();
    let mut listener = listen(
        &[
            &format!("tls+tcp://localhost:0?ipv4&alpn=nbd&{server}"),
            "ws://127.0.0.1:0/disks?protocol=binary",
            &format!("wss://127.0.0.1:0?{server}"),
            &format!("tls+unix:{path}?{server}"),
        ],
        ListenerOptions::default(),
    )
    .await;
    let ports: Vec<_> = listener.local_endpoints().iter().take(3).map(port_of).collect();
    let client = credentials.client();
    let [tls, ws, wss] = ports[..] else { panic!("three ports of TCP") };

    let peer = talk_over(&mut listener, &format!("tls+tcp://localhost:{tls}?ipv4&alpn=nbd&{client}")).await;
    assert_eq!(peer.agreed.alpn.as_deref(), Some("nbd"));
    let peer = talk_over(&mut listener, &format!("ws://127.0.0.1:{ws}/disks?query=a%3D1")).await;
    assert_eq!(peer.agreed.path.as_deref().map(|path| path.split('?').next().expect("some")), Some("/disks"));
    assert_eq!(peer.agreed.protocol.as_deref(), Some("binary"));
    talk_over(&mut listener, &format!("wss://localhost:{wss}?ipv4&{client}")).await;
    talk_over(&mut listener, &format!("tls+unix:{path}?{client}&sni=localhost")).await;

    // A wrong name is found by the client, and is no error of the listener.
    let wrong = address(&format!("tls+tcp://127.0.0.1:{tls}?{client}&sni=other.example&alpn=nbd"));
    let refused =
        within("a handshake", connect(&wrong, &ConnectOptions::default())).await.expect_err("wrong name");
    assert_eq!(kind_of(&refused), Some(ErrorKind::TlsCertificateWrongName), "{refused}");
    talk_over(&mut listener, &format!("wss://localhost:{wss}?ipv4&{client}")).await;
    let counts = listener.counts();
    assert_eq!((counts.accepted, counts.failed), (6, 1));
}

#[tokio::test]
async fn credentials_are_looked_at_before_anything_is_bound_or_called() {
    let listener = Listener::new(ListenerOptions::default());
    for (text, kind) in [
        ("tls+tcp://127.0.0.1:0", ErrorKind::TlsCredentials),
        ("tls+tcp://127.0.0.1:0?cert=/no/such/file", ErrorKind::TlsCredentials),
    ] {
        let refused = within("listening", listener.add(&address(text))).await.expect_err(text);
        assert_eq!(kind_of(&refused), Some(kind), "{text}: {refused}");
    }
    assert!(listener.local_endpoints().is_empty());
    let nobody = address("tls+tcp://127.0.0.1:1?ca=/no/such/file");
    let refused = connect(&nobody, &ConnectOptions::default()).await.expect_err("no such file");
    assert_eq!(kind_of(&refused), Some(ErrorKind::TlsCredentials), "{refused}");
}

#[tokio::test]
async fn no_host_is_every_address_of_both_families() {
    let mut listener = listen(&["tcp://:0"], ListenerOptions::default()).await;
    let endpoints = listener.local_endpoints();
    let port = port_of(&endpoints[0]);
    assert!(endpoints.iter().all(|one| port_of(one) == port), "one port: {endpoints:?}");
    let peer = talk_over(&mut listener, &format!("127.0.0.1:{port}")).await;
    assert!(peer.endpoint.to_string().starts_with("tcp://127.0.0.1:"), "not a mapped address: {peer:?}");
    if has_ipv6() {
        assert_eq!(endpoints.len(), 2);
        talk_over(&mut listener, &format!("[::1]:{port}")).await;
    }
    let only = listen(&["tcp://:0?ipv4"], ListenerOptions::default()).await;
    assert_eq!(only.local_endpoints().len(), 1);
    assert!(only.local_endpoints()[0].to_string().starts_with("tcp://0.0.0.0:"));
}

#[tokio::test]
async fn a_name_is_listened_on_at_all_its_addresses() {
    let mut listener = listen(&["tcp://localhost:0"], ListenerOptions::default()).await;
    let found = lookup("localhost", 0, &LookupOptions::default()).await.expect("localhost");
    let endpoints = listener.local_endpoints();
    println!("note: localhost is {found:?}");
    assert!(endpoints.len() <= found.len() && !endpoints.is_empty());
    for endpoint in endpoints {
        talk_over(&mut listener, &endpoint.to_string()).await;
    }
}

#[tokio::test]
async fn a_range_gives_the_first_free_port() {
    // Three ports in a row: the first is taken, the others are not.
    let (taken, first) = loop {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let first = taken.local_addr().expect("an address").port();
        if first < 65000 && [1, 2].iter().all(|step| TcpListener::bind(("127.0.0.1", first + step)).is_ok()) {
            break (taken, first);
        }
    };
    let range = format!("tcp://127.0.0.1:{first}?to={}", first + 2);
    let listener = Listener::new(ListenerOptions::default());
    let mut got = Vec::new();
    for _ in 0..2 {
        got.extend(listener.add(&address(&range)).await.expect("a free port").iter().map(port_of));
    }
    assert_eq!(got, [first + 1, first + 2]);
    let full = listener.add(&address(&range)).await.expect_err("all are taken");
    assert_eq!(kind_of(&full), Some(ErrorKind::Listen));
    assert!(full.to_string().contains(&format!("cannot listen on {range}: ")), "{full}");
    drop(taken);
    assert_eq!(port_of(&listener.add(&address(&range)).await.expect("free again")[0]), first);
}

#[tokio::test]
async fn one_address_that_works_is_enough() {
    if !has_ipv6() {
        return;
    }
    // The port is taken at one of the addresses of no host.
    let taken = TcpListener::bind("0.0.0.0:0").expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let listener = Listener::new(ListenerOptions::default());
    let endpoints = listener.add(&address(&format!(":{port}"))).await.expect("IPv6 is free");
    assert_eq!(endpoints, [Endpoint::Ip(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))]);
    let none = listener.add(&address(&format!(":{port}"))).await.expect_err("both are taken");
    assert_eq!(kind_of(&none), Some(ErrorKind::Listen));
    let message = none.to_string();
    assert!(
        message.contains(&format!("[::]:{port}: ")) && message.contains(&format!("0.0.0.0:{port}: ")),
        "{message}"
    );
}

#[tokio::test]
async fn what_cannot_be_listened_on_is_told() {
    let listener = Listener::new(ListenerOptions::default());
    for text in ["exec:true", "file:x", "stdio:", "null:"] {
        let refused = listener.add(&address(text)).await.expect_err(text);
        assert_eq!(kind_of(&refused), Some(ErrorKind::Unsupported), "{refused}");
    }
    for text in ["tcp://:80", "tcp://localhost:0", "tcp://localhost:1?to=2"] {
        let refused = connect(&address(text), &ConnectOptions::default()).await.expect_err(text);
        assert_eq!(kind_of(&refused), Some(ErrorKind::Invalid), "{refused}");
    }
}

#[tokio::test]
async fn an_inherited_socket_can_be_listened_on() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let at = socket.local_addr().expect("an address");
    let mut listener =
        listen(&[&format!("fd:{}?nodelay", inherited(socket))], ListenerOptions::default()).await;
    assert_eq!(listener.local_endpoints(), [Endpoint::Ip(at)]);
    talk_over(&mut listener, &at.to_string()).await;
    let (one, _other) = UnixStream::pair().expect("a pair");
    let refused =
        listener.add(&address(&format!("fd:{}", inherited(one)))).await.expect_err("it does not listen");
    assert_eq!(kind_of(&refused), Some(ErrorKind::WrongDescriptor), "{refused}");
    // A socket that was bound elsewhere.
    let socket =
        SocketListener::bind(&Endpoint::Ip("127.0.0.1:0".parse().expect("an address")), &Default::default());
    let at = listener.add_socket(socket.expect("bound"), Some(&address("ws://x/y"))).await.expect("added");
    talk_over(&mut listener, &format!("{}/y", at.to_string().replace("tcp:", "ws:"))).await;
}
