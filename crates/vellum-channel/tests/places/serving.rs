//! Many connections at once: limits, admission, stalling clients, a stop.

use super::*;

#[tokio::test]
async fn connections_beyond_the_limit_wait_in_the_backlog() {
    let mut options = ListenerOptions::default();
    options.connections_max = Some(2);
    let mut listener = listen(&["tcp://127.0.0.1:0"], options).await;
    let text = listener.local_endpoints()[0].to_string();
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(connect_to(&text).await);
    }
    let (first, _) = next(&mut listener).await;
    let (mut second, _) = next(&mut listener).await;
    assert!(timeout(Duration::from_millis(200), listener.next()).await.is_err(), "the third waits");
    assert_eq!(listener.counts().open, 2);
    drop(first);
    let (third, _) = next(&mut listener).await;
    assert!(timeout(Duration::from_millis(200), listener.next()).await.is_err(), "the fourth waits");
    // Closed counts as much as dropped.
    within("closing", second.close()).await.expect("closed");
    let (mut fourth, _) = next(&mut listener).await;
    talk(&mut clients[3], &mut fourth).await;
    assert_eq!((listener.counts().open, listener.counts().accepted), (2, 4));
    drop((third, fourth));
}

#[tokio::test]
async fn the_admission_decides_without_holding_up_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket").display().to_string();
    let asked = Arc::new(AtomicUsize::new(0));
    let mut options = ListenerOptions::default();
    options.admission_timeout = Duration::from_millis(1500);
    let count = asked.clone();
    options.admission = Some(Admission::new(move |peer| match count.fetch_add(1, Ordering::SeqCst) {
        0 => Err(format!("process {:?} is not wanted", peer.process.map(|process| process.pid))),
        // Thinks too long.
        1 => {
            std::thread::sleep(Duration::from_secs(4));
            Ok(())
        }
        2 => panic!("an admission that fails refuses"),
        _ => Ok(()),
    }));
    let mut listener = listen(&[&format!("unix:{path}")], options).await;
    let mut refused = Vec::new();
    for done in 1..=3 {
        refused.push(connect_to(&format!("unix:{path}")).await);
        let asking = async {
            while asked.load(Ordering::SeqCst) < done {
                sleep(Duration::from_millis(5)).await;
            }
        };
        within("asking", asking).await;
    }
    let start = Instant::now();
    talk_over(&mut listener, &format!("unix:{path}")).await;
    assert!(start.elapsed() < Duration::from_millis(1000), "the slow one held up another");
    for mut channel in refused {
        let mut byte = [0];
        let read = within("the end", channel.read(&mut byte)).await;
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
    assert_eq!((listener.counts().accepted, listener.counts().refused), (4, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalling_clients_hold_up_nobody() {
    const CLIENTS: usize = 200;
    let credentials = Credentials::new();
    let mut options = ListenerOptions::default();
    options.pending_max = 100;
    let server = format!("tls+tcp://127.0.0.1:0?handshake-timeout=2&backlog=512&{}", credentials.server());
    let mut listener = listen(&[&server], options).await;
    let port = port_of(&listener.local_endpoints()[0]);
    let target = address(&format!("tls+tcp://127.0.0.1:{port}?sni=localhost&{}", credentials.client()));
    let start = Instant::now();
    let mut stalling = Vec::new();
    let mut honest = tokio::task::JoinSet::new();
    for number in 0..CLIENTS {
        if number % 4 == 0 {
            // Some say nothing, others half a record.
            let mut client = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("connected");
            if number % 8 == 0 {
                client.write_all(&[0x16, 3, 1, 2, 0, 1]).await.expect("sent");
            }
            stalling.push(client);
            continue;
        }
        let target = target.clone();
        honest.spawn(async move {
            let mut channel = connect(&target, &ConnectOptions::default()).await?;
            let mut got = [0; 4];
            channel.write_all(b"ping").await?;
            channel.flush().await?;
            channel.read_exact(&mut got).await.map(|_| got)
        });
    }
    let mut kept = Vec::new();
    for _ in 0..CLIENTS - stalling.len() {
        let (mut channel, _) = next(&mut listener).await;
        let mut got = [0; 4];
        within("a ping", channel.read_exact(&mut got)).await.expect("a ping");
        channel.write_all(&got).await.expect("sent");
        channel.flush().await.expect("sent");
        kept.push(channel);
    }
    let took = start.elapsed();
    println!("note: {} handshakes beside {} stalling took {took:?}", kept.len(), stalling.len());
    while let Some(done) = within("an answer", honest.join_next()).await {
        assert_eq!(&done.expect("no panic").expect("served"), b"ping");
    }
    // The stalling ones are let go of in time, by an alert or the end.
    for mut client in stalling {
        let mut rest = Vec::new();
        let _ = within("the end", client.read_to_end(&mut rest)).await;
    }
    kept.clear();
    within("closing", listener.wait_closed(LIMIT)).await.expect("all are closed");
    let counts = listener.counts();
    assert_eq!((counts.accepted, counts.failed, counts.open), (200, 50, 0));
}

#[tokio::test]
async fn pending_connections_are_bounded() {
    let mut options = ListenerOptions::default();
    options.pending_max = 3;
    let mut listener = listen(&["ws://127.0.0.1:0?handshake-timeout=30"], options).await;
    let port = port_of(&listener.local_endpoints()[0]);
    let mut clients = Vec::new();
    for _ in 0..6 {
        clients.push(tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("connected"));
    }
    sleep(Duration::from_millis(300)).await;
    assert_eq!(listener.counts().accepted, 3, "no more handshakes than there is room for");
    clients.drain(..3);
    let accepted = async {
        while listener.counts().accepted < 6 {
            sleep(Duration::from_millis(5)).await;
        }
    };
    within("the others", accepted).await;
    // A stop breaks off handshakes that would take half a minute.
    let start = Instant::now();
    within("stopping", listener.stop()).await;
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(listener.next().await.is_err());
    assert_eq!(listener.counts().open, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_is_clean_while_clients_connect() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("socket");
    let mut listener =
        listen(&["tcp://127.0.0.1:0", &format!("unix:{}", path.display())], ListenerOptions::default()).await;
    let texts: Vec<_> = listener.local_endpoints().iter().map(ToString::to_string).collect();
    let clients: Vec<_> = texts
        .into_iter()
        .map(|text| {
            tokio::spawn(async move {
                let mut connected = 0;
                while let Ok(channel) = connect(&address(&text), &ConnectOptions::default()).await {
                    connected += 1;
                    drop(channel);
                }
                connected
            })
        })
        .collect();
    let handle = listener.handle();
    let stopping = tokio::spawn(async move {
        sleep(Duration::from_millis(300)).await;
        handle.stop().await;
        handle
    });
    let (mut kept, mut taken) = (Vec::new(), 0_u64);
    let ended = loop {
        match within("a connection", listener.next()).await {
            Ok((channel, _)) if kept.len() < 10 => kept.push(channel),
            Ok(_) => {}
            Err(error) => break error,
        }
        taken += 1;
    };
    assert_eq!(kind_of(&ended), Some(ErrorKind::Closed));
    let handle = within("the stop", stopping).await.expect("no panic");
    assert!(!path.exists());
    let mut connected = 0;
    for client in clients {
        connected += within("a client", client).await.expect("no panic");
    }
    println!("note: {taken} connections were taken of {connected} that were made");
    assert!(taken >= 10);
    assert_eq!(taken, handle.counts().accepted - handle.counts().failed, "none is lost");
    // Those that were taken live on.
    assert_eq!(handle.counts().open, kept.len());
    let late = handle.wait_closed(Duration::from_millis(50)).await.expect_err("still open");
    assert_eq!(kind_of(&late), Some(ErrorKind::Timeout));
    kept.clear();
    handle.wait_closed(LIMIT).await.expect("all are dropped");
}

#[tokio::test]
async fn a_dropped_listener_is_gone() {
    let listener = listen(&["tcp://127.0.0.1:0"], ListenerOptions::default()).await;
    let text = listener.local_endpoints()[0].to_string();
    let handle = listener.handle();
    drop(listener);
    within("the end", handle.stop()).await;
    no_longer(&text).await;
}

#[tokio::test]
async fn sockets_take_turns() {
    let mut options = ListenerOptions::default();
    // One at a time: the others stay in the backlogs.
    options.pending_max = 1;
    let mut listener = listen(&["tcp://127.0.0.1:0?backlog=64", "tcp://127.0.0.1:0"], options).await;
    let endpoints = listener.local_endpoints();
    let mut clients = Vec::new();
    for _ in 0..40 {
        clients.push(connect_to(&endpoints[0].to_string()).await);
    }
    clients.push(connect_to(&endpoints[1].to_string()).await);
    let mut before = 0;
    while next(&mut listener).await.1.local != endpoints[1] {
        before += 1;
    }
    assert!(before <= 2, "{before} connections of the busy socket came before the one of the other");
}

#[tokio::test]
async fn a_want_of_descriptors_is_survived() {
    const CLIENTS: usize = 40;
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["serving::served_with_few_descriptors", "--exact", "--ignored", "--nocapture"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a child");
    let mut output = std::io::BufReader::new(child.stdout.take().expect("its output"));
    let at = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        while !line.starts_with("tcp://") {
            line.clear();
            assert!(std::io::BufRead::read_line(&mut output, &mut line).expect("a line") > 0, "it ended");
        }
        (line.trim().to_owned(), output)
    });
    let (at, output) = within("an address", at).await.expect("no panic");
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(connect_to(&at).await);
    }
    // All are there, and more than the service can have at a time: each is served when others have gone.
    for client in &mut clients {
        let mut got = [0; 2];
        within("a greeting", client.read_exact(&mut got)).await.expect("received");
        assert_eq!(&got, b"hi");
    }
    let (is_good, said) = tokio::task::spawn_blocking(|| finish(child)).await.expect("no panic");
    drop(output);
    assert!(is_good, "{said}");
}

#[tokio::test]
#[ignore = "a_want_of_descriptors_is_survived runs it in a process of its own"]
async fn served_with_few_descriptors() {
    let mut listener = listen(&["tcp://127.0.0.1:0?backlog=64"], ListenerOptions::default()).await;
    let open = std::fs::read_dir("/proc/self/fd").expect("descriptors").count() as u64;
    let limit = rustix::process::Rlimit { current: Some(open + 9), maximum: Some(open + 9) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).expect("a limit");
    println!("{}", listener.local_endpoints()[0]);
    // Takes what comes until nothing does, then lets go of it all.
    let (mut kept, mut served, mut most) = (Vec::new(), 0, 0);
    let start = Instant::now();
    while served < 40 {
        assert!(start.elapsed() < LIMIT, "only {served} were served");
        match timeout(Duration::from_millis(250), listener.next()).await {
            Ok(next) => kept.push(next.expect("a connection").0),
            Err(_) => {
                most = most.max(kept.len());
                for mut channel in kept.drain(..) {
                    channel.write_all(b"hi").await.expect("sent");
                    served += 1;
                }
            }
        }
    }
    assert!((5..=14).contains(&most), "{most} connections at a time");
    assert_eq!(listener.counts().accepted, 40);
}
