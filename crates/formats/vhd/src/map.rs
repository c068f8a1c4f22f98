//! Lookup: BAT and sector bitmaps, both through cached pages.

use crate::alloc::Writing;
use crate::header::{ABSENT, DYNAMIC_BYTES, FOOTER_BYTES, FORMAT};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vellum_core::storage::past_end;
use vellum_core::{
    BoxFuture, Code, Error, Extent, Image, ImageInfo, Lookup, OpenRequest, Result, Storage, TableCache,
    WritableImage, bytes,
};

/// Bytes of a page of the BAT: 16384 entries, 32 GiB of guest data with blocks of 2 MiB.
const PAGE: u64 = 64 << 10;
pub(crate) const SECTOR: u64 = 512;
/// Blocks up to which it is remembered which of them are whole (1 MiB of memory).
const WHOLE_MAX: u64 = 8 << 20;

/// An open image.
pub(crate) struct VhdImage {
    pub(crate) info: ImageInfo,
    pub(crate) storages: [Arc<dyn Storage>; 1],
    pub(crate) tables: Option<Tables>,
    pub(crate) writing: Option<Writing>,
}

/// Where things lie in a dynamic or differencing image; checked against each other and the file.
pub(crate) struct Sparse {
    pub(crate) table_offset: u64,
    pub(crate) table_bytes: u64,
    /// Byte offset of the dynamic header.
    pub(crate) header_at: u64,
    pub(crate) block: u64,
    pub(crate) bitmap_bytes: u64,
    /// Bytes of the disk.
    pub(crate) virtual_size: u64,
    /// Length of the file when it was opened.
    pub(crate) file_len: u64,
    pub(crate) differencing: bool,
    /// Where the names of the parent are stored.
    pub(crate) locators: Vec<Range<u64>>,
}

/// The tables of a dynamic or differencing image.
pub(crate) struct Tables {
    pub(crate) layout: Sparse,
    /// Where the footer starts, or the end of the file if it is gone. Moves while the image is written.
    pub(crate) data_end: AtomicU64,
    /// Pages of the BAT and bitmaps. No bitmap starts where a page of the BAT does: it would lie in the BAT.
    pub(crate) cache: TableCache,
    /// A bit for each block: its bitmap was seen and says that all of it is here. Empty for very many blocks.
    whole: Vec<AtomicU64>,
}

/// Where the start of a guest range lives.
pub(crate) enum Spot {
    /// A page of the BAT or a bitmap is not in memory.
    Miss,
    /// No block is there for the first `len` bytes.
    Absent {
        /// Bytes from the start of the range.
        len: u64,
    },
    /// There is a block, but the first `len` bytes are not in it.
    Clear {
        /// Bytes from the start of the range.
        len: u64,
    },
    /// The first `len` bytes are at byte `offset` of the file.
    Here {
        /// Bytes from the start of the range.
        len: u64,
        /// Byte offset of the first.
        offset: u64,
    },
}

impl Sparse {
    /// Bytes of a block with its bitmap.
    pub(crate) fn slot_bytes(&self) -> u64 {
        self.bitmap_bytes.saturating_add(self.block)
    }

    /// Blocks of the disk; the BAT may have entries for more.
    pub(crate) fn blocks(&self) -> u64 {
        self.virtual_size.div_ceil(self.block.max(1))
    }

    /// Guest bytes of `block` that the disk shows.
    pub(crate) fn visible(&self, block: u64) -> u64 {
        self.block.min(self.virtual_size.saturating_sub(block.saturating_mul(self.block)))
    }

    /// What a block takes of the file: its bitmap, and its data as far as the disk shows it.
    pub(crate) fn extent(&self, block: u64, entry: u32) -> Range<u64> {
        let start = u64::from(entry).saturating_mul(SECTOR);
        start..start.saturating_add(self.bitmap_bytes).saturating_add(self.visible(block))
    }

    /// What is neither block nor footer at the end.
    pub(crate) fn structures(&self) -> impl Iterator<Item = Range<u64>> {
        let table_end = self.table_offset.saturating_add(self.table_bytes);
        let header_end = self.header_at.saturating_add(DYNAMIC_BYTES);
        [0..FOOTER_BYTES, self.header_at..header_end, self.table_offset..table_end].into_iter()
    }

