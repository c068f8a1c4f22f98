//! Several tasks on one WebSocket, waiting, pinging, cancelling.

use crate::support::{
    KEY, REQUEST, Result, client, frame, options, pair_with, pattern, read_frame, server, server_with, within,
};
use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut};
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf, duplex};
use vellum_channel::{
    Channel, ChannelExt, ErrorKind, Features, Interest, Socket, Stream, Timeout, TimeoutOptions, WebSocket,
    WebSocketOptions, kind_of,
};

/// A reader that answers pings waits for the same direction of the inner channel as the writer: none may be forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reader_and_writer_wait_for_the_same_direction() -> Result {
    let (server, raw) = server_with(&options(), 1024).await;
    let (mut reader, mut writer) = tokio::io::split(server);
    let (mut from_server, mut to_server) = tokio::io::split(raw);
    let data = pattern(300_000);
    let expected = data.clone();
    let writing = tokio::spawn(async move {
        for part in data.chunks(1000) {
            writer.write_all(part).await?;
        }
        writer.flush().await
    });
    let reading = tokio::spawn(async move {
        let mut all = vec![0; 8000];
        reader.read_exact(&mut all).await?;
        io::Result::Ok((all, reader))
    });
    let pinging = tokio::spawn(async move {
        for _ in 0..2000 {
            to_server.write_all(&frame(0x89, b"are you there?", Some(KEY))).await?;
            to_server.write_all(&frame(0x82, b"data", Some(KEY))).await?;
        }
        io::Result::Ok(to_server)
    });
    let mut got = Vec::new();
    let mut pongs = 0;
    let taking = async {
        while got.len() < expected.len() {
            // Slowly, so that the line is full most of the time.
            if got.len() % 16_000 < 1000 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let mut header = [0; 2];
            from_server.read_exact(&mut header).await?;
            let len = match header[1] {
                126 => usize::from(from_server.read_u16().await?),
                short => usize::from(short),
            };
            let mut payload = vec![0; len];
            from_server.read_exact(&mut payload).await?;
            match header[0] {
                0x82 => got.extend(payload),
                0x8A => pongs += 1,
                other => panic!("a frame {other:#x}"),
            }
        }
        io::Result::Ok(())
    };
    within(taking).await?;
    let (read, _reader) = within(reading).await.expect("no panic")?;
    assert_eq!(read, b"data".repeat(2000));
    let _raw = within(pinging).await.expect("no panic")?;
    within(writing).await.expect("no panic")?;
    assert!(pongs > 0 && got == expected);
    Ok(())
}

#[tokio::test]
async fn pings_of_our_own() -> Result {
    let (mut client, mut server) = pair_with(&options(), 1 << 16).await;
    let answering = async {
        let mut byte = [0];
        server.read_all(&mut byte).await
    };
    let asking = async {
        let first = client.ping().await?;
        let second = client.ping().await?;
        assert!(first < Duration::from_secs(5) && second < Duration::from_secs(5));
        client.write_all(b"x").await
    };
    let (answered, asked) = within(async { tokio::join!(answering, asking) }).await;
    answered?;
    asked?;

    // Data in front of the answer have to be read first.
    within(server.write_all(b"first")).await?;
    let error = within(client.ping()).await.expect_err("data are in front");
    assert_eq!(kind_of(&error), Some(ErrorKind::Invalid), "{error}");
    // A `Pinger` does it while another task reads.
    let pinger = client.pinger();
    let reading = async {
        let mut got = Vec::new();
        client.read_to_end(&mut got).await?;
        io::Result::Ok(got)
    };
    let talking = async {
        let (one, other) = tokio::join!(pinger.ping(), pinger.ping());
        one?;
        other?;
        io::Result::Ok(())
    };
    let answering = async {
        let mut buf = [0; 16];
        server.read(&mut buf).await
    };
    within(async {
        tokio::select! {
            talked = talking => talked,
            read = reading => panic!("nothing ends the stream: {read:?}"),
            answered = answering => panic!("no data are sent: {answered:?}"),
        }
    })
    .await
}

