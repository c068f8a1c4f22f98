//! One channel, many tasks.

use crate::channel::{Base, Channel, Closed, Interest, ReadFlags, WriteFlags, ZeroCopy, stream_of_channel};
use crate::control::Control;
use crate::descriptors::Descriptors;
use crate::endpoint::{Endpoint, PeerProcess};
use crate::error::{ErrorKind, kind_of};
use parking_lot::Mutex;
use std::fmt::{self, Debug};
use std::io::{self, IoSlice, IoSliceMut, SeekFrom};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use tokio::io::AsyncRead;
use tokio::runtime::Handle;

/// A handle of a channel that several tasks use: clone it. Any number of them may wait in either direction.
///
/// Each handle has a mode (blocking or not) and a name of its own, which start as the channel's. Single operations of
/// several tasks follow one another; those that transfer *all* bytes are made of many, so two tasks that read, or two
/// that write, need an agreement of their own. The channel is closed by [`close`](crate::ChannelExt::close) on any
/// handle, and when the last one is dropped.
pub struct Shared<C: ?Sized> {
    base: Base,
    seat: Seat,
    channel: Arc<Mutex<C>>,
}

impl<C: Channel> Shared<C> {
    /// Makes the channel one that can be shared.
    pub fn new(channel: C) -> Self {
        Self {
            base: channel.base().clone(),
            seat: Seat::new(Arc::default(), Arc::default()),
            channel: Arc::new(Mutex::new(channel)),
        }
    }

    /// The channel, if this is its only handle; otherwise the handle.
    ///
    /// # Errors
    /// Other handles exist: this one is given back.
    pub fn try_into_inner(self) -> Result<C, Self> {
        let Self { base, seat, channel } = self;
        match Arc::try_unwrap(channel) {
            Ok(channel) => Ok(channel.into_inner()),
            Err(channel) => Err(Self { base, seat, channel }),
        }
    }
}

impl<C: Channel + ?Sized> Shared<C> {
    /// Carries out one poll for the task of `cx`, with a waker in its place that wakes all who wait in this direction.
    fn poll<T>(
        &self,
        waiters: &Arc<Waiters>,
        cx: &Context<'_>,
        operation: impl FnOnce(&mut C, &mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let mut channel = self.channel.lock();
        waiters.add(self.seat.number, cx.waker());
        let waker = Waker::from(waiters.clone());
        let polled = operation(&mut channel, &mut Context::from_waker(&waker));
        if polled.is_ready() {
            waiters.remove(self.seat.number);
        }
        polled
    }

    fn wake_all(&self) {
        self.seat.readers.wake_by_ref();
        self.seat.writers.wake_by_ref();
    }

    fn poll_send_buffered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(&self.seat.writers, cx, |channel, cx| Pin::new(channel).poll_flush(cx))
    }

    fn poll_end_writing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(&self.seat.writers, cx, |channel, cx| Pin::new(channel).poll_shutdown(cx))
    }
}

impl<C: ?Sized> Clone for Shared<C> {
    fn clone(&self) -> Self {
        Self {
            base: self.base.clone(),
            seat: Seat::new(self.seat.readers.clone(), self.seat.writers.clone()),
            channel: self.channel.clone(),
        }
    }
}

impl<C: ?Sized> Debug for Shared<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("base", &self.base).finish_non_exhaustive()
    }
}

/// Where the task of one handle waits. A task that has given up waiting is forgotten when the next one waits with the same
/// handle, or when the handle goes: nobody else tells of it.
struct Seat {
    number: u64,
    readers: Arc<Waiters>,
    writers: Arc<Waiters>,
}

impl Seat {
    fn new(readers: Arc<Waiters>, writers: Arc<Waiters>) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Self { number: NUMBERS.fetch_add(1, Ordering::Relaxed), readers, writers }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.readers.remove(self.number);
        self.writers.remove(self.number);
    }
}

/// The tasks that wait in one direction, with the numbers of their seats.
#[derive(Debug, Default)]
struct Waiters(Mutex<Vec<(u64, Waker)>>);

impl Waiters {
    fn add(&self, number: u64, waker: &Waker) {
        let mut waiting = self.0.lock();
        let replaced = match waiting.iter_mut().find(|(known, _)| *known == number) {
            Some((_, known)) if known.will_wake(waker) => None,
            Some((_, known)) => Some(std::mem::replace(known, waker.clone())),
            None => {
                waiting.push((number, waker.clone()));
                None
            }
        };
        // The last of a task may go with its waker, and with that another handle: not under the lock.
        drop(waiting);
        drop(replaced);
    }

    fn remove(&self, number: u64) {
        let mut waiting = self.0.lock();
        let removed =
            waiting.iter().position(|(known, _)| *known == number).map(|at| waiting.swap_remove(at));
        drop(waiting);
        drop(removed);
    }
}

impl Wake for Waiters {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let waiting = std::mem::take(&mut *self.0.lock());
        waiting.into_iter().for_each(|(_, waker)| waker.wake());
    }
}

/// What two directions that are waited for come to. One that the channel does not have is not, if there is the other.
fn either(one: Poll<io::Result<Interest>>, other: Poll<io::Result<Interest>>) -> Poll<io::Result<Interest>> {
    let is_missing = |error: &io::Error| kind_of(error) == Some(ErrorKind::Unsupported);
    match (one, other) {
        (Poll::Ready(Ok(one)), Poll::Ready(Ok(other))) => Poll::Ready(Ok(one | other)),
        (Poll::Ready(Err(error)), other) if is_missing(&error) => other,
        (one, Poll::Ready(Err(error))) if is_missing(&error) => one,
        (Poll::Pending, other) => other,
        (one, _) => one,
    }
}

