//! New refcount blocks and a larger refcount table. Each is a small ordered sequence of its own, with its own flushes:
//! it happens once in 2 GiB (with the usual clusters), and a crash between its steps loses space at most.
//!
//! ```text
//!   block   write the block (it counts itself) | FLUSH | write its entry in the table | FLUSH
//!   table   write new blocks and the new table | FLUSH | switch in the header, one sector | FLUSH | let the old go
//! ```

use crate::alloc::{Allocator, Clusters, State};
use crate::counts;
use crate::header::REFCOUNT_TABLE_MAX;
use std::ops::Range;
use std::sync::atomic::Ordering;
use vellum_core::storage::{read_vec, write_slice};
use vellum_core::{Code, Error, FlushPoint, Result, bytes, flush_at};

/// Header field `refcount_table_offset`, with `refcount_table_clusters` behind it.
const TABLE_FIELDS: u64 = 48;

impl Allocator {
    /// Reads the refcount table: once, before anything is allocated.
    ///
    /// # Errors
    /// `MISALIGNED`, `OUT_OF_FILE` or `OVERLAP` for entries that cannot be.
    pub async fn load_table(&self) -> Result<()> {
        let table = self.layout.refcount_table.load(Ordering::Acquire);
        let len = self.layout.refcount_table_bytes.load(Ordering::Acquire);
        let content = read_vec(self.storage().as_ref(), table, bytes::index(len)?)
            .await
            .map_err(|e| e.context("reading the refcount table"))?;
        let mut blocks = Vec::with_capacity(content.len() / 8);
        for (index, entry) in content.as_chunks::<8>().0.iter().enumerate() {
            let offset = u64::from_be_bytes(*entry);
            let at = bytes::add(table, bytes::mul(bytes::wide(index), 8)?)?;
            self.check_block(offset, at)?;
            blocks.push(offset);
        }
        self.layout.add_blocks(blocks.iter().copied().filter(|offset| *offset != 0));
        // A part of a cluster at the end can be used where the file can grow.
        let tail = match self.storage().limits().resizable {
            true => bytes::div_ceil(self.layout.file_len(), self.cluster)?,
            false => bytes::div(self.layout.file_len(), self.cluster)?,
        };
        let mut state = self.state.lock();
        *state = State { blocks, tail, ..State::default() };
        Ok(())
    }

    fn check_block(&self, offset: u64, at: u64) -> Result<()> {
        let range = offset..offset.saturating_add(self.cluster);
        let (code, what) = if offset == 0 {
            return Ok(());
        } else if bytes::rem(offset, self.cluster)? != 0 {
            (Code::Misaligned, "a refcount block is not aligned to clusters")
        } else if range.end > bytes::align_up(self.layout.file_len(), self.cluster)? {
            (Code::OutOfFile, "a refcount block lies past the end of the file")
        } else if self.layout.header_table(&range, self.cluster).is_some() {
            (Code::Overlap, "a refcount block overlaps another table")
        } else {
            return Ok(());
        };
        Err(Error::new(code, what)
            .field("refcount table entry")
            .at(at)
            .found(format!("{offset:#x}"))
            .allowed("a cluster of its own inside the file, or 0")
            .hint("the image's refcounts are damaged; `vellum repair` mends them"))
    }

    /// Makes the refcount block that counts `cluster`, which has none.
    pub(crate) async fn make_block(&self, cluster: u64) -> Result<()> {
        let _alone = self.growing.lock().await;
        let index = bytes::div(cluster, self.per_block)?;
        let known = {
            let state = self.state.lock();
            self.check(&state)?;
            (state.blocks.get(bytes::index(index)?).copied(), bytes::wide(state.blocks.len()))
        };
        let made = match known {
            (Some(0), _) => self.new_block(index, cluster).await,
            (Some(_), _) => return Ok(()), // somebody else made it
            (None, capacity) => self.new_table(index, capacity).await,
        };
        made.map_err(|e| e.context("making room for more refcounts"))
    }

