//! What is sent through the contenders.

use super::ends::End;
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bytes of one write, and of one WebSocket message.
const BLOCK: usize = 256 << 10;
const PING: usize = 64;
const PINGS: u32 = 4_000;

/// Sends `bytes`.
pub async fn send(to: &mut End, bytes: u64) -> std::io::Result<()> {
    let block = vec![0x5A; BLOCK];
    for _ in 0..bytes / BLOCK as u64 {
        to.write_all(&block).await?;
    }
    to.flush().await
}

/// Reads `bytes`; tells the seconds that took.
pub async fn receive(from: &mut End, bytes: u64) -> std::io::Result<f64> {
    let started = Instant::now();
    let mut block = vec![0; BLOCK];
    let mut left = bytes;
    while left > 0 {
        let read = from.read(&mut block).await? as u64;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        left -= read;
    }
    Ok(started.elapsed().as_secs_f64())
}

/// Sends `bytes` and waits until they have been read; tells the seconds.
pub async fn stream(mut from: End, mut to: End, bytes: u64) -> std::io::Result<f64> {
    let sending = tokio::spawn(async move { send(&mut from, bytes).await.map(|()| from) });
    let receiving = tokio::spawn(async move { receive(&mut to, bytes).await });
    let _from = sending.await.expect("no panic")?;
    receiving.await.expect("no panic")
}

/// Seconds of one small message there and back.
pub async fn ping(mut near: End, mut far: End) -> std::io::Result<f64> {
    let echoing = tokio::spawn(async move {
        let mut message = [0; PING];
        for _ in 0..PINGS {
            far.read_exact(&mut message).await?;
            far.write_all(&message).await?;
            far.flush().await?;
        }
        std::io::Result::Ok(())
    });
    let asking = tokio::spawn(async move {
        let mut message = [7; PING];
        let started = Instant::now();
        for _ in 0..PINGS {
            near.write_all(&message).await?;
            near.flush().await?;
            near.read_exact(&mut message).await?;
        }
        std::io::Result::Ok(started.elapsed().as_secs_f64())
    });
    let seconds = asking.await.expect("no panic")?;
    echoing.await.expect("no panic")?;
    Ok(seconds / f64::from(PINGS))
}