impl<C: Channel + ?Sized> Channel for Shared<C> {
    fn base(&self) -> &Base {
        &self.base
    }

    fn base_mut(&mut self) -> &mut Base {
        &mut self.base
    }

    fn control(&self) -> Control {
        self.channel.lock().control()
    }

    fn poll_readv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        fds: Option<&mut Descriptors>,
        flags: ReadFlags,
    ) -> Poll<io::Result<usize>> {
        self.poll(&self.seat.readers, cx, |channel, cx| channel.poll_readv(cx, bufs, fds, flags))
    }

    fn poll_writev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> Poll<io::Result<usize>> {
        self.poll(&self.seat.writers, cx, |channel, cx| channel.poll_writev(cx, bufs, fds, flags))
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>, interest: Interest) -> Poll<io::Result<Interest>> {
        if !interest.contains(Interest::READ) {
            return self.poll(&self.seat.writers, cx, |channel, cx| channel.poll_ready(cx, interest));
        }
        let mut found =
            self.poll(&self.seat.readers, cx, |channel, cx| channel.poll_ready(cx, Interest::READ));
        if interest.contains(Interest::WRITE) {
            let writable =
                self.poll(&self.seat.writers, cx, |channel, cx| channel.poll_ready(cx, Interest::WRITE));
            found = either(found, writable);
        }
        found
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Closed>> {
        let polled = self.poll(&self.seat.writers, cx, |channel, cx| channel.poll_close(cx));
        if polled.is_ready() {
            self.wake_all();
        }
        polled
    }

    fn poll_flush_zero_copy(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<ZeroCopy>> {
        self.poll(&self.seat.writers, cx, |channel, cx| channel.poll_flush_zero_copy(cx))
    }

    fn poll_seek(&mut self, cx: &mut Context<'_>, to: SeekFrom) -> Poll<io::Result<u64>> {
        self.poll(&self.seat.writers, cx, |channel, cx| channel.poll_seek(cx, to))
    }

    fn poll_preadv(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        self.poll(&self.seat.readers, cx, |channel, cx| channel.poll_preadv(cx, bufs, offset))
    }

    fn poll_pwritev(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        offset: u64,
    ) -> Poll<io::Result<usize>> {
        self.poll(&self.seat.writers, cx, |channel, cx| channel.poll_pwritev(cx, bufs, offset))
    }

    /// Tasks that wait go on waiting, and are woken by the next attach.
    fn detach(&mut self) -> io::Result<()> {
        self.channel.lock().detach()
    }

    fn attach(&mut self, executor: &Handle) -> io::Result<()> {
        let attached = self.channel.lock().attach(executor);
        self.wake_all();
        attached
    }

    fn local_endpoint(&self) -> io::Result<Endpoint> {
        self.channel.lock().local_endpoint()
    }

    fn peer_endpoint(&self) -> io::Result<Endpoint> {
        self.channel.lock().peer_endpoint()
    }

    fn peer_process(&self) -> io::Result<PeerProcess> {
        self.channel.lock().peer_process()
    }
}

impl<C: Channel + ?Sized> AsyncRead for Shared<C> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll(&self.seat.readers, cx, |channel, cx| Pin::new(channel).poll_read(cx, buf))
    }
}

stream_of_channel!(write [C: Channel + ?Sized] Shared<C>);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ext::ChannelExt;
    use crate::pair::Pair;
    use std::pin::pin;

    struct Task;

    impl Wake for Task {
        fn wake(self: Arc<Self>) {}
    }

    /// Polls the wait for something to read once, on behalf of a task, and gives it up.
    fn wait_and_give_up(channel: &mut Shared<Pair>, task: &Arc<Task>) {
        let waker = Waker::from(task.clone());
        let waiting = pin!(channel.ready(Interest::all()));
        assert!(waiting.poll(&mut Context::from_waker(&waker)).is_pending());
    }

    #[test]
    fn tasks_that_gave_up_waiting_are_forgotten() {
        let (near, mut far) = Pair::with_capacity(1);
        let mut channel = Shared::new(near);
        // Nothing to read, and no room.
        let mut cx = Context::from_waker(Waker::noop());
        let full = channel.poll_writev(&mut cx, &[IoSlice::new(b"x")], &[], WriteFlags::empty());
        assert!(full.is_ready());
        let tasks: Vec<_> = std::iter::repeat_with(|| Arc::new(Task)).take(100).collect();
        for task in &tasks {
            // By handles of their own, and by one that stays.
            wait_and_give_up(&mut channel.clone(), task);
            wait_and_give_up(&mut channel, task);
        }
        let held = tasks.iter().filter(|task| Arc::strong_count(task) > 1).count();
        assert_eq!(held, 1, "the last one, by the handle that stays");
        // What waits by several handles is woken all the same.
        let mut other = channel.clone();
        wait_and_give_up(&mut other, &tasks[0]);
        wait_and_give_up(&mut channel, &tasks[0]);
        assert_eq!(channel.seat.readers.0.lock().len(), 2);
        let mut room = [0];
        let read = far.poll_readv(&mut cx, &mut [IoSliceMut::new(&mut room)], None, ReadFlags::empty());
        assert!(read.is_ready());
        assert!(channel.seat.writers.0.lock().is_empty(), "room wakes all of them");
    }
}
