//! Lookup: BAT and sector bitmaps, both through cached pages.

use crate::header::{ABSENT, DYNAMIC_BYTES, FOOTER_BYTES, FORMAT};
use std::ops::Range;
use std::sync::Arc;
use vellum_core::storage::past_end;
use vellum_core::{
    BoxFuture, Code, Error, Extent, Image, ImageInfo, Lookup, OpenRequest, Result, Storage, TableCache, bytes,
};

/// Bytes of a page of the BAT: 16384 entries, 32 GiB of guest data with blocks of 2 MiB.
const PAGE: u64 = 64 << 10;
const SECTOR: u64 = 512;

/// An open image.
pub(crate) struct VhdImage {
    info: ImageInfo,
    storages: [Arc<dyn Storage>; 1],
    tables: Option<Tables>,
}

/// Where things lie in a dynamic or differencing image; checked against each other and the file.
pub(crate) struct Sparse {
    pub(crate) table_offset: u64,
    pub(crate) table_bytes: u64,
    /// Byte offset of the dynamic header.
    pub(crate) header_at: u64,
    pub(crate) block: u64,
    pub(crate) bitmap_bytes: u64,
    /// Where the footer starts, or the end of the file if it is gone.
    pub(crate) data_end: u64,
    pub(crate) file_len: u64,
    pub(crate) differencing: bool,
}

/// The tables of a dynamic or differencing image. Two caches: pages of the BAT and bitmaps differ in length, and a
/// hostile BAT could make one start where the other does.
struct Tables {
    layout: Sparse,
    bat: TableCache,
    bitmaps: TableCache,
}

impl VhdImage {
    /// A fixed image.
    pub(crate) fn fixed(request: &OpenRequest, info: ImageInfo) -> Self {
        VhdImage { info, storages: [request.storage.clone()], tables: None }
    }

    /// A dynamic or differencing image.
    pub(crate) fn sparse(request: &OpenRequest, info: ImageInfo, layout: Sparse) -> Self {
        let half = request.limits.table_cache_bytes / 2;
        let bat = TableCache::new(request.storage.clone(), half);
        let bitmaps = TableCache::new(request.storage.clone(), half);
        let tables = Some(Tables { layout, bat, bitmaps });
        VhdImage { info, storages: [request.storage.clone()], tables }
    }

    /// Where the bitmap of `block` starts, after `entry` was checked.
    fn place(&self, layout: &Sparse, block: u64, entry: u32) -> Result<u64> {
        let start = bytes::mul(entry.into(), SECTOR)?;
        let data = bytes::add(start, layout.bitmap_bytes)?;
        let guest = bytes::mul(block, layout.block)?;
        let visible = layout.block.min(self.info.virtual_size.saturating_sub(guest));
        let end = bytes::add(data, visible)?;
        let table_end = bytes::add(layout.table_offset, layout.table_bytes)?;
        let header_end = bytes::add(layout.header_at, DYNAMIC_BYTES)?;
        let taken = [0..FOOTER_BYTES, layout.header_at..header_end, layout.table_offset..table_end];
        let code = if taken.iter().any(|range| start < range.end && range.start < end) {
            Code::Overlap
        } else if start >= layout.data_end {
            Code::OutOfFile
        } else if end > layout.data_end {
            Code::Truncated
        } else {
            return Ok(start);
        };
        Err(self.bad_entry(layout, code, block, entry))
    }

    #[cold]
    fn bad_entry(&self, layout: &Sparse, code: Code, block: u64, entry: u32) -> Error {
        let (message, hint) = match code {
            Code::Overlap => {
                ("a block lies in the headers or the BAT", "the BAT is damaged: restore a backup")
            }
            Code::OutOfFile => (
                "a block lies past the end of the file",
                "the file was cut off or the BAT is damaged: restore a backup, or copy what else can be read",
            ),
            _ => (
                "the file ends inside a block",
                "the file was cut off: copy it again from where it came from, or restore a backup",
            ),
        };
        Error::new(code, message)
            .image(&self.info.name)
            .format(FORMAT)
            .field("BAT entry")
            .at(layout.table_offset.saturating_add(block.saturating_mul(4)))
            .found(format!("sector {entry} for guest block {block}"))
            .allowed(format!("a place between the tables and byte {}, or absent", layout.data_end))
            .hint(hint)
    }

    fn map_sparse(&self, tables: &Tables, range: Range<u64>) -> Result<Lookup> {
        let layout = &tables.layout;
        let block = bytes::div(range.start, layout.block)?;
        let Some(entry) = tables.entry(block)? else { return Ok(Lookup::Miss) };
        let elsewhere = if layout.differencing { Extent::Parent } else { Extent::Zero };
        if entry == ABSENT {
            let last = bytes::div_ceil(range.end, layout.block)?;
            let stop = tables.absent_until(block, last)?;
            let end = bytes::mul(stop, layout.block)?.min(range.end);
            return Ok(Lookup::Found { len: bytes::sub(end, range.start)?, extent: elsewhere });
        }
        let start = self.place(layout, block, entry)?;
        let Some(bitmap) = tables.bitmaps.get(start) else { return Ok(Lookup::Miss) };
        let guest = bytes::mul(block, layout.block)?;
        let within = bytes::sub(range.start, guest)?;
        let end = range.end.min(bytes::add(guest, layout.block)?);
        let sectors = bytes::div(within, SECTOR)?..bytes::div_ceil(bytes::sub(end, guest)?, SECTOR)?;
        let (here, stop) = run_of_bits(&bitmap, sectors)?;
        let stop = bytes::add(guest, bytes::mul(stop, SECTOR)?)?.min(end);
        let offset = bytes::add(bytes::add(start, layout.bitmap_bytes)?, within)?;
        let extent = if here { Extent::Raw { storage: 0, offset } } else { elsewhere };
        Ok(Lookup::Found { len: bytes::sub(stop, range.start)?, extent })
    }

    async fn load_sparse(&self, tables: &Tables, start: u64) -> Result<()> {
        let layout = &tables.layout;
        let block = bytes::div(start, layout.block)?;
        let (key, within) = tables.page_of(block)?;
        let len = PAGE.min(bytes::sub(layout.file_len, key)?);
        let page = tables.bat.load(key, bytes::index(len)?).await?;
        match bytes::array(&page, within).map(u32::from_be_bytes) {
            None | Some(ABSENT) => Ok(()),
            Some(entry) => {
                let start = self.place(layout, block, entry)?;
                tables.bitmaps.load(start, bytes::index(layout.bitmap_bytes)?).await?;
                Ok(())
            }
        }
    }
}

impl Tables {
    /// The page of the BAT that holds the entry of `block`, and where in it. Pages are aligned in the file.
    fn page_of(&self, block: u64) -> Result<(u64, usize)> {
        let at = bytes::add(self.layout.table_offset, bytes::mul(block, 4)?)?;
        let within = bytes::rem(at, PAGE)?;
        Ok((bytes::sub(at, within)?, bytes::index(within)?))
    }

    /// The entry of `block`, if its page is cached.
    fn entry(&self, block: u64) -> Result<Option<u32>> {
        let (key, within) = self.page_of(block)?;
        let page = self.bat.get(key);
        Ok(page.and_then(|page| bytes::array(&page, within).map(u32::from_be_bytes)))
    }

    /// The first block from `first` on that is not known to be absent, at most `last`.
    fn absent_until(&self, first: u64, last: u64) -> Result<u64> {
        let mut block = first;
        while block < last {
            let (key, within) = self.page_of(block)?;
            let Some(page) = self.bat.get(key) else { break };
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
        &self.info
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
