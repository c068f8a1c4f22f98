//! Checking and repairing: what a driver finds, and what it would change.
//!
//! A driver only looks and plans: [`Format::check`](crate::Format::check) reads the image and returns a
//! [`CheckReport`]. Whoever repairs carries the plan out (crate `vellum`), and keeps a backup of every byte first.

use crate::{Code, Events, Limits, Location, Resolver, Storage};
use std::sync::Arc;

/// What a driver needs to check an image.
#[derive(Clone)]
pub struct CheckRequest {
    /// The file that was named.
    pub storage: Arc<dyn Storage>,
    /// Where it is.
    pub location: Location,
    /// For extents and data files only.
    pub resolver: Arc<dyn Resolver>,
    /// What is refused for its size.
    pub limits: Limits,
    /// Where warnings go.
    pub events: Events,
    /// Plan repairs, too; else only look.
    pub plan: bool,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Odd, but harmless.
    Note,
    /// Space is lost, no data.
    Leak,
    /// Data is wrong or lost, or the next write may destroy some.
    Error,
}

impl Severity {
    /// The word that users see.
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Note => "note",
            Severity::Leak => "leak",
            Severity::Error => "error",
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Stable code.
    pub code: Code,
    /// What is wrong, for people.
    pub message: String,
    /// Byte offset in the file, if it has one place.
    pub offset: Option<u64>,
}

/// Bytes that a repair writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Index into [`CheckReport::storages`].
    pub storage: usize,
    /// Byte offset.
    pub offset: u64,
    /// The bytes that will stand there. Past the end, the file grows.
    pub bytes: Vec<u8>,
}

/// One step of a repair. Steps are carried out in order, with a flush after each; each leaves the image no worse.
#[derive(Clone, Debug, Default)]
pub struct Fix {
    /// What the step does, for people: "clear 3 block map entries that point past the end of the file".
    pub what: String,
    /// It loses guest data that could not be read correctly anyway, or decides between two versions of it.
    pub is_lossy: bool,
    /// It only gives lost space back.
    pub is_leak: bool,
    /// What is written.
    pub patches: Vec<Patch>,
    /// New length of a storage (index, bytes), after the patches.
    pub set_len: Option<(usize, u64)>,
}

/// Findings that are kept one by one; the rest is counted.
pub const FINDINGS_MAX: usize = 1000;

/// What a check found.
#[derive(Clone, Default)]
pub struct CheckReport {
    /// Format that was checked.
    pub format: &'static str,
    /// The files of the image, for [`Patch::storage`].
    pub storages: Vec<Arc<dyn Storage>>,
    /// The first [`FINDINGS_MAX`] findings.
    pub findings: Vec<Finding>,
    /// Errors found, all of them.
    pub errors: u64,
    /// Leaks found, all of them.
    pub leaks: u64,
    /// Bytes that are lost to leaks.
    pub leaked_bytes: u64,
    /// Guest bytes that have a place in the image.
    pub allocated_bytes: u64,
    /// Guest bytes that are stored compressed.
    pub compressed_bytes: u64,
    /// Where the last byte in use ends.
    pub end_offset: u64,
    /// What a repair would do, in order.
    pub fixes: Vec<Fix>,
}

impl CheckReport {
    /// Notes a finding.
    pub fn find(&mut self, severity: Severity, code: Code, message: impl Into<String>, offset: Option<u64>) {
        match severity {
            Severity::Error => self.errors += 1,
            Severity::Leak => self.leaks += 1,
            Severity::Note => {}
        }
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(Finding { severity, code, message: message.into(), offset });
        }
    }

    /// Whether nothing is wrong; leaks are.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.leaks == 0
    }
}