    async fn new_block(&self, index: u64, cluster: u64) -> Result<()> {
        let first = bytes::mul(index, self.per_block)?;
        // Beside what is there, where that is counted already; else it counts itself.
        let taken = self.take_counted(cluster)?;
        let place = taken.unwrap_or(cluster);
        let mut block = vec![0u8; bytes::index(self.cluster)?];
        if taken.is_none() {
            self.count_one(&mut block, bytes::sub(place, first)?)?;
            self.refuse_metadata(place..bytes::add(place, 1)?)?;
        }
        let offset = bytes::mul(place, self.cluster)?;
        if let Err(error) = self.write(offset, &block).await {
            // Nothing points there: the file is as good as before.
            self.release_now(taken.map_or(place..place, |taken| taken..taken.saturating_add(1)));
            return Err(error);
        }
        let table = self.layout.refcount_table.load(Ordering::Acquire);
        let entry = bytes::add(table, bytes::mul(index, 8)?)?;
        self.for_good(async {
            if taken.is_some() {
                // Its own count must be there before the table names it.
                self.write_count(place).await?;
            }
            self.flush().await?;
            self.write(entry, &offset.to_be_bytes()).await?;
            self.flush().await
        })
        .await?;
        self.layout.add_blocks(std::iter::once(offset));
        if let Some(entry) = self.state.lock().blocks.get_mut(bytes::index(index)?) {
            *entry = offset;
        }
        Ok(())
    }

    /// After a failure here it is not known what the file says: nothing more is allocated or flushed.
    async fn for_good(&self, steps: impl Future<Output = Result<()>>) -> Result<()> {
        let done = steps.await;
        if let Err(error) = &done {
            self.state.lock().broken.get_or_insert_with(|| error.to_string());
        }
        done
    }

    /// A cluster at the tail that has a refcount block already, if that is in memory: so that blocks for a long run
    /// of clusters do not stand in the middle of it.
    fn take_counted(&self, cluster: u64) -> Result<Option<u64>> {
        let mut state = self.state.lock();
        if state.tail >= cluster {
            return Ok(None);
        }
        Ok(self.take_at_tail(&mut state)?.map(|Clusters { clusters, .. }| clusters.start))
    }

    /// Writes the sector that holds the count of `cluster` ahead of the next group. Counts that grew and counts that
    /// went down are safe to be written at any time.
    async fn write_count(&self, cluster: u64) -> Result<()> {
        let (offset, sector) = self.sector_of_count(cluster).await?;
        self.write(offset, &sector).await
    }

    /// A refcount table for more than `capacity` blocks, so that block number `index` fits, and blocks that count
    /// the new table.
    async fn new_table(&self, index: u64, capacity: u64) -> Result<()> {
        let first = bytes::mul(capacity, self.per_block)?;
        let plan = Plan::new(index, capacity, self.cluster, self.per_block)?;
        let used = bytes::add(plan.blocks, plan.table_clusters)?;
        self.refuse_metadata(first..bytes::add(first, used)?)?;
        let offset = bytes::mul(first, self.cluster)?;
        let mut content = vec![0u8; bytes::index(bytes::mul(plan.blocks, self.cluster)?)?];
        let mut entries = self.state.lock().blocks.clone();
        for (number, block) in (0..plan.blocks).zip(content.chunks_mut(bytes::index(self.cluster)?)) {
            let counted = bytes::mul(number, self.per_block)?;
            for at in 0..used.saturating_sub(counted).min(self.per_block) {
                self.count_one(block, at)?;
            }
            entries.push(bytes::add(offset, bytes::mul(number, self.cluster)?)?);
        }
        let new_blocks = entries.get(bytes::index(capacity)?..).unwrap_or_default().to_vec();
        let table_bytes = bytes::mul(plan.table_clusters, self.cluster)?;
        entries.resize(bytes::index(table_bytes / 8)?, 0);
        let table = bytes::add(offset, bytes::wide(content.len()))?;
        content.extend(entries.iter().flat_map(|entry| entry.to_be_bytes()));
        self.write(offset, &content).await?;
        let clusters = bytes::narrow(plan.table_clusters)?;
        let fields: Vec<u8> = [&table.to_be_bytes()[..], &clusters.to_be_bytes()[..]].concat();
        self.for_good(async {
            self.flush().await?;
            self.write(TABLE_FIELDS, &fields).await?;
            self.flush().await
        })
        .await?;
        self.layout.add_blocks(new_blocks.into_iter());
        self.state.lock().blocks = entries;
        let old = self.layout.refcount_table.swap(table, Ordering::AcqRel);
        let old_bytes = self.layout.refcount_table_bytes.swap(table_bytes, Ordering::AcqRel);
        let old = bytes::div(old, self.cluster)?;
        self.release_now(old..bytes::add(old, bytes::div(old_bytes, self.cluster)?)?);
        Ok(())
    }

