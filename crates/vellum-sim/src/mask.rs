//! [`Mask`]: which of the operations that may be lost are there, and which of their parts.

use crate::content::SECTOR;
use crate::crash::Member;
use crate::random::Random;
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// What is there of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Nothing.
    Absent,
    /// All of it.
    Whole,
    /// The first half of its sectors.
    Head,
    /// The second half.
    Tail,
    /// One sector only, counted from the first.
    Sector(u8),
    /// A sector that was torn inside: words of 8 bytes, some old, some new.
    Mixed,
    /// A sector with bytes that nobody wrote.
    Garbled,
}

impl Part {
    /// This part of `range`, cut at sectors of the file.
    pub(crate) fn of(self, range: Range<u64>) -> Range<u64> {
        let first = range.start / SECTOR;
        let sectors = range.end.div_ceil(SECTOR) - first;
        let middle = first + sectors / 2;
        let cut = |from: u64, to: u64| {
            let from = (from * SECTOR).clamp(range.start, range.end);
            from..(to * SECTOR).clamp(from, range.end)
        };
        match self {
            Part::Absent => range.start..range.start,
            Part::Whole | Part::Mixed | Part::Garbled => range,
            Part::Head => cut(first, middle),
            Part::Tail => cut(middle, first + sectors),
            Part::Sector(number) => cut(first + u64::from(number), first + u64::from(number) + 1),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self {
            Part::Absent => '0',
            Part::Whole => '1',
            Part::Head => 'h',
            Part::Tail => 't',
            Part::Sector(number) => char::from(b'A' + number % 26),
            Part::Mixed => 'm',
            Part::Garbled => 'g',
        };
        write!(f, "{letter}")
    }
}

/// A [`Part`] for each member, in their order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mask(pub Vec<Part>);

impl fmt::Display for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An empty mask must still be seen. Long runs of one part are written as `1*400.`.
        f.write_str(".")?;
        for run in self.0.chunk_by(|a, b| a == b) {
            match run {
                [part, ..] if run.len() > 8 => write!(f, "{part}*{}.", run.len())?,
                run => run.iter().try_for_each(|part| write!(f, "{part}"))?,
            }
        }
        Ok(())
    }
}

impl FromStr for Mask {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let part = |letter: char| match letter {
            '0' => Ok(Part::Absent),
            '1' => Ok(Part::Whole),
            'h' => Ok(Part::Head),
            't' => Ok(Part::Tail),
            'm' => Ok(Part::Mixed),
            'g' => Ok(Part::Garbled),
            'A'..='Z' => Ok(Part::Sector(letter as u8 - b'A')),
            other => Err(format!("no part of an operation is called {other:?}")),
        };
        let mut parts = Vec::new();
        let mut rest = text.trim_start_matches('.');
        while let Some(letter) = rest.chars().next() {
            rest = &rest[letter.len_utf8()..];
            let mut count = 1;
            if let Some((number, after)) = rest.strip_prefix('*').and_then(|run| run.split_once('.')) {
                count = number.parse().map_err(|_| format!("{number:?} is no count"))?;
                rest = after;
            }
            parts.extend(std::iter::repeat_n(part(letter)?, count));
        }
        Ok(Mask(parts))
    }
}

/// How far the enumeration goes.
#[derive(Clone, Copy, Debug)]
pub struct Depth {
    /// All subsets are tried of up to this many members.
    pub exhaustive: usize,
    /// Random subsets that are tried of more.
    pub samples: usize,
}

/// Operations of up to this many sectors are torn at each of them.
const SECTORS_MAX: u64 = 8;

/// Masks over `members`: every prefix, each one missing, each one alone, each one torn, and all subsets or samples.
pub fn masks(members: &[Member], depth: Depth, random: &mut Random) -> Vec<Mask> {
    let count = members.len();
    let mut found = Found { seen: HashSet::new(), masks: Vec::new() };
    for prefix in (0..=count).rev() {
        found.add((0..count).map(|i| whole_if(i < prefix)));
    }
    for one in 0..count {
        found.add((0..count).map(|i| whole_if(i != one)));
        found.add((0..count).map(|i| whole_if(i == one)));
    }
    for (one, member) in members.iter().enumerate() {
        for part in torn(member) {
            found.add((0..count).map(|i| if i == one { part } else { Part::Whole }));
            found.add((0..count).map(|i| if i == one { part } else { whole_if(i < one) }));
            found.add((0..count).map(|i| if i == one { part } else { Part::Absent }));
        }
    }
    if count <= depth.exhaustive {
        for subset in 0..1u64 << count {
            found.add((0..count).map(|i| whole_if(subset >> i & 1 == 1)));
        }
    } else {
        for _ in 0..depth.samples {
            let density = 1 + random.below(9);
            let parts: Vec<Part> = members.iter().map(|member| any_part(member, density, random)).collect();
            found.add(parts.into_iter());
        }
    }
    found.masks
}

struct Found {
    seen: HashSet<Mask>,
    masks: Vec<Mask>,
}

impl Found {
    fn add(&mut self, parts: impl Iterator<Item = Part>) {
        let mask = Mask(parts.collect());
        if self.seen.insert(mask.clone()) {
            self.masks.push(mask);
        }
    }
}

fn whole_if(is_whole: bool) -> Part {
    if is_whole { Part::Whole } else { Part::Absent }
}

fn torn(member: &Member) -> Vec<Part> {
    match member.sectors {
        1 if member.is_sealed => vec![Part::Mixed, Part::Garbled],
        0 | 1 => Vec::new(),
        2 => vec![Part::Head, Part::Tail],
        sectors => {
            let singles = if sectors <= SECTORS_MAX { sectors as u8 } else { 0 };
            [Part::Head, Part::Tail].into_iter().chain((0..singles).map(Part::Sector)).collect()
        }
    }
}

/// Present in `density` of ten cases; now and then torn.
fn any_part(member: &Member, density: u64, random: &mut Random) -> Part {
    let torn = torn(member);
    match random.below(10) {
        chance if chance >= density => Part::Absent,
        _ if !torn.is_empty() && random.below(4) == 0 => *random.pick(&torn),
        _ => Part::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_read_as_it_was_printed() {
        for text in [".", ".01htAHmg", ".1*400.0", ".0*9.1*20.t"] {
            assert_eq!(text.parse::<Mask>().unwrap().to_string(), text);
        }
        assert!(".2".parse::<Mask>().is_err());
    }
}
