//! Threads that wait for work: [`CpuPool`] for computing, and the queue behind the `pool` driver.

use parking_lot::{Condvar, Mutex};
use std::cell::Cell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use vellum_core::Spawner;

/// Threads that compute: decoding and encoding of blocks.
///
/// Threads start when there is work for them. Work that was handed over runs to its end even if the pool is
/// dropped; work that panics loses its own answer only.
pub struct CpuPool {
    queue: WorkQueue,
    threads: usize,
}

impl CpuPool {
    /// A pool of at most `threads` threads (at least one).
    pub fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        CpuPool { queue: WorkQueue::new("vellum-cpu", threads, usize::MAX, false), threads }
    }

    /// A pool with one thread for each processor that this process may use.
    pub fn for_this_machine() -> Self {
        CpuPool::new(processors())
    }
}

impl Spawner for CpuPool {
    fn spawn(&self, work: Box<dyn FnOnce() + Send>) {
        // Refused only if no thread can be started at all: then the caller computes.
        if let Err(work) = self.queue.push(work) {
            work();
        }
    }

    fn threads(&self) -> usize {
        self.threads
    }
}

/// Processors that this process may use.
pub(crate) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

pub(crate) type Work = Box<dyn FnOnce() + Send>;

thread_local! {
    static IO_THREAD: Cell<bool> = const { Cell::new(false) };
}

/// Marks this thread as one that completes I/O, so that nothing on it waits for I/O to complete.
pub(crate) fn become_io_thread() {
    IO_THREAD.set(true);
}

/// Whether this thread completes I/O.
pub(crate) fn is_io_thread() -> bool {
    // A thread that is ending has lost its mark: say yes, which only means not to wait.
    IO_THREAD.try_with(Cell::get).unwrap_or(true)
}

/// A queue of work and the threads that carry it out.
pub(crate) struct WorkQueue(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    ready: Condvar,
    name: &'static str,
    threads_max: usize,
    waiting_max: usize,
    io: bool,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Work>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl WorkQueue {
    /// At most `threads_max` threads and `waiting_max` pieces of work that wait for one.
    pub(crate) fn new(name: &'static str, threads_max: usize, waiting_max: usize, io: bool) -> Self {
        let (state, ready) = (Mutex::default(), Condvar::new());
        WorkQueue(Arc::new(Shared { state, ready, name, threads_max, waiting_max, io }))
    }

    /// Hands work over; gives it back if too much waits already.
    pub(crate) fn push(&self, work: Work) -> Result<(), Work> {
        let mut state = self.0.state.lock();
        if state.waiting.len() >= self.0.waiting_max {
            return Err(work);
        }
        state.waiting.push_back(work);
        if state.waiting.len() > state.idle && state.threads < self.0.threads_max {
            let shared = self.0.clone();
            let spawned =
                std::thread::Builder::new().name(self.0.name.to_owned()).spawn(move || shared.work());
            match spawned {
                Ok(_) => state.threads += 1,
                // Nobody would ever take it.
                Err(_) if state.threads == 0 => {
                    return match state.waiting.pop_back() {
                        Some(work) => Err(work),
                        None => Ok(()),
                    };
                }
                Err(_) => {}
            }
        }
        drop(state);
        self.0.ready.notify_one();
        Ok(())
    }
}

impl Drop for WorkQueue {
    fn drop(&mut self) {
        // The threads finish what waits, then end. They own all that they need.
        self.0.state.lock().closed = true;
        self.0.ready.notify_all();
    }
}

impl Shared {
    fn work(&self) {
        if self.io {
            become_io_thread();
        }
        while let Some(work) = self.next() {
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                tracing::error!("work on thread {} panicked; its answer is lost", self.name);
            }
        }
    }

    fn next(&self) -> Option<Work> {
        let mut state = self.state.lock();
        loop {
            if let Some(work) = state.waiting.pop_front() {
                return Some(work);
            }
            if state.closed {
                state.threads -= 1;
                return None;
            }
            state.idle += 1;
            self.ready.wait(&mut state);
            state.idle -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn work_runs_on_so_many_threads_at_once_and_no_more() {
        let pool = CpuPool::new(3);
        let (send, receive) = mpsc::channel();
        let gate = Arc::new(std::sync::Barrier::new(3));
        for _ in 0..30 {
            let (send, gate) = (send.clone(), gate.clone());
            // The barrier opens only if three run at the same time.
            pool.spawn(Box::new(move || {
                gate.wait();
                send.send(std::thread::current().id()).unwrap();
            }));
        }
        drop(send);
        let ids: std::collections::HashSet<_> = receive.iter().collect();
        assert_eq!(ids.len(), 3);
        assert_eq!(pool.threads(), 3);
    }

    #[test]
    fn a_panic_costs_one_answer_not_the_thread_and_a_dropped_pool_finishes() {
        let pool = CpuPool::new(1);
        let (send, receive) = mpsc::channel();
        pool.spawn(Box::new(|| panic!("on purpose")));
        for number in 0..100 {
            let send = send.clone();
            pool.spawn(Box::new(move || send.send(number).unwrap()));
        }
        drop((pool, send));
        assert_eq!(receive.iter().collect::<Vec<_>>(), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_full_queue_gives_the_work_back() {
        let queue = WorkQueue::new("test", 1, 2, false);
        let gate = Arc::new(std::sync::Barrier::new(2));
        let held = gate.clone();
        assert!(
            queue
                .push(Box::new(move || {
                    held.wait();
                }))
                .is_ok()
        );
        while !queue.0.state.lock().waiting.is_empty() {
            std::thread::yield_now();
        }
        assert!(queue.push(Box::new(|| ())).is_ok());
        assert!(queue.push(Box::new(|| ())).is_ok());
        assert!(queue.push(Box::new(|| ())).is_err());
        gate.wait();
    }
}
