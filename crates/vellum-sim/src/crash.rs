//! [`Crash`]: what a power loss at one moment may leave behind.

use crate::content::{Content, SECTOR, hash_of, mix};
use crate::mask::{Mask, Part};
use crate::trace::{Event, FileSet, Op, OpKind, Trace};
use std::ops::Range;

/// A power loss at one moment of a trace: what is durable, and the operations of which any subset may be.
pub struct Crash<'a> {
    trace: &'a Trace,
    durable: FileSet,
    /// From the first operation that may be lost on, in the order of completion.
    items: Vec<Item>,
    /// What may be lost, or torn.
    pub members: Vec<Member>,
}

/// An operation that may be lost. The length that a write gives to its file is a member of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Index into [`Trace::ops`].
    pub op: usize,
    /// It is the new length only.
    pub is_growth: bool,
    /// Sectors that it can be torn into; 0 if it cannot be.
    pub sectors: u64,
    /// It is a sector with a checksum, which may be torn inside, too.
    pub is_sealed: bool,
}

enum Item {
    Durable(usize),
    Member(usize),
}

impl<'a> Crash<'a> {
    /// A power loss after the first `cut` events of `trace`, which began with the files `start`.
    pub fn at(trace: &'a Trace, start: &FileSet, cut: usize) -> Self {
        let order = completion_order(trace, cut);
        let is_durable = durable(trace, cut);
        let mut crash = Crash { trace, durable: start.clone(), items: Vec::new(), members: Vec::new() };
        for number in order {
            let op = &trace.ops[number];
            if is_durable[number] {
                match crash.items.is_empty() {
                    true => crash.durable.apply(op),
                    false => crash.items.push(Item::Durable(number)),
                }
            } else {
                crash.add(number, op, cut);
            }
        }
        crash
    }

    fn add(&mut self, number: usize, op: &Op, cut: usize) {
        let (grows, sectors) = match &op.kind {
            OpKind::Flush | OpKind::SyncDirectory => return,
            OpKind::Write { bytes, .. } if bytes.is_empty() => return,
            OpKind::Write { offset, bytes } => {
                let end = offset + bytes.len() as u64;
                let done = op.done.is_some_and(|done| done < cut);
                (!done || end > op.len_before, sectors(&(*offset..end)))
            }
            OpKind::Zero(range) | OpKind::Discard(range) if range.is_empty() => return,
            OpKind::Zero(range) | OpKind::Discard(range) => (false, sectors(range)),
            OpKind::SetLen(len) if op.failed && *len == op.len_before => return,
            _ => (false, 0),
        };
        if grows {
            self.items.push(Item::Member(self.members.len()));
            self.members.push(Member { op: number, is_growth: true, sectors: 0, is_sealed: false });
        }
        self.items.push(Item::Member(self.members.len()));
        self.members.push(Member { op: number, is_growth: false, sectors, is_sealed: false });
    }

    /// Writes of one sector that `is_sealed` may be torn inside, too: a checksum must tell. (Everything else is only
    /// safe as long as disks write whole sectors.)
    pub fn garbling(mut self, is_sealed: impl Fn(&[u8]) -> bool) -> Self {
        for member in self.members.iter_mut().filter(|member| member.sectors == 1) {
            member.is_sealed = match &self.trace.ops[member.op].kind {
                OpKind::Write { bytes, .. } => bytes.len() as u64 == SECTOR && is_sealed(bytes),
                _ => false,
            };
        }
        self
    }

    /// The files as `mask` leaves them.
    pub fn state(&self, mask: &Mask) -> FileSet {
        let mut set = self.durable.clone();
        for item in &self.items {
            match item {
                Item::Durable(number) => set.apply(&self.trace.ops[*number]),
                Item::Member(index) => {
                    let part = mask.0.get(*index).copied().unwrap_or(Part::Absent);
                    self.apply(&mut set, &self.members[*index], part);
                }
            }
        }
        set.contents.iter_mut().for_each(Content::cut);
        set
    }

    fn apply(&self, set: &mut FileSet, member: &Member, part: Part) {
        let op = &self.trace.ops[member.op];
        if part == Part::Absent {
            return;
        }
        if op.kind.is_of_directory() {
            return set.apply(op);
        }
        while set.contents.len() <= op.file {
            set.contents.push(Content::default());
        }
        let content = &mut set.contents[op.file];
        match &op.kind {
            OpKind::Write { offset, bytes } if member.is_growth => content.grow(offset + bytes.len() as u64),
            OpKind::Write { offset, bytes } => {
                if matches!(part, Part::Mixed | Part::Garbled) {
                    let mut old = vec![0; bytes.len()];
                    content.read(&mut old, *offset);
                    return content.write(&garbled(part, &old, bytes), *offset);
                }
                let kept = part.of(*offset..offset + bytes.len() as u64);
                let from = (kept.start - offset) as usize;
                let to = (kept.end - offset) as usize;
                content.write(&bytes[from..to], kept.start);
            }
            OpKind::Zero(range) | OpKind::Discard(range) => content.zero(part.of(range.clone())),
            OpKind::SetLen(len) => content.set_len(*len),
            _ => {}
        }
    }

