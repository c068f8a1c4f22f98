//! [`Completion`]: the one currency between storage, engine, servers and blocking callers.
//!
//! It is a value that is there already, a slot that another thread will fill, or a boxed future.
//! It is a [`Future`], can be waited for without any runtime, and takes a callback. Dropping it
//! abandons the answer, never the operation: whoever fills the slot does so all the same.

use crate::sync::{Arc, Mutex};
use crate::{Buf, Code, Error, Result};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Wake, Waker};

/// A boxed future that can cross threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The buffer of an operation together with its result: it always comes back.
pub type WithBuf = (Buf, Result<()>);

/// The result of an operation that may not have ended yet.
#[must_use = "an operation whose completion is dropped reports its errors to nobody"]
pub struct Completion<T>(State<T>);

enum State<T> {
    Ready(T),
    Slot(Arc<Slot<T>>),
    Future(BoxFuture<'static, T>),
    Taken,
}

/// What a completion yields when the side that should fill it went away.
pub trait Lost {
    /// The value that says so.
    fn lost() -> Self;
}

impl<T> Lost for Result<T> {
    fn lost() -> Self {
        Err(Error::new(Code::Lost, "the I/O driver stopped before it answered"))
    }
}

impl Lost for (Vec<Buf>, Result<()>) {
    fn lost() -> Self {
        (Vec::new(), Result::lost())
    }
}

impl Lost for WithBuf {
    fn lost() -> Self {
        (Buf::zeroed(0), Result::lost())
    }
}

impl<T: Send + 'static> Completion<T> {
    /// A completion that is there already.
    pub fn ready(value: T) -> Self {
        Completion(State::Ready(value))
    }

    /// A completion that `future` computes when it is polled or waited for.
    pub fn from_future(future: impl Future<Output = T> + Send + 'static) -> Self {
        Completion(State::Future(Box::pin(future)))
    }

    /// A completion whose `future` starts now and runs to its end even if the completion is dropped: polled here,
    /// then on the threads that wake it. For changes that take several steps.
    pub fn started(future: impl Future<Output = T> + Send + 'static) -> Self
    where
        T: Lost,
    {
        let (completer, completion) = Self::slot();
        let driven: BoxFuture<'static, ()> = Box::pin(async move { completer.complete(future.await) });
        Driver::start(driven);
        completion
    }

    /// A completion and the end that fills it from any thread.
    pub fn slot() -> (Completer<T>, Self)
    where
        T: Lost,
    {
        let slot = Arc::new(Slot { state: Mutex::new(SlotState::Empty) });
        (Completer { slot: Some(slot.clone()) }, Completion(State::Slot(slot)))
    }

    /// The value, if it is there without waiting; else the completion back.
    pub fn try_take(mut self) -> std::result::Result<T, Self> {
        match std::mem::replace(&mut self.0, State::Taken) {
            State::Ready(value) => Ok(value),
            State::Slot(slot) => match slot.take() {
                Some(value) => Ok(value),
                None => Err(Completion(State::Slot(slot))),
            },
            other => Err(Completion(other)),
        }
    }

    /// Blocks this thread until the value is there. Needs no runtime.
    pub fn wait(self) -> T {
        match self.try_take() {
            Ok(value) => value,
            Err(pending) => block_on(pending),
        }
    }

    /// Calls `callback` with the value: now if it is there, else on the thread that completes it.
    pub fn on_complete(self, callback: impl FnOnce(T) + Send + 'static) {
        match self.0 {
            State::Ready(value) => callback(value),
            State::Slot(slot) => slot.call(Box::new(callback)),
            State::Future(future) => {
                let driven: BoxFuture<'static, ()> = Box::pin(async move { callback(future.await) });
                Driver::start(driven);
            }
            State::Taken => {}
        }
    }
}

impl<T> Future for Completion<T> {
    type Output = T;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        match &mut self.0 {
            State::Slot(slot) => {
                let polled = slot.poll(context.waker());
                if polled.is_ready() {
                    self.0 = State::Taken;
                }
                polled
            }
            State::Future(future) => {
                let polled = future.as_mut().poll(context);
                if polled.is_ready() {
                    self.0 = State::Taken;
                }
                polled
            }
            State::Ready(_) | State::Taken => match std::mem::replace(&mut self.0, State::Taken) {
                State::Ready(value) => Poll::Ready(value),
                // Polled again after it was ready: a caller's mistake that must not look like data.
                _ => Poll::Pending,
            },
        }
    }
}

