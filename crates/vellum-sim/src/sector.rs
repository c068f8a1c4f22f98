//! Contents of sectors that say where they belong, so that foreign and stale data is recognised.

use crate::content::mix;
use std::fmt;

const MAGIC: u64 = 0x746f_5373_6853_4d56;

/// Which write made a sector, and for which place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Guest sector that it was written to.
    pub sector: u64,
    /// Number of the write.
    pub write: u64,
}

impl Tag {
    /// The write number of what the image held from the start.
    pub const START: u64 = u64::MAX;
    /// The write number of what the parent holds.
    pub const PARENT: u64 = u64::MAX - 1;
    /// The write number of what the parent's parent holds.
    pub const GRANDPARENT: u64 = u64::MAX - 3;
    /// The write number of what a recovered image is written with.
    pub const RECOVERY: u64 = u64::MAX - 2;

    /// The tag of a whole sector; `None` if it is not one of ours, as it was written.
    pub fn of(bytes: &[u8]) -> Option<Tag> {
        let word = |at: usize| {
            let mut eight = [0u8; 8];
            eight.copy_from_slice(bytes.get(at..at + 8)?);
            Some(u64::from_le_bytes(eight))
        };
        let tag = Tag { sector: word(8)?, write: word(16)? };
        (word(0)? == MAGIC && bytes == sector_bytes(tag.sector, tag.write)).then_some(tag)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sector {} of ", self.sector)?;
        match self.write {
            Tag::START => f.write_str("the image as it was at first"),
            Tag::PARENT => f.write_str("the parent"),
            Tag::GRANDPARENT => f.write_str("the parent's parent"),
            Tag::RECOVERY => f.write_str("the write after the crash"),
            write => write!(f, "request {write}"),
        }
    }
}

/// The content that write number `write` gives to guest sector `sector`.
pub fn sector_bytes(sector: u64, write: u64) -> [u8; 512] {
    let mut bytes = [0u8; 512];
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = match index {
            0 => MAGIC,
            1 => sector,
            2 => write,
            index => mix(mix(sector, write), index as u64),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_read_from_whole_sectors_only() {
        let mut bytes = sector_bytes(7, 3);
        assert_eq!(Tag::of(&bytes), Some(Tag { sector: 7, write: 3 }));
        bytes[300] ^= 1;
        assert_eq!(Tag::of(&bytes), None);
    }
}
