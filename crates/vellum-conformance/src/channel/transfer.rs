//! Bytes arrive, all of them, in order, however they are handed over.

use super::{End, Needs, Subject, case, chunks, not_yet, pattern, rooms, slices, soon};
use std::io::{IoSlice, IoSliceMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_channel::{Channel, ChannelExt, ErrorKind, Shared, kind_of};

pub(super) fn cases(subject: &Subject) {
    case(subject, Needs::NearToFar, "chunks in blocking mode", |near, far| chunks_arrive(near, far, true));
    case(subject, Needs::NearToFar, "chunks in non-blocking mode", |near, far| {
        chunks_arrive(near, far, false)
    });
    case(subject, Needs::NearToFar, "slices are filled in order", slices_are_filled_in_order);
    case(subject, Needs::NearToFar, "empty slices", empty_slices);
    case(subject, Needs::BothWays, "both directions at once", both_directions_at_once);
    case(subject, Needs::NearToFar, "Tokio's copy", tokio_copies);
    case(subject, Needs::NearToFar, "end of the stream", end_of_stream);
    case(subject, Needs::NearToFar, "end of the stream, in slices", end_of_stream_in_slices);
    if subject.traits.is_bounded {
        case(subject, Needs::NearToFar, "an abandoned write", abandoned_write);
    }
    case(subject, Needs::NearToFar, "an abandoned read", abandoned_read);
    case(subject, Needs::NearToFar, "cork and delay", cork_and_delay);
}

async fn chunks_arrive(mut near: End, mut far: End, is_blocking: bool) {
    near.set_blocking(is_blocking);
    far.set_blocking(is_blocking);
    let sending = tokio::spawn(async move {
        let sent = chunks();
        let slices = slices(&sent);
        let mut writing = near.writev_all(&slices);
        (&mut writing).await.expect("all is written");
        assert_eq!(writing.transferred(), 250 * 4194);
        near.flush().await.expect("flushed");
        near
    });
    let mut received = vec![vec![0xEE; 4194]; 250];
    far.readv_all(&mut rooms(&mut received)).await.expect("all is read");
    assert_eq!(received, chunks());
    let near = sending.await.expect("the sender ended");
    drop(near);
}

async fn slices_are_filled_in_order(mut near: End, mut far: End) {
    near.writev_all(&[IoSlice::new(b"ab"), IoSlice::new(b"cdefg"), IoSlice::new(b"h")])
        .await
        .expect("written");
    near.flush().await.expect("flushed");
    let (mut first, mut second, mut third) = ([0; 3], [0; 4], [0; 1]);
    let mut rooms = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second), IoSliceMut::new(&mut third)];
    far.readv_all(&mut rooms).await.expect("read");
    assert_eq!((&first, &second, &third), (b"abc", b"defg", b"h"));
}

async fn empty_slices(mut near: End, mut far: End) {
    near.writev_all(&[]).await.expect("nothing is written");
    near.writev_all(&[IoSlice::new(b""), IoSlice::new(b"xy"), IoSlice::new(b"")]).await.expect("written");
    near.flush().await.expect("flushed");
    let (mut nothing, mut one, mut other) = ([0; 0], [0; 1], [0; 1]);
    assert!(far.read_all_eof(&mut nothing).await.expect("no bytes are there at once"));
    let mut none = [0; 0];
    let mut rooms = [IoSliceMut::new(&mut none), IoSliceMut::new(&mut one), IoSliceMut::new(&mut other)];
    far.readv_all(&mut rooms).await.expect("read");
    assert_eq!((&one, &other), (b"x", b"y"));
}

async fn both_directions_at_once(near: End, far: End) {
    const BYTES: usize = 3 << 20;
    let mut tasks = Vec::new();
    // Neither end is dropped before all is there.
    let ends = [Shared::new(near), Shared::new(far)];
    for channel in &ends {
        let mut reading = channel.clone();
        let mut writing = channel.clone();
        tasks.push(tokio::spawn(async move {
            let sent = pattern(BYTES);
            for part in sent.chunks(100_003) {
                writing.write_all(part).await.expect("written");
            }
            writing.flush().await.expect("flushed");
        }));
        tasks.push(tokio::spawn(async move {
            let mut received = vec![0; BYTES];
            reading.read_all(&mut received).await.expect("read");
            assert!(received == pattern(BYTES), "other bytes came than were sent");
        }));
    }
    for task in tasks {
        task.await.expect("no task fails");
    }
    drop(ends);
}

