//! Writing in place (sheet section 4): where guest bytes go, and in which order tables follow them.
//!
//! ```text
//!   write     data, copied edges -> file;  refcounts + 1 (rank 0), L2 entries, L1 entries (rank 1) in memory
//!   flush     rank 0 | FLUSH | rank 1 | FLUSH | what was let go: counts - 1, holes (written with the next flush)
//! ```
//!
//! A fresh L2 table is rank 0 as a whole, because only the L1 entry of rank 1 makes it reachable. Refcounts are kept
//! right all the time, also in images that would allow lazy ones: with group commits that costs no flush, and such
//! an image needs no repair after a crash.

use crate::alloc::Allocator;
use crate::entry::{COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, SUBCLUSTERS, ZERO};
use crate::extensions::Bitmaps;
use crate::map::{Qcow2Image, bad, entry, page_of};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use vellum_core::{
    BoxFuture, Code, Committer, Discarded, Error, Events, Intent, Limits, Placement, Reservation, Result,
    TableView, WritableImage, bytes,
};

/// Clusters that one question for a place goes through at most.
const STEPS_MAX: u32 = 256;
/// Flushes that a close takes at most: what is let go by one is counted down by the next.
const CLOSING_FLUSHES_MAX: u32 = 8;

/// What writing needs besides the tables.
pub(crate) struct Session {
    pub alloc: Allocator,
    pub committer: Committer,
    /// Held while an L2 table is made or copied.
    pub l2_making: async_lock::Mutex<()>,
    /// The refcount table was read, marks are set.
    pub begun: AtomicBool,
    pub options: SessionOptions,
    /// An entry was found that points at metadata.
    overlap: Mutex<Option<Error>>,
}

/// What opening knows and writing needs.
pub(crate) struct SessionOptions {
    pub bitmaps: Option<Bitmaps>,
    pub events: Events,
    pub limits: Limits,
    /// The refcounts are stale: count anew before the first write.
    pub recount: bool,
}

impl Session {
    pub fn new(alloc: Allocator, options: SessionOptions) -> Self {
        let (committer, l2_making, begun, overlap) = Default::default();
        Session { alloc, committer, l2_making, begun, options, overlap }
    }
}

/// What the tables say of a guest cluster.
pub(crate) enum Spot {
    /// Nothing: there is no L2 table. Holds for this many bytes.
    NoTable(u64),
    /// The L2 table is shared with a snapshot.
    SharedTable,
    Miss(Range<u64>),
    Entry(Entry),
}

/// An L2 entry of an L2 table that is this image's own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// Page of the table, and the entry's place in it.
    pub page: u64,
    pub within: u64,
    pub page_len: u64,
    pub value: u64,
    /// Subclusters; 0 without.
    pub bitmap: u64,
    /// First guest byte of the cluster.
    pub guest: u64,
}

impl Entry {
    /// Offset of the entry in the file.
    pub fn at(&self) -> u64 {
        self.page.saturating_add(self.within)
    }
    pub fn host(&self) -> u64 {
        self.value & OFFSET_MASK
    }
    pub fn is_compressed(&self) -> bool {
        self.value & COMPRESSED != 0
    }
}

impl Qcow2Image {
    /// The write side; there if the image was opened for writing.
    ///
    /// # Errors
    /// `PERMISSION` otherwise.
    pub(crate) fn session(&self) -> Result<&Session> {
        self.session.as_ref().ok_or_else(|| vellum_core::storage::read_only(&self.info.name))
    }

    pub(crate) fn entry_bytes(&self) -> u64 {
        if self.header.extended_l2() { 16 } else { 8 }
    }

    /// Bytes that an allocation bit stands for: a cluster or a subcluster.
    pub(crate) fn unit(&self) -> Result<u64> {
        match self.header.extended_l2() {
            true => bytes::div(self.cluster, SUBCLUSTERS.into()),
            false => Ok(self.cluster),
        }
    }

    /// What the tables say of the cluster of guest byte `at`.
    pub(crate) fn spot(&self, at: u64) -> Result<Spot> {
        let tables = self.tables.view();
        self.spot_in(&tables, at)
    }

