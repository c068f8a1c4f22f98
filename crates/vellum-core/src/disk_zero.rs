//! The engine that makes zeros, gives space back, and moves data into the holes that this leaves.

use crate::disk_state::Writing;
use crate::disk_write::{STEP_BYTES, progress};
use crate::{
    Code, Discarded, Disk, Error, Hold, Intent, Placement, Result, Storage, WritableImage, ZeroMode,
};
use std::ops::Range;

/// Data that is moved (to fill holes) after one flush, in bytes: at least one block is.
const MOVED_PER_FLUSH_MAX: u64 = 4 << 20;

impl Disk {
    pub(crate) async fn zero_locked(
        &self,
        range: Range<u64>,
        mode: ZeroMode,
        is_discard: bool,
    ) -> Result<()> {
        let (writing, image) = self.begin().await?;
        let hull = image.hull(range.clone());
        let _guard = writing.locks.lock(hull.clone(), Hold::Exclusive).await;
        if writing.is_shared {
            return self.zero_shared(image, range, if is_discard { ZeroMode::MayUnmap } else { mode }).await;
        }
        if !is_discard {
            writing.forget_discarded(&hull);
        }
        let mut at = range.start;
        while at < range.end {
            let unit = image.hull(at..at + 1);
            let is_whole = |at: u64, unit: &Range<u64>| {
                at <= unit.start && unit.end.min(self.size()) <= range.end && mode == ZeroMode::MayUnmap
            };
            if !is_whole(at, &unit) {
                // Units may be as small as a byte (raw): zeros that stay allocated do not go unit by unit.
                let step = if mode == ZeroMode::KeepAllocated { STEP_BYTES } else { 1 };
                let part = at..unit.end.max(at.saturating_add(step)).min(range.end);
                at = part.end;
                self.zero_part(writing, image, &unit, part, mode, is_discard).await?;
                continue;
            }
            let last = image.hull(range.end - 1..range.end);
            let end = if is_whole(last.start, &last) { range.end } else { last.start };
            match image.discard(at..end).await? {
                Discarded::Done(len) => at = at.saturating_add(progress(len)?).min(end),
                Discarded::Cannot(len) => {
                    let part = at..at.saturating_add(progress(len)?).min(end);
                    at = part.end;
                    if !is_discard {
                        self.store_zeros(image, part).await?;
                    }
                }
            }
            if image.wants_flush() {
                let flushed = image.flush().await;
                writing.fail(flushed)?;
            }
        }
        Ok(())
    }

    /// Zeroes a part of a unit; a discarded part is remembered, and the last one lets the unit go.
    async fn zero_part(
        &self,
        writing: &Writing,
        image: &dyn WritableImage,
        unit: &Range<u64>,
        part: Range<u64>,
        mode: ZeroMode,
        is_discard: bool,
    ) -> Result<()> {
        if !is_discard {
            return self.store_zeros_with(image, part, mode).await;
        }
        let mut at = part.start;
        while at < part.end {
            // Only what has a place of its own is worth zeroing; the rest costs nothing as it is.
            match self.placement(image, at..part.end).await? {
                Placement::InPlace { len, storage, offset } => {
                    let len = len.max(1).min(part.end - at);
                    self.top(storage)?.zero(offset..offset + len, ZeroMode::MayUnmap).await?;
                    at += len;
                }
                Placement::Absent { len } => at = at.saturating_add(len.max(1)),
                Placement::Miss => return Err(Error::new(Code::Io, "a table was not loaded")),
            }
        }
        let whole = unit.start..unit.end.min(self.size());
        if writing.add_discarded(&whole, part) {
            self.discard_all(image, whole).await?;
        }
        Ok(())
    }

    async fn store_zeros(&self, image: &dyn WritableImage, range: Range<u64>) -> Result<()> {
        self.store_zeros_with(image, range, ZeroMode::MayUnmap).await
    }

