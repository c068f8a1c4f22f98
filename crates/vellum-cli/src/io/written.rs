//! [`Written`]: what the commands wrote so far, to be verified later.

use super::command::Fill;
use std::ops::Range;

/// Ranges in ascending order, and what was written there.
#[derive(Debug, Default)]
pub struct Written(Vec<(Range<u64>, Fill)>);

impl Written {
    /// `range` holds `fill` from now on.
    pub fn set(&mut self, range: Range<u64>, fill: Fill) {
        self.forget(&range);
        if !range.is_empty() {
            let at = self.0.partition_point(|(known, _)| known.start < range.start);
            self.0.insert(at, (range, fill));
        }
    }

    /// It is not known what `range` holds.
    pub fn forget(&mut self, range: &Range<u64>) {
        if range.is_empty() {
            return;
        }
        let touched = self.touched(range);
        let mut kept = Vec::with_capacity(2);
        for (known, fill) in self.0.get(touched.clone()).unwrap_or_default() {
            for part in [known.start..known.end.min(range.start), known.start.max(range.end)..known.end] {
                if part.start < part.end {
                    kept.push((part, *fill));
                }
            }
        }
        self.0.splice(touched, kept);
    }

    /// Indices of the ranges that have bytes in common with `range`.
    fn touched(&self, range: &Range<u64>) -> Range<usize> {
        let first = self.0.partition_point(|(known, _)| known.end <= range.start);
        let end = self.0.partition_point(|(known, _)| known.start < range.end);
        first..end.max(first)
    }

    /// What is known within `range`.
    pub fn within(&self, range: &Range<u64>) -> Vec<(Range<u64>, Fill)> {
        let known = self.0.get(self.touched(range)).unwrap_or_default().iter();
        known.map(|(part, fill)| (part.start.max(range.start)..part.end.min(range.end), *fill)).collect()
    }
}

/// Where bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The first of them, on the disk.
    pub offset: u64,
    /// What is there.
    pub found: u8,
    /// What should be there.
    pub expected: u8,
    /// How many there are.
    pub bytes: u64,
}

/// Compares `bytes`, which stand at `offset`, with `fill`.
pub fn compare(fill: Fill, offset: u64, bytes: &[u8]) -> Option<Mismatch> {
    let mut expected = vec![0; bytes.len()];
    fill.fill(offset, &mut expected);
    if expected == bytes {
        return None;
    }
    let mut found: Option<Mismatch> = None;
    for (index, (is, should)) in bytes.iter().zip(&expected).enumerate().filter(|(_, (a, b))| a != b) {
        let first = Mismatch { offset: offset + index as u64, found: *is, expected: *should, bytes: 0 };
        found.get_or_insert(first).bytes += 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_write_counts() {
        let (a, b, c) = (Fill::Byte(1), Fill::Byte(2), Fill::Seed(3));
        let mut written = Written::default();
        written.set(0..100, a);
        written.set(200..300, a);
        written.set(50..250, b);
        assert_eq!(written.within(&(0..1000)), [(0..50, a), (50..250, b), (250..300, a)]);
        written.set(60..70, c);
        written.forget(&(240..260));
        assert_eq!(written.within(&(55..262)), [(55..60, b), (60..70, c), (70..240, b), (260..262, a)]);
        written.set(0..0, c);
        written.forget(&(5..5));
        written.set(0..1000, c);
        assert_eq!(written.within(&(0..2000)), [(0..1000, c)]);
    }

    #[test]
    fn differences_are_counted_from_the_first() {
        let mut bytes = vec![7; 100];
        assert_eq!(compare(Fill::Byte(7), 1000, &bytes), None);
        (bytes[10], bytes[20]) = (8, 9);
        let found = Mismatch { offset: 1010, found: 8, expected: 7, bytes: 2 };
        assert_eq!(compare(Fill::Byte(7), 1000, &bytes), Some(found));
    }
}