    /// What is wrong with the place of a block, if data must end at `data_end`.
    pub(crate) fn fault(&self, extent: &Range<u64>, data_end: u64) -> Option<Code> {
        if self.structures().any(|taken| extent.start < taken.end && taken.start < extent.end) {
            Some(Code::Overlap)
        } else if extent.start >= data_end {
            Some(Code::OutOfFile)
        } else if extent.end > data_end {
            Some(Code::Truncated)
        } else {
            None
        }
    }

    /// The page of the BAT that holds the entry of `block`, and where in it. Pages begin on sectors of the file, so
    /// that a sector of a page is one of the file.
    pub(crate) fn page_of(&self, block: u64) -> Result<(u64, usize)> {
        let base = bytes::sub(self.table_offset, bytes::rem(self.table_offset, SECTOR)?)?;
        let at = bytes::add(self.table_offset, bytes::mul(block, 4)?)?;
        let within = bytes::rem(bytes::sub(at, base)?, PAGE)?;
        Ok((bytes::sub(at, within)?, bytes::index(within)?))
    }

    /// Bytes of the page of the BAT at `key`: always the same.
    pub(crate) fn page_bytes(&self, key: u64) -> Result<usize> {
        let end = bytes::align_up(bytes::add(self.table_offset, self.table_bytes)?, SECTOR)?;
        bytes::index(PAGE.min(bytes::sub(end.min(self.file_len), key)?))
    }
}

impl VhdImage {
    /// Where the bitmap of `block` starts, after `entry` was checked.
    pub(crate) fn bitmap_at(&self, tables: &Tables, block: u64, entry: u32) -> Result<u64> {
        let extent = tables.layout.extent(block, entry);
        let data_end = tables.data_end.load(Ordering::Acquire);
        match tables.layout.fault(&extent, data_end) {
            None => Ok(extent.start),
            Some(code) => {
                let error = bad_entry(&tables.layout, data_end, code, block, entry);
                Err(error.image(&self.info.name).hint(hint(code)))
            }
        }
    }

    /// Where the start of `range` lives; `range` lies on the disk.
    pub(crate) fn find(&self, tables: &Tables, range: Range<u64>) -> Result<Spot> {
        let layout = &tables.layout;
        let block = bytes::div(range.start, layout.block)?;
        let Some(entry) = tables.entry(block)? else { return Ok(Spot::Miss) };
        if entry == ABSENT {
            let last = bytes::div_ceil(range.end, layout.block)?;
            let stop = tables.absent_until(block, last)?;
            let end = bytes::mul(stop, layout.block)?.min(range.end);
            return Ok(Spot::Absent { len: bytes::sub(end, range.start)? });
        }
        let start = self.bitmap_at(tables, block, entry)?;
        let guest = bytes::mul(block, layout.block)?;
        let within = bytes::sub(range.start, guest)?;
        let end = range.end.min(bytes::add(guest, layout.block)?);
        let offset = bytes::add(bytes::add(start, layout.bitmap_bytes)?, within)?;
        if tables.is_whole(block) {
            return Ok(Spot::Here { len: bytes::sub(end, range.start)?, offset });
        }
        let Some(bitmap) = tables.cache.get(start) else { return Ok(Spot::Miss) };
        let sectors = bytes::div(within, SECTOR)?..bytes::div_ceil(bytes::sub(end, guest)?, SECTOR)?;
        let (here, stop) = run_of_bits(&bitmap, sectors)?;
        let stop = bytes::add(guest, bytes::mul(stop, SECTOR)?)?.min(end);
        let len = bytes::sub(stop, range.start)?;
        Ok(if here { Spot::Here { len, offset } } else { Spot::Clear { len } })
    }

