//! What an observed channel tells of each operation.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Deref;

/// Bytes that are shown of a transfer at most.
const HEAD_MAX: usize = 64;

/// An operation of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// A read.
    Read,
    /// A read that leaves the bytes where they are.
    Peek,
    /// A write.
    Write,
    /// A read at a position.
    ReadAt(u64),
    /// A write at a position.
    WriteAt(u64),
    /// A flush of buffers.
    Flush,
    /// The end of writing, in order.
    EndWriting,
    /// A move of the position.
    Seek,
    /// A close.
    Close,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read => f.write_str("read"),
            Self::Peek => f.write_str("peek"),
            Self::Write => f.write_str("write"),
            Self::ReadAt(offset) => write!(f, "read at {offset}"),
            Self::WriteAt(offset) => write!(f, "write at {offset}"),
            Self::Flush => f.write_str("flush"),
            Self::EndWriting => f.write_str("end writing"),
            Self::Seek => f.write_str("seek"),
            Self::Close => f.write_str("close"),
        }
    }
}

/// An operation that has come to its end. Prints as one line: `write 3 bytes: 61 62 63`.
#[derive(Clone, Copy, Debug)]
pub struct Trace<'a> {
    /// What was done.
    pub operation: Operation,
    /// Bytes transferred (of a seek, the new position), or what went wrong.
    pub outcome: Result<u64, &'a io::Error>,
    /// The first bytes transferred, at most 64.
    pub head: &'a [u8],
}

impl fmt::Display for Trace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.operation)?;
        let count = match (self.outcome, self.operation) {
            (Err(error), _) => return write!(f, " failed: {error}"),
            (Ok(_), Operation::Flush | Operation::EndWriting | Operation::Close) => return Ok(()),
            (Ok(position), Operation::Seek) => return write!(f, " to {position}"),
            (Ok(count), _) => count,
        };
        write!(f, " {count} bytes")?;
        for (at, byte) in self.head.iter().enumerate() {
            write!(f, "{}{byte:02x}", if at == 0 { ": " } else { " " })?;
        }
        if (self.head.len() as u64) < count { f.write_str(" ...") } else { Ok(()) }
    }
}

/// The first bytes of a transfer.
pub(super) struct Head {
    bytes: [u8; HEAD_MAX],
    len: usize,
}

impl Head {
    pub(super) fn empty() -> Self {
        Self { bytes: [0; HEAD_MAX], len: 0 }
    }

    /// Of `count` bytes in `bufs`.
    fn gather<'a>(bufs: impl Iterator<Item = &'a [u8]>, count: usize) -> Self {
        let mut head = Self::empty();
        let most = count.min(HEAD_MAX);
        for buf in bufs {
            let part = &buf[..buf.len().min(most - head.len)];
            head.bytes[head.len..][..part.len()].copy_from_slice(part);
            head.len += part.len();
        }
        head
    }

    pub(super) fn of(bufs: &[IoSlice<'_>], count: usize) -> Self {
        Self::gather(bufs.iter().map(Deref::deref), count)
    }

    pub(super) fn of_mut(bufs: &[IoSliceMut<'_>], count: usize) -> Self {
        Self::gather(bufs.iter().map(Deref::deref), count)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_one_line_with_the_first_bytes() {
        let head = Head::of(&[IoSlice::new(b"ab"), IoSlice::new(b""), IoSlice::new(b"cde")], 3);
        let trace = Trace { operation: Operation::Write, outcome: Ok(3), head: head.bytes() };
        assert_eq!(trace.to_string(), "write 3 bytes: 61 62 63");
        let many = [0xff; 100];
        let head = Head::of(&[IoSlice::new(&many)], 100);
        assert_eq!(head.bytes().len(), 64);
        let trace = Trace { operation: Operation::ReadAt(7), outcome: Ok(100), head: head.bytes() };
        assert!(trace.to_string().starts_with("read at 7 100 bytes: ff ff"));
        assert!(trace.to_string().ends_with("ff ..."));
        let error = io::Error::new(io::ErrorKind::BrokenPipe, "gone");
        let trace = Trace { operation: Operation::Read, outcome: Err(&error), head: &[] };
        assert_eq!(trace.to_string(), "read failed: gone");
    }
}
