//! The same by threads that block.

use super::{End, Needs, Subject, chunks, executor, pattern, rooms, slices};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::sync::mpsc;
use std::time::Duration;
use vellum_channel::{
    Blocking, Channel, ChannelExt, Closed, ErrorKind, Features, Interest, ReadFlags, Shutdown, WriteFlags,
    ZeroCopy, kind_of,
};

pub(super) fn cases(subject: &Subject) {
    case(subject, Needs::NearToFar, "chunks", |near, far| chunks_arrive(near, far, true));
    case(subject, Needs::NearToFar, "chunks, non-blocking", |near, far| chunks_arrive(near, far, false));
    case(subject, Needs::NearToFar, "std's traits", std_traits);
    case(subject, Needs::NearToFar, "would block", would_block);
    case(subject, Needs::NearToFar, "all operations", all_operations);
    case(subject, Needs::BothWays, "both directions in four threads", four_threads);
    case(subject, Needs::FarToNear, "shutdown wakes a thread", shutdown_wakes_a_thread);
    case(subject, Needs::Nothing, "after close", after_close);
}

pub(super) type Ends = Blocking<End>;

/// Runs one case in a thread, so that one that hangs is told of.
pub(super) fn case(subject: &Subject, needs: Needs, name: &'static str, body: fn(Ends, Ends)) {
    for &exchanged in subject.orders(needs) {
        in_a_thread(subject, exchanged, name, body);
    }
}

fn in_a_thread(subject: &Subject, exchanged: bool, name: &'static str, body: fn(Ends, Ends)) {
    eprintln!("{}: blocking: {name}{}", subject.name, if exchanged { ", ends exchanged" } else { "" });
    let runtime = executor();
    let (near, far) = runtime.block_on(subject.ends());
    let (near, far) = if exchanged { (far, near) } else { (near, far) };
    let moves = subject.traits.moves;
    let handle = runtime.handle().clone();
    let (tell, told) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let face = |channel| match moves {
            true => Blocking::new(channel).expect("it moves"),
            false => Blocking::on(handle.clone(), channel),
        };
        body(face(near), face(far));
        let _: Result<(), _> = tell.send(());
    });
    match told.recv_timeout(super::PATIENCE) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{}: blocking: {name}: hangs", subject.name),
        _ => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
    }
    runtime.shutdown_background();
}

fn chunks_arrive(mut near: Ends, mut far: Ends, is_blocking: bool) {
    near.set_blocking(is_blocking);
    far.set_blocking(is_blocking);
    let sending = std::thread::spawn(move || {
        near.writev_all(&slices(&chunks())).expect("written");
        near.flush().expect("flushed");
        near
    });
    let mut received = vec![vec![0xEE; 4194]; 250];
    far.readv_all(&mut rooms(&mut received)).expect("read");
    assert_eq!(received, chunks());
    drop(sending.join().expect("the sender ended"));
}

fn std_traits(mut near: Ends, mut far: Ends) {
    let sent = pattern(400_000);
    let expected = sent.clone();
    let sending = std::thread::spawn(move || {
        near.write_all(&sent).expect("written");
        near.end_writing().expect("ended");
        near
    });
    let mut received = Vec::new();
    far.read_to_end(&mut received).expect("read to the end");
    assert!(received == expected);
    assert!(!far.read_all_eof(&mut [0; 1]).expect("the end again"));
    drop(sending.join().expect("the sender ended"));
}

fn would_block(mut near: Ends, mut far: Ends) {
    far.set_blocking(false);
    let mut room = [0; 4];
    let error = far.read(&mut room).expect_err("nothing is there");
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    let written = near.write(b"yes").expect("written");
    near.write_all(&b"yes"[written..]).expect("written");
    near.flush().expect("flushed");
    assert_eq!(far.wait(Interest::READ).expect("readable"), Interest::READ);
    let read = far.readv_full(&mut [IoSliceMut::new(&mut room)], None, vellum_channel::ReadFlags::empty());
    assert!((1..=3).contains(&read.expect("read")));
    assert!(
        near.writev_full(&[IoSlice::new(b"z")], &[], vellum_channel::WriteFlags::empty()).expect("one") == 1
    );
}

