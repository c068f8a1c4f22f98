//! Marks in the header: what a writing session begins with, and what it does when the image turns out to be damaged.

use crate::bitmaps;
use crate::check;
use crate::header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA, INCOMPAT_CORRUPT};
use crate::map::Qcow2Image;
use crate::snapshot_table::{self, Entry as Snapshot};
use crate::stored::Source;
use crate::write::Session;
use std::ops::Range;
use std::sync::atomic::Ordering;
use vellum_core::storage::write_slice;
use vellum_core::{FlushPoint, Result, Storage, bytes, flush_at};

/// Header fields.
const INCOMPATIBLE_FEATURES: u64 = 72;
const AUTOCLEAR_FEATURES: u64 = 88;

impl Qcow2Image {
    /// Reads what writing needs and marks what it does not keep. Does nothing the second time.
    pub(crate) async fn begin_session(&self) -> Result<()> {
        let session = self.session()?;
        if session.begun.load(Ordering::Acquire) {
            return Ok(());
        }
        if session.options.recount {
            self.recount(session).await?;
        }
        session.alloc.load_table().await?;
        self.fill_up_files().await?;
        self.protect().await?;
        self.clear_marks(session).await?;
        session.begun.store(true, Ordering::Release);
        Ok(())
    }

    /// The last writer postponed refcounts and did not come to write them.
    async fn recount(&self, session: &Session) -> Result<()> {
        session.options.events.warn(&format!(
            "{}: the image was not closed cleanly; its refcounts are counted anew",
            self.info.name
        ));
        let storage = self.tables.storage();
        let header = check::recount(storage, &session.options.limits).await?;
        self.layout.adopt(&header, storage.len()?);
        self.tables.forget(0..u64::MAX);
        Ok(())
    }

    /// The last cluster may be cut off by the end of the file: a write into the missing part would not be read back.
    async fn fill_up_files(&self) -> Result<()> {
        let whole = bytes::align_up(self.layout.file_len(), self.cluster)?;
        for (index, storage) in self.storages.iter().enumerate() {
            let end = if index == 0 { whole } else { self.header.size };
            grow(storage.as_ref(), end).await?;
        }
        self.layout.reaches(whole);
        if let Some(data) = self.storages.get(1) {
            self.layout.data_len.store(data.len()?, Ordering::Release);
        }
        Ok(())
    }

    /// Autoclear bits say "everybody who wrote since knew of this".
    async fn clear_marks(&self, session: &Session) -> Result<()> {
        let storage = self.tables.storage();
        let before = self.layout.autoclear.load(Ordering::Acquire);
        let mut after = before & AUTOCLEAR_RAW_DATA;
        if let Some(bitmaps) = session.options.bitmaps.filter(|_| before & AUTOCLEAR_BITMAPS != 0) {
            session.options.events.warn(&format!(
                "{}: the persistent bitmaps ({}) are not kept while the image is written, and become invalid; \
                 the next incremental backup must be a full one",
                self.info.name, bitmaps.count
            ));
            if bitmaps::mark_in_use(storage.as_ref(), bitmaps).await? {
                after |= AUTOCLEAR_BITMAPS;
            }
        } else if before == after {
            return Ok(());
        }
        if before != after {
            self.write_mark(AUTOCLEAR_FEATURES, after).await?;
        }
        flush_at(FlushPoint::Session, storage.as_ref()).await?;
        self.layout.autoclear.store(after, Ordering::Release);
        Ok(())
    }

    /// Says in the header that the image must not be written before it was repaired (version 2 cannot say it).
    pub(crate) async fn mark_corrupt(&self) -> Result<()> {
        let before = self.layout.incompatible.load(Ordering::Acquire);
        if self.header.version < 3 || before & INCOMPAT_CORRUPT != 0 {
            return Ok(());
        }
        let after = before | INCOMPAT_CORRUPT;
        self.write_mark(INCOMPATIBLE_FEATURES, after).await?;
        flush_at(FlushPoint::Other, self.tables.storage().as_ref()).await?;
        self.layout.incompatible.store(after, Ordering::Release);
        Ok(())
    }

    /// One field of 8 bytes: never torn, because it does not cross a sector.
    async fn write_mark(&self, at: u64, bits: u64) -> Result<()> {
        write_slice(self.tables.storage().as_ref(), at, &bits.to_be_bytes())
            .await
            .map_err(|e| e.context("writing the header"))
    }

    async fn protect(&self) -> Result<()> {
        let source = Source::new(self.tables.storage().as_ref())?;
        let table = snapshot_table::read(&source, &self.header, &self.session()?.options.limits).await?;
        let start = self.header.snapshots_offset;
        self.protect_tables(start..start.saturating_add(table.len), &table.entries)
    }

    /// Notes the tables that guest data must never overwrite, besides those that the header names: to be called again
    /// when the snapshots have changed.
    pub(crate) fn protect_tables(&self, table: Range<u64>, entries: &[Snapshot]) -> Result<()> {
        let mut areas = vec![(table, "the snapshot table")];
        for snapshot in entries {
            let len = bytes::mul(snapshot.l1_size.into(), 8)?;
            let end = snapshot.l1_table_offset.saturating_add(len);
            areas.push((snapshot.l1_table_offset..end, "the L1 table of a snapshot"));
        }
        if let Some(bitmaps) = &self.session()?.options.bitmaps {
            let end = bitmaps.directory_offset.saturating_add(bitmaps.directory_size);
            areas.push((bitmaps.directory_offset..end, "the bitmap directory"));
        }
        self.layout.protect(areas);
        Ok(())
    }
}

/// Makes a file at least `end` bytes long; the bytes before `end` are the caller's, and not written by anyone meanwhile.
pub(crate) async fn grow(storage: &dyn Storage, end: u64) -> Result<()> {
    if storage.limits().resizable && storage.len()? < end {
        // Not by `set_len`: others may have written past `end` since the length was asked for, and would lose it.
        let last = end.saturating_sub(1);
        let written = vellum_core::storage::write_slice(storage, last, &[0]).await;
        written.map_err(|e| e.context("making the file longer"))?;
    }
    Ok(())
}
