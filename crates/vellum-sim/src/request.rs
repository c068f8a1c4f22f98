//! [`Request`]: what a guest asked for, and when it was answered.

use crate::content::SECTOR;
use std::ops::Range;
use std::sync::Arc;

/// What a guest asked for.
#[derive(Clone, Debug)]
pub enum RequestKind {
    /// Bytes at an offset.
    Write {
        /// Byte offset on the disk.
        offset: u64,
        /// The bytes.
        data: Arc<[u8]>,
        /// Durable when it is answered.
        fua: bool,
    },
    /// A range reads as zeros afterwards.
    Zero(Range<u64>),
    /// A range reads as zeros or as before.
    Discard(Range<u64>),
    /// What was answered before becomes durable. Closing is a flush, too.
    Flush,
}

/// A request of a guest. Times are moments of the trace.
#[derive(Clone, Debug)]
pub struct Request {
    /// What was asked for.
    pub kind: RequestKind,
    /// In which writing session: a flush covers what its own session wrote.
    pub session: usize,
    /// When it was submitted.
    pub begun: usize,
    /// When it was answered, and whether it succeeded.
    pub ended: Option<(usize, bool)>,
}

impl Request {
    /// The bytes of the disk that it changes.
    pub fn range(&self) -> Range<u64> {
        match &self.kind {
            RequestKind::Write { offset, data, .. } => *offset..offset + data.len() as u64,
            RequestKind::Zero(range) | RequestKind::Discard(range) => range.clone(),
            RequestKind::Flush => 0..0,
        }
    }

    /// Answered with success before `moment`.
    pub fn succeeded_by(&self, moment: usize) -> bool {
        self.ended.is_some_and(|(ended, ok)| ok && ended < moment)
    }

    /// It was answered before `other` was submitted.
    pub fn precedes(&self, other: &Request) -> bool {
        self.ended.is_some_and(|(ended, _)| ended < other.begun)
    }

    /// It surely changed what it was asked to change, if it was answered with success.
    pub fn is_definite(&self) -> bool {
        !matches!(self.kind, RequestKind::Discard(_))
    }

    /// What it does to a sector that holds `old`; `None` if it does not touch it.
    pub(crate) fn apply(&self, sector: u64, old: &[u8; 512]) -> Option<[u8; 512]> {
        let range = self.range();
        let start = sector * SECTOR;
        let from = range.start.max(start);
        let to = range.end.min(start + SECTOR);
        if from >= to {
            return None;
        }
        let mut new = *old;
        let part = &mut new[(from - start) as usize..(to - start) as usize];
        match &self.kind {
            RequestKind::Write { offset, data, .. } => {
                part.copy_from_slice(&data[(from - offset) as usize..(to - offset) as usize]);
            }
            _ => part.fill(0),
        }
        Some(new)
    }

    /// Whether it changes all of the sector.
    pub(crate) fn covers(&self, sector: u64) -> bool {
        let range = self.range();
        range.start <= sector * SECTOR && (sector + 1) * SECTOR <= range.end
    }
}