/// Those that the other cases leave out.
fn all_operations(mut near: Ends, mut far: Ends) {
    near.writev_full_all(&[IoSlice::new(b"12"), IoSlice::new(b"345678")], &[], WriteFlags::empty())
        .expect("written");
    near.flush().expect("flushed");
    assert_eq!(near.flush_zero_copy().expect("there was none"), ZeroCopy::Sent);
    let mut one = [0; 1];
    match far.channel().features().contains(Features::PEEK) {
        true => assert_eq!((far.peek(&mut one).expect("peeked"), &one), (1, b"1")),
        false => drop(far.peek(&mut one).expect_err("it cannot")),
    }
    let (mut first, mut second) = ([0; 1], [0; 2]);
    let mut rooms = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
    assert!(far.readv_all_eof(&mut rooms).expect("three are there"));
    assert_eq!((&first, &second), (b"1", b"23"));
    let mut rooms = [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
    far.readv_full_all(&mut rooms, None, ReadFlags::empty()).expect("three more are there");
    assert_eq!((&first, &second), (b"4", b"56"));
    far.run(|channel| channel.read_all(&mut one)).expect("any other operation");
    assert_eq!(&one, b"7");
    near.end_writing().expect("ended");
    let mut rooms = [IoSliceMut::new(&mut one)];
    assert!(far.readv_full_all_eof(&mut rooms, None, ReadFlags::empty()).expect("the last"));
    assert!(!far.readv_full_all_eof(&mut rooms, None, ReadFlags::empty()).expect("the end"));
    assert_eq!(&one, b"8");
    far.readv_full_all(&mut [IoSliceMut::new(&mut one)], None, ReadFlags::empty()).expect_err("the end");
    // From one thread's face to another's.
    let mut far = far.into_inner().expect("given back");
    far.set_name("moved");
    assert_eq!(far.name(), "moved");
}

fn four_threads(near: Ends, far: Ends) {
    const BYTES: usize = 2 << 20;
    let mut threads = Vec::new();
    // Neither end is dropped before all is there.
    let ends = [near.into_shared(), far.into_shared()];
    for channel in &ends {
        let (mut reading, mut writing) = (channel.clone(), channel.clone());
        threads.push(std::thread::spawn(move || {
            for part in pattern(BYTES).chunks(33_333) {
                writing.write_all(part).expect("written");
            }
            writing.flush().expect("flushed");
        }));
        threads.push(std::thread::spawn(move || {
            let mut received = vec![0; BYTES];
            reading.read_all(&mut received).expect("read");
            assert!(received == pattern(BYTES), "other bytes came than were sent");
        }));
    }
    for thread in threads {
        thread.join().expect("no thread fails");
    }
    drop(ends);
}

fn after_close(mut near: Ends, far: Ends) {
    drop(far);
    // A peer that is gone may make the first close fail; the channel is closed all the same.
    let _: io::Result<Closed> = near.close();
    near.close().expect("a second close does nothing");
    let error = near.read(&mut [0; 4]).expect_err("closed");
    assert_eq!(kind_of(&error), Some(ErrorKind::Closed), "reading: {error}");
    let error = near.write(b"x").expect_err("closed");
    assert_eq!(kind_of(&error), Some(ErrorKind::Closed), "writing: {error}");
}

fn shutdown_wakes_a_thread(mut near: Ends, far: Ends) {
    if !near.channel().features().contains(Features::SHUTDOWN) {
        return;
    }
    let control = near.channel().control();
    let reading = std::thread::spawn(move || near.read(&mut [0; 4]));
    std::thread::sleep(Duration::from_millis(30));
    control.shutdown(Shutdown::Both).expect("shut down");
    assert_eq!(reading.join().expect("the reader ended").expect("an end that was asked for"), 0);
    drop(far);
}
