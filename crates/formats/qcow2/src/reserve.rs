//! Room for guest clusters: new ones, those that zero clusters keep, subclusters of a cluster that is there, and the
//! L2 tables that will point to them.

use crate::entry::{
    ALL_ALLOCATED, COPIED, OFFSET_MASK, SUBCLUSTERS, ZERO, compressed_range, subcluster_bits,
};
use crate::map::{PAGE, Qcow2Image, entry, page_of};
use crate::session::grow;
use crate::write::{Entry, Spot};
use std::ops::Range;
use vellum_core::{Code, Error, Intent, Reservation, Result, TableChange, bytes};

/// Guest bytes that one reservation covers at most.
const RUN_BYTES_MAX: u64 = 4 << 20;
/// Token of a reservation whose clusters were newly allocated.
const FRESH: u64 = 1;
/// Lookups of one cluster: between load and lookup the cache may be squeezed, but not for ever.
const TRIES_MAX: u32 = 1000;

/// Where a cluster that is to be written goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// Every byte has its place already.
    InPlace,
    /// To this offset, which is the cluster's own.
    Known(u64),
    /// To a new cluster; `whole`: with all that the old one holds.
    New { whole: bool },
}

impl Qcow2Image {
    /// Makes room for the start of `range`.
    pub(crate) async fn make_room(&self, range: Range<u64>, intent: Intent) -> Result<Reservation> {
        if intent == Intent::Move {
            return Err(Error::new(Code::Usage, "qcow2 images have no better place to move data to"));
        }
        self.check_overlap().await?;
        self.own_table(range.start).await?;
        let first = self.entry_of(range.start).await?;
        let target = self.target(&first)?;
        let (place, fresh, zeroed, clusters) = match target {
            Target::InPlace => return Err(Error::new(Code::Usage, "the range has its place already")),
            Target::Known(host) => {
                let storage = usize::from(self.header.has_data_file());
                ((storage, host), 0, false, self.run(&first, target, &range)?)
            }
            Target::New { .. } => {
                let wanted = self.run(&first, target, &range)?;
                let found = self.session()?.alloc.allocate(wanted).await?;
                let count = bytes::sub(found.clusters.end, found.clusters.start)?;
                ((0, bytes::mul(found.clusters.start, self.cluster)?), FRESH, found.zeroed, count)
            }
        };
        let covered = first.guest..bytes::add(first.guest, bytes::mul(clusters, self.cluster)?)?;
        let range = self.to_fill(&first, target, &range, covered)?;
        let offset = bytes::add(place.1, bytes::sub(range.start, first.guest)?)?;
        Ok(Reservation { range, storage: place.0, offset, zeroed, token: fresh })
    }

    /// Where the cluster of an entry is to be written.
    fn target(&self, e: &Entry) -> Result<Target> {
        let own = self.own_cluster(e)?;
        let all = if self.header.extended_l2() { e.bitmap & ALL_ALLOCATED } else { 0 };
        let has_data = match self.header.extended_l2() {
            true => all != 0,
            false => e.value & ZERO == 0 && e.host() != 0,
        };
        Ok(match own {
            Some(_) if !self.header.extended_l2() && e.value & ZERO == 0 => Target::InPlace,
            Some(_) if all == ALL_ALLOCATED => Target::InPlace,
            Some((_, host)) => Target::Known(host),
            None if self.header.has_data_file() => Target::Known(e.guest),
            None => Target::New { whole: e.is_compressed() || has_data || !self.header.extended_l2() },
        })
    }

    /// How many clusters from `first` on can be filled together: the same kind of target, side by side in one page.
    fn run(&self, first: &Entry, target: Target, range: &Range<u64>) -> Result<u64> {
        let in_data_file = self.header.has_data_file();
        let single = match target {
            Target::New { whole } => whole && self.header.extended_l2(),
            _ => !in_data_file || self.header.extended_l2(),
        };
        let touched = bytes::div_ceil(bytes::sub(range.end, first.guest)?, self.cluster)?;
        let most = touched.min(bytes::div(RUN_BYTES_MAX, self.cluster)?).max(1);
        let Some(page) = self.tables.get(first.page).filter(|_| !single) else { return Ok(1) };
        let mut count = 1;
        while count < most {
            let within = bytes::add(first.within, bytes::mul(count, self.entry_bytes())?)?;
            if within >= first.page_len {
                break;
            }
            let guest = bytes::add(first.guest, bytes::mul(count, self.cluster)?)?;
            let next = self.read_entry(&page, Entry { within, guest, ..*first })?;
            let fits = match self.target(&next)? {
                Target::Known(host) => in_data_file && target == Target::Known(first.guest) && host == guest,
                other => other == target,
            };
            if !fits {
                break;
            }
            count = bytes::add(count, 1)?;
        }
        Ok(count)
    }

