//! Any Tokio stream as a channel.

use crate::channel::stream_of_channel;
use crate::channel::{Base, Channel, Closed, Features, Interest, ReadFlags, Shutdown, WriteFlags};
use crate::control::{Control, Controls, WakeReader};
use crate::descriptors::Descriptors;
use crate::error::{ErrorKind, error};
use crate::poll_fd::closed;
use std::fmt::{self, Debug};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Handle;

/// Bytes read ahead to answer "is it readable" and to peek.
const AHEAD: usize = 4096;

/// A channel made of any Tokio stream.
///
/// It peeks and tells readiness by reading ahead. It can be shut down in order (Tokio's `shutdown`), not from other
/// tasks, and it stays on the executor that its stream was made on: neither is known of a stream.
pub struct Stream<S> {
    base: Base,
    stream: Option<S>,
    /// Read from the stream and not yet by the user: `ahead[taken..]`.
    ahead: Vec<u8>,
    taken: usize,
    reader: Arc<WakeReader>,
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream<S> {
    /// Makes a channel of `stream`.
    pub fn new(stream: S) -> Self {
        Self {
            base: Base::new("stream", Features::PEEK),
            stream: Some(stream),
            ahead: Vec::new(),
            taken: 0,
            reader: Arc::default(),
        }
    }

    /// The stream, and the bytes that were read ahead of the user.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`].
    pub fn into_inner(self) -> io::Result<(S, Vec<u8>)> {
        let ahead = self.ahead[self.taken..].to_vec();
        Ok((self.stream.ok_or_else(closed)?, ahead))
    }

    fn stream(&mut self) -> io::Result<Pin<&mut S>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(closed)
    }

    /// Waits until there are bytes ahead; false at the end of the stream.
    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let stream = self.stream.as_mut().map(Pin::new).ok_or_else(closed)?;
        if self.taken < self.ahead.len() {
            return Poll::Ready(Ok(true));
        }
        self.taken = 0;
        self.ahead.resize(AHEAD, 0);
        let mut room = ReadBuf::new(&mut self.ahead);
        let polled = stream.poll_read(cx, &mut room);
        let read = room.filled().len();
        self.ahead.truncate(read);
        ready!(polled)?;
        Poll::Ready(Ok(read > 0))
    }

    fn poll_send_buffered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(cx)
    }

    fn poll_end_writing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(cx)
    }
}

/// Copies from `from` into `bufs`, in order.
pub(crate) fn scatter(mut from: &[u8], bufs: &mut [IoSliceMut<'_>]) -> usize {
    let mut copied = 0;
    for buf in bufs {
        let count = from.len().min(buf.len());
        let (part, rest) = from.split_at(count);
        buf[..count].copy_from_slice(part);
        copied += count;
        from = rest;
    }
    copied
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Channel for Stream<S> {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    fn control(&self) -> Control {
        Control::new(Arc::new(StreamControls), self.reader.clone())
    }

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        _fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        let Some(first) = bufs.iter().position(|buf| !buf.is_empty()) else { return Poll::Ready(Ok(0)) };
        let has_ahead = self.taken < self.ahead.len();
        if !has_ahead && !flags.contains(ReadFlags::PEEK) {
            let mut room = ReadBuf::new(&mut bufs[first]);
            ready!(self.stream()?.poll_read(cx, &mut room))?;
            return Poll::Ready(Ok(room.filled().len()));
        }
        if !ready!(self.poll_ahead(cx))? {
            return Poll::Ready(Ok(0));
        }
        let read = scatter(&self.ahead[self.taken..], bufs);
        if !flags.contains(ReadFlags::PEEK) {
            self.taken += read;
        }
        Poll::Ready(Ok(read))
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        _fds: &[BorrowedFd<'_>],
        _flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write_vectored(cx, bufs)
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        self.stream()?;
        // A Tokio stream says only by trying whether it takes bytes.
        let mut found = interest & Interest::WRITE;
        if interest.contains(Interest::READ) {
            // Also at the end of the stream, or with an error: the read tells.
            let polled = self.poll_ahead(cx);
            found.set(Interest::READ, polled.is_ready());
            if let Poll::Ready(Err(error)) = polled {
                return Poll::Ready(Err(error));
            }
        }
        if found.is_empty() { Poll::Pending } else { Poll::Ready(Ok(found)) }
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        if self.stream.is_some() {
            let ended = ready!(self.stream()?.poll_shutdown(cx));
            self.stream = None;
            ended?;
        }
        Poll::Ready(Ok(Closed::default()))
    }

    fn detach(&mut self) -> io::Result<()> {
        Err(self.unsupported("is bound to the executor that its Tokio stream was made on"))
    }

    fn attach(&mut self, _executor: &Handle) -> io::Result<()> {
        self.detach()
    }
}

stream_of_channel!([S: AsyncRead + AsyncWrite + Send + Unpin] Stream<S>);

impl<S> Debug for Stream<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("base", &self.base).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct StreamControls;

impl Controls for StreamControls {
    fn shutdown(&self, _how: Shutdown) -> io::Result<()> {
        Err(error(
            ErrorKind::Unsupported,
            "a stream channel cannot be shut down from here: use `AsyncWriteExt::shutdown`, or close it",
        ))
    }
}
