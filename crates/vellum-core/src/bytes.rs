//! Checked access to bytes and checked arithmetic for parsers, whose lints forbid indexing and bare operators.

use crate::{Code, Error, Result};

/// `N` bytes at `offset`, if they are there.
pub fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

/// The little-endian 32-bit entry number `index` of a table.
pub fn le32(table: &[u8], index: usize) -> Option<u32> {
    array(table, index.checked_mul(4)?).map(u32::from_le_bytes)
}
/// The big-endian 32-bit entry number `index` of a table.
pub fn be32(table: &[u8], index: usize) -> Option<u32> {
    array(table, index.checked_mul(4)?).map(u32::from_be_bytes)
}
/// The little-endian 64-bit entry number `index` of a table.
pub fn le64(table: &[u8], index: usize) -> Option<u64> {
    array(table, index.checked_mul(8)?).map(u64::from_le_bytes)
}
/// The big-endian 64-bit entry number `index` of a table.
pub fn be64(table: &[u8], index: usize) -> Option<u64> {
    array(table, index.checked_mul(8)?).map(u64::from_be_bytes)
}

#[cold]
fn overflow() -> Error {
    Error::new(Code::Overflow, "sizes or offsets of the image exceed what 64 bits can hold")
        .hint("the image is damaged or made to mislead; restore it from a backup")
}

/// `a + b`, or `OVERFLOW`.
pub fn add(a: u64, b: u64) -> Result<u64> {
    a.checked_add(b).ok_or_else(overflow)
}
/// `a - b`, or `OVERFLOW`.
pub fn sub(a: u64, b: u64) -> Result<u64> {
    a.checked_sub(b).ok_or_else(overflow)
}
/// `a * b`, or `OVERFLOW`.
pub fn mul(a: u64, b: u64) -> Result<u64> {
    a.checked_mul(b).ok_or_else(overflow)
}
/// `a / b`, or `OVERFLOW` for a zero divisor.
pub fn div(a: u64, b: u64) -> Result<u64> {
    a.checked_div(b).ok_or_else(overflow)
}
/// `a / b` rounded up, or `OVERFLOW` for a zero divisor.
pub fn div_ceil(a: u64, b: u64) -> Result<u64> {
    if b == 0 { Err(overflow()) } else { Ok(a.div_ceil(b)) }
}
/// `a % b`, or `OVERFLOW` for a zero divisor.
pub fn rem(a: u64, b: u64) -> Result<u64> {
    a.checked_rem(b).ok_or_else(overflow)
}
/// `a` rounded up to a multiple of `b`, or `OVERFLOW`.
pub fn align_up(a: u64, b: u64) -> Result<u64> {
    if b == 0 { Err(overflow()) } else { a.checked_next_multiple_of(b).ok_or_else(overflow) }
}
/// `value` as an index into memory, or `OVERFLOW`.
pub fn index(value: u64) -> Result<usize> {
    usize::try_from(value).map_err(|_| overflow())
}
/// `value` as 64 bits (always fits on the machines that Vellum builds for).
pub fn wide(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}
/// `value` in 32 bits, or `OVERFLOW`.
pub fn narrow(value: u64) -> Result<u32> {
    u32::try_from(value).map_err(|_| overflow())
}

/// Whether every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Blocks of 64 bytes, OR-ed together, which the compiler turns into vector instructions.
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks.iter().all(|block| block.iter().fold(0u8, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_seen_at_every_position() {
        let mut bytes = vec![0u8; 1000];
        assert!(is_zero(&bytes));
        for i in 0..bytes.len() {
            bytes[i] = 1;
            assert!(!is_zero(&bytes), "{i}");
            bytes[i] = 0;
        }
    }

    #[test]
    fn entries_outside_the_table_are_none() {
        assert_eq!(be32(&[0, 0, 0, 1, 0, 0, 0], 0), Some(1));
        assert_eq!(be32(&[0, 0, 0, 1, 0, 0, 0], 1), None);
        assert_eq!(le64(&[0; 8], usize::MAX), None);
    }
}
