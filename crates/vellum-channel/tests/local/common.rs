//! What the tests share.

use std::future::Future;
use std::io::{self, IoSlice, IoSliceMut};
use std::time::Duration;
use vellum_channel::{Channel, ChannelExt, ErrorKind, Interest, kind_of};

/// QEMU's pattern: so many chunks of so many bytes, each filled with its number.
pub const CHUNKS: usize = 250;
pub const CHUNK: usize = 4194;

/// Waits, but not for ever.
pub async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("does not hang")
}

pub fn pattern() -> Vec<Vec<u8>> {
    (0..CHUNKS).map(|number| vec![number as u8; CHUNK]).collect()
}

/// Bytes that repeat at no power of two.
pub fn noise(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + at / 251) as u8).collect()
}

/// Sends the pattern, all at once (blocking mode) or as the channel takes it.
pub async fn send(channel: &mut impl Channel, is_blocking: bool) -> io::Result<()> {
    channel.set_blocking(is_blocking);
    let chunks = pattern();
    let slices: Vec<_> = chunks.iter().map(|chunk| IoSlice::new(chunk)).collect();
    if is_blocking {
        return channel.writev_all(&slices).await;
    }
    let all = chunks.concat();
    let mut sent = 0;
    while sent < all.len() {
        match channel.writev(&[IoSlice::new(&all[sent..])]).await {
            Ok(count) => sent += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                channel.ready(Interest::WRITE).await?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Receives the pattern in the same two ways, and compares.
pub async fn receive(channel: &mut impl Channel, is_blocking: bool) -> io::Result<()> {
    channel.set_blocking(is_blocking);
    let mut chunks = vec![vec![0xEE_u8; CHUNK]; CHUNKS];
    if is_blocking {
        let mut slices: Vec<_> = chunks.iter_mut().map(|chunk| IoSliceMut::new(chunk)).collect();
        channel.readv_all(&mut slices).await?;
        assert!(chunks == pattern(), "the bytes differ");
        return Ok(());
    }
    let mut all = vec![0; CHUNK * CHUNKS];
    let mut got = 0;
    while got < all.len() {
        match channel.readv(&mut [IoSliceMut::new(&mut all[got..])]).await {
            Ok(0) => panic!("ended after {got} bytes"),
            Ok(count) => got += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                channel.ready(Interest::READ).await?;
            }
            Err(error) => return Err(error),
        }
    }
    assert!(all == pattern().concat(), "the bytes differ");
    Ok(())
}

/// Everything up to the end of the stream.
pub async fn read_to_end(channel: &mut impl Channel) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(channel, &mut all).await?;
    Ok(all)
}

pub async fn write(channel: &mut impl Channel, bytes: &[u8]) -> io::Result<()> {
    channel.writev_all(&[IoSlice::new(bytes)]).await
}

pub fn assert_kind<T: std::fmt::Debug>(outcome: io::Result<T>, kind: ErrorKind) {
    let error = outcome.expect_err("an error is expected");
    assert_eq!(kind_of(&error), Some(kind), "{error}");
}

pub fn assert_io_kind<T: std::fmt::Debug>(outcome: io::Result<T>, kind: io::ErrorKind) {
    let error = outcome.expect_err("an error is expected");
    assert_eq!(error.kind(), kind, "{error}");
}

/// Polls a future once, and drops it: as `select!` does with those that lose.
pub async fn poll_once_and_drop<F: Future>(future: F) -> Option<F::Output> {
    tokio::select! {
        biased;
        done = future => Some(done),
        () = std::future::ready(()) => None,
    }
}
