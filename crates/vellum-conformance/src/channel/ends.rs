//! How channels end: shutdown, close, and a peer that goes away.

use super::{End, Needs, Subject, case, pattern, soon};
use std::io::{self, IoSlice, IoSliceMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_channel::{Channel, ChannelExt, Closed, ErrorKind, Features, Interest, Shared, Shutdown, kind_of};

pub(super) fn cases(subject: &Subject) {
    if subject.traits.half_closes {
        case(subject, Needs::BothWays, "half-close", half_close);
    }
    case(subject, Needs::NearToFar, "close sends what is left", close_sends_what_is_left);
    case(subject, Needs::Nothing, "after close", after_close);
    if subject.traits.delivers_when_dropped {
        case(subject, Needs::FarToNear, "the peer goes away", peer_goes_away);
    }
    case(subject, Needs::FarToNear, "shutdown of reading", shutdown_of_reading);
    case(subject, Needs::FarToNear, "shutdown wakes a reader", shutdown_wakes_reader);
    if subject.traits.is_bounded {
        case(subject, Needs::NearToFar, "shutdown wakes a writer", shutdown_wakes_writer);
    }
    case(subject, Needs::FarToNear, "close wakes others", close_wakes_others);
    case(subject, Needs::Nothing, "control after close", control_after_close);
}

async fn half_close(mut near: End, mut far: End) {
    near.write_all(b"question").await.expect("written");
    near.shutdown().await.expect("ended");
    let mut question = Vec::new();
    far.read_to_end(&mut question).await.expect("read to the end");
    assert_eq!(question, b"question");
    near.write_all(b"more").await.expect_err("writing has ended");
    // The other direction is as before.
    far.write_all(b"answer").await.expect("written");
    far.shutdown().await.expect("ended");
    let mut answer = Vec::new();
    near.read_to_end(&mut answer).await.expect("read to the end");
    assert_eq!(answer, b"answer");
}

async fn close_sends_what_is_left(mut near: End, mut far: End) {
    let sent = pattern(300_000);
    let expected = sent.clone();
    let closing = tokio::spawn(async move {
        near.write_all(&sent).await.expect("written");
        near.close().await.expect("closed");
    });
    let mut received = vec![0; expected.len()];
    far.read_all(&mut received).await.expect("all came");
    assert!(received == expected);
    assert!(!far.read_all_eof(&mut [0; 1]).await.expect("then the end"));
    drop(far);
    closing.await.expect("the closing task ended");
}

async fn after_close(mut near: End, far: End) {
    drop(far);
    // A peer that is gone may make the first close fail; the channel is closed all the same.
    let _: io::Result<Closed> = near.close().await;
    near.close().await.expect("a second close does nothing");
    let mut room = [0; 4];
    let error = near.readv(&mut [IoSliceMut::new(&mut room)]).await.expect_err("closed");
    assert_eq!(kind_of(&error), Some(ErrorKind::Closed), "reading: {error}");
    let error = near.writev(&[IoSlice::new(b"x")]).await.expect_err("closed");
    assert_eq!(kind_of(&error), Some(ErrorKind::Closed), "writing: {error}");
    let error = near.ready(Interest::READ).await.expect_err("closed");
    assert_eq!(kind_of(&error), Some(ErrorKind::Closed), "waiting: {error}");
}

async fn peer_goes_away(mut near: End, mut far: End) {
    far.write_all(b"last words").await.expect("written");
    far.flush().await.expect("flushed");
    drop(far);
    let mut words = [0; 10];
    near.read_all(&mut words).await.expect("what was sent before is read");
    assert_eq!(words, *b"last words");
    // An end or an error, never a wait.
    let next = soon("the end", near.readv(&mut [IoSliceMut::new(&mut words)])).await;
    assert!(matches!(next, Ok(0) | Err(_)), "{next:?}");
    let writing = async {
        loop {
            near.write_all(&[0; 65_536]).await?;
            near.flush().await?;
        }
    };
    let error: io::Result<()> = soon("an error of writing", writing).await;
    error.expect_err("nobody reads any more");
}

async fn shutdown_of_reading(mut near: End, far: End) {
    if !near.features().contains(Features::SHUTDOWN) {
        return;
    }
    near.shut_down(Shutdown::Read).expect("shut down");
    let read = soon("the end", near.readv(&mut [IoSliceMut::new(&mut [0; 4])])).await;
    assert_eq!(read.expect("an end that was asked for is no error"), 0);
    drop(far);
}

async fn shutdown_wakes_reader(near: End, far: End) {
    if !near.features().contains(Features::SHUTDOWN) {
        return;
    }
    let control = near.control();
    let mut near = near;
    let reading = tokio::spawn(async move {
        let read = near.readv(&mut [IoSliceMut::new(&mut [0; 4])]).await;
        (near, read)
    });
    tokio::time::sleep(super::MOMENT).await;
    // From another thread.
    tokio::task::spawn_blocking(move || control.shutdown(Shutdown::Both))
        .await
        .expect("a thread")
        .expect("done");
    let (mut near, read) = soon("the reader", reading).await.expect("the reader ended");
    assert_eq!(read.expect("an end that was asked for is no error"), 0);
    let writing = async {
        near.write_all(b"x").await?;
        near.flush().await
    };
    soon("the writer", writing).await.expect_err("writing has ended, too");
    drop(far);
}

async fn shutdown_wakes_writer(mut near: End, far: End) {
    if !near.features().contains(Features::SHUTDOWN) {
        return;
    }
    let control = near.control();
    let writing = tokio::spawn(async move {
        let full = vec![0; 1 << 20];
        loop {
            near.write_all(&full).await?;
        }
    });
    tokio::time::sleep(super::MOMENT).await;
    control.shutdown(Shutdown::Both).expect("shut down");
    let written: io::Result<()> = soon("the writer", writing).await.expect("the writer ended");
    written.expect_err("writing has ended");
    drop(far);
}

async fn close_wakes_others(near: End, far: End) {
    let near = Shared::new(near);
    let mut waiting = near.clone();
    let reading = tokio::spawn(async move { waiting.readv(&mut [IoSliceMut::new(&mut [0; 4])]).await });
    tokio::time::sleep(super::MOMENT).await;
    let mut closing = near.clone();
    // Some say goodbye to a peer that listens.
    let listening = tokio::spawn(async move {
        let mut far = far;
        let mut rest = Vec::new();
        let _: io::Result<usize> = far.read_to_end(&mut rest).await;
    });
    soon("the close", closing.close()).await.expect("closed");
    let read = soon("the reader", reading).await.expect("the reader ended");
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    listening.await.expect("the peer ended");
}

async fn control_after_close(mut near: End, far: End) {
    let control = near.control();
    drop(far);
    let _: io::Result<Closed> = near.close().await;
    control.set_cork(true);
    control.set_delay(false);
    control.wake_reader();
    if near.features().contains(Features::SHUTDOWN) {
        control.shutdown(Shutdown::Both).expect_err("it is closed");
    }
    drop(near);
    control.shutdown(Shutdown::Both).expect_err("it is gone");
}
