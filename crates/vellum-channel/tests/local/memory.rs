//! `Buffer` and `Null`.

use crate::common::{assert_kind, read_to_end, receive, send, within, write};
use std::io::{IoSlice, IoSliceMut, SeekFrom};
use std::ops::ControlFlow;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Handle;
use vellum_channel::{Buffer, Channel, ChannelExt, ErrorKind, Features, Interest, Null, Shared, Watch};

#[tokio::test]
async fn a_buffer_gives_back_what_was_written() {
    for is_blocking in [true, false] {
        let mut buffer = Buffer::new();
        within(send(&mut buffer, is_blocking)).await.expect("all written");
        buffer.seek_to(SeekFrom::Start(0)).await.expect("sought");
        within(receive(&mut buffer, is_blocking)).await.expect("all read");
        assert!(!buffer.read_all_eof(&mut [0]).await.expect("the end"), "nothing is left");
    }
}

#[tokio::test]
async fn a_buffer_seeks_from_everywhere() {
    let mut buffer = Buffer::from_vec(b"0123456789".to_vec());
    assert!(buffer.features().contains(Features::SEEK | Features::PEEK));
    for (to, position) in [
        (SeekFrom::Start(4), 4),
        (SeekFrom::Current(3), 7),
        (SeekFrom::Current(-5), 2),
        (SeekFrom::End(-1), 9),
        (SeekFrom::End(5), 15),
        (SeekFrom::Current(0), 15),
    ] {
        assert_eq!(buffer.seek_to(to).await.expect("a position"), position);
    }
    assert_eq!(buffer.readv(&mut [IoSliceMut::new(&mut [0; 4])]).await.expect("beyond the end"), 0);
    for nowhere in [SeekFrom::Current(-16), SeekFrom::End(-11), SeekFrom::Start(u64::MAX)] {
        assert_kind(buffer.seek_to(nowhere).await, ErrorKind::Invalid);
    }
    write(&mut buffer, b"x").await.expect("after a gap");
    assert_eq!(buffer.as_slice(), b"0123456789\0\0\0\0\0x");
    assert_eq!(buffer.seek_to(SeekFrom::Current(0)).await.expect("a position"), 16);
}

#[tokio::test]
async fn positioned_transfers_and_peeks_leave_the_position() {
    let mut buffer = Buffer::from_vec(b"0123456789".to_vec());
    let mut pair = [0; 2];
    assert_eq!(buffer.preadv(&mut [IoSliceMut::new(&mut pair)], 8).await.expect("there"), 2);
    assert_eq!(&pair, b"89");
    assert_eq!(buffer.pwritev(&[IoSlice::new(b"ab")], 9).await.expect("there"), 2);
    assert_eq!(buffer.peek(&mut pair).await.expect("there"), 2);
    assert_eq!(&pair, b"01");
    assert_eq!(read_to_end(&mut buffer).await.expect("all"), b"012345678ab");
    assert_eq!(buffer.preadv(&mut [IoSliceMut::new(&mut pair)], 1 << 40).await.expect("beyond"), 0);
}

#[tokio::test]
async fn a_buffer_is_always_ready_and_a_tokio_stream() {
    let mut buffer = Buffer::new();
    let both = Interest::READ | Interest::WRITE;
    assert_eq!(buffer.ready(both).await.expect("ready"), both);
    buffer.write_all(b"abc").await.expect("Tokio writes");
    buffer.flush().await.expect("flushes");
    buffer.seek_to(SeekFrom::Start(1)).await.expect("sought");
    let mut rest = String::new();
    buffer.read_to_string(&mut rest).await.expect("Tokio reads");
    assert_eq!(rest, "bc");
    buffer.close().await.expect("closed");
    buffer.close().await.expect("closed twice");
    assert_kind(buffer.write_all(b"x").await, ErrorKind::Closed);
    assert_kind(buffer.seek_to(SeekFrom::Start(0)).await, ErrorKind::Closed);
    assert_kind(buffer.ready(both).await, ErrorKind::Closed);
    assert!(buffer.into_vec().is_empty(), "close gives the memory back");
}

#[tokio::test]
async fn null_takes_everything_and_has_nothing() {
    let mut null = Null::new();
    for is_blocking in [true, false] {
        null.set_blocking(is_blocking);
        assert_eq!(null.writev(&[IoSlice::new(b"hello "), IoSlice::new(b"world")]).await.expect("taken"), 11);
        assert_eq!(null.readv(&mut [IoSliceMut::new(&mut [0; 8])]).await.expect("the end"), 0);
    }
    let both = Interest::READ | Interest::WRITE;
    assert_eq!(null.ready(Interest::READ).await.expect("ready"), Interest::READ);
    assert_eq!(null.ready(both).await.expect("ready"), both);
    assert_eq!(null.seek_to(SeekFrom::Start(9)).await.expect("nowhere"), 0);
    assert_eq!(null.pwritev(&[IoSlice::new(b"abc")], 1 << 60).await.expect("taken"), 3);
    null.close().await.expect("closed");
    null.close().await.expect("closed twice");
    assert_kind(null.writev(&[IoSlice::new(b"x")]).await, ErrorKind::Closed);
    assert_kind(null.readv(&mut [IoSliceMut::new(&mut [0; 8])]).await, ErrorKind::Closed);
}

/// A watch on what is always ready is called at once, with all that it asked for.
#[tokio::test]
async fn watches_fire_for_what_they_were_added_for() {
    let both = Interest::READ | Interest::WRITE;
    for interest in [Interest::READ, Interest::WRITE, both] {
        let kinds: [Box<dyn Channel>; 2] = [Box::new(Null::new()), Box::new(Buffer::new())];
        for channel in kinds {
            let (tell, told) = tokio::sync::oneshot::channel();
            let mut tell = Some(tell);
            let watch = Watch::add(Shared::new(channel), interest, &Handle::current(), move |_, found| {
                tell.take().expect("it is called once").send(found).expect("it is awaited");
                ControlFlow::Break(())
            });
            assert_eq!(within(told).await.expect("a call").expect("no error"), interest);
            watch.leave();
        }
    }
}

#[tokio::test]
async fn what_is_always_ready_lets_other_tasks_run() {
    let other = tokio::spawn(async {});
    let mut null = Null::new();
    // On this executor of one thread the other task has its turn only if these writes give it one.
    let writing = async {
        for round in 0.. {
            write(&mut null, b"x").await.expect("taken");
            if other.is_finished() {
                return round;
            }
            assert!(round < 100_000, "the other task starves");
        }
        unreachable!("the loop returns")
    };
    within(writing).await;
}
