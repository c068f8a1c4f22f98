//! Running the reference tools, for several tests.
#![allow(dead_code)]

use std::path::Path;
use std::process::{Command, Output};

/// A small generator: the same seed gives the same run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end.max(1)
    }
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}

/// The big-endian number at byte `at`.
pub fn be64(bytes: &[u8], at: u64) -> u64 {
    let at = at as usize;
    bytes.get(at..at + 8).map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()))
}

fn output(dir: &Path, name: &str, args: &[&str]) -> Output {
    let output = Command::new(name).args(args).current_dir(dir).output();
    output.unwrap_or_else(|e| panic!("{name}: {e} (Debian: qemu-utils)"))
}

/// Runs a tool, which must succeed; returns what it printed.
pub fn tool(dir: &Path, name: &str, args: &[&str]) -> String {
    let output = output(dir, name, args);
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {args:?}\n{text}");
    text.into_owned()
}

/// Whether a tool succeeds.
pub fn succeeds(dir: &Path, name: &str, args: &[&str]) -> bool {
    output(dir, name, args).status.success()
}

/// Runs a command line with '...' quotes.
pub fn run(dir: &Path, line: &str) -> String {
    let words: Vec<&str> = line
        .split('\'')
        .enumerate()
        .flat_map(|(i, part)| if i % 2 == 1 { vec![part] } else { part.split_whitespace().collect() })
        .collect();
    tool(dir, words[0], &words[1..])
}

/// What `qemu-img check` counts.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Counted {
    pub corruptions: u64,
    pub leaks: u64,
    pub allocated: u64,
    pub compressed: u64,
    pub end_offset: u64,
    pub messages: String,
}

/// `qemu-img check`; `None` if it cannot open or check the image.
pub fn qemu_check(dir: &Path, name: &str) -> Option<Counted> {
    let output = output(dir, "qemu-img", &["check", "-f", "qcow2", "--output=json", name]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let field = |name: &str| -> u64 {
        let Some(at) = text.find(&format!("\"{name}\":")) else { return 0 };
        let rest = &text[at + name.len() + 3..];
        rest.trim_start().split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap_or(0)
    };
    let messages: String = String::from_utf8_lossy(&output.stderr).chars().take(3000).collect();
    if !text.contains("check-errors") || field("check-errors") > 0 {
        return None;
    }
    Some(Counted {
        corruptions: field("corruptions"),
        leaks: field("leaks"),
        allocated: field("allocated-clusters"),
        compressed: field("compressed-clusters"),
        end_offset: field("image-end-offset"),
        messages,
    })
}
