//! A writing session: how it begins, its group commits, how it ends. (Single writes are in `write.rs`.)
//!
//! Between sessions the file is dense: slots `0..cBlocksAllocated`, each in use. Other programs count on it (QEMU's
//! check compares counter and entries; VirtualBox discards only in a dense file). Space that a crash left behind the
//! last slot is used by new blocks, and cut off by the next session that lets blocks go at the end, or by a repair.

use crate::alloc::{Alloc, NextMove};
use crate::header::{FORMAT, UUID_MODIFY_AT};
use crate::layout::slot_of;
use crate::map::VdiImage;
use crate::scan::{Fault, check_limit, survey};
use crate::write::{HEAD, TRIES, Writer};
use std::sync::atomic::Ordering;
use vellum_core::storage::{read_vec, write_slice};
use vellum_core::{
    Buf, Code, Error, FlushPoint, Image, Intent, Placement, Preallocate, Reservation, Result, WritableImage,
    WriteFlags, bytes, flush_at, not_shareable,
};

/// At closing, holes are filled by moving at most so many bytes; the rest stays for the next session.
const MOVED_AT_CLOSE_MAX: u64 = 1 << 30;
/// So many bytes at a time, with a flush after each.
const MOVED_PER_FLUSH: u64 = 64 << 20;
/// Data is copied in steps of this.
const STEP: u64 = 1 << 20;

