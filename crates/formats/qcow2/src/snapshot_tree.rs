//! The clusters below an L1 table, for snapshots: counted up, counted down, and their COPIED flags.

use crate::alloc::Allocator;
use crate::counts;
use crate::entry::{COPIED, OFFSET_MASK};
use crate::judge::{Entry, Kind, Shape};
use crate::map::{PAGE, Qcow2Image, bad};
use crate::stored::Source;
use std::ops::Range;
use std::sync::atomic::Ordering;
use vellum_core::{Code, Error, Result, TableChange, WritableImage, bytes};

/// Reads an L1 table from the file.
pub(crate) async fn words(source: &Source<'_>, offset: u64, entries: u32) -> Result<Vec<u64>> {
    let raw = source.read(offset, bytes::mul(entries.into(), 8)?).await?;
    Ok(raw.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect())
}

/// The active L1 table, as it stands in the file.
pub(crate) async fn active_words(image: &Qcow2Image) -> Result<Vec<u64>> {
    let (offset, len) = image.layout.l1();
    words(&Source::new(image.tables.storage().as_ref())?, offset, bytes::narrow(len / 8)?).await
}

/// An entry whose table another entry names, too: no writer makes that, and it could make a small file look immense.
fn named_twice(l1: &[u64]) -> Option<u64> {
    let mut offsets: Vec<u64> =
        l1.iter().map(|word| word & OFFSET_MASK).filter(|offset| *offset != 0).collect();
    offsets.sort_unstable();
    offsets.array_windows().find_map(|[a, b]| (a == b).then_some(*a))
}

/// Works on everything below some L1 table. Tables are read through the cache, a page at a time.
pub(crate) struct Tree<'a> {
    image: &'a Qcow2Image,
    alloc: &'a Allocator,
    shape: Shape,
}

/// What one L2 table refers to.
struct Leaf {
    /// The table's own cluster.
    table: u64,
    /// Clusters of its entries: one reference for each time that they stand here.
    runs: Vec<Range<u64>>,
    /// An entry that cannot be, if there is one.
    fault: Option<Error>,
}

impl<'a> Tree<'a> {
    pub fn new(image: &'a Qcow2Image, alloc: &'a Allocator) -> Self {
        let (l1, l1_len) = image.layout.l1();
        let mut shape = Shape::new(&image.header, image.layout.file_len());
        let table = image.layout.refcount_table.load(Ordering::Acquire);
        let table_len = image.layout.refcount_table_bytes.load(Ordering::Acquire);
        shape.fixed =
            [0..image.cluster, l1..l1.saturating_add(l1_len), table..table.saturating_add(table_len)];
        Tree { image, alloc, shape }
    }

    /// Whether everything is sound and counted: a damaged tree is not counted up.
    ///
    /// # Errors
    /// `CORRUPT` and the like; `RANGE` where refcounts cannot hold two references at all.
    pub async fn check(&self, l1: &[u64]) -> Result<()> {
        if counts::greatest(self.alloc.order) < 2 {
            return Err(Error::new(
                Code::Range,
                "the refcounts of the image have 1 bit: it cannot have snapshots",
            )
            .field("refcount_order")
            .at(96)
            .found(self.alloc.order)
            .hint("convert it to an image with wider refcounts (refcount_bits=16)"));
        }
        if let Some(word) = named_twice(l1) {
            let what = "two L1 entries name the same L2 table";
            return Err(bad(Code::Overlap, what, "L1 entry", word & OFFSET_MASK, word)
                .hint("`vellum check` lists what is wrong, `vellum repair` mends it"));
        }
        for word in l1.iter().filter(|word| **word != 0) {
            let leaf = self.leaf(*word).await?;
            if let Some(fault) = leaf.fault {
                return Err(fault);
            }
            for cluster in std::iter::once(leaf.table).chain(leaf.runs.into_iter().flatten()) {
                if self.alloc.refcount(cluster).await? == 0 {
                    let offset = cluster.saturating_mul(self.shape.cluster);
                    return Err(bad(
                        Code::Corrupt,
                        "a cluster in use has no refcount",
                        "refcount",
                        offset,
                        0,
                    )
                    .hint("`vellum repair` mends the refcounts"));
                }
            }
        }
        Ok(())
    }

