//! Peers that break the rules: cases W02 to W06.

use crate::support::{
    Got, KEY, Result, client, client_with, frame, options, read_frame, server, server_with, within,
};
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_channel::{ChannelExt, ErrorKind, WebSocketOptions, kind_of};

/// Writes `wire` to a server or client: how the read fails, and what the peer is told.
async fn fails(is_server: bool, wire: &[u8]) -> (io::Error, Got) {
    let (mut channel, mut raw) = if is_server { server().await } else { client().await };
    raw.write_all(wire).await.expect("there is room");
    let mut all = Vec::new();
    let error = within(channel.read_to_end(&mut all)).await.expect_err("the peer broke the rules");
    let again = within(channel.read_to_end(&mut all)).await.expect_err("and that stays so");
    assert_eq!(kind_of(&error), kind_of(&again));
    let write = within(channel.write_all(b"x")).await.expect_err("nothing can be written either");
    assert_eq!(kind_of(&write), Some(ErrorKind::WebSocketClosed), "{write}");
    let told = within(read_frame(&mut raw)).await.expect("a close frame");
    assert_eq!((told.first, told.is_masked), (0x88, !is_server));
    assert!(within(read_frame(&mut raw)).await.is_none(), "it ends there");
    drop(raw);
    within(channel.close()).await.expect("it can be closed");
    (error, told)
}

#[tokio::test]
async fn bad_frames_are_refused_with_their_code() {
    use ErrorKind::{Limit, WebSocketProtocol as Protocol};
    let masked = |first, payload: &[u8]| frame(first, payload, Some(KEY));
    let mut many_empty = masked(0x02, b"");
    (0..2000).for_each(|_| many_empty.extend(masked(0x00, b"")));
    let huge = |len: u64, second: u8| [&[0x82, second][..], &len.to_be_bytes(), &KEY].concat();
    let cases: Vec<(&str, Vec<u8>, u16, ErrorKind)> = vec![
        ("reserved bit 1", masked(0xC2, b"x"), 1002, Protocol),
        ("reserved bit 2", masked(0xA2, b"x"), 1002, Protocol),
        ("reserved bit 3", masked(0x92, b"x"), 1002, Protocol),
        ("reserved type 3", masked(0x83, b"x"), 1002, Protocol),
        ("reserved type 7", masked(0x87, b"x"), 1002, Protocol),
        ("reserved type 11", masked(0x8B, b""), 1002, Protocol),
        ("reserved type 15", masked(0x8F, b""), 1002, Protocol),
        ("text", masked(0x81, b"text"), 1003, Protocol),
        ("W02: 2^63", huge(1 << 63, 0xFF), 1002, Protocol),
        ("W02: 2^64 - 1", huge(u64::MAX, 0xFF), 1002, Protocol),
        ("W02: 2^63 - 1", huge((1 << 63) - 1, 0xFF), 1009, Limit),
        ("length 125 in 16 bits", [&[0x82, 0xFE, 0, 125][..], &KEY].concat(), 1002, Protocol),
        ("length 65535 in 64 bits", huge(65535, 0xFF), 1002, Protocol),
        ("W03: message of 33 MiB + 1", huge((33 << 20) + 1, 0xFF), 1009, Limit),
        ("W03: endless empty fragments", many_empty, 1008, Limit),
        ("W04: unmasked", frame(0x82, b"x", None), 1002, Protocol),
        ("W04: unmasked ping", frame(0x89, b"", None), 1002, Protocol),
        ("W05: ping of 126", masked(0x89, &[0; 126]), 1002, Protocol),
        ("W05: pong of 65536", masked(0x8A, &[0; 65536]), 1002, Protocol),
        ("W05: close of 126", masked(0x88, &[3; 126]), 1002, Protocol),
        ("W05: ping in fragments", masked(0x09, b"x"), 1002, Protocol),
        ("continuation of nothing", masked(0x80, b"x"), 1002, Protocol),
        ("message in a message", [masked(0x02, b"x"), masked(0x82, b"y")].concat(), 1002, Protocol),
        ("close of one byte", masked(0x88, b"x"), 1002, Protocol),
        ("close with 999", masked(0x88, &999_u16.to_be_bytes()), 1002, Protocol),
        ("close with 1005", masked(0x88, &1005_u16.to_be_bytes()), 1002, Protocol),
        ("close with 1006", masked(0x88, &1006_u16.to_be_bytes()), 1002, Protocol),
        ("close with 2999", masked(0x88, &2999_u16.to_be_bytes()), 1002, Protocol),
        ("close with a bad reason", masked(0x88, b"\x03\xE8\xFF\xFE"), 1007, Protocol),
    ];
    for (name, wire, code, kind) in cases {
        let (error, told) = fails(true, &wire).await;
        assert_eq!(told.payload[..2], code.to_be_bytes(), "{name}: {told:?}");
        assert_eq!(kind_of(&error), Some(kind), "{name}: {error}");
        assert!(error.to_string().contains("websocket channel"), "{name}: {error}");
    }
    // Case W04 from the other side.
    let (error, told) = fails(false, &masked(0x82, b"x")).await;
    assert_eq!((&told.payload[..2], kind_of(&error)), (&b"\x03\xEA"[..], Some(Protocol)));
}

