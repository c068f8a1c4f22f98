//! What a repair would write, in an order in which every step leaves the image no worse.
//!
//! ```text
//!   counts can be mended in place                    refcount structures must be made anew
//!   1  raise counts that are too low                 1  mend entries, clear COPIED where shared
//!   2  mend entries, clear COPIED where shared       2  new table and blocks behind the end of the file
//!   3  set COPIED where not shared                   3  the header names them (one sector)
//!   4  lower counts that are too high (leaks)        4  set COPIED where not shared
//!   5  take the dirty and corrupt marks back         5  take the marks back
//! ```
//!
//! Only entries that the active L1 table leads to are mended. An L1 entry whose "table" is also something else, and
//! holds entries that cannot be, is given up: the cluster is left alone.

use crate::check::{Checker, Found, PASSES_MAX};
use crate::entry::COPIED;
use crate::header::{INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
use crate::judge::{Entry, Kind};
use crate::rebuild::Rebuild;
use crate::roots::{L2, Mode, Roots, STEP, bitmap_cluster};
use crate::stored::{Block, too_much};
use crate::tally::Tally;
use crate::walk::{Look, Walk};
use crate::{counts, extensions, header};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use vellum_core::{CheckReport, Fix, Patch, Result, bytes};

/// Bytes of patches that one plan holds.
pub(crate) const PLAN_MAX: usize = 256 << 20;
/// Times that a plan is begun anew because another L1 entry had to be given up.
const ROUNDS_MAX: u32 = 16;
/// Unchanged bytes between two changes that are written along, to keep patches few.
const GAP: usize = 32;

/// Plans repairs into `report`. Returns how many errors no step of the plan mends.
pub(crate) async fn plan(checker: &Checker<'_>, found: &Found, report: &mut CheckReport) -> Result<u64> {
    let marks = checker.header.incompatible & (INCOMPAT_DIRTY | INCOMPAT_CORRUPT);
    if !found.anything && marks == 0 {
        return Ok(0);
    }
    let mut given_up = BTreeSet::new();
    let mut rebuild = found.rebuild;
    for _ in 0..ROUNDS_MAX {
        let mut draft = Draft::new(checker, rebuild);
        match draft.run(&given_up).await? {
            Round::Done => {
                let unmended = draft.unmended;
                draft.finish(marks, report)?;
                return Ok(unmended);
            }
            Round::Rebuild => rebuild = true,
            Round::GiveUp(tables) => given_up.extend(tables),
        }
    }
    Ok(report.errors)
}

/// How a draft ended.
enum Round {
    Done,
    /// Some count has no block to stand in.
    Rebuild,
    /// These "L2 tables" are something else.
    GiveUp(Vec<u64>),
}

/// Patches of one purpose.
#[derive(Default)]
struct Step {
    patches: Vec<Patch>,
}

struct Draft<'a> {
    checker: &'a Checker<'a>,
    raise: Step,
    mend: Step,
    give_up: Step,
    clear: Step,
    set: Step,
    stale: Step,
    lower: Step,
    set_lowered: Step,
    rebuild: Option<Rebuild>,
    bytes: usize,
    unmended: u64,
    /// One more than the highest cluster that is in use or in the file.
    clusters: u64,
}

impl<'a> Draft<'a> {
    fn new(checker: &'a Checker<'a>, rebuild: bool) -> Self {
        let steps: [Step; 8] = Default::default();
        let [raise, mend, give_up, clear, set, stale, lower, set_lowered] = steps;
        let rebuild = rebuild.then(|| Rebuild::new(checker.table.order, checker.shape.cluster));
        let (bytes, unmended, clusters) = (0, 0, 0);
        Draft {
            checker,
            raise,
            mend,
            give_up,
            clear,
            set,
            stale,
            lower,
            set_lowered,
            rebuild,
            bytes,
            unmended,
            clusters,
        }
    }

