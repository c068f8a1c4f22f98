//! Channels that have one end and positions: files and memory.

use super::{Carries, End, Needs, Subject, blocking, chunks, executor, pattern, rooms, slices};
use std::io::{IoSlice, IoSliceMut, Seek, SeekFrom, Write};
use tokio::io::AsyncWriteExt;
use tokio::runtime::Handle;
use vellum_channel::{Blocking, Channel, ChannelExt, ErrorKind, Features, Interest, kind_of};

pub(super) fn cases(subject: &Subject) {
    debug_assert_eq!(subject.traits.carries, Carries::ToItself);
    for is_blocking in [true, false] {
        eprintln!("{}: written and read back", subject.name);
        executor().block_on(async {
            let (mut channel, _other) = subject.ends().await;
            channel.set_blocking(is_blocking);
            written_and_read_back(&mut channel).await;
            positions(&mut channel).await;
            moved(&mut channel).await;
            closed(&mut channel).await;
        });
    }
    blocking::case(subject, Needs::Nothing, "written and read back", threads);
}

async fn written_and_read_back(channel: &mut End) {
    assert!(channel.features().contains(Features::SEEK));
    assert_eq!(channel.ready(Interest::READ | Interest::WRITE).await.expect("no error"), Interest::all());
    channel.writev_all(&slices(&chunks())).await.expect("written");
    channel.flush().await.expect("flushed");
    assert_eq!(channel.seek_to(SeekFrom::Start(0)).await.expect("moved"), 0);
    let mut received = vec![vec![0xEE; 4194]; 250];
    channel.readv_all(&mut rooms(&mut received)).await.expect("read");
    assert_eq!(received, chunks());
    assert!(!channel.read_all_eof(&mut [0; 1]).await.expect("the end"));
}

async fn positions(channel: &mut End) {
    let end = 250 * 4194;
    assert_eq!(channel.seek_to(SeekFrom::End(-4)).await.expect("moved"), end - 4);
    let mut four = [0; 4];
    assert_eq!(channel.preadv(&mut [IoSliceMut::new(&mut four)], 4194).await.expect("read"), 4);
    assert_eq!(four, [1; 4], "what is at that place");
    channel.read_all(&mut four).await.expect("read");
    assert_eq!(four, [249; 4], "the position did not move");
    assert_eq!(channel.pwritev(&[IoSlice::new(b"here")], 4194).await.expect("written"), 4);
    assert_eq!(channel.seek_to(SeekFrom::Current(0)).await.expect("told"), end);
    assert_eq!(channel.preadv(&mut [IoSliceMut::new(&mut four)], end).await.expect("the end"), 0);
    assert_eq!(channel.seek_to(SeekFrom::Start(4192)).await.expect("moved"), 4192);
    let mut eight = [9; 8];
    channel.read_all(&mut eight).await.expect("read");
    assert_eq!(eight, *b"\0\0here\x01\x01");
    assert_eq!(channel.seek_to(SeekFrom::Current(-4)).await.expect("moved"), 4196);
    channel.seek_to(SeekFrom::Current(-5000)).await.expect_err("before the start");
    // A gap reads as zeroes.
    assert_eq!(channel.seek_to(SeekFrom::Start(end + 3)).await.expect("moved"), end + 3);
    channel.write_all(b"x").await.expect("written");
    channel.flush().await.expect("flushed");
    let mut gap = [9; 4];
    assert_eq!(channel.preadv(&mut [IoSliceMut::new(&mut gap)], end).await.expect("read"), 4);
    assert_eq!(gap, *b"\0\0\0x");
}

async fn moved(channel: &mut End) {
    let other = executor();
    channel.detach().expect("detached");
    channel.attach(other.handle()).expect("attached");
    channel.seek_to(SeekFrom::Start(7)).await.expect("moved");
    channel.write_all(&pattern(1000)).await.expect("written");
    channel.flush().await.expect("flushed");
    let mut back = vec![0; 1000];
    channel.preadv(&mut [IoSliceMut::new(&mut back)], 7).await.expect("read");
    assert_eq!(back, pattern(1000));
    channel.attach(&Handle::current()).expect("attached");
    other.shutdown_background();
}

async fn closed(channel: &mut End) {
    channel.close().await.expect("closed");
    channel.close().await.expect("a second close does nothing");
    let error = channel.readv(&mut [IoSliceMut::new(&mut [0; 4])]).await.expect_err("closed");
    assert_eq!(kind_of(&error), Some(ErrorKind::Closed), "reading: {error}");
    let error = channel.seek_to(SeekFrom::Start(0)).await.expect_err("closed");
    assert_eq!(kind_of(&error), Some(ErrorKind::Closed), "seeking: {error}");
}

fn threads(mut near: Blocking<End>, _far: Blocking<End>) {
    let mut expected = Vec::new();
    for is_blocking in [true, false] {
        near.set_blocking(is_blocking);
        near.writev_all(&slices(&chunks())).expect("written");
        near.writev_all(&[IoSlice::new(b"and more")]).expect("written");
        near.flush().expect("flushed");
        expected.extend(chunks().concat());
        expected.extend(b"and more");
        near.seek(SeekFrom::Start(0)).expect("moved");
        let mut received = vec![0; expected.len()];
        near.read_all(&mut received).expect("read");
        assert!(received == expected, "other bytes came than were written");
        assert!(!near.read_all_eof(&mut [0]).expect("the end"));
        assert_eq!(near.wait(Interest::all()).expect("ready"), Interest::all());
        let mut four = [0; 4];
        assert_eq!(near.preadv(&mut [IoSliceMut::new(&mut four)], 4194).expect("read"), 4);
        assert_eq!(four, [1; 4]);
        assert_eq!(near.pwritev(&[IoSlice::new(&four)], 4194).expect("written"), 4);
    }
}
