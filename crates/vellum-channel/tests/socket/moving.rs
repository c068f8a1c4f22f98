//! From one executor to another, in the middle of a stream.

use crate::common::{Ends, all_ends, small_buffers, tcp_ends, within};
use std::future::Future;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{Builder, Runtime};
use vellum_channel::{
    Channel, ChannelExt, ErrorKind, Interest, ListenOptions, Shutdown, Socket, SocketListener, SocketOptions,
    kind_of,
};

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

fn run<T>(runtime: &Runtime, operation: impl Future<Output = T>) -> T {
    runtime.block_on(within(operation))
}

#[test]
fn a_channel_moves_with_data_pending_both_ways() {
    let (first, second) = (runtime(), runtime());
    for Ends { mut near, mut far, listener, .. } in run(&first, all_ends(&small_buffers())) {
        let data: Vec<u8> = (0..3_000_000_usize).map(|at| (at / 3) as u8).collect();
        let expected = data.clone();
        // The peer stays on the first executor and echoes all of it.
        let echo = first.spawn(async move {
            let mut got = vec![0; 3_000_000];
            far.read_all(&mut got).await.expect("a read");
            far.write_all(&got).await.expect("a write");
            far.shutdown().await.expect("an end");
            far
        });
        run(&first, near.write_all(&data[..1_000_000])).expect("a write");
        near.detach().expect("it can move");
        near.detach().expect("again does nothing");
        near.attach(second.handle()).expect("it can move");
        run(&second, near.write_all(&data[1_000_000..])).expect("a write");
        let mut got = vec![0; 1_500_000];
        run(&second, near.read_all(&mut got)).expect("a read");
        // Without a detach, and back.
        near.attach(first.handle()).expect("it can move");
        run(&first, near.read_to_end(&mut got)).expect("a read");
        assert!(got == expected);
        let far = run(&first, echo).expect("the peer");
        first.block_on(async move { drop((near, far, listener)) });
    }
}

#[test]
fn detached_it_does_what_needs_no_waiting() {
    let (first, second) = (runtime(), runtime());
    let Ends { mut near, mut far, .. } = run(&first, tcp_ends(&small_buffers()));
    run(&first, near.write_all(b"pending")).expect("a write");
    run(&first, far.ready(Interest::READ)).expect("a state");
    far.detach().expect("it can move");
    let mut got = [0; 7];
    run(&second, far.read_all(&mut got)).expect("it is there");
    assert_eq!(&got, b"pending");
    run(&second, far.write_all(b"answer")).expect("there is room");
    let refused = run(&second, far.read(&mut got)).expect_err("it would have to wait");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Detached));
    let refused = run(&second, far.ready(Interest::READ)).expect_err("it would have to wait");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Detached));
    far.set_blocking(false);
    let empty = run(&second, far.readv(&mut [io::IoSliceMut::new(&mut got)])).expect_err("nothing is there");
    assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
    far.set_blocking(true);
    let control = far.control();
    far.attach(second.handle()).expect("it can move");
    let waiting = second.spawn(async move {
        let mut got = [0; 1];
        far.read(&mut got).await
    });
    std::thread::sleep(Duration::from_millis(20));
    control.shutdown(Shutdown::Both).expect("a control outlives a move");
    assert_eq!(run(&second, waiting).expect("the reader").expect("the end"), 0);
}

#[test]
fn the_executor_that_a_channel_was_made_on_may_end() {
    let (first, second) = (runtime(), runtime());
    let Ends { mut near, mut far, .. } = run(&first, tcp_ends(&SocketOptions::default()));
    near.detach().expect("it can move");
    far.detach().expect("it can move");
    drop(first);
    near.attach(second.handle()).expect("it can move");
    far.attach(second.handle()).expect("it can move");
    run(&second, async {
        let mut got = [0; 2];
        let (written, read) = tokio::join!(near.write_all(b"on"), far.read_all(&mut got));
        written.expect("a write");
        read.expect("a read");
    });
}

#[test]
fn a_listener_moves_too() {
    let (first, second) = (runtime(), runtime());
    let at = vellum_channel::Endpoint::Ip("127.0.0.1:0".parse().expect("an address"));
    let mut listener =
        run(&first, async { SocketListener::bind(&at, &ListenOptions::default()) }).expect("a listener");
    let to = listener.local_endpoint().expect("an address");
    listener.detach().expect("it can move");
    let refused = run(&second, listener.accept()).expect_err("it would have to wait");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Detached));
    listener.attach(second.handle()).expect("it can move");
    run(&second, async {
        let options = SocketOptions::default();
        let (near, far) = tokio::join!(Socket::connect(&to, &options), listener.accept());
        near.expect("a connection");
        far.expect("a connection");
    });
}

#[test]
fn without_an_executor_nothing_is_made() {
    let refused = Socket::pair().expect_err("there is no executor");
    assert_eq!(kind_of(&refused), Some(ErrorKind::Detached));
}
