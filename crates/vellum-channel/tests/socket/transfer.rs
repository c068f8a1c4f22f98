//! Bytes from one end to the other.

use crate::common::{Ends, all_ends, small_buffers, tcp_ends, within};
use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut};
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vellum_channel::{
    Blocking, Channel, ChannelExt, Endpoint, ErrorKind, Features, Interest, KeepAlive, ReadFlags, Socket,
    SocketOptions, WriteFlags, kind_of,
};

const CHUNKS: usize = 250;
const CHUNK: usize = 4194;

fn chunks() -> Vec<Vec<u8>> {
    (0..CHUNKS).map(|index| vec![index as u8; CHUNK]).collect()
}

async fn write_chunks(mut channel: Socket) -> Socket {
    let data = chunks();
    let slices: Vec<_> = data.iter().map(|chunk| IoSlice::new(chunk)).collect();
    within(channel.writev_all(&slices)).await.expect("a write");
    channel
}

async fn read_chunks(mut channel: Socket) -> Socket {
    let mut data = vec![vec![0; CHUNK]; CHUNKS];
    let mut slices: Vec<_> = data.iter_mut().map(|chunk| IoSliceMut::new(chunk)).collect();
    within(channel.readv_all(&mut slices)).await.expect("a read");
    assert!(data == chunks(), "what was read is not what was written");
    channel
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mebibyte_goes_through_in_slices_on_every_kind_and_mode() {
    for is_blocking in [true, false] {
        for Ends { mut near, mut far, listener, directory } in all_ends(&small_buffers()).await {
            assert!(near.features().contains(Features::SHUTDOWN | Features::PEEK));
            let is_unix = near.kind() == "unix";
            assert_eq!(near.features().contains(Features::DESCRIPTORS), is_unix);
            assert_eq!(far.features().contains(Features::DESCRIPTORS), is_unix);
            near.set_blocking(is_blocking);
            far.set_blocking(is_blocking);
            let reader = tokio::spawn(read_chunks(far));
            let near = write_chunks(near).await;
            let far = within(reader).await.expect("the reader");
            // And the other way.
            let reader = tokio::spawn(read_chunks(near));
            write_chunks(far).await;
            within(reader).await.expect("the reader");
            drop((listener, directory));
        }
    }
}

#[tokio::test]
async fn tokios_own_operations_work() {
    for Ends { mut near, mut far, .. } in all_ends(&small_buffers()).await {
        let sent: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
        let copy = sent.clone();
        let writer = tokio::spawn(async move {
            near.write_all(&copy).await.expect("a write");
            near.flush().await.expect("a flush");
            near.shutdown().await.expect("an end");
            near
        });
        let mut got = Vec::new();
        within(far.read_to_end(&mut got)).await.expect("a read");
        assert!(got == sent);
        drop(within(writer).await.expect("the writer"));
    }
}

#[tokio::test]
async fn more_slices_than_the_kernel_takes_and_empty_ones() {
    for Ends { mut near, mut far, .. } in all_ends(&SocketOptions::default()).await {
        let many = vec![IoSlice::new(b"ab"); 2000];
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(sent) = near.poll_writev(&mut cx, &many, &[], WriteFlags::empty()) else {
            panic!("there is room");
        };
        let sent = sent.expect("a write");
        assert!((1..=2048).contains(&sent), "{sent}");
        let mut got = vec![0; sent];
        within(far.read_all(&mut got)).await.expect("a read");
        assert!(got.chunks(2).all(|pair| b"ab".starts_with(pair)));

        assert_eq!(within(near.writev(&[IoSlice::new(b""), IoSlice::new(b"")])).await.expect("nothing"), 0);
        assert_eq!(within(far.readv(&mut [IoSliceMut::new(&mut [])])).await.expect("nothing"), 0);
        within(near.writev_all(&[IoSlice::new(b""), IoSlice::new(b"x"), IoSlice::new(b"")]))
            .await
            .expect("one");
        let mut got = [0; 4];
        let mut bufs = [IoSliceMut::new(&mut []), IoSliceMut::new(&mut got)];
        assert_eq!(within(far.readv(&mut bufs)).await.expect("one"), 1);
        assert_eq!(got[0], b'x');
    }
}

#[tokio::test]
async fn a_peek_leaves_the_bytes() {
    for Ends { mut near, mut far, .. } in all_ends(&SocketOptions::default()).await {
        within(near.write_all(b"seven b")).await.expect("a write");
        let mut got = [0; 16];
        for _ in 0..3 {
            assert_eq!(within(far.peek(&mut got)).await.expect("a peek"), 7);
            assert_eq!(&got[..7], b"seven b");
        }
        let mut few = [0; 3];
        assert_eq!(within(far.peek(&mut few)).await.expect("a peek"), 3);
        let mut first = [0; 2];
        let mut second = [0; 9];
        let mut bufs = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
        let peeked = within(far.readv_full(&mut bufs, None, ReadFlags::PEEK)).await.expect("a peek");
        assert_eq!((peeked, &first, &second[..5]), (7, b"se", &b"ven b"[..]));
        assert_eq!(within(far.read(&mut got)).await.expect("a read"), 7);
        far.set_blocking(false);
        let empty = within(far.peek(&mut got)).await.expect_err("nothing is left");
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        far.set_blocking(true);
        drop(near);
        assert_eq!(within(far.peek(&mut got)).await.expect("the end"), 0);
    }
}

#[tokio::test]
async fn non_blocking_operations_tell_the_state_of_now() {
    for Ends { mut near, mut far, .. } in all_ends(&small_buffers()).await {
        near.set_blocking(false);
        far.set_blocking(false);
        let data = vec![7; 100_000];
        let mut sent = 0;
        loop {
            match within(near.writev(&[IoSlice::new(&data)])).await {
                Ok(count) => sent += count,
                Err(error) => break assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        assert!(sent > 0);
        let mut cx = Context::from_waker(Waker::noop());
        // TCP may have more room at any time, when the peer's kernel takes what was sent.
        if near.kind() == "unix" {
            assert!(near.poll_ready(&mut cx, Interest::WRITE).is_pending(), "it is full");
        }
        assert_eq!(within(far.ready(Interest::READ)).await.expect("a state"), Interest::READ);
        let mut got = 0;
        let mut room = vec![0; 64 * 1024];
        while got < sent {
            match within(far.readv(&mut [IoSliceMut::new(&mut room)])).await {
                Ok(count) => got += count,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    within(far.ready(Interest::READ)).await.expect("a state");
                }
            }
        }
        assert_eq!(got, sent);
        assert_eq!(within(near.ready(Interest::WRITE)).await.expect("a state"), Interest::WRITE);
        assert!(far.poll_ready(&mut cx, Interest::READ).is_pending(), "it is empty");
        let both = within(far.ready(Interest::READ | Interest::WRITE)).await.expect("a state");
        assert_eq!(both, Interest::WRITE);
    }
}

/// Bar 4: what `transferred` tells when a write is dropped is what the peer gets.
#[tokio::test]
async fn a_dropped_write_has_told_how_far_it_was() {
    for Ends { mut near, mut far, .. } in all_ends(&small_buffers()).await {
        let data: Vec<u8> = (0..16_000_000_usize).map(|at| (at / 7) as u8).collect();
        let slices: Vec<_> = data.chunks(12_345).map(IoSlice::new).collect();
        let mut sending = near.writev_all(&slices);
        let mut got = Vec::new();
        // Some of it is read while it is written, then the writer is dropped while it waits.
        let mut room = vec![0; 30_000];
        for _ in 0..20 {
            tokio::select! {
                biased;
                _ = &mut sending => panic!("the kernel has no room for so much"),
                read = far.read(&mut room) => got.extend_from_slice(&room[..read.expect("a read")]),
            }
        }
        let sent = sending.transferred();
        drop(sending);
        drop(near);
        within(far.read_to_end(&mut got)).await.expect("the rest");
        assert_eq!(got.len(), sent);
        assert!(got == data[..sent]);
    }
}

#[tokio::test]
async fn a_dropped_read_has_told_what_it_got() {
    let Ends { mut near, mut far, .. } = tcp_ends(&SocketOptions::default()).await;
    let mut room = [0; 10];
    let mut reading = far.read_all(&mut room);
    within(near.write_all(b"four")).await.expect("a write");
    let waited = tokio::time::timeout(std::time::Duration::from_millis(200), &mut reading).await;
    assert!(waited.is_err(), "six bytes are missing");
    assert_eq!(reading.transferred(), 4);
    within(near.write_all(b"others")).await.expect("a write");
    let mut rest = [0; 6];
    within(far.read_all(&mut rest)).await.expect("a read");
    assert_eq!((&room[..4], &rest), (&b"four"[..], b"others"));
}

#[tokio::test]
async fn options_are_set_on_both_ends() {
    let options = SocketOptions {
        no_delay: true,
        keep_alive: Some(KeepAlive {
            idle: Some(std::time::Duration::from_secs(33)),
            interval: Some(std::time::Duration::from_secs(7)),
            count: Some(4),
        }),
        send_buffer: Some(32 * 1024),
        receive_buffer: Some(48 * 1024),
        user_timeout: Some(std::time::Duration::from_millis(12_345)),
        zero_copy: false,
    };
    let Ends { near, far, .. } = tcp_ends(&options).await;
    for end in [&near, &far] {
        let fd = end.fd().expect("open");
        let socket = socket2::SockRef::from(&fd);
        assert!(socket.tcp_nodelay().expect("an option"));
        assert!(socket.keepalive().expect("an option"));
        assert_eq!(socket.tcp_keepalive_time().expect("an option").as_secs(), 33);
        assert_eq!(socket.tcp_keepalive_interval().expect("an option").as_secs(), 7);
        assert_eq!(socket.tcp_keepalive_retries().expect("an option"), 4);
        assert_eq!(socket.tcp_user_timeout().expect("an option").map(|time| time.as_millis()), Some(12_345));
        assert_eq!(socket.send_buffer_size().expect("an option"), 64 * 1024, "the kernel doubles it");
        assert_eq!(socket.recv_buffer_size().expect("an option"), 96 * 1024);
        assert!(!end.features().contains(Features::ZERO_COPY), "nobody asked for it");
    }
    let mut near = near;
    near.set_delay(true);
    near.set_cork(true);
    let fd = near.fd().expect("open");
    let socket = socket2::SockRef::from(&fd);
    assert!(!socket.tcp_nodelay().expect("an option"));
    assert!(socket.tcp_cork().expect("an option"));
    near.set_cork(false);

    // What a kind does not have is ignored.
    let (mut end, _peer) = Socket::pair().expect("a pair");
    end.set_options(&options).expect("options");
    end.set_delay(false);
    end.set_cork(true);
    let fd = end.fd().expect("open");
    assert_eq!(socket2::SockRef::from(&fd).send_buffer_size().expect("an option"), 64 * 1024);
}

#[tokio::test]
async fn a_cork_holds_small_writes_back() {
    let Ends { mut near, mut far, .. } =
        tcp_ends(&SocketOptions { no_delay: true, ..Default::default() }).await;
    let control = near.control();
    control.set_cork(true);
    within(near.write_all(b"held")).await.expect("a write");
    let mut got = [0; 16];
    let early = tokio::time::timeout(std::time::Duration::from_millis(50), far.read(&mut got)).await;
    assert!(early.is_err(), "a corked write went out");
    control.set_cork(false);
    assert_eq!(within(far.read(&mut got)).await.expect("a read"), 4);
}

#[tokio::test]
async fn endpoints_and_the_peers_process() {
    for Ends { near, far, listener, directory } in all_ends(&SocketOptions::default()).await {
        let at = listener.local_endpoint().expect("an address");
        assert_eq!(near.peer_endpoint().expect("an address"), at);
        assert_eq!(far.local_endpoint().expect("an address"), at);
        assert_eq!(far.peer_endpoint().expect("an address"), near.local_endpoint().expect("an address"));
        if near.kind() == "unix" {
            assert_eq!(near.local_endpoint().expect("an address"), Endpoint::UnixUnnamed);
            for end in [&near, &far] {
                let process = end.peer_process().expect("a process");
                assert_eq!(process.pid, std::process::id());
                assert_eq!(process.uid, rustix::process::getuid().as_raw());
                assert_eq!(process.gid, rustix::process::getgid().as_raw());
            }
        } else {
            let refused = near.peer_process().expect_err("TCP has none");
            assert_eq!(kind_of(&refused), Some(ErrorKind::Unsupported));
        }
        drop(directory);
    }
}

#[tokio::test]
async fn a_name_shows_in_labels() {
    let (mut near, _far) = Socket::pair().expect("a pair");
    assert_eq!(near.label(), "unix channel");
    near.set_name("migration");
    assert_eq!(near.label(), "unix channel \"migration\"");
    let refused = within(near.writev_full(&[IoSlice::new(b"x")], &[], WriteFlags::ZERO_COPY)).await;
    let refused = refused.expect_err("Unix copies");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Unsupported));
    assert!(refused.to_string().contains("migration"), "{refused}");
    // The same, past the checks of `ChannelExt`.
    let sent = poll_fn(|cx| near.poll_writev(cx, &[IoSlice::new(b"x")], &[], WriteFlags::ZERO_COPY)).await;
    assert_eq!(kind_of(&sent.expect_err("Unix copies")), Some(ErrorKind::Unsupported));
}

/// QEMU's synchronous setup: a thread without an executor connects and talks.
#[test]
fn a_thread_connects() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let to = Endpoint::Ip(listener.local_addr().expect("an address"));
    let echo = std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().expect("a connection");
        let mut back = peer.try_clone().expect("another handle");
        std::io::copy(&mut peer, &mut back).expect("echoed");
    });
    let options = SocketOptions::default();
    let mut channel = Blocking::open(Socket::connect(&to, &options)).expect("connected");
    channel.writev_all(&[IoSlice::new(b"there and back")]).expect("written");
    let mut room = [0; 14];
    channel.read_all(&mut room).expect("read");
    assert_eq!(room, *b"there and back");
    channel.end_writing().expect("ended");
    assert!(!channel.read_all_eof(&mut room).expect("the end"));
    echo.join().expect("the peer ended");
    let nobody = Endpoint::Ip("127.0.0.1:1".parse().expect("an address"));
    let refused = Blocking::open(Socket::connect(&nobody, &options)).expect_err("nobody is there");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Connect), "{refused}");
}
