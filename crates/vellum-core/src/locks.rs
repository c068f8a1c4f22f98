//! [`RangeLocks`]: who is at work on which guest range.
//!
//! Requests are granted in the order in which they came: one that overlaps an earlier one waits for it, unless both
//! only read. So nobody starves, and what two overlapping writes leave is always the whole of one over the other.

use crate::sync::{Arc, Mutex};
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// What a holder does with its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Reads: goes together with other readers.
    Shared,
    /// Changes data or where data lies: alone.
    Exclusive,
}

/// The ranges that are held or waited for. Cheap to clone; clones are the same table.
#[derive(Clone)]
pub struct RangeLocks(Arc<Mutex<Table>>);

struct Table {
    /// In the order of asking.
    entries: Vec<Entry>,
    next: u64,
}

struct Entry {
    ticket: u64,
    range: Range<u64>,
    hold: Hold,
    granted: bool,
    waker: Option<Waker>,
}

impl Entry {
    fn hinders(&self, range: &Range<u64>, hold: Hold) -> bool {
        (self.hold == Hold::Exclusive || hold == Hold::Exclusive)
            && self.range.start < range.end
            && range.start < self.range.end
    }
}

impl Default for RangeLocks {
    fn default() -> Self {
        RangeLocks(Arc::new(Mutex::new(Table { entries: Vec::new(), next: 0 })))
    }
}

impl RangeLocks {
    /// Takes the range if nobody who came earlier is in the way.
    pub fn try_lock(&self, range: Range<u64>, hold: Hold) -> Option<RangeGuard> {
        let mut table = self.0.lock();
        if table.entries.iter().any(|entry| entry.hinders(&range, hold)) {
            return None;
        }
        let ticket = table.enter(range, hold, true, None);
        Some(RangeGuard { locks: self.clone(), ticket })
    }

    /// Takes the range as soon as all who came earlier and overlap it are done. Dropping the future gives up.
    pub fn lock(&self, range: Range<u64>, hold: Hold) -> Acquire {
        Acquire { locks: self.clone(), range, hold, ticket: None }
    }

    fn leave(&self, ticket: u64) {
        let woken = {
            let mut table = self.0.lock();
            match table.entries.iter().position(|entry| entry.ticket == ticket) {
                Some(index) => {
                    let gone = table.entries.remove(index);
                    table.grant(index, &gone.range)
                }
                None => Vec::new(),
            }
        };
        // Outside the lock: a waker may run what it wakes.
        for waker in woken {
            crate::completion::wake_here(waker);
        }
    }
}

impl Table {
    fn enter(&mut self, range: Range<u64>, hold: Hold, granted: bool, waker: Option<Waker>) -> u64 {
        let ticket = self.next;
        self.next += 1;
        self.entries.push(Entry { ticket, range, hold, granted, waker });
        ticket
    }

    /// Grants those from `index` on that waited for `range`, which is free now.
    fn grant(&mut self, index: usize, range: &Range<u64>) -> Vec<Waker> {
        let mut woken = Vec::new();
        for at in index..self.entries.len() {
            let (earlier, rest) = self.entries.split_at_mut(at);
            let Some(entry) = rest.first_mut() else { break };
            let overlaps = entry.range.start < range.end && range.start < entry.range.end;
            if entry.granted || !overlaps {
                continue;
            }
            if !earlier.iter().any(|other| other.hinders(&entry.range, entry.hold)) {
                entry.granted = true;
                woken.extend(entry.waker.take());
            }
        }
        woken
    }
}

/// The future of [`RangeLocks::lock`].
pub struct Acquire {
    locks: RangeLocks,
    range: Range<u64>,
    hold: Hold,
    ticket: Option<u64>,
}

impl Future for Acquire {
    type Output = RangeGuard;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<RangeGuard> {
        let ticket = {
            let mut table = self.locks.0.lock();
            match self.ticket {
                None => {
                    let free = !table.entries.iter().any(|entry| entry.hinders(&self.range, self.hold));
                    let waker = (!free).then(|| context.waker().clone());
                    let ticket = table.enter(self.range.clone(), self.hold, free, waker);
                    (ticket, free)
                }
                Some(ticket) => {
                    let Some(entry) = table.entries.iter_mut().find(|entry| entry.ticket == ticket) else {
                        return Poll::Pending; // polled again after it was granted
                    };
                    if !entry.granted {
                        entry.waker = Some(context.waker().clone());
                    }
                    (ticket, entry.granted)
                }
            }
        };
        match ticket {
            (ticket, true) => {
                self.ticket = None;
                Poll::Ready(RangeGuard { locks: self.locks.clone(), ticket })
            }
            (ticket, false) => {
                self.ticket = Some(ticket);
                Poll::Pending
            }
        }
    }
}

impl Drop for Acquire {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.locks.leave(ticket);
        }
    }
}

