//! Where things lie in the file. All numbers were checked against each other and the file by `header::parse`.

use crate::header::{FREE, Header, ZERO};
use std::sync::Arc;
use vellum_core::{Code, Result, bytes};

/// Bytes of a page of the map: 16384 entries, 16 GiB of guest data with blocks of 1 MiB.
pub(crate) const PAGE: u64 = 64 << 10;
/// What a disk writes whole.
const SECTOR: u64 = 512;

/// Offsets and sizes, in bytes but for `blocks`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) off_blocks: u64,
    pub(crate) off_data: u64,
    /// Guest bytes of a block.
    pub(crate) block: u64,
    /// Private data before each block.
    pub(crate) extra: u64,
    /// From one slot to the next.
    pub(crate) stride: u64,
    /// `cBlocks`: entries of the map, and more slots than that there cannot be.
    pub(crate) blocks: u32,
    /// Size of the disk.
    pub(crate) virtual_size: u64,
    /// Where the pages of the map end: neither header nor data is ever in one of them.
    table_end: u64,
}

impl Layout {
    /// The layout of a file that has `file_len` bytes.
    pub(crate) fn new(header: &Header, virtual_size: u64, file_len: u64) -> Result<Self> {
        let map_end = bytes::add(header.off_blocks, bytes::mul(header.c_blocks.into(), 4)?)?;
        let table_end = bytes::align_up(map_end, SECTOR)?.min(header.off_data).min(file_len).max(map_end);
        Ok(Layout {
            off_blocks: header.off_blocks,
            off_data: header.off_data,
            block: header.cb_block.into(),
            extra: header.cb_block_extra.into(),
            stride: header.stride(),
            blocks: header.c_blocks,
            virtual_size,
            table_end,
        })
    }

    /// Where the slot starts, with its private data. (32 bits times 2^29 bytes do not overflow.)
    pub(crate) fn slot_at(&self, slot: u32) -> u64 {
        u64::from(slot).saturating_mul(self.stride).saturating_add(self.off_data)
    }

    /// Where the data in the slot starts.
    pub(crate) fn data_at(&self, slot: u32) -> u64 {
        self.slot_at(slot).saturating_add(self.extra)
    }

    /// Where the entry of `block` stands.
    pub(crate) fn entry_at(&self, block: u64) -> u64 {
        block.saturating_mul(4).saturating_add(self.off_blocks)
    }

    /// The page that holds the entry of `block`: byte offset and length of the page, and offset of the entry in it.
    pub(crate) fn page_of(&self, block: u64) -> Result<(u64, usize, usize)> {
        let at = self.entry_at(block);
        let boundary = bytes::sub(at, bytes::rem(at, PAGE)?)?;
        let key = boundary.max(self.off_blocks);
        let end = bytes::add(boundary, PAGE)?.min(self.table_end);
        Ok((key, bytes::index(bytes::sub(end, key)?)?, bytes::index(bytes::sub(at, key)?)?))
    }

    /// Checks that `slot` is in a file of `file_len` bytes, as far as a guest can see guest block `block`.
    pub(crate) fn check(&self, block: u64, slot: u32, file_len: u64) -> std::result::Result<u64, Code> {
        let start = self.data_at(slot);
        let guest = block.saturating_mul(self.block);
        let visible = self.block.min(self.virtual_size.saturating_sub(guest));
        if start >= file_len {
            Err(Code::OutOfFile)
        } else if slot >= self.blocks {
            Err(Code::Corrupt)
        } else if start.saturating_add(visible) > file_len {
            Err(Code::Truncated)
        } else {
            Ok(start)
        }
    }
}

/// The entries of one cached page, from one of them on.
pub(crate) struct Entries {
    /// Offset of the page.
    pub(crate) key: u64,
    /// Offset of the first entry in the page.
    pub(crate) at: u64,
    pub(crate) page: Arc<[u8]>,
}

impl Entries {
    /// The entries up to the end of the page (and of the map, if the caller counts).
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let rest = bytes::index(self.at).ok().and_then(|at| self.page.get(at..)).unwrap_or_default();
        rest.as_chunks::<4>().0.iter().map(|entry| u32::from_le_bytes(*entry))
    }
}

/// The slot that an entry names, if it is one.
pub(crate) fn slot_of(entry: u32) -> Option<u32> {
    (entry != FREE && entry != ZERO).then_some(entry)
}
