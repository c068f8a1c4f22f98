//! Descriptors that travel along.

use crate::common::{Marked, is_alone, within};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_channel::{
    Channel, ChannelExt, Descriptors, ErrorKind, Interest, MESSAGE_DESCRIPTORS_MAX, ReadFlags, Socket,
    WriteFlags, kind_of,
};

/// Sends `count` copies of the marked file's descriptor with `data`.
async fn send(channel: &mut Socket, marked: &Marked, count: usize, data: &[u8]) {
    let fds: Vec<BorrowedFd<'_>> = vec![marked.file.as_fd(); count];
    let bufs = [IoSlice::new(data)];
    within(channel.writev_full_all(&bufs, &fds, WriteFlags::empty())).await.expect("a write");
}

async fn receive(channel: &mut Socket, fds: &mut Descriptors, room: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0; room];
    let mut bufs = [IoSliceMut::new(&mut data)];
    let read = within(channel.readv_full(&mut bufs, Some(fds), ReadFlags::empty())).await?;
    data.truncate(read);
    Ok(data)
}

fn is_same_file(left: impl AsFd, right: impl AsFd) -> bool {
    let identity = |fd: BorrowedFd<'_>| {
        let stat = rustix::fs::fstat(fd).expect("a state");
        (stat.st_dev, stat.st_ino)
    };
    identity(left.as_fd()) == identity(right.as_fd())
}

#[tokio::test]
async fn the_same_descriptor_three_times() {
    let (mut near, mut far) = Socket::pair().expect("a pair");
    let marked = Marked::new();
    send(&mut near, &marked, 3, b"payload").await;
    let mut fds = Descriptors::default();
    assert_eq!(receive(&mut far, &mut fds, 100).await.expect("a read"), b"payload");
    assert_eq!(fds.len(), 3);
    let got: Vec<OwnedFd> = fds.drain().collect();
    let mut numbers: Vec<_> = got.iter().chain([&marked.file]).map(AsRawFd::as_raw_fd).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 4, "each is a new one");
    assert!(got.iter().all(|fd| is_same_file(fd, &marked.file)));
    let flags = got.iter().map(|fd| rustix::io::fcntl_getfd(fd).expect("flags"));
    assert!(flags.into_iter().all(|flags| flags.contains(rustix::io::FdFlags::CLOEXEC)));
    rustix::io::write(&got[0], b"by the first").expect("a write");
    let mut read = [0; 12];
    assert_eq!(rustix::io::pread(&got[2], &mut read, 0).expect("a read"), 12);
    assert_eq!(&read, b"by the first");
    drop(got);
    assert_eq!(marked.count(), 1);
}

#[tokio::test]
async fn hundreds_go_in_messages_of_253() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("a limit");
    for count in [253, 254, 700] {
        let (mut near, mut far) = Socket::pair().expect("a pair");
        let marked = Marked::new();
        let data: Vec<u8> = (0..5000_u16).map(|at| at as u8).collect();
        send(&mut near, &marked, count, &data).await;
        let mut fds = Descriptors::with_limit(count);
        let mut got = vec![0; data.len()];
        let mut bufs = [IoSliceMut::new(&mut got)];
        let reading = far.readv_full_all(&mut bufs, Some(&mut fds), ReadFlags::empty());
        within(reading).await.expect("a read");
        assert!(got == data);
        assert_eq!((fds.len(), marked.count()), (count, count + 1));
        assert!(fds.drain().all(|fd| is_same_file(fd, &marked.file)));
        assert_eq!(marked.count(), 1);
    }
}

