//! Internal snapshots (sheet section 7): made, applied, deleted.
//!
//! ```text
//!   create   counts + 1, COPIED cleared | FLUSH | copy of L1, new snapshot table | FLUSH | header, one sector | FLUSH
//!   apply    counts + 1 below the snapshot | new active L1 | FLUSH | header | FLUSH | counts - 1 below the old L1
//!   delete   new snapshot table | FLUSH | header | FLUSH | counts - 1 below the snapshot, COPIED set again
//! ```
//!
//! Counts go up before anything points twice and down when nothing points any more; the header switches in one sector.
//! So a crash leaves the state before or after, and lost space. COPIED flags stand in many tables and cannot change at
//! one moment with the counts: version 3 is marked dirty meanwhile, so that whoever opens the image next counts anew.

use crate::entry::COPIED;
use crate::header::{Header, INCOMPAT_DIRTY};
use crate::map::Qcow2Image;
use crate::snapshot_table::{self, Entry, Table};
use crate::snapshot_tree::{Tree, active_words, words};
use crate::stored::Source;
use crate::write::Session;
use std::sync::atomic::Ordering;
use vellum_core::storage::{read_vec, write_slice};
use vellum_core::{
    BoxFuture, Code, Error, FlushPoint, Limits, Result, SnapshotInfo, Snapshots, Storage, WritableImage,
    bytes, flush_at,
};

/// Header fields: disk size, crypt method, L1 entries and offset; number and place of snapshots; features.
const SIZE_FIELDS: u64 = 24;
const SNAPSHOT_FIELDS: u64 = 60;
const INCOMPATIBLE_FEATURES: u64 = 72;
/// Longest name that is given.
const NAME_MAX: usize = 1023;
/// Flushes until everything that was let go is counted down.
const FLUSHES_MAX: u32 = 8;

/// The header with the tables and the size of a snapshot in the place of the present ones: an image that is built from it
/// (for reading only) shows the state of that snapshot. `wanted` is an id or a name.
///
/// # Errors
/// `NOT_FOUND`; those of a damaged snapshot table.
pub(crate) async fn as_of(
    storage: &dyn Storage,
    header: &Header,
    limits: &Limits,
    wanted: &str,
) -> Result<Header> {
    let source = Source::new(storage)?;
    let table = snapshot_table::read(&source, header, limits).await?;
    let entry = entry_of(&table, wanted)?;
    let state = Header {
        size: entry.disk_size(header),
        l1_size: entry.l1_size,
        l1_table_offset: entry.l1_table_offset,
        ..header.clone()
    };
    check_l1(&state, source.len, limits)?;
    Ok(state)
}

/// The error for opening the state of a snapshot for writing.
#[cold]
pub(crate) fn read_only_state() -> Error {
    Error::new(Code::Usage, "the state of a snapshot can only be read")
        .hint("apply the snapshot, or make a child of the image, to write to it")
}

fn entry_of<'t>(table: &'t Table, wanted: &str) -> Result<&'t Entry> {
    let index = snapshot_table::find(&table.entries, wanted)?;
    table.entries.get(index).ok_or_else(|| Error::new(Code::NotFound, "the image has no such snapshot"))
}

/// Whether the L1 table of a snapshot can be an active one.
fn check_l1(state: &Header, file_len: u64, limits: &Limits) -> Result<()> {
    let needed = bytes::div_ceil(state.size, state.l2_covers())?;
    let len = bytes::mul(state.l1_size.into(), 8)?;
    if u64::from(state.l1_size) < needed || len > limits.table_bytes {
        return Err(Error::new(Code::SizeLie, "the L1 table of the snapshot does not fit its disk")
            .field("snapshot l1_size")
            .found(state.l1_size)
            .allowed(format!("{needed} to {} entries", limits.table_bytes / 8))
            .hint("the snapshot table is damaged; delete the snapshot"));
    }
    if len > 0 {
        let at = state.l1_table_offset;
        crate::header::check_table("snapshot l1_table_offset", 0, at, len, state.cluster(), file_len)?;
    }
    Ok(())
}

impl Snapshots for Qcow2Image {
    fn list(&self) -> BoxFuture<'_, Result<Vec<SnapshotInfo>>> {
        Box::pin(async move {
            let (header, table) = self.snapshot_table().await?;
            Ok(table.entries.iter().map(|entry| entry.info(&header)).collect())
        })
    }
    fn create(&self, name: String, now_unix: u64) -> BoxFuture<'_, Result<SnapshotInfo>> {
        Box::pin(async move { Change::begin(self).await?.create(name, now_unix).await })
    }
    fn apply(&self, snapshot: String) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { Change::begin(self).await?.apply(&snapshot).await })
    }
    fn delete(&self, snapshot: String) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { Change::begin(self).await?.delete(&snapshot).await })
    }
}