async fn tokio_copies(mut near: End, mut far: End) {
    let sent = pattern(500_000);
    let expected = sent.clone();
    let sending = tokio::spawn(async move {
        tokio::io::copy(&mut &sent[..], &mut near).await.expect("copied");
        near.shutdown().await.expect("ended");
        near
    });
    let mut received = Vec::new();
    far.read_to_end(&mut received).await.expect("read to the end");
    assert!(received == expected, "{} bytes came of {}", received.len(), expected.len());
    drop(sending.await.expect("the sender ended"));
}

async fn end_of_stream(mut near: End, mut far: End) {
    near.write_all(b"12345").await.expect("written");
    near.shutdown().await.expect("ended");
    let mut three = [0; 3];
    assert!(far.read_all_eof(&mut three).await.expect("three are there"));
    let mut reading = far.read_all_eof(&mut three);
    let cut = (&mut reading).await.expect_err("only two are left");
    assert_eq!(kind_of(&cut), Some(ErrorKind::UnexpectedEof), "{cut}");
    assert_eq!(reading.transferred(), 2);
    assert_eq!(three, *b"453");
    assert!(!far.read_all_eof(&mut three).await.expect("an end before the first byte is no error"));
    let cut = far.read_all(&mut three).await.expect_err("unless all are wanted");
    assert_eq!(kind_of(&cut), Some(ErrorKind::UnexpectedEof));
    assert_eq!(far.readv(&mut [IoSliceMut::new(&mut three)]).await.expect("the end again"), 0);
}

/// The end between two reads of all slices is none, the end within one is an error that says how far it came.
async fn end_of_stream_in_slices(mut near: End, mut far: End) {
    near.write_all(b"1234567").await.expect("written");
    near.shutdown().await.expect("ended");
    let (mut first, mut second) = ([0; 2], [0; 3]);
    let mut rooms = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
    assert!(far.readv_all_eof(&mut rooms).await.expect("five are there"));
    let mut reading = far.readv_all_eof(&mut rooms);
    let cut = (&mut reading).await.expect_err("only two are left");
    assert_eq!(kind_of(&cut), Some(ErrorKind::UnexpectedEof), "{cut}");
    assert_eq!(reading.transferred(), 2);
    assert!(!far.readv_all_eof(&mut rooms).await.expect("an end before the first byte is no error"));
    assert_eq!((&first, &second), (b"67", b"345"));
}

/// What a dropped operation says it wrote is what the peer gets, and what follows comes after it.
async fn abandoned_write(mut near: End, mut far: End) {
    let sent = pattern(64 << 20);
    let slices: Vec<_> = sent.chunks(70_001).map(IoSlice::new).collect();
    let mut writing = near.writev_all(&slices);
    not_yet("64 MiB that nobody reads", &mut writing).await;
    let transferred = writing.transferred();
    assert!(transferred < sent.len());
    let sending = tokio::spawn(async move {
        near.write_all(b"and this").await.expect("written");
        near.shutdown().await.expect("ended");
        near
    });
    let mut received = Vec::new();
    far.read_to_end(&mut received).await.expect("read to the end");
    assert_eq!(received.len(), transferred + 8);
    assert!(received[..transferred] == sent[..transferred], "other bytes came than were sent");
    assert_eq!(received[transferred..], *b"and this");
    drop(sending.await.expect("the sender ended"));
}

/// What a dropped operation says it read is in the buffer, and the rest comes next.
async fn abandoned_read(mut near: End, mut far: End) {
    near.write_all(b"0123456").await.expect("written");
    near.flush().await.expect("flushed");
    let mut room = [0; 10];
    let mut reading = far.read_all(&mut room);
    not_yet("ten bytes of seven", &mut reading).await;
    let transferred = reading.transferred();
    assert!(transferred <= 7);
    near.write_all(b"789").await.expect("written");
    near.flush().await.expect("flushed");
    far.read_all(&mut room[transferred..]).await.expect("read");
    assert_eq!(room, *b"0123456789");
}

async fn cork_and_delay(mut near: End, mut far: End) {
    near.set_delay(false);
    near.set_cork(true);
    near.write_all(b"in ").await.expect("written");
    near.write_all(b"pieces").await.expect("written");
    near.flush().await.expect("flushed");
    near.set_cork(false);
    let mut room = [0; 9];
    soon("what was corked", far.read_all(&mut room)).await.expect("read");
    assert_eq!(room, *b"in pieces");
    near.set_delay(true);
}