    /// The references of the L2 table that `word` names.
    async fn leaf(&self, word: u64) -> Result<Leaf> {
        let offset = self.image.l2_table(word, word & OFFSET_MASK)?;
        let mut leaf = Leaf { table: self.shape.number(offset), runs: Vec::new(), fault: None };
        if self.is_hole(offset).await? {
            return Ok(leaf);
        }
        for (page_at, page_len) in self.pages(offset) {
            let page = self.image.tables.load(page_at, page_len).await?;
            self.each(&page, &mut |at, entry| {
                let judged = self.shape.judge(entry, None);
                if !judged.faults.is_empty() {
                    let what = judged.faults.all().next().map_or("damaged", |fault| fault.what);
                    let at = page_at.saturating_add(bytes::wide(at));
                    leaf.fault.get_or_insert_with(|| {
                        bad(Code::Corrupt, what, "L2 entry", at, entry.word)
                            .hint("`vellum check` lists what is wrong, `vellum repair` mends it")
                    });
                    return;
                }
                let Some((offset, len)) = judged.refers else { return };
                let first = self.shape.number(offset);
                let last = self.shape.number(offset.saturating_add(len).saturating_sub(1));
                match leaf.runs.last_mut() {
                    Some(run) if run.end == first => run.end = last.saturating_add(1),
                    _ => leaf.runs.push(first..last.saturating_add(1)),
                }
            });
        }
        Ok(leaf)
    }

    /// A table that was never written: a hostile image may name millions of them.
    async fn is_hole(&self, l2: u64) -> Result<bool> {
        let source = Source::new(self.image.tables.storage().as_ref())?;
        // What is in memory may not be in the file yet.
        Ok(self.image.tables.get(l2).is_none() && source.is_hole(l2, self.shape.cluster).await)
    }

    fn pages(&self, l2: u64) -> impl Iterator<Item = (u64, usize)> + use<> {
        let len = self.shape.cluster.min(PAGE);
        let count = self.shape.cluster.checked_div(len).unwrap_or(0);
        let page_len = usize::try_from(len).unwrap_or(0);
        (0..count).map(move |index| (l2.saturating_add(index.saturating_mul(len)), page_len))
    }

    /// Calls `what` for every entry of a page that is not 0, with its place in the page.
    fn each(&self, page: &[u8], what: &mut dyn FnMut(usize, Entry)) {
        let len = self.shape.entry_len();
        for (index, raw) in page.chunks_exact(len).enumerate() {
            let word = bytes::be64(raw, 0).unwrap_or(0);
            let bitmap = bytes::be64(raw, 1).unwrap_or(0);
            if word | bitmap != 0 {
                what(index.saturating_mul(len), Entry { word, bitmap });
            }
        }
    }

    /// One more reference to everything below `l1`.
    ///
    /// # Errors
    /// `RANGE` if a count would not fit; then all are as before.
    pub async fn retain(&self, l1: &[u64]) -> Result<()> {
        let mut done = 0u64;
        let Err(error) = self.count(l1, true, u64::MAX, &mut done).await else { return Ok(()) };
        if error.code() == Code::Range {
            let mut undone = 0;
            self.count(l1, false, done, &mut undone).await?;
        }
        Err(error)
    }

    /// Counts the first `most` runs of references up or down; `done` says how many were.
    async fn count(&self, l1: &[u64], up: bool, most: u64, done: &mut u64) -> Result<()> {
        for word in l1.iter().filter(|word| **word != 0) {
            let leaf = self.leaf(*word).await?;
            let table = leaf.table..leaf.table.saturating_add(1);
            // Cluster by cluster: what was counted is known exactly when one does not fit.
            for cluster in std::iter::once(table).chain(leaf.runs).flatten() {
                if *done >= most {
                    return Ok(());
                }
                let one = cluster..cluster.saturating_add(1);
                if up {
                    self.alloc.increment(one).await?
                } else {
                    self.alloc.decrement(one).await?
                }
                *done = done.saturating_add(1);
            }
            self.commit_if_full().await?;
        }
        Ok(())
    }

    async fn commit_if_full(&self) -> Result<()> {
        if self.image.wants_flush() { self.image.flush().await } else { Ok(()) }
    }

    /// One reference less to everything below `l1`, to which nothing durable leads any more. What is damaged is left
    /// out: it stays as lost space.
    pub async fn release(&self, l1: &[u64]) -> Result<()> {
        if named_twice(l1).is_some() {
            return Ok(());
        }
        for word in l1.iter().filter(|word| **word != 0) {
            if !self.shape.judge_l1(*word).faults.is_empty() {
                continue;
            }
            let Ok(leaf) = self.leaf(*word).await else { continue };
            for run in leaf.runs {
                self.alloc.release_now(run);
            }
            self.alloc.release_now(leaf.table..leaf.table.saturating_add(1));
            self.commit_if_full().await?;
        }
        Ok(())
    }