#[tokio::test]
async fn more_than_a_message_or_the_bytes_can_carry_is_refused_before_anything_is_sent() {
    let (mut near, mut far) = Socket::pair().expect("a pair");
    let marked = Marked::new();
    let fds = vec![marked.file.as_fd(); MESSAGE_DESCRIPTORS_MAX + 1];
    let bufs = [IoSlice::new(b"x")];
    let refused = within(near.writev_full(&bufs, &fds, WriteFlags::empty())).await.expect_err("too many");
    assert_eq!(kind_of(&refused), Some(ErrorKind::TooManyDescriptors));
    let refused = within(near.writev_full_all(&bufs, &fds, WriteFlags::empty())).await.expect_err("too many");
    assert_eq!(kind_of(&refused), Some(ErrorKind::TooManyDescriptors));
    let sent = std::future::poll_fn(|cx| near.poll_writev(cx, &bufs, &fds, WriteFlags::empty())).await;
    assert_eq!(kind_of(&sent.expect_err("too many")), Some(ErrorKind::TooManyDescriptors));
    far.set_blocking(false);
    let nothing = receive(&mut far, &mut Descriptors::default(), 10).await.expect_err("nothing was sent");
    assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
}

#[tokio::test]
async fn more_than_the_receiver_takes_are_closed_and_the_bytes_stay() {
    let (mut near, mut far) = Socket::pair().expect("a pair");
    let marked = Marked::new();
    send(&mut near, &marked, 5, b"with five").await;
    near.write_all(b" and more").await.expect("a write");
    let mut fds = Descriptors::with_limit(4);
    let refused = receive(&mut far, &mut fds, 100).await.expect_err("five are too many");
    assert_eq!(kind_of(&refused), Some(ErrorKind::TooManyDescriptors));
    assert_eq!((fds.len(), marked.count()), (0, 1));
    // The bytes are there for whoever goes on, in parts as well.
    assert_eq!(within(far.ready(Interest::READ)).await.expect("a state"), Interest::READ);
    let mut few = [0; 4];
    assert_eq!(within(far.peek(&mut few)).await.expect("a peek"), 4);
    assert_eq!(&few, b"with");
    assert_eq!(receive(&mut far, &mut fds, 5).await.expect("a read"), b"with ");
    let mut all = [0; 13];
    within(far.read_exact(&mut all)).await.expect("a read");
    assert_eq!(&all, b"five and more");
    // The next message has its descriptors as ever.
    send(&mut near, &marked, 4, b"four").await;
    assert_eq!(receive(&mut far, &mut fds, 100).await.expect("a read"), b"four");
    assert_eq!((fds.len(), marked.count()), (4, 5));
}

#[tokio::test]
async fn those_that_nobody_takes_are_closed_and_no_byte_waits_behind_them() {
    let (mut near, mut far) = Socket::pair().expect("a pair");
    let marked = Marked::new();
    for _ in 0..3 {
        // Reads end behind each message that carries descriptors, though more is there.
        near.write_all(b"abc").await.expect("a write");
        send(&mut near, &marked, 2, b"def").await;
        send(&mut near, &marked, 1, b"ghi").await;
        near.write_all(b"jkl").await.expect("a write");
        let mut got = Vec::new();
        while got.len() < 12 {
            within(far.read_buf(&mut got)).await.expect("a read");
        }
        assert_eq!(got, b"abcdefghijkl");
        assert_eq!(marked.count(), 1);

        send(&mut near, &marked, 2, b"def").await;
        send(&mut near, &marked, 1, b"ghi").await;
        let (mut first, mut second) = ([0; 2], [0; 4]);
        let mut bufs = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
        within(far.readv_all(&mut bufs)).await.expect("a read");
        assert_eq!((&first, &second), (b"de", b"fghi"));
        assert_eq!(marked.count(), 1);
    }
    // Nor when they are in flight, or received and not taken.
    send(&mut near, &marked, 3, b"lost").await;
    drop(far);
    drop(near);
    assert_eq!(marked.count(), 1);
    let (mut near, mut far) = Socket::pair().expect("a pair");
    send(&mut near, &marked, 3, b"kept").await;
    let mut fds = Descriptors::default();
    receive(&mut far, &mut fds, 100).await.expect("a read");
    assert_eq!(marked.count(), 4);
    drop(fds);
    assert_eq!(marked.count(), 1);
}