    /// The guest bytes to be filled: whole clusters, or only the touched subclusters.
    fn to_fill(
        &self,
        e: &Entry,
        target: Target,
        range: &Range<u64>,
        covered: Range<u64>,
    ) -> Result<Range<u64>> {
        let by_subcluster = self.header.extended_l2() && target != Target::New { whole: true };
        let unit = if by_subcluster { self.unit()? } else { self.cluster };
        let start = bytes::sub(range.start, bytes::rem(range.start, unit)?)?;
        let mut end = bytes::align_up(range.end, unit)?.min(covered.end);
        if let (Target::Known(_), true) = (target, by_subcluster) {
            // Subclusters that have their place are written there.
            let own = self.own_cluster(e)?.is_some();
            let skip = bytes::sub(start, e.guest)?;
            let (has_place, run_end) = self.subcluster_run(e.bitmap, own, skip)?;
            if has_place {
                return Err(Error::new(Code::Usage, "the range has its place already"));
            }
            end = end.min(bytes::add(e.guest, run_end)?);
        }
        if self.header.has_data_file() {
            // A raw data file is exactly as long as the disk.
            end = end.min(self.header.size.max(range.end));
        }
        Ok(start..end)
    }

    /// The tables point to what was filled, from now on.
    pub(crate) async fn point_to(&self, filled: &Reservation) -> Result<()> {
        let skip = bytes::rem(filled.range.start, self.cluster)?;
        let host = bytes::sub(filled.offset, skip)?;
        let first = bytes::sub(filled.range.start, skip)?;
        let count = bytes::div_ceil(bytes::sub(filled.range.end, first)?, self.cluster)?;
        if filled.storage == 0 {
            let end = bytes::add(host, bytes::mul(count, self.cluster)?)?;
            grow(self.tables.storage().as_ref(), end).await?;
            self.layout.reaches(end);
        }
        for _ in 0..TRIES_MAX {
            let e = self.entry_of(first).await?;
            let Some(page) = self.tables.get(e.page) else { continue };
            let mut content = Vec::new();
            let mut gone = Vec::new();
            for index in 0..count {
                let within = bytes::add(e.within, bytes::mul(index, self.entry_bytes())?)?;
                let guest = bytes::add(first, bytes::mul(index, self.cluster)?)?;
                let old = self.read_entry(&page, Entry { within, guest, ..e })?;
                let host = bytes::add(host, bytes::mul(index, self.cluster)?)?;
                content.extend(self.new_entry(&old, host, filled)?);
                gone.extend(self.clusters_of(&old)?.filter(|_| old.host() != host || old.is_compressed()));
            }
            drop(page); // or the cache would have to copy it
            let change = TableChange { page: e.page, at: e.within, bytes: &content, rank: 1 };
            if self.tables.update(&[change])? {
                let alloc = &self.session()?.alloc;
                gone.into_iter().for_each(|clusters| alloc.release_after_flush(clusters));
                return Ok(());
            }
        }
        Err(squeezed())
    }

    /// The entry of a cluster at `host`, of which `filled` was filled.
    fn new_entry(&self, old: &Entry, host: u64, filled: &Reservation) -> Result<Vec<u8>> {
        let mut bytes = (host & OFFSET_MASK | COPIED).to_be_bytes().to_vec();
        if self.header.extended_l2() {
            let unit = self.unit()?;
            let cluster = old.guest..bytes::add(old.guest, self.cluster)?;
            let part = filled.range.start.max(cluster.start)..filled.range.end.min(cluster.end);
            let first = bytes::div(bytes::sub(part.start, cluster.start)?, unit)?;
            let end = bytes::div_ceil(bytes::sub(part.end, cluster.start)?, unit)?;
            let written = subcluster_bits(first..end);
            // A compressed cluster has no bitmap; one that is copied is copied whole.
            let before = if old.is_compressed() { 0 } else { old.bitmap };
            let zero = written.checked_shl(SUBCLUSTERS).unwrap_or(0);
            bytes.extend((before & !zero | written).to_be_bytes());
        }
        Ok(bytes)
    }

    /// The host clusters that an entry refers to in the image file.
    pub(crate) fn clusters_of(&self, e: &Entry) -> Result<Option<Range<u64>>> {
        if e.is_compressed() {
            let range = compressed_range(e.value, self.header.cluster_bits)?;
            let first = bytes::div(range.start, self.cluster)?;
            return Ok(Some(first..bytes::div_ceil(range.end, self.cluster)?));
        }
        if self.header.has_data_file() || e.host() == 0 {
            return Ok(None);
        }
        self.check_cluster(e.host(), "L2 entry", e.at())?;
        let cluster = bytes::div(e.host(), self.cluster)?;
        Ok(Some(cluster..bytes::add(cluster, 1)?))
    }

