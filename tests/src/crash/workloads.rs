//! Which workloads are run: every short sequence, then long, concurrent and failing ones as a seed says.

use super::cases::Case;
use super::guest::{GuestOp, Workload};
use super::start::usual_flags;
use vellum::OpenFlags;
use vellum_sim::{Fault, FaultKind, FaultOn, Random, SECTOR, mix};

/// The workloads of a case, by number, without end.
pub struct Workloads {
    case: Case,
    seed: u64,
    alphabet: Vec<GuestOp>,
}

impl Workloads {
    /// The workloads of `case`. Exhaustive ones do not depend on the seed, but for their order.
    pub fn new(case: Case, seed: u64) -> Self {
        Workloads { case, seed, alphabet: alphabet(&case) }
    }

    /// Sequences of one and of two requests that there are.
    pub fn short_sequences(&self) -> usize {
        self.alphabet.len() + self.alphabet.len() * self.alphabet.len()
    }

    /// The workload with this number.
    pub fn get(&self, number: usize) -> Workload {
        let mut random = Random::new(mix(self.seed, number as u64));
        let (round, kind) = (number / 10, number % 10);
        match kind {
            0 => self.short(round * 4),
            1 => self.short(round * 4 + 1),
            2 => self.short(round * 4 + 2),
            3 => self.short(round * 4 + 3),
            4 if round % 2 == 0 && self.case.has_snapshots() => self.with_snapshots(&mut random),
            4 => self.sequence(3, &mut random),
            5 => {
                let len = 4 + random.index(20);
                self.sequence(len, &mut random)
            }
            6 | 7 => self.concurrent(&mut random),
            8 => {
                let len = 2 + random.index(8);
                let workload = self.sequence(len, &mut random);
                with_fault(workload, &mut random)
            }
            _ => {
                let workload = self.concurrent(&mut random);
                with_fault(workload, &mut random)
            }
        }
    }

    /// Sequences of one and two requests, in an order that mixes them; random ones of three after that.
    fn short(&self, number: usize) -> Workload {
        let letters = self.alphabet.len();
        if number < letters {
            return Workload::sequence(vec![self.alphabet[number].clone(), GuestOp::Flush]);
        }
        let number = number - letters;
        let pairs = letters * letters;
        if number < pairs {
            // A stride that shares no divisor with the number of pairs visits each once.
            let stride = (pairs * 5 / 8..).find(|stride| gcd(*stride, pairs) == 1).unwrap_or(1);
            let pair = number * stride % pairs;
            let ops = vec![self.alphabet[pair / letters].clone(), self.alphabet[pair % letters].clone()];
            return Workload::sequence(ops);
        }
        self.sequence(3, &mut Random::new(mix(self.seed ^ 0x77, number as u64)))
    }

    fn sequence(&self, len: usize, random: &mut Random) -> Workload {
        let mut ops = Vec::new();
        for _ in 0..len {
            ops.push(match random.below(4) {
                0 => self.anywhere(random, false),
                _ => random.pick(&self.alphabet).clone(),
            });
        }
        let flags = OpenFlags {
            honor_zeroes: random.below(4) == 0,
            honor_same: random.below(4) == 0,
            inform_zeroes: random.below(4) == 0,
            ..usual_flags()
        };
        Workload { flags, ..Workload::sequence(ops) }
    }

    /// Snapshots are made, applied and deleted between writes.
    fn with_snapshots(&self, random: &mut Random) -> Workload {
        let len = 2 + random.index(5);
        let mut workload = self.sequence(len, random);
        for op in [GuestOp::Snapshot, GuestOp::Snapshot, GuestOp::Apply, GuestOp::Delete] {
            let ops = &mut workload.tasks[0];
            let at = random.index(ops.len() + 1);
            if op == GuestOp::Snapshot || random.below(2) == 0 {
                ops.insert(at, op);
            }
        }
        workload
    }

