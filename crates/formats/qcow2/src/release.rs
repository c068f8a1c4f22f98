//! Letting clusters go: not before nothing durable points to them, and not given out again before the host has them back.
//!
//! ```text
//!   release_after_flush -> pending -- freeze, commit, thaw --> released -- settle --> hole, count - 1, free
//!   release_now         ------------------------------------->
//! ```

use crate::alloc::Allocator;
use crate::map::PAGE;
use std::ops::Range;
use vellum_core::{Result, bytes};

impl Allocator {
    /// One reference less to each of `clusters`, once the pointers that were just changed in memory are durable: with
    /// the settling after the next flush. Call it *after* the pointers were changed.
    pub fn release_after_flush(&self, clusters: Range<u64>) {
        push(&mut self.state.lock().pending, clusters);
    }

    /// One reference less to each of `clusters`, to which nothing durable points.
    pub fn release_now(&self, clusters: Range<u64>) {
        push(&mut self.state.lock().released, clusters);
    }

    /// For [`vellum_core::Committer::commit`]: what was let go until now.
    pub fn freeze(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut self.state.lock().pending)
    }

    /// For [`vellum_core::Committer::commit`]: nothing durable points there any more.
    pub fn thaw(&self, mut clusters: Vec<Range<u64>>) {
        self.state.lock().released.append(&mut clusters);
    }

    /// Clusters wait for a flush or for settling.
    pub fn is_settled(&self) -> bool {
        let state = self.state.lock();
        state.pending.is_empty() && state.released.is_empty()
    }

    /// So much was let go that a flush should come.
    pub fn wants_flush(&self) -> bool {
        self.state.lock().pending.len() > 1 << 16
    }

    /// Takes the references down that [`Allocator::thaw`] and [`Allocator::release_now`] named. Clusters that nobody
    /// refers to any more are given back to the host and can be handed out again. The counts reach the file with
    /// the next flush.
    ///
    /// # Errors
    /// `CORRUPT` if a count is 0 already.
    pub async fn settle(&self) -> Result<()> {
        let _alone = self.settling.lock().await;
        let released = std::mem::take(&mut self.state.lock().released);
        let mut free: Vec<Range<u64>> = Vec::new();
        for clusters in released {
            self.take_down(clusters, &mut free).await?;
        }
        for clusters in free {
            let range = bytes::mul(clusters.start, self.cluster)?..bytes::mul(clusters.end, self.cluster)?;
            self.forget_pages(range.clone());
            // The hole is there before anybody writes to the place again.
            let end = range.end.min(self.storage().len()?);
            if range.start < end {
                self.storage().discard(range.start..end).await.map_err(|e| e.context("giving space back"))?;
            }
            self.change(clusters.clone(), &|_, _| Ok(0)).await?;
            let mut state = self.state.lock();
            state.cursor = state.cursor.min(clusters.start);
        }
        Ok(())
    }

    /// Lowers the counts of `clusters` that others refer to, too; the rest is put on the list `free`.
    async fn take_down(&self, clusters: Range<u64>, free: &mut Vec<Range<u64>>) -> Result<()> {
        for cluster in clusters {
            let only = cluster..cluster.saturating_add(1);
            match self.refcount(cluster).await? {
                0 => return Err(self.bad_count(cluster, 0)),
                1 => push(free, only),
                _ => self.decrement(only).await?,
            }
        }
        Ok(())
    }

    /// Cached tables that stood in `range` do not any more.
    fn forget_pages(&self, range: Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            // Tables begin at clusters, pages of them at multiples of PAGE from there.
            if self.tables.get(at).is_some() {
                self.tables.forget(at..at.saturating_add(1));
            }
            at = at.saturating_add(self.cluster.min(PAGE));
        }
    }
}

/// Puts clusters on a list, joined with those just before.
pub(crate) fn push(list: &mut Vec<Range<u64>>, clusters: Range<u64>) {
    if clusters.is_empty() {
        return;
    }
    match list.last_mut() {
        Some(last) if last.end == clusters.start => last.end = clusters.end,
        _ => list.push(clusters),
    }
}
