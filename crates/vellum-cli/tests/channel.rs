//! `vellum channel` beside socat, openssl and itself.

mod common;
use common::Dir;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

fn data() -> Vec<u8> {
    (0..3_000_000_u32).map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect()
}

/// A `vellum channel` that listens, and where.
struct Listening {
    child: Child,
    notes: BufReader<std::process::ChildStderr>,
    place: String,
}

impl Listening {
    fn start(dir: &Dir, arguments: &[&str]) -> Self {
        let mut child = dir.start(&[&["channel"], arguments].concat());
        let mut notes = BufReader::new(child.stderr.take().expect("standard error"));
        let mut line = String::new();
        notes.read_line(&mut line).expect("a note");
        let place =
            line.trim().strip_prefix("note: listening on ").unwrap_or_else(|| panic!("{line}")).to_owned();
        Self { child, notes, place }
    }

    fn port(&self) -> u16 {
        self.place.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
    }

    /// Waits for the end: the exit code, and what it said.
    fn end(mut self) -> (i32, String) {
        let mut said = String::new();
        self.notes.read_to_string(&mut said).expect("text");
        (self.child.wait().expect("it ends").code().expect("no signal"), said)
    }
}

#[test]
fn a_connection_is_joined_to_a_file() {
    let dir = Dir::new();
    let to = format!("file://{}?mode=write", dir.path("copy").display());
    let listening = Listening::start(&dir, &["--once", "--one-way", "listen:tcp://127.0.0.1:0", &to]);
    let mut stream = TcpStream::connect(("127.0.0.1", listening.port())).expect("connected");
    stream.write_all(&data()).expect("written");
    drop(stream);
    let (code, said) = listening.end();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("2.86 MiB from A to B"), "{said}");
    assert!(dir.read("copy") == data());
}

#[test]
fn both_directions_and_a_half_close_pass_through_a_command() {
    let dir = Dir::new();
    let path = dir.path("in.sock");
    let from = format!("listen:unix://{}", path.display());
    let listening = Listening::start(&dir, &["--once", &from, "exec:wc -c; echo done"]);
    let mut stream = UnixStream::connect(&path).expect("connected");
    stream.write_all(&data()).expect("written");
    stream.shutdown(Shutdown::Write).expect("half closed");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("text");
    assert_eq!(answer, "3000000\ndone\n");
    let (code, said) = listening.end();
    assert_eq!(code, 0, "{said}");
    assert!(!path.exists(), "the socket's path is left");
}

#[test]
fn web_socket_over_tls_with_certificates_of_openssl() {
    let dir = Dir::new();
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ])
        .args(["-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=localhost"])
        .args(["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"])
        .current_dir(dir.path(""))
        .output()
        .expect("openssl runs (Debian package openssl)");
    assert!(made.status.success(), "{made:?}");
    let file = |name: &str| dir.path(name).display().to_string();
    let at = format!("listen:wss://127.0.0.1:0/up?cert={}&key={}", file("cert.pem"), file("key.pem"));
    let copy = format!("exec:cat > {}", file("copy"));
    let listening = Listening::start(&dir, &["--once", &at, &copy]);
    let to = format!("wss://127.0.0.1:{}/up?ca={}&sni=localhost", listening.port(), file("cert.pem"));
    let mut sending =
        dir.command(&["channel", "-", &to]).stdin(Stdio::piped()).spawn().expect("vellum starts");
    sending.stdin.take().expect("standard input").write_all(&data()).expect("written");
    assert!(sending.wait().expect("it ends").success());
    let (code, said) = listening.end();
    assert_eq!(code, 0, "{said}");
    assert!(dir.read("copy") == data());

    // Whoever does not trust the certificate says so, and what to do about it, which comes last. The other side tells, too.
    let mut listening = Listening::start(&dir, &["--once", &at, "null:"]);
    let to = format!("wss://127.0.0.1:{}/up?ca={}", listening.port(), file("cert.pem"));
    let refused = dir.vellum(&["channel", &to, "null:"]).exits(5);
    refused.says("127.0.0.1").says("expect (sni)");
    let mut line = String::new();
    listening.notes.read_line(&mut line).expect("a warning");
    assert!(line.contains("failed before it was ready") && line.contains("bad_certificate"), "{line}");
    listening.child.kill().expect("killed");
    listening.child.wait().expect("it ends");
}