    async fn run(&mut self, given_up: &BTreeSet<u64>) -> Result<Round> {
        let c = self.checker;
        let roots = c.gather().roots(Mode::Mended(given_up), &mut CheckReport::default()).await?;
        if roots.bitmaps_broken {
            // What the bitmaps use is not known: nothing can be counted before they are gone.
            self.drop_bitmaps();
            return Ok(Round::Done);
        }
        self.unmended = roots.unmended;
        let walk = Walk { source: &c.source, shape: &c.shape, roots: &roots, mended: true };
        let blocks = c.blocks();
        let mut odd = Vec::new();
        let mut from = 0u64;
        for pass in 0.. {
            if pass >= PASSES_MAX {
                return Err(c.too_scattered());
            }
            let mut tally = Tally::new(from, c.budget);
            let counted = self.rebuild.is_none().then_some((&c.table, c.header.refcount_table_offset));
            let mut left = CheckReport::default();
            walk.count(&mut tally, counted, (pass == 0).then_some(&mut left)).await?;
            self.unmended = self.unmended.saturating_add(left.errors);
            self.clusters = self.clusters.max(c.clusters(&tally));
            odd.append(&mut self.odd_tables(&walk, &tally, &blocks).await?);
            if odd.is_empty() {
                let needs_rebuild = self.counts(&mut tally).await?;
                if needs_rebuild {
                    return Ok(Round::Rebuild);
                }
                self.flags(&walk, &tally).await?;
            }
            from = tally.range().end;
            if from == u64::MAX {
                break;
            }
        }
        if !odd.is_empty() {
            return Ok(Round::GiveUp(odd));
        }
        self.l1_given_up(&roots)?;
        self.bitmaps(&roots).await?;
        self.stale_bitmaps().await?;
        Ok(Round::Done)
    }

    /// Active L2 tables of this pass whose cluster something else refers to as well, and that hold faulty entries.
    async fn odd_tables(&self, walk: &Walk<'_>, tally: &Tally, blocks: &[u64]) -> Result<Vec<u64>> {
        let mut odd = Vec::new();
        for l2 in walk.roots.l2.iter().filter(|l2| l2.active() > 0) {
            let number = walk.shape.number(l2.offset);
            if !tally.range().contains(&number) {
                continue;
            }
            let shared = tally.cell(number).count > l2.named || blocks.binary_search(&number).is_ok();
            if shared && self.has_faults(walk, l2).await? {
                odd.push(l2.offset);
            }
        }
        Ok(odd)
    }

    async fn has_faults(&self, walk: &Walk<'_>, l2: &L2) -> Result<bool> {
        let Some(raw) = walk.read(l2).await? else { return Ok(false) };
        let mut any = false;
        walk.each(&raw, &mut |place, entry| any |= !walk.judge(l2, place, entry).faults.is_empty());
        Ok(any)
    }

    /// Plans the counts of one pass; says whether they cannot be mended in place.
    async fn counts(&mut self, tally: &mut Tally) -> Result<bool> {
        let c = self.checker;
        let most = counts::greatest(c.table.order);
        if let Some(rebuild) = &mut self.rebuild {
            let too_many = rebuild.take(tally);
            self.unmended = self.unmended.saturating_add(too_many);
            if rebuild.bytes() > PLAN_MAX {
                return Err(too_large(rebuild.bytes()));
            }
            return Ok(false);
        }
        let range = tally.range();
        let until = range.end.min(c.clusters(tally));
        let mut at = range.start;
        while let Some((stretch, block)) = c.table.next(tally, at, until) {
            at = stretch.end;
            let Block::At(offset) = block else {
                if stretch.clone().any(|cluster| tally.cell(cluster).count > 0) {
                    return Ok(true);
                }
                continue;
            };
            let raw = c.table.read(&c.source, offset).await?;
            let first = c.table.covers(c.table.index_of(stretch.start)).start;
            let (mut raised, mut lowered) = (raw.to_vec(), Vec::new());
            for cluster in stretch.clone() {
                let index = bytes::index(cluster.saturating_sub(first))?;
                let stored = counts::get(&raw, c.table.order, index).unwrap_or(0);
                let count = u64::from(tally.cell(cluster).count);
                if count > most {
                    self.unmended = self.unmended.saturating_add(count.saturating_sub(most));
                }
                let expected = count.min(most);
                if stored < expected {
                    counts::set(&mut raised, c.table.order, index, expected);
                } else if stored > expected {
                    lowered.push((index, expected));
                    // From here on the bit says: this count goes down.
                    tally.set_single(cluster);
                }
            }
            let mut last = raised.clone();
            for (index, expected) in lowered {
                counts::set(&mut last, c.table.order, index, expected);
            }
            let (up, down) = (difference(offset, &raw, &raised), difference(offset, &raised, &last));
            self.weigh(up.iter().chain(&down))?;
            self.raise.patches.extend(up);
            self.lower.patches.extend(down);
        }
        Ok(false)
    }

