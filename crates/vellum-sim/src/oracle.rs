//! [`Oracle`]: which contents each sector may have, after a power loss or for a reader.
//!
//! A sector that was never written is as it was. Of the writes to a sector, one that was answered before a flush was
//! asked for that succeeded is *settled*: nothing older may be seen. What came after it may be seen, each on its own;
//! what failed or was not answered may be seen or not; a discard leaves zeros or what was there.

use crate::content::{Content, SECTOR, hash_of};
use crate::request::{Request, RequestKind};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// What is known of a disk: what it held at first, and every request since.
pub struct Oracle {
    base: Content,
    base_hashes: Arc<[u64]>,
    requests: Vec<Request>,
    session: usize,
    known: HashMap<u64, Box<[u8; 512]>>,
}

/// The contents that each sector may have, as hashes.
#[derive(Clone)]
pub struct Allowed {
    base: Arc<[u64]>,
    touched: BTreeMap<u64, Vec<u64>>,
}

/// Contents of one sector that are tracked at most; more means a workload that rewrites one sector piecemeal.
const CONTENTS_MAX: usize = 4096;

impl Oracle {
    /// A disk that holds `base`, whose length is a multiple of sectors.
    pub fn new(base: Content) -> Self {
        let sectors = base.len().div_ceil(SECTOR);
        let mut hashes = vec![0u64; sectors as usize];
        let mut bytes = [0u8; 512];
        for range in base.data() {
            for sector in range.start / SECTOR..range.end.div_ceil(SECTOR).min(sectors) {
                base.read(&mut bytes, sector * SECTOR);
                hashes[sector as usize] = hash_of(&bytes);
            }
        }
        Oracle { base, base_hashes: hashes.into(), requests: Vec::new(), session: 0, known: HashMap::new() }
    }

    /// Size of the disk in sectors.
    pub fn sectors(&self) -> u64 {
        self.base_hashes.len() as u64
    }

    /// The requests so far.
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// The image is opened again. Flushes from now on do not cover what was written before: closing did, or failed to.
    pub fn new_session(&mut self) {
        self.session += 1;
    }

    /// A request was submitted; its number.
    pub fn begin(&mut self, kind: RequestKind, now: usize) -> usize {
        self.requests.push(Request { kind, session: self.session, begun: now, ended: None });
        self.requests.len() - 1
    }

    /// It was answered.
    pub fn end(&mut self, number: usize, now: usize, is_ok: bool) {
        if let Some(request) = self.requests.get_mut(number) {
            request.ended = Some((now, is_ok));
        }
    }

    /// What may be there after a power loss at `moment`.
    pub fn after_crash(&mut self, moment: usize) -> Allowed {
        let is_settled: Vec<bool> =
            self.requests.iter().map(|request| self.is_durable(request, moment)).collect();
        self.allowed(moment, &is_settled)
    }

    /// What a read that lasts from one moment to another may see.
    pub fn readable(&mut self, from: usize, to: usize) -> Allowed {
        // What a session wrote that could not be closed may be lost when the image is opened again.
        let is_settled = |request: &Request| match request.session == self.session {
            true => request.succeeded_by(from),
            false => self.is_durable(request, from),
        };
        let is_settled: Vec<bool> = self.requests.iter().map(is_settled).collect();
        self.allowed(to, &is_settled)
    }

    fn is_durable(&self, request: &Request, moment: usize) -> bool {
        if !request.succeeded_by(moment) {
            return false;
        }
        let has_fua = matches!(request.kind, RequestKind::Write { fua: true, .. });
        has_fua
            || self.requests.iter().any(|flush| {
                matches!(flush.kind, RequestKind::Flush)
                    && flush.session == request.session
                    && flush.succeeded_by(moment)
                    && request.precedes(flush)
            })
    }

    fn allowed(&mut self, moment: usize, is_settled: &[bool]) -> Allowed {
        let mut by_sector: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for (number, request) in self.requests.iter().enumerate().filter(|(_, r)| r.begun < moment) {
            let range = request.range();
            for sector in range.start / SECTOR..range.end.div_ceil(SECTOR) {
                by_sector.entry(sector).or_default().push(number);
            }
        }
        let touched = by_sector
            .into_iter()
            .map(|(sector, numbers)| (sector, self.contents(sector, &numbers, is_settled)))
            .collect();
        Allowed { base: self.base_hashes.clone(), touched }
    }