impl VdiImage {
    /// Checks the map, and makes the new identity durable before anything else changes.
    pub(crate) async fn begin_session(&self, writer: &Writer) -> Result<()> {
        self.survey_map(writer).await?;
        self.mark_session(writer).await?;
        // From now on the counter is ours.
        self.knows_counter.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Checks that every block has its place, and one of its own: then several processes can write at once.
    pub(crate) async fn share_session(&self, writer: &Writer) -> Result<()> {
        if !writer.is_fixed {
            return Err(not_shareable());
        }
        self.survey_map(writer).await?;
        let (mut at, mut misses) = (0u64, 0);
        while at < self.info.virtual_size {
            let rest = at..self.info.virtual_size;
            match self.place(rest.clone())? {
                Placement::InPlace { len, .. } => (at, misses) = (bytes::add(at, len.max(1))?, 0),
                Placement::Miss if misses >= TRIES => return Err(self.squeezed()),
                Placement::Miss => {
                    misses = misses.saturating_add(1);
                    self.load(rest).await?;
                }
                Placement::Absent { .. } => {
                    return Err(Error::new(
                        Code::Usage,
                        "several processes cannot write it at the same time: though it is fixed, a block has no place yet",
                    )
                    .field("block map entry")
                    .hint("convert it to a new fixed image, and use that"));
                }
            }
        }
        Ok(())
    }

    /// Makes everything durable and the file dense.
    pub(crate) async fn end_session(&self, writer: &Writer) -> Result<()> {
        self.flush_tables(writer).await?;
        self.fill_holes(writer).await?;
        let (counter, end) = {
            let alloc = writer.alloc.lock();
            (alloc.counter, alloc.end())
        };
        if counter != end { self.flush_tables(writer).await } else { Ok(()) }
    }

    /// Looks the whole map over and sets up the allocator.
    async fn survey_map(&self, writer: &Writer) -> Result<()> {
        let mut first: Option<Fault> = None;
        let file_len = self.file_len.load(Ordering::Acquire);
        let survey = survey(self.file(), &self.layout, file_len, &writer.limits, |fault| {
            first.get_or_insert(fault);
        })
        .await
        .map_err(|e| e.image(&self.info.name).context("reading the block map"))?;
        *writer.alloc.lock() = match first {
            None => Alloc::new(survey.slots),
            Some(_) if writer.skip_checks => {
                check_limit(survey.claimed, &writer.limits)?;
                Alloc::damaged(survey.slots, survey.claimed)
            }
            Some(fault) => return Err(self.damaged(fault, survey.faults)),
        };
        Ok(())
    }

    #[cold]
    fn damaged(&self, fault: Fault, count: u64) -> Error {
        let error = match fault.code {
            Code::Overlap => Error::new(Code::Overlap, "two guest blocks lie in the same place of the file")
                .image(&self.info.name)
                .field("block map entry")
                .at(self.layout.entry_at(fault.block))
                .found(format!("block {} for guest block {}, used before", fault.slot, fault.block))
                .allowed("each block once"),
            code => self.bad_entry(code, fault.block, fault.slot),
        };
        error_for_writing(error, count)
    }

    /// A new modification identity, and the counter as the map has it: one write of one sector.
    async fn mark_session(&self, writer: &Writer) -> Result<()> {
        let mut head = read_vec(self.file(), 0, self.head_len()?).await?;
        let uuid = writer.providers.random_uuid();
        let counter = writer.alloc.lock().end().to_le_bytes();
        put(&mut head, UUID_MODIFY_AT, &uuid.to_microsoft())?;
        put(&mut head, writer.counter_at, &counter)?;
        write_slice(self.file(), 0, &head).await?;
        flush_at(FlushPoint::Session, self.file()).await?;
        self.table.load(HEAD, self.head_len()?).await?;
        let mut info = self.info.clone();
        info.identity.modification = Some(uuid);
        info.change_property("uuidModify", uuid.to_string());
        writer.told.get_or_init(|| info);
        Ok(())
    }

    /// The group commit, and what it allows: a shorter file, holes to fill.
    pub(crate) async fn flush_tables(&self, writer: &Writer) -> Result<()> {
        self.lower_counter(writer).await?;
        let freeze = || writer.alloc.lock().freeze();
        let done = |released| writer.alloc.lock().thaw(released);
        writer.committer.commit(&[&self.table], &self.storages, freeze, done).await?;
        self.shorten(writer).await?;
        self.find_owners(writer).await
    }

    /// The counter in the cached header follows the end where it went down; it reaches the file with the next commit.
    async fn lower_counter(&self, writer: &Writer) -> Result<()> {
        for _ in 0..TRIES {
            {
                let mut alloc = writer.alloc.lock();
                if alloc.counter == alloc.end() || self.change(&mut alloc, writer.counter_at, &[])? {
                    return Ok(());
                }
            }
            self.table.load(HEAD, self.head_len()?).await?;
        }
        Err(self.squeezed())
    }

    /// Gives the space behind the last slot back. What was there is named by nothing durable.
    async fn shorten(&self, writer: &Writer) -> Result<()> {
        if !writer.alloc.lock().is_shorter {
            return Ok(());
        }
        let _alone = writer.length.lock().await;
        let wanted = {
            let mut alloc = writer.alloc.lock();
            alloc.is_shorter = false;
            self.layout.slot_at(alloc.end())
        };
        let len = self.file_len.load(Ordering::Acquire);
        if wanted >= len || writer.is_fixed || !self.file().limits().resizable {
            return Ok(());
        }
        match self.file().set_len(wanted, Preallocate::Off).await {
            Ok(()) => self.file_len.store(wanted, Ordering::Release),
            // It costs space, nothing else.
            Err(error) => {
                self.events
                    .warn(&format!("{}: space at the end was not given back: {error}", self.info.name));
            }
        }
        Ok(())
    }

    /// Finds out whose the last slots are, if a hole waits for one of them.
    async fn find_owners(&self, writer: &Writer) -> Result<()> {
        if writer.is_fixed || self.layout.extra != 0 || writer.alloc.lock().next_move() != NextMove::Unknown {
            return Ok(());
        }
        writer.alloc.lock().begin_tail();
        let (mut block, blocks) = (0u64, u64::from(self.layout.blocks));
        while block < blocks {
            let entries = self.entries(block).await?;
            let mut alloc = writer.alloc.lock();
            let left = bytes::index(bytes::sub(blocks, block)?)?;
            for entry in entries.iter().take(left) {
                if let Some(slot) = slot_of(entry) {
                    alloc.own(slot, block);
                }
                block = bytes::add(block, 1)?;
            }
        }
        Ok(())
    }

    /// Fills holes while nobody else is at work, for a file that is dense when it is closed.
    async fn fill_holes(&self, writer: &Writer) -> Result<()> {
        let mut moved = 0u64;
        while moved < MOVED_AT_CLOSE_MAX {
            let before = moved;
            while let Some(range) = self.wants_move() {
                let place = match self.reserve(range, Intent::Move).await {
                    // Not the owner of the last slot after all; it is not named again.
                    Err(error) if error.code() == Code::Usage => continue,
                    place => place?,
                };
                self.copy_block(&place).await?;
                self.commit(place).await?;
                moved = moved.saturating_add(self.layout.block);
                if moved.saturating_sub(before) >= MOVED_PER_FLUSH {
                    break;
                }
            }
            if moved == before {
                return Ok(());
            }
            self.flush_tables(writer).await?;
        }
        Ok(())
    }

    /// Copies the data of a reserved block from where it lies.
    async fn copy_block(&self, place: &Reservation) -> Result<()> {
        let (block, _) = self.reserved(place)?;
        let Some(slot) = self.entries(block).await?.iter().next().and_then(slot_of) else { return Ok(()) };
        let from = self.layout.data_at(slot);
        let here = self.file_len.load(Ordering::Acquire).saturating_sub(from).min(self.layout.block);
        let mut at = 0u64;
        while at < self.layout.block {
            let step = STEP.min(bytes::sub(self.layout.block, at)?);
            let mut buf = Buf::zeroed(bytes::index(step)?);
            // The file may end where the guest's view of its last block does.
            let present = step.min(here.saturating_sub(at));
            if present != 0 {
                buf.set_window(0..bytes::index(present)?);
                let (back, result) = self.file().read_at(buf, bytes::add(from, at)?).await;
                result?;
                buf = back;
                buf.set_window(0..bytes::index(step)?);
            }
            let to = bytes::add(place.offset, at)?;
            self.file().write_at(buf, to, WriteFlags::default()).await.1?;
            at = bytes::add(at, step)?;
        }
        Ok(())
    }
}

/// Writes `new` at byte `at` of the header's sector.
fn put(head: &mut [u8], at: u64, new: &[u8]) -> Result<()> {
    let at = bytes::index(at)?;
    let field = head.get_mut(at..at.saturating_add(new.len()));
    let field =
        field.ok_or_else(|| Error::new(Code::Truncated, "the header is too short").at(bytes::wide(at)))?;
    field.copy_from_slice(new);
    Ok(())
}

#[cold]
fn error_for_writing(error: Error, count: u64) -> Error {
    let (found, allowed) =
        (error.found_value().unwrap_or_default(), error.allowed_values().unwrap_or_default());
    Error::new(
        error.code(),
        format!("the block map is damaged, writing could destroy more: {}", error.message()),
    )
    .image(error.image_name().unwrap_or_default())
    .format(FORMAT)
    .field("block map entry")
    .at(error.offset().unwrap_or_default())
    .found(format!("{found} (the first of {count} bad entries)"))
    .allowed(allowed)
    .hint("`vellum check` lists what is wrong, `vellum repair` mends it; reading the image is possible")
}
