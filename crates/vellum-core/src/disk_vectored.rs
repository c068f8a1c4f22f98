//! Reads and writes of several buffers that are one request: one lock over all of it, and one flush for FUA.

use crate::{Buf, Completion, Disk, Result, Storage, WriteFlags};
use std::ops::Range;

/// Up to so many bytes it is cheaper to copy them into one buffer and make one request to the storage than to make one
/// for each buffer.
const GATHERED_BYTES_MAX: usize = 256 << 10;

/// All buffers of a request come back, in the order given.
type WithBufs = (Vec<Buf>, Result<()>);

impl Disk {
    /// Writes several buffers one after the other, beginning at `offset`; all come back. It is one write: what overlaps it
    /// comes wholly before or wholly after it, and with [`WriteFlags::fua`] one flush follows it.
    pub fn write_vectored(&self, bufs: Vec<Buf>, offset: u64, flags: WriteFlags) -> Completion<WithBufs> {
        let len = total_len(&bufs);
        let range = match self.range_of(len, offset) {
            Ok(range) => range,
            Err(error) => return Completion::ready((bufs, Err(error))),
        };
        if len <= GATHERED_BYTES_MAX {
            let mut all = self.0.pool.take(len);
            for (buf, place) in bufs.iter().zip(places(&bufs)) {
                all[place].copy_from_slice(buf);
            }
            return match self.write(all, offset, flags).try_take() {
                Ok((_, result)) => Completion::ready((bufs, result)),
                // It is under way, whether somebody waits or not.
                Err(pending) => Completion::from_future(async move { (bufs, pending.await.1) }),
            };
        }
        let disk = self.clone();
        Completion::started(async move {
            let (bufs, result) = disk.write_each(bufs, range).await;
            (bufs, disk.written(result, flags).await)
        })
    }

    /// Reads several buffers one after the other, beginning at `offset`; all come back. It is one read: of a write that
    /// overlaps it, all is seen or nothing.
    pub fn read_vectored(&self, bufs: Vec<Buf>, offset: u64) -> Completion<WithBufs> {
        let len = total_len(&bufs);
        let range = match self.range_of(len, offset) {
            Ok(range) => range,
            Err(error) => return Completion::ready((bufs, Err(error))),
        };
        if len <= GATHERED_BYTES_MAX {
            return match self.read_at(self.0.pool.take(len), offset).try_take() {
                Ok((all, result)) => Completion::ready(scatter(bufs, &all, result)),
                Err(pending) => Completion::from_future(async move {
                    let (all, result) = pending.await;
                    scatter(bufs, &all, result)
                }),
            };
        }
        let disk = self.clone();
        Completion::started(async move { disk.read_each(bufs, range).await })
    }

    /// Writes each buffer from where it is, under one lock.
    async fn write_each(&self, mut bufs: Vec<Buf>, range: Range<u64>) -> WithBufs {
        let (writing, image) = match self.begin().await {
            Ok(both) => both,
            Err(error) => return (bufs, Err(error)),
        };
        let _guard = match self.lock_to_write(writing, image, &range).await {
            Ok(guard) => guard,
            Err(error) => return (bufs, Err(error)),
        };
        let mut at = range.start;
        for slot in &mut bufs {
            let end = at + slot.len() as u64;
            let buf = std::mem::replace(slot, Buf::zeroed(0));
            let (buf, result) = self.write_pieces(writing, image, buf, at..end).await;
            *slot = buf;
            if let Err(error) = result {
                return (bufs, Err(error));
            }
            at = end;
        }
        (bufs, Ok(()))
    }

    /// Reads each buffer to where it is; on a disk that may change, under one lock.
    async fn read_each(&self, mut bufs: Vec<Buf>, range: Range<u64>) -> WithBufs {
        let _guard = match &self.0.writing {
            Some(writing) => Some(writing.shared(range.clone()).await),
            None => None,
        };
        let mut at = range.start;
        for slot in &mut bufs {
            let end = at + slot.len() as u64;
            let result = match self.try_read_unlocked(slot, at) {
                Some(result) => result,
                None => {
                    let buf = std::mem::replace(slot, Buf::zeroed(0));
                    let (buf, result) = self.read_unlocked(buf, at).await;
                    *slot = buf;
                    result
                }
            };
            if let Err(error) = result {
                return (bufs, Err(error));
            }
            at = end;
        }
        (bufs, Ok(()))
    }
}

/// Bytes of all buffers. So many that they cannot be counted are past the end of any disk.
fn total_len(bufs: &[Buf]) -> usize {
    bufs.iter().fold(0, |total, buf| total.saturating_add(buf.len()))
}

/// Where each buffer stands among the bytes of all.
fn places(bufs: &[Buf]) -> impl Iterator<Item = Range<usize>> {
    bufs.iter().scan(0, |end, buf| {
        let start = *end;
        *end += buf.len();
        Some(start..*end)
    })
}

/// Gives each buffer its part of `all`.
fn scatter(mut bufs: Vec<Buf>, all: &[u8], result: Result<()>) -> WithBufs {
    if result.is_ok() {
        let mut rest = all;
        for buf in &mut bufs {
            let Some((part, later)) = rest.split_at_checked(buf.len()) else { break };
            buf.copy_from_slice(part);
            rest = later;
        }
    }
    (bufs, result)
}
