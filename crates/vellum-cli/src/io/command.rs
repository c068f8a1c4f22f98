//! What can be asked of a disk, and how it is written.

use std::ops::Range;
use std::time::Duration;
use vellum::{OpenFlags, parse_size};

/// The commands for `vellum io --help` and the command `help`.
pub const COMMANDS: &str = "\
Commands (sizes and offsets: 4096, 0x1000, 64K, 10G):
  read  [-P BYTE | -S SEED] [-v] OFFSET LENGTH  read; -P, -S: verify; -v: show
  write [-P BYTE | -S SEED] [-f] OFFSET LENGTH  0xcd if neither; -f: durable when done
  write -z [-u] [-f] OFFSET LENGTH              zeros; -u: their space may go
  discard OFFSET LENGTH                         needs --discard to have an effect
  flush                                         make what was done durable
  aread, awrite, adiscard                       the same without waiting
  wait                                          wait for those
  verify [OFFSET LENGTH]                        read back what was written
  map [OFFSET LENGTH], length                   where it is stored, and its size
  flags [NAME=on|off]...                        change how the disk is used
  reopen                                        close the disk, and open it again
  sleep MILLISECONDS, abort (as by kill -9), help
Without waiting at most --depth requests are under way, or 64 if that is 1. Flags are read-only, honor-zeroes, \
honor-same, inform-zeroes, discard and ignore-flush. With -S the bytes depend on SEED and on their place, so that \
data in a wrong place is found out. -q anywhere: no line if all is well. What follows a # is a comment.";

/// Requests with data in memory are at most this long.
const DATA_BYTES_MAX: u64 = 1 << 30;

/// One command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    pub what: What,
    /// Do not wait for its end.
    pub later: bool,
    /// No line if all is well.
    pub quiet: bool,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    Read { range: Range<u64>, expect: Option<Fill>, show: bool },
    Write { range: Range<u64>, fill: Fill, fua: bool },
    Zero { range: Range<u64>, unmap: bool, fua: bool },
    Discard { range: Range<u64> },
    Flush,
    Wait,
    Verify { range: Option<Range<u64>> },
    Map { range: Option<Range<u64>> },
    Length,
    Flags(Vec<(Flag, bool)>),
    Reopen,
    Sleep(Duration),
    Abort,
    Help,
}

/// What bytes are written or expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    Byte(u8),
    Seed(u64),
}

/// One of the flags of an open disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flag {
    ReadOnly,
    HonorZeroes,
    HonorSame,
    InformZeroes,
    Discard,
    IgnoreFlush,
}

