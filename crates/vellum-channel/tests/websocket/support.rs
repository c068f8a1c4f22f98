//! Both kinds of ends with raw bytes at the other side.

use std::future::Future;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use vellum_channel::{Stream, WebSocket, WebSocketOptions};

pub type Inner = Stream<DuplexStream>;
pub type Result = io::Result<()>;

/// Nothing in these tests takes long: what does, hangs.
pub async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), work).await.expect("it should not hang")
}

pub const REQUEST: &str = "GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\
    Sec-WebSocket-Protocol: binary\r\n\r\n";

/// Options with a close that does not wait long.
pub fn options() -> WebSocketOptions {
    WebSocketOptions { close_timeout: Duration::from_millis(300), ..WebSocketOptions::default() }
}

/// Reads a head of HTTP, byte by byte: what follows stays.
pub async fn read_head(raw: &mut DuplexStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(raw.read_u8().await.expect("a head"));
    }
    String::from_utf8(head).expect("text")
}

/// A server, and a raw client behind the handshake. `room` is what the line between them holds.
pub async fn server_with(options: &WebSocketOptions, room: usize) -> (WebSocket<Inner>, DuplexStream) {
    let (near, mut raw) = duplex(room.max(1024));
    raw.write_all(REQUEST.as_bytes()).await.expect("there is room");
    let accepting = WebSocket::accept(Stream::new(near), options);
    let (server, answer) = within(async { tokio::join!(accepting, read_head(&mut raw)) }).await;
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    (server.expect("a good handshake"), raw)
}

pub async fn server() -> (WebSocket<Inner>, DuplexStream) {
    server_with(&options(), 1 << 20).await
}

/// A client, and a raw server behind the handshake.
pub async fn client_with(options: &WebSocketOptions, room: usize) -> (WebSocket<Inner>, DuplexStream) {
    let (near, far) = duplex(room.max(1024));
    let (client, server) = within(async {
        tokio::join!(
            WebSocket::connect(Stream::new(near), "localhost", options),
            WebSocket::accept(Stream::new(far), options),
        )
    })
    .await;
    let (stream, unused) = server.expect("a good handshake").into_inner();
    let (raw, ahead) = stream.into_inner().expect("open");
    assert!(unused.is_empty() && ahead.is_empty());
    (client.expect("a good handshake"), raw)
}

pub async fn client() -> (WebSocket<Inner>, DuplexStream) {
    client_with(&options(), 1 << 20).await
}

/// Both ends.
pub async fn pair_with(options: &WebSocketOptions, room: usize) -> (WebSocket<Inner>, WebSocket<Inner>) {
    let (near, far) = duplex(room);
    let (client, server) = within(async {
        tokio::join!(
            WebSocket::connect(Stream::new(near), "localhost", options),
            WebSocket::accept(Stream::new(far), options),
        )
    })
    .await;
    (client.expect("a good handshake"), server.expect("a good handshake"))
}

pub const KEY: [u8; 4] = [0x37, 0xFA, 0x21, 0x3D];

/// A frame, written by other code than the crate's: `first` is flags and type.
pub fn frame(first: u8, payload: &[u8], key: Option<[u8; 4]>) -> Vec<u8> {
    let mut out = vec![first];
    let masked = if key.is_some() { 0x80 } else { 0 };
    match payload.len() {
        len @ 0..126 => out.push(masked | len as u8),
        len @ 126..65536 => {
            out.push(masked | 126);
            out.extend((len as u16).to_be_bytes());
        }
        len => {
            out.push(masked | 127);
            out.extend((len as u64).to_be_bytes());
        }
    }
    match key {
        Some(key) => {
            out.extend(key);
            out.extend(payload.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key));
        }
        None => out.extend(payload),
    }
    out
}

/// One frame as it came: flags and type, whether it was masked, and the payload.
#[derive(Debug, PartialEq, Eq)]
pub struct Got {
    pub first: u8,
    pub is_masked: bool,
    pub payload: Vec<u8>,
}

/// Reads a frame; `None` at the end of the stream.
pub async fn read_frame(raw: &mut DuplexStream) -> Option<Got> {
    let first = raw.read_u8().await.ok()?;
    let second = raw.read_u8().await.expect("a second byte");
    let len = match second & 0x7F {
        126 => u64::from(raw.read_u16().await.expect("a length")),
        127 => raw.read_u64().await.expect("a length"),
        short => u64::from(short),
    };
    let is_masked = second & 0x80 != 0;
    let mut key = [0; 4];
    if is_masked {
        raw.read_exact(&mut key).await.expect("a key");
    }
    let mut payload = vec![0; len as usize];
    raw.read_exact(&mut payload).await.expect("the payload");
    payload.iter_mut().zip(key.iter().cycle()).for_each(|(byte, key)| *byte ^= key);
    Some(Got { first, is_masked, payload })
}

/// Bytes that differ from place to place.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(31) >> 3) as u8 ^ at as u8).collect()
}