    /// Clears COPIED in the active L1 table and in all tables below.
    pub async fn unflag(&self, l1: &[u64]) -> Result<()> {
        self.unflag_tables(l1).await?;
        let (offset, _) = self.image.layout.l1();
        let changed: Vec<(u64, u64)> = (0u64..)
            .zip(l1)
            .filter(|(_, word)| **word & COPIED != 0)
            .map(|(index, word)| (index, word & !COPIED))
            .collect();
        self.change_l1(offset, bytes::wide(l1.len()), &changed).await
    }

    /// Clears COPIED in all tables below `l1`.
    pub async fn unflag_tables(&self, l1: &[u64]) -> Result<()> {
        for word in l1.iter().filter(|word| **word != 0) {
            let offset = self.image.l2_table(*word, 0)?;
            if self.is_hole(offset).await? {
                continue;
            }
            for (page_at, page_len) in self.pages(offset) {
                let page = self.image.tables.load(page_at, page_len).await?;
                let mut changed = Vec::new();
                self.each(&page, &mut |at, entry| {
                    if self.shape.judge(entry, None).kind == Kind::Cluster && entry.word & COPIED != 0 {
                        changed.push((at, entry.word & !COPIED));
                    }
                });
                self.change_page(page_at, page_len, &changed).await?;
            }
            self.commit_if_full().await?;
        }
        Ok(())
    }

    /// Sets COPIED in the active L1 table and below, wherever a count is 1.
    pub async fn reflag(&self, l1: &[u64]) -> Result<()> {
        if named_twice(l1).is_some() {
            return Ok(());
        }
        let mut tables = Vec::new();
        for (index, word) in (0u64..).zip(l1).filter(|(_, word)| **word != 0) {
            let Ok(offset) = self.image.l2_table(*word, 0) else { continue };
            if word & COPIED == 0 && self.alloc.refcount(self.shape.number(offset)).await? == 1 {
                tables.push((index, word | COPIED));
            }
            if self.is_hole(offset).await? {
                continue;
            }
            for (page_at, page_len) in self.pages(offset) {
                let page = self.image.tables.load(page_at, page_len).await?;
                let mut plain = Vec::new();
                self.each(&page, &mut |at, entry| {
                    let judged = self.shape.judge(entry, None);
                    if judged.kind == Kind::Cluster && judged.faults.is_empty() && entry.word & COPIED == 0 {
                        plain.push((at, entry.word));
                    }
                });
                let mut changed = Vec::new();
                for (at, word) in plain {
                    if self.alloc.refcount(self.shape.number(word & OFFSET_MASK)).await? == 1 {
                        changed.push((at, word | COPIED));
                    }
                }
                self.change_page(page_at, page_len, &changed).await?;
            }
            self.commit_if_full().await?;
        }
        self.change_l1(self.image.layout.l1().0, bytes::wide(l1.len()), &tables).await
    }

    /// Changes entries of the active L1 table: index, new word.
    async fn change_l1(&self, offset: u64, entries: u64, changed: &[(u64, u64)]) -> Result<()> {
        let table_len = bytes::mul(entries, 8)?;
        let page_of = |index: u64| index.saturating_mul(8) & !PAGE.wrapping_sub(1);
        for page in changed.chunk_by(|a, b| page_of(a.0) == page_of(b.0)) {
            let Some((first, _)) = page.first() else { continue };
            let start = page_of(*first);
            let len = PAGE.min(bytes::sub(table_len, start)?);
            let mut inside = Vec::with_capacity(page.len());
            for (index, word) in page {
                inside.push((bytes::index(bytes::sub(bytes::mul(*index, 8)?, start)?)?, *word));
            }
            self.change_page(bytes::add(offset, start)?, bytes::index(len)?, &inside).await?;
        }
        Ok(())
    }

    /// Changes words of a table page (ascending places), as one change: pointers, so rank 1.
    async fn change_page(&self, page_at: u64, page_len: usize, changed: &[(usize, u64)]) -> Result<()> {
        let (Some((first, _)), Some((last, _))) = (changed.first(), changed.last()) else { return Ok(()) };
        loop {
            let page = self.image.tables.load(page_at, page_len).await?;
            let end = last.saturating_add(8);
            let mut span = page.get(*first..end).unwrap_or_default().to_vec();
            for (at, word) in changed {
                let within = at.saturating_sub(*first);
                if let Some(place) = span.get_mut(within..within.saturating_add(8)) {
                    place.copy_from_slice(&word.to_be_bytes());
                }
            }
            drop(page);
            let change = TableChange { page: page_at, at: bytes::wide(*first), bytes: &span, rank: 1 };
            if self.image.tables.update(&[change])? {
                return Ok(());
            }
        }
    }
}
