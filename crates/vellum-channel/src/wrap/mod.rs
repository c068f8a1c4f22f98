//! Channels around other channels. What a wrapper does not change goes to the channel inside: its name and features,
//! readiness, descriptors, seeking, addresses, control, the executor.

mod alarm;
mod faulty;
mod observe;
mod throttle;
mod timeout;
mod trace;

pub use faulty::{Faulty, FaultyOptions};
pub use observe::{Counters, Counts, DirectionCounts, Observe};
pub use throttle::{Rate, Rates, Throttle};
pub use timeout::{Timeout, TimeoutOptions};
pub use trace::{Operation, Trace};

use smallvec::SmallVec;
use std::io::{IoSlice, IoSliceMut};

/// A direction of transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Read,
    Write,
}

/// Methods of [`Channel`](crate::Channel) that pass on to `self.inner`.
macro_rules! forward {
    ($($method:ident)*) => { $($crate::wrap::forward!(@ $method);)* };
    (@ base) => {
        fn base(&self) -> &$crate::Base {
            self.inner.base()
        }

        fn base_mut(&mut self) -> &mut $crate::Base {
            self.inner.base_mut()
        }

        fn control(&self) -> $crate::Control {
            self.inner.control()
        }

        fn set_blocking(&mut self, is_blocking: bool) {
            self.inner.set_blocking(is_blocking);
        }

        fn local_endpoint(&self) -> std::io::Result<$crate::Endpoint> {
            self.inner.local_endpoint()
        }

        fn peer_endpoint(&self) -> std::io::Result<$crate::Endpoint> {
            self.inner.peer_endpoint()
        }

        fn peer_process(&self) -> std::io::Result<$crate::PeerProcess> {
            self.inner.peer_process()
        }
    };
    (@ executor) => {
        fn detach(&mut self) -> std::io::Result<()> {
            self.inner.detach()
        }

        fn attach(&mut self, executor: &tokio::runtime::Handle) -> std::io::Result<()> {
            self.inner.attach(executor)
        }
    };
    (@ ready) => {
        fn poll_ready(
            &mut self,
            cx: &mut std::task::Context<'_>,
            interest: $crate::Interest,
        ) -> std::task::Poll<std::io::Result<$crate::Interest>> {
            self.inner.poll_ready(cx, interest)
        }
    };
    (@ close) => {
        fn poll_close(
            &mut self,
            cx: &mut std::task::Context<'_>,
        ) -> std::task::Poll<std::io::Result<$crate::Closed>> {
            self.inner.poll_close(cx)
        }
    };
    (@ flush_zero_copy) => {
        fn poll_flush_zero_copy(
            &mut self,
            cx: &mut std::task::Context<'_>,
        ) -> std::task::Poll<std::io::Result<$crate::ZeroCopy>> {
            self.inner.poll_flush_zero_copy(cx)
        }
    };
    (@ seek) => {
        fn poll_seek(
            &mut self,
            cx: &mut std::task::Context<'_>,
            to: std::io::SeekFrom,
        ) -> std::task::Poll<std::io::Result<u64>> {
            self.inner.poll_seek(cx, to)
        }
    };
}
use forward;

/// What a stream needs to flush and to end, passed on to `self.inner`.
macro_rules! forward_ends {
    () => {
        fn poll_send_buffered(
            &mut self,
            cx: &mut std::task::Context<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            std::pin::Pin::new(&mut self.inner).poll_flush(cx)
        }

        fn poll_end_writing(
            &mut self,
            cx: &mut std::task::Context<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            std::pin::Pin::new(&mut self.inner).poll_shutdown(cx)
        }
    };
}
use forward_ends;

/// Bytes of all slices.
fn total(bufs: &[IoSlice<'_>]) -> usize {
    bufs.iter().fold(0_usize, |total, buf| total.saturating_add(buf.len()))
}

/// Bytes of all slices.
fn total_mut(bufs: &[IoSliceMut<'_>]) -> usize {
    bufs.iter().fold(0_usize, |total, buf| total.saturating_add(buf.len()))
}

/// The first `bytes` of `bufs`.
fn cut<'a>(bufs: &'a [IoSlice<'_>], mut bytes: usize) -> SmallVec<[IoSlice<'a>; 16]> {
    let mut parts = SmallVec::new();
    for buf in bufs {
        if bytes == 0 {
            break;
        }
        let part = &buf[..buf.len().min(bytes)];
        bytes -= part.len();
        parts.push(IoSlice::new(part));
    }
    parts
}

/// The first `bytes` of `bufs`.
fn cut_mut<'a>(bufs: &'a mut [IoSliceMut<'_>], mut bytes: usize) -> SmallVec<[IoSliceMut<'a>; 16]> {
    let mut parts = SmallVec::new();
    for buf in bufs {
        if bytes == 0 {
            break;
        }
        let count = buf.len().min(bytes);
        bytes -= count;
        parts.push(IoSliceMut::new(&mut buf[..count]));
    }
    parts
}