/// A file that can only be written has nothing to say: that is no failure, and ends nothing.
#[test]
fn nothing_is_read_from_a_file_that_is_written() {
    let dir = Dir::new();
    let to = format!("file://{}?mode=write", dir.path("copy").display());
    // A WebSocket has no half-close: if the file's silence were told to it, it would end before the data.
    let listening = Listening::start(&dir, &["--once", "listen:ws://127.0.0.1:0", &to]);
    let from = format!("ws://127.0.0.1:{}", listening.port());
    dir.write("data", &data());
    let data_file = format!("file://{}", dir.path("data").display());
    dir.vellum(&["channel", &data_file, &from]).exits(0);
    let (code, said) = listening.end();
    assert_eq!(code, 0, "{said}");
    assert!(dir.read("copy") == data());

    // The other way round the file is written as well.
    let to = format!("file://{}?mode=append", dir.path("copy").display());
    dir.vellum(&["channel", &to, "exec:echo more"]).exits(0).says("0 bytes from A to B, 5 bytes back");
    assert!(dir.read("copy").ends_with(b"more\n"));
    dir.vellum(&["channel", "--one-way", &to, "null:"]).exits(2).says("writing only");
    dir.vellum(&["channel", &to, &to]).exits(2).says("writing only");
}

/// With one direction only, nobody waits for the other: not a command for the end of its input, nor for its output to be
/// read, nor a peer that answers all that it gets.
#[test]
fn the_direction_that_is_not_wanted_holds_up_nothing() {
    let dir = Dir::new();
    dir.write("data", &data());
    let from = format!("file://{}", dir.path("data").display());
    let tee = format!("exec:tee {}", dir.path("copy").display());
    dir.vellum(&["channel", "--one-way", &from, &tee]).exits(0);
    assert!(dir.read("copy") == data());
    // One that speaks last still can.
    let late = format!("exec:cat > {}; sleep 0.2; echo done", dir.path("copy").display());
    dir.vellum(&["channel", "--one-way", &from, &late]).exits(0);
    let to = format!("file://{}?mode=write", dir.path("copy").display());
    dir.vellum(&["channel", "--one-way", "exec:cat; echo only this", &to]).exits(0);
    assert_eq!(dir.read("copy"), b"only this\n");
    dir.vellum(&["channel", "exec:cat; echo or this", &to]).exits(0);
    assert_eq!(dir.read("copy"), b"or this\n");

    let mut echo = Listening::start(&dir, &["listen:tcp://127.0.0.1:0", "exec:cat"]);
    dir.write("data", &data().repeat(5));
    dir.vellum(&["channel", "--one-way", &from, &echo.place]).exits(0);
    echo.child.kill().expect("killed");
    echo.child.wait().expect("it ends");
}

#[test]
fn many_connections_and_socat() {
    let dir = Dir::new();
    let mut listening = Listening::start(&dir, &["listen:tcp://127.0.0.1:0", "exec:cat"]);
    let peers: Vec<Child> = (0..5)
        .map(|number| {
            let mut peer = Command::new("socat")
                .args(["-t10", "-", &format!("TCP:127.0.0.1:{}", listening.port())])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("socat runs (Debian package socat)");
            let text = format!("hello from {number}");
            peer.stdin.take().expect("standard input").write_all(text.as_bytes()).expect("written");
            peer
        })
        .collect();
    for (number, peer) in peers.into_iter().enumerate() {
        let output = peer.wait_with_output().expect("socat ends");
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("hello from {number}"));
    }
    listening.child.kill().expect("killed");
    listening.child.wait().expect("it ends");
}

#[test]
fn a_signal_stops_it_at_once_and_the_counts_are_told() {
    let dir = Dir::new();
    let listening = Listening::start(&dir, &["listen:tcp://127.0.0.1:0", "exec:cat"]);
    let mut stream = TcpStream::connect(("127.0.0.1", listening.port())).expect("connected");
    stream.write_all(b"hello").expect("written");
    stream.read_exact(&mut [0; 5]).expect("echoed");
    let killed = Command::new("kill").args(["-TERM", &listening.child.id().to_string()]).status();
    assert!(killed.expect("kill runs").success());
    let (code, said) = listening.end();
    assert_eq!(code, 143, "{said}");
    assert!(said.contains("5 bytes from A to B, 5 bytes back"), "{said}");
    assert!(said.contains("1 connection cut: what was on its way is lost"), "{said}");
    assert!(!said.contains("step") && !said.contains("error"), "a listener has no other end: {said}");
}