impl Qcow2Image {
    /// Header and snapshot table as they stand in the file.
    async fn snapshot_table(&self) -> Result<(Header, Table)> {
        let source = Source::new(self.tables.storage().as_ref())?;
        let limits = self.session.as_ref().map_or_else(Limits::default, |session| session.options.limits);
        let head = read_vec(source.storage, 0, bytes::index(source.len.min(112))?).await?;
        let header = Header::read(&head, source.len, &limits)?;
        let table = snapshot_table::read(&source, &header, &limits).await?;
        Ok((header, table))
    }
}

/// One change of the snapshots of an image, all of whose tables are in the file.
struct Change<'a> {
    image: &'a Qcow2Image,
    session: &'a Session,
    header: Header,
    table: Table,
}

impl<'a> Change<'a> {
    async fn begin(image: &'a Qcow2Image) -> Result<Self> {
        let session = image.session()?;
        image.begin_session().await?;
        settle(image, session).await?;
        if image.header.has_data_file() {
            return Err(Error::new(
                Code::Feature,
                "an image with a data file cannot have internal snapshots",
            )
            .hint("make a child of the image instead: `vellum create --parent IMAGE CHILD`"));
        }
        let (header, table) = image.snapshot_table().await?;
        Ok(Change { image, session, header, table })
    }

    fn storage(&self) -> &dyn Storage {
        self.image.tables.storage().as_ref()
    }

