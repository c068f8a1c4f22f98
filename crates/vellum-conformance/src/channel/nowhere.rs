//! The channel that takes everything and has nothing: always ready, always at its end, always at position 0.

use super::{Carries, End, Needs, Subject, blocking, case, chunks, executor, slices, soon};
use std::io::{IoSlice, IoSliceMut, Read, SeekFrom, Write};
use std::ops::ControlFlow;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Handle;
use vellum_channel::{
    Blocking, Channel, ChannelExt, ErrorKind, Features, Interest, Shared, Shutdown, Watch, kind_of,
};

pub(super) fn cases(subject: &Subject) {
    debug_assert_eq!(subject.traits.carries, Carries::Nothing);
    case(subject, Needs::Nothing, "takes everything", takes_everything);
    case(subject, Needs::Nothing, "has nothing", has_nothing);
    case(subject, Needs::Nothing, "Tokio's copy", tokio_copies);
    case(subject, Needs::Nothing, "positions", positions);
    case(subject, Needs::Nothing, "watches", watches);
    case(subject, Needs::Nothing, "a woken reader", woken_reader);
    case(subject, Needs::Nothing, "hints", hints);
    case(subject, Needs::Nothing, "moves between executors", moves);
    blocking::case(subject, Needs::Nothing, "takes everything and has nothing", threads);
}

async fn takes_everything(mut near: End, _far: End) {
    for is_blocking in [true, false] {
        near.set_blocking(is_blocking);
        let sent = chunks();
        let slices = slices(&sent);
        let mut writing = near.writev_all(&slices);
        (&mut writing).await.expect("all is taken");
        assert_eq!(writing.transferred(), 250 * 4194);
        let taken = near.writev(&[IoSlice::new(b"hello "), IoSlice::new(b""), IoSlice::new(b"world")]).await;
        assert_eq!(taken.expect("taken"), 11);
        near.flush().await.expect("nothing is left");
    }
}

async fn has_nothing(mut near: End, _far: End) {
    near.write_all(b"this does not come back").await.expect("taken");
    let mut room = [7; 8];
    for is_blocking in [true, false] {
        near.set_blocking(is_blocking);
        assert_eq!(near.readv(&mut [IoSliceMut::new(&mut room)]).await.expect("the end"), 0);
        assert!(!near.read_all_eof(&mut room).await.expect("an end before the first byte is no error"));
        let mut reading = near.read_all(&mut room);
        let cut = (&mut reading).await.expect_err("unless all are wanted");
        assert_eq!(kind_of(&cut), Some(ErrorKind::UnexpectedEof), "{cut}");
        assert_eq!(reading.transferred(), 0);
    }
    assert_eq!(room, [7; 8], "the room stays as it is");
}

async fn tokio_copies(mut near: End, mut far: End) {
    assert_eq!(tokio::io::copy(&mut &[1; 500_000][..], &mut near).await.expect("copied"), 500_000);
    assert_eq!(tokio::io::copy(&mut near, &mut far).await.expect("copied"), 0);
    let mut received = Vec::new();
    assert_eq!(far.read_to_end(&mut received).await.expect("the end"), 0);
    near.shutdown().await.expect("ended");
}

async fn positions(mut near: End, _far: End) {
    assert!(near.features().contains(Features::SEEK));
    near.write_all(b"0123456789").await.expect("taken");
    for to in [SeekFrom::Start(9), SeekFrom::Current(3), SeekFrom::End(-1)] {
        assert_eq!(near.seek_to(to).await.expect("nowhere"), 0);
    }
    assert_eq!(near.preadv(&mut [IoSliceMut::new(&mut [0; 4])], 2).await.expect("the end"), 0);
    assert_eq!(near.pwritev(&[IoSlice::new(b"abc")], 1 << 60).await.expect("taken"), 3);
}

/// Called at once, with all that was asked for, for as long as it likes.
async fn watches(near: End, _far: End) {
    let mut near = Shared::new(near);
    for interest in [Interest::READ, Interest::WRITE, Interest::all()] {
        assert_eq!(near.ready(interest).await.expect("ready"), interest);
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let mut calls = 0;
        let watch = Watch::add(near.clone(), interest, &Handle::current(), move |_, found| {
            let _: Result<(), _> = tell.send(found);
            calls += 1;
            if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        for _ in 0..3 {
            let found = soon("a call", told.recv()).await.expect("the watch lives");
            assert_eq!(found.expect("no error"), interest);
        }
        assert!(soon("the callback is dropped", told.recv()).await.is_none());
        watch.leave();
    }
}

async fn woken_reader(mut near: End, _far: End) {
    near.control().wake_reader();
    let found = soon("an answer", near.ready(Interest::READ)).await.expect("no error");
    assert_eq!(found, Interest::empty(), "a wake before the wait counts");
    assert_eq!(soon("readable", near.ready(Interest::READ)).await.expect("no error"), Interest::READ);
}

async fn hints(mut near: End, _far: End) {
    near.set_cork(true);
    near.set_delay(true);
    near.write_all(b"x").await.expect("taken");
    near.set_delay(false);
    near.set_cork(false);
    near.shut_down(Shutdown::Both).expect_err("there is no peer");
    near.write_all(b"x").await.expect("a refused shutdown changes nothing");
}

async fn moves(mut near: End, _far: End) {
    let other = executor();
    near.detach().expect("detached");
    near.attach(other.handle()).expect("attached");
    let writing = other.spawn(async move {
        near.write_all(b"elsewhere").await.expect("taken");
        near
    });
    let mut near = soon("the writer", writing).await.expect("the writer ended");
    near.attach(&Handle::current()).expect("attached");
    assert!(!near.read_all_eof(&mut [0]).await.expect("the end"));
    other.shutdown_background();
}

fn threads(mut near: Blocking<End>, _far: Blocking<End>) {
    for is_blocking in [true, false] {
        near.set_blocking(is_blocking);
        near.writev_all(&slices(&chunks())).expect("taken");
        near.flush().expect("nothing is left");
        assert_eq!(near.read(&mut [0; 4]).expect("the end"), 0);
        assert!(!near.read_all_eof(&mut [0; 4]).expect("the end again"));
        assert_eq!(near.wait(Interest::all()).expect("ready"), Interest::all());
    }
    let mut received = Vec::new();
    assert_eq!(near.read_to_end(&mut received).expect("the end"), 0);
}