    /// The reservation is not needed: nothing points to its clusters.
    pub(crate) fn let_go(&self, unused: &Reservation) {
        let Ok(session) = self.session() else { return };
        if unused.token != FRESH {
            return;
        }
        let skip = bytes::rem(unused.range.start, self.cluster).unwrap_or(0);
        let len = unused.range.end.saturating_sub(unused.range.start).saturating_add(skip);
        let first = bytes::div(unused.offset, self.cluster);
        if let (Ok(first), Ok(count)) = (first, bytes::div_ceil(len, self.cluster)) {
            session.alloc.release_now(first..first.saturating_add(count));
        }
    }

    /// The L2 entry of the cluster of guest byte `at`, whose table is this image's own.
    pub(crate) async fn entry_of(&self, at: u64) -> Result<Entry> {
        for _ in 0..TRIES_MAX {
            match self.spot(at)? {
                Spot::Entry(e) => return Ok(e),
                Spot::Miss(page) => self.load_page(page).await?,
                Spot::NoTable(_) | Spot::SharedTable => self.own_table(at).await?,
            }
        }
        Err(squeezed())
    }

    pub(crate) async fn load_page(&self, page: Range<u64>) -> Result<()> {
        let len = bytes::index(bytes::sub(page.end, page.start)?)?;
        self.tables.load(page.start, len).await.map(drop)
    }

    /// Makes sure that guest byte `at` has an L2 table that nobody else refers to.
    pub(crate) async fn own_table(&self, at: u64) -> Result<()> {
        if matches!(self.spot(at)?, Spot::Entry(_)) {
            return Ok(());
        }
        // One at a time: neighbours that need the same table must not both make it.
        let session = self.session()?;
        let _alone = session.l2_making.lock().await;
        for _ in 0..TRIES_MAX {
            match self.spot(at)? {
                Spot::Entry(_) => return Ok(()),
                Spot::Miss(page) => self.load_page(page).await?,
                Spot::NoTable(_) | Spot::SharedTable => {
                    if self.make_table(at).await? {
                        return Ok(());
                    }
                }
            }
        }
        Err(squeezed())
    }

    /// Puts a new L2 table in place of none or of a shared one; `false` if the L1 page left the memory meanwhile.
    async fn make_table(&self, at: u64) -> Result<bool> {
        let (table, len) = self.layout.l1();
        let l1_index = bytes::div(at, self.l2_covers)?;
        let (l1, within) = page_of(table, len, bytes::mul(l1_index, 8)?)?;
        let Some(old) = self.tables.get(l1.start).map(|page| entry(&page, within)).transpose()? else {
            return Ok(false);
        };
        let alloc = &self.session()?.alloc;
        let new = alloc.allocate(1).await?.clusters;
        let made = self.copy_table(old & OFFSET_MASK, bytes::mul(new.start, self.cluster)?).await;
        let pointer = bytes::mul(new.start, self.cluster)? | COPIED;
        let is_in = match made {
            Err(error) => Err(error),
            Ok(()) => {
                let bytes = &pointer.to_be_bytes();
                self.tables.update(&[TableChange { page: l1.start, at: within, bytes, rank: 1 }])
            }
        };
        match is_in {
            Ok(true) if old & OFFSET_MASK != 0 => {
                let old = bytes::div(old & OFFSET_MASK, self.cluster)?;
                alloc.release_after_flush(old..bytes::add(old, 1)?);
            }
            Ok(true) => {}
            _ => {
                self.tables.forget(bytes::mul(new.start, self.cluster)?..bytes::mul(new.end, self.cluster)?);
                alloc.release_now(new);
            }
        }
        is_in
    }

    /// Puts a copy of the L2 table at `old` (0: an empty one) at `new`, as fresh pages.
    async fn copy_table(&self, old: u64, new: u64) -> Result<()> {
        self.layout.reaches(bytes::add(new, self.cluster)?);
        let mut at = 0;
        while at < self.cluster {
            let len = bytes::sub(self.cluster, at)?.min(PAGE);
            let content = match old {
                0 => vec![0; bytes::index(len)?],
                old => self.tables.load(bytes::add(old, at)?, bytes::index(len)?).await?.to_vec(),
            };
            self.tables.put(bytes::add(new, at)?, content)?;
            at = bytes::add(at, len)?;
        }
        Ok(())
    }
}

#[cold]
pub(crate) fn squeezed() -> Error {
    Error::new(Code::Io, "the table cache is too small to hold one page")
}