    fn tree(&self) -> Tree<'a> {
        Tree::new(self.image, &self.session.alloc)
    }

    async fn create(mut self, name: String, now_unix: u64) -> Result<SnapshotInfo> {
        let limit = self.session.options.limits.snapshots;
        if self.header.nb_snapshots >= limit {
            return Err(Error::new(Code::TableLimit, "the image has as many snapshots as it can have")
                .found(self.header.nb_snapshots)
                .hint("delete one first"));
        }
        if name.len() > NAME_MAX || name.contains('\0') {
            return Err(Error::new(Code::Usage, "this cannot be the name of a snapshot")
                .found(&name)
                .allowed(format!("up to {NAME_MAX} bytes without NUL")));
        }
        let words = active_words(self.image).await?;
        let tree = self.tree();
        tree.check(&words).await?;
        self.mark(true).await?;
        if let Err(error) = tree.retain(&words).await {
            // Everything is counted as before then; else the mark stays.
            if error.code() == Code::Range {
                self.finish().await?;
            }
            return Err(error);
        }
        tree.unflag(&words).await?;
        let copy: Vec<u8> = words.iter().flat_map(|word| (word & !COPIED).to_be_bytes()).collect();
        let l1_table_offset = self.place(copy).await?;
        let entry = Entry {
            l1_table_offset,
            l1_size: bytes::narrow(bytes::wide(words.len()))?,
            seconds: u32::try_from(now_unix).unwrap_or(u32::MAX),
            extra: Entry::new_extra(self.header.size),
            id: self.free_id().into_bytes(),
            name: name.into_bytes(),
            ..Entry::default()
        };
        let info = entry.info(&self.header);
        let mut entries = self.table.entries.clone();
        entries.push(entry);
        self.switch_table(entries).await?;
        self.finish().await?;
        Ok(info)
    }

    /// One more than the greatest id that is a number.
    fn free_id(&self) -> String {
        let ids =
            self.table.entries.iter().filter_map(|e| std::str::from_utf8(&e.id).ok()?.parse::<u64>().ok());
        ids.max().unwrap_or(0).saturating_add(1).to_string()
    }

    async fn apply(self, wanted: &str) -> Result<()> {
        let limits = self.session.options.limits;
        let entry = entry_of(&self.table, wanted)?.clone();
        let size = entry.disk_size(&self.header);
        let state = Header {
            size,
            l1_size: entry.l1_size,
            l1_table_offset: entry.l1_table_offset,
            ..self.header.clone()
        };
        check_l1(&state, self.storage().len()?, &limits)?;
        let source = Source::new(self.storage())?;
        let mut new = words(&source, entry.l1_table_offset, entry.l1_size).await?;
        let old = active_words(self.image).await?;
        let tree = self.tree();
        tree.check(&new).await?;
        self.mark(true).await?;
        if let Err(error) = tree.retain(&new).await {
            if error.code() == Code::Range {
                self.finish().await?;
            }
            return Err(error);
        }
        tree.unflag_tables(&new).await?;
        // Whoever has the disk open at its present size still finds an entry for every part of it.
        new.resize(new.len().max(old.len()), 0);
        let content: Vec<u8> = new.iter().flat_map(|word| (word & !COPIED).to_be_bytes()).collect();
        let offset = self.place(content).await?;
        self.flush().await?;
        let old_place = self.image.layout.l1();
        let l1_size = bytes::narrow(bytes::wide(new.len()))?;
        let mut fields = size.to_be_bytes().to_vec();
        fields.extend_from_slice(&0u32.to_be_bytes());
        fields.extend_from_slice(&l1_size.to_be_bytes());
        fields.extend_from_slice(&offset.to_be_bytes());
        self.switch(SIZE_FIELDS, &fields).await?;
        self.image.layout.l1_offset.store(offset, Ordering::Release);
        self.image.layout.l1_entries.store(l1_size.into(), Ordering::Release);
        tree.release(&old).await?;
        self.let_go(old_place.0, old_place.1)?;
        self.finish().await
    }

    async fn delete(mut self, wanted: &str) -> Result<()> {
        let index = snapshot_table::find(&self.table.entries, wanted)?;
        let mut entries = self.table.entries.clone();
        let gone = entries.remove(index);
        let source = Source::new(self.storage())?;
        let len = bytes::mul(gone.l1_size.into(), 8)?;
        let is_sound = bytes::rem(gone.l1_table_offset, self.image.cluster)? == 0
            && len <= self.session.options.limits.table_bytes
            && gone.l1_table_offset.checked_add(len).is_some_and(|end| end <= source.len);
        // What a damaged entry used stays as lost space, which a check finds.
        let old =
            if is_sound { words(&source, gone.l1_table_offset, gone.l1_size).await? } else { Vec::new() };
        self.mark(true).await?;
        self.switch_table(entries).await?;
        let tree = self.tree();
        tree.release(&old).await?;
        if is_sound {
            self.let_go(gone.l1_table_offset, len)?;
        }
        settle(self.image, self.session).await?;
        tree.reflag(&active_words(self.image).await?).await?;
        self.finish().await
    }

    /// Writes a table where nothing was, whole clusters of it; returns its offset.
    async fn place(&self, mut content: Vec<u8>) -> Result<u64> {
        let cluster = self.image.cluster;
        let len = bytes::align_up(bytes::wide(content.len()).max(1), cluster)?;
        let first = self.session.alloc.allocate_exactly(bytes::div(len, cluster)?).await?;
        let offset = bytes::mul(first, cluster)?;
        content.resize(bytes::index(len)?, 0);
        self.image.tables.forget(offset..bytes::add(offset, len)?);
        write_slice(self.storage(), offset, &content).await.map_err(|e| e.context("writing a table"))?;
        self.image.layout.reaches(bytes::add(offset, len)?);
        Ok(offset)
    }

    /// The header names a new snapshot table from now on, and the old one is let go.
    async fn switch_table(&mut self, mut entries: Vec<Entry>) -> Result<()> {
        entries.iter_mut().for_each(|entry| entry.complete(&self.header));
        let content = snapshot_table::write(&entries)?;
        let len = bytes::wide(content.len());
        let offset = if entries.is_empty() { 0 } else { self.place(content).await? };
        self.flush().await?;
        let count = bytes::narrow(bytes::wide(entries.len()))?;
        let mut fields = count.to_be_bytes().to_vec();
        fields.extend_from_slice(&offset.to_be_bytes());
        self.switch(SNAPSHOT_FIELDS, &fields).await?;
        self.let_go(self.header.snapshots_offset, self.table.len)?;
        (self.header.nb_snapshots, self.header.snapshots_offset) = (count, offset);
        self.image.protect_tables(offset..offset.saturating_add(len), &entries)?;
        self.table = Table { entries, len };
        Ok(())
    }

    /// Fields of the header, in one sector: old or new, never half.
    async fn switch(&self, at: u64, fields: &[u8]) -> Result<()> {
        write_slice(self.storage(), at, fields).await.map_err(|e| e.context("switching the header"))?;
        flush_at(FlushPoint::Other, self.storage()).await
    }

    /// Clusters of a table that nothing durable names any more.
    fn let_go(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let first = bytes::div(offset, self.image.cluster)?;
        let end = bytes::div_ceil(bytes::add(offset, len)?, self.image.cluster)?;
        self.session.alloc.release_now(first..end);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.image.flush().await
    }

    /// Sets the dirty mark, or makes it what it was before.
    async fn mark(&self, dirty: bool) -> Result<()> {
        if self.header.version < 3 {
            return Ok(());
        }
        let mark = if dirty { INCOMPAT_DIRTY } else { self.header.incompatible & INCOMPAT_DIRTY };
        let now = self.image.layout.incompatible.load(Ordering::Acquire) & !INCOMPAT_DIRTY | mark;
        self.switch(INCOMPATIBLE_FEATURES, &now.to_be_bytes()).await?;
        self.image.layout.incompatible.store(now, Ordering::Release);
        Ok(())
    }

    async fn finish(self) -> Result<()> {
        settle(self.image, self.session).await?;
        self.mark(false).await
    }
}

/// Flushes until nothing waits to be counted down.
async fn settle(image: &Qcow2Image, session: &Session) -> Result<()> {
    for _ in 0..FLUSHES_MAX {
        image.flush().await?;
        if image.tables.dirty_bytes() == 0 && session.alloc.is_settled() {
            break;
        }
    }
    Ok(())
}
