//! [`Fault`]: what goes wrong, and when.

use std::fmt;
use vellum_core::{Code, Error};

/// Which operations count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOn {
    /// Everything that changes a file, and flushes.
    Change,
    /// Flushes.
    Flush,
    /// Reads.
    Read,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Nothing is done; an I/O error.
    Io,
    /// Nothing is done; no space left.
    NoSpace,
    /// A write stops in the middle, and an I/O error.
    Short,
}

/// The n-th operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which operations are counted.
    pub on: FaultOn,
    /// The first that fails, from 0.
    pub nth: u64,
    /// How.
    pub kind: FaultKind,
    /// All later ones fail, too.
    pub is_persistent: bool,
}

impl Fault {
    pub(crate) fn error(&self, name: &str) -> Error {
        match self.kind {
            FaultKind::NoSpace => Error::new(Code::NoSpace, "no space left (simulated)").image(name),
            _ => Error::new(Code::Io, "input/output error (simulated)").image(name),
        }
    }

    /// Reads what [`fmt::Display`] prints.
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.split('.');
        let on = match words.next()? {
            "change" => FaultOn::Change,
            "flush" => FaultOn::Flush,
            "read" => FaultOn::Read,
            _ => return None,
        };
        let nth = words.next()?.parse().ok()?;
        let kind = match words.next()? {
            "io" => FaultKind::Io,
            "nospace" => FaultKind::NoSpace,
            "short" => FaultKind::Short,
            _ => return None,
        };
        Some(Fault { on, nth, kind, is_persistent: words.next() == Some("ever") })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = match self.on {
            FaultOn::Change => "change",
            FaultOn::Flush => "flush",
            FaultOn::Read => "read",
        };
        let kind = match self.kind {
            FaultKind::Io => "io",
            FaultKind::NoSpace => "nospace",
            FaultKind::Short => "short",
        };
        write!(f, "{on}.{}.{kind}.{}", self.nth, if self.is_persistent { "ever" } else { "once" })
    }
}

/// Counts operations and says which of them fail.
#[derive(Default)]
pub(crate) struct Faults {
    fault: Option<Fault>,
    seen: u64,
    pub(crate) struck: bool,
}

impl Faults {
    pub(crate) fn arm(&mut self, fault: Option<Fault>) {
        *self = Faults { fault, seen: 0, struck: false };
    }

    pub(crate) fn is_armed(&self) -> bool {
        self.fault.is_some()
    }

    /// The fault that this operation meets.
    pub(crate) fn strike(&mut self, is_read: bool, is_flush: bool) -> Option<Fault> {
        let fault = self.fault?;
        let counts = match fault.on {
            FaultOn::Change => !is_read,
            FaultOn::Flush => is_flush,
            FaultOn::Read => is_read,
        };
        if !counts {
            return None;
        }
        let number = self.seen;
        self.seen += 1;
        let strikes = number == fault.nth || number > fault.nth && fault.is_persistent;
        self.struck |= strikes;
        strikes.then_some(fault)
    }
}
