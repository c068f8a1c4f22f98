//! One table cache for all formats: pages of block maps, grain tables, L2 tables, within a budget.
//!
//! Pages are immutable once loaded and shared; a lookup is one read lock and one hash. (Writing comes with
//! in-place writes; a dirty page will be a new page in the same place.)

use crate::{Buf, Result, Storage};
use parking_lot::RwLock;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Caches pages of one storage's tables.
pub struct TableCache {
    storage: Arc<dyn Storage>,
    budget_bytes: usize,
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    pages: HashMap<u64, Slot>,
    // Clock order: the front is looked at first; a page used since gets another turn.
    clock: VecDeque<u64>,
    bytes: usize,
}

struct Slot {
    page: Arc<[u8]>,
    used: AtomicBool,
}

impl TableCache {
    /// A cache over `storage` that keeps at most `budget_bytes` (but always one page).
    pub fn new(storage: Arc<dyn Storage>, budget_bytes: usize) -> Self {
        TableCache { storage, budget_bytes, state: RwLock::default() }
    }

    /// The page that was loaded from byte `offset`, if it is still there.
    pub fn get(&self, offset: u64) -> Option<Arc<[u8]>> {
        let state = self.state.read();
        let slot = state.pages.get(&offset)?;
        slot.used.store(true, Ordering::Relaxed);
        Some(slot.page.clone())
    }

    /// Loads `len` bytes at `offset` as a page. Callers always use the same length for the same offset.
    pub async fn load(&self, offset: u64, len: usize) -> Result<Arc<[u8]>> {
        if let Some(page) = self.get(offset) {
            return Ok(page);
        }
        let (buf, result) = self.storage.read_at(Buf::zeroed(len), offset).await;
        result.map_err(|e| e.context("reading a table"))?;
        let page: Arc<[u8]> = Arc::from(&*buf);
        self.insert(offset, page.clone());
        Ok(page)
    }

    fn insert(&self, offset: u64, page: Arc<[u8]>) {
        let mut state = self.state.write();
        if state.pages.contains_key(&offset) {
            return;
        }
        while state.bytes + page.len() > self.budget_bytes {
            let Some(oldest) = state.clock.pop_front() else { break };
            let again = state.pages.get(&oldest).is_some_and(|slot| slot.used.swap(false, Ordering::Relaxed));
            if again {
                state.clock.push_back(oldest);
            } else if let Some(slot) = state.pages.remove(&oldest) {
                state.bytes -= slot.page.len();
            }
        }
        state.bytes += page.len();
        state.clock.push_back(offset);
        state.pages.insert(offset, Slot { page, used: AtomicBool::new(false) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Memory, block_on};

    #[test]
    fn the_budget_holds_and_evicted_pages_come_back() {
        let bytes: Vec<u8> = (0..65536u32).map(|i| (i / 256) as u8).collect();
        let cache = TableCache::new(Arc::new(Memory::from_bytes("t", &bytes)), 4096);
        for round in 0..3 {
            for page in 0..256u64 {
                let loaded = block_on(cache.load(page * 256, 256)).unwrap();
                assert!(loaded.iter().all(|b| u64::from(*b) == page), "round {round}");
                assert!(cache.state.read().bytes <= 4096);
            }
        }
        assert!(cache.get(255 * 256).is_some());
        assert!(cache.get(0).is_none());
    }
}
