//! The opening handshake.

use crate::support::{REQUEST, frame, options, read_head, server, within};
use std::io;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use vellum_channel::{Channel, ChannelExt, ErrorKind, Stream, WebSocket, WebSocketOptions, kind_of};

/// What a server answers to these bytes, and how it fails.
async fn refused(request: &[u8], options: &WebSocketOptions) -> (String, io::Error) {
    let (near, mut raw) = duplex(1 << 20);
    raw.write_all(request).await.expect("there is room");
    let accepting = async {
        let mut channel = Stream::new(near);
        channel.set_name("console");
        WebSocket::accept(channel, options).await
    };
    let reading = async {
        let mut answer = String::new();
        raw.read_to_string(&mut answer).await.expect("an answer");
        answer
    };
    let (accepted, answer) = within(async { tokio::join!(accepting, reading) }).await;
    (answer, accepted.expect_err("the request is bad"))
}

fn with(from: &str, to: &str) -> String {
    assert!(REQUEST.contains(from));
    REQUEST.replace(from, to)
}

#[tokio::test]
async fn a_good_request_gets_the_six_header_fields() {
    let (near, mut raw) = duplex(4096);
    raw.write_all(REQUEST.as_bytes()).await.expect("there is room");
    let options = options();
    let accepting = WebSocket::accept(Stream::new(near), &options);
    let (server, answer) = within(async { tokio::join!(accepting, read_head(&mut raw)) }).await;
    let server = server.expect("a good request");
    assert_eq!((server.protocol(), server.path()), (Some("binary"), "/"));
    let mut lines = answer.lines();
    assert_eq!(lines.next(), Some("HTTP/1.1 101 Switching Protocols"));
    assert_eq!(lines.next(), Some("Server: Vellum"));
    assert!(lines.next().is_some_and(|date| date.starts_with("Date: ") && date.ends_with(" GMT")));
    assert_eq!(lines.next(), Some("Upgrade: websocket"));
    assert_eq!(lines.next(), Some("Connection: Upgrade"));
    assert_eq!(lines.next(), Some("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    assert_eq!(lines.next(), Some("Sec-WebSocket-Protocol: binary"));
    assert_eq!(lines.next(), Some(""));
}

/// Case W06: whatever a client offers.
#[tokio::test]
async fn no_extension_is_ever_agreed_on() {
    let offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, x-other\r\nHost:";
    let (near, mut raw) = duplex(4096);
    raw.write_all(with("Host:", offer).as_bytes()).await.expect("there is room");
    let options = options();
    let accepting = WebSocket::accept(Stream::new(near), &options);
    let (server, answer) = within(async { tokio::join!(accepting, read_head(&mut raw)) }).await;
    assert!(answer.starts_with("HTTP/1.1 101 ") && !answer.to_lowercase().contains("extensions"), "{answer}");
    // A client that compresses all the same breaks the rules.
    raw.write_all(&frame(0xC2, b"x", Some(*b"abcd"))).await.expect("there is room");
    let error = within(server.expect("a good request").read_u8()).await.expect_err("a reserved bit");
    assert_eq!(kind_of(&error), Some(ErrorKind::WebSocketProtocol), "{error}");
}

#[tokio::test]
async fn bad_requests_are_answered() {
    let line = "GET / HTTP/1.1";
    let key = "dGhlIHNhbXBsZSBub25jZQ==";
    let cases = [
        // The cases of QEMU's test.
        ("no-space", with(line, "GET/HTTP/1.1"), "400 Bad Request"),
        ("method-only", with(line, "GET"), "400 Bad Request"),
        ("no-version", with(line, "GET /"), "400 Bad Request"),
        ("bad-method", with(line, "POST / HTTP/1.1"), "400 Bad Request"),
        ("bad-version", with(line, "GET / HTTP/1.0"), "400 Bad Request"),
        ("bad-version", with(line, "GET / HTTP/9.9"), "400 Bad Request"),
        ("bad-version", with(line, "GET / QUUX/1.1"), "400 Bad Request"),
        // The rest.
        ("other path", with(line, "GET /other HTTP/1.1"), "404 Not Found"),
        ("no host", with("Host: localhost\r\n", ""), "400 Bad Request"),
        ("two hosts", with("Host: localhost\r\n", "Host: a\r\nHost: b\r\n"), "400 Bad Request"),
        ("no key", with("Sec-WebSocket-Key", "X-Key"), "400 Bad Request"),
        ("short key", with(key, "dGhlIHNhbXBsZSBub25jZQ"), "400 Bad Request"),
        ("key not base64", with(key, "dGhlIHNhbXBsZSBub25j****"), "400 Bad Request"),
        ("key of 18 bytes", with(key, "dGhlIHNhbXBsZSBub25jZQAA"), "400 Bad Request"),
        ("no websocket version", with("Sec-WebSocket-Version: 13\r\n", ""), "400 Bad Request"),
        ("websocket version 8", with("Version: 13", "Version: 8"), "400 Bad Request"),
        ("no upgrade", with("Upgrade: websocket\r\n", ""), "400 Bad Request"),
        ("other upgrade", with("Upgrade: websocket", "Upgrade: h2c"), "400 Bad Request"),
        (
            "connection without token",
            with("Connection: Upgrade", "Connection: keep-alive"),
            "400 Bad Request",
        ),
        (
            "connection with half a token",
            with("Connection: Upgrade", "Connection: Upgraded"),
            "400 Bad Request",
        ),
        ("no common protocol", with("Protocol: binary", "Protocol: base64, chat"), "400 Bad Request"),
        ("part of a protocol", with("Protocol: binary", "Protocol: binary2"), "400 Bad Request"),
        ("body", with("Host:", "Content-Length: 5\r\nHost:"), "400 Bad Request"),
        ("body in chunks", with("Host:", "Transfer-Encoding: chunked\r\nHost:"), "400 Bad Request"),
        ("header without colon", with("Host: localhost", "Host"), "400 Bad Request"),
        ("not HTTP", "\u{16}\u{3}\u{1}\u{2}".to_owned(), "400 Bad Request"),
    ];
    for (name, request, status) in cases {
        let (answer, error) = refused(request.as_bytes(), &options()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{name}: {answer}");
        assert!(answer.contains("\r\nSec-WebSocket-Version: 13\r\n"), "{name}: {answer}");
        assert!(answer.ends_with("\r\n\r\n"), "{name}: {answer}");
        assert_eq!(kind_of(&error), Some(ErrorKind::WebSocketHandshake), "{name}: {error}");
        assert!(error.to_string().contains("console"), "{name}: {error}");
    }
}

/// Case W01.
#[tokio::test]
async fn requests_without_end_are_cut_short() {
    let endless = with("Host: localhost\r\n", &format!("X: {}", "x".repeat(10_000)));
    let line = format!("GET /{} HTTP/1.1\r\n", "a".repeat(9000));
    let many = with("Host: localhost\r\n", &"a: b\r\n".repeat(65));
    for request in [endless, line, many] {
        let (answer, error) = refused(request.as_bytes(), &options()).await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
        assert_eq!(kind_of(&error), Some(ErrorKind::Limit), "{error}");
    }
    let most = with("Host:", &format!("{}Host:", "a: b\r\n".repeat(58)));
    let (near, mut raw) = duplex(4096);
    raw.write_all(most.as_bytes()).await.expect("there is room");
    within(WebSocket::accept(Stream::new(near), &options())).await.expect("64 fields are taken");
}

#[tokio::test]
async fn a_client_that_stalls_is_given_up() {
    let options = WebSocketOptions { handshake_timeout: Duration::from_millis(200), ..options() };
    let (near, mut raw) = duplex(4096);
    let started = Instant::now();
    let dripping = async {
        for byte in REQUEST.as_bytes() {
            raw.write_all(&[*byte]).await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        io::Result::Ok(())
    };
    let (accepted, _) =
        within(async { tokio::join!(WebSocket::accept(Stream::new(near), &options), dripping) }).await;
    let error = accepted.expect_err("it takes too long");
    assert_eq!(kind_of(&error), Some(ErrorKind::Timeout), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));

    // One that takes no answer, after a bad request.
    let (near, mut raw) = duplex(64);
    raw.write_all(b"GET\r\n\r\n").await.expect("there is room");
    let error =
        within(WebSocket::accept(Stream::new(near), &options)).await.expect_err("no room for the answer");
    assert_eq!(kind_of(&error), Some(ErrorKind::Timeout), "{error}");
    drop(raw);
}

#[tokio::test]
async fn a_client_that_leaves_is_told() {
    let (near, mut raw) = duplex(4096);
    raw.write_all(&REQUEST.as_bytes()[..40]).await.expect("there is room");
    drop(raw);
    let error = within(WebSocket::accept(Stream::new(near), &options())).await.expect_err("half a request");
    assert_eq!(kind_of(&error), Some(ErrorKind::UnexpectedEof), "{error}");
}

#[tokio::test]
async fn requests_byte_by_byte_and_with_frames_behind() {
    let (near, mut raw) = duplex(1);
    let sending = async {
        let mut all = REQUEST.as_bytes().to_vec();
        all.extend(frame(0x82, b"early", Some(*b"abcd")));
        let (mut reader, mut writer) = tokio::io::split(&mut raw);
        let write = async {
            for byte in all {
                writer.write_all(&[byte]).await.expect("taken");
            }
        };
        let read = async {
            let mut answer = vec![0; 100];
            reader.read_exact(&mut answer).await.expect("an answer");
            // The line holds one byte: the rest of the answer has to be taken, too.
            while !answer.ends_with(b"\r\n\r\n") {
                answer.push(reader.read_u8().await.expect("an answer"));
            }
        };
        tokio::join!(write, read);
    };
    let accepting = async {
        let mut server = WebSocket::accept(Stream::new(near), &options()).await.expect("a good request");
        let mut got = [0; 5];
        server.read_all(&mut got).await.expect("the message");
        assert_eq!(&got, b"early");
    };
    within(async { tokio::join!(sending, accepting) }).await;
}

#[tokio::test]
async fn paths_protocols_and_origins_are_settings() {
    async fn accept(request: String, options: WebSocketOptions) -> WebSocket<Stream<DuplexStream>> {
        let (near, mut raw) = duplex(4096);
        raw.write_all(request.as_bytes()).await.expect("there is room");
        let accepted = within(WebSocket::accept(Stream::new(near), &options)).await.expect("a good request");
        drop(raw);
        accepted
    }
    let any = WebSocketOptions { any_path: true, ..options() };
    let server = accept(with("GET /", "GET /vm/7?token=x"), any).await;
    assert_eq!(server.path(), "/vm/7?token=x");
    let one = WebSocketOptions { path: "/vm/7".into(), ..options() };
    let server = accept(with("GET /", "GET /vm/7?token=x"), one.clone()).await;
    assert_eq!(server.path(), "/vm/7?token=x");
    assert!(refused(REQUEST.as_bytes(), &one).await.0.starts_with("HTTP/1.1 404 "));
    let server = accept(with("GET /", "GET http://localhost/vm/7"), one).await;
    assert_eq!(server.path(), "/vm/7");

    let none = with("Sec-WebSocket-Protocol: binary\r\n", "");
    assert_eq!(accept(none.clone(), options()).await.protocol(), None);
    let strict = WebSocketOptions { require_protocol: true, ..options() };
    assert!(refused(none.as_bytes(), &strict).await.0.starts_with("HTTP/1.1 400 "));
    let own = WebSocketOptions { protocols: vec!["b".into(), "a".into()], ..options() };
    assert_eq!(accept(with("binary", "a, b"), own).await.protocol(), Some("b"));
    let without = WebSocketOptions { protocols: vec![], ..options() };
    assert_eq!(accept(REQUEST.into(), without).await.protocol(), None);

    let guarded = WebSocketOptions { origins: vec!["https://vellum.test".into()], ..options() };
    accept(with("Host:", "Origin: https://vellum.test\r\nHost:"), guarded.clone()).await;
    accept(REQUEST.into(), guarded.clone()).await;
    let (answer, error) =
        refused(with("Host:", "Origin: https://evil.test\r\nHost:").as_bytes(), &guarded).await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert_eq!(kind_of(&error), Some(ErrorKind::Refused));
}

/// What a client says to an answer: `{key}` stands for what fits its key.
async fn answered(answer: &str, options: &WebSocketOptions) -> io::Result<WebSocket<Stream<DuplexStream>>> {
    let (near, mut raw) = duplex(1 << 20);
    let answering = async {
        let request = read_head(&mut raw).await;
        let key = request.lines().find_map(|line| line.strip_prefix("Sec-WebSocket-Key: ")).expect("a key");
        let answer = answer.replace("{key}", &derive_accept_key(key.as_bytes()));
        raw.write_all(answer.as_bytes()).await.expect("there is room");
        raw
    };
    let connecting = WebSocket::connect(Stream::new(near), "localhost:80", options);
    let (connected, _raw) = within(async { tokio::join!(connecting, answering) }).await;
    connected
}

const ANSWER: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\nConnection: keep-alive, UPGRADE\r\n\
    Sec-WebSocket-Accept: {key}\r\nSec-WebSocket-Protocol: binary\r\n\r\n";

#[tokio::test]
async fn clients_check_the_answer() {
    let client = answered(ANSWER, &options()).await.expect("a good answer");
    assert_eq!(client.protocol(), Some("binary"));
    let silent = ANSWER.replace("Sec-WebSocket-Protocol: binary\r\n", "");
    assert_eq!(answered(&silent, &options()).await.expect("no protocol is fine").protocol(), None);
    let strict = WebSocketOptions { require_protocol: true, ..options() };
    let extension = "Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n";
    let cases = [
        ("404", "HTTP/1.1 404 Not Found\r\n\r\n".to_owned(), &options()),
        ("answered 301", "HTTP/1.1 301 Moved\r\nLocation: wss://x/\r\n\r\n".into(), &options()),
        ("HTTP/1.0", ANSWER.replace("1.1", "1.0"), &options()),
        ("Upgrade", ANSWER.replace("Upgrade: WebSocket\r\n", ""), &options()),
        ("Connection", ANSWER.replace("UPGRADE", "close"), &options()),
        ("does not fit the key", ANSWER.replace("{key}", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), &options()),
        ("does not fit the key", ANSWER.replace("Sec-WebSocket-Accept", "X"), &options()),
        // Case W06.
        ("permessage-deflate", ANSWER.replace("\r\n\r\n", &format!("\r\n{extension}")), &options()),
        ("chat", ANSWER.replace("binary", "chat"), &options()),
        ("none of the subprotocols", silent, &strict),
        ("not HTTP", "SSH-2.0-OpenSSH_10\r\n".into(), &options()),
    ];
    for (part, answer, options) in cases {
        let error = answered(&answer, options).await.expect_err(part);
        assert_eq!(kind_of(&error), Some(ErrorKind::WebSocketHandshake), "{error}");
        let message = error.to_string();
        assert!(message.contains(part) && !message.contains('\u{1b}'), "{message} should tell {part}");
    }
    let long = format!("HTTP/1.1 101 Switching Protocols\r\nX: {}", "x".repeat(10_000));
    assert_eq!(kind_of(&answered(&long, &options()).await.expect_err("too long")), Some(ErrorKind::Limit));
    let impatient = WebSocketOptions { handshake_timeout: Duration::from_millis(100), ..options() };
    let error = answered("HTTP/1.1 101 S", &impatient).await.expect_err("too slow");
    assert_eq!(kind_of(&error), Some(ErrorKind::Timeout));
}

#[tokio::test]
async fn nothing_can_be_smuggled_into_a_request() {
    let bad = [
        WebSocketOptions { path: "/a b".into(), ..options() },
        WebSocketOptions { path: "/\r\nX: y".into(), ..options() },
        WebSocketOptions { path: "x".into(), ..options() },
        WebSocketOptions { protocols: vec!["a\r\nX: y".into()], ..options() },
        WebSocketOptions { headers: vec![("X".into(), "a\r\nY: b".into())], ..options() },
        WebSocketOptions { headers: vec![("X y".into(), "a".into())], ..options() },
    ];
    for options in bad {
        let (near, _raw) = duplex(4096);
        let error = within(WebSocket::connect(Stream::new(near), "h", &options)).await.expect_err("not sent");
        assert_eq!(kind_of(&error), Some(ErrorKind::Invalid), "{error}");
    }
    for host in ["", "a\r\nX: y", "a b"] {
        let (near, _raw) = duplex(4096);
        let error =
            within(WebSocket::connect(Stream::new(near), host, &options())).await.expect_err("not sent");
        assert_eq!(kind_of(&error), Some(ErrorKind::Invalid), "{error}");
    }
}

#[tokio::test]
async fn a_request_has_the_fields_that_were_asked_for() {
    let options = WebSocketOptions {
        path: "/vm?id=7".into(),
        protocols: vec!["a".into(), "b".into()],
        headers: vec![("Authorization".into(), "Bearer x".into())],
        handshake_timeout: Duration::from_millis(200),
        ..options()
    };
    let (near, mut raw) = duplex(4096);
    let connecting = WebSocket::connect(Stream::new(near), "[::1]:8080", &options);
    let (_, request) = within(async { tokio::join!(connecting, read_head(&mut raw)) }).await;
    for line in [
        "GET /vm?id=7 HTTP/1.1",
        "Host: [::1]:8080",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Protocol: a, b",
        "Authorization: Bearer x",
    ] {
        assert!(request.lines().any(|one| one == line), "{request} should have {line}");
    }
    assert!(!request.to_ascii_lowercase().contains("extensions"));
}

#[tokio::test]
async fn names_and_features_come_from_the_inner_channel() {
    let (server, _raw) = server().await;
    assert_eq!((server.kind(), server.name()), ("websocket", ""));
    assert!(format!("{server:?}").contains("WebSocket"));
    assert!(
        server.peer_endpoint().is_err() && server.control().shutdown(vellum_channel::Shutdown::Both).is_err()
    );
}
