//! [`IoContext`]: the threads and the ring that files share.

use crate::threads::{WorkQueue, processors};
use crate::uring::Ring;
use std::sync::{Arc, OnceLock};
use vellum_core::Events;

/// How a file's requests are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Driver {
    /// On the thread that asks. No threads at all.
    Inline,
    /// On threads of the context. What the page cache holds is read on the thread that asks, and small writes go into
    /// the page cache there, as long as that is quick.
    #[default]
    Pool,
    /// By Linux's io_uring; the page cache is read and written as with [`Driver::Pool`]. Where io_uring is forbidden
    /// (containers often do), this is [`Driver::Pool`] with a warning.
    Uring,
}

/// Options of an [`IoContext`].
#[derive(Clone)]
pub struct ContextOptions {
    /// Threads of the pool at most.
    pub threads: usize,
    /// Requests that wait for a thread at most. What exceeds them is carried out by the thread that asks, which
    /// bounds what is in flight and cannot deadlock.
    pub waiting_max: usize,
    /// Requests on the ring at most; what exceeds them is carried out by the thread that asks.
    pub ring_entries: u32,
    /// Where warnings go.
    pub events: Events,
}

impl Default for ContextOptions {
    fn default() -> Self {
        ContextOptions {
            // Threads mostly wait for the disk, so more than there are processors.
            threads: (processors() * 4).clamp(4, 16),
            waiting_max: 256,
            ring_entries: 128,
            events: Events::default(),
        }
    }
}

/// The threads and the ring that files share. Cheap to clone; nothing starts before it is needed.
///
/// Its threads end when the last file and the last clone are gone; requests that are under way end first.
#[derive(Clone)]
pub struct IoContext(Arc<Inner>);

struct Inner {
    pool: Arc<WorkQueue>,
    ring: OnceLock<Option<Arc<Ring>>>,
    ring_entries: u32,
    events: Events,
}

impl IoContext {
    /// A context of its own.
    pub fn new(options: ContextOptions) -> Self {
        let pool = WorkQueue::new("vellum-io", options.threads.max(1), options.waiting_max, true);
        IoContext(Arc::new(Inner {
            pool: Arc::new(pool),
            ring: OnceLock::new(),
            ring_entries: options.ring_entries.clamp(2, 4096),
            events: options.events,
        }))
    }

    /// The context of files that name no other.
    pub fn shared() -> IoContext {
        static SHARED: OnceLock<IoContext> = OnceLock::new();
        SHARED.get_or_init(|| IoContext::new(ContextOptions::default())).clone()
    }

    /// Whether io_uring works here. Sets the ring up if that was not tried yet.
    pub fn has_ring(&self) -> bool {
        self.ring().is_some()
    }

    pub(crate) fn events(&self) -> &Events {
        &self.0.events
    }

    pub(crate) fn pool(&self) -> Arc<WorkQueue> {
        self.0.pool.clone()
    }

    pub(crate) fn ring(&self) -> Option<Arc<Ring>> {
        let ring = self.0.ring.get_or_init(|| match Ring::new(self.0.ring_entries, self.0.pool.clone()) {
            Ok(ring) => Some(Arc::new(ring)),
            Err(error) => {
                self.0
                    .events
                    .warn(&format!("io_uring is not available here ({error}); using threads instead"));
                None
            }
        });
        ring.clone()
    }
}