#[tokio::test]
async fn pings_fail_when_the_websocket_ends() -> Result {
    let (mut client, raw) = client().await;
    let pinger = client.pinger();
    let waiting = tokio::spawn(async move { pinger.ping().await });
    drop(raw);
    within(client.read_u8()).await.expect_err("the peer is gone");
    let error = within(waiting).await.expect("no panic").expect_err("no answer comes");
    assert_eq!(kind_of(&error), Some(ErrorKind::WebSocketClosed), "{error}");
    let error = within(client.pinger().ping()).await.expect_err("no answer comes");
    assert_eq!(kind_of(&error), Some(ErrorKind::WebSocketClosed), "{error}");
    let dropped = client.pinger();
    drop(client);
    within(dropped.ping()).await.expect_err("no answer comes");
    Ok(())
}

#[tokio::test]
async fn a_silent_peer_is_found_out() -> Result {
    let options = WebSocketOptions { keep_alive: Some(Duration::from_millis(60)), ..options() };
    let (mut server, mut raw) = server_with(&options, 1 << 16).await;
    let started = Instant::now();
    let error = within(server.read_u8()).await.expect_err("nobody answers");
    assert_eq!(kind_of(&error), Some(ErrorKind::Timeout), "{error}");
    assert!(started.elapsed() >= Duration::from_millis(120));
    assert_eq!(within(read_frame(&mut raw)).await.expect("a ping").first, 0x89);

    // One that answers is left alone.
    let (mut client, mut server) = pair_with(&options, 1 << 16).await;
    let quiet = async { tokio::join!(client.read_u8(), server.read_u8()) };
    let broken = tokio::time::timeout(Duration::from_millis(600), quiet).await;
    assert!(broken.is_err(), "both wait on: {broken:?}");
    Ok(())
}

/// What a poll reported as written is delivered by later polls, also when its future is dropped.
#[tokio::test]
async fn what_was_reported_as_written_arrives() -> Result {
    for is_server in [true, false] {
        let (mut channel, mut raw) = match is_server {
            true => server_with(&options(), 1024).await,
            false => crate::support::client_with(&options(), 1024).await,
        };
        let data = pattern(1 << 20);
        let slices = [IoSlice::new(&data)];
        let mut sending = Box::pin(channel.writev_all(&slices));
        let mut written = 0;
        poll_fn(|cx| {
            assert!(sending.as_mut().poll(cx).is_pending());
            written = sending.transferred();
            Poll::Ready(())
        })
        .await;
        drop(sending);
        assert!(written > 0 && written <= (256 << 10) + (64 << 10), "{written} bytes are queued at most");
        let taking = async {
            let mut got = Vec::new();
            while got.len() < written {
                got.extend(read_frame(&mut raw).await.expect("a frame").payload);
            }
            got
        };
        let (flushed, got) = within(async { tokio::join!(channel.flush(), taking) }).await;
        flushed?;
        assert!(got == data[..written], "what was reported, and nothing else");
    }
    Ok(())
}

#[tokio::test]
async fn a_read_that_is_dropped_loses_nothing() -> Result {
    let (mut server, mut raw) = server().await;
    let data = pattern(30_000);
    let wire = frame(0x82, &data, Some(KEY));
    let mut got = vec![0; data.len()];
    let mut at = 0;
    for part in wire.chunks(1777) {
        raw.write_all(part).await?;
        let mut reading = Box::pin(server.read_all(&mut got[at..]));
        let read = poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx).is_ready())).await;
        at += reading.transferred();
        assert_eq!(read, at == data.len());
    }
    assert!(at == data.len() && got == data);
    Ok(())
}

/// In the middle of a frame the rest is on its way: a reader asks for it a few times, and then sleeps.
#[tokio::test]
async fn a_reader_that_misses_the_rest_of_a_frame_does_not_keep_a_processor_busy() -> Result {
    let (near, mut raw) = tokio::net::UnixStream::pair()?;
    raw.write_all(REQUEST.as_bytes()).await?;
    let socket = Socket::from_fd(near.into_std()?.into())?;
    let mut server = within(WebSocket::accept(socket, &options())).await?;
    let data = pattern(100_000);
    let wire = frame(0x82, &data, Some(KEY));
    let (first, rest) = wire.split_at(60_000);
    let mut got = vec![0; data.len()];
    let mut at = 0;
    for part in [first, rest] {
        raw.write_all(part).await?;
        let mut polls = 0;
        let reading = async {
            while at < data.len() {
                let mut room = ReadBuf::new(&mut got[at..]);
                poll_fn(|cx| {
                    polls += 1;
                    Pin::new(&mut server).poll_read(cx, &mut room)
                })
                .await?;
                at += room.filled().len();
            }
            io::Result::Ok(())
        };
        match tokio::time::timeout(Duration::from_millis(200), reading).await {
            Ok(read) => read?,
            Err(_) => assert!(at < data.len(), "it has all and waits"),
        }
        assert!(polls < 60, "{polls} polls");
    }
    assert!(at == data.len() && got == data);
    Ok(())
}

