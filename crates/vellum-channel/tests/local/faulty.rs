//! `Faulty`, and what stands on channels when they are as bad as they may be.

use crate::common::{assert_io_kind, assert_kind, noise, read_to_end, within, write};
use proptest::prelude::*;
use std::io::{self, IoSlice, IoSliceMut};
use vellum_channel::{Buffer, Channel, ChannelExt, ErrorKind, Faulty, FaultyOptions, Interest, Pair};

fn split_at_random<'a>(data: &'a [u8], sizes: &[usize]) -> Vec<IoSlice<'a>> {
    let mut rest = data;
    let mut parts = Vec::new();
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (part, later) = rest.split_at((*size).min(rest.len()));
        parts.push(IoSlice::new(part));
        rest = later;
    }
    parts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Short transfers, delays and refusals lose nothing, in either mode.
    #[test]
    fn all_is_read_and_written_all_the_same(
        seed in any::<u64>(),
        len in 1_usize..5000,
        capacity in 1_usize..500,
        writes in proptest::collection::vec(1_usize..300, 1..8),
        reads in proptest::collection::vec(1_usize..300, 1..8),
        would_block in 0_u32..4,
        is_blocking in any::<bool>(),
    ) {
        let data = noise(len);
        let options = FaultyOptions {
            seed, short_percent: 70, pending_percent: 40, would_block, ..FaultyOptions::default()
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let got = runtime.block_on(within(async {
            let (near, far) = Pair::with_capacity(capacity);
            let (mut near, mut far) = (Faulty::new(near, options), Faulty::new(far, options));
            near.set_blocking(is_blocking);
            far.set_blocking(is_blocking);
            let bufs = split_at_random(&data, &writes);
            let writing = async {
                let mut writing = near.writev_all(&bufs);
                (&mut writing).await.expect("written");
                assert_eq!(writing.transferred(), data.len());
            };
            let reading = async {
                let mut got = vec![0; data.len()];
                let mut rest = got.as_mut_slice();
                let mut sizes = reads.iter().cycle();
                while !rest.is_empty() {
                    let count = sizes.next().expect("endless").min(&rest.len()).to_owned();
                    let (part, later) = rest.split_at_mut(count);
                    let (one, two) = part.split_at_mut(count / 2);
                    let bufs = &mut [IoSliceMut::new(one), IoSliceMut::new(two)];
                    far.readv_all(bufs).await.expect("read");
                    rest = later;
                }
                got
            };
            tokio::join!(writing, reading).1
        }));
        prop_assert!(got == data);
    }

    /// Operations dropped at every point where they wait: what was reported is there, and nothing else.
    #[test]
    fn dropped_midway_nothing_is_lost_or_doubled(
        seed in any::<u64>(),
        len in 1_usize..3000,
        capacity in 1_usize..200,
    ) {
        let data = noise(len);
        let options = FaultyOptions { seed, short_percent: 50, pending_percent: 50, ..FaultyOptions::default() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let got = runtime.block_on(within(async {
            let (near, far) = Pair::with_capacity(capacity);
            let (mut near, mut far) = (Faulty::new(near, options), Faulty::new(far, options));
            let (mut sent, mut got) = (0, Vec::new());
            while got.len() < data.len() {
                let rest = [IoSlice::new(&data[sent..])];
                let mut writing = near.writev_all(&rest);
                crate::common::poll_once_and_drop(&mut writing).await.transpose().expect("written");
                sent += writing.transferred();
                let mut room = vec![0; (data.len() - got.len()).min(97)];
                let mut reading = far.read_all(&mut room);
                crate::common::poll_once_and_drop(&mut reading).await.transpose().expect("read");
                let count = reading.transferred();
                got.extend_from_slice(&room[..count]);
            }
            got
        }));
        prop_assert!(got == data);
    }
}

#[tokio::test]
async fn ends_and_errors_come_at_their_byte() {
    let ends = FaultyOptions { read_end: Some(1000), write_end: Some(500), ..FaultyOptions::default() };
    let mut channel = Faulty::new(Buffer::from_vec(noise(2000)), ends);
    assert!(read_to_end(&mut channel).await.expect("cut") == noise(1000));
    let error = channel.read_all(&mut [0; 1]).await.expect_err("cut");
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    let bytes = noise(501);
    let bufs = [IoSlice::new(&bytes)];
    let mut writing = channel.writev_all(&bufs);
    assert_io_kind((&mut writing).await, io::ErrorKind::BrokenPipe);
    assert_eq!(writing.transferred(), 500);

    let errors = FaultyOptions {
        short_percent: 50,
        read_error: Some((300, io::ErrorKind::ConnectionReset)),
        write_error: Some((0, io::ErrorKind::StorageFull)),
        ..FaultyOptions::default()
    };
    let mut channel = Faulty::new(Buffer::from_vec(noise(2000)), errors);
    let mut room = [0; 301];
    let mut reading = channel.read_all(&mut room);
    assert_io_kind((&mut reading).await, io::ErrorKind::ConnectionReset);
    assert_eq!(reading.transferred(), 300);
    assert_eq!(room[..300], noise(300));
    assert_io_kind(read_to_end(&mut channel).await, io::ErrorKind::ConnectionReset);
    assert_io_kind(write(&mut channel, b"x").await, io::ErrorKind::StorageFull);

    // At its error a direction is ready, whatever the channel inside says.
    let (near, _far) = Pair::new();
    let reset =
        FaultyOptions { read_error: Some((0, io::ErrorKind::ConnectionReset)), ..FaultyOptions::default() };
    let mut channel = Faulty::new(near, reset);
    assert_eq!(within(channel.ready(Interest::READ)).await.expect("ready"), Interest::READ);
}

#[tokio::test]
async fn storms_pass() {
    let options = FaultyOptions { would_block: 3, ..FaultyOptions::default() };
    let mut channel = Faulty::new(Buffer::from_vec(noise(10)), options);
    channel.set_blocking(false);
    for _ in 0..2 {
        for _ in 0..3 {
            let refused = channel.readv(&mut [IoSliceMut::new(&mut [0; 2])]).await;
            assert_io_kind(refused, io::ErrorKind::WouldBlock);
        }
        assert_eq!(channel.readv(&mut [IoSliceMut::new(&mut [0; 2])]).await.expect("let through"), 2);
    }
    channel.close().await.expect("closed");
    channel.set_blocking(true);
    assert_kind(channel.read_all(&mut [0; 1]).await, ErrorKind::Closed);
}

#[tokio::test]
async fn bits_flip_and_faults_come_back_with_their_seed() {
    let run = async |seed: u64| {
        let options =
            FaultyOptions { seed, flip_percent: 100, short_percent: 30, ..FaultyOptions::default() };
        let mut channel = Faulty::new(Buffer::new(), options);
        write(&mut channel, &[0; 1000]).await.expect("written");
        let written = channel.into_inner().into_vec();
        let mut channel = Faulty::new(Buffer::from_vec(vec![0; 1000]), options);
        (written, read_to_end(&mut channel).await.expect("read"))
    };
    let (written, read) = run(5).await;
    for bytes in [&written, &read] {
        assert_eq!(bytes.len(), 1000);
        let wrong: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
        assert!((1..200).contains(&wrong), "{wrong} bits are wrong");
    }
    assert!(run(5).await == (written, read.clone()), "the same seed, the same faults");
    assert!(run(6).await.1 != read);
}
