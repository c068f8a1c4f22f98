//! Space of the image file: which clusters are free, who counts them, and when they may be used again.
//!
//! ```text
//!   0 ......... cursor ............ tail ......
//!   in use      looked through      never handed out: reads as zeros
//! ```
//!
//! Counts are changed in the cached pages of the refcount blocks and reach the file with the next group commit, as
//! rank 0: before any pointer to what they count. A cluster that is let go waits until nothing durable points to it
//! (`pending`), then its count goes down and its space is given back to the host ([`Allocator::settle`]); only then
//! can it be handed out again.

use crate::layout::Layout;
use crate::refpage::{Page, Try};
use crate::release::push;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use vellum_core::{Code, Error, Result, Storage, TableCache, bytes};

/// Clusters that one search goes through before it takes fresh ones at the end.
const SCAN_MAX: u64 = 1 << 16;
/// Greatest host offset that an entry can name.
const HOST_END: u64 = 1 << 56;

/// Hands out clusters of the image file and counts who refers to them. Clusters are numbered; number times cluster
/// size is the byte offset.
pub(crate) struct Allocator {
    pub(crate) tables: Arc<TableCache>,
    pub(crate) layout: Arc<Layout>,
    pub(crate) cluster: u64,
    pub(crate) order: u32,
    /// Clusters that one refcount block counts.
    pub(crate) per_block: u64,
    pub(crate) state: Mutex<State>,
    /// Held while a refcount block or the refcount table is made.
    pub(crate) growing: async_lock::Mutex<()>,
    pub(crate) settling: async_lock::Mutex<()>,
}

#[derive(Default)]
pub(crate) struct State {
    /// The refcount table: where each block stands, 0 if there is none.
    pub blocks: Vec<u64>,
    /// Below this everything is in use, as far as is known.
    pub cursor: u64,
    /// From here on nothing was ever handed out by this session, and the file reads as zeros.
    pub tail: u64,
    /// Let go, but something durable may still point there.
    pub pending: Vec<Range<u64>>,
    /// Nothing durable points there any more.
    pub released: Vec<Range<u64>>,
    /// What went wrong for good.
    pub broken: Option<String>,
}

/// Clusters that were handed out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Clusters {
    /// Their numbers.
    pub clusters: Range<u64>,
    /// They lie past what was ever written, and read as zeros.
    pub zeroed: bool,
}

impl Allocator {
    pub fn new(tables: Arc<TableCache>, layout: Arc<Layout>, cluster: u64, order: u32) -> Result<Self> {
        let width = 1u64.checked_shl(order).unwrap_or(0);
        let per_block = bytes::div(bytes::mul(cluster, 8)?, width)?;
        let (state, growing, settling) = Default::default();
        Ok(Allocator { tables, layout, cluster, order, per_block, state, growing, settling })
    }