/// A range that is held until this is dropped.
pub struct RangeGuard {
    locks: RangeLocks,
    ticket: u64,
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        self.locks.leave(self.ticket);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn poll(acquire: &mut Acquire) -> Option<RangeGuard> {
        match Pin::new(acquire).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(guard) => Some(guard),
            Poll::Pending => None,
        }
    }

    #[test]
    fn readers_share_and_writers_are_alone() {
        let locks = RangeLocks::default();
        let a = locks.try_lock(0..10, Hold::Shared).unwrap();
        let b = locks.try_lock(5..15, Hold::Shared).unwrap();
        assert!(locks.try_lock(9..20, Hold::Exclusive).is_none());
        assert!(locks.try_lock(15..20, Hold::Exclusive).is_some());
        drop((a, b));
        assert!(locks.try_lock(0..20, Hold::Exclusive).is_some());
    }

    #[test]
    fn who_came_first_is_served_first() {
        let locks = RangeLocks::default();
        let first = locks.try_lock(0..10, Hold::Shared).unwrap();
        let mut writer = locks.lock(0..10, Hold::Exclusive);
        assert!(poll(&mut writer).is_none());
        // A reader that came after the waiting writer does not overtake it.
        assert!(locks.try_lock(0..10, Hold::Shared).is_none());
        let mut reader = locks.lock(5..6, Hold::Shared);
        assert!(poll(&mut reader).is_none());
        drop(first);
        assert!(poll(&mut reader).is_none());
        let held = poll(&mut writer).unwrap();
        drop(held);
        assert!(poll(&mut reader).is_some());
    }

    #[test]
    fn who_gives_up_lets_the_next_one_in() {
        let locks = RangeLocks::default();
        let first = locks.try_lock(0..10, Hold::Shared).unwrap();
        let mut writer = locks.lock(0..10, Hold::Exclusive);
        assert!(poll(&mut writer).is_none());
        let mut reader = locks.lock(0..10, Hold::Shared);
        assert!(poll(&mut reader).is_none());
        drop(writer);
        assert!(poll(&mut reader).is_some());
        drop(first);
        assert!(locks.0.lock().entries.is_empty());
    }

    #[test]
    fn threads_never_hold_overlapping_ranges_together() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let locks = RangeLocks::default();
        let cells: Vec<AtomicU32> = (0..32).map(|_| AtomicU32::new(0)).collect();
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let (locks, cells) = (&locks, &cells);
                scope.spawn(move || {
                    let mut random = thread * 7919 + 1;
                    for _ in 0..2000 {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let start = (random >> 33) % 30;
                        let end = start + 1 + (random >> 50) % 2;
                        let guard = crate::block_on(locks.lock(start..end, Hold::Exclusive));
                        for cell in &cells[start as usize..end as usize] {
                            assert_eq!(cell.fetch_add(1, Ordering::SeqCst), 0);
                        }
                        for cell in &cells[start as usize..end as usize] {
                            cell.fetch_sub(1, Ordering::SeqCst);
                        }
                        drop(guard);
                    }
                });
            }
        });
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;

    #[test]
    fn a_waiter_is_always_let_in_and_never_beside_another() {
        loom::model(|| {
            let locks = RangeLocks::default();
            let inside = loom::sync::Arc::new(loom::sync::atomic::AtomicUsize::new(0));
            let threads: Vec<_> = [0..2u64, 1..3]
                .into_iter()
                .map(|range| {
                    let (locks, inside) = (locks.clone(), inside.clone());
                    loom::thread::spawn(move || {
                        let guard = loom::future::block_on(locks.lock(range, Hold::Exclusive));
                        assert_eq!(inside.fetch_add(1, loom::sync::atomic::Ordering::SeqCst), 0);
                        inside.fetch_sub(1, loom::sync::atomic::Ordering::SeqCst);
                        drop(guard);
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }

    /// Polls once; the request is then in the queue, granted or not.
    fn poll_once(acquire: &mut Acquire) -> Option<RangeGuard> {
        match Pin::new(acquire).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(guard) => Some(guard),
            Poll::Pending => None,
        }
    }

    /// Three threads in all orders take hours; with three preemptions, seconds.
    fn bounded() -> loom::model::Builder {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder
    }

    #[test]
    fn who_gives_up_strands_nobody() {
        bounded().check(|| {
            let locks = RangeLocks::default();
            let held = locks.try_lock(0..2, Hold::Shared).unwrap();
            // A writer waits for the reader, and a second reader for the writer.
            let mut writer = locks.lock(0..2, Hold::Exclusive);
            assert!(poll_once(&mut writer).is_none());
            let reader = {
                let locks = locks.clone();
                loom::thread::spawn(move || drop(loom::future::block_on(locks.lock(0..1, Hold::Shared))))
            };
            let releaser = loom::thread::spawn(move || drop(held));
            // The writer may have been granted in this very moment.
            drop(writer);
            reader.join().unwrap();
            releaser.join().unwrap();
            assert!(locks.try_lock(0..2, Hold::Exclusive).is_some());
        });
    }

    #[test]
    fn readers_and_a_writer_all_come_to_their_turn() {
        bounded().check(|| {
            let locks = RangeLocks::default();
            let writing = loom::sync::Arc::new(loom::sync::atomic::AtomicBool::new(false));
            let threads: Vec<_> = [Hold::Shared, Hold::Exclusive]
                .into_iter()
                .map(|hold| {
                    let (locks, writing) = (locks.clone(), writing.clone());
                    loom::thread::spawn(move || {
                        let guard = loom::future::block_on(locks.lock(0..1, hold));
                        let order = loom::sync::atomic::Ordering::SeqCst;
                        let was = writing.swap(hold == Hold::Exclusive, order);
                        assert!(!was, "beside a writer");
                        writing.store(false, order);
                        drop(guard);
                    })
                })
                .collect();
            let guard = loom::future::block_on(locks.lock(0..1, Hold::Shared));
            assert!(!writing.load(loom::sync::atomic::Ordering::SeqCst));
            drop(guard);
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }
}
