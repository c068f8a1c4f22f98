//! From one executor to another.

use super::{Carries, End, Needs, Subject, executor, pattern};
use std::io::IoSliceMut;
use tokio::io::AsyncWriteExt;
use vellum_channel::{Channel, ChannelExt, ErrorKind, Interest, Shared, kind_of};

pub(super) fn cases(subject: &Subject) {
    for &exchanged in subject.orders(Needs::NearToFar) {
        eprintln!("{}: moves between executors", subject.name);
        if subject.traits.moves {
            moves(subject, exchanged);
            a_waiting_task_goes_on(subject, exchanged);
        } else {
            stays(subject);
        }
    }
}

/// Makes the ends on an executor that ends right afterwards.
fn ends(subject: &Subject, exchanged: bool) -> (End, End) {
    let first = executor();
    let (mut near, mut far) = first.block_on(subject.ends());
    near.detach().unwrap_or_else(|error| panic!("{}: {error}", subject.name));
    far.detach().unwrap_or_else(|error| panic!("{}: {error}", subject.name));
    if exchanged { (far, near) } else { (near, far) }
}

/// Bytes on their way when the channel moves arrive.
fn moves(subject: &Subject, exchanged: bool) {
    let (mut near, mut far) = ends(subject, exchanged);
    let [second, third] = [executor(), executor()];
    near.attach(second.handle()).expect("attached");
    far.attach(second.handle()).expect("attached");
    second.block_on(async {
        near.write_all(b"before the move, ").await.expect("written");
        near.flush().await.expect("flushed");
        far.read_all(&mut [0; 1]).await.expect("read");
        far.detach().expect("detached");
        near.write_all(b"while it moves, ").await.expect("written");
        near.flush().await.expect("flushed");
    });
    far.attach(third.handle()).expect("attached");
    let reading = third.spawn(async move {
        let mut text = [0; 41];
        far.read_all(&mut text).await.expect("read");
        (far, text)
    });
    second.block_on(async {
        near.write_all(b"and after").await.expect("written");
        near.flush().await.expect("flushed");
    });
    let (mut far, text) = third.block_on(reading).expect("the reader ended");
    assert_eq!(std::str::from_utf8(&text).expect("text"), "efore the move, while it moves, and after");

    // A detached channel that needs its executor says so instead of waiting for ever.
    far.detach().expect("detached");
    third.block_on(async {
        let mut room = [0; 4];
        let mut rooms = [IoSliceMut::new(&mut room)];
        let reading = far.readv(&mut rooms);
        if subject.traits.needs_executor {
            let error = super::soon("an answer", reading).await.expect_err("nothing is there");
            assert_eq!(kind_of(&error), Some(ErrorKind::Detached));
        } else {
            super::not_yet("a read of nothing", reading).await;
        }
    });
    far.attach(third.handle()).expect("attached");
    far.attach(second.handle()).expect("attached again, from one to the other");
    if subject.traits.carries == Carries::OneWay {
        return;
    }
    second.block_on(async {
        far.write_all(b"back").await.expect("written");
        far.flush().await.expect("flushed");
        let mut text = [0; 4];
        near.read_all(&mut text).await.expect("read");
        assert_eq!(text, *b"back");
    });
}

/// A task that waits on a shared channel is served by the executor that the channel is moved to.
fn a_waiting_task_goes_on(subject: &Subject, exchanged: bool) {
    let (mut near, mut far) = ends(subject, exchanged);
    let [second, third] = [executor(), executor()];
    near.attach(second.handle()).expect("attached");
    far.attach(second.handle()).expect("attached");
    let mut far = Shared::new(far);
    let mut waiting = far.clone();
    let reading = second.spawn(async move {
        let found = waiting.ready(Interest::READ).await.expect("no error");
        assert_eq!(found, Interest::READ);
        let mut data = vec![0; 100_000];
        waiting.read_all(&mut data).await.expect("read");
        data
    });
    std::thread::sleep(super::MOMENT);
    far.attach(third.handle()).expect("attached");
    second.block_on(async {
        near.write_all(&pattern(100_000)).await.expect("written");
        near.flush().await.expect("flushed");
    });
    let data = second.block_on(async { super::soon("the reader", reading).await.expect("ended") });
    assert!(data == pattern(100_000));
}

fn stays(subject: &Subject) {
    let runtime = executor();
    let (mut near, _far) = runtime.block_on(subject.ends());
    let error = near.detach().expect_err("it says that it cannot");
    assert_eq!(kind_of(&error), Some(ErrorKind::Unsupported), "{error}");
}
