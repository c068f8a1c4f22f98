//! Lookup: from guest offsets to places in the file, through cached pages of the block map.

use crate::header::{FORMAT, FREE, Header, ZERO};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vellum_core::storage::past_end;
use vellum_core::{
    BoxFuture, Code, Error, Events, Extent, Image, ImageInfo, Lookup, OpenRequest, Result, Storage,
    TableCache, bytes,
};

/// Bytes of a page of the map: 16384 entries, 16 GiB of guest data with blocks of 1 MiB.
const PAGE: u64 = 64 << 10;

/// An open image.
pub(crate) struct VdiImage {
    info: ImageInfo,
    storages: [Arc<dyn Storage>; 1],
    table: TableCache,
    layout: Layout,
    events: Events,
    warned: AtomicBool,
}

/// Where things lie. All numbers were checked against each other and the file by `header::parse`.
struct Layout {
    off_blocks: u64,
    off_data: u64,
    block: u64,
    extra: u64,
    stride: u64,
    allocated: u32,
    blocks: u32,
    file_len: u64,
}

/// What the first entry of a run says; later entries continue it or end it.
#[derive(Clone, Copy)]
enum Run {
    Parent,
    Zero,
    /// The next index that continues the run, and where the first block's data starts.
    Data {
        next: u32,
        offset: u64,
    },
}

impl VdiImage {
    /// An image with the header's layout over the request's storage.
    pub(crate) fn new(request: OpenRequest, info: ImageInfo, header: &Header, file_len: u64) -> Self {
        let layout = Layout {
            off_blocks: header.off_blocks,
            off_data: header.off_data,
            block: header.cb_block.into(),
            extra: header.cb_block_extra.into(),
            stride: header.stride(),
            allocated: header.c_blocks_allocated,
            blocks: header.c_blocks,
            file_len,
        };
        let table = TableCache::new(request.storage.clone(), request.limits.table_cache_bytes);
        let (events, warned) = (request.events, AtomicBool::new(false));
        VdiImage { info, storages: [request.storage], table, layout, events, warned }
    }

    /// The page that holds the entry of `block`: byte offset of the page, and of the entry.
    fn page_of(&self, block: u64) -> Result<(u64, u64)> {
        let at = bytes::add(self.layout.off_blocks, bytes::mul(block, 4)?)?;
        Ok((bytes::sub(at, bytes::rem(at, PAGE)?)?, at))
    }

    /// Where the data of `entry` starts, checked for guest block `block`.
    fn place(&self, block: u64, entry: u32) -> Result<u64> {
        let layout = &self.layout;
        let start = bytes::mul(entry.into(), layout.stride)?;
        let start = bytes::add(bytes::add(layout.off_data, start)?, layout.extra)?;
        let guest = bytes::mul(block, layout.block)?;
        let visible = layout.block.min(self.info.virtual_size.saturating_sub(guest));
        let code = if start >= layout.file_len {
            Code::OutOfFile
        } else if entry >= layout.blocks {
            Code::Corrupt
        } else if bytes::add(start, visible)? > layout.file_len {
            Code::Truncated
        } else {
            if entry >= layout.allocated {
                self.warn_of_counter();
            }
            return Ok(start);
        };
        Err(self.bad_entry(code, block, entry))
    }

    /// A crash between map and header leaves the counter behind (24 of 72 states of QEMU's writer). It is advisory;
    /// what it says is no reason to withhold data that is there.
    #[cold]
    fn warn_of_counter(&self) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            let allocated = self.layout.allocated;
            self.events.warn(&format!(
                "{}: the map has blocks past cBlocksAllocated ({allocated}), as a crash of the writer leaves it; they are read",
                self.info.name
            ));
        }
    }

    #[cold]
    fn bad_entry(&self, code: Code, block: u64, entry: u32) -> Error {
        let (message, hint) = match code {
            Code::OutOfFile => (
                "a block lies past the end of the file",
                "the file was cut off or the map is damaged: restore a backup, or copy what else can be read",
            ),
            Code::Truncated => (
                "the file ends inside a block",
                "the file was cut off: copy it again from where it came from, or restore a backup",
            ),
            _ => (
                "a block has a number that the image cannot have",
                "the map is damaged: restore a backup, or copy what else can be read",
            ),
        };
        let at = self.page_of(block).map_or(self.layout.off_blocks, |(_, at)| at);
        Error::new(code, message)
            .image(&self.info.name)
            .format(FORMAT)
            .field("block map entry")
            .at(at)
            .found(format!("block {entry} for guest block {block}"))
            .allowed(format!(
                "0 to {} in a file of {} bytes, FREE, ZERO",
                i64::from(self.layout.blocks).saturating_sub(1),
                self.layout.file_len
            ))
            .hint(hint)
    }

    fn start(&self, block: u64, entry: u32) -> Result<Run> {
        match entry {
            FREE => Ok(Run::Parent),
            ZERO => Ok(Run::Zero),
            _ => Ok(Run::Data { next: entry.saturating_add(1), offset: self.place(block, entry)? }),
        }
    }

    /// The run with `entry` added, or `None` if it ends before it.
    fn extend(&self, run: Run, block: u64, entry: u32) -> Option<Run> {
        match run {
            Run::Parent => (entry == FREE).then_some(run),
            Run::Zero => (entry == ZERO).then_some(run),
            Run::Data { next, offset } => {
                // With private data between them, neighbours in the file are not neighbours on the disk.
                let continues = entry == next && self.layout.extra == 0 && self.place(block, entry).is_ok();
                continues.then_some(Run::Data { next: next.saturating_add(1), offset })
            }
        }
    }

    /// The run that starts at block `first` and the block that ends it (at most `last`); `None` if not cached.
    fn run(&self, first: u64, last: u64) -> Result<Option<(Run, u64)>> {
        let mut run: Option<Run> = None;
        let mut block = first;
        while block < last {
            let (key, at) = self.page_of(block)?;
            let Some(page) = self.table.get(key) else { break };
            let entries = page.get(bytes::index(bytes::sub(at, key)?)?..).unwrap_or_default();
            let (entries, _) = entries.as_chunks::<4>();
            if entries.is_empty() {
                break;
            }
            for entry in entries.iter().map(|entry| u32::from_le_bytes(*entry)) {
                if block >= last {
                    break;
                }
                match run {
                    None => run = Some(self.start(block, entry)?),
                    Some(so_far) => match self.extend(so_far, block, entry) {
                        Some(longer) => run = Some(longer),
                        None => return Ok(Some((so_far, block))),
                    },
                }
                block = bytes::add(block, 1)?;
            }
        }
        Ok(run.map(|run| (run, block)))
    }
}

impl Image for VdiImage {
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
        let block = self.layout.block;
        let first = bytes::div(range.start, block)?;
        let last = bytes::div_ceil(end, block)?;
        let Some((run, stop)) = self.run(first, last)? else { return Ok(Lookup::Miss) };
        let len = bytes::sub(bytes::mul(stop, block)?.min(end), range.start)?;
        let extent = match run {
            Run::Parent => Extent::Parent,
            Run::Zero => Extent::Zero,
            Run::Data { offset, .. } => {
                Extent::Raw { storage: 0, offset: bytes::add(offset, bytes::rem(range.start, block)?)? }
            }
        };
        Ok(Lookup::Found { len, extent })
    }

    fn load(&self, range: Range<u64>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let (key, _) = self.page_of(bytes::div(range.start, self.layout.block)?)?;
            let len = PAGE.min(bytes::sub(self.layout.file_len, key)?);
            self.table.load(key, bytes::index(len)?).await?;
            Ok(())
        })
    }
}