    /// Plans the active entries whose clusters were counted in this pass.
    async fn flags(&mut self, walk: &Walk<'_>, tally: &Tally) -> Result<()> {
        let c = self.checker;
        let most = counts::greatest(c.table.order);
        let mended: BTreeMap<u64, bool> =
            walk.roots.mended.iter().map(|(index, lossy)| (u64::from(*index), *lossy)).collect();
        let mut failed = Ok(());
        // COPIED as it must be; as it is where the count cannot say.
        let flagged = |word: u64, number: u64| match tally.cell(number).count {
            1 => word | COPIED,
            count if u64::from(count) > most => word,
            _ => word & !COPIED,
        };
        walk.flags(tally, None, &mut |look| {
            let planned = match look {
                Look::L1 { index, word, number } => {
                    let at = c.header.l1_table_offset.saturating_add(index.saturating_mul(8));
                    let new = flagged(word, number);
                    let lossy = mended.get(&index);
                    let change = Change {
                        at,
                        old: Entry { word, bitmap: 0 },
                        new: Entry { word: new, bitmap: 0 },
                        lossy: lossy == Some(&true),
                        faulty: lossy.is_some(),
                        lowered: tally.is_single(number),
                        extended: false,
                    };
                    self.change(&change)
                }
                Look::L2 { at, entry, mended, number, kind, lossy, .. } => {
                    let mut new = mended;
                    match number {
                        Some(number) => new.word = flagged(mended.word, number),
                        None if kind == Kind::Cluster => new.word |= COPIED,
                        None => {}
                    }
                    let change = Change {
                        at,
                        old: entry,
                        new,
                        lossy,
                        faulty: mended != entry,
                        lowered: number.is_some_and(|number| tally.is_single(number)),
                        extended: c.shape.extended,
                    };
                    self.change(&change)
                }
            };
            if planned.is_err() {
                failed = planned;
            }
        })
        .await?;
        failed
    }

    fn change(&mut self, change: &Change) -> Result<()> {
        if change.old == change.new && !change.faulty {
            return Ok(());
        }
        let mut bytes = change.new.word.to_be_bytes().to_vec();
        if change.extended {
            bytes.extend_from_slice(&change.new.bitmap.to_be_bytes());
        }
        let patch = Patch { storage: 0, offset: change.at, bytes };
        self.weigh(std::iter::once(&patch))?;
        let step = match change {
            Change { lossy: true, .. } => &mut self.give_up,
            Change { faulty: true, .. } => &mut self.mend,
            Change { new, .. } if new.word & COPIED == 0 => &mut self.clear,
            Change { lowered: true, .. } => &mut self.set_lowered,
            _ => &mut self.set,
        };
        step.patches.push(patch);
        Ok(())
    }

    /// L1 entries that name no place any more.
    fn l1_given_up(&mut self, roots: &Roots) -> Result<()> {
        for (index, lossy) in &roots.mended {
            let word = roots.active.get(bytes::index((*index).into())?);
            if word != Some(&0) {
                continue;
            }
            let at = self.checker.header.l1_table_offset.saturating_add(u64::from(*index).saturating_mul(8));
            let patch = Patch { storage: 0, offset: at, bytes: vec![0; 8] };
            let step = if *lossy { &mut self.give_up } else { &mut self.mend };
            step.patches.push(patch);
        }
        Ok(())
    }

    /// Bitmap table entries that mean nothing become "all dirty": a backup then copies more than it must.
    async fn bitmaps(&mut self, roots: &Roots) -> Result<()> {
        let c = self.checker;
        for table in &roots.bitmaps {
            let len = bytes::mul(table.entries.into(), 8)?;
            let mut done = 0u64;
            while done < len {
                let at = table.offset.saturating_add(done);
                let part = c.source.read(at, STEP.min(bytes::sub(len, done)?)).await?;
                for (index, word) in part.as_chunks::<8>().0.iter().enumerate() {
                    if bitmap_cluster(u64::from_be_bytes(*word), c.shape.cluster).is_err() {
                        let offset = at.saturating_add(bytes::wide(index).saturating_mul(8));
                        let patch = Patch { storage: 0, offset, bytes: 1u64.to_be_bytes().to_vec() };
                        self.weigh(std::iter::once(&patch))?;
                        self.give_up.patches.push(patch);
                    }
                }
                done = bytes::add(done, bytes::wide(part.len()))?;
            }
        }
        Ok(())
    }

    /// Bitmaps that a program did not keep are lost space; before it is given back, the header must not name it any
    /// more. Only where the extension is the last one: others would have to move over it.
    async fn stale_bitmaps(&mut self) -> Result<()> {
        let c = self.checker;
        let is_stale = c.header.autoclear & header::AUTOCLEAR_BITMAPS == 0;
        if !is_stale || c.extensions.bitmaps.is_none() || self.lower.patches.is_empty() {
            return Ok(());
        }
        let cluster_0 = c.source.read(0, c.shape.cluster).await?;
        if let Some(offset) = extensions::last_is_bitmaps(&cluster_0, c.header.header_length.into()) {
            self.stale.patches.push(Patch { storage: 0, offset, bytes: vec![0; 4] });
        }
        Ok(())
    }

