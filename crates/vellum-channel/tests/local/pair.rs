//! `Pair`.

use crate::common::{
    assert_io_kind, assert_kind, noise, poll_once_and_drop, read_to_end, receive, send, within, write,
};
use proptest::prelude::*;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use vellum_channel::{
    Channel, ChannelExt, Descriptors, ErrorKind, Features, Interest, Pair, ReadFlags, Shutdown, WriteFlags,
};

fn on_a_thread<T: Send + 'static>(
    future: impl Future<Output = T> + Send + 'static,
) -> std::thread::JoinHandle<T> {
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(within(future))
    })
}

#[test]
fn both_modes_between_threads_with_an_executor_each() {
    for is_blocking in [true, false] {
        let (mut near, mut far) = Pair::with_capacity(10_000);
        let sending = on_a_thread(async move {
            send(&mut near, is_blocking).await.expect("sent");
            receive(&mut near, is_blocking).await.expect("received");
        });
        let receiving = on_a_thread(async move {
            receive(&mut far, is_blocking).await.expect("received");
            send(&mut far, is_blocking).await.expect("sent");
        });
        sending.join().expect("no panic");
        receiving.join().expect("no panic");
    }
}

#[test]
fn a_hundred_megabytes_between_threads() {
    const BLOCK: usize = 1_000_000;
    let (mut near, mut far) = Pair::new();
    let begun = Instant::now();
    let sending = on_a_thread(async move {
        let block = noise(BLOCK);
        for _ in 0..100 {
            write(&mut near, &block).await.expect("sent");
        }
    });
    let receiving = on_a_thread(async move {
        let (expected, mut block) = (noise(BLOCK), vec![0; BLOCK]);
        let mut blocks = 0;
        while far.read_all_eof(&mut block).await.expect("received") {
            assert!(block == expected, "block {blocks} differs");
            blocks += 1;
        }
        blocks
    });
    sending.join().expect("no panic");
    assert_eq!(receiving.join().expect("no panic"), 100);
    println!("pair: 100 MB between threads in {:?}", begun.elapsed());
}

#[tokio::test]
async fn each_direction_ends_by_itself() {
    let (mut near, mut far) = Pair::new();
    assert!(near.features().contains(Features::SHUTDOWN));
    write(&mut near, b"request").await.expect("sent");
    near.shut_down(Shutdown::Write).expect("shut down");
    assert_io_kind(write(&mut near, b"more").await, std::io::ErrorKind::BrokenPipe);
    assert_eq!(read_to_end(&mut far).await.expect("received"), b"request");
    write(&mut far, b"answer").await.expect("the other direction goes on");
    far.shutdown().await.expect("Tokio's shutdown");
    assert_eq!(read_to_end(&mut near).await.expect("received"), b"answer");
}