    fn contents(&mut self, sector: u64, numbers: &[usize], is_settled: &[bool]) -> Vec<u64> {
        let requests: Vec<Request> = numbers.iter().map(|n| self.requests[*n].clone()).collect();
        let settled: Vec<bool> = numbers.iter().map(|n| is_settled[*n]).collect();
        let in_turn = requests.windows(2).all(|pair| pair[0].precedes(&pair[1]));
        let found = match in_turn {
            true => self.in_turn(sector, &requests, &settled),
            false => self.at_once(sector, &requests, &settled),
        };
        assert!(found.len() <= CONTENTS_MAX, "too many possible contents of sector {sector}");
        found
    }

    /// Requests that followed one another: each may build on what the one before left.
    fn in_turn(&mut self, sector: u64, requests: &[Request], settled: &[bool]) -> Vec<u64> {
        let base = self.base_of(sector);
        let (mut current, mut possible) = (vec![base], vec![base]);
        for (request, is_settled) in requests.iter().zip(settled) {
            let mut after = self.apply_all(request, sector, &current);
            let answered = request.ended.is_some_and(|(_, ok)| ok);
            // A session that could not be closed may have lost what it wrote.
            let is_lost = !*is_settled && request.session != self.session;
            if !answered || !request.is_definite() || is_lost {
                join(&mut after, &current);
            }
            current = after;
            if *is_settled {
                possible.clone_from(&current);
            } else {
                let more = self.apply_all(request, sector, &possible);
                join(&mut possible, &more);
                join(&mut possible, &current);
            }
        }
        possible
    }

    /// Requests that were under way at the same time: each wins or not. They cover whole sectors.
    fn at_once(&mut self, sector: u64, requests: &[Request], settled: &[bool]) -> Vec<u64> {
        let winners: Vec<&Request> = requests
            .iter()
            .zip(settled)
            .filter(|(request, is_settled)| **is_settled && request.is_definite())
            .map(|(request, _)| request)
            .collect();
        let base = self.base_of(sector);
        let mut possible = if winners.is_empty() { vec![base] } else { Vec::new() };
        for request in requests {
            assert!(request.covers(sector), "requests at the same time must cover whole sectors");
            if !winners.iter().any(|winner| request.precedes(winner)) {
                let content = self.apply_all(request, sector, &[base]);
                join(&mut possible, &content);
            }
        }
        possible
    }

    fn apply_all(&mut self, request: &Request, sector: u64, contents: &[u64]) -> Vec<u64> {
        let mut after = Vec::new();
        for content in contents {
            let old = self.bytes_of(sector, *content);
            let hash = match request.apply(sector, &old) {
                Some(new) => {
                    let hash = hash_of(&new);
                    self.known.entry(hash).or_insert_with(|| Box::new(new));
                    hash
                }
                None => *content,
            };
            join(&mut after, &[hash]);
        }
        after
    }

    fn base_of(&self, sector: u64) -> u64 {
        self.base_hashes.get(sector as usize).copied().unwrap_or(0)
    }

    fn bytes_of(&self, sector: u64, hash: u64) -> [u8; 512] {
        if let Some(bytes) = self.known.get(&hash) {
            return **bytes;
        }
        let mut bytes = [0u8; 512];
        if hash != 0 {
            self.base.read(&mut bytes, sector * SECTOR);
        }
        bytes
    }
}

fn join(all: &mut Vec<u64>, more: &[u64]) {
    for hash in more {
        if !all.contains(hash) {
            all.push(*hash);
        }
    }
}

impl Allowed {
    /// The first sector whose content is none of those allowed. `view` has a hash for each sector.
    pub fn violation(&self, view: &[u64]) -> Option<u64> {
        if view.len() != self.base.len() {
            return Some(view.len().min(self.base.len()) as u64);
        }
        let mut from = 0usize;
        for (sector, contents) in &self.touched {
            let at = *sector as usize;
            if view[from..at] != self.base[from..at] {
                break;
            }
            if !contents.contains(&view[at]) {
                return Some(*sector);
            }
            from = at + 1;
        }
        let rest = view[from..].iter().zip(&self.base[from..]).position(|(a, b)| a != b);
        rest.map(|at| (from + at) as u64)
    }