    fn map_sparse(&self, tables: &Tables, range: Range<u64>) -> Result<Lookup> {
        let elsewhere = if tables.layout.differencing { Extent::Parent } else { Extent::Zero };
        Ok(match self.find(tables, range)? {
            Spot::Miss => Lookup::Miss,
            Spot::Absent { len } | Spot::Clear { len } => Lookup::Found { len, extent: elsewhere },
            Spot::Here { len, offset } => Lookup::Found { len, extent: Extent::Raw { storage: 0, offset } },
        })
    }

    async fn load_sparse(&self, tables: &Tables, start: u64) -> Result<()> {
        let block = bytes::div(start, tables.layout.block)?;
        match tables.load_entry(block).await? {
            ABSENT => Ok(()),
            entry => {
                let start = self.bitmap_at(tables, block, entry)?;
                tables.load_bitmap(block, start).await.map(|_| ())
            }
        }
    }
}

/// A BAT entry that names a place where no block can be.
#[cold]
pub(crate) fn bad_entry(layout: &Sparse, data_end: u64, code: Code, block: u64, entry: u32) -> Error {
    let message = match code {
        Code::Overlap => "a block lies in the headers or the BAT",
        Code::OutOfFile => "a block lies past the end of the file",
        _ => "the file ends inside a block",
    };
    Error::new(code, message)
        .format(FORMAT)
        .field("BAT entry")
        .at(layout.table_offset.saturating_add(block.saturating_mul(4)))
        .found(format!("sector {entry} for guest block {block}"))
        .allowed(format!("a place between the tables and byte {data_end}, or absent"))
}

/// What to do about it when the block is to be read.
fn hint(code: Code) -> &'static str {
    match code {
        Code::Overlap => "the BAT is damaged: restore a backup",
        Code::OutOfFile => {
            "the file was cut off or the BAT is damaged: restore a backup, or copy what else can be read"
        }
        _ => "the file was cut off: copy it again from where it came from, or restore a backup",
    }
}

impl Tables {
    /// The tables of an image whose data ends at `data_end`.
    pub(crate) fn new(request: &OpenRequest, layout: Sparse, data_end: u64) -> Self {
        // A lookup needs a page of the BAT and a bitmap at the same time.
        let least = bytes::index(PAGE.saturating_add(layout.bitmap_bytes)).unwrap_or(usize::MAX);
        let cache = TableCache::new(request.storage.clone(), request.limits.table_cache_bytes.max(least));
        let words = if layout.blocks() <= WHOLE_MAX { layout.blocks().div_ceil(64) } else { 0 };
        let whole = (0..words).map(|_| AtomicU64::new(0)).collect();
        Tables { layout, data_end: AtomicU64::new(data_end), cache, whole }
    }

    /// Whether it is known that all of `block` is here.
    fn is_whole(&self, block: u64) -> bool {
        let word = usize::try_from(block >> 6).ok().and_then(|word| self.whole.get(word));
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (block & 63) & 1 != 0)
    }

    /// Takes note that all of `block` is here, or that this is not known any more.
    pub(crate) fn set_whole(&self, block: u64, is_whole: bool) {
        let Some(word) = usize::try_from(block >> 6).ok().and_then(|word| self.whole.get(word)) else {
            return;
        };
        let bit = 1u64 << (block & 63);
        match is_whole {
            true => word.fetch_or(bit, Ordering::AcqRel),
            false => word.fetch_and(!bit, Ordering::AcqRel),
        };
    }

    /// The entry of `block`, if its page is cached.
    fn entry(&self, block: u64) -> Result<Option<u32>> {
        let (key, within) = self.layout.page_of(block)?;
        let page = self.cache.get(key);
        Ok(page.and_then(|page| bytes::array(&page, within).map(u32::from_be_bytes)))
    }

    /// The entry of `block`; its page is loaded if need be.
    pub(crate) async fn load_entry(&self, block: u64) -> Result<u32> {
        let (key, within) = self.layout.page_of(block)?;
        let page = self.cache.load(key, self.layout.page_bytes(key)?).await?;
        Ok(bytes::array(&page, within).map_or(ABSENT, u32::from_be_bytes))
    }

    /// The bitmap of `block`, which starts at byte `start`.
    pub(crate) async fn load_bitmap(&self, block: u64, start: u64) -> Result<Arc<[u8]>> {
        let bitmap = self.cache.load(start, bytes::index(self.layout.bitmap_bytes)?).await?;
        let sectors = self.layout.visible(block).div_ceil(SECTOR);
        if sectors > 0 && run_of_bits(&bitmap, 0..sectors)? == (true, sectors) {
            self.set_whole(block, true);
        }
        Ok(bitmap)
    }

    /// The first block after `first`, which is absent, that is not known to be absent, too; at most `last`.
    pub(crate) fn absent_until(&self, first: u64, last: u64) -> Result<u64> {
        let mut block = bytes::add(first, 1)?;
        while block < last {
            let (key, within) = self.layout.page_of(block)?;
            let Some(page) = self.cache.get(key) else { break };
            let (entries, _) = page.get(within..).unwrap_or_default().as_chunks::<4>();
            if entries.is_empty() {
                break;
            }
            let run = entries.iter().take_while(|entry| u32::from_be_bytes(**entry) == ABSENT).count();
            block = bytes::add(block, bytes::wide(run))?.min(last);
            if run < entries.len() {
                break;
            }
        }
        Ok(block)
    }
}

