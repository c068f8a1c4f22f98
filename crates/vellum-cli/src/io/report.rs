//! What a command found, for people and for scripts.

use super::command::{Command, Flag, What};
use super::written::Mismatch;
use crate::failure::ErrorBody;
use crate::terminal::Style;
use crate::text::clean;
use serde_json::{Value, json};
use std::io::{self, Write};
use std::ops::Range;
use std::time::Duration;
use vellum::{Error, MapEntry, OpenFlags};

/// A command and what came of it.
pub struct Line {
    pub text: String,
    pub command: Command,
    pub range: Option<Range<u64>>,
    pub time: Duration,
    pub outcome: Outcome,
}

/// What came of a command.
pub enum Outcome {
    Done,
    /// Nothing was done, for this reason.
    Ignored(&'static str),
    Failed(Error),
    Read {
        verified: bool,
        found: Option<Mismatch>,
        dump: Option<Vec<u8>>,
    },
    Verified {
        bytes: u64,
        found: Vec<Mismatch>,
    },
    Map(Vec<MapEntry>),
    Length(u64),
    Flags(OpenFlags),
    Text(String),
}

impl Outcome {
    /// Done or failed.
    pub fn of(result: Result<(), Error>) -> Self {
        result.map_or_else(Outcome::Failed, |()| Outcome::Done)
    }

    /// Whether something was read that was not expected.
    pub fn differs(&self) -> bool {
        match self {
            Outcome::Read { found, .. } => found.is_some(),
            Outcome::Verified { found, .. } => !found.is_empty(),
            _ => false,
        }
    }
}

impl Line {
    /// For people.
    pub fn write(&self, out: &mut dyn Write, style: Style) -> io::Result<()> {
        let text = clean(self.text.trim());
        match &self.outcome {
            Outcome::Failed(error) => writeln!(out, "{text}: {} {error}", style.bad("failed:")),
            Outcome::Read { found: Some(found), .. } => {
                writeln!(out, "{text}: {}", mismatch(found, style))?;
                self.write_dump(out)
            }
            Outcome::Verified { found, .. } if !found.is_empty() => {
                found.iter().try_for_each(|found| writeln!(out, "{text}: {}", mismatch(found, style)))
            }
            Outcome::Map(entries) => entries.iter().try_for_each(|entry| write_entry(out, entry)),
            Outcome::Length(size) => writeln!(out, "{size}"),
            Outcome::Text(text) => writeln!(out, "{text}"),
            _ if self.command.quiet => Ok(()),
            Outcome::Verified { bytes, .. } => writeln!(out, "{text}: {bytes} bytes as written"),
            Outcome::Read { verified, .. } => {
                writeln!(out, "{text}: {}", if *verified { "as expected" } else { "done" })?;
                self.write_dump(out)
            }
            Outcome::Flags(flags) => {
                let mut flags = *flags;
                let flag = |(name, flag): (&str, Flag)| {
                    format!("{name}={}", if *flag.of(&mut flags) { "on" } else { "off" })
                };
                writeln!(out, "{}", Flag::ALL.map(flag).join(" "))
            }
            Outcome::Done => writeln!(out, "{text}: done"),
            Outcome::Ignored(why) => writeln!(out, "{text}: {} {why}", style.warning("ignored:")),
        }
    }

    fn write_dump(&self, out: &mut dyn Write) -> io::Result<()> {
        let Outcome::Read { dump: Some(bytes), .. } = &self.outcome else { return Ok(()) };
        let start = self.range.as_ref().map_or(0, |range| range.start);
        for (row, line) in bytes.chunks(16).enumerate() {
            let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            let shown =
                |byte: &u8| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '.' };
            let text: String = line.iter().map(shown).collect();
            writeln!(out, "{:08x}:  {:47}  {text}", start + row as u64 * 16, hex.join(" "))?;
        }
        Ok(())
    }

    /// For scripts.
    pub fn json(&self) -> Value {
        let mut line = json!({
            "command": self.text.trim(),
            "offset": self.range.as_ref().map(|range| range.start),
            "length": self.range.as_ref().map(|range| range.end - range.start),
            "seconds": self.time.as_secs_f64(),
            "ok": !matches!(self.outcome, Outcome::Failed(_)) && !self.outcome.differs(),
        });
        let Some(members) = line.as_object_mut() else { return line };
        let mut add = |name: &str, value: Value| drop(members.insert(name.to_owned(), value));
        match &self.outcome {
            Outcome::Done | Outcome::Text(_) => {}
            Outcome::Ignored(why) => add("ignored", json!(why)),
            Outcome::Failed(error) => {
                add("error", serde_json::to_value(ErrorBody::new(error)).unwrap_or(Value::Null));
            }
            Outcome::Read { verified, found, dump } => {
                add("verified", json!(verified));
                add("mismatches", found.iter().map(mismatch_json).collect());
                if let Some(bytes) = dump {
                    add("data", bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into());
                }
            }
            Outcome::Verified { bytes, found } => {
                add("verified_bytes", json!(bytes));
                add("mismatches", found.iter().map(mismatch_json).collect());
            }
            Outcome::Map(entries) => add("extents", entries.iter().map(entry_json).collect()),
            Outcome::Length(size) => add("virtual_size", json!(size)),
            Outcome::Flags(flags) => {
                let mut flags = *flags;
                let all = Flag::ALL.map(|(name, flag)| (name.replace('-', "_"), json!(*flag.of(&mut flags))));
                add("flags", all.into_iter().collect());
            }
        }
        line
    }

    /// Whether it is shown although nobody wants to read that all is well.
    pub fn matters(&self) -> bool {
        let asked = matches!(self.command.what, What::Map { .. } | What::Length | What::Help);
        let dumped = matches!(self.outcome, Outcome::Read { dump: Some(_), .. });
        asked || dumped || self.outcome.differs() || matches!(self.outcome, Outcome::Failed(_))
    }
}

fn mismatch(found: &Mismatch, style: Style) -> String {
    let Mismatch { offset, found, expected, bytes } = found;
    let what = style.bad("differs");
    format!(
        "{what} from byte {offset:#x} on: expected {expected:#04x}, found {found:#04x}; {bytes} bytes in all"
    )
}

fn mismatch_json(found: &Mismatch) -> Value {
    json!({
        "offset": found.offset, "expected": found.expected, "found": found.found, "bytes": found.bytes
    })
}

fn write_entry(out: &mut dyn Write, entry: &MapEntry) -> io::Result<()> {
    let (start, length) = (entry.range.start, entry.range.end - entry.range.start);
    write!(out, "{start:#x}  {length:#x}  {}", entry.kind.as_str())?;
    match &entry.place {
        Some((file, offset)) => writeln!(out, "  layer {}  {offset:#x} {}", entry.layer, clean(file)),
        None => writeln!(out),
    }
}

fn entry_json(entry: &MapEntry) -> Value {
    json!({
        "start": entry.range.start,
        "length": entry.range.end - entry.range.start,
        "kind": entry.kind.as_str(),
        "layer": entry.layer,
        "file": entry.place.as_ref().map(|(file, _)| file),
        "offset": entry.place.as_ref().map(|(_, offset)| offset),
    })
}
