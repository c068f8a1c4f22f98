//! Sockets that the service manager passes.

use super::*;

/// Runs one of the ignored tests below in a process of its own, with `stdin` passed as descriptor 3.
fn activate(role: &str, socket: OwnedFd, names: &str) -> Command {
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new("/bin/sh");
    // `$$` stays what it is when the shell becomes the program.
    let script = "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$0\" \"$@\"";
    command.args(["-c", script]).arg(program).args([role, "--exact", "--ignored", "--nocapture"]);
    command
        .env("LISTEN_FDNAMES", names)
        .stdin(Stdio::from(socket))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

#[tokio::test]
async fn the_service_manager_passes_sockets() {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let at = socket.local_addr().expect("an address");
    let child = activate("activation::activated_service", socket.into(), "disks").spawn().expect("a child");
    let mut channel = connect_to(&at.to_string()).await;
    channel.write_all(b"hello").await.expect("sent");
    let mut got = [0; 5];
    within("an echo", channel.read_exact(&mut got)).await.expect("received");
    assert_eq!(&got, b"hello");
    drop(channel);
    let (is_good, output) = tokio::task::spawn_blocking(|| finish(child)).await.expect("no panic");
    assert!(is_good, "{output}");
}

#[tokio::test]
async fn the_service_manager_may_pass_something_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = std::fs::File::create(folder.path().join("file")).expect("a file");
    let datagram = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    for (fd, what) in [(OwnedFd::from(file), "a file"), (datagram.into(), "a datagram socket")] {
        let child =
            activate("activation::activated_with_something_else", fd, "no disks").spawn().expect("a child");
        let (is_good, output) = tokio::task::spawn_blocking(|| finish(child)).await.expect("no panic");
        assert!(is_good, "{output}");
        let expected = format!("descriptor 3 (\"no disks\"), passed by the service manager, is {what}");
        assert!(output.contains(&expected), "{output}");
    }
}

#[tokio::test]
#[ignore = "the_service_manager_passes_sockets runs it in a process of its own"]
async fn activated_service() {
    let socket = std::fs::read_link("/proc/self/fd/3").expect("descriptor 3").display().to_string();
    let mut passed = activated().expect("what was passed");
    assert_eq!(passed.len(), 1, "one descriptor is passed");
    let one = passed.remove(0);
    assert_eq!(one.name(), "disks");
    let mut listener = Listener::new(ListenerOptions::default());
    listener.add_activated(one, None).await.expect("a listening socket");
    let (mut channel, _) = next(&mut listener).await;
    let mut got = [0; 5];
    within("a message", channel.read_exact(&mut got)).await.expect("received");
    channel.write_all(&got).await.expect("sent");
    assert!(activated().is_err(), "they are taken");
    // What this process starts does not get them.
    let listing = Command::new("/bin/ls").args(["-l", "/proc/self/fd"]).output().expect("ls");
    let listing = String::from_utf8_lossy(&listing.stdout).into_owned();
    assert!(!listing.is_empty() && !listing.contains(&socket), "{socket} is in {listing}");
}

#[tokio::test]
#[ignore = "the_service_manager_may_pass_something_else runs it in a process of its own"]
async fn activated_with_something_else() {
    let one = activated().expect("what was passed").remove(0);
    let refused = one.into_listener().expect_err("not a listening stream socket");
    assert_eq!(kind_of(&refused), Some(ErrorKind::WrongDescriptor));
    println!("{refused}");
}