// The value is moved out whole; nothing borrows from it while it is pinned.
impl<T> Unpin for Completion<T> {}

/// The end of a slot that gives the value. Dropped unused, it completes with [`Lost::lost`].
pub struct Completer<T: Lost> {
    slot: Option<Arc<Slot<T>>>,
}

impl<T: Lost> Completer<T> {
    /// Gives the value: wakes who waits, or calls the callback on this thread.
    pub fn complete(mut self, value: T) {
        if let Some(slot) = self.slot.take() {
            slot.fill(value);
        }
    }
}

impl<T: Lost> Drop for Completer<T> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            slot.fill(T::lost());
        }
    }
}

type Callback<T> = Box<dyn FnOnce(T) + Send>;

struct Slot<T> {
    state: Mutex<SlotState<T>>,
}

enum SlotState<T> {
    Empty,
    Waiting(Waker),
    Callback(Callback<T>),
    Full(T),
    Taken,
}

impl<T> Slot<T> {
    fn fill(&self, value: T) {
        let mut state = self.state.lock();
        match std::mem::replace(&mut *state, SlotState::Taken) {
            SlotState::Callback(callback) => {
                drop(state);
                callback(value);
            }
            SlotState::Waiting(waker) => {
                *state = SlotState::Full(value);
                drop(state);
                wake_here(waker);
            }
            SlotState::Empty => *state = SlotState::Full(value),
            SlotState::Full(_) | SlotState::Taken => {}
        }
    }

    fn take(&self) -> Option<T> {
        let mut state = self.state.lock();
        match std::mem::replace(&mut *state, SlotState::Taken) {
            SlotState::Full(value) => Some(value),
            other => {
                *state = other;
                None
            }
        }
    }

    fn poll(&self, waker: &Waker) -> Poll<T> {
        let mut state = self.state.lock();
        match std::mem::replace(&mut *state, SlotState::Taken) {
            SlotState::Full(value) => Poll::Ready(value),
            SlotState::Waiting(old) if old.will_wake(waker) => {
                *state = SlotState::Waiting(old);
                Poll::Pending
            }
            SlotState::Empty | SlotState::Waiting(_) => {
                *state = SlotState::Waiting(waker.clone());
                Poll::Pending
            }
            other => {
                *state = other;
                Poll::Pending
            }
        }
    }

    fn call(&self, callback: Callback<T>) {
        let mut state = self.state.lock();
        match std::mem::replace(&mut *state, SlotState::Taken) {
            SlotState::Full(value) => {
                drop(state);
                callback(value);
            }
            _ => *state = SlotState::Callback(callback),
        }
    }
}

/// Runs `future` to its end on this thread.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let mut future = std::pin::pin!(future);
    // The first poll usually ends it (inline drivers), and then no waker is ever needed.
    if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        return value;
    }
    let waker = Waker::from(std::sync::Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        // What this waits for may be queued on this very thread.
        run_queue();
        std::thread::park();
    }
}

/// Wakes from a place that holds no lock: what is woken may run here and now.
pub(crate) fn wake_here(waker: Waker) {
    let before = MAY_RUN_HERE.replace(true);
    waker.wake();
    MAY_RUN_HERE.set(before);
}

thread_local! {
    /// The waker on this thread holds no lock.
    static MAY_RUN_HERE: Cell<bool> = const { Cell::new(false) };
    /// A driver is polled on this thread, further down.
    static IS_POLLING: Cell<bool> = const { Cell::new(false) };
    /// Drivers that were woken meanwhile from places that may hold a lock.
    static QUEUE: RefCell<VecDeque<std::sync::Arc<Driver>>> = const { RefCell::new(VecDeque::new()) };
}

