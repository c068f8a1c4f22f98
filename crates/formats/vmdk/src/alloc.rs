//! Space in the file of one sparse extent: where new grains and tables go.
//!
//! ```text
//!   ... grains ... | fresh grains ->   | room that the file was made longer by, all zero |
//!                  old end             end                                              len
//! ```
//!
//! The file grows in steps, so that a fresh grain reads as zeros and only its data is written. Grains that a discard
//! freed are used again, but only after a group commit: until then something durable points to them.

use crate::extent::SparseExtent;
use crate::header::SECTOR;
use crate::tables::PAGE;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::ops::Range;
use vellum_core::bytes::{add, align_up, mul, rem, sub};
use vellum_core::{Code, Error, Preallocate, Result, Storage};

/// The file grows by at least so much; what is left over is cut off when the image is closed.
const STEP: u64 = 1 << 20;
/// Where 32-bit sectors end.
const END_MAX: u64 = SECTOR << 32;

/// The space of one extent.
pub(crate) struct Space {
    grain: u64,
    state: Mutex<State>,
    growing: async_lock::Mutex<()>,
    /// Held while a grain table is made.
    pub making: async_lock::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Nothing that is used lies here or after.
    end: u64,
    /// Length of the file.
    len: u64,
    /// The file can be made longer.
    can_grow: bool,
    /// Grains that can be used again, by byte offset.
    free: BTreeSet<u64>,
    /// Grains that the next group commit frees.
    pending: Vec<u64>,
    /// Grains that nothing durable points to, before their space is given back to the host.
    released: Vec<u64>,
    /// What is left of the room for tables.
    nursery: Range<u64>,
}

/// Room for grains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    pub place: u64,
    pub grains: u64,
    /// It reads as zeros.
    pub is_fresh: bool,
}

impl Space {
    /// The space of a file of `len` bytes.
    pub(crate) fn new(extent: &SparseExtent, len: u64, can_grow: bool) -> Result<Self> {
        let end = align_up(len.max(extent.data_start), extent.grain)?;
        let state = State { end, len, can_grow, ..State::default() };
        Ok(Space {
            grain: extent.grain,
            state: Mutex::new(state),
            growing: async_lock::Mutex::new(()),
            making: async_lock::Mutex::new(()),
        })
    }

    /// Makes the last grain of the file whole, however it is aligned, before something is written into it.
    pub(crate) async fn complete(&self, extent: &SparseExtent, storage: &dyn Storage) -> Result<()> {
        let (len, can_grow) = {
            let state = self.state.lock();
            (state.len, state.can_grow)
        };
        let is_aligned = align_up(extent.data_start, self.grain)? == extent.data_start;
        let whole = align_up(len, self.grain)?;
        let whole = if is_aligned { whole } else { add(whole, self.grain)? };
        if whole == len || !can_grow {
            return Ok(());
        }
        storage.set_len(whole, Preallocate::Off).await?;
        let mut state = self.state.lock();
        state.len = whole;
        state.end = state.end.max(whole);
        extent.set_file_len(whole);
        Ok(())
    }

    /// Takes room for up to `grains` grains that lie one behind the other.
    pub(crate) async fn take(
        &self,
        extent: &SparseExtent,
        storage: &dyn Storage,
        grains: u64,
    ) -> Result<Room> {
        let room = {
            let mut state = self.state.lock();
            match state.free.pop_first() {
                Some(place) => Room { place, grains: 1, is_fresh: false },
                None => {
                    let place = state.end;
                    let end = add(place, mul(grains, self.grain)?)?;
                    if end > END_MAX || (!state.can_grow && end > state.len) {
                        return Err(self.full(extent, &state));
                    }
                    state.end = end;
                    Room { place, grains, is_fresh: state.can_grow }
                }
            }
        };
        let end = add(room.place, mul(room.grains, self.grain)?)?;
        match self.grow(extent, storage, end).await {
            Ok(()) => Ok(room),
            Err(error) => {
                self.give_back(room)?;
                Err(error.image(&extent.name).context("making the extent longer"))
            }
        }
    }

    #[cold]
    fn full(&self, extent: &SparseExtent, state: &State) -> Error {
        let error = Error::new(Code::NoSpace, "there is no room for another grain in the extent")
            .image(&extent.name)
            .found(format!("{} bytes", state.len));
        if state.can_grow {
            error
                .allowed("up to 2 TiB, which 32-bit sectors reach")
                .hint("convert the disk to subformat=twoGbMaxExtentSparse or monolithicFlat")
        } else {
            error.hint("a device cannot be made longer: copy the disk to a file")
        }
    }

    /// Makes the file reach at least to `end`.
    async fn grow(&self, extent: &SparseExtent, storage: &dyn Storage, end: u64) -> Result<()> {
        if self.state.lock().len >= end {
            return Ok(());
        }
        let _alone = self.growing.lock().await;
        let len = self.state.lock().len;
        if len >= end {
            return Ok(());
        }
        let target = align_up(end.max(add(len, STEP)?.min(END_MAX)), self.grain)?;
        storage.set_len(target, Preallocate::Off).await?;
        self.state.lock().len = target;
        extent.set_file_len(target);
        Ok(())
    }

    /// The room is not needed. What was written into it stays there.
    pub(crate) fn give_back(&self, room: Room) -> Result<()> {
        let mut state = self.state.lock();
        for number in 0..room.grains {
            let place = add(room.place, mul(number, self.grain)?)?;
            state.free.insert(place);
        }
        Ok(())
    }

