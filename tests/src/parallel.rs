//! Work on two threads: the machines that run these tests have two processors.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Calls `work` for every item, two at a time. A panic of one is reported with its item.
pub fn two_at_a_time<T: Sync + std::fmt::Debug>(items: &[T], work: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    let failed = std::thread::scope(|scope| {
        let run = || {
            let mut failed = Vec::new();
            while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(item)));
                if let Err(cause) = outcome {
                    let text = cause.downcast_ref::<String>().cloned();
                    let text = text.or_else(|| cause.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                    failed.push(format!("{item:?}: {}", text.unwrap_or_default()));
                }
            }
            failed
        };
        let workers = [scope.spawn(run), scope.spawn(run)];
        let mut all = Vec::new();
        for worker in workers {
            all.extend(worker.join().expect("panics are caught"));
        }
        all
    });
    assert!(failed.is_empty(), "{} of {} failed:\n{}", failed.len(), items.len(), failed.join("\n"));
}
