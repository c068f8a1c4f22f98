//! How WebSockets end.

use crate::support::{
    KEY, Result, client, frame, options, pair_with, read_frame, server, server_with, within,
};
use std::io;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_channel::{ChannelExt, ErrorKind, ReadFlags, kind_of};

#[tokio::test]
async fn normal_codes_are_the_end_of_the_stream() -> Result {
    for (close, echo) in
        [(&b""[..], 1000_u16), (b"\x03\xE8", 1000), (b"\x03\xE8bye", 1000), (b"\x03\xE9going", 1001)]
    {
        let (mut server, mut raw) = server().await;
        raw.write_all(&[frame(0x82, b"data", Some(KEY)), frame(0x88, close, Some(KEY))].concat()).await?;
        // What follows a close frame counts for nothing.
        raw.write_all(&frame(0x82, b"late", Some(KEY))).await?;
        let mut all = Vec::new();
        within(server.read_to_end(&mut all)).await?;
        assert_eq!(all, b"data");
        assert_eq!(within(server.read_to_end(&mut all)).await?, 0, "the end stays the end");
        let told = within(read_frame(&mut raw)).await.expect("a close frame");
        assert_eq!(told.payload[..2], echo.to_be_bytes());
        let error = within(server.write_all(b"x")).await.expect_err("closed");
        assert_eq!(kind_of(&error), Some(ErrorKind::WebSocketClosed), "{error}");
        within(server.close()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn other_codes_are_errors() -> Result {
    let (mut client, mut raw) = client().await;
    let reason = format!("\u{1b}[31m{}", "no ".repeat(35));
    raw.write_all(&frame(0x88, &[&1011_u16.to_be_bytes()[..], reason.as_bytes()].concat(), None)).await?;
    let error = within(client.read_u8()).await.expect_err("an error of the server");
    assert_eq!(kind_of(&error), Some(ErrorKind::WebSocketClosed), "{error}");
    let message = error.to_string();
    assert!(
        message.contains("1011") && message.contains("no no") && !message.contains('\u{1b}'),
        "{message}"
    );
    let told = within(read_frame(&mut raw)).await.expect("a close frame");
    assert_eq!(told.payload[..2], 1011_u16.to_be_bytes());
    let close = client.peer_close().expect("closed");
    assert_eq!((close.code, &close.reason), (Some(1011), &reason));
    Ok(())
}

#[tokio::test]
async fn an_end_without_goodbye_is_an_error_unless_relaxed() -> Result {
    // Between messages, in a header, in a payload.
    for cut in [0, 1, 7, 9] {
        let (mut server, mut raw) = server().await;
        raw.write_all(&frame(0x82, b"data", Some(KEY))[..cut]).await?;
        drop(raw);
        let mut all = Vec::new();
        let error = within(server.read_to_end(&mut all)).await.expect_err("it may have been cut");
        assert_eq!(kind_of(&error), Some(ErrorKind::UnexpectedEof), "{error}");
        assert_eq!(all, &b"data"[..cut.saturating_sub(6)]);
        let mut buf = [0; 4];
        let mut bufs = [io::IoSliceMut::new(&mut buf)];
        assert_eq!(within(server.readv_full(&mut bufs, None, ReadFlags::RELAXED_EOF)).await?, 0);
        within(server.close()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn shutdown_sends_the_close_frame_and_reading_goes_on() -> Result {
    let (mut client, mut server) = pair_with(&options(), 1 << 16).await;
    within(server.write_all(b"on its way")).await?;
    within(client.write_all(b"last words")).await?;
    within(client.shutdown()).await?;
    let error = within(client.write_all(b"more")).await.expect_err("writing has ended");
    assert_eq!(kind_of(&error), Some(ErrorKind::WebSocketClosed), "{error}");
    let mut all = String::new();
    within(server.read_to_string(&mut all)).await?;
    assert_eq!(all, "last words");
    assert_eq!(server.peer_close().and_then(|close| close.code), Some(1000));
    all.clear();
    within(client.read_to_string(&mut all)).await?;
    assert_eq!(all, "on its way");
    within(client.shutdown()).await?;
    within(client.close()).await?;
    within(server.close()).await?;
    Ok(())
}

#[tokio::test]
async fn close_delivers_all_and_waits_for_the_answer() -> Result {
    let (mut client, mut server) = pair_with(&options(), 1000).await;
    let data = vec![7; 100_000];
    let closing = async {
        client.write_all(&data).await?;
        client.close().await?;
        // A second one tells the same, and operations that it is closed.
        client.close().await?;
        let error = client.read_u8().await.expect_err("closed");
        assert_eq!(kind_of(&error), Some(ErrorKind::Closed));
        let error = client.write_all(b"x").await.expect_err("closed");
        assert_eq!(kind_of(&error), Some(ErrorKind::Closed));
        let error = client.flush().await.expect_err("closed");
        assert_eq!(kind_of(&error), Some(ErrorKind::Closed));
        io::Result::Ok(())
    };
    let reading = async {
        let mut all = Vec::new();
        server.read_to_end(&mut all).await?;
        io::Result::Ok(all)
    };
    let (closed, read) = within(async { tokio::join!(closing, reading) }).await;
    closed?;
    assert!(read? == data);
    Ok(())
}

#[tokio::test]
async fn a_peer_that_never_answers_does_not_hold_up_a_close() -> Result {
    let (mut server, mut raw) = server().await;
    raw.write_all(&frame(0x82, b"unread data", Some(KEY))).await?;
    let started = Instant::now();
    within(server.close()).await?;
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(within(read_frame(&mut raw)).await.expect("a close frame").payload, b"\x03\xE8");

    // One that takes nothing: the close says that not all was delivered.
    let (mut server, raw) = server_with(&options(), 1024).await;
    within(server.write_all(&[1; 40_000])).await?;
    let error = within(server.close()).await.expect_err("not delivered");
    assert_eq!(kind_of(&error), Some(ErrorKind::Timeout), "{error}");
    drop(raw);

    // One that is gone already.
    let (mut server, raw) = server_with(&options(), 1024).await;
    drop(raw);
    within(server.close()).await?;
    Ok(())
}

#[tokio::test]
async fn a_status_code_of_ones_own() -> Result {
    let (mut client, mut server) = pair_with(&options(), 1 << 16).await;
    for bad in [0, 999, 1004, 1005, 1006, 1015, 2000, 5000] {
        assert_eq!(kind_of(&server.end_with(bad, "").expect_err("reserved")), Some(ErrorKind::Invalid));
    }
    server.end_with(4001, "machine stopped")?;
    let (closed, read) = within(async { tokio::join!(server.close(), client.read_u8()) }).await;
    closed?;
    let error = read.expect_err("an unusual code");
    assert!(error.to_string().contains("4001") && error.to_string().contains("machine stopped"), "{error}");
    Ok(())
}

#[tokio::test]
async fn both_closing_at_once() -> Result {
    let (mut client, mut server) = pair_with(&options(), 1 << 16).await;
    let (one, other) = within(async { tokio::join!(client.close(), server.close()) }).await;
    one?;
    other?;
    Ok(())
}
