//! WebSocket frames from a hostile peer, against a second reading of RFC 6455 that sees all bytes at once: the same
//! payload, the same end, however the bytes are cut and whatever room the reader has.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use vellum_channel::{ErrorKind, Stream, WebSocket, WebSocketOptions, kind_of};

const FRAME_MAX: u64 = 20_000;
const MESSAGE_MAX: u64 = 30_000;

#[derive(Arbitrary, Debug)]
struct Input {
    is_client: bool,
    step: u16,
    room: u16,
    pieces: Vec<Piece>,
}

#[derive(Arbitrary, Debug)]
enum Piece {
    /// A frame as it should be but for its first byte.
    Frame {
        first: u8,
        len: u16,
        key: [u8; 4],
    },
    /// A good data frame.
    Data {
        is_final: bool,
        is_continuation: bool,
        len: u16,
        key: [u8; 4],
    },
    Control {
        kind: u8,
        payload: Vec<u8>,
        key: [u8; 4],
    },
    /// Empty fragments.
    Empty {
        count: u16,
        key: [u8; 4],
    },
    Raw(Vec<u8>),
}

fn put(out: &mut Vec<u8>, first: u8, payload: &[u8], key: Option<[u8; 4]>) {
    let masked = if key.is_some() { 0x80 } else { 0 };
    out.push(first);
    match payload.len() {
        len @ 0..126 => out.push(masked | len as u8),
        len => {
            out.push(masked | 126);
            out.extend((len as u16).to_be_bytes());
        }
    }
    let key = key.inspect(|key| out.extend(key)).unwrap_or_default();
    out.extend(payload.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key));
}

impl Input {
    fn wire(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mask = |key: &[u8; 4]| (!self.is_client).then_some(*key);
        for piece in self.pieces.iter().take(64) {
            match piece {
                Piece::Frame { first, len, key } => {
                    put(&mut out, *first, &vec![first ^ 0x55; usize::from(*len)], mask(key));
                }
                Piece::Data { is_final, is_continuation, len, key } => {
                    let first = if *is_final { 0x80 } else { 0 } | if *is_continuation { 0 } else { 2 };
                    let payload: Vec<u8> = (0..*len).map(|at| (at >> 3) as u8 ^ key[1]).collect();
                    put(&mut out, first, &payload, mask(key));
                }
                Piece::Control { kind, payload, key } => put(&mut out, 0x88 | kind % 3, payload, mask(key)),
                Piece::Empty { count, key } => {
                    (0..count % 1100).for_each(|_| put(&mut out, 0, b"", mask(key)));
                }
                Piece::Raw(bytes) => out.extend(bytes),
            }
        }
        out
    }
}

/// How a stream of frames ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Normal,
    Error(ErrorKind),
}