    /// Stores zeros where the range does not read as zeros anyway.
    async fn store_zeros_with(
        &self,
        image: &dyn WritableImage,
        range: Range<u64>,
        mode: ZeroMode,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            match self.placement(image, at..range.end).await? {
                Placement::InPlace { len, storage, offset } => {
                    let len = len.max(1).min(range.end - at);
                    self.top(storage)?.zero(offset..offset + len, mode).await?;
                    at += len;
                }
                Placement::Absent { len } => {
                    let part = at..at.saturating_add(len.max(1)).min(range.end).min(at + STEP_BYTES);
                    if self.reads_as_zero(part.clone()).await? {
                        at = part.end;
                        continue;
                    }
                    at = self.reserve_zeros(image, part).await?;
                }
                Placement::Miss => return Err(Error::new(Code::Io, "a table was not loaded")),
            }
        }
        Ok(())
    }

    /// Makes a place for the start of `part` and leaves zeros in it; returns how far it reaches.
    async fn reserve_zeros(&self, image: &dyn WritableImage, part: Range<u64>) -> Result<u64> {
        let place = image.reserve(part.clone(), Intent::Write).await?;
        let own = part.start.max(place.range.start)..part.end.min(place.range.end);
        let at = |guest: u64| place.offset + (guest - place.range.start);
        let filled = async {
            self.complete(place.range.start..own.start, place.offset, &place.zeroed, place.storage).await?;
            self.complete(own.end..place.range.end, at(own.end), &place.zeroed, place.storage).await?;
            match place.zeroed {
                true => Ok(()),
                false => zero_range(self.top(place.storage)?.as_ref(), at(own.start)..at(own.end)).await,
            }
        };
        match filled.await {
            Ok(()) => image.commit(place).await.map(|()| own.end),
            Err(error) => {
                image.abort(place).await;
                Err(error)
            }
        }
    }

    pub(crate) async fn flush_now(&self) -> Result<()> {
        let (writing, image) = self.writing()?;
        if writing.begun.get().is_none() {
            return Ok(());
        }
        let flushed = match writing.is_shared {
            true => self.flush_shared().await,
            false => image.flush().await,
        };
        writing.fail(flushed)?;
        let mut moved = 0u64;
        while moved < MOVED_PER_FLUSH_MAX {
            let Some(range) = image.wants_move() else { break };
            let len = range.end.saturating_sub(range.start).max(1);
            match self.move_data(writing, image, range).await {
                Ok(Moved::Done) => moved = moved.saturating_add(len),
                Ok(Moved::NotNow) => break,
                Err(error) => {
                    // What the guest asked for is durable; the space stays where it is until the next flush.
                    tracing::warn!("{}: moving data into a hole failed: {error}", self.0.name);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Moves the data of a guest range to the place that the image has for it.
    async fn move_data(
        &self,
        writing: &Writing,
        image: &dyn WritableImage,
        range: Range<u64>,
    ) -> Result<Moved> {
        let hull = image.hull(range.clone());
        // Whoever is writing there comes first; the next flush tries again.
        let Some(_guard) = writing.locks.try_lock(hull, Hold::Exclusive) else { return Ok(Moved::NotNow) };
        let place = match image.reserve(range, Intent::Move).await {
            Ok(place) => place,
            Err(error) if error.code() == Code::Usage => return Ok(Moved::NotNow),
            Err(error) => return Err(error),
        };
        match self.complete(place.range.clone(), place.offset, &place.zeroed, place.storage).await {
            Ok(()) => image.commit(place).await.map(|()| Moved::Done),
            Err(error) => {
                image.abort(place).await;
                Err(error)
            }
        }
    }
}

#[derive(PartialEq, Eq)]
enum Moved {
    Done,
    NotNow,
}

/// Writes zeros for sure (a storage's `zero` clips at its end, which a fresh place may lie past).
pub(crate) async fn zero_range(storage: &dyn Storage, range: Range<u64>) -> Result<()> {
    let inside = range.end.min(storage.len()?).max(range.start);
    if inside > range.start {
        storage.zero(range.start..inside, ZeroMode::KeepAllocated).await?;
    }
    crate::fill_range(storage, inside, range.end - inside, 0).await
}
