//! How connections end.

use crate::common::{Ends, all_ends, small_buffers, tcp_ends, within};
use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_channel::{
    Channel, ChannelExt, ErrorKind, Interest, ReadFlags, Shutdown, Socket, SocketOptions, WriteFlags, kind_of,
};

/// Ends of every kind, pairs among them.
async fn everything(options: &SocketOptions) -> Vec<(Socket, Socket)> {
    let mut all: Vec<_> = all_ends(options).await.into_iter().map(|ends| (ends.near, ends.far)).collect();
    let (mut near, mut far) = Socket::pair().expect("a pair");
    near.set_options(options).expect("options");
    far.set_options(options).expect("options");
    all.push((near, far));
    all
}

/// Writes until the kernel takes no more.
async fn fill(channel: &mut Socket) {
    let data = vec![1; 1_000_000];
    loop {
        let writing = channel.write_all(&data);
        if tokio::time::timeout(Duration::from_millis(200), writing).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn half_closed_it_goes_on_the_other_way() {
    for (mut near, mut far) in everything(&SocketOptions::default()).await {
        within(near.write_all(b"request")).await.expect("a write");
        within(near.shutdown()).await.expect("an end");
        let mut got = Vec::new();
        within(far.read_to_end(&mut got)).await.expect("a read");
        assert_eq!(got, b"request");
        assert!(!within(far.read_all_eof(&mut [0; 4])).await.expect("the end"));
        within(far.write_all(b"answer")).await.expect("a write");
        drop(far);
        got.clear();
        within(near.read_to_end(&mut got)).await.expect("a read");
        assert_eq!(got, b"answer");
        let refused = within(near.write_all(b"more")).await.expect_err("writing was ended");
        assert_eq!(refused.kind(), io::ErrorKind::BrokenPipe);
    }
}

#[tokio::test]
async fn the_end_after_the_first_byte_is_an_error() {
    for (mut near, mut far) in everything(&SocketOptions::default()).await {
        within(near.write_all(b"abc")).await.expect("a write");
        drop(near);
        let mut got = [0; 8];
        let mut reading = far.read_all_eof(&mut got);
        let cut = within(&mut reading).await.expect_err("five bytes are missing");
        assert_eq!(kind_of(&cut), Some(ErrorKind::UnexpectedEof));
        assert_eq!(reading.transferred(), 3);
        assert!(!within(far.read_all_eof(&mut got)).await.expect("the end"));
    }
}

#[tokio::test]
async fn a_peer_that_vanishes_is_an_error_for_those_who_wait_and_those_who_write() {
    let Ends { near, mut far, .. } = tcp_ends(&SocketOptions::default()).await;
    let waiting = tokio::spawn(async move {
        let result = far.read(&mut [0; 8]).await;
        (far, result)
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    socket2::SockRef::from(&near.fd().expect("open")).set_linger(Some(Duration::ZERO)).expect("an option");
    drop(near);
    let (mut far, result) = within(waiting).await.expect("the reader");
    assert_eq!(result.expect_err("a reset").kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(within(far.write(b"x")).await.expect_err("gone").kind(), io::ErrorKind::BrokenPipe);
    far.shut_down(Shutdown::Both).expect("not connected any more is no error");
    within(far.close()).await.expect("closed");

    for (near, mut far) in everything(&small_buffers()).await {
        fill(&mut far).await;
        let waiting = tokio::spawn(async move { far.write_all(&[1; 1_000_000]).await });
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(near);
        let gone = within(waiting).await.expect("the writer").expect_err("nobody reads");
        assert!(matches!(gone.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe), "{gone}");
    }
}

#[tokio::test]
async fn a_shutdown_from_another_task_wakes_a_waiting_reader() {
    for how in [Shutdown::Read, Shutdown::Both] {
        for (near, mut far) in everything(&SocketOptions::default()).await {
            let control = far.control();
            let waiting = tokio::spawn(async move {
                let read = far.read(&mut [0; 8]).await;
                (far, read)
            });
            tokio::time::sleep(Duration::from_millis(20)).await;
            std::thread::spawn(move || control.shutdown(how)).join().expect("a thread").expect("a shutdown");
            let (mut far, read) = within(waiting).await.expect("the reader");
            assert_eq!(read.expect("the end"), 0, "{how:?}");
            assert_eq!(within(far.ready(Interest::READ)).await.expect("a state"), Interest::READ);
            drop(near);
        }
    }
}

/// What a peer sends later is not read, though the kernel of TCP would give it.
#[tokio::test]
async fn after_a_shutdown_of_reading_nothing_more_is_read() {
    for (mut near, mut far) in everything(&SocketOptions::default()).await {
        far.shut_down(Shutdown::Read).expect("a shutdown");
        let _ = within(near.write(b"late")).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
        let mut got = [0; 8];
        assert_eq!(within(far.read(&mut got)).await.expect("the end"), 0);
        assert_eq!(within(far.readv(&mut [IoSliceMut::new(&mut got)])).await.expect("the end"), 0);
        within(far.write_all(b"still")).await.expect("a write");
        within(near.read_all(&mut got[..5])).await.expect("a read");
    }
}

#[tokio::test]
async fn a_shutdown_from_another_task_wakes_a_waiting_writer() {
    for how in [Shutdown::Write, Shutdown::Both] {
        for (near, mut far) in everything(&small_buffers()).await {
            let control = far.control();
            fill(&mut far).await;
            let waiting = tokio::spawn(async move {
                let written = far.write_all(&[1; 1_000_000]).await;
                (far, written)
            });
            tokio::time::sleep(Duration::from_millis(20)).await;
            control.shutdown(how).expect("a shutdown");
            let (mut far, written) = within(waiting).await.expect("the writer");
            assert_eq!(written.expect_err("ended").kind(), io::ErrorKind::BrokenPipe, "{how:?}");
            assert_eq!(within(far.ready(Interest::WRITE)).await.expect("a state"), Interest::WRITE);
            drop(near);
        }
        for (near, mut far) in everything(&small_buffers()).await {
            let control = far.control();
            fill(&mut far).await;
            let waiting = tokio::spawn(async move { far.ready(Interest::WRITE).await });
            tokio::time::sleep(Duration::from_millis(20)).await;
            control.shutdown(how).expect("a shutdown");
            let state = within(waiting).await.expect("the writer").expect("a state");
            assert_eq!(state, Interest::WRITE, "{how:?}");
            drop(near);
        }
    }
}

#[tokio::test]
async fn closed_it_says_so_and_twice_is_once() {
    for (mut near, mut far) in everything(&SocketOptions::default()).await {
        let control = near.control();
        within(near.write_all(b"last")).await.expect("a write");
        within(near.close()).await.expect("closed");
        within(near.close()).await.expect("closed before");
        let mut got = Vec::new();
        within(far.read_to_end(&mut got)).await.expect("a read");
        assert_eq!(got, b"last");
        let mut room = [0; 4];
        let mut bufs = [IoSliceMut::new(&mut room)];
        let data = [IoSlice::new(b"x")];
        let refused = [
            within(near.readv(&mut bufs)).await.map(drop),
            within(near.readv(&mut [])).await.map(drop),
            within(near.writev(&data)).await.map(drop),
            within(near.writev(&[])).await.map(drop),
            within(near.read(&mut [0; 4])).await.map(drop),
            within(near.flush()).await,
            within(near.shutdown()).await,
            within(near.ready(Interest::READ | Interest::WRITE)).await.map(drop),
            within(near.flush_zero_copy()).await.map(drop),
            near.local_endpoint().map(drop),
            near.peer_endpoint().map(drop),
            near.fd().map(drop),
            near.detach(),
            near.attach(&tokio::runtime::Handle::current()),
            control.shutdown(Shutdown::Both),
        ];
        for (index, result) in refused.into_iter().enumerate() {
            let refused = result.expect_err("it is closed");
            assert_eq!(kind_of(&refused), Some(ErrorKind::Closed), "{index}: {refused}");
        }
        control.set_delay(true);
        control.set_cork(true);
    }
}

/// A waiting task is polled when there is something to do, not all the time.
#[tokio::test]
async fn those_who_wait_do_not_keep_a_processor_busy() {
    for (near, far) in everything(&small_buffers()).await {
        let (mut near, mut far) = (near, far);
        fill(&mut near).await;
        let polls = Arc::new(AtomicUsize::new(0));
        let counting = polls.clone();
        let data = [IoSlice::new(&[1; 1000])];
        let writing = poll_fn(|cx| -> Poll<()> {
            counting.fetch_add(1, Ordering::Relaxed);
            let _ = near.poll_writev(cx, &data, &[], WriteFlags::empty());
            Poll::Pending
        });
        let mut room = [0; 10];
        let reading = poll_fn(|cx| -> Poll<()> {
            // One read, then it waits at an end that stays open.
            let _ = far.poll_readv(cx, &mut [IoSliceMut::new(&mut room)], None, ReadFlags::empty());
            Poll::Pending
        });
        let both = async { tokio::join!(writing, reading) };
        assert!(tokio::time::timeout(Duration::from_millis(200), both).await.is_err());
        let polls = polls.load(Ordering::Relaxed);
        assert!(polls < 20, "{} polls in 0.2 s on a {}", polls, near.kind());
    }
}