    /// The file that holds the clusters.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        self.tables.storage()
    }

    /// Hands out up to `count` clusters that lie side by side, at least one. Their count is 1 from now on.
    ///
    /// # Errors
    /// `NO_SPACE`; `CORRUPT` if the refcounts say that metadata is free.
    pub async fn allocate(&self, count: u64) -> Result<Clusters> {
        loop {
            match self.try_allocate(count)? {
                Try::Done(clusters) => return Ok(clusters),
                Try::Load(offset, len) => drop(self.tables.load(offset, len).await?),
                Try::NoBlock(cluster) => self.make_block(cluster).await?,
            }
        }
    }

    /// Hands out exactly `count` clusters side by side, at the end of the file; returns the first one's number.
    ///
    /// # Errors
    /// As [`Allocator::allocate`].
    pub async fn allocate_exactly(&self, count: u64) -> Result<u64> {
        loop {
            match self.try_exactly(count)? {
                Try::Done(first) => return Ok(first),
                Try::Load(offset, len) => drop(self.tables.load(offset, len).await?),
                Try::NoBlock(cluster) => self.make_block(cluster).await?,
            }
        }
    }

    /// Fails if something went wrong for good before: a flush would promise too much.
    pub fn check_sound(&self) -> Result<()> {
        self.check(&self.state.lock())
    }

    pub(crate) fn check(&self, state: &State) -> Result<()> {
        match &state.broken {
            None => Ok(()),
            Some(first) => Err(Error::new(Code::Io, "the image's refcounts cannot be relied on any more")
                .found(first)
                .hint("close the image, see to the disk, and run `vellum check`")),
        }
    }

    fn try_allocate(&self, count: u64) -> Result<Try<Clusters>> {
        let mut state = self.state.lock();
        self.check(&state)?;
        // A device cannot grow: there is no end to go on at, so everything is looked through.
        let most = if self.storage().limits().resizable { SCAN_MAX } else { u64::MAX };
        let stop = state.tail.min(state.cursor.saturating_add(most));
        while state.cursor < stop {
            let page = match self.page(&state, state.cursor)? {
                Try::Done(page) => page,
                Try::Load(offset, len) => return Ok(Try::Load(offset, len)),
                Try::NoBlock(cluster) => return Ok(Try::NoBlock(cluster)),
            };
            let Some(run) = self.free_run(&page, state.cursor..stop, count)? else {
                state.cursor = stop.min(bytes::add(page.first, page.counts)?);
                continue;
            };
            return Ok(match self.claim(page, run.clone(), &mut state)? {
                Try::Done(()) => {
                    state.cursor = run.end;
                    Try::Done(Clusters { clusters: run, zeroed: false })
                }
                Try::Load(offset, len) => Try::Load(offset, len),
                Try::NoBlock(cluster) => Try::NoBlock(cluster),
            });
        }
        self.at_tail(&mut state, count)
    }

    fn try_exactly(&self, count: u64) -> Result<Try<u64>> {
        let mut state = self.state.lock();
        self.check(&state)?;
        // A run may reach over several pages and blocks: all must be there before any is changed.
        let mut at = state.tail;
        while at < bytes::add(state.tail, count)? {
            let page = match self.page(&state, at)? {
                Try::Done(page) => page,
                Try::Load(offset, len) => return Ok(Try::Load(offset, len)),
                Try::NoBlock(cluster) => return Ok(Try::NoBlock(cluster)),
            };
            if self.count(&page, at)? != 0 {
                state.tail = bytes::add(at, 1)?;
            }
            at = bytes::add(at, 1)?;
        }
        let (first, end) = (state.tail, bytes::add(state.tail, count)?);
        let mut at = first;
        while at < end {
            match self.at_tail(&mut state, bytes::sub(end, at)?)? {
                Try::Done(taken) => at = taken.clusters.end,
                other => {
                    // A page left the memory meanwhile: what was taken so far is let go again.
                    push(&mut state.released, first..at);
                    return Ok(match other {
                        Try::Load(offset, len) => Try::Load(offset, len),
                        _ => Try::NoBlock(at),
                    });
                }
            }
        }
        Ok(Try::Done(first))
    }

    /// One cluster at the tail, if all that is needed for that is in memory.
    pub(crate) fn take_at_tail(&self, state: &mut State) -> Result<Option<Clusters>> {
        match self.at_tail(state, 1)? {
            Try::Done(taken) => Ok(Some(taken)),
            _ => Ok(None),
        }
    }

    /// Takes up to `count` clusters that were never handed out.
    fn at_tail(&self, state: &mut State, count: u64) -> Result<Try<Clusters>> {
        loop {
            let page = match self.page(state, state.tail)? {
                Try::Done(page) => page,
                Try::Load(offset, len) => return Ok(Try::Load(offset, len)),
                Try::NoBlock(cluster) => return Ok(Try::NoBlock(cluster)),
            };
            let page_end = bytes::add(page.first, page.counts)?;
            let Some(run) = self.free_run(&page, state.tail..page_end, count)? else {
                state.tail = page_end;
                continue;
            };
            let end = bytes::mul(run.end, self.cluster)?;
            if end > HOST_END || !self.storage().limits().resizable && end > self.storage().len()? {
                return Err(no_space(end));
            }
            return Ok(match self.claim(page, run.clone(), state)? {
                Try::Done(()) => {
                    if state.cursor == state.tail {
                        state.cursor = run.end;
                    }
                    state.tail = run.end;
                    Try::Done(Clusters { clusters: run, zeroed: true })
                }
                Try::Load(offset, len) => Try::Load(offset, len),
                Try::NoBlock(cluster) => Try::NoBlock(cluster),
            });
        }
    }

    /// Sets the counts of free clusters to 1.
    fn claim(&self, page: Page, run: Range<u64>, state: &mut State) -> Result<Try<()>> {
        let mut at = run.start;
        while at < run.end {
            let offset = bytes::mul(at, self.cluster)?;
            let known = self.layout.metadata(offset, self.cluster);
            if let Some(what) = known.or_else(|| self.tables.get(offset).map(|_| "a table")) {
                let error = Error::new(Code::Corrupt, format!("the refcounts say that {what} is free"))
                    .field("refcount")
                    .at(offset)
                    .found(0)
                    .hint("nothing was written there; `vellum repair` mends refcounts");
                state.broken = Some(error.to_string());
                return Err(error);
            }
            at = bytes::add(at, 1)?;
        }
        let (offset, len) = (page.offset, page.bytes.len());
        match self.set(page, run, &|_, _| Ok(1))? {
            true => Ok(Try::Done(())),
            false => Ok(Try::Load(offset, len)),
        }
    }
}

#[cold]
fn no_space(end: u64) -> Error {
    Error::new(Code::NoSpace, "the image has no room for another cluster")
        .found(format!("{end} bytes"))
        .hint("discard what the guest does not need, or convert the image to a larger place")
}