/// The payload and the end of these frames.
fn reference(wire: &[u8], must_be_masked: bool) -> (Vec<u8>, End) {
    let mut payload = Vec::new();
    let mut rest = wire;
    let (mut is_open, mut message, mut empty) = (false, 0_u64, 0);
    let protocol = End::Error(ErrorKind::WebSocketProtocol);
    let limit = End::Error(ErrorKind::Limit);
    let cut = End::Error(ErrorKind::UnexpectedEof);
    loop {
        let [first, after @ ..] = rest else { return (payload, cut) };
        let (is_final, opcode) = (first & 0x80 != 0, first & 15);
        if first & 0x70 != 0 || !matches!(opcode, 0..=2 | 8..=10) || (opcode >= 8 && !is_final) {
            return (payload, protocol);
        }
        let [second, after @ ..] = after else { return (payload, cut) };
        if (second & 0x80 != 0) != must_be_masked || (opcode >= 8 && second & 0x7F > 125) {
            return (payload, protocol);
        }
        let (size, least) = match second & 0x7F {
            126 => (2, 126),
            127 => (8, 65536),
            _ => (0, 0),
        };
        if size == 8 && after.first().is_some_and(|byte| *byte >= 0x80) {
            return (payload, protocol);
        }
        if after.len() < size {
            return (payload, cut);
        }
        let (bytes, after) = after.split_at(size);
        let len = match size {
            0 => u64::from(second & 0x7F),
            _ => bytes.iter().fold(0, |len, byte| len << 8 | u64::from(*byte)),
        };
        if len < least {
            return (payload, protocol);
        }
        let key_len = if must_be_masked { 4 } else { 0 };
        if after.len() < key_len {
            return (payload, cut);
        }
        let (key, after) = after.split_at(key_len);
        let there = after.len().min(usize::try_from(len).unwrap_or(usize::MAX));
        let unmask = |bytes: &[u8]| -> Vec<u8> {
            bytes.iter().enumerate().map(|(at, byte)| byte ^ key.get(at % 4).copied().unwrap_or(0)).collect()
        };
        let body = unmask(&after[..there]);
        if opcode < 8 {
            if opcode == 1 || (opcode == 2) == is_open {
                return (payload, protocol);
            }
            if !is_open {
                (message, empty) = (0, 0);
            }
            message = message.saturating_add(len);
            if len > FRAME_MAX || message > MESSAGE_MAX {
                return (payload, limit);
            }
            empty += u32::from(len == 0 && !is_final);
            if empty > 1024 {
                return (payload, limit);
            }
            is_open = !is_final;
            payload.extend(&body);
        }
        if (there as u64) < len {
            return (payload, cut);
        }
        if opcode == 8 {
            let end = match &body[..] {
                [] => End::Normal,
                [_] => protocol,
                [high, low, reason @ ..] => match u16::from_be_bytes([*high, *low]) {
                    1000 | 1001 if std::str::from_utf8(reason).is_ok() => End::Normal,
                    1000..=1003 | 1007..=1014 | 3000..=4999 if std::str::from_utf8(reason).is_ok() => {
                        End::Error(ErrorKind::WebSocketClosed)
                    }
                    _ => protocol,
                },
            };
            return (payload, end);
        }
        rest = &after[there..];
    }
}

async fn run(input: Input) {
    let options =
        WebSocketOptions { message_max: MESSAGE_MAX, frame_max: FRAME_MAX, ..WebSocketOptions::default() };
    let (near, far) = duplex(1 << 16);
    let (client, server) = tokio::join!(
        WebSocket::connect(Stream::new(near), "localhost", &options),
        WebSocket::accept(Stream::new(far), &options),
    );
    let (client, server) = (client.expect("good"), server.expect("good"));
    let (mut channel, peer) = if input.is_client { (client, server) } else { (server, client) };
    let (mut raw, _) = peer.into_inner().0.into_inner().expect("open");

    let wire = input.wire();
    let step = usize::from(input.step).max(1 + wire.len() / 64);
    let feeding = async move {
        let (mut taken, mut giving) = tokio::io::split(&mut raw);
        let giving = async {
            for part in wire.chunks(step) {
                // It may have been told to go away.
                if giving.write_all(part).await.is_err() {
                    break;
                }
            }
            // A peer that is gone.
            let _gone = giving.shutdown().await;
            wire
        };
        let mut answers = Vec::new();
        let (wire, _) = tokio::join!(giving, taken.read_to_end(&mut answers));
        wire
    };
    let reading = async move {
        let mut room = vec![0; usize::from(input.room).max(1)];
        let mut all = Vec::new();
        let end = loop {
            match channel.read(&mut room).await {
                Ok(0) => break End::Normal,
                Ok(count) => all.extend_from_slice(&room[..count]),
                Err(error) => break End::Error(kind_of(&error).expect("a kind of ours")),
            }
        };
        drop(channel);
        (all, end)
    };
    let (wire, (payload, end)) = tokio::join!(feeding, reading);
    let expected = reference(&wire, !input.is_client);
    assert_eq!(end, expected.1);
    assert!(payload == expected.0, "{} bytes and not {}", payload.len(), expected.0.len());
}

fuzz_target!(|input: Input| {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(run(input));
});
