//! Counts in the cached pages of the refcount blocks: looked up, and changed before any pointer to what they count.

use crate::alloc::{Allocator, State};
use crate::counts;
use crate::map::PAGE;
use std::ops::Range;
use std::sync::Arc;
use vellum_core::{Code, Error, Result, TableChange, bytes};

/// The answer of one try, made under the lock.
pub(crate) enum Try<T> {
    Done(T),
    /// This page of a refcount block is not in memory.
    Load(u64, usize),
    /// No refcount block counts this cluster yet.
    NoBlock(u64),
}

/// A page of a refcount block.
pub(crate) struct Page {
    pub offset: u64,
    pub bytes: Arc<[u8]>,
    /// The cluster that its first count is for, and how many there are.
    pub first: u64,
    pub counts: u64,
}

impl Allocator {
    /// How often `cluster` is referred to.
    ///
    /// # Errors
    /// Those of reading the refcount block.
    pub async fn refcount(&self, cluster: u64) -> Result<u64> {
        loop {
            let step = {
                let state = self.state.lock();
                match self.page(&state, cluster)? {
                    Try::Done(page) => Try::Done(self.count(&page, cluster)?),
                    Try::Load(offset, len) => Try::Load(offset, len),
                    Try::NoBlock(_) => Try::Done(0),
                }
            };
            match step {
                Try::Load(offset, len) => drop(self.tables.load(offset, len).await?),
                Try::Done(count) => return Ok(count),
                Try::NoBlock(_) => return Ok(0),
            }
        }
    }

    /// One more reference to each of `clusters`, which are in use. Reaches the file before pointers do.
    ///
    /// # Errors
    /// `RANGE` if a count would not fit into its bits; then some counts may have changed, which is a leak.
    pub async fn increment(&self, clusters: Range<u64>) -> Result<()> {
        let most = counts::greatest(self.order);
        self.change(clusters, &|cluster, count| match count.checked_add(1) {
            Some(more) if more <= most => Ok(more),
            _ => Err(Error::new(Code::Range, "a refcount would exceed its bits")
                .field("refcount")
                .at(cluster.saturating_mul(self.cluster))
                .found(count)
                .allowed(format!("up to {most}"))
                .hint("convert the image to one with wider refcounts (refcount_bits=16 or more)")),
        })
        .await
    }

    /// One reference less to each of `clusters`, at once. Only for references that never were, or are no longer,
    /// durable; a cluster whose count would become 0 must go through [`Allocator::release_now`] instead, which gives
    /// its space back, too.
    ///
    /// # Errors
    /// `CORRUPT` if a count is 0 or 1 already.
    pub async fn decrement(&self, clusters: Range<u64>) -> Result<()> {
        self.change(clusters, &|cluster, count| match count {
            0 | 1 => Err(self.bad_count(cluster, count)),
            more => Ok(more.saturating_sub(1)),
        })
        .await
    }

    /// The sector that holds the count of `cluster`, as it is in memory, and where it stands in the file.
    pub(crate) async fn sector_of_count(&self, cluster: u64) -> Result<(u64, Vec<u8>)> {
        loop {
            let page = self.page(&self.state.lock(), cluster)?;
            match page {
                Try::Done(page) => {
                    let index = bytes::index(bytes::sub(cluster, page.first)?)?;
                    let at = counts::bytes_of(self.order, &(index..index.saturating_add(1))).start & !511;
                    let sector = page.bytes.get(at..at.saturating_add(512)).ok_or_else(outside)?;
                    return Ok((bytes::add(page.offset, bytes::wide(at))?, sector.to_vec()));
                }
                Try::Load(offset, len) => drop(self.tables.load(offset, len).await?),
                Try::NoBlock(cluster) => return Err(self.bad_count(cluster, 0)),
            }
        }
    }

    /// Changes the count of each of `clusters`.
    pub(crate) async fn change(&self, clusters: Range<u64>, new: &NewCount<'_>) -> Result<()> {
        let mut at = clusters.start;
        while at < clusters.end {
            match self.try_change(at..clusters.end, new)? {
                Try::Done(reached) => at = reached,
                Try::Load(offset, len) => drop(self.tables.load(offset, len).await?),
                Try::NoBlock(cluster) => return Err(self.bad_count(cluster, 0)),
            }
        }
        Ok(())
    }

