//! Counts in a refcount block (sheet section 3): 1 to 64 bits each, big-endian; narrow ones from the least significant
//! end of each byte.

use std::ops::Range;

/// The greatest count of `2^order` bits.
pub(crate) fn greatest(order: u32) -> u64 {
    match order {
        0..=5 => {
            let width = 1u32.checked_shl(order).unwrap_or(0);
            1u64.checked_shl(width).unwrap_or(0).wrapping_sub(1)
        }
        _ => u64::MAX,
    }
}

/// Count number `index` of a block (or a page of one).
pub(crate) fn get(block: &[u8], order: u32, index: usize) -> Option<u64> {
    match order {
        0..=2 => {
            let (byte, shift) = narrow(order, index);
            Some(u64::from(block.get(byte)?.checked_shr(shift)?) & greatest(order))
        }
        _ => {
            let at = wide(order, index);
            Some(block.get(at)?.iter().fold(0, |count, byte| count.wrapping_shl(8) | u64::from(*byte)))
        }
    }
}

/// Sets count number `index`. Bits that do not fit are cut off: callers check.
pub(crate) fn set(block: &mut [u8], order: u32, index: usize, count: u64) -> Option<()> {
    match order {
        0..=2 => {
            let (byte, shift) = narrow(order, index);
            let mask = u8::try_from(greatest(order)).ok()?;
            let low = u8::try_from(count & u64::from(mask)).ok()?;
            let byte = block.get_mut(byte)?;
            *byte = *byte & !mask.checked_shl(shift)? | low.checked_shl(shift)?;
        }
        _ => {
            let target = block.get_mut(wide(order, index))?;
            let bytes = count.to_be_bytes();
            target.copy_from_slice(bytes.get(bytes.len().checked_sub(target.len())?..)?);
        }
    }
    Some(())
}

/// The bytes that hold the counts `indices`.
pub(crate) fn bytes_of(order: u32, indices: &Range<usize>) -> Range<usize> {
    let last = indices.end.saturating_sub(1);
    match order {
        0..=2 => narrow(order, indices.start).0..narrow(order, last).0.saturating_add(1),
        _ => wide(order, indices.start).start..wide(order, last).end,
    }
}

/// Byte and bit of a count of less than a byte.
fn narrow(order: u32, index: usize) -> (usize, u32) {
    let bit = index.saturating_mul(1usize.checked_shl(order).unwrap_or(1));
    (bit / 8, u32::try_from(bit % 8).unwrap_or(0))
}

/// Bytes of a count of whole bytes.
fn wide(order: u32, index: usize) -> Range<usize> {
    let len = 1usize.checked_shl(order.saturating_sub(3)).unwrap_or(1);
    let at = index.saturating_mul(len);
    at..at.saturating_add(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6u32 {
            let most = greatest(order);
            let mut block = [0u8; 256];
            let n = 256 * 8 / (1 << order);
            for index in 0..n {
                set(&mut block, order, index, index as u64 & most).unwrap();
            }
            set(&mut block, order, 3, most).unwrap();
            for index in 0..n {
                let expected = if index == 3 { most } else { index as u64 & most };
                assert_eq!(get(&block, order, index), Some(expected), "order {order}");
            }
            assert_eq!(get(&block, order, n), None);
        }
        assert_eq!((greatest(0), greatest(4), greatest(5)), (1, 65535, u64::from(u32::MAX)));
    }

    #[test]
    fn six_counts_of_one_look_as_in_the_sheet() {
        for (order, bytes) in [(0, &[0x3fu8][..]), (1, &[0x55, 0x05]), (2, &[0x11, 0x11, 0x11])] {
            let mut block = [0u8; 8];
            (0..6).for_each(|index| set(&mut block, order, index, 1).unwrap());
            assert_eq!(&block[..bytes.len()], bytes);
            assert_eq!(bytes_of(order, &(0..6)), 0..bytes.len());
        }
        assert_eq!(bytes_of(4, &(2..5)), 4..10);
    }
}