#[tokio::test]
async fn a_reader_that_has_enough_breaks_the_pipe() {
    let (mut near, mut far) = Pair::new();
    write(&mut near, b"unread").await.expect("sent");
    far.shut_down(Shutdown::Read).expect("shut down");
    assert_eq!(read_to_end(&mut far).await.expect("the end"), b"");
    assert_io_kind(write(&mut near, b"more").await, std::io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn an_end_that_is_gone_is_an_end_of_the_stream() {
    let (mut near, mut far) = Pair::new();
    write(&mut near, b"last words").await.expect("sent");
    drop(near);
    assert_io_kind(write(&mut far, b"x").await, std::io::ErrorKind::BrokenPipe);
    assert_eq!(read_to_end(&mut far).await.expect("received"), b"last words");
    far.close().await.expect("closed");
    far.close().await.expect("closed twice");
    assert_kind(read_to_end(&mut far).await, ErrorKind::Closed);
    assert_kind(far.control().shutdown(Shutdown::Both), ErrorKind::Closed);
}

#[tokio::test]
async fn a_shutdown_from_another_thread_wakes_who_waits() {
    let (mut near, mut far) = Pair::with_capacity(3);
    let control = near.control();
    let reading = tokio::spawn(async move { read_to_end(&mut near).await.map(|read| (read, near)) });
    tokio::time::sleep(Duration::from_millis(20)).await;
    std::thread::spawn(move || control.shutdown(Shutdown::Read))
        .join()
        .expect("no panic")
        .expect("shut down");
    let (read, _near) = within(reading).await.expect("no panic").expect("the end");
    assert!(read.is_empty());

    assert_io_kind(write(&mut far, b"x").await, std::io::ErrorKind::BrokenPipe);
    let (mut near, far) = Pair::with_capacity(3);
    let control = far.control();
    let writing = tokio::spawn(async move { write(&mut near, b"too much").await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    std::thread::spawn(move || control.shutdown(Shutdown::Read))
        .join()
        .expect("no panic")
        .expect("shut down");
    assert_io_kind(within(writing).await.expect("no panic"), std::io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn readiness_follows_bytes_and_room() {
    let (mut near, mut far) = Pair::with_capacity(4);
    let both = Interest::READ | Interest::WRITE;
    assert_eq!(near.ready(both).await.expect("ready"), Interest::WRITE);
    assert!(poll_once_and_drop(far.ready(Interest::READ)).await.is_none());
    near.set_blocking(false);
    assert_eq!(near.writev(&[IoSlice::new(b"12345")]).await.expect("four fit"), 4);
    assert_io_kind(near.writev(&[IoSlice::new(b"5")]).await, std::io::ErrorKind::WouldBlock);
    assert_eq!(far.ready(both).await.expect("ready"), both);
    let waiting = tokio::spawn(async move { near.ready(Interest::WRITE).await.map(|_| near) });
    tokio::task::yield_now().await;
    far.read_all(&mut [0; 1]).await.expect("read");
    within(waiting).await.expect("no panic").expect("ready");
}

#[tokio::test]
async fn a_peek_leaves_the_bytes() {
    let (mut near, mut far) = Pair::new();
    write(&mut near, b"abc").await.expect("sent");
    let mut seen = [0; 5];
    for _ in 0..2 {
        assert_eq!(far.peek(&mut seen).await.expect("seen"), 3);
        assert_eq!(&seen[..3], b"abc");
    }
    far.read_all(&mut seen[..3]).await.expect("read");
    far.set_blocking(false);
    assert_io_kind(far.peek(&mut seen).await, std::io::ErrorKind::WouldBlock);
}

#[tokio::test]
async fn descriptors_come_with_their_byte() {
    let (mut near, mut far) = Pair::new();
    let (mut out, into) = std::io::pipe().expect("a pipe");
    write(&mut near, b"before").await.expect("sent");
    let fds = [into.as_fd(), into.as_fd(), into.as_fd()];
    near.writev_full_all(&[IoSlice::new(b"with")], &fds, WriteFlags::empty()).await.expect("sent");
    drop(into);
    let mut bytes = [0; 32];
    let mut received = Descriptors::default();
    let bufs = &mut [IoSliceMut::new(&mut bytes)];
    let read = far.readv_full(bufs, Some(&mut received), ReadFlags::empty()).await.expect("read");
    assert_eq!((read, received.len()), (6, 0), "a read ends before descriptors");
    assert_eq!(far.peek(&mut [0; 2]).await.expect("a peek leaves them"), 2);
    let bufs = &mut [IoSliceMut::new(&mut bytes)];
    let read = far.readv_full(bufs, Some(&mut received), ReadFlags::empty()).await.expect("read");
    assert_eq!((&bytes[..read], received.len()), (&b"with"[..], 3));
    for fd in received.drain() {
        std::io::PipeWriter::from(fd).write_all(b"x").expect("the same pipe");
    }
    let mut all = String::new();
    out.read_to_string(&mut all).expect("ends: no duplicate is left");
    assert_eq!(all, "xxx");
}

/// A pipe shows by its end that no duplicate of its writer is left anywhere.
#[tokio::test]
async fn descriptors_that_nobody_takes_are_closed() {
    for how in 0..4 {
        let (mut near, mut far) = Pair::new();
        let (mut out, into) = std::io::pipe().expect("a pipe");
        let fds = vec![into.as_fd(); 200];
        near.writev_full_all(&[IoSlice::new(b"abc")], &fds, WriteFlags::empty()).await.expect("sent");
        drop(fds);
        drop(into);
        match how {
            0 => far.read_all(&mut [0; 3]).await.expect("read without taking them"),
            1 => far.shut_down(Shutdown::Read).expect("shut down"),
            2 => drop(far),
            _ => {
                let mut few = Descriptors::with_limit(10);
                let bytes = &mut [0; 3];
                let bufs = &mut [IoSliceMut::new(bytes)];
                let refused = far.readv_full(bufs, Some(&mut few), ReadFlags::empty()).await;
                assert_kind(refused, ErrorKind::TooManyDescriptors);
                far.read_all(bytes).await.expect("the bytes are still there");
                assert_eq!(bytes, b"abc");
            }
        }
        let ended = tokio::task::spawn_blocking(move || out.read(&mut [0]).expect("reads"));
        assert_eq!(within(ended).await.expect("no panic"), 0, "case {how}");
    }
}

#[tokio::test]
async fn descriptors_are_bounded_and_blocking() {
    let (mut near, mut far) = Pair::new();
    let null = std::fs::File::open("/dev/null").expect("a file");
    let many = vec![null.as_fd(); 254];
    let message = [IoSlice::new(b"x")];
    assert_kind(near.writev_full(&message, &many, WriteFlags::empty()).await, ErrorKind::TooManyDescriptors);
    near.set_blocking(false);
    let mut sent = 0;
    let full = loop {
        match near.writev_full(&message, &many[..200], WriteFlags::empty()).await {
            Ok(_) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 100, "descriptors pile up without end");
    };
    assert_eq!((full.kind(), sent), (std::io::ErrorKind::WouldBlock, 5));
    far.read_all(&mut [0; 1]).await.expect("makes room");
    near.writev_full(&message, &many[..200], WriteFlags::empty()).await.expect("room again");

    let (mut near, mut far) = Pair::new();
    let (out, _into) = std::io::pipe().expect("a pipe");
    rustix::io::ioctl_fionbio(&out, true).expect("non-blocking");
    for flags in [ReadFlags::KEEP_DESCRIPTOR_MODE, ReadFlags::empty()] {
        near.writev_full(&message, &[out.as_fd()], WriteFlags::empty()).await.expect("sent");
        let mut received = Descriptors::default();
        let bytes = &mut [0];
        far.readv_full(&mut [IoSliceMut::new(bytes)], Some(&mut received), flags).await.expect("read");
        let fd = received.take().expect("one came");
        let mode = rustix::fs::fcntl_getfl(&fd).expect("its mode");
        let is_kept = flags.contains(ReadFlags::KEEP_DESCRIPTOR_MODE);
        assert_eq!(mode.contains(rustix::fs::OFlags::NONBLOCK), is_kept);
        let own = rustix::io::fcntl_getfd(&fd).expect("its flags");
        assert!(own.contains(rustix::io::FdFlags::CLOEXEC));
    }
}

#[tokio::test]
async fn a_dropped_write_says_what_it_sent() {
    let (mut near, mut far) = Pair::with_capacity(100);
    let data = noise(1000);
    let slices = [IoSlice::new(&data)];
    let mut sent = 0;
    let mut got = Vec::new();
    while sent < data.len() {
        let rest = [IoSlice::new(&slices[0][sent..])];
        let mut writing = near.writev_all(&rest);
        poll_once_and_drop(&mut writing).await;
        sent += writing.transferred();
        // Reads, too, are dropped midway.
        let mut room = [0; 64];
        let mut reading = far.read_all(&mut room);
        poll_once_and_drop(&mut reading).await;
        let count = reading.transferred();
        got.extend_from_slice(&room[..count]);
    }
    drop(near);
    got.extend(read_to_end(&mut far).await.expect("the rest"));
    assert!(got == data, "bytes were lost or doubled");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn all_bytes_come_in_order(
        capacity in 1_usize..300,
        writes in proptest::collection::vec(0_usize..500, 1..20),
        reads in proptest::collection::vec(1_usize..700, 1..20),
    ) {
        let data = noise(writes.iter().sum());
        let expected = data.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let got = runtime.block_on(within(async move {
            let (mut near, mut far) = Pair::with_capacity(capacity);
            let writing = tokio::spawn(async move {
                let mut rest = data.as_slice();
                for count in writes {
                    let (part, later) = rest.split_at(count);
                    let (one, two) = part.split_at(count / 3);
                    near.writev_all(&[IoSlice::new(one), IoSlice::new(two)]).await.expect("sent");
                    rest = later;
                }
            });
            let mut got = Vec::new();
            for count in reads.iter().cycle() {
                let mut one = vec![0; count / 2];
                let mut two = vec![0; count - count / 2];
                let bufs = &mut [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
                let read = far.readv(bufs).await.expect("read");
                if read == 0 {
                    break;
                }
                one.extend(two);
                got.extend_from_slice(&one[..read]);
            }
            writing.await.expect("no panic");
            got
        }));
        prop_assert!(got == expected);
    }
}