    fn try_change(&self, clusters: Range<u64>, new: &NewCount<'_>) -> Result<Try<u64>> {
        let state = self.state.lock();
        let page = match self.page(&state, clusters.start)? {
            Try::Done(page) => page,
            Try::Load(offset, len) => return Ok(Try::Load(offset, len)),
            Try::NoBlock(cluster) => return Ok(Try::NoBlock(cluster)),
        };
        let end = clusters.end.min(bytes::add(page.first, page.counts)?);
        let (offset, len) = (page.offset, page.bytes.len());
        match self.set(page, clusters.start..end, new)? {
            true => Ok(Try::Done(end)),
            false => Ok(Try::Load(offset, len)),
        }
    }

    /// Changes counts of one page; `false` if it has just left the memory. The state is locked.
    pub(crate) fn set(&self, page: Page, clusters: Range<u64>, new: &NewCount<'_>) -> Result<bool> {
        let first = bytes::index(bytes::sub(clusters.start, page.first)?)?;
        let end = bytes::index(bytes::sub(clusters.end, page.first)?)?;
        let at = counts::bytes_of(self.order, &(first..end));
        let mut changed = page.bytes.get(at.clone()).ok_or_else(outside)?.to_vec();
        // Narrow counts share their first byte with others: indices count from that byte on.
        let base = at.start.saturating_mul(8).checked_shr(self.order).unwrap_or(0);
        for cluster in clusters {
            let index = bytes::index(bytes::sub(cluster, page.first)?)?.saturating_sub(base);
            let count = counts::get(&changed, self.order, index).ok_or_else(outside)?;
            counts::set(&mut changed, self.order, index, new(cluster, count)?).ok_or_else(outside)?;
        }
        let (page_at, at) = (page.offset, bytes::wide(at.start));
        drop(page); // or the cache would have to copy it
        self.tables.update(&[TableChange { page: page_at, at, bytes: &changed, rank: 0 }])
    }

    /// The page that counts `cluster`.
    pub(crate) fn page(&self, state: &State, cluster: u64) -> Result<Try<Page>> {
        let block = bytes::index(bytes::div(cluster, self.per_block)?)?;
        let block = match state.blocks.get(block) {
            None | Some(0) => return Ok(Try::NoBlock(cluster)),
            Some(block) => *block,
        };
        let page_len = self.cluster.min(PAGE);
        let counts = bytes::mul(page_len, 8)?.checked_shr(self.order).unwrap_or(1).max(1);
        let first = bytes::mul(bytes::div(cluster, counts)?, counts)?;
        let within = bytes::mul(bytes::div(bytes::rem(first, self.per_block)?, counts)?, page_len)?;
        let offset = bytes::add(block, within)?;
        match self.tables.get(offset) {
            Some(bytes) => Ok(Try::Done(Page { offset, bytes, first, counts })),
            None => Ok(Try::Load(offset, bytes::index(page_len)?)),
        }
    }

    pub(crate) fn count(&self, page: &Page, cluster: u64) -> Result<u64> {
        let index = bytes::index(bytes::sub(cluster, page.first)?)?;
        counts::get(&page.bytes, self.order, index).ok_or_else(outside)
    }

    /// The first free cluster of `range` in a page, and how many follow it; or `None`.
    pub(crate) fn free_run(&self, page: &Page, range: Range<u64>, most: u64) -> Result<Option<Range<u64>>> {
        let end = range.end.min(bytes::add(page.first, page.counts)?);
        let mut run: Option<Range<u64>> = None;
        for cluster in range.start..end {
            match (self.count(page, cluster)?, &mut run) {
                (0, None) => run = Some(cluster..cluster.saturating_add(1)),
                (0, Some(run)) => run.end = cluster.saturating_add(1),
                (_, None) => continue,
                (_, Some(_)) => break,
            }
            if run.as_ref().is_some_and(|run| run.end.saturating_sub(run.start) >= most.max(1)) {
                break;
            }
        }
        Ok(run)
    }

    #[cold]
    pub(crate) fn bad_count(&self, cluster: u64, count: u64) -> Error {
        Error::new(Code::Corrupt, "a cluster that is in use is not counted as such")
            .field("refcount")
            .at(cluster.saturating_mul(self.cluster))
            .found(count)
            .allowed("1 or more")
            .hint("the image's refcounts are wrong; `vellum repair` mends them")
    }
}

/// From the number of a cluster and its count, the new count.
type NewCount<'a> = dyn Fn(u64, u64) -> Result<u64> + Sync + 'a;

#[cold]
fn outside() -> Error {
    Error::new(Code::Corrupt, "a refcount lies outside its block")
}