    /// Two to eight tasks, which meet in the same units.
    fn concurrent(&self, random: &mut Random) -> Workload {
        let tasks = 2 + random.index(7);
        let tasks =
            (0..tasks).map(|_| (0..1 + random.index(4)).map(|_| self.anywhere(random, true)).collect());
        Workload { tasks: tasks.collect(), seed: random.bits() >> 16, ..Workload::sequence(Vec::new()) }
    }

    /// Some request at some place; whole sectors only where requests meet.
    fn anywhere(&self, random: &mut Random, whole_sectors: bool) -> GuestOp {
        let size = self.case.size();
        let unit = random.below(self.case.blocks.min(6)) * self.case.block;
        let at = unit + *random.pick(&[0, 0, SECTOR, self.case.block / 2, self.case.block - SECTOR]);
        let at = at.min(size - SECTOR) / SECTOR * SECTOR;
        let len = *random.pick(&[SECTOR, SECTOR, 3 * SECTOR, self.case.block / 2, self.case.block]);
        let len = len.clamp(SECTOR, 64 << 10).min(size - at) / SECTOR * SECTOR;
        if !whole_sectors && !self.case.whole_sectors && random.below(3) == 0 {
            let at = at + random.below(SECTOR);
            let len = (1 + random.below(2 * SECTOR)).min(size - at);
            return GuestOp::Write(at, len);
        }
        match random.below(16) {
            0..=6 => GuestOp::Write(at, len),
            7 => GuestOp::Fua(at, len),
            8 => GuestOp::WriteZeros(at, len),
            9 | 10 => GuestOp::Zero(at, len),
            11 => {
                GuestOp::Discard(unit.min(size - SECTOR), self.case.block.min(size - unit.min(size - SECTOR)))
            }
            12 => GuestOp::Discard(at, len),
            13 => GuestOp::Read(at, len),
            _ => GuestOp::Flush,
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn with_fault(mut workload: Workload, random: &mut Random) -> Workload {
    let on = *random.pick(&[FaultOn::Change, FaultOn::Change, FaultOn::Flush, FaultOn::Read]);
    let kind = *random.pick(&[FaultKind::Io, FaultKind::NoSpace, FaultKind::Short]);
    let nth = random.below(match on {
        FaultOn::Change => 30,
        FaultOn::Flush => 5,
        FaultOn::Read => 10,
    });
    workload.fault = Some(Fault { on, nth, kind, is_persistent: random.below(2) == 0 });
    // After what failed, something is asked for that must fail, too, or succeed.
    if let Some(task) = workload.tasks.first_mut() {
        task.push(GuestOp::Flush);
    }
    workload
}

/// {write aligned, unaligned, across units, zero, discard, flush, FUA, close} x {empty, full, partly filled unit}.
fn alphabet(case: &Case) -> Vec<GuestOp> {
    let block = case.block;
    let whole = block.min(64 << 10);
    let mut ops = vec![GuestOp::Flush, GuestOp::Close];
    for unit in [0, 1, 2] {
        let at = unit * block;
        ops.extend([
            GuestOp::Write(at, SECTOR.min(block)),
            GuestOp::Write(at, whole),
            GuestOp::Zero(at, block),
            GuestOp::Discard(at, block),
            GuestOp::WriteZeros(at, whole),
        ]);
        if !case.whole_sectors {
            ops.push(GuestOp::Write(at + SECTOR - 100, 700));
        }
        if block > SECTOR {
            ops.extend([
                GuestOp::Zero(at + block / 2, SECTOR),
                GuestOp::Discard(at, block / 2),
                GuestOp::Discard(at + block / 2, block / 2),
            ]);
        }
    }
    let last = case.size() - SECTOR;
    ops.extend([
        GuestOp::Write(block - SECTOR, 2 * SECTOR),
        GuestOp::Write(3 * block - SECTOR, 2 * SECTOR),
        GuestOp::Write(last, SECTOR),
        GuestOp::Fua(0, SECTOR),
        GuestOp::Fua(block, SECTOR),
        GuestOp::WriteSame(0, whole),
        GuestOp::WriteSame(block, whole),
        GuestOp::ZeroKeep(block, block),
        GuestOp::Zero(0, case.size()),
        GuestOp::Discard(block / 2, 3 * block),
    ]);
    ops
}