    /// Whether a sector may have this content.
    pub fn allows(&self, sector: u64, content: u64) -> bool {
        match self.touched.get(&sector) {
            Some(contents) => contents.contains(&content),
            None => self.base.get(sector as usize) == Some(&content),
        }
    }

    /// How many contents a sector may have.
    pub fn choices(&self, sector: u64) -> usize {
        self.touched.get(&sector).map_or(1, Vec::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64, byte: u8, len: usize) -> RequestKind {
        RequestKind::Write { offset, data: vec![byte; len].into(), fua: false }
    }

    fn hash(byte: u8) -> u64 {
        hash_of(&[byte; 512])
    }

    #[test]
    fn a_flush_settles_what_was_answered_before_it() {
        let mut oracle = Oracle::new(Content::from_bytes(&[9; 1024]));
        let a = oracle.begin(write(0, 1, 512), 0);
        oracle.end(a, 1, true);
        assert!(oracle.after_crash(2).violation(&[hash(9), hash(9)]).is_none());
        let flush = oracle.begin(RequestKind::Flush, 2);
        oracle.end(flush, 3, true);
        assert_eq!(oracle.after_crash(4).violation(&[hash(9), hash(9)]), Some(0));
        assert_eq!(oracle.after_crash(3).violation(&[hash(9), hash(9)]), None);
        let b = oracle.begin(write(0, 2, 512), 4);
        oracle.end(b, 5, true);
        for byte in [1, 2] {
            assert!(oracle.after_crash(6).violation(&[hash(byte), hash(9)]).is_none());
        }
        assert_eq!(oracle.after_crash(6).violation(&[hash(2), hash(2)]), Some(1));
        assert_eq!(oracle.readable(6, 6).violation(&[hash(1), hash(9)]), Some(0));
    }

    #[test]
    fn a_failed_write_and_a_discard_stay_open() {
        let mut oracle = Oracle::new(Content::from_bytes(&[9; 512]));
        for (at, kind, is_ok) in [
            (0, write(0, 1, 512), false),
            (2, RequestKind::Discard(0..512), true),
            (4, RequestKind::Flush, true),
        ] {
            let number = oracle.begin(kind, at);
            oracle.end(number, at + 1, is_ok);
        }
        for content in [hash(9), hash(1), 0] {
            assert!(oracle.after_crash(6).violation(&[content]).is_none());
        }
    }

    #[test]
    fn parts_of_sectors_add_up() {
        let mut oracle = Oracle::new(Content::from_bytes(&[0; 512]));
        for (at, kind) in [(0, write(0, 1, 100)), (2, write(50, 2, 100)), (4, RequestKind::Flush)] {
            let number = oracle.begin(kind, at);
            oracle.end(number, at + 1, true);
        }
        let mut both = [0u8; 512];
        both[..100].fill(1);
        let mut first = both;
        both[50..150].fill(2);
        assert!(oracle.after_crash(6).violation(&[hash_of(&both)]).is_none());
        assert_eq!(oracle.after_crash(6).violation(&[hash_of(&first)]), Some(0));
        assert!(oracle.after_crash(4).violation(&[hash_of(&first)]).is_none());
        first.fill(0);
        first[50..150].fill(2);
        assert!(oracle.after_crash(4).violation(&[hash_of(&first)]).is_none());
    }

    #[test]
    fn of_two_writes_at_once_either_wins() {
        let mut oracle = Oracle::new(Content::from_bytes(&[9; 512]));
        let a = oracle.begin(write(0, 1, 512), 0);
        let b = oracle.begin(write(0, 2, 512), 1);
        oracle.end(b, 2, true);
        oracle.end(a, 3, true);
        let flush = oracle.begin(RequestKind::Flush, 4);
        oracle.end(flush, 5, true);
        let allowed = oracle.after_crash(6);
        assert_eq!(allowed.choices(0), 2);
        assert_eq!(allowed.violation(&[hash(9)]), Some(0));
    }
}