    /// Nothing in memory points to these grains any more; the next group commit frees them.
    pub(crate) fn release(&self, places: Vec<u64>) {
        self.state.lock().pending.extend(places);
    }

    /// What the group commit that begins now will free.
    pub(crate) fn freeze(&self) -> Vec<u64> {
        std::mem::take(&mut self.state.lock().pending)
    }

    /// The group commit is durable.
    pub(crate) fn thaw(&self, places: Vec<u64>) {
        self.state.lock().released.extend(places);
    }

    /// Gives the space of freed grains back to the host, and makes it available again.
    pub(crate) async fn punch(&self, storage: &dyn Storage) -> Result<()> {
        let mut released = std::mem::take(&mut self.state.lock().released);
        if released.is_empty() {
            return Ok(());
        }
        released.sort_unstable();
        released.dedup();
        let mut run: Option<Range<u64>> = None;
        for place in &released {
            let end = add(*place, self.grain)?;
            match &mut run {
                Some(run) if run.end == *place => run.end = end,
                _ => {
                    if let Some(done) = run.replace(*place..end) {
                        storage.discard(done).await?;
                    }
                }
            }
        }
        if let Some(done) = run {
            storage.discard(done).await?;
        }
        self.state.lock().free.extend(released);
        Ok(())
    }

    /// Room for one table of `bytes`, and the page that must be made for it, if it is the first of its page. The caller
    /// holds `making`.
    pub(crate) async fn take_table(
        &self,
        extent: &SparseExtent,
        storage: &dyn Storage,
        bytes: u64,
    ) -> Result<(u64, bool)> {
        let bytes = align_up(bytes, SECTOR)?;
        let (place, end) = {
            let mut state = self.state.lock();
            let mut place = state.nursery.start;
            if rem(place, PAGE)? != 0 && sub(align_up(place, PAGE)?, place)? < bytes {
                place = align_up(place, PAGE)?;
            }
            if place >= state.nursery.end {
                let start = align_up(state.end, PAGE)?;
                let end = add(start, PAGE.max(self.grain))?;
                if end > END_MAX || (!state.can_grow && end > state.len) {
                    return Err(self.full(extent, &state));
                }
                state.end = align_up(end, self.grain)?;
                state.nursery = start..end;
                place = start;
            }
            state.nursery.start = add(place, bytes)?;
            (place, state.nursery.end)
        };
        self.grow(extent, storage, end).await?;
        Ok((place, rem(place, PAGE)? == 0))
    }

    /// Cuts off what the file is longer than needed.
    pub(crate) async fn trim(&self, extent: &SparseExtent, storage: &dyn Storage) -> Result<()> {
        let end = {
            let mut state = self.state.lock();
            while let Some(last) = state.free.last().copied() {
                if add(last, self.grain)? < state.end {
                    break;
                }
                state.end = last;
                state.free.remove(&last);
            }
            if !state.can_grow || state.end >= state.len {
                return Ok(());
            }
            state.len = state.end;
            state.end
        };
        storage.set_len(end, Preallocate::Off).await?;
        extent.set_file_len(end);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::tests::plain;
    use vellum_core::{Memory, block_on};

    #[test]
    fn freed_grains_come_back_after_the_commit_and_the_lowest_first() {
        let memory = Memory::new("t", 1 << 20);
        let extent = plain(1 << 20);
        let space = Space::new(&extent, 1 << 20, true).unwrap();
        let take = |grains| block_on(space.take(&extent, &memory, grains)).unwrap();
        assert_eq!(take(3), Room { place: 1 << 20, grains: 3, is_fresh: true });
        assert_eq!(memory.len().unwrap(), 2 << 20);
        assert_eq!(extent.file_len(), 2 << 20);
        space.release(vec![2 << 16, 1 << 16]);
        assert!(take(1).is_fresh);
        let frozen = space.freeze();
        assert!(take(1).is_fresh);
        space.thaw(frozen);
        block_on(space.punch(&memory)).unwrap();
        assert_eq!(take(5), Room { place: 1 << 16, grains: 1, is_fresh: false });
        assert_eq!(take(5).place, 2 << 16);
        assert_eq!(take(1).place, (1 << 20) + (5 << 16));
        block_on(space.trim(&extent, &memory)).unwrap();
        assert_eq!(memory.len().unwrap(), (1 << 20) + (6 << 16));
    }

    #[test]
    fn tables_share_pages_that_are_made_once() {
        let memory = Memory::new("t", 1 << 20);
        let extent = plain(1 << 20);
        let space = Space::new(&extent, 1 << 20, true).unwrap();
        let places: Vec<_> =
            (0..33).map(|_| block_on(space.take_table(&extent, &memory, 2048)).unwrap()).collect();
        assert_eq!(places[0], (1 << 20, true));
        assert_eq!(places[1], ((1 << 20) + 2048, false));
        assert_eq!(places[8], ((1 << 20) + 16_384, true));
        assert_eq!(places[32].0, (1 << 20) + 65_536);
        assert_eq!(block_on(space.take(&extent, &memory, 1)).unwrap().place, (1 << 20) + (2 << 16));
    }

    #[test]
    fn a_device_is_not_made_longer() {
        let memory = Memory::new("t", 1 << 20);
        let extent = plain(1 << 20);
        let space = Space::new(&extent, 1 << 20, false).unwrap();
        assert_eq!(block_on(space.take(&extent, &memory, 1)).unwrap_err().code(), Code::NoSpace);
    }
}
