//! Records that came from the channel below and that rustls has not taken yet.
//!
//! rustls reads 4 KiB at a time: five calls to the kernel for one full record. So what has come is read here in one call,
//! and rustls is fed from memory.

use crate::channel::{Channel, ReadFlags};
use std::io::{self, IoSliceMut};
use std::task::{Context, Poll, ready};

/// Bytes of the buffer at first: enough for a handshake, and for one full record.
const SIZE_FIRST: usize = 20 << 10;
/// Bytes of the buffer at most: it grows while the peer sends faster than this side reads.
const SIZE_MAX: usize = 160 << 10;

/// Ciphertext: `bytes[start..end]`.
#[derive(Debug, Default)]
pub(super) struct Ciphertext {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// The last read filled the buffer: there may be more.
    was_full: bool,
}

impl Ciphertext {
    /// What rustls has not taken yet.
    pub fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Reads once from below, into the empty buffer; tells how many bytes came.
    pub fn poll_fill<C: Channel>(
        &mut self,
        below: &mut C,
        cx: &mut Context<'_>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        debug_assert!(self.is_empty(), "what came first would be lost");
        if self.bytes.is_empty() || (self.was_full && self.bytes.len() < SIZE_MAX) {
            // Nothing of the old contents is needed: a new buffer of zeros costs less than to grow the old one.
            self.bytes = vec![0; (self.bytes.len() * 2).clamp(SIZE_FIRST, SIZE_MAX)];
        }
        let mut bufs = [IoSliceMut::new(&mut self.bytes)];
        let read = ready!(below.poll_readv(cx, &mut bufs, None, flags))?;
        self.start = 0;
        self.end = read;
        self.was_full = read == self.bytes.len();
        Poll::Ready(Ok(read))
    }
}

/// As rustls reads it; the end of the buffer is not the end of the stream: rustls is not asked to read there.
impl io::Read for Ciphertext {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = buf.len().min(self.end - self.start);
        buf[..count].copy_from_slice(&self.bytes[self.start..self.start + count]);
        self.start += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Buffer;
    use std::io::Read;

    #[test]
    fn everything_comes_through_while_the_buffer_grows_to_its_limit() {
        let sent: Vec<u8> = (0..1_000_000_u32).map(|at| (at * 7 + at / 251) as u8).collect();
        let mut below = Buffer::from_vec(sent.clone());
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut input = Ciphertext::default();
        let (mut got, mut sizes) = (Vec::new(), Vec::new());
        loop {
            match input.poll_fill(&mut below, &mut cx, ReadFlags::empty()) {
                Poll::Ready(Ok(0)) => break,
                Poll::Ready(Ok(count)) => sizes.push(count),
                other => panic!("memory does not answer {other:?}"),
            }
            let mut piece = [0; 4096];
            while !input.is_empty() {
                let count = input.read(&mut piece).expect("memory");
                got.extend_from_slice(&piece[..count]);
            }
        }
        assert!(got == sent, "what came out is what went in");
        assert_eq!(sizes[..5], [20 << 10, 40 << 10, 80 << 10, 160 << 10, 160 << 10]);
    }
}
