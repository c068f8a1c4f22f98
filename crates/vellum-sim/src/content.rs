//! [`Content`]: the bytes of a file, shared page by page, so that thousands of crash states cost little more than one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// What a disk writes whole, whatever happens.
pub const SECTOR: u64 = 512;
const PAGE: usize = 4096;

/// The bytes of a file. A clone shares all pages with its original until one of them writes.
#[derive(Clone, Default)]
pub struct Content {
    pages: BTreeMap<u64, Arc<Page>>,
    len: u64,
}

struct Page {
    bytes: [u8; PAGE],
    hash: OnceLock<u64>,
}

impl Clone for Page {
    fn clone(&self) -> Self {
        Page { bytes: self.bytes, hash: OnceLock::new() }
    }
}

/// 64 bits that tell contents apart; 0 for zeros of any length.
pub fn hash_of(bytes: &[u8]) -> u64 {
    const KEYS: [u64; 4] =
        [0x9e37_79b9_7f4a_7c15, 0xc2b2_ae3d_27d4_eb4f, 0x1656_67b1_9e37_79f9, 0xff51_afd7_ed55_8ccd];
    let mut lanes = [0u64; 4];
    let mut any = 0u64;
    for chunk in bytes.chunks(32) {
        let mut padded = [0u8; 32];
        padded[..chunk.len()].copy_from_slice(chunk);
        for (lane, word) in padded.chunks_exact(8).enumerate() {
            let mut eight = [0u8; 8];
            eight.copy_from_slice(word);
            let word = u64::from_le_bytes(eight);
            any |= word;
            lanes[lane] = (lanes[lane] ^ word).wrapping_mul(KEYS[lane]).rotate_left(29);
        }
    }
    if any == 0 {
        return 0;
    }
    lanes.iter().fold(1, |hash, lane| mix(hash, *lane)).max(1)
}

/// Joins two values into one that depends on both and on their order.
pub fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b;
    x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 29)
}

/// The parts of `offset..offset + len` by page: page number, offset in it, range in the caller's bytes.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, Range<usize>)> {
    let mut done = 0usize;
    std::iter::from_fn(move || {
        if done >= len {
            return None;
        }
        let at = offset + done as u64;
        let within = (at % PAGE as u64) as usize;
        let take = (PAGE - within).min(len - done);
        let part = (at / PAGE as u64, within, done..done + take);
        done += take;
        Some(part)
    })
}

impl Content {
    /// The bytes given.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut content = Content::default();
        content.write(bytes, 0);
        content.grow(bytes.len() as u64);
        content
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `bytes` from `offset` on; what was never written is zero, also past the end.
    pub fn read(&self, bytes: &mut [u8], offset: u64) {
        for (page, within, range) in parts(offset, bytes.len()) {
            let len = range.len();
            match self.pages.get(&page) {
                Some(page) => bytes[range].copy_from_slice(&page.bytes[within..within + len]),
                None => bytes[range].fill(0),
            }
        }
    }

    /// Writes `bytes` at `offset` **without changing the length**: what lies past it is cut by [`Content::cut`].
    pub fn write(&mut self, bytes: &[u8], offset: u64) {
        for (number, within, range) in parts(offset, bytes.len()) {
            if !self.pages.contains_key(&number) && bytes[range.clone()].iter().all(|byte| *byte == 0) {
                continue; // zeros where there is nothing cost nothing
            }
            let fresh = || Arc::new(Page { bytes: [0; PAGE], hash: OnceLock::new() });
            let page = Arc::make_mut(self.pages.entry(number).or_insert_with(fresh));
            page.bytes[within..within + range.len()].copy_from_slice(&bytes[range]);
            page.hash = OnceLock::new();
        }
    }

    /// Makes `range` zero.
    pub fn zero(&mut self, range: Range<u64>) {
        let touched: Vec<u64> = self
            .pages
            .range(range.start / PAGE as u64..range.end.div_ceil(PAGE as u64))
            .map(|(n, _)| *n)
            .collect();
        for number in touched {
            let start = number * PAGE as u64;
            let from = range.start.max(start) - start;
            let to = range.end.min(start + PAGE as u64) - start;
            if from == 0 && to == PAGE as u64 {
                self.pages.remove(&number);
            } else if let Some(page) = self.pages.get_mut(&number) {
                let page = Arc::make_mut(page);
                page.bytes[from as usize..to as usize].fill(0);
                page.hash = OnceLock::new();
            }
        }
    }

    /// Lengthens to at least `len`.
    pub fn grow(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    /// Gives the length `len`; what lies past it is gone.
    pub fn set_len(&mut self, len: u64) {
        self.len = len;
        self.cut();
    }

    /// Drops what was written past the end.
    pub fn cut(&mut self) {
        let past = self.pages.last_key_value().is_some_and(|(last, _)| (last + 1) * PAGE as u64 > self.len);
        if past {
            self.zero(self.len..u64::MAX - PAGE as u64);
        }
    }

    /// Ranges that may hold data, in order; the rest is zeros.
    pub fn data(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.pages.keys().map(|number| number * PAGE as u64..(number + 1) * PAGE as u64)
    }

    /// Ranges of `range` that may hold data.
    pub fn data_in(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let pages = range.start / PAGE as u64..range.end.div_ceil(PAGE as u64);
        self.pages.range(pages).map(move |(number, _)| {
            (number * PAGE as u64).max(range.start)..((number + 1) * PAGE as u64).min(range.end)
        })
    }

    /// Tells contents apart: equal bytes and lengths have equal hashes.
    pub fn hash(&self) -> u64 {
        self.pages.iter().fold(mix(1, self.len), |sum, (number, page)| {
            match *page.hash.get_or_init(|| hash_of(&page.bytes)) {
                0 => sum,
                hash => sum.wrapping_add(mix(*number, hash)),
            }
        })
    }

    /// A copy of all bytes. For small files.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.len).unwrap_or(usize::MAX)];
        self.read(&mut bytes, 0);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_keeps_its_bytes_and_its_hash() {
        let mut content = Content::from_bytes(&[7; 10_000]);
        let copy = content.clone();
        content.write(&[1, 2], 5000);
        assert_eq!(copy.to_vec(), [7; 10_000]);
        assert_ne!(copy.hash(), content.hash());
        content.write(&[7, 7], 5000);
        assert_eq!(copy.hash(), content.hash());
    }

    #[test]
    fn zeros_hash_alike_however_they_came_about() {
        let mut written = Content::default();
        written.write(&[0; 8192], 0);
        written.grow(8192);
        let mut grown = Content::default();
        grown.set_len(8192);
        assert_eq!(written.hash(), grown.hash());
        grown.set_len(8191);
        assert_ne!(written.hash(), grown.hash());
    }

    #[test]
    fn what_lies_past_the_end_is_cut() {
        let mut content = Content::default();
        content.write(&[9; 5000], 0);
        content.grow(4100);
        content.cut();
        content.set_len(6000);
        let mut expected = vec![9; 4100];
        expected.resize(6000, 0);
        assert_eq!(content.to_vec(), expected);
        content.zero(10..5000);
        assert_eq!(content.to_vec()[..12], [9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 0, 0]);
    }
}