/// An error that a wait met is told by the read that follows it, not by a later one, whatever room that read has.
#[tokio::test]
async fn an_error_that_made_it_readable_is_told_at_once() -> Result {
    for room in [100, 10_000] {
        let (near, mut raw) = duplex(1 << 16);
        raw.write_all(REQUEST.as_bytes()).await?;
        let impatient = TimeoutOptions { read: Some(Duration::from_millis(50)), write: None };
        let inner = Timeout::new(Stream::new(near), impatient);
        let mut server = within(WebSocket::accept(inner, &options())).await?;
        // A frame begins, and its payload is late.
        let data = pattern(10_000);
        let wire = frame(0x82, &data, Some(KEY));
        let (header, payload) = wire.split_at(8);
        raw.write_all(header).await?;
        assert_eq!(within(server.ready(Interest::READ)).await?, Interest::READ);
        raw.write_all(payload).await?;
        let mut got = vec![0; 10_000];
        let late = within(server.read(&mut got[..room])).await.expect_err("that is why it was readable");
        assert_eq!(kind_of(&late), Some(ErrorKind::Timeout), "{late}");
        // Nothing is lost by it.
        within(server.read_all(&mut got)).await?;
        assert!(got == data);
    }
    Ok(())
}

#[tokio::test]
async fn readiness_follows_payload_not_bytes() -> Result {
    let (mut server, mut raw) = server_with(&options(), 1 << 16).await;
    async fn is_ready(channel: &mut impl Channel, interest: Interest) -> Interest {
        let found = tokio::time::timeout(Duration::from_millis(50), channel.ready(interest)).await;
        found.map_or(Interest::empty(), |found| found.expect("ready"))
    }
    assert_eq!(is_ready(&mut server, Interest::READ).await, Interest::empty());
    assert_eq!(is_ready(&mut server, Interest::READ | Interest::WRITE).await, Interest::WRITE);
    // A ping is not readable, but it is answered.
    raw.write_all(&frame(0x89, b"p", Some(KEY))).await?;
    raw.write_all(&frame(0x82, b"", Some(KEY))).await?;
    assert_eq!(is_ready(&mut server, Interest::READ).await, Interest::empty());
    assert_eq!(within(read_frame(&mut raw)).await.expect("a pong").first, 0x8A);
    // Payload is, until it is read.
    raw.write_all(&frame(0x82, b"abc", Some(KEY))).await?;
    assert_eq!(is_ready(&mut server, Interest::READ).await, Interest::READ);
    assert_eq!(is_ready(&mut server, Interest::READ).await, Interest::READ);
    assert!(server.features().contains(Features::PEEK));
    let mut two = [0; 2];
    assert_eq!(within(server.peek(&mut two)).await?, 2);
    assert_eq!(&two, b"ab");
    let mut three = [0; 3];
    within(server.read_all(&mut three)).await?;
    assert_eq!(&three, b"abc");
    assert_eq!(is_ready(&mut server, Interest::READ).await, Interest::empty());
    server.set_blocking(false);
    let again = server.readv(&mut [IoSliceMut::new(&mut three)]).await.expect_err("nothing there");
    assert_eq!(again.kind(), io::ErrorKind::WouldBlock);
    let again = server.peek(&mut three).await.expect_err("nothing there");
    assert_eq!(again.kind(), io::ErrorKind::WouldBlock);
    // A full queue takes nothing.
    let data = [1; 100_000];
    while server.writev(&[IoSlice::new(&data)]).await.is_ok() {}
    assert_eq!(is_ready(&mut server, Interest::WRITE).await, Interest::empty());
    let mut some = vec![0; 150_000];
    let (ready, _) =
        within(async { tokio::join!(server.ready(Interest::WRITE), raw.read_exact(&mut some)) }).await;
    assert_eq!(ready?, Interest::WRITE);
    // The end is readable, and stays so.
    drop(raw);
    assert_eq!(is_ready(&mut server, Interest::READ).await, Interest::READ);
    assert_eq!(is_ready(&mut server, Interest::READ).await, Interest::READ);
    Ok(())
}
