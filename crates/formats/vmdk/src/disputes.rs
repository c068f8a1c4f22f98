//! Grain tables that differ from their redundant copies.
//!
//! Before a grain table is used for the first time, it is compared with its copy. If they differ, all tables of the
//! extent are read once, and each entry that is in dispute is decided: the one wins that lies inside the file, is
//! not shared with another entry and is aligned; the primary, if both are as good. An entry of 0 yields to one that leads
//! to a grain of its own. What was decided holds for every lookup; a writer puts it into both tables.

use crate::audit::{self, Pair, Side, Slots, bit};
use crate::extent::{Grain, SparseExtent};
use crate::header::SECTOR;
use crate::tables::{PAGE, Tables};
use parking_lot::RwLock;
use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use vellum_core::bytes::{add, div, mul, wide};
use vellum_core::{Events, Result, Storage};

/// Tables are compared in extents of up to so many (32 TiB in grains of 64 KiB).
const TABLES_MAX: u64 = 1 << 20;
/// Places of tables are remembered in extents of up to so many tables (2 TiB in grains of 64 KiB).
const FOUND_MAX: u64 = 1 << 16;
/// Entries that are decided between, at most; an extent with more is read by its primary tables.
const DISPUTES_MAX: usize = 1 << 18;
/// Tables that are compared in one go.
const AHEAD: u64 = 16;

/// What is known of the tables of one extent.
#[derive(Default)]
pub(crate) struct Disputes {
    /// Tables that agree with their copies, a bit each.
    agreed: OnceLock<Vec<AtomicU64>>,
    /// All of them do, but for what was decided.
    all_agreed: AtomicBool,
    any_decided: AtomicBool,
    /// Sectors of the tables that were found and agree: a short cut past the directory. 0: not known.
    found: OnceLock<Vec<AtomicU32>>,
    /// The winners, by number of the grain.
    decided: RwLock<HashMap<u64, u64>>,
    verdict: async_lock::OnceCell<Verdict>,
}

/// What reading all tables of an extent found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Two entries lead to the same grain, or not all could be looked at.
    pub is_doubtful: bool,
    /// Tables that are there without their copy, or the copy without its table.
    pub single: Vec<u64>,
}

impl Disputes {
    /// Whether this table needs no comparing.
    pub(crate) fn is_agreed(&self, table: u64) -> bool {
        if self.all_agreed.load(Ordering::Acquire) {
            return true;
        }
        let word = self.agreed.get().and_then(|words| words.get(usize::try_from(table >> 6).ok()?));
        word.is_some_and(|word| word.load(Ordering::Acquire) & bit(table) != 0)
    }

    /// Notes that the table needs no comparing (any more).
    pub(crate) fn agree(&self, table: u64, tables: u64) {
        if tables > TABLES_MAX {
            self.all_agreed.store(true, Ordering::Release);
            return;
        }
        let words = self.agreed.get_or_init(|| (0..=tables >> 6).map(|_| AtomicU64::new(0)).collect());
        if let Some(word) = usize::try_from(table >> 6).ok().and_then(|number| words.get(number)) {
            word.fetch_or(bit(table), Ordering::AcqRel);
        }
    }

    /// The byte offset of a table that was found before and needs no comparing.
    pub(crate) fn found(&self, table: u64) -> Option<u64> {
        let words = self.found.get()?;
        match words.get(usize::try_from(table).ok()?)?.load(Ordering::Acquire) {
            0 => None,
            sector => u64::from(sector).checked_mul(SECTOR),
        }
    }

    /// Remembers where a table is.
    pub(crate) fn remember(&self, table: u64, tables: u64, place: u64) {
        if tables > FOUND_MAX {
            return;
        }
        let words = self.found.get_or_init(|| (0..tables).map(|_| AtomicU32::new(0)).collect());
        let word = usize::try_from(table).ok().and_then(|number| words.get(number));
        let sector = place.checked_div(SECTOR).and_then(|sector| u32::try_from(sector).ok());
        if let (Some(word), Some(sector)) = (word, sector) {
            word.store(sector, Ordering::Release);
        }
    }

    /// Whether anything was decided that does not stand in the tables yet.
    pub(crate) fn any_decided(&self) -> bool {
        self.any_decided.load(Ordering::Acquire)
    }

    /// The winning entry for a grain that was in dispute.
    pub(crate) fn decided(&self, number: u64) -> Option<u64> {
        if !self.any_decided() {
            return None;
        }
        self.decided.read().get(&number).copied()
    }

