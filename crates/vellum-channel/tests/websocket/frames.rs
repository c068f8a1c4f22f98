//! Frames of every length class, in both directions.

use crate::support::{
    Got, KEY, Result, client, client_with, frame, options, pattern, read_frame, server, server_with, within,
};
use std::io::{IoSlice, IoSliceMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use vellum_channel::{ChannelExt, Stream, WebSocket, WebSocketOptions};

const LENGTHS: [usize; 10] = [0, 1, 2, 125, 126, 127, 65535, 65536, 65537, 1 << 20];

/// Sends `wire` in parts of `step` bytes, and reads `expected` in parts of `room`.
async fn receives(
    channel: &mut WebSocket<Stream<DuplexStream>>,
    raw: &mut DuplexStream,
    wire: &[u8],
    step: usize,
    expected: &[u8],
    room: usize,
) {
    let sending = async {
        for part in wire.chunks(step) {
            raw.write_all(part).await.expect("taken");
            if step < 100 {
                tokio::task::yield_now().await;
            }
        }
    };
    let receiving = async {
        let mut got = vec![0; expected.len()];
        for part in got.chunks_mut(room) {
            channel.read_all(part).await.expect("payload");
        }
        assert!(got == expected, "the payload differs");
    };
    within(async { tokio::join!(sending, receiving) }).await;
}

#[tokio::test]
async fn every_length_class_is_read() {
    for (is_server, key) in [(true, Some(KEY)), (false, None)] {
        let (mut channel, mut raw) = if is_server { server().await } else { client().await };
        for len in LENGTHS {
            let payload = pattern(len);
            let mut wire = frame(0x82, &payload, key);
            // Something behind it, so that empty messages can be seen.
            wire.extend(frame(0x82, b"!", key));
            let expected = [&payload[..], b"!"].concat();
            let step = if len < 1000 { 1 } else { 4099 };
            for (step, room) in [(usize::MAX, usize::MAX), (step, 1 << 20), (usize::MAX, 7001)] {
                receives(&mut channel, &mut raw, &wire, step, &expected, room).await;
            }
        }
    }
}

#[tokio::test]
async fn fragments_with_control_frames_between_them() {
    for (is_server, key) in [(true, Some(KEY)), (false, None)] {
        let (mut channel, mut raw) = if is_server { server().await } else { client().await };
        for len in LENGTHS {
            let payload = pattern(len);
            let parts: Vec<_> = payload.chunks((len / 5).max(1)).collect();
            let mut wire = frame(0x02, b"", key);
            let mut pings = 0_u8;
            for part in &parts {
                wire.extend(frame(0x00, part, key));
                wire.extend(frame(0x89, &[pings], key));
                wire.extend(frame(0x8A, b"unasked", key));
                pings += 1;
            }
            wire.extend(frame(0x80, b"!", key));
            let expected = [&payload[..], b"!"].concat();
            for step in [usize::MAX, if len < 1000 { 1 } else { 3001 }] {
                receives(&mut channel, &mut raw, &wire, step, &expected, 1 << 20).await;
                if pings == 0 {
                    continue;
                }
                // The last ping is answered; those before it may be.
                loop {
                    let pong = within(read_frame(&mut raw)).await.expect("a pong");
                    assert_eq!((pong.first, pong.is_masked, pong.payload.len()), (0x8A, !is_server, 1));
                    if pong.payload == [pings - 1] {
                        break;
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn every_length_class_is_written() -> Result {
    for is_server in [true, false] {
        // A line with little room has the frame written in parts.
        for room in [1 << 22, 1024] {
            let options = WebSocketOptions { write_max: 1 << 21, ..options() };
            let (mut channel, mut raw) = match is_server {
                true => server_with(&options, room).await,
                false => client_with(&options, room).await,
            };
            for len in LENGTHS.into_iter().filter(|len| *len > 0) {
                let payload = pattern(len);
                let writing = async {
                    channel.write_all(&payload).await?;
                    channel.flush().await
                };
                let (written, got) = within(async { tokio::join!(writing, read_frame(&mut raw)) }).await;
                written?;
                let got = got.expect("a frame");
                assert_eq!((got.first, got.is_masked), (0x82, !is_server));
                assert!(got.payload == payload, "{len} bytes arrive as they were");
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn headers_are_exact() -> Result {
    let (mut server, mut raw) = server().await;
    for (len, header) in [
        (1, &[0x82, 1][..]),
        (125, &[0x82, 125]),
        (126, &[0x82, 126, 0, 126]),
        (65535, &[0x82, 126, 0xFF, 0xFF]),
        (65536, &[0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
    ] {
        let payload = pattern(len);
        within(server.write_all(&payload)).await?;
        let mut wire = vec![0; header.len() + len];
        within(raw.read_exact(&mut wire)).await?;
        assert_eq!(&wire[..header.len()], header);
        assert!(wire[header.len()..] == payload);
    }
    Ok(())
}

#[tokio::test]
async fn slices_become_one_message_and_large_writes_several() -> Result {
    let (mut server, mut raw) = server().await;
    let parts: Vec<Vec<u8>> = (0..250_usize).map(|at| vec![at as u8; at * 3]).collect();
    let slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let all = parts.concat();
    let sent = within(server.writev(&slices)).await?;
    assert!(sent >= 16 << 10, "{sent}");
    assert_eq!(within(read_frame(&mut raw)).await.expect("a frame").payload, &all[..sent]);
    let short = within(server.writev(&slices[..20])).await?;
    let got = within(read_frame(&mut raw)).await.expect("a frame");
    assert_eq!(got, Got { first: 0x82, is_masked: false, payload: parts[..20].concat() });
    assert_eq!(short, got.payload.len());

    let large = pattern(600_000);
    within(server.write_all(&large)).await?;
    let mut got = Vec::new();
    for len in [262_144, 262_144, 75_712] {
        let frame = within(read_frame(&mut raw)).await.expect("a frame");
        assert_eq!(frame.payload.len(), len);
        got.extend(frame.payload);
    }
    assert!(got == large);
    assert_eq!(within(server.writev(&[])).await?, 0, "an empty write is no message");
    Ok(())
}

#[tokio::test]
async fn reads_fill_slices_across_messages() -> Result {
    let (mut server, mut raw) = server().await;
    let big = pattern(50_000);
    let mut wire = frame(0x82, b"ab", Some(KEY));
    wire.extend(frame(0x82, b"cde", Some([1, 2, 3, 4])));
    wire.extend(frame(0x82, &big, Some([5, 6, 7, 8])));
    wire.extend(frame(0x82, b"end", Some(KEY)));
    raw.write_all(&wire).await?;
    let (mut one, mut two, mut three) = ([0; 1], [0; 3], vec![0; 50_004]);
    let mut bufs = [
        IoSliceMut::new(&mut one),
        IoSliceMut::new(&mut []),
        IoSliceMut::new(&mut two),
        IoSliceMut::new(&mut three),
    ];
    within(server.readv_all(&mut bufs)).await?;
    assert_eq!((&one, &two), (b"a", b"bcd"));
    assert_eq!(three[0], b'e');
    assert!(three[1..50_001] == big && &three[50_001..] == b"end");
    assert_eq!(within(server.readv(&mut [])).await?, 0);
    Ok(())
}

/// The scenario of QEMU's test of its WebSocket server.
#[tokio::test]
async fn ping_binary_and_close_byte_by_byte() -> Result {
    let (mut server, mut raw) = server().await;
    raw.write_all(&frame(0x89, b"hello", Some(KEY))).await?;
    raw.write_all(&frame(0x82, b"world", Some(KEY))).await?;
    let mut got = [0; 5];
    within(server.read_all(&mut got)).await?;
    assert_eq!(&got, b"world");
    let mut pong = [0; 7];
    within(raw.read_exact(&mut pong)).await?;
    assert_eq!(&pong, b"\x8A\x05hello");

    raw.write_all(&frame(0x88, b"\x03\xE9bye", Some(KEY))).await?;
    assert!(!within(server.read_all_eof(&mut got)).await?);
    let mut close = [0; 24];
    within(raw.read_exact(&mut close)).await?;
    assert_eq!(&close, b"\x88\x16\x03\xE9peer requested close");
    let end = within(raw.read(&mut got)).await?;
    assert_eq!(end, 0, "the server ends the connection");
    assert_eq!(
        server.peer_close().map(|close| (close.code, close.reason.as_str())),
        Some((Some(1001), "bye"))
    );
    Ok(())
}
