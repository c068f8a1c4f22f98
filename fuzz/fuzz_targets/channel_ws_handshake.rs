//! The opening handshake of WebSockets, both sides: any bytes, cut anywhere. Whatever the peer sends, the outcome is the
//! same however it is cut, and every refusal has a kind.
#![no_main]

use arbitrary::Arbitrary;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use libfuzzer_sys::fuzz_target;
use sha1::{Digest, Sha1};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use vellum_channel::{ErrorKind, Stream, WebSocket, WebSocketOptions, kind_of};

#[derive(Arbitrary, Debug)]
struct Input {
    is_client: bool,
    any_path: bool,
    require_protocol: bool,
    step: u8,
    parts: Vec<Part>,
}

/// What the peer says: lines of a good handshake, changed ones, anything.
#[derive(Arbitrary, Debug)]
enum Part {
    Good,
    Line(u8),
    Field { name: u8, value: Vec<u8> },
    End,
    Raw(Vec<u8>),
}

const REQUEST: [&str; 7] = [
    "GET / HTTP/1.1",
    "Host: localhost",
    "Upgrade: websocket",
    "Connection: keep-alive, Upgrade",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Protocol: chat, binary",
];
const ANSWER: [&str; 5] = [
    "HTTP/1.1 101 Switching Protocols",
    "Upgrade: WebSocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Accept: {key}",
    "Sec-WebSocket-Protocol: binary",
];
const NAMES: [&str; 10] = [
    "Host",
    "Origin",
    "Upgrade",
    "Connection",
    "Content-Length",
    "Sec-WebSocket-Key",
    "Sec-WebSocket-Accept",
    "Sec-WebSocket-Version",
    "Sec-WebSocket-Protocol",
    "Sec-WebSocket-Extensions",
];

impl Input {
    fn wire(&self) -> Vec<u8> {
        let good: &[&str] = if self.is_client { &ANSWER } else { &REQUEST };
        let mut out = Vec::new();
        for part in self.parts.iter().take(100) {
            match part {
                Part::Good => good.iter().for_each(|line| out.extend(format!("{line}\r\n").bytes())),
                Part::Line(which) => {
                    out.extend(format!("{}\r\n", good[usize::from(*which) % good.len()]).bytes());
                }
                Part::Field { name, value } => {
                    out.extend(format!("{}: ", NAMES[usize::from(*name) % NAMES.len()]).bytes());
                    out.extend(value);
                    out.extend(b"\r\n");
                }
                Part::End => out.extend(b"\r\n"),
                Part::Raw(bytes) => out.extend(bytes),
            }
        }
        out
    }
}

/// A line: gives the peer's bytes in steps, and keeps what is written.
struct Line {
    bytes: Vec<u8>,
    at: usize,
    step: usize,
    written: Arc<Mutex<Vec<u8>>>,
}

impl AsyncRead for Line {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.at == 0 {
            this.bytes = answer_key(&this.bytes, &this.written.lock().unwrap());
        }
        let count = this.step.min(buf.remaining()).min(this.bytes.len() - this.at);
        buf.put_slice(&this.bytes[this.at..this.at + count]);
        this.at += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Line {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.written.lock().unwrap().extend_from_slice(buf);
        Poll::Ready(Ok(buf.len()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Puts what fits the client's key in place of `{key}`, so that good answers can be found.
fn answer_key(bytes: &[u8], request: &[u8]) -> Vec<u8> {
    const MARK: &[u8] = b"{key}";
    const FIELD: &[u8] = b"Sec-WebSocket-Key: ";
    let mut bytes = bytes.to_vec();
    let Some(at) = request.windows(FIELD.len()).position(|part| part == FIELD) else { return bytes };
    let Some(mark) = bytes.windows(MARK.len()).position(|part| part == MARK) else { return bytes };
    let key = &request[at + FIELD.len()..at + FIELD.len() + 24];
    let guid = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    let accept = STANDARD.encode(Sha1::new().chain_update(key).chain_update(guid).finalize());
    bytes.splice(mark..mark + MARK.len(), accept.into_bytes());
    bytes
}

/// What the handshake and, after it, the rest of the bytes come to.
type Outcome = (Option<ErrorKind>, Option<Option<ErrorKind>>, Vec<u8>);

async fn run(input: &Input, step: usize) -> Outcome {
    let options = WebSocketOptions {
        any_path: input.any_path,
        require_protocol: input.require_protocol,
        ..WebSocketOptions::default()
    };
    let written = Arc::new(Mutex::new(Vec::new()));
    let line = Stream::new(Line { bytes: input.wire(), at: 0, step, written: written.clone() });
    let made = match input.is_client {
        true => WebSocket::connect(line, "localhost", &options).await,
        false => WebSocket::accept(line, &options).await,
    };
    let mut channel = match made {
        Ok(channel) => channel,
        Err(error) => {
            let kind = kind_of(&error).expect("a kind of ours");
            if !input.is_client && kind == ErrorKind::WebSocketHandshake {
                assert!(written.lock().unwrap().starts_with(b"HTTP/1.1 4"), "it is answered: {error}");
            }
            assert!(!error.to_string().contains(|c: char| c.is_control()), "{error}");
            return (Some(kind), None, Vec::new());
        }
    };
    assert!(channel.path().starts_with('/') || input.any_path);
    assert!(channel.protocol().is_none_or(|protocol| protocol == "binary"));
    let mut rest = Vec::new();
    let read = channel.read_to_end(&mut rest).await;
    (None, Some(read.err().map(|error| kind_of(&error).expect("a kind of ours"))), rest)
}

fuzz_target!(|input: Input| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        let whole = run(&input, usize::MAX).await;
        let cut = run(&input, usize::from(input.step).max(1)).await;
        // Two faults at once may be told by the one that is seen first.
        match (&whole.0, &cut.0) {
            (None, None) => assert_eq!(whole, cut),
            (one, other) => assert_eq!(one.is_some(), other.is_some(), "{whole:?} or {cut:?}"),
        }
    });
});