    /// Everything that was decided.
    pub(crate) fn all_decided(&self) -> Vec<(u64, u64)> {
        self.decided.read().iter().map(|(number, value)| (*number, *value)).collect()
    }

    /// Both tables say the same of these grains now.
    pub(crate) fn settle(&self, first: u64, grains: u64) {
        if !self.any_decided() {
            return;
        }
        let mut decided = self.decided.write();
        for number in first..first.saturating_add(grains) {
            decided.remove(&number);
        }
        self.any_decided.store(!decided.is_empty(), Ordering::Release);
    }
}

/// An entry that differs from its copy.
pub(crate) struct Dispute {
    pub number: u64,
    pub primary: u64,
    pub copy: u64,
}

/// Which entry of a dispute is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Winner {
    pub value: u64,
    /// The other one could have been right, too.
    pub is_close: bool,
}

/// What the entries in dispute lead to.
struct Rivals {
    /// How many want exactly this.
    wanted: HashMap<u64, u32>,
    aligned: Slots,
    misaligned: Slots,
    /// Where two that are not aligned overlap.
    crowded: Slots,
}

impl Rivals {
    /// Whether the entry `value`, which leads to byte `at`, has a rival that is as good or better.
    fn meet(&self, value: u64, at: u64, is_aligned: bool) -> Result<bool> {
        let is_wanted_twice = self.wanted.get(&value).is_some_and(|count| *count > 1);
        Ok(is_wanted_twice || (!is_aligned && (self.aligned.is_marked(at)? || self.crowded.is_marked(at)?)))
    }
}

impl SparseExtent {
    /// Compares grain table number `table` (and some that follow) with their copies.
    pub(crate) async fn compare(&self, tables: &Tables, table: u64, events: &Events) -> Result<()> {
        let all = self.tables()?;
        let Some(rgd) = self.rgd.filter(|_| all <= TABLES_MAX) else {
            self.disputes.agree(table, all);
            return Ok(());
        };
        let bytes = self.table_bytes()?;
        let mut page = None;
        for number in table..all.min(add(table, AHEAD)?) {
            let entry = async |directory: u64| {
                let at = add(directory, mul(number, 4)?)?;
                let value = tables.read(self.file, at, 4).await?;
                let value = audit::entries(&value, 4).first().copied().unwrap_or(0);
                Ok(self.table_place(value).ok().flatten())
            };
            let (primary, copy) = (entry(self.gd).await?, entry(rgd).await?);
            let own_page = primary.map(|place| div(place, PAGE)).transpose()?;
            if number > table && own_page != page {
                break;
            }
            page = own_page;
            if let (Some(primary), Some(copy)) = (primary, copy)
                && !self.disputes.is_agreed(number)
                && tables.read(self.file, primary, bytes).await?
                    != tables.read(self.file, copy, bytes).await?
            {
                let storage = tables.file(self.file)?;
                self.verdict(storage.as_ref(), events).await?;
                return Ok(());
            }
            self.disputes.agree(number, all);
        }
        Ok(())
    }

    /// Reads all tables, once, and decides what is in dispute.
    pub(crate) async fn verdict(&self, storage: &dyn Storage, events: &Events) -> Result<&Verdict> {
        self.disputes.verdict.get_or_try_init(|| self.judge(storage, events)).await
    }

    async fn judge(&self, storage: &dyn Storage, events: &Events) -> Result<Verdict> {
        let mut claimed = Slots::new(self);
        let mut disputes = Vec::new();
        let (mut is_doubtful, mut single) = (false, Vec::new());
        let whole = audit::walk(self, storage, |pair| {
            if matches!(
                (&pair.primary, &pair.copy),
                (Side::Table(..), Some(Side::Missing)) | (Side::Missing, Some(Side::Table(..)))
            ) {
                single.push(pair.number);
            }
            is_doubtful |= self.sift(&pair, &mut claimed, &mut disputes)?;
            Ok(())
        })
        .await?;
        let count = wide(disputes.len());
        if !whole || disputes.len() >= DISPUTES_MAX {
            events.warn(&format!(
                "{}: too much differs between the grain tables and their redundant copies; the primary tables are used",
                self.name
            ));
            self.disputes.all_agreed.store(true, Ordering::Release);
            return Ok(Verdict { is_doubtful: true, single });
        }
        let winners = self.decide(&disputes.iter().collect::<Vec<_>>(), &claimed)?;
        let changed =
            disputes.iter().zip(&winners).filter(|(dispute, winner)| dispute.primary != winner.value);
        let changed = changed.count();
        if count > 0 {
            events.warn(&format!(
                "{}: {count} grain table entries differ from their redundant copies; the plausible one of each is \
                 used, which is the copy in {changed} cases (`vellum repair` mends the file)",
                self.name
            ));
        }
        self.hold(&disputes, &winners)?;
        Ok(Verdict { is_doubtful, single })
    }

