//! What a channel cannot do it refuses, by the features that it states.

use super::{End, Needs, Subject, case};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, SeekFrom};
use std::os::fd::AsFd;
use tokio::io::AsyncWriteExt;
use vellum_channel::{
    Channel, ChannelExt, Descriptors, ErrorKind, Features, ReadFlags, Shutdown, WriteFlags, ZeroCopy, kind_of,
};

pub(super) fn cases(subject: &Subject) {
    case(subject, Needs::Nothing, "descriptors", descriptors);
    case(subject, Needs::NearToFar, "descriptors and the end", descriptors_and_the_end);
    case(subject, Needs::Nothing, "zero-copy", zero_copy);
    case(subject, Needs::Nothing, "positions", positions);
    case(subject, Needs::Nothing, "shutdown and peek", shutdown_and_peek);
    case(subject, Needs::Nothing, "names", names);
    case(subject, Needs::Nothing, "added features", added_features);
}

async fn descriptors(mut near: End, mut far: End) {
    let file = File::open("/dev/null").expect("a file");
    if near.features().contains(Features::DESCRIPTORS) {
        let sent = [file.as_fd(), file.as_fd(), file.as_fd()];
        near.writev_full_all(&[IoSlice::new(b"three")], &sent, WriteFlags::empty()).await.expect("sent");
        let mut received = Descriptors::default();
        let mut room = [0; 5];
        far.readv_full_all(&mut [IoSliceMut::new(&mut room)], Some(&mut received), ReadFlags::empty())
            .await
            .expect("received");
        assert_eq!((&room, received.len()), (b"three", 3));
        return;
    }
    let error = near.writev_full(&[IoSlice::new(b"x")], &[file.as_fd()], WriteFlags::empty()).await;
    assert_eq!(kind_of(&error.expect_err("no descriptors")), Some(ErrorKind::Unsupported));
    let mut received = Descriptors::default();
    let mut room = [0; 1];
    let mut rooms = [IoSliceMut::new(&mut room)];
    let error = far.readv_full(&mut rooms, Some(&mut received), ReadFlags::empty()).await;
    assert_eq!(kind_of(&error.expect_err("no descriptors")), Some(ErrorKind::Unsupported));
}

/// A read of all with room for descriptors, where they travel, and without; the end before the first byte is none.
async fn descriptors_and_the_end(mut near: End, mut far: End) {
    let file = File::open("/dev/null").expect("a file");
    let passes = near.features().contains(Features::DESCRIPTORS);
    let sent = [file.as_fd(), file.as_fd()];
    let sent = if passes { &sent[..] } else { &[] };
    near.writev_full_all(&[IoSlice::new(b"fi"), IoSlice::new(b"ve!")], sent, WriteFlags::empty())
        .await
        .expect("sent");
    near.shutdown().await.expect("ended");
    let (mut first, mut second) = ([0; 4], [0; 1]);
    let mut rooms = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
    let mut received = Descriptors::default();
    if !passes {
        let refused = far.readv_full_all_eof(&mut rooms, Some(&mut received), ReadFlags::empty()).await;
        assert_eq!(kind_of(&refused.expect_err("no descriptors")), Some(ErrorKind::Unsupported));
    }
    for is_there in [true, false] {
        let fds = passes.then_some(&mut received);
        let read = far.readv_full_all_eof(&mut rooms, fds, ReadFlags::empty()).await;
        assert_eq!(read.expect("all or nothing"), is_there);
        assert_eq!(received.len(), sent.len());
    }
    let peek = far.readv_full_all_eof(&mut rooms, None, ReadFlags::PEEK).await;
    peek.expect_err("a peek of all is none, or the channel does not peek");
    assert_eq!((&first, &second), (b"five", b"!"));
}

async fn zero_copy(mut near: End, far: End) {
    let file = File::open("/dev/null").expect("a file");
    if near.features().contains(Features::DESCRIPTORS) {
        let both = near.writev_full(&[IoSlice::new(b"x")], &[file.as_fd()], WriteFlags::ZERO_COPY).await;
        assert_eq!(kind_of(&both.expect_err("not both")), Some(ErrorKind::Invalid));
    }
    if !near.features().contains(Features::ZERO_COPY) {
        let error = near.writev_full(&[IoSlice::new(b"x")], &[], WriteFlags::ZERO_COPY).await;
        assert_eq!(kind_of(&error.expect_err("no zero-copy")), Some(ErrorKind::Unsupported));
    }
    assert_eq!(near.flush_zero_copy().await.expect("nothing to wait for"), ZeroCopy::Sent);
    drop(far);
}

async fn positions(mut near: End, far: End) {
    if near.features().contains(Features::SEEK) {
        return;
    }
    let error = near.seek_to(SeekFrom::Start(0)).await.expect_err("no positions");
    assert_eq!(kind_of(&error), Some(ErrorKind::Unsupported), "{error}");
    let error = near.preadv(&mut [IoSliceMut::new(&mut [0])], 0).await.expect_err("no positions");
    assert_eq!(kind_of(&error), Some(ErrorKind::Unsupported), "{error}");
    let error = near.pwritev(&[IoSlice::new(b"x")], 0).await.expect_err("no positions");
    assert_eq!(kind_of(&error), Some(ErrorKind::Unsupported), "{error}");
    drop(far);
}

async fn shutdown_and_peek(mut near: End, far: End) {
    if !near.features().contains(Features::SHUTDOWN) {
        for how in [Shutdown::Read, Shutdown::Write, Shutdown::Both] {
            let error = near.shut_down(how).expect_err("it has no such feature");
            assert_eq!(kind_of(&error), Some(ErrorKind::Unsupported), "{error}");
        }
    }
    if !near.features().contains(Features::PEEK) {
        let error = near.peek(&mut [0; 4]).await.expect_err("it has no such feature");
        assert_eq!(kind_of(&error), Some(ErrorKind::Unsupported), "{error}");
    }
    drop(far);
}

async fn names(mut near: End, far: End) {
    assert!(near.is_blocking(), "channels start in blocking mode");
    assert!(!near.kind().is_empty());
    near.set_name("migration");
    assert_eq!(near.name(), "migration");
    assert!(near.label().contains("migration"));
    assert!(near.unsupported("cannot fly").to_string().contains("migration"));
    drop(far);
}

async fn added_features(mut near: End, far: End) {
    let before = near.features();
    assert!(!before.contains(Features::LISTEN), "it is connected");
    near.base_mut().add_feature(Features::LISTEN);
    assert_eq!(near.features(), before | Features::LISTEN);
    near.base_mut().add_feature(Features::LISTEN);
    assert_eq!(near.features(), before | Features::LISTEN);
    drop(far);
}
