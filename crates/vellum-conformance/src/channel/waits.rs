//! Readiness, non-blocking mode, peeking and watches.

use super::{End, Needs, Subject, case, not_yet, pattern, soon};
use parking_lot::Mutex;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::ControlFlow;
use std::sync::Arc;
use tokio::io::AsyncWriteExt;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use vellum_channel::{Channel, ChannelExt, Features, Interest, Shared, Watch};

pub(super) fn cases(subject: &Subject) {
    case(subject, Needs::NearToFar, "readable", readable);
    case(subject, Needs::NearToFar, "writable", writable);
    case(subject, Needs::NearToFar, "an empty channel would block", empty_would_block);
    if subject.traits.is_bounded {
        case(subject, Needs::NearToFar, "a full channel would block", full_would_block);
    }
    case(subject, Needs::FarToNear, "a woken reader", woken_reader);
    case(subject, Needs::NearToFar, "peek", peek);
    case(subject, Needs::NearToFar, "watch for reading", watch_for_reading);
    case(subject, Needs::NearToFar, "watch for writing", watch_for_writing);
    case(subject, Needs::NearToFar, "a removed watch", removed_watch);
}

async fn readable(mut near: End, mut far: End) {
    not_yet("readable", far.ready(Interest::READ)).await;
    near.write_all(b"abc").await.expect("written");
    near.flush().await.expect("flushed");
    for rest in [3, 2, 1] {
        // For as long as there is something to read, also what a channel has in a buffer of its own.
        let found = soon("readable", far.ready(Interest::READ)).await.expect("no error");
        assert_eq!(found, Interest::READ, "{rest} bytes are left");
        far.read_all(&mut [0]).await.expect("read");
    }
    not_yet("readable", far.ready(Interest::READ)).await;
    near.shutdown().await.expect("ended");
    let found = soon("readable at the end", far.ready(Interest::READ)).await.expect("no error");
    assert_eq!(found, Interest::READ);
}

async fn writable(mut near: End, far: End) {
    let found = soon("writable", near.ready(Interest::READ | Interest::WRITE)).await.expect("no error");
    assert_eq!(found, Interest::WRITE);
    near.write_all(b"x").await.expect("written");
    drop(far);
}

async fn empty_would_block(mut near: End, mut far: End) {
    far.set_blocking(false);
    let mut room = [0; 4];
    let error = far.readv(&mut [IoSliceMut::new(&mut room)]).await.expect_err("nothing is there");
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    near.write_all(b"now").await.expect("written");
    near.flush().await.expect("flushed");
    // Whoever asks again and again must see it some time, without a word to the executor.
    let mut read = 0;
    for attempt in 0.. {
        match far.readv(&mut [IoSliceMut::new(&mut room)]).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && attempt < 2000 => {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            done => {
                read += done.expect("read");
                break;
            }
        }
    }
    assert!((1..=3).contains(&read));
    far.set_blocking(true);
    far.read_all(&mut room[read..3]).await.expect("read");
    assert_eq!(room[..3], *b"now");
}

async fn full_would_block(mut near: End, mut far: End) {
    near.set_blocking(false);
    let data = pattern(1 << 20);
    let mut sent = 0;
    let error = loop {
        match near.writev(&[IoSlice::new(&data)]).await {
            Ok(count) => sent += count,
            Err(error) => break error,
        }
        assert!(sent < 1 << 30, "it takes everything");
    };
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    // All of it: a kernel says "writable" only when a good part of its buffer is free.
    let draining = tokio::spawn(async move {
        let mut received = vec![0; sent];
        far.read_all(&mut received).await.expect("read");
        far
    });
    let found = soon("writable again", async {
        loop {
            // What a channel has in a buffer of its own goes out by a flush.
            let _: io::Result<()> = near.flush().await;
            if near.ready(Interest::WRITE).await? == Interest::WRITE {
                return Ok::<_, io::Error>(Interest::WRITE);
            }
        }
    });
    assert_eq!(found.await.expect("no error"), Interest::WRITE);
    drop(draining.await.expect("the reader ended"));
}

