//! `--resume`: the pairs that an interrupted run measured, from its `--json` file.

use super::Result;
use super::measure::Sample;
use super::pair::{Contender, Entry, Pair};
use super::variant;
use serde_json::Value;
use std::path::Path;

/// The pairs in the file at `path`; none if there is no such file.
pub fn pairs(path: &Path, contenders: &[Contender]) -> Result<Vec<Pair>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    let all: Value = serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    let pairs = all["pairs"].as_array().map(Vec::as_slice).unwrap_or_default();
    pairs
        .iter()
        .map(|pair| {
            read_pair(pair, contenders).ok_or(format!("{}: not a file of this bench", path.display()))
        })
        .collect()
}

fn read_pair(pair: &Value, contenders: &[Contender]) -> Option<Pair> {
    let named = |field: &str| variant::named(pair[field].as_str()?);
    let entries = pair["entries"].as_array()?.iter().map(|entry| read_entry(entry, contenders));
    let verified = match &pair["verified"] {
        Value::Bool(true) => Some(Ok(())),
        Value::String(text) => Some(Err(text.clone())),
        _ => None,
    };
    Some(Pair {
        source: named("source")?,
        target: named("target")?,
        entries: entries.collect::<Option<_>>()?,
        verified,
    })
}

fn read_entry(entry: &Value, contenders: &[Contender]) -> Option<Entry> {
    let name = entry["contender"].as_str()?;
    let list = |field: &str| entry[field].as_array().map(Vec::as_slice).unwrap_or_default();
    let number = |field: &str, index: usize| list(field).get(index).and_then(Value::as_f64);
    let samples = (0..list("durable_seconds").len()).map(|index| {
        Some(Sample {
            exit_seconds: number("exit_seconds", index)?,
            durable_seconds: number("durable_seconds", index)?,
            cpu_seconds: number("cpu_seconds", index)?,
            peak_bytes: number("peak_bytes", index)? as u64,
        })
    });
    Some(Entry {
        contender: *contenders.iter().find(|contender| contender.name() == name)?,
        samples: match entry["refused"].as_str() {
            Some(why) => Err(why.to_owned()),
            None => Ok(samples.collect::<Option<_>>()?),
        },
        allocated_bytes: entry["allocated_bytes"].as_u64()?,
        file_bytes: entry["file_bytes"].as_u64()?,
        taken_bytes: vec![entry["taken_bytes"].as_f64()?],
    })
}
