//! [`Gate`]: keeps a read-modify-write of whole blocks apart from other changes of the same blocks.
//!
//! Direct files take aligned writes only. A smaller write reads its blocks, changes them and writes them back; any
//! change of those blocks that happened in between would be undone. So every change of a direct file holds its blocks
//! here while it runs: read-modify-writes alone, the others together.

use parking_lot::{Condvar, Mutex};
use std::ops::Range;
use std::sync::Arc;

/// Which ranges are being changed.
#[derive(Default)]
pub(crate) struct Gate {
    held: Mutex<Vec<Held>>,
    released: Condvar,
}

struct Held {
    number: u64,
    range: Range<u64>,
    alone: bool,
}

/// Holds a range until it is dropped.
pub(crate) struct Pass {
    gate: Arc<Gate>,
    number: u64,
}

impl Gate {
    /// Waits until `range` may be changed: `alone`, or together with others that are not alone.
    ///
    /// Whoever holds a pass must not wait for another one. What holds a pass while it is in the kernel's hands (a
    /// request on the ring) needs no pass to come to its end, so waiting ends.
    pub(crate) fn enter(self: &Arc<Self>, range: Range<u64>, alone: bool) -> Pass {
        let mut held = self.held.lock();
        let overlaps = |other: &Held| {
            other.range.start < range.end && range.start < other.range.end && (alone || other.alone)
        };
        while held.iter().any(overlaps) {
            self.released.wait(&mut held);
        }
        let number = held.iter().map(|other| other.number).max().map_or(0, |last| last.wrapping_add(1));
        held.push(Held { number, range, alone });
        Pass { gate: self.clone(), number }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut held = self.gate.held.lock();
        held.retain(|other| other.number != self.number);
        drop(held);
        self.gate.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn alone_excludes_overlapping_changes_and_nothing_else() {
        let gate = Arc::new(Gate::default());
        let first = gate.enter(0..4096, false);
        let _together = gate.enter(0..8192, false);
        let _elsewhere = gate.enter(8192..12288, true);
        let (send, receive) = mpsc::channel();
        let other = gate.clone();
        let thread = std::thread::spawn(move || {
            let pass = other.enter(0..1, true);
            send.send(()).unwrap();
            drop(pass);
        });
        assert!(receive.recv_timeout(Duration::from_millis(50)).is_err());
        drop(first);
        assert!(receive.recv_timeout(Duration::from_millis(50)).is_err());
        drop(_together);
        receive.recv().unwrap();
        thread.join().unwrap();
    }
}