/// Drives one future without an executor: it is polled on the thread that wakes it.
///
/// At once, if the waker is known to hold no lock ([`wake_here`]). Others do hold one: `async-lock` notifies under
/// the lock that the woken future takes next. Those are polled when the driver that is being polled on this thread is
/// done; if there is none, on a thread of its own.
struct Driver {
    state: parking_lot::Mutex<DriverState>,
}

enum DriverState {
    Idle(BoxFuture<'static, ()>),
    Woken(BoxFuture<'static, ()>),
    Polling,
    PollingAndWoken,
    Done,
}

impl Driver {
    fn start(future: BoxFuture<'static, ()>) {
        let state = parking_lot::Mutex::new(DriverState::Woken(future));
        std::sync::Arc::new(Driver { state }).run();
    }

    /// Polls until the future waits or is done, then what was queued on this thread.
    fn run(self: std::sync::Arc<Self>) {
        let outer = IS_POLLING.replace(true);
        let may_run = MAY_RUN_HERE.replace(false);
        self.poll();
        if !outer {
            run_queue();
        }
        MAY_RUN_HERE.set(may_run);
        IS_POLLING.set(outer);
    }

    fn poll(self: std::sync::Arc<Self>) {
        let mut future = {
            let mut state = self.state.lock();
            match std::mem::replace(&mut *state, DriverState::Polling) {
                DriverState::Woken(future) => future,
                other => {
                    *state = other;
                    return;
                }
            }
        };
        let waker = Waker::from(self.clone());
        loop {
            let polled = future.as_mut().poll(&mut Context::from_waker(&waker));
            let mut state = self.state.lock();
            if polled.is_ready() {
                *state = DriverState::Done;
                return;
            }
            match std::mem::replace(&mut *state, DriverState::Polling) {
                DriverState::PollingAndWoken => continue,
                _ => {
                    *state = DriverState::Idle(future);
                    return;
                }
            }
        }
    }

    /// Polls on a thread that holds nothing. Rare: a lock was let go outside of any driver.
    fn run_elsewhere(self: std::sync::Arc<Self>) {
        static HELPER: std::sync::OnceLock<Option<std::sync::mpsc::Sender<std::sync::Arc<Driver>>>> =
            std::sync::OnceLock::new();
        let helper = HELPER.get_or_init(|| {
            let (send, receive) = std::sync::mpsc::channel::<std::sync::Arc<Driver>>();
            let work = move || receive.iter().for_each(Driver::run);
            std::thread::Builder::new().name("vellum-driver".into()).spawn(work).ok().map(|_| send)
        });
        match helper {
            Some(helper) => {
                let _ = helper.send(self);
            }
            // Without a thread there is only this one.
            None => self.run(),
        }
    }
}

fn run_queue() {
    while let Some(driver) = QUEUE.with_borrow_mut(VecDeque::pop_front) {
        driver.poll();
    }
}

impl Wake for Driver {
    fn wake(self: std::sync::Arc<Self>) {
        {
            let mut state = self.state.lock();
            match std::mem::replace(&mut *state, DriverState::PollingAndWoken) {
                DriverState::Idle(future) => *state = DriverState::Woken(future),
                DriverState::Polling | DriverState::PollingAndWoken => return,
                other => {
                    *state = other;
                    return;
                }
            }
        }
        if MAY_RUN_HERE.get() {
            self.run();
        } else if IS_POLLING.get() {
            QUEUE.with_borrow_mut(|queue| queue.push_back(self));
        } else {
            self.run_elsewhere();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_ready_value_is_there_at_once() {
        assert_eq!(Completion::ready(3).wait(), 3);
    }

    #[test]
    fn a_slot_wakes_a_waiting_thread() {
        let (completer, completion) = Completion::<Result<u32>>::slot();
        let filler = std::thread::spawn(move || completer.complete(Ok(5)));
        assert_eq!(completion.wait().unwrap(), 5);
        filler.join().unwrap();
    }

    #[test]
    fn a_dropped_completer_is_an_error_not_a_hang() {
        let (completer, completion) = Completion::<Result<u32>>::slot();
        drop(completer);
        assert_eq!(completion.wait().unwrap_err().code(), Code::Lost);
    }

    #[test]
    fn a_callback_runs_once_whenever_it_is_set() {
        for before in [true, false] {
            let (completer, completion) = Completion::<Result<u32>>::slot();
            let (send, receive) = mpsc::channel();
            if before {
                completion.on_complete(move |v| send.send(v.unwrap()).unwrap());
                completer.complete(Ok(1));
            } else {
                completer.complete(Ok(1));
                completion.on_complete(move |v| send.send(v.unwrap()).unwrap());
            }
            assert_eq!(receive.recv().unwrap(), 1);
            assert!(receive.recv().is_err());
        }
    }

    #[test]
    fn a_started_future_ends_though_its_completion_is_dropped() {
        let (completer, first) = Completion::<Result<u32>>::slot();
        let (send, receive) = mpsc::channel();
        drop(Completion::<Result<()>>::started(async move {
            send.send(first.await.unwrap()).unwrap();
            Ok(())
        }));
        completer.complete(Ok(4));
        assert_eq!(receive.recv().unwrap(), 4);
    }

    #[test]
    fn a_lock_that_is_let_go_wakes_without_a_deadlock() {
        // `async-lock` wakes the next in line under its own lock, which that one takes again when it is polled.
        let lock = std::sync::Arc::new(async_lock::Mutex::new(0));
        let (first, gate) = Completion::<Result<u32>>::slot();
        let holder = lock.clone();
        let held = Completion::<Result<()>>::started(async move {
            let mut value = holder.lock().await;
            gate.await?;
            *value += 1;
            Ok(())
        });
        let others: Vec<_> = (0..3)
            .map(|_| {
                let lock = lock.clone();
                Completion::<Result<()>>::started(async move {
                    *lock.lock().await += 1;
                    Ok(())
                })
            })
            .collect();
        first.complete(Ok(0));
        held.wait().unwrap();
        others.into_iter().for_each(|other| other.wait().unwrap());
        let guard = lock.try_lock().unwrap();
        let waits = {
            let lock = lock.clone();
            Completion::<Result<()>>::started(async move {
                *lock.lock().await += 1;
                Ok(())
            })
        };
        // Let go outside of any driver.
        drop(guard);
        waits.wait().unwrap();
        assert_eq!(*block_on(lock.lock()), 5);
    }

    #[test]
    fn a_future_is_driven_to_its_callback_by_the_completing_thread() {
        let (completer, completion) = Completion::<Result<u32>>::slot();
        let (send, receive) = mpsc::channel();
        Completion::from_future(async move { completion.await.unwrap() + 1 })
            .on_complete(move |v| send.send(v).unwrap());
        std::thread::spawn(move || completer.complete(Ok(1))).join().unwrap();
        assert_eq!(receive.recv().unwrap(), 2);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Count(AtomicUsize);
    impl Wake for Count {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_pending_poll_is_always_woken() {
        loom::model(|| {
            let (completer, mut completion) = Completion::<Result<u32>>::slot();
            let filler = loom::thread::spawn(move || completer.complete(Ok(9)));
            let count = std::sync::Arc::new(Count::default());
            let waker = Waker::from(count.clone());
            let first = Pin::new(&mut completion).poll(&mut Context::from_waker(&waker));
            filler.join().unwrap();
            if first.is_pending() {
                assert_eq!(count.0.load(Ordering::SeqCst), 1);
                assert!(Pin::new(&mut completion).poll(&mut Context::from_waker(&waker)).is_ready());
            }
        });
    }

    #[test]
    fn a_callback_races_completion_and_runs_exactly_once() {
        loom::model(|| {
            let (completer, completion) = Completion::<Result<u32>>::slot();
            let calls = std::sync::Arc::new(AtomicUsize::new(0));
            let seen = calls.clone();
            let filler = loom::thread::spawn(move || completer.complete(Ok(9)));
            completion.on_complete(move |_| {
                seen.fetch_add(1, Ordering::SeqCst);
            });
            filler.join().unwrap();
            assert_eq!(calls.load(Ordering::SeqCst), 1);
        });
    }
}
