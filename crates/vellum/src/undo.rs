//! Undoing a repair: the bytes of a backup go back, if the image is still the one that was repaired.
//!
//! A repair may have been interrupted, and so may undoing it: every sector that was touched must be what it was before
//! the repair or after one of its writes. Anything else was written by somebody else, and then nothing is changed.

use crate::Vellum;
use crate::backup::{Backup, Kind, Record};
use crate::repair::SECTOR;
use std::sync::Arc;
use vellum_core::storage::{read_vec, write_slice};
use vellum_core::{Access, Asker, Code, Error, Location, Preallocate, Result, Storage, block_on, bytes};

/// Bytes that are looked at together where the repair made a file longer.
const STEP: u64 = 1 << 20;

/// What undoing a repair did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UndoReport {
    /// Bytes that were put back.
    pub restored_bytes: u64,
    /// The files that they were put back into.
    pub files: Vec<String>,
}

impl Vellum {
    /// Puts back what a repair of the image `name` changed. May be repeated if it was interrupted.
    ///
    /// # Errors
    /// `MISMATCH` if the image was changed after the repair, or is another one. Nothing is changed then.
    pub fn undo_repair(&self, name: &str, backup: &str) -> Result<UndoReport> {
        block_on(async {
            let found = self.resolver.open(backup, &Asker::User, Access::default()).await?;
            let backup = Backup::read(found.storage).await?;
            let (location, storages) = self.open_files(name, &backup).await?;
            for (file, storage) in storages.iter().enumerate() {
                let history = History::of(&backup, file).await?;
                history.check(&backup, storage.as_ref()).await.map_err(|error| error.image(&location))?;
            }
            let mut restored_bytes = 0;
            for (file, storage) in storages.iter().enumerate() {
                let history = History::of(&backup, file).await?;
                restored_bytes += history.restore(&backup, storage.as_ref()).await?;
            }
            let files = storages.iter().map(|storage| storage.name().to_owned()).collect();
            Ok(UndoReport { restored_bytes, files })
        })
    }

    async fn open_files(&self, name: &str, backup: &Backup) -> Result<(Location, Vec<Arc<dyn Storage>>)> {
        let image =
            self.resolver.open(name, &Asker::User, Access { write: true, ..Access::default() }).await?;
        let mut storages: Vec<Arc<dyn Storage>> = Vec::new();
        for file in &backup.files {
            if file.place.is_empty() {
                storages.push(image.storage.clone());
                continue;
            }
            // A backup is a file like any other: it may name what the image may name, no more.
            let asker = Asker::Part { of: image.location.clone() };
            storages.push(
                self.resolver
                    .open(&file.place, &asker, Access { write: true, ..Access::default() })
                    .await?
                    .storage,
            );
        }
        Ok((image.location, storages))
    }
}

/// What happened to one file.
struct History {
    old_len: u64,
    min_len: u64,
    max_len: u64,
    old: Vec<Record>,
    writes: Vec<(u64, Vec<u8>)>,
}

impl History {
    async fn of(backup: &Backup, file: usize) -> Result<Self> {
        let len = backup.files.get(file).map_or(0, |file| file.len);
        let (old, writes) = (Vec::new(), Vec::new());
        let mut history = History { old_len: len, min_len: len, max_len: len, old, writes };
        let mut now_len = len;
        for record in backup.records.iter().filter(|record| record.file == file) {
            match record.kind {
                Kind::Old => history.old.push(*record),
                Kind::Write => {
                    history.writes.push((record.offset, backup.payload(record).await?));
                    now_len = now_len.max(record.offset.saturating_add(u64::from(record.len)));
                }
                Kind::Length => now_len = record.offset,
                Kind::End => {}
            }
            history.min_len = history.min_len.min(now_len);
            history.max_len = history.max_len.max(now_len);
        }
        Ok(history)
    }

    /// Whether the file is somewhere between before and after the repair.
    async fn check(&self, backup: &Backup, storage: &dyn Storage) -> Result<()> {
        let len = storage.len()?;
        if len < self.min_len || len > self.max_len {
            return Err(changed(storage)
                .found(format!("{len} bytes"))
                .allowed(format!("{} to {} bytes", self.min_len, self.max_len)));
        }
        for record in &self.old {
            let old = backup.payload(record).await?;
            self.check_part(storage, len, record.offset, old).await?;
        }
        let mut at = self.old_len;
        while at < len {
            let end = len.min((at / STEP + 1) * STEP);
            self.check_part(storage, len, at, vec![0; (end - at) as usize]).await?;
            at = end;
        }
        Ok(())
    }

    /// Follows a part of the file, which was `state` before the repair, through all writes.
    async fn check_part(
        &self,
        storage: &dyn Storage,
        len: u64,
        start: u64,
        mut state: Vec<u8>,
    ) -> Result<()> {
        let end = bytes::add(start, state.len() as u64)?;
        let have = len.saturating_sub(start).min(state.len() as u64) as usize;
        if have == 0 {
            return Ok(()); // cut off
        }
        let now = read_vec(storage, start, have).await?;
        let first = (SECTOR - start % SECTOR) as usize;
        let cuts = std::iter::once(0).chain((0..).map(move |n| first + n * SECTOR as usize));
        let mut sectors: Vec<(usize, bool)> =
            cuts.take_while(|cut| *cut < have).map(|cut| (cut, false)).collect();
        let is_same = |state: &[u8], from: usize| {
            let at = start + from as u64;
            let to = (from + (SECTOR - at % SECTOR) as usize).min(have);
            // Undoing cuts off what the repair cut off, before it puts the bytes back.
            let is_cut = || at >= self.min_len && now.get(from..to).is_some_and(bytes::is_zero);
            state.get(from..to) == now.get(from..to) || is_cut()
        };
        sectors.iter_mut().for_each(|(at, is_known)| *is_known = is_same(&state, *at));
        for (offset, written) in &self.writes {
            let (from, to) = ((*offset).max(start), bytes::add(*offset, written.len() as u64)?.min(end));
            if from >= to {
                continue;
            }
            let source = written.get((from - offset) as usize..(to - offset) as usize);
            let target = state.get_mut((from - start) as usize..(to - start) as usize);
            if let (Some(source), Some(target)) = (source, target) {
                target.copy_from_slice(source);
            }
            sectors.iter_mut().for_each(|(at, is_known)| *is_known |= is_same(&state, *at));
        }
        match sectors.iter().find(|(_, is_known)| !is_known) {
            Some((at, _)) => Err(changed(storage).at(start + *at as u64)),
            None => Ok(()),
        }
    }

    async fn restore(&self, backup: &Backup, storage: &dyn Storage) -> Result<u64> {
        if self.old.is_empty() && storage.len()? == self.old_len {
            return Ok(0);
        }
        if self.min_len < self.old_len {
            // What was zero there is not in the backup.
            storage.set_len(self.min_len, Preallocate::Off).await?;
        }
        if storage.len()? != self.old_len {
            storage.set_len(self.old_len, Preallocate::Off).await?;
        }
        let mut restored = 0;
        for record in &self.old {
            write_slice(storage, record.offset, &backup.payload(record).await?).await?;
            restored += u64::from(record.len);
        }
        storage.flush().await?;
        Ok(restored)
    }
}

#[cold]
fn changed(storage: &dyn Storage) -> Error {
    let message = format!("{} is neither as before nor as after the repair", storage.name());
    Error::new(Code::Mismatch, message).hint(
        "nothing was changed: the image was written to after the repair, or the backup is of another image",
    )
}