    fn spot_in(&self, tables: &TableView<'_>, at: u64) -> Result<Spot> {
        let l1_index = bytes::div(at, self.l2_covers)?;
        let (table, table_bytes) = self.layout.l1();
        let (page, within) = page_of(table, table_bytes, bytes::mul(l1_index, 8)?)?;
        let Some(l1) = tables.get(page.start) else { return Ok(Spot::Miss(page)) };
        let value = entry(l1, within)?;
        if value == 0 {
            let end = bytes::add(l1_index, 1)?.saturating_mul(self.l2_covers);
            return Ok(Spot::NoTable(bytes::sub(end, at)?));
        }
        let l2 = self.l2_table(value, bytes::add(page.start, within)?)?;
        if value & COPIED == 0 {
            return Ok(Spot::SharedTable);
        }
        let within = bytes::div(bytes::rem(at, self.l2_covers)?, self.cluster)?;
        let (page, within) = page_of(l2, self.cluster, bytes::mul(within, self.entry_bytes())?)?;
        let Some(content) = tables.get(page.start) else { return Ok(Spot::Miss(page)) };
        let guest = bytes::sub(at, bytes::rem(at, self.cluster)?)?;
        let page_len = bytes::sub(page.end, page.start)?;
        self.read_entry(content, Entry { page: page.start, within, page_len, value: 0, bitmap: 0, guest })
            .map(Spot::Entry)
    }

    /// The entry that `like` describes, from its page.
    pub(crate) fn read_entry(&self, page: &[u8], like: Entry) -> Result<Entry> {
        let value = entry(page, like.within)?;
        let bitmap = match self.header.extended_l2() {
            true => entry(page, bytes::add(like.within, 8)?)?,
            false => 0,
        };
        let found = Entry { value, bitmap, ..like };
        if !found.is_compressed() && value & L2_RESERVED != 0 {
            return Err(bad(
                Code::Corrupt,
                "reserved bits of an L2 entry are set",
                "L2 entry",
                found.at(),
                value,
            ));
        }
        let zero_allowed = self.header.version >= 3 && !self.header.extended_l2();
        if !found.is_compressed() && value & ZERO != 0 && !zero_allowed {
            let what = "the zero bit of an L2 entry is set where it has no meaning";
            return Err(bad(Code::Corrupt, what, "L2 entry", found.at(), value));
        }
        Ok(found)
    }

    /// The cluster that an entry calls its own, checked: `(storage, offset)`.
    pub(crate) fn own_cluster(&self, e: &Entry) -> Result<Option<(usize, u64)>> {
        let tables = self.tables.view();
        self.own_cluster_in(&tables, e)
    }

    fn own_cluster_in(&self, tables: &TableView<'_>, e: &Entry) -> Result<Option<(usize, u64)>> {
        if e.is_compressed() || e.value & COPIED == 0 {
            return Ok(None);
        }
        if self.header.has_data_file() {
            if e.host() == 0 && !self.at_zero_of_data_file(e.value, e.guest) {
                return Ok(None);
            }
            if e.host() != e.guest {
                let what = "a cluster of the data file does not stand at its guest offset";
                return Err(bad(Code::Corrupt, what, "L2 entry", e.at(), e.value));
            }
            return Ok(Some((1, e.host())));
        }
        if e.host() == 0 {
            return Ok(None);
        }
        self.refuse_overlap(tables, e)?;
        Ok(Some((0, e.host())))
    }

    /// Guest data is never written over a table, whatever an entry says.
    fn refuse_overlap(&self, tables: &TableView<'_>, e: &Entry) -> Result<()> {
        let known = self.layout.metadata(e.host(), self.cluster);
        let own_table = || (e.page & !self.cluster.saturating_sub(1) == e.host()).then_some("its own table");
        let table = || tables.get(e.host()).map(|_| "a table");
        let Some(what) = known.or_else(own_table).or_else(table) else {
            // What the header names is among what is known.
            return self.check_offset(e.host(), "L2 entry", e.at());
        };
        let error = bad(Code::Overlap, &format!("an L2 entry points at {what}"), "L2 entry", e.at(), e.value)
            .allowed("a cluster of guest data");
        if let Ok(session) = self.session() {
            session.overlap.lock().get_or_insert_with(|| error.duplicate());
        }
        Err(error)
    }

    /// An entry that points at metadata was found: marks the image corrupt, and writes nothing more.
    pub(crate) async fn check_overlap(&self) -> Result<()> {
        let session = self.session()?;
        let found = session.overlap.lock().as_ref().map(Error::duplicate);
        match found {
            None => Ok(()),
            Some(error) => {
                self.mark_corrupt().await?;
                Err(error.context("writing; the image was marked corrupt"))
            }
        }
    }

