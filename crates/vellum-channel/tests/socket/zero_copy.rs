//! Sends without copying. Over loopback the kernel copies all the same, and says so.

use crate::common::{Ends, is_alone, tcp_ends, within};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_channel::{
    Channel, ChannelExt, ErrorKind, Features, Interest, Shutdown, Socket, SocketOptions, WriteFlags,
    ZeroCopy, kind_of,
};

fn asked() -> SocketOptions {
    SocketOptions { zero_copy: true, send_buffer: Some(256 * 1024), ..SocketOptions::default() }
}

async fn ends() -> Ends {
    let ends = tcp_ends(&asked()).await;
    assert!(ends.near.features().contains(Features::ZERO_COPY));
    assert!(ends.far.features().contains(Features::ZERO_COPY), "accepted ones have it too");
    ends
}

/// Polls for some time, and tells how often that was.
async fn polls_within(time: Duration, operation: impl Future) -> Result<(), usize> {
    let mut operation = pin!(operation);
    let mut polls = 0;
    let counted = poll_fn(|cx| {
        polls += 1;
        operation.as_mut().poll(cx).map(drop)
    });
    match tokio::time::timeout(time, counted).await {
        Ok(()) => Ok(()),
        Err(_) => Err(polls),
    }
}

/// Sends without a copy until the kernel takes no more; tells how much it took.
async fn fill(channel: &mut Socket, data: &[u8]) -> usize {
    channel.set_blocking(false);
    let mut sent = 0;
    // The kernel takes a little more than what it calls writable, and the peer's kernel takes some off it after a while.
    let mut refused = 0;
    while refused < 3 {
        match within(channel.writev_full(&[IoSlice::new(data)], &[], WriteFlags::ZERO_COPY)).await {
            Ok(count) => {
                sent += count;
                refused = 0;
            }
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                let _ =
                    tokio::time::timeout(Duration::from_millis(100), channel.ready(Interest::WRITE)).await;
                refused += 1;
            }
        }
    }
    channel.set_blocking(true);
    sent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_arrives_and_the_flush_tells_that_it_was_copied() {
    let Ends { mut near, mut far, .. } = ends().await;
    assert_eq!(within(near.flush_zero_copy()).await.expect("a flush"), ZeroCopy::Sent, "there was none");
    for round in 0..3_u8 {
        let data: Vec<u8> = (0..5_000_000_usize).map(|at| (at / 11) as u8 ^ round).collect();
        let expected = data.clone();
        let reader = tokio::spawn(async move {
            let mut got = vec![0; expected.len()];
            far.read_all(&mut got).await.expect("a read");
            assert!(got == expected);
            far
        });
        let slices: Vec<_> = data.chunks(100_000).map(IoSlice::new).collect();
        within(near.writev_full_all(&slices, &[], WriteFlags::ZERO_COPY)).await.expect("a write");
        assert_eq!(within(near.flush_zero_copy()).await.expect("a flush"), ZeroCopy::Copied);
        assert_eq!(within(near.flush_zero_copy()).await.expect("a flush"), ZeroCopy::Sent, "none since");
        far = within(reader).await.expect("the reader");
    }
}