    /// The members and what `mask` does with them, for people. Of many, only those that are not there in full.
    pub fn explain(&self, mask: &Mask) -> String {
        let mut text = String::new();
        let shows_all = self.members.len() <= 40;
        for (index, member) in self.members.iter().enumerate() {
            let part = mask.0.get(index).copied().unwrap_or(Part::Absent);
            if !shows_all && part == Part::Whole {
                continue;
            }
            let op = &self.trace.ops[member.op];
            let what = match &op.kind {
                OpKind::Write { offset, bytes } if member.is_growth => {
                    format!("length to {:#x} at least", offset + bytes.len() as u64)
                }
                OpKind::Write { offset, bytes } => format!("write {:#x}+{:#x}", offset, bytes.len()),
                other => format!("{other:x?}"),
            };
            text += &format!("    {part}  op {} file {} {what}\n", member.op, op.file);
        }
        text
    }

    /// Moments at which a power loss shows the most: before each flush takes effect, and at the end.
    pub fn moments(trace: &Trace) -> Vec<usize> {
        let is_flush = |op: usize| {
            matches!(trace.ops.get(op).map(|op| &op.kind), Some(OpKind::Flush | OpKind::SyncDirectory))
        };
        let before = trace.events.iter().enumerate().filter_map(|(at, event)| match event {
            Event::Done(op) if is_flush(*op) => Some(at),
            _ => None,
        });
        let mut moments: Vec<usize> = before.collect();
        moments.push(trace.events.len());
        moments
    }
}

/// What a write that was torn inside its sector leaves.
fn garbled(part: Part, old: &[u8], new: &[u8]) -> Vec<u8> {
    let salt = hash_of(new);
    let word = |index: usize| mix(salt, index as u64);
    let words = old.chunks(8).zip(new.chunks(8)).enumerate();
    words
        .flat_map(|(index, (old, new))| match part {
            Part::Garbled => word(index).to_le_bytes()[..new.len()].to_vec(),
            _ if word(index).is_multiple_of(2) => old.to_vec(),
            _ => new.to_vec(),
        })
        .collect()
}

fn sectors(range: &Range<u64>) -> u64 {
    range.end.div_ceil(SECTOR) - range.start / SECTOR
}

/// Operations before `cut`: completed ones in their order, then those that were only issued.
fn completion_order(trace: &Trace, cut: usize) -> Vec<usize> {
    let events = &trace.events[..cut.min(trace.events.len())];
    let mut order: Vec<usize> = Vec::new();
    order.extend(events.iter().filter_map(|event| match event {
        Event::Done(op) => Some(*op),
        _ => None,
    }));
    let is_done = |op: usize| trace.ops[op].done.is_some_and(|done| done < cut);
    order.extend(events.iter().filter_map(|event| match event {
        Event::Issued(op) if !is_done(*op) => Some(*op),
        _ => None,
    }));
    order
}