#[tokio::test]
async fn what_came_before_is_delivered_first() -> Result {
    let (mut server, mut raw) = server().await;
    raw.write_all(&[frame(0x82, b"good", Some(KEY)), frame(0x81, b"bad", Some(KEY))].concat()).await?;
    let mut got = [0; 100];
    assert_eq!(within(server.read(&mut got)).await?, 4);
    assert_eq!(&got[..4], b"good");
    let error = within(server.read(&mut got)).await.expect_err("text");
    assert_eq!(kind_of(&error), Some(ErrorKind::WebSocketProtocol));
    Ok(())
}

/// Case W03: fragments with a byte each, until the message is too long.
#[tokio::test]
async fn endless_fragments_end_at_the_limit() -> Result {
    let options = WebSocketOptions { message_max: 10_000, ..options() };
    let (mut server, mut raw) = server_with(&options, 1 << 16).await;
    let sending = async {
        raw.write_all(&frame(0x02, b"x", Some(KEY))).await?;
        for _ in 0..200_000 {
            raw.write_all(&frame(0x00, b"x", Some(KEY))).await?;
        }
        io::Result::Ok(raw)
    };
    let reading = async {
        let mut all = Vec::new();
        let error = server.read_to_end(&mut all).await.expect_err("too long");
        (all, error)
    };
    let (all, error) = within(async {
        tokio::select! {
            read = reading => read,
            sent = sending => panic!("all of it was taken: {:?}", sent.map(|_| ())),
        }
    })
    .await;
    assert_eq!(all.len(), 10_000);
    assert_eq!(kind_of(&error), Some(ErrorKind::Limit));
    Ok(())
}

/// Limits are on what a frame announces: nothing of it is waited for, or held in memory.
#[tokio::test]
async fn frames_have_a_limit_of_their_own() {
    let options = WebSocketOptions { frame_max: 1000, ..options() };
    let (mut server, mut raw) = server_with(&options, 1 << 16).await;
    raw.write_all(&frame(0x82, &[0; 1001], Some(KEY))[..8]).await.expect("there is room");
    let error = within(server.read_u8()).await.expect_err("too long");
    assert_eq!(kind_of(&error), Some(ErrorKind::Limit), "{error}");
}

/// Case W05: a peer that sends pings and takes no pong.
#[tokio::test]
async fn a_ping_flood_costs_no_memory() -> Result {
    const PINGS: u32 = 200_000;
    let (mut server, mut raw) = server_with(&options(), 4096).await;
    // The server reads all the time; nothing but pings comes.
    let flood = async {
        for number in 0..PINGS {
            raw.write_all(&frame(0x89, &number.to_be_bytes(), Some(KEY))).await?;
        }
        raw.write_all(&frame(0x82, b"x", Some(KEY))).await?;
        io::Result::Ok(raw)
    };
    let mut byte = [0];
    let (read, flooded) = within(async { tokio::join!(server.read_all(&mut byte), flood) }).await;
    read?;
    let mut raw = flooded?;
    // Only as many were answered as the line holds, and the last one.
    let mut last = 0;
    let mut count = 0;
    let collect = async {
        while last != PINGS - 1 {
            let pong = read_frame(&mut raw).await.expect("a pong");
            assert_eq!(pong.first, 0x8A);
            let number = u32::from_be_bytes(pong.payload.try_into().expect("a number"));
            assert!(count == 0 || number > last, "pongs come in order");
            last = number;
            count += 1;
        }
        io::Result::Ok(())
    };
    let (collected, flushed) = within(async { tokio::join!(collect, server.flush()) }).await;
    collected?;
    flushed?;
    assert!(count < 4096 / 6 + 10, "{count} pongs were kept");
    Ok(())
}

/// Messages without a byte, and pongs that nobody asked for: what comes behind them is found, and meanwhile other tasks of the
/// same thread have their turns, also when all of it is there at once.
#[tokio::test]
async fn floods_of_nothing_starve_nobody() -> Result {
    const FRAMES: usize = 1_000_000;
    for (is_server, first) in [(true, 0x82), (true, 0x8A), (false, 0x82), (false, 0x8A)] {
        let key = is_server.then_some(KEY);
        let mut flood = frame(first, b"", key).repeat(FRAMES);
        flood.extend(frame(0x82, b"x", key));
        let room = flood.len();
        let (mut channel, mut raw) =
            if is_server { server_with(&options(), room).await } else { client_with(&options(), room).await };
        raw.write_all(&flood).await?;
        let turns = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        let counting = turns.clone();
        let other = tokio::spawn(async move {
            loop {
                counting.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        });
        let mut byte = [0];
        within(channel.read_all(&mut byte)).await?;
        other.abort();
        assert_eq!(byte, *b"x");
        let turns = turns.load(std::sync::atomic::Ordering::Relaxed);
        assert!(turns >= 4, "{turns} turns of another task beside {FRAMES} frames of type {first:#x}");
    }
    Ok(())
}

/// A peer that says all in single bytes, and a violation with them, is found out at the byte that shows it.
#[tokio::test]
async fn violations_are_found_by_their_first_byte() {
    for wire in [&[0x83][..], &[0xC2], &[0x09], &[0x82, 0x05], &[0x89, 0xFE], &[0x82, 0xFF, 0x80]] {
        let (mut server, mut raw) = server().await;
        for byte in wire {
            raw.write_all(&[*byte]).await.expect("there is room");
        }
        within(server.read_u8()).await.expect_err("a violation, though the frame is not complete");
    }
}
