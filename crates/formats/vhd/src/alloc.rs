//! Room for new blocks: freed places first, then the end of the file.
//!
//! ```text
//!   before   | ... block | footer |
//!   after    | ... block | footer |  | bitmap, data of the new block | footer |
//! ```
//!
//! The file grows by one write, of the footer at its new end. The old footer is never written over: whatever a power
//! loss leaves of length and bytes, the file ends in a footer, or the copy at the start is sound. What the new block
//! holds is all new to the file, and so zero.
//!
//! A freed place is given out again when no durable BAT entry names it. Free places at the end of the file are cut
//! off: a footer is written where the file is going to end, the next flush makes it durable, then the file is cut.

use crate::header::{ABSENT, FOOTER_BYTES, FORMAT, Footer};
use crate::map::{SECTOR, Sparse, Tables, VhdImage};
use crate::survey::{Survey, aligned_start};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use vellum_core::storage::write_slice;
use vellum_core::{
    Code, Committer, Error, ImageInfo, OpenRequest, Preallocate, Result, Storage, ZeroMode, bytes,
};
use zerocopy::IntoBytes;

/// What an image that can be written has besides its tables.
pub(crate) struct Writing {
    pub(crate) committer: Committer,
    /// The footer as it is written from now on.
    pub(crate) footer: Mutex<Footer>,
    /// The copy at the start is sound.
    pub(crate) copy_is_sound: bool,
    /// The time of this session, in the footer's count.
    pub(crate) timestamp: u32,
    /// Held while the length of the file changes.
    length: async_lock::Mutex<()>,
    pub(crate) space: Mutex<Space>,
    /// What the image says of itself since the session began.
    pub(crate) told: OnceLock<ImageInfo>,
}

/// Room in the file that blocks can have.
#[derive(Default)]
pub(crate) struct Space {
    /// Free places, and whether they read as zeros.
    free: BTreeMap<u64, bool>,
    /// No entry in memory names them, but one in the file may.
    pub(crate) pending: Vec<u64>,
    /// No durable entry names them any more.
    pub(crate) released: Vec<u64>,
    /// Where the footer was before the file grew by the block that starts here.
    grown: HashMap<u64, u64>,
    /// The end of the file is going to be cut off.
    cut: Option<Cut>,
    /// Cuts so far.
    cuts: u64,
    /// A block of which the file holds only what the disk shows: its place is too short for another.
    short: Option<u64>,
}

/// Free places at the end of the file, set aside.
struct Cut {
    /// Tells one cut from the next.
    number: u64,
    /// Where a footer is written, to be the last one.
    footer_at: u64,
    /// The footer was written; the next flush makes it durable.
    is_written: bool,
    slots: BTreeMap<u64, bool>,
}

/// Room for one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Where its bitmap starts.
    pub(crate) start: u64,
    /// Its data reads as zeros.
    pub(crate) zeroed: bool,
}

impl Writing {
    /// The state of an image whose end has `footer`.
    pub(crate) fn new(request: &OpenRequest, footer: Footer, copy_is_sound: bool) -> Self {
        let seconds = request.providers.unix_time.saturating_sub(crate::header::EPOCH);
        Writing {
            committer: Committer::default(),
            footer: Mutex::new(footer),
            copy_is_sound,
            timestamp: u32::try_from(seconds).unwrap_or(u32::MAX),
            length: async_lock::Mutex::new(()),
            space: Mutex::default(),
            told: OnceLock::new(),
        }
    }

    /// Takes note of the room that nobody uses.
    ///
    /// # Errors
    /// If an entry of the BAT is wrong: a new block could come to lie where a wrong one is believed to be.
    pub(crate) fn look_at(&self, mut survey: Survey, layout: &Sparse, data_end: u64) -> Result<()> {
        let wrong = |code, block: u32, entry: u32| {
            crate::map::bad_entry(layout, data_end, code, block.into(), entry)
                .hint("repair the image before it is written: `vellum repair`")
        };
        if let Some(fault) = survey.faults.first() {
            return Err(wrong(fault.code, fault.block, fault.entry));
        }
        if survey.is_cut_short {
            return Ok(()); // So many blocks that they are not held at once: no room is looked for.
        }
        if let Some(fault) = survey.take_overlaps(layout).first() {
            let taken = "two blocks of the disk lie in the same place";
            return Err(Error::new(Code::Overlap, taken)
                .format(FORMAT)
                .field("BAT entry")
                .at(layout.table_offset.saturating_add(u64::from(fault.block).saturating_mul(4)))
                .found(format!("sector {} for guest block {}", fault.entry, fault.block))
                .allowed("a place of its own for every block")
                .hint("repair the image before it is written: `vellum repair`"));
        }
        let mut space = self.space.lock();
        let last = layout.blocks().saturating_sub(1);
        let mut next = survey.placed.iter().skip(1).map(|placed| u64::from(placed.sector));
        space.short = survey.placed.iter().find_map(|placed| {
            let limit = next.next().map_or(data_end, |sector| sector.saturating_mul(SECTOR));
            let start = u64::from(placed.sector).saturating_mul(SECTOR);
            let end = start.saturating_add(layout.slot_bytes());
            let mut others = layout.structures().chain(layout.locators.iter().cloned());
            let is_short = end > limit || others.any(|other| start < other.end && other.start < end);
            (u64::from(placed.block) == last && is_short).then_some(start)
        });
        space.free = survey.holes(layout, data_end).into_iter().map(|start| (start, false)).collect();
        Ok(())
    }
}

impl Space {
    fn take(&mut self) -> Option<Slot> {
        self.free.pop_first().map(|(start, zeroed)| Slot { start, zeroed })
    }

    /// A place that was taken is not needed.
    pub(crate) fn give_back(&mut self, start: u64) {
        self.free.insert(start, false);
    }