#[tokio::test]
async fn bytes_behind_descriptors_do_not_wait_when_they_are_taken_either() {
    let (mut near, mut far) = Socket::pair().expect("a pair");
    let marked = Marked::new();
    for round in 0..3 {
        near.write_all(b"abc").await.expect("a write");
        send(&mut near, &marked, 2, b"def").await;
        near.write_all(b"ghi").await.expect("a write");
        let mut fds = Descriptors::default();
        let mut got = Vec::new();
        while got.len() < 9 {
            got.extend(receive(&mut far, &mut fds, 100).await.expect("a read"));
        }
        assert_eq!((got.as_slice(), fds.len()), (&b"abcdefghi"[..], 2), "round {round}");
    }
}

#[tokio::test]
async fn a_peek_leaves_descriptors_with_their_bytes() {
    let (mut near, mut far) = Socket::pair().expect("a pair");
    let marked = Marked::new();
    send(&mut near, &marked, 2, b"two").await;
    let mut fds = Descriptors::default();
    let mut data = [0; 10];
    let mut bufs = [IoSliceMut::new(&mut data)];
    let peeked = within(far.readv_full(&mut bufs, Some(&mut fds), ReadFlags::PEEK)).await.expect("a peek");
    assert_eq!((peeked, fds.len(), marked.count()), (3, 0, 1));
    assert_eq!(receive(&mut far, &mut fds, 10).await.expect("a read"), b"two");
    assert_eq!((fds.len(), marked.count()), (2, 3));
}

#[tokio::test]
async fn they_are_made_blocking_unless_told_otherwise() {
    for (flags, is_blocking) in [(ReadFlags::empty(), true), (ReadFlags::KEEP_DESCRIPTOR_MODE, false)] {
        let (mut near, mut far) = Socket::pair().expect("a pair");
        let (reader, _writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).expect("a pipe");
        let bufs = [IoSlice::new(b"x")];
        let sending = [reader.as_fd()];
        let sent = near.writev_full(&bufs, &sending, WriteFlags::empty());
        assert_eq!(within(sent).await.expect("a write"), 1);
        let mut fds = Descriptors::default();
        let mut data = [0; 1];
        let mut bufs = [IoSliceMut::new(&mut data)];
        within(far.readv_full(&mut bufs, Some(&mut fds), flags)).await.expect("a read");
        let mode = fcntl_getfl(fds.take().expect("a descriptor")).expect("a mode");
        assert_eq!(mode.contains(OFlags::NONBLOCK), !is_blocking);
    }
}

#[tokio::test]
async fn tcp_passes_none() {
    let ends = crate::common::tcp_ends(&Default::default()).await;
    let (mut near, mut far) = (ends.near, ends.far);
    let marked = Marked::new();
    let bufs = [IoSlice::new(b"x")];
    let fds = [marked.file.as_fd()];
    let refused = within(near.writev_full(&bufs, &fds, WriteFlags::empty())).await.expect_err("TCP has none");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Unsupported));
    let refused = receive(&mut far, &mut Descriptors::default(), 1).await.expect_err("TCP has none");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Unsupported));
}

/// The kernel cuts the message when this process may open no more: all that came through are closed.
#[test]
fn a_process_with_no_descriptors_left_gets_an_error_and_leaks_none() {
    if !is_alone("descriptors::a_process_with_no_descriptors_left_gets_an_error_and_leaks_none") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (mut near, mut far) = Socket::pair().expect("a pair");
        let marked = Marked::new();
        send(&mut near, &marked, 100, b"hundred").await;
        let before = getrlimit(Resource::Nofile);
        let used = std::fs::read_dir("/proc/self/fd").expect("a list").count() as u64;
        setrlimit(Resource::Nofile, Rlimit { current: Some(used + 20), ..before }).expect("a limit");
        let mut fds = Descriptors::default();
        let refused = receive(&mut far, &mut fds, 100).await.expect_err("there is no room for them");
        setrlimit(Resource::Nofile, before).expect("a limit");
        assert_eq!(kind_of(&refused), Some(ErrorKind::TooManyDescriptors), "{refused}");
        assert!(fds.is_empty());
        assert_eq!(marked.count(), 1);
        assert_eq!(receive(&mut far, &mut fds, 100).await.expect("the bytes"), b"hundred");
    });
}