    fn drop_bitmaps(&mut self) {
        let autoclear = self.checker.header.autoclear & !header::AUTOCLEAR_BITMAPS;
        let bytes = autoclear.to_be_bytes().to_vec();
        self.give_up.patches.push(Patch { storage: 0, offset: 88, bytes });
        self.rebuild = None;
        self.unmended = 1;
    }

    fn weigh<'p>(&mut self, patches: impl Iterator<Item = &'p Patch>) -> Result<()> {
        for patch in patches {
            self.bytes = self.bytes.saturating_add(patch.bytes.len()).saturating_add(size_of::<Patch>());
        }
        if self.bytes > PLAN_MAX { Err(too_large(self.bytes)) } else { Ok(()) }
    }

    /// Puts the steps in their order.
    fn finish(self, marks: u64, report: &mut CheckReport) -> Result<()> {
        let lossy = !self.give_up.patches.is_empty();
        let n = |step: &Step| step.patches.len();
        let mut fixes = Vec::new();
        let mut step = |what: String, step: Step, is_lossy: bool, is_leak: bool| {
            if !step.patches.is_empty() {
                fixes.push(Fix { what, is_lossy, is_leak, patches: step.patches, set_len: None });
            }
        };
        step("raise refcounts that are lower than the references".into(), self.raise, false, false);
        step(format!("mend {} table entries without loss", n(&self.mend)), self.mend, false, false);
        let what = format!("give up {} table entries that name no valid place", n(&self.give_up));
        step(what, self.give_up, true, false);
        let what = format!("clear the COPIED flag of {} entries whose clusters are shared", n(&self.clear));
        step(what, self.clear, false, false);
        if let Some(rebuild) = self.rebuild {
            let made = rebuild.finish(self.clusters)?;
            let what = format!(
                "write {} new refcount blocks and their table behind the end of the file",
                made.blocks
            );
            step(what, Step { patches: made.patches }, false, false);
            let what = "switch the header to the new refcount table; the old one becomes free space";
            // With entries given up, what they named becomes free.
            step(what.into(), Step { patches: vec![made.switch] }, lossy, false);
        }
        let what = format!("set the COPIED flag of {} entries whose clusters are not shared", n(&self.set));
        step(what, self.set, false, false);
        let what = "drop the persistent bitmaps, which a program made invalid by not keeping them";
        step(what.into(), self.stale, lossy, !lossy);
        // What was given up may have owned what looks lost now: then it is not only a leak.
        step("lower refcounts that are higher than the references".into(), self.lower, lossy, !lossy);
        let what =
            format!("set the COPIED flag of {} entries that were counted too high", n(&self.set_lowered));
        step(what, self.set_lowered, lossy, !lossy);
        if marks != 0 && self.unmended == 0 {
            let incompatible = self.checker.header.incompatible & !marks;
            let bytes = incompatible.to_be_bytes().to_vec();
            let patches = vec![Patch { storage: 0, offset: 72, bytes }];
            step("take the dirty and corrupt marks back".into(), Step { patches }, lossy, false);
        }
        report.fixes = fixes;
        Ok(())
    }
}

/// A planned change of one entry.
struct Change {
    at: u64,
    old: Entry,
    new: Entry,
    lossy: bool,
    faulty: bool,
    /// The count that COPIED depends on goes down.
    lowered: bool,
    extended: bool,
}

#[cold]
fn too_large(found: usize) -> vellum_core::Error {
    too_much(
        "a repair would change more than can be planned at once",
        "repair plan",
        format!("{found} bytes"),
        format!("{PLAN_MAX} bytes"),
    )
}

/// Patches that turn `old` into `new`, which stand at `offset`.
fn difference(offset: u64, old: &[u8], new: &[u8]) -> Vec<Patch> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, _) in old.iter().zip(new).enumerate().filter(|(_, (a, b))| a != b) {
        match runs.last_mut() {
            Some(run) if at.saturating_sub(run.end) <= GAP => run.end = at.saturating_add(1),
            _ => runs.push(at..at.saturating_add(1)),
        }
    }
    runs.into_iter()
        .map(|run| Patch {
            storage: 0,
            offset: offset.saturating_add(bytes::wide(run.start)),
            bytes: new.get(run).unwrap_or_default().to_vec(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_few_and_exact() {
        let old = [0u8; 200];
        let mut new = old;
        new[3] = 1;
        new[20] = 2;
        new[150] = 3;
        let patches = difference(1000, &old, &new);
        assert_eq!(patches.len(), 2);
        assert_eq!((patches[0].offset, patches[0].bytes.len()), (1003, 18));
        assert_eq!((patches[1].offset, patches[1].bytes.as_slice()), (1150, &[3u8][..]));
        assert!(difference(0, &old, &old).is_empty());
    }
}