    /// The start of `range`, up to the end of its cluster.
    fn place_step(&self, tables: &TableView<'_>, range: &Range<u64>) -> Result<Placement> {
        let asked = bytes::sub(range.end, range.start)?;
        let e = match self.spot_in(tables, range.start)? {
            Spot::Miss(_) => return Ok(Placement::Miss),
            Spot::NoTable(len) => return Ok(Placement::Absent { len: len.min(asked) }),
            Spot::SharedTable => {
                let rest = bytes::sub(self.cluster, bytes::rem(range.start, self.cluster)?)?;
                return Ok(Placement::Absent { len: rest.min(asked) });
            }
            Spot::Entry(e) => e,
        };
        let skip = bytes::sub(range.start, e.guest)?;
        let own = self.own_cluster_in(tables, &e)?;
        let (has_place, end) = match self.header.extended_l2() {
            false => (own.is_some() && e.value & ZERO == 0, self.cluster),
            true => self.subcluster_run(e.bitmap, own.is_some(), skip)?,
        };
        let len = bytes::sub(end, skip)?.min(asked);
        match own {
            Some((storage, host)) if has_place => {
                Ok(Placement::InPlace { len, storage, offset: bytes::add(host, skip)? })
            }
            _ => Ok(Placement::Absent { len }),
        }
    }

    /// Whether the subcluster at byte `skip` of its cluster has its place, and where the run of such ones ends.
    pub(crate) fn subcluster_run(&self, bitmap: u64, has_cluster: bool, skip: u64) -> Result<(bool, u64)> {
        let unit = self.unit()?;
        let is_allocated = |index: u64| {
            has_cluster && bitmap & crate::entry::subcluster_bits(index..index.saturating_add(1)) != 0
        };
        let first = bytes::div(skip, unit)?;
        let mut end = bytes::add(first, 1)?;
        while end < SUBCLUSTERS.into() && is_allocated(end) == is_allocated(first) {
            end = bytes::add(end, 1)?;
        }
        Ok((is_allocated(first), bytes::mul(end, unit)?))
    }

    async fn close_session(&self) -> Result<()> {
        let session = self.session()?;
        for _ in 0..CLOSING_FLUSHES_MAX {
            self.flush().await?;
            if self.tables.dirty_bytes() == 0 && session.alloc.is_settled() {
                break;
            }
        }
        Ok(())
    }
}

impl WritableImage for Qcow2Image {
    fn begin(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.begin_session())
    }

    fn hull(&self, range: Range<u64>) -> Range<u64> {
        let mask = self.cluster.saturating_sub(1);
        let end = range.end.saturating_add(mask) & !mask;
        (range.start & !mask)..end.max(range.end)
    }

    fn place(&self, range: Range<u64>) -> Result<Placement> {
        let tables = self.tables.view();
        let mut run = match self.place_step(&tables, &range)? {
            Placement::InPlace { len, storage, offset } => (len, storage, offset),
            other => return Ok(other),
        };
        for _ in 0..STEPS_MAX {
            let at = range.start.saturating_add(run.0);
            if at >= range.end {
                break;
            }
            // An error or a miss there is answered when it is asked for itself.
            match self.place_step(&tables, &(at..range.end)) {
                Ok(Placement::InPlace { len, storage, offset })
                    if storage == run.1 && run.2.checked_add(run.0) == Some(offset) =>
                {
                    run.0 = run.0.saturating_add(len);
                }
                _ => break,
            }
        }
        Ok(Placement::InPlace { len: run.0, storage: run.1, offset: run.2 })
    }

    fn reserve(&self, range: Range<u64>, intent: Intent) -> BoxFuture<'_, Result<Reservation>> {
        Box::pin(self.make_room(range, intent))
    }

    fn commit(&self, filled: Reservation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let done = self.point_to(&filled).await;
            if done.is_err() {
                self.let_go(&filled);
            }
            done
        })
    }

    fn abort(&self, unused: Reservation) -> BoxFuture<'_, ()> {
        Box::pin(async move { self.let_go(&unused) })
    }

    fn discard(&self, range: Range<u64>) -> BoxFuture<'_, Result<Discarded>> {
        Box::pin(self.clear(range))
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let session = self.session()?;
            self.check_overlap().await?;
            let alloc = &session.alloc;
            alloc.check_sound()?;
            session
                .committer
                .commit(&[&self.tables], &self.storages, || alloc.freeze(), |gone| alloc.thaw(gone))
                .await?;
            alloc.settle().await
        })
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.close_session())
    }

    fn wants_flush(&self) -> bool {
        let full = |session: &Session| session.alloc.wants_flush();
        self.tables.wants_commit() || self.session.as_ref().is_some_and(full)
    }
}