    /// The block at `start` is no more.
    pub(crate) fn let_go(&mut self, start: u64) {
        match self.short == Some(start) {
            true => self.short = None, // Its room is lost.
            false => self.pending.push(start),
        }
    }

    /// The cut that a flush which begins now makes possible.
    pub(crate) fn cut_number(&self) -> Option<u64> {
        self.cut.as_ref().filter(|cut| cut.is_written).map(|cut| cut.number)
    }

    /// Takes the places back that were to be cut off.
    fn keep_all(&mut self) {
        if let Some(mut cut) = self.cut.take() {
            self.free.append(&mut cut.slots);
        }
    }

    /// Sets aside the free places that the file ends with; says where it could end.
    fn set_aside(&mut self, layout: &Sparse, data_end: u64) -> Option<u64> {
        self.keep_all();
        let slot_bytes = layout.slot_bytes();
        let mut end = data_end;
        for start in self.free.keys().rev() {
            let slot_end = start.saturating_add(slot_bytes);
            // In a wider gap there could be a block.
            if slot_end > end || end.saturating_sub(slot_end) >= slot_bytes {
                break;
            }
            end = self.grown.get(start).copied().unwrap_or(*start);
        }
        let mut others = layout.structures().chain(layout.locators.iter().cloned());
        if end >= data_end || others.any(|other| other.end > end) {
            return None;
        }
        self.cuts = self.cuts.saturating_add(1);
        let slots = self.free.split_off(&end);
        self.cut = Some(Cut { number: self.cuts, footer_at: end, is_written: false, slots });
        Some(end)
    }
}

impl VhdImage {
    fn main(&self) -> &dyn Storage {
        let [main] = &self.storages;
        main.as_ref()
    }

    /// Room for a block.
    ///
    /// # Errors
    /// `NO_SPACE`, and those of the storage.
    pub(crate) async fn slot(&self, tables: &Tables, writing: &Writing) -> Result<Slot> {
        if let Some(slot) = writing.space.lock().take() {
            return Ok(slot);
        }
        let _alone = writing.length.lock().await;
        {
            let mut space = writing.space.lock();
            space.keep_all();
            if let Some(slot) = space.take() {
                return Ok(slot);
            }
        }
        self.grow(tables, writing).await
    }

    /// Lengthens the file by a block.
    async fn grow(&self, tables: &Tables, writing: &Writing) -> Result<Slot> {
        let layout = &tables.layout;
        let old = tables.data_end.load(Ordering::Acquire);
        let old_len = bytes::add(old, FOOTER_BYTES)?;
        let start = aligned_start(layout, old_len);
        let footer_at = bytes::add(start, layout.slot_bytes())?;
        if bytes::div(start, SECTOR)? >= ABSENT.into() {
            return Err(Error::new(Code::NoSpace, "the file cannot get longer: BAT entries end at 2 TiB")
                .image(&self.info.name)
                .format(FORMAT)
                .field("BAT entry")
                .found(format!("a block at byte {start:#x}"))
                .hint("convert the image; that leaves out what is not used"));
        }
        let footer = *writing.footer.lock();
        if let Err(error) = write_slice(self.main(), footer_at, footer.as_bytes()).await {
            // A part of the write may have made the file longer.
            if self.main().len().is_ok_and(|len| len > old_len) {
                let _ = self.main().set_len(old_len, Preallocate::Off).await;
            }
            return Err(error.context("making room for a block at the end of the file"));
        }
        tables.data_end.store(footer_at, Ordering::Release);
        writing.space.lock().grown.insert(start, old);
        Ok(Slot { start, zeroed: true })
    }

    /// After a flush: carries out the cut whose footer it made durable, gives the space of places back that nobody
    /// names any more, and prepares the next cut. What fails here only costs space.
    pub(crate) async fn settle(&self, tables: &Tables, writing: &Writing, durable: Option<u64>) {
        {
            let space = writing.space.lock();
            if space.released.is_empty() && space.cut.is_none() {
                return;
            }
        }
        let _alone = writing.length.lock().await;
        if let Some(number) = durable {
            self.cut(tables, writing, number).await;
        }
        let slot_bytes = tables.layout.slot_bytes();
        loop {
            let Some(start) = writing.space.lock().released.pop() else { break };
            let range = start..start.saturating_add(slot_bytes);
            let zeroed = self.main().zero(range, ZeroMode::MayUnmap).await.is_ok();
            writing.space.lock().free.insert(start, zeroed);
        }
        if writing.space.lock().cut.is_some() {
            return; // The next flush carries it out.
        }
        let data_end = tables.data_end.load(Ordering::Acquire);
        let Some(footer_at) = writing.space.lock().set_aside(&tables.layout, data_end) else { return };
        let footer = *writing.footer.lock();
        let written = write_slice(self.main(), footer_at, footer.as_bytes()).await;
        let mut space = writing.space.lock();
        match (&mut space.cut, written) {
            (Some(cut), Ok(())) => cut.is_written = true,
            _ => space.keep_all(),
        }
    }

    async fn cut(&self, tables: &Tables, writing: &Writing, number: u64) {
        let Some(cut) = writing.space.lock().cut.take_if(|cut| cut.number == number) else { return };
        let old = tables.data_end.swap(cut.footer_at, Ordering::AcqRel);
        let len = cut.footer_at.saturating_add(FOOTER_BYTES);
        let done = self.main().set_len(len, Preallocate::Off).await;
        let mut space = writing.space.lock();
        if done.is_ok() {
            cut.slots.keys().for_each(|start| {
                space.grown.remove(start);
            });
        } else {
            tables.data_end.store(old, Ordering::Release);
            space.cut = Some(cut);
            space.keep_all();
        }
    }
}