impl Flag {
    pub const ALL: [(&'static str, Flag); 6] = [
        ("read-only", Flag::ReadOnly),
        ("honor-zeroes", Flag::HonorZeroes),
        ("honor-same", Flag::HonorSame),
        ("inform-zeroes", Flag::InformZeroes),
        ("discard", Flag::Discard),
        ("ignore-flush", Flag::IgnoreFlush),
    ];

    /// The flag in `flags`.
    pub fn of(self, flags: &mut OpenFlags) -> &mut bool {
        match self {
            Flag::ReadOnly => &mut flags.read_only,
            Flag::HonorZeroes => &mut flags.honor_zeroes,
            Flag::HonorSame => &mut flags.honor_same,
            Flag::InformZeroes => &mut flags.inform_zeroes,
            Flag::Discard => &mut flags.discard,
            Flag::IgnoreFlush => &mut flags.ignore_flush,
        }
    }
}

impl Fill {
    /// Fills `bytes`, which stand at `offset` of the disk.
    pub fn fill(self, offset: u64, bytes: &mut [u8]) {
        match self {
            Fill::Byte(byte) => bytes.fill(byte),
            Fill::Seed(seed) => {
                let mut at = offset;
                let mut rest = bytes;
                while !rest.is_empty() {
                    let word = mix(seed, at / 8).to_le_bytes();
                    let skip = (at % 8) as usize;
                    let (part, later) = rest.split_at_mut(rest.len().min(8 - skip));
                    part.iter_mut().zip(word.iter().skip(skip)).for_each(|(to, from)| *to = *from);
                    at = at.saturating_add(part.len() as u64);
                    rest = later;
                }
            }
        }
    }
}

/// splitmix64 over seed and place.
fn mix(seed: u64, index: u64) -> u64 {
    let z = seed.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Reads one line: a command, or none. The error says what is wrong with it.
pub fn parse(line: &str) -> Result<Option<Command>, String> {
    let line = line.split('#').next().unwrap_or_default();
    let mut words = line.split_whitespace();
    let Some(name) = words.next() else { return Ok(None) };
    let (name, later) = match name {
        "aread" | "aio_read" => ("read", true),
        "awrite" | "aio_write" => ("write", true),
        "adiscard" => ("discard", true),
        name => (name, false),
    };
    let mut given = Given::new(words, options_of(name))?;
    let quiet = given.flag('q');
    let what = match name {
        "read" | "r" => {
            let (expect, show) = (given.fill()?, given.flag('v'));
            What::Read { range: data(given.range()?)?, expect, show }
        }
        "write" | "w" => parse_write(&mut given)?,
        "discard" | "d" => What::Discard { range: given.range()? },
        "flush" | "f" => What::Flush,
        "wait" | "aio_flush" => What::Wait,
        "verify" => What::Verify { range: given.optional_range()? },
        "map" => What::Map { range: given.optional_range()? },
        "length" | "l" => What::Length,
        "flags" => What::Flags(given.flags()?),
        "reopen" => What::Reopen,
        "sleep" => What::Sleep(Duration::from_millis(given.number("MILLISECONDS")?)),
        "abort" => What::Abort,
        "help" => What::Help,
        other => return Err(format!("there is no command {other:?}; `help` lists the commands")),
    };
    given.end()?;
    Ok(Some(Command { what, later, quiet }))
}

fn parse_write(given: &mut Given<'_>) -> Result<What, String> {
    let (zero, unmap, fua, fill) = (given.flag('z'), given.flag('u'), given.flag('f'), given.fill()?);
    let range = given.range()?;
    match (zero, unmap, fill) {
        (true, _, Some(_)) => Err("-z contradicts -P and -S".to_owned()),
        (true, unmap, None) => Ok(What::Zero { range, unmap, fua }),
        (false, true, _) => Err("-u goes with -z".to_owned()),
        (false, false, fill) => {
            Ok(What::Write { range: data(range)?, fill: fill.unwrap_or(Fill::Byte(0xcd)), fua })
        }
    }
}

/// The options of a command; those with a value are followed by a colon.
fn options_of(name: &str) -> &'static str {
    match name {
        "read" | "r" => "qvP:S:",
        "write" | "w" => "qzufP:S:",
        _ => "q",
    }
}

fn data(range: Range<u64>) -> Result<Range<u64>, String> {
    match range.end - range.start {
        ..=DATA_BYTES_MAX => Ok(range),
        _ => Err("one command reads or writes 1 GiB at most; use several".to_owned()),
    }
}

/// What follows the name of a command.
struct Given<'a> {
    options: Vec<(char, Option<&'a str>)>,
    words: std::vec::IntoIter<&'a str>,
}

impl<'a> Given<'a> {
    fn new(words: impl Iterator<Item = &'a str>, known: &str) -> Result<Self, String> {
        let (mut options, mut plain) = (Vec::new(), Vec::new());
        let mut words = words;
        while let Some(word) = words.next() {
            let Some(letters) = word.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
                plain.push(word);
                continue;
            };
            let mut rest = letters;
            while let Some(letter) = rest.chars().next() {
                rest = rest.get(letter.len_utf8()..).unwrap_or_default();
                if known.contains(&format!("{letter}:")) {
                    let value = if rest.is_empty() { words.next() } else { Some(std::mem::take(&mut rest)) };
                    let value = value.ok_or_else(|| format!("-{letter} needs a value"))?;
                    options.push((letter, Some(value)));
                } else if letter != ':' && known.contains(letter) {
                    options.push((letter, None));
                } else {
                    return Err(format!("there is no option -{letter} here; `help` lists the options"));
                }
            }
        }
        Ok(Given { options, words: plain.into_iter() })
    }

    fn flag(&self, letter: char) -> bool {
        self.options.iter().any(|(given, _)| *given == letter)
    }