async fn woken_reader(mut near: End, far: End) {
    let control = near.control();
    let waiting = tokio::spawn(async move {
        let found = near.ready(Interest::READ).await;
        (near, found)
    });
    tokio::time::sleep(super::MOMENT).await;
    control.wake_reader();
    let (mut near, found) = soon("the reader", waiting).await.expect("the reader ended");
    assert_eq!(found.expect("no error"), Interest::empty());
    control.wake_reader();
    let found = soon("the reader", near.ready(Interest::READ)).await.expect("no error");
    assert_eq!(found, Interest::empty(), "a wake before the wait counts");
    not_yet("readable", near.ready(Interest::READ)).await;
    drop(far);
}

async fn peek(mut near: End, mut far: End) {
    if !far.features().contains(Features::PEEK) {
        return;
    }
    near.write_all(b"peekaboo").await.expect("written");
    near.flush().await.expect("flushed");
    let mut room = [0; 4];
    for _ in 0..2 {
        let count = soon("a peek", far.peek(&mut room)).await.expect("peeked");
        assert!((1..=4).contains(&count));
        assert_eq!(room[..count], b"peekaboo"[..count]);
    }
    let mut all = [0; 8];
    far.read_all(&mut all).await.expect("read");
    assert_eq!(all, *b"peekaboo");
    not_yet("a peek", far.peek(&mut room)).await;
    near.shutdown().await.expect("ended");
    assert_eq!(soon("the end", far.peek(&mut room)).await.expect("no error"), 0);
}

async fn watch_for_reading(mut near: End, far: End) {
    let mut far = Shared::new(far);
    far.set_blocking(false);
    let received = Arc::new(Mutex::new(Vec::new()));
    let into = received.clone();
    let (tell, mut told) = mpsc::unbounded_channel();
    let watch = Watch::add(far, Interest::READ, &Handle::current(), move |channel, found| {
        assert_eq!(found.expect("no error"), Interest::READ);
        let mut room = [0; 3];
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        // One read a call: the watch must call again for the rest.
        let read = channel.poll_readv(
            &mut cx,
            &mut [IoSliceMut::new(&mut room)],
            None,
            vellum_channel::ReadFlags::NO_WAIT,
        );
        match read {
            std::task::Poll::Ready(Ok(0)) => {
                let _: Result<(), _> = tell.send(true);
                return ControlFlow::Break(());
            }
            std::task::Poll::Ready(Ok(count)) => into.lock().extend_from_slice(&room[..count]),
            _ => {}
        }
        let _: Result<(), _> = tell.send(false);
        ControlFlow::Continue(())
    });
    for word in ["one", "two", "three"] {
        near.write_all(word.as_bytes()).await.expect("written");
        near.flush().await.expect("flushed");
        soon("a call", told.recv()).await.expect("the watch lives");
    }
    near.shutdown().await.expect("ended");
    soon("the end", async { while told.recv().await != Some(true) {} }).await;
    assert_eq!(received.lock().as_slice(), b"onetwothree");
    assert!(soon("the callback is dropped", told.recv()).await.is_none());
    soon("the watch is over", async {
        while !watch.is_over() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

async fn watch_for_writing(near: End, far: End) {
    let (tell, mut told) = mpsc::unbounded_channel();
    let mut calls = 0;
    let watch = Watch::add(Shared::new(near), Interest::WRITE, &Handle::current(), move |_, found| {
        assert_eq!(found.expect("no error"), Interest::WRITE);
        let _: Result<(), _> = tell.send(());
        calls += 1;
        if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    for _ in 0..3 {
        soon("a call", told.recv()).await.expect("it is called for as long as it holds");
    }
    assert!(soon("the callback is dropped", told.recv()).await.is_none());
    watch.leave();
    drop(far);
}

async fn removed_watch(mut near: End, far: End) {
    let (tell, mut told) = mpsc::unbounded_channel();
    let watch = Watch::add(Shared::new(far), Interest::READ, &Handle::current(), move |_, _| {
        let _: Result<(), _> = tell.send(());
        ControlFlow::Continue(())
    });
    watch.remove();
    assert!(soon("the callback is dropped", told.recv()).await.is_none());
    let _: io::Result<()> = near.write_all(b"nobody cares").await;
}