#[test]
fn a_listener_that_is_stopped_gives_its_report() {
    let dir = Dir::new();
    let mut listening = Listening::start(&dir, &["--json", "listen:tcp://127.0.0.1:0", "exec:cat"]);
    let mut report = listening.child.stdout.take().expect("standard output");
    let mut stream = TcpStream::connect(("127.0.0.1", listening.port())).expect("connected");
    stream.write_all(b"hello").expect("written");
    stream.shutdown(Shutdown::Write).expect("ended");
    stream.read_to_end(&mut Vec::new()).expect("echoed");
    let killed = Command::new("kill").args(["-INT", &listening.child.id().to_string()]).status();
    assert!(killed.expect("kill runs").success());
    let (code, said) = listening.end();
    assert_eq!(code, 130, "{said}");
    let report: serde_json::Value = serde_json::from_reader(&mut report).expect("a report");
    assert_eq!((&report["connections"], &report["failed"]), (&1.into(), &0.into()));
    assert_eq!((&report["bytes_a_to_b"], &report["bytes_b_to_a"]), (&5.into(), &5.into()));
}

#[test]
fn what_is_counted_was_taken_and_an_answer_that_has_no_place_is_told() {
    let dir = Dir::new();
    dir.write("data", &data());
    let from = format!("file://{}", dir.path("data").display());
    // It reads nothing: not more than a pipe holds goes there.
    let ran =
        dir.vellum(&["channel", "--idle", "1", &from, "exec:sleep 9"]).exits(4).says("nothing could be sent");
    assert!(ran.err.contains("64 KiB from A to B"), "{}", ran.err);
    dir.vellum(&["channel", &from, "exec:cat"]).exits(2).says("--one-way leaves out what B sends back");
    dir.vellum(&["channel", "--one-way", &from, "exec:cat"]).exits(0);
}

#[test]
fn the_report_counts_and_errors_have_codes() {
    let dir = Dir::new();
    dir.write("data", &data());
    let from = format!("file://{}", dir.path("data").display());
    let report = dir.vellum(&["channel", "--json", &from, "null:"]).exits(0).any_json();
    assert_eq!((&report["bytes_a_to_b"], &report["bytes_b_to_a"]), (&3_000_000.into(), &0.into()));
    assert_eq!((&report["connections"], &report["failed"]), (&1.into(), &0.into()));
    dir.vellum(&["channel", "tcp://127.0.0.1:1", "null:"]).exits(4).says("refused");
    dir.vellum(&["channel", "tpc://x:1", "null:"]).exits(2).says("tcp");
    dir.vellum(&["channel", "tls+tcp://127.0.0.1:1?ca=/no/ca.pem", "null:"]).exits(2).says("/no/ca.pem");
    dir.vellum(&["channel", "listen:tls+tcp://127.0.0.1:0", "null:"]).exits(2).says("cert=FILE");
    dir.vellum(&["channel", "tls+tcp://127.0.0.1:1?client-cert=required", "null:"])
        .exits(2)
        .says("listened on");
    dir.vellum(&["channel", "listen:unix:@a", "listen:unix:@b"]).exits(2).says("one of the two");
    dir.vellum(&["channel", "--json", "-", "null:"]).exits(2);
    let error = dir.vellum(&["channel", "--json", "exec:exit 3", "null:"]).exits(4).any_json();
    assert!(error["error"]["message"].as_str().expect("text").contains("exit status: 3"), "{error}");
    dir.vellum(&["channel", "tcp://no-such-host.invalid:1", "null:"]).exits(3).says("no-such-host.invalid");
    dir.vellum(&["channel", "--idle", "1", "exec:exec sleep 20", "null:"]).exits(4).says("--idle");
    // The time counts from what moved last, wherever in between that was.
    let begun = Instant::now();
    let late = "exec:echo x; sleep 0.3; echo y; exec sleep 20";
    dir.vellum(&["channel", "--idle", "2", late, "null:"])
        .exits(4)
        .says("4 bytes from A to B")
        .says("--idle");
    let took = begun.elapsed().as_secs_f32();
    assert!((2.2..3.6).contains(&took), "{took} s");
}