/// The value of the bit of the first sector, and the first sector that has another, at most `sectors.end`.
fn run_of_bits(bitmap: &[u8], sectors: Range<u64>) -> Result<(bool, u64)> {
    let byte_of = |sector: u64| -> Result<u8> {
        let byte = bitmap.get(bytes::index(sector >> 3)?).copied();
        byte.ok_or_else(|| Error::new(Code::Corrupt, "a bitmap is shorter than its block").format(FORMAT))
    };
    let bit = |sector: u64| -> Result<bool> { Ok(byte_of(sector)? & (0x80 >> (sector & 7)) != 0) };
    let first = bit(sectors.start)?;
    let whole = if first { 0xff } else { 0 };
    let mut sector = bytes::add(sectors.start, 1)?;
    while sector < sectors.end {
        if sector & 7 == 0 && byte_of(sector)? == whole {
            sector = bytes::add(sector, 8)?;
        } else if bit(sector)? == first {
            sector = bytes::add(sector, 1)?;
        } else {
            break;
        }
    }
    Ok((first, sector.min(sectors.end)))
}

impl Image for VhdImage {
    fn info(&self) -> &ImageInfo {
        self.writing.as_ref().and_then(|writing| writing.told.get()).unwrap_or(&self.info)
    }
    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn map(&self, range: Range<u64>) -> Result<Lookup> {
        let end = range.end.min(self.info.virtual_size);
        if range.start >= end {
            return Err(past_end(&self.info.name, range.start, 0, self.info.virtual_size));
        }
        match &self.tables {
            Some(tables) => self.map_sparse(tables, range.start..end),
            None => {
                let len = bytes::sub(end, range.start)?;
                Ok(Lookup::Found { len, extent: Extent::Raw { storage: 0, offset: range.start } })
            }
        }
    }

    fn load(&self, range: Range<u64>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            match &self.tables {
                Some(tables) => self.load_sparse(tables, range.start).await,
                None => Ok(()),
            }
        })
    }

    fn writable(&self) -> Option<&dyn WritableImage> {
        match &self.writing {
            Some(_) => Some(self),
            None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits_end_where_the_value_changes() {
        let bitmap = [0b1110_0000, 0xff, 0x00, 0b0000_0001];
        assert_eq!(run_of_bits(&bitmap, 0..32).unwrap(), (true, 3));
        assert_eq!(run_of_bits(&bitmap, 3..32).unwrap(), (false, 8));
        assert_eq!(run_of_bits(&bitmap, 8..32).unwrap(), (true, 16));
        assert_eq!(run_of_bits(&bitmap, 9..12).unwrap(), (true, 12));
        assert_eq!(run_of_bits(&bitmap, 16..32).unwrap(), (false, 31));
        assert_eq!(run_of_bits(&bitmap, 31..32).unwrap(), (true, 32));
        assert!(run_of_bits(&bitmap, 32..33).is_err());
    }
}