#[tokio::test]
async fn a_flush_waits_for_a_peer_that_does_not_read_without_keeping_a_processor_busy() {
    let Ends { mut near, mut far, .. } = ends().await;
    let data = vec![3; 1_000_000];
    let sent = fill(&mut near, &data).await;
    let waited = polls_within(Duration::from_millis(300), near.flush_zero_copy()).await;
    assert!(matches!(waited, Err(1..=10)), "polls: {waited:?}");
    // A writer waits in the same way though the error queue has had news.
    let bufs = [IoSlice::new(&data)];
    let waited =
        polls_within(Duration::from_millis(300), near.writev_full(&bufs, &[], WriteFlags::ZERO_COPY)).await;
    assert!(matches!(waited, Err(1..=10)), "polls: {waited:?}");
    let waited = polls_within(Duration::from_millis(300), near.write(&data)).await;
    assert!(matches!(waited, Err(1..=10)), "polls: {waited:?}");
    let both = Interest::READ | Interest::WRITE;
    let waited = polls_within(Duration::from_millis(300), near.ready(both)).await;
    assert!(matches!(waited, Err(1..=10)), "polls: {waited:?}");
    // The peer reads at last.
    let reader = tokio::spawn(async move {
        let mut got = vec![0; sent];
        far.read_all(&mut got).await.expect("a read");
        far
    });
    assert_eq!(within(near.flush_zero_copy()).await.expect("a flush"), ZeroCopy::Copied);
    assert_eq!(within(near.ready(both)).await.expect("a state"), Interest::WRITE);
    let mut far = within(reader).await.expect("the reader");
    // And it goes on as before, with copies and without.
    within(near.write_all(b"copied, ")).await.expect("a write");
    let bufs = [IoSlice::new(b"not copied")];
    within(near.writev_full_all(&bufs, &[], WriteFlags::ZERO_COPY)).await.expect("a write");
    let mut got = [0; 18];
    within(far.read_all(&mut got)).await.expect("a read");
    assert_eq!(&got, b"copied, not copied");
}

/// Tokio takes news in the error queue for the end of writing, which it believes for good.
#[tokio::test]
async fn a_full_socket_with_news_of_sends_does_not_keep_a_processor_busy() {
    let Ends { mut near, mut far, .. } = ends().await;
    let data = vec![5; 100_000];
    let bufs = [IoSlice::new(&data)];
    let mut got = vec![0; data.len()];
    let writing = near.writev_full_all(&bufs, &[], WriteFlags::ZERO_COPY);
    let (written, read) = within(async { tokio::join!(writing, far.read_all(&mut got)) }).await;
    written.expect("a write");
    read.expect("a read");
    // The executor looks at the socket while nobody has taken the news.
    tokio::time::sleep(Duration::from_millis(50)).await;
    for _ in 0..3 {
        while tokio::time::timeout(Duration::from_millis(100), near.write_all(&data)).await.is_ok() {}
    }
    let waited = polls_within(Duration::from_millis(300), near.write(&data)).await;
    assert!(matches!(waited, Err(1..=10)), "polls: {waited:?}");
    let waited = polls_within(Duration::from_millis(300), near.ready(Interest::WRITE)).await;
    assert!(matches!(waited, Err(1..=10)), "polls: {waited:?}");
}

#[tokio::test]
async fn news_of_sends_is_nothing_to_read() {
    let Ends { mut near, mut far, .. } = ends().await;
    for _ in 0..3 {
        let bufs = [IoSlice::new(&[5; 100_000])];
        let mut got = vec![0; 100_000];
        let writing = near.writev_full_all(&bufs, &[], WriteFlags::ZERO_COPY);
        let (written, read) = within(async { tokio::join!(writing, far.read_all(&mut got)) }).await;
        written.expect("a write");
        read.expect("a read");
        // The error queue has entries now, which nobody has taken.
        let waited = polls_within(Duration::from_millis(100), near.ready(Interest::READ)).await;
        assert!(matches!(waited, Err(1..=10)), "polls: {waited:?}");
        let waited = polls_within(Duration::from_millis(100), near.read(&mut [0; 1])).await;
        assert!(matches!(waited, Err(1..=10)), "polls: {waited:?}");
    }
    // Something to read is.
    let waiting = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        far.write_all(b"x").await.expect("a write");
    };
    let (state, ()) = within(async { tokio::join!(near.ready(Interest::READ), waiting) }).await;
    assert_eq!(state.expect("a state"), Interest::READ);
    assert_eq!(within(near.read(&mut [0; 4])).await.expect("a read"), 1);
}

#[tokio::test]
async fn closing_waits_for_the_pages() {
    let Ends { mut near, mut far, .. } = ends().await;
    let data = vec![3; 1_000_000];
    let sent = fill(&mut near, &data).await;
    assert!(polls_within(Duration::from_millis(100), near.close()).await.is_err(), "nobody has read");
    let reader = tokio::spawn(async move {
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.expect("a read");
        got.len()
    });
    within(near.close()).await.expect("closed");
    assert_eq!(within(reader).await.expect("the reader"), sent);
}

