//! What the fuzzer chooses, in records of fixed length, so that a mutation of one leaves the others as they are.
//!
//! ```text
//!   shape(u8) flags(u8) mutations(u8: count, or none)
//!   mutation:  what(u8) at(u32) value(u64)
//!   request:   kind(u8) at(u16) near(u8) length(u8) choice(u8)
//! ```

use arbitrary::{Arbitrary, Result, Unstructured};
use std::ops::Range;

/// Requests of one run.
const OPS_MAX: usize = 64;

/// One run.
#[derive(Clone, Debug)]
pub struct Input {
    /// Which shape.
    pub shape: u8,
    /// How the disk is opened.
    pub flags: u8,
    /// The checksums are put right after the mutations.
    pub is_sealed: bool,
    /// Damage; none leaves the image valid.
    pub mutations: Vec<Mutation>,
    /// Requests.
    pub ops: Vec<Op>,
}

/// A place in a file of the image, and what is put there.
#[derive(Clone, Debug)]
pub struct Mutation {
    /// 0 is the image; others are its parents and parts.
    pub file: usize,
    /// Where.
    pub place: Place,
    /// What.
    pub value: Value,
}

/// A place in a file.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// From its start.
    Head(u16),
    /// From its end.
    Tail(u16),
    /// A fraction of its length.
    Anywhere(u32),
    /// This entry (of 8 bytes) of this page that is not a hole.
    Page(u16, u16),
}

/// What is put there.
#[derive(Clone, Copy, Debug)]
pub enum Value {
    /// One byte.
    Byte(u8),
    /// Changed bits.
    Flip(u8),
    /// 32 bits, little-endian.
    Word(u32),
    /// 32 bits, big-endian.
    WordBe(u32),
    /// 64 bits, little-endian.
    Long(u64),
    /// 64 bits, big-endian.
    LongBe(u64),
    /// A number of sectors in bytes, big-endian: an offset or a size that can be right.
    Sectors(u16),
    /// A small number, little-endian: a block that can be there.
    Small(u8),
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// Data of this choice; 0 is zeros.
    Write { at: Extent, choice: u8, fua: bool },
    /// Zeros, which may take the space away.
    Zero { at: Extent, unmap: bool },
    /// Let go.
    Discard { at: Extent },
    /// Compared with the model.
    Read { at: Extent },
    /// Makes all durable.
    Flush,
    /// Closed and opened again; or only flushed and forgotten, as by a process that is killed.
    Reopen { clean: bool },
    /// Other open flags.
    Flags(u8),
}

/// A range, as a fraction of the disk and a number of grains.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    at: u16,
    near: u8,
    units: u32,
    aligned: bool,
}

impl Extent {
    /// The range on a disk of `size` bytes, in sectors or (`grain` 1) bytes.
    pub fn range(self, size: u64, grain: u64) -> Range<u64> {
        // Lengths in bytes are no multiple of anything.
        let unit = if grain == 1 { 61 } else { grain };
        let grain = if self.aligned { 4096 } else { grain };
        let fraction = (u128::from(self.at) * u128::from(size) / 65_536) as u64;
        let start = fraction.saturating_add(u64::from(self.near) * grain).min(size - 1) / grain * grain;
        let len = (u64::from(self.units) * unit).next_multiple_of(grain);
        start..start.saturating_add(len).min(size).max(start)
    }

    fn new(at: u16, near: u8, length: u8, aligned: bool) -> Self {
        // Mostly short; 512 sectors are more than a small disk.
        const SHIFTS: [u32; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 5];
        let units = (u32::from(length & 15) + 1) << SHIFTS[usize::from(length >> 4)];
        Extent { at, near: near & 7, units, aligned }
    }

    fn longer(self, times: u8) -> Self {
        Extent { units: self.units << (times & 3), ..self }
    }
}

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let [shape, flags, damage] = u.arbitrary()?;
        let count = if damage & 0x80 != 0 { usize::from(damage & 7) + 1 } else { 0 };
        let mut mutations = Vec::with_capacity(count);
        for _ in 0..count {
            mutations.push(mutation(u.arbitrary()?, u.arbitrary()?, u.arbitrary()?));
        }
        let mut ops = Vec::with_capacity((u.len() / 6).min(OPS_MAX));
        while u.len() >= 6 && ops.len() < OPS_MAX {
            let [kind, low, high, near, length, choice] = u.arbitrary()?;
            ops.push(op(kind, u16::from_le_bytes([low, high]), near, length, choice));
        }
        Ok(Input { shape, flags, is_sealed: damage & 8 == 0, mutations, ops })
    }
}

fn mutation(what: u8, at: u32, value: u64) -> Mutation {
    let place = match what >> 2 & 7 {
        0..=2 => Place::Head(at as u16 & 0x7ff),
        3 => Place::Tail(at as u16 & 0x7ff),
        4 => Place::Anywhere(at),
        5 => Place::Head(at as u16),
        _ => Place::Page(at as u16, (at >> 16) as u16),
    };
    let value = match what >> 5 {
        0 => Value::Byte(value as u8),
        1 => Value::Flip(value as u8),
        2 => Value::Word(value as u32),
        3 => Value::WordBe(value as u32),
        4 => Value::Long(value),
        5 => Value::LongBe(value),
        6 => Value::Sectors(value as u16),
        _ => Value::Small(value as u8),
    };
    Mutation { file: usize::from(what & 3).saturating_sub(1), place, value }
}

fn op(kind: u8, at: u16, near: u8, length: u8, choice: u8) -> Op {
    let at = Extent::new(at, near, length, kind & 0x20 != 0);
    let bit = kind & 8 != 0;
    match kind & 7 {
        0..=2 => Op::Write { at, choice: choice & 7, fua: choice & 0xf8 == 0xf8 },
        3 => Op::Zero { at: at.longer(choice), unmap: bit },
        4 | 7 => Op::Discard { at: at.longer(choice) },
        5 => Op::Read { at },
        _ => match choice & 7 {
            0 | 1 => Op::Reopen { clean: bit },
            2 => Op::Flags(choice >> 3),
            _ => Op::Flush,
        },
    }
}