/// Which operations are durable: completed before a flush of their file was issued that succeeded. What was written
/// before a flush that failed may be lost for good, whatever later flushes say.
fn durable(trace: &Trace, cut: usize) -> Vec<bool> {
    let mut is_durable = vec![false; trace.ops.len()];
    let mut is_doomed = vec![false; trace.ops.len()];
    for event in trace.events.iter().take(cut) {
        let Event::Done(number) = event else { continue };
        let flush = &trace.ops[*number];
        let covers_names = flush.kind == OpKind::SyncDirectory;
        if flush.kind != OpKind::Flush && !covers_names {
            is_durable[*number] = flush.fua && !flush.failed;
            continue;
        }
        for (index, op) in trace.ops.iter().enumerate() {
            let covered = op.done.is_some_and(|done| done < flush.issued)
                && op.kind.is_of_directory() == covers_names
                && (covers_names || op.file == flush.file);
            if !covered || is_durable[index] {
                continue;
            }
            match flush.failed {
                true => is_doomed[index] = true,
                false => is_durable[index] = !is_doomed[index],
            }
        }
    }
    is_durable
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{SimFiles, mask::Depth, masks, random::Random};
    use std::collections::HashSet;
    use vellum_core::{Access, Asker, Buf, Storage, WriteFlags};

    fn open(files: &std::sync::Arc<SimFiles>) -> std::sync::Arc<dyn Storage> {
        files
            .resolver()
            .open("f", &Asker::User, Access { write: true, ..Access::default() })
            .wait()
            .unwrap()
            .storage
    }

    fn write(disk: &dyn Storage, byte: u8, len: usize, at: u64) {
        disk.write_at(Buf::copy_of(&vec![byte; len]), at, WriteFlags::default()).wait().1.unwrap();
    }

    fn start(len: usize) -> FileSet {
        let mut set = FileSet::default();
        set.put("f", Content::from_bytes(&vec![0; len]));
        set
    }

    #[test]
    fn what_was_flushed_is_there_and_the_rest_in_every_subset() {
        let start = start(4096);
        let files = SimFiles::new(start.clone());
        let disk = open(&files);
        write(disk.as_ref(), 1, 512, 0);
        disk.flush().wait().unwrap();
        write(disk.as_ref(), 2, 512, 512);
        write(disk.as_ref(), 3, 1024, 1024);
        let trace = files.trace();
        let crash = Crash::at(&trace, &start, trace.events.len());
        assert_eq!(crash.members.len(), 2);
        let masks = masks(&crash.members, Depth { exhaustive: 8, samples: 0 }, &mut Random::new(1));
        let mut seen = HashSet::new();
        for mask in masks {
            let bytes = crash.state(&mask).get("f").unwrap().to_vec();
            assert!(bytes[..512].iter().all(|b| *b == 1));
            for sector in bytes.chunks(512) {
                assert!(sector.iter().all(|b| *b == sector[0]), "sectors are never torn");
            }
            seen.insert([bytes[512], bytes[1024], bytes[1536]]);
        }
        assert_eq!(seen.len(), 8, "either write, and each sector of the longer one: {seen:?}");
    }

    #[test]
    fn only_sectors_with_a_checksum_are_torn_inside() {
        let start = start(4096);
        let files = SimFiles::new(start.clone());
        let disk = open(&files);
        write(disk.as_ref(), 1, 512, 0);
        write(disk.as_ref(), 2, 512, 512);
        write(disk.as_ref(), 2, 1024, 1024);
        let trace = files.trace();
        let crash = Crash::at(&trace, &start, trace.events.len()).garbling(|bytes| bytes[0] == 2);
        assert_eq!(
            crash.members.iter().map(|member| member.is_sealed).collect::<Vec<_>>(),
            [false, true, false]
        );
        let masks = masks(&crash.members, Depth { exhaustive: 8, samples: 0 }, &mut Random::new(1));
        let of = |part: Part| masks.iter().find(|mask| mask.0[1] == part).unwrap();
        assert!(masks.iter().all(|mask| !matches!(mask.0[0], Part::Mixed | Part::Garbled)));
        let sector = |mask: &Mask| crash.state(mask).get("f").unwrap().to_vec()[512..1024].to_vec();
        let (mixed, garbled) = (sector(of(Part::Mixed)), sector(of(Part::Garbled)));
        assert!(mixed.chunks(8).all(|word| word == [0; 8] || word == [2; 8]));
        assert!(mixed.contains(&0) && mixed.contains(&2));
        assert!(garbled.chunks(8).any(|word| word != [0; 8] && word != [2; 8]));
    }

    #[test]
    fn length_and_content_are_lost_separately() {
        let start = start(512);
        let files = SimFiles::new(start.clone());
        write(open(&files).as_ref(), 5, 512, 512);
        let trace = files.trace();
        let crash = Crash::at(&trace, &start, trace.events.len());
        let lengths: Vec<(u64, u8)> = ["00", "01", "10", "11"]
            .map(|mask| crash.state(&mask.parse().unwrap()))
            .map(|set| (set.get("f").unwrap().len(), set.get("f").unwrap().to_vec().last().copied().unwrap()))
            .to_vec();
        assert_eq!(lengths, [(512, 0), (512, 0), (1024, 0), (1024, 5)]);
    }

    #[test]
    fn a_failed_flush_saves_nothing_ever() {
        let start = start(512);
        let files = SimFiles::new(start.clone());
        let disk = open(&files);
        files.arm(crate::Fault::parse("flush.0.io.once"));
        write(disk.as_ref(), 5, 512, 0);
        disk.flush().wait().unwrap_err();
        disk.flush().wait().unwrap();
        let trace = files.trace();
        assert_eq!(Crash::at(&trace, &start, trace.events.len()).members.len(), 1);
    }

    #[test]
    fn after_a_failed_flush_and_closing_the_file_is_what_the_disk_holds() {
        let start = start(512);
        let files = SimFiles::new(start.clone());
        let disk = open(&files);
        write(disk.as_ref(), 5, 512, 0);
        disk.flush().wait().unwrap();
        files.arm(crate::Fault::parse("flush.0.io.once"));
        write(disk.as_ref(), 6, 1024, 0);
        disk.flush().wait().unwrap_err();
        assert_eq!(files.snapshot().get("f").unwrap().to_vec(), [6; 1024]);
        drop(disk);
        assert_eq!(files.snapshot().get("f").unwrap().to_vec(), [5; 512]);
        write(open(&files).as_ref(), 7, 512, 512);
        let trace = files.trace();
        let crash = Crash::at(&trace, &start, trace.events.len());
        let masks = masks(&crash.members, Depth { exhaustive: 8, samples: 0 }, &mut Random::new(1));
        let first = |mask: &Mask| crash.state(mask).get("f").unwrap().to_vec()[0];
        assert!(masks.len() > 1 && masks.iter().all(|mask| first(mask) == 5), "what was lost stays lost");
    }

    #[test]
    fn a_seed_replays_the_order_of_completion() {
        let order = |seed| {
            let files = SimFiles::new(start(4096));
            let disk = open(&files);
            files.schedule(Some(seed));
            for at in 0..8u64 {
                drop(disk.write_at(Buf::copy_of(&[1; 512]), at * 512, WriteFlags::default()));
            }
            while files.pump() {}
            files.trace().events
        };
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
    }
}