    /// Sorts the entries of a table into those that are claimed and those in dispute; whether two claim the same.
    fn sift(&self, pair: &Pair, claimed: &mut Slots, disputes: &mut Vec<Dispute>) -> Result<bool> {
        let (entries, copy) = match (&pair.primary, &pair.copy) {
            (Side::Table(_, entries), Some(Side::Table(_, copy))) => (entries, Some(copy)),
            (Side::Table(_, entries), _) | (_, Some(Side::Table(_, entries))) => (entries, None),
            _ => return Ok(false),
        };
        let first = mul(pair.number, self.gtes)?;
        let mut is_shared = false;
        for (place, value) in entries.iter().enumerate() {
            let copy = copy.map_or(*value, |copy| copy.get(place).copied().unwrap_or(0));
            if copy != *value {
                if disputes.len() < DISPUTES_MAX {
                    disputes.push(Dispute { number: add(first, wide(place))?, primary: *value, copy });
                }
            } else if *value != 0
                && let Ok(Grain::At(at)) = self.meaning(*value)
            {
                is_shared |= claimed.mark(at, self.grain)?;
            }
        }
        Ok(is_shared)
    }

    /// The winner of each dispute, given what entries that are in none claim.
    pub(crate) fn decide(&self, disputes: &[&Dispute], claimed: &Slots) -> Result<Vec<Winner>> {
        let rivals = self.rivals(disputes)?;
        // How much speaks for an entry: nothing for one that shows another grain's data; "nothing here" and a place that
        // cannot be do not speak for each other.
        let weight = |value: u64| -> Result<u32> {
            Ok(match self.meaning(value) {
                Ok(Grain::At(at)) => {
                    let is_aligned = claimed.is_aligned(at);
                    if claimed.is_marked(at)? || rivals.meet(value, at, is_aligned)? {
                        0
                    } else {
                        2u32.saturating_add(is_aligned.into())
                    }
                }
                Ok(Grain::Zero) => 2,
                Ok(Grain::Absent) | Err(_) => 1,
            })
        };
        disputes
            .iter()
            .map(|dispute| {
                let (primary, copy) = (weight(dispute.primary)?, weight(dispute.copy)?);
                let value = if copy > primary { dispute.copy } else { dispute.primary };
                Ok(Winner { value, is_close: primary > 1 && copy > 1 })
            })
            .collect()
    }

    /// Who else wants a grain, among the entries in dispute.
    fn rivals(&self, disputes: &[&Dispute]) -> Result<Rivals> {
        let mut rivals = Rivals {
            wanted: HashMap::new(),
            aligned: Slots::new(self),
            misaligned: Slots::new(self),
            crowded: Slots::new(self),
        };
        for value in disputes.iter().flat_map(|dispute| [dispute.primary, dispute.copy]) {
            let count = rivals.wanted.entry(value).or_default();
            *count = count.saturating_add(1);
            if *count > 1 {
                continue;
            }
            if let Ok(Grain::At(at)) = self.meaning(value) {
                if rivals.aligned.is_aligned(at) {
                    rivals.aligned.mark(at, self.grain)?;
                } else if rivals.misaligned.mark(at, self.grain)? {
                    rivals.crowded.mark(at, self.grain)?;
                }
            }
        }
        Ok(rivals)
    }

    /// From now on lookups see the winners. A table that agreed before may have been changed since it was read here.
    fn hold(&self, disputes: &[Dispute], winners: &[Winner]) -> Result<()> {
        let mut decided = self.disputes.decided.write();
        for (dispute, winner) in disputes.iter().zip(winners) {
            if !self.disputes.is_agreed(div(dispute.number, self.gtes)?) {
                decided.insert(dispute.number, winner.value);
            }
        }
        self.disputes.any_decided.store(!decided.is_empty(), Ordering::Release);
        drop(decided);
        self.disputes.all_agreed.store(true, Ordering::Release);
        Ok(())
    }

    /// How an entry is written.
    pub(crate) fn entry_of(&self, place: u64) -> Result<u64> {
        div(place, SECTOR)
    }
}