    fn count_one(&self, block: &mut [u8], index: u64) -> Result<()> {
        counts::set(block, self.order, bytes::index(index)?, 1)
            .ok_or_else(|| Error::new(Code::Usage, "a refcount lies outside its block"))
    }

    /// Refuses to put a table where another one stands, though nobody counts it.
    fn refuse_metadata(&self, clusters: Range<u64>) -> Result<()> {
        for cluster in clusters {
            let offset = bytes::mul(cluster, self.cluster)?;
            let known = self.layout.metadata(offset, self.cluster);
            if let Some(what) = known.or_else(|| self.tables.get(offset).map(|_| "a table")) {
                return Err(Error::new(Code::Corrupt, format!("{what} has no refcount block"))
                    .field("refcount table")
                    .at(offset)
                    .hint("nothing was written there; `vellum repair` mends refcounts"));
            }
        }
        Ok(())
    }

    async fn write(&self, offset: u64, content: &[u8]) -> Result<()> {
        write_slice(self.storage().as_ref(), offset, content).await?;
        self.layout.reaches(bytes::add(offset, bytes::wide(content.len()))?);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        flush_at(FlushPoint::Other, self.storage().as_ref()).await
    }
}

/// What a larger refcount table takes.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// New refcount blocks, in front of the table.
    blocks: u64,
    table_clusters: u64,
}

impl Plan {
    /// Blocks and table stand at the first cluster that the old table cannot count.
    fn new(index: u64, capacity: u64, cluster: u64, per_block: u64) -> Result<Self> {
        let mut blocks = 1u64;
        loop {
            // Half as large again, so that it does not come to this too often.
            let needed = bytes::add(capacity, blocks)?.max(bytes::add(index, 1)?);
            let entries = needed.max(capacity.saturating_add(capacity / 2));
            let most = bytes::div(REFCOUNT_TABLE_MAX, cluster)?;
            let table_clusters = bytes::div_ceil(bytes::mul(entries, 8)?, cluster)?;
            if bytes::mul(needed, 8)? > REFCOUNT_TABLE_MAX {
                return Err(Error::new(
                    Code::TableLimit,
                    "the image needs a refcount table larger than 8 MiB",
                )
                .found(format!("{needed} refcount blocks"))
                .hint("convert the image to one with larger clusters or fewer refcount_bits"));
            }
            let table_clusters = table_clusters.min(most);
            let counting = bytes::div_ceil(bytes::add(blocks, table_clusters)?, per_block)?;
            if counting <= blocks {
                return Ok(Plan { blocks, table_clusters });
            }
            blocks = counting;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_larger_table_counts_itself() {
        for (cluster, per_block) in [(512u64, 64u64), (512, 4096), (65536, 32768), (2 << 20, 1 << 20)] {
            for capacity in [1u64, cluster / 8, 10 * cluster / 8] {
                for index in [capacity, capacity + 7] {
                    if (index + 1) * 8 > REFCOUNT_TABLE_MAX / 2 {
                        continue;
                    }
                    let plan = Plan::new(index, capacity, cluster, per_block).unwrap();
                    assert!(plan.blocks * per_block >= plan.blocks + plan.table_clusters);
                    assert!(plan.table_clusters * cluster / 8 >= (index + 1).max(capacity + plan.blocks));
                }
            }
        }
        assert!(Plan::new(1 << 20, 1 << 20, 512, 64).is_err());
    }
}