    fn value(&self, letter: char) -> Option<&'a str> {
        self.options.iter().rev().find(|(given, _)| *given == letter).and_then(|(_, value)| *value)
    }

    fn fill(&self) -> Result<Option<Fill>, String> {
        match (self.value('P'), self.value('S')) {
            (Some(_), Some(_)) => Err("-P contradicts -S".to_owned()),
            (Some(text), None) => {
                let byte = number(text).and_then(|value| u8::try_from(value).ok());
                let byte = byte.ok_or_else(|| format!("-P {text}: a byte is 0 to 255, or 0x00 to 0xff"))?;
                Ok(Some(Fill::Byte(byte)))
            }
            (None, Some(text)) => {
                let seed = number(text).ok_or_else(|| format!("-S {text}: a seed is a whole number"))?;
                Ok(Some(Fill::Seed(seed)))
            }
            (None, None) => Ok(None),
        }
    }

    fn number(&mut self, what: &str) -> Result<u64, String> {
        let text = self.words.next().ok_or_else(|| format!("{what} is missing"))?;
        number(text)
            .ok_or_else(|| format!("{what} {text:?} is no number or size, such as 4096, 0x1000 or 64K"))
    }

    fn range(&mut self) -> Result<Range<u64>, String> {
        let (offset, length) = (self.number("OFFSET")?, self.number("LENGTH")?);
        let end = offset.checked_add(length).ok_or("OFFSET and LENGTH are too large together")?;
        Ok(offset..end)
    }

    fn optional_range(&mut self) -> Result<Option<Range<u64>>, String> {
        if self.words.len() == 0 { Ok(None) } else { self.range().map(Some) }
    }

    fn flags(&mut self) -> Result<Vec<(Flag, bool)>, String> {
        let mut flags = Vec::new();
        for word in self.words.by_ref() {
            let known = || Flag::ALL.map(|(name, _)| name).join(", ");
            let (name, value) =
                word.split_once('=').ok_or_else(|| format!("{word}: write NAME=on or NAME=off"))?;
            let flag = Flag::ALL.iter().find(|(known, _)| *known == name).map(|(_, flag)| *flag);
            let flag = flag.ok_or_else(|| format!("there is no flag {name:?}, only {}", known()))?;
            let on = match value {
                "on" => true,
                "off" => false,
                _ => return Err(format!("{word}: write {name}=on or {name}=off")),
            };
            flags.push((flag, on));
        }
        Ok(flags)
    }

    fn end(&mut self) -> Result<(), String> {
        match self.words.next() {
            Some(word) => Err(format!("{word:?} is one word too many")),
            None => Ok(()),
        }
    }
}

/// A number or a size, also in hexadecimal.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => parse_size(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &str) -> Command {
        parse(line).unwrap().unwrap()
    }

    #[test]
    fn commands_are_read_as_people_write_them() {
        let range = 0x1000..0x11000;
        let write = What::Write { range: range.clone(), fill: Fill::Byte(0xab), fua: true };
        for line in
            ["write -P 0xab -f 4K 64k", "w -fP171 0x1000 65536 # comment", "write 4096 64K -f -P 0xab"]
        {
            assert_eq!(one(line).what, write, "{line}");
        }
        assert_eq!(one("write 0 1").what, What::Write { range: 0..1, fill: Fill::Byte(0xcd), fua: false });
        assert_eq!(one("write -zu 0 1G").what, What::Zero { range: 0..1 << 30, unmap: true, fua: false });
        let read = one("aread -q -S 7 4k 64K");
        assert_eq!(read.what, What::Read { range, expect: Some(Fill::Seed(7)), show: false });
        assert!(read.later && read.quiet);
        assert_eq!(one("verify").what, What::Verify { range: None });
        assert_eq!(one("verify 1 2").what, What::Verify { range: Some(1..3) });
        assert_eq!(
            one("flags discard=on honor-same=off").what,
            What::Flags(vec![(Flag::Discard, true), (Flag::HonorSame, false)])
        );
        assert_eq!(one("sleep 5").what, What::Sleep(Duration::from_millis(5)));
        assert_eq!((parse(" # nothing"), parse("")), (Ok(None), Ok(None)));
    }

    #[test]
    fn mistakes_are_named() {
        for (line, said) in [
            ("wrote 0 1", "wrote"),
            ("read 0", "LENGTH"),
            ("read 0 x", "\"x\""),
            ("read -z 0 1", "-z"),
            ("read -P 256 0 1", "256"),
            ("read -P", "-P"),
            ("read 0 1 2", "\"2\""),
            ("write -u 0 1", "-z"),
            ("write -z -P 1 0 1", "-P"),
            ("write -P 1 -S 1 0 1", "-S"),
            ("read 16E 1", "16E"),
            ("read 15E 2E", "too large"),
            ("write 0 2G", "1 GiB"),
            ("flags discard", "discard"),
            ("flags discord=on", "discord"),
            ("flush now", "now"),
            ("read -: 0 1", "-:"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(said), "{line}: {error}");
        }
    }

    #[test]
    fn seeded_bytes_depend_on_their_place_alone() {
        let mut whole = vec![0; 100];
        Fill::Seed(3).fill(1000, &mut whole);
        for (from, to) in [(0, 1), (3, 17), (50, 100)] {
            let mut part = vec![0; to - from];
            Fill::Seed(3).fill(1000 + from as u64, &mut part);
            assert_eq!(part, whole[from..to]);
        }
        let mut other = vec![0; 100];
        Fill::Seed(4).fill(1000, &mut other);
        assert_ne!(whole, other);
    }
}