#[tokio::test]
async fn a_peer_that_vanishes_ends_the_flush() {
    let Ends { mut near, far, .. } = ends().await;
    let data = vec![3; 1_000_000];
    fill(&mut near, &data).await;
    drop(far);
    within(near.flush_zero_copy()).await.expect("the kernel let go of the pages");
    let gone = within(near.write_all(&data)).await.expect_err("nobody is there");
    assert!(matches!(gone.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe), "{gone}");
    within(near.close()).await.expect("closed");
}

#[tokio::test]
async fn a_shutdown_wakes_a_waiting_writer() {
    let Ends { mut near, far, .. } = ends().await;
    let data = vec![3; 1_000_000];
    fill(&mut near, &data).await;
    let control = near.control();
    let waiting = tokio::spawn(async move {
        let bufs = [IoSlice::new(&data)];
        let written = near.writev_full_all(&bufs, &[], WriteFlags::ZERO_COPY).await;
        written.expect_err("ended")
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    control.shutdown(Shutdown::Write).expect("a shutdown");
    assert_eq!(within(waiting).await.expect("the writer").kind(), io::ErrorKind::BrokenPipe);
    drop(far);
}

#[tokio::test]
async fn who_did_not_ask_does_not_get_it() {
    let Ends { mut near, .. } = tcp_ends(&SocketOptions::default()).await;
    assert!(!near.features().contains(Features::ZERO_COPY));
    let bufs = [IoSlice::new(b"x")];
    let refused =
        within(near.writev_full(&bufs, &[], WriteFlags::ZERO_COPY)).await.expect_err("not asked for");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Unsupported));
    near.set_options(&asked()).expect("later is early enough");
    assert!(near.features().contains(Features::ZERO_COPY));
    assert_eq!(within(near.writev_full(&bufs, &[], WriteFlags::ZERO_COPY)).await.expect("a write"), 1);
    let (mut unix, _far) = Socket::pair().expect("a pair");
    unix.set_options(&asked()).expect("ignored");
    assert!(!unix.features().contains(Features::ZERO_COPY));
}

#[test]
fn it_moves_to_another_executor_with_sends_in_flight() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let (first, second) = (runtime().expect("a runtime"), runtime().expect("a runtime"));
    let Ends { mut near, mut far, .. } = first.block_on(ends());
    let data = vec![3; 1_000_000];
    let sent = first.block_on(fill(&mut near, &data));
    near.detach().expect("it can move");
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    let Poll::Ready(Err(refused)) = near.poll_flush_zero_copy(&mut cx) else {
        panic!("it would have to wait")
    };
    assert_eq!(kind_of(&refused), Some(ErrorKind::Detached));
    near.attach(second.handle()).expect("it can move");
    let reader = first.spawn(async move {
        let mut got = vec![0; sent];
        far.read_all(&mut got).await.expect("a read");
        far
    });
    assert_eq!(second.block_on(within(near.flush_zero_copy())).expect("a flush"), ZeroCopy::Copied);
    drop(first.block_on(within(reader)).expect("the reader"));
}

/// The limit, and the right to do without it, are of the whole process.
#[test]
fn without_memory_to_lock_the_error_says_so_and_copies_go_on() {
    if !is_alone("zero_copy::without_memory_to_lock_the_error_says_so_and_copies_go_on") {
        return;
    }
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Memlock, none).expect("a limit");
    // SAFETY: it takes a number. Who is not root has no right to more memory anyway.
    let _ = unsafe { libc::setuid(65534) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let Ends { mut near, mut far, .. } = ends().await;
        let data = vec![5; 100_000];
        let bufs = [IoSlice::new(&data)];
        let refused =
            within(near.writev_full(&bufs, &[], WriteFlags::ZERO_COPY)).await.expect_err("no memory");
        assert_eq!(kind_of(&refused), Some(ErrorKind::ZeroCopyMemory), "{refused}");
        assert_eq!(within(near.flush_zero_copy()).await.expect("a flush"), ZeroCopy::Sent, "there was none");
        within(near.write_all(b"copied")).await.expect("a write");
        let mut got = [0; 6];
        within(far.read_all(&mut got)).await.expect("a read");
        assert_eq!(&got, b"copied");
    });
}
