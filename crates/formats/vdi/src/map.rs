//! Lookup: from guest offsets to places in the file, through cached pages of the block map.

use crate::header::{FORMAT, FREE, Header, ZERO};
use crate::layout::{Entries, Layout};
use crate::write::Writer;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vellum_core::storage::past_end;
use vellum_core::{
    BoxFuture, Code, Error, Events, Extent, Image, ImageInfo, Lookup, OpenRequest, Result, Storage,
    TableCache, WritableImage, bytes,
};

/// Least table cache of an image that is written: half may be dirty, and one more page and the header must fit.
const TABLE_BYTES_MIN: usize = 512 << 10;

/// An open image.
pub(crate) struct VdiImage {
    pub(crate) info: ImageInfo,
    pub(crate) storages: [Arc<dyn Storage>; 1],
    /// Pages of the map and, while the image is written, the sector of the header.
    pub(crate) table: TableCache,
    pub(crate) layout: Layout,
    /// Grows and shrinks with the image.
    pub(crate) file_len: AtomicU64,
    pub(crate) events: Events,
    /// `cBlocksAllocated` as it was when the image was opened.
    counter: u32,
    /// A counter that is behind was told of, or is ours and always right.
    pub(crate) knows_counter: AtomicBool,
    /// There if the image was opened for writing.
    pub(crate) writer: Option<Writer>,
}

/// What the first entry of a run says; later entries continue it or end it.
#[derive(Clone, Copy)]
pub(crate) enum Run {
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
    pub(crate) fn new(request: OpenRequest, info: ImageInfo, header: &Header, file_len: u64) -> Result<Self> {
        let layout = Layout::new(header, info.virtual_size, file_len)?;
        // A change needs the page of the map and the header at once.
        let budget = request.limits.table_cache_bytes.max(if request.write { TABLE_BYTES_MIN } else { 0 });
        let table = TableCache::new(request.storage.clone(), budget);
        let writer = request.write.then(|| Writer::new(&request, header));
        Ok(VdiImage {
            info,
            storages: [request.storage],
            table,
            layout,
            file_len: AtomicU64::new(file_len),
            events: request.events,
            counter: header.c_blocks_allocated,
            knows_counter: AtomicBool::new(false),
            writer,
        })
    }

    /// The entries of the map from that of `block` to the end of its page.
    pub(crate) async fn entries(&self, block: u64) -> Result<Entries> {
        let (key, len, at) = self.layout.page_of(block)?;
        Ok(Entries { key, at: bytes::wide(at), page: self.table.load(key, len).await? })
    }

    /// Where the data of `entry` starts, checked for guest block `block`.
    fn data_at(&self, block: u64, entry: u32) -> Result<u64> {
        match self.layout.check(block, entry, self.file_len.load(Ordering::Acquire)) {
            Ok(start) => {
                if entry >= self.counter {
                    self.warn_of_counter();
                }
                Ok(start)
            }
            Err(code) => Err(self.bad_entry(code, block, entry)),
        }
    }

    /// A crash between map and header leaves the counter behind (24 of 72 states of QEMU's writer). It is advisory;
    /// what it says is no reason to withhold data that is there.
    #[cold]
    fn warn_of_counter(&self) {
        if !self.knows_counter.swap(true, Ordering::Relaxed) {
            let allocated = self.counter;
            self.events.warn(&format!(
                "{}: the map has blocks past cBlocksAllocated ({allocated}), as a crash of the writer leaves it; they are read",
                self.info.name
            ));
        }
    }

    #[cold]
    pub(crate) fn bad_entry(&self, code: Code, block: u64, entry: u32) -> Error {
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
        Error::new(code, message)
            .image(&self.info.name)
            .format(FORMAT)
            .field("block map entry")
            .at(self.layout.entry_at(block))
            .found(format!("block {entry} for guest block {block}"))
            .allowed(format!(
                "0 to {} in a file of {} bytes, FREE, ZERO",
                i64::from(self.layout.blocks).saturating_sub(1),
                self.file_len.load(Ordering::Acquire)
            ))
            .hint(hint)
    }

    fn start(&self, block: u64, entry: u32) -> Result<Run> {
        match entry {
            FREE => Ok(Run::Parent),
            ZERO => Ok(Run::Zero),
            _ => Ok(Run::Data { next: entry.saturating_add(1), offset: self.data_at(block, entry)? }),
        }
    }

    /// The run with `entry` added, or `None` if it ends before it.
    fn extend(&self, run: Run, block: u64, entry: u32) -> Option<Run> {
        match run {
            Run::Parent => (entry == FREE).then_some(run),
            Run::Zero => (entry == ZERO).then_some(run),
            Run::Data { next, offset } => {
                // With private data between them, neighbours in the file are not neighbours on the disk.
                let continues = entry == next && self.layout.extra == 0 && self.data_at(block, entry).is_ok();
                continues.then_some(Run::Data { next: next.saturating_add(1), offset })
            }
        }
    }

    /// The run that starts at block `first` and the block that ends it (at most `last`); `None` if not cached.
    fn run(&self, first: u64, last: u64) -> Result<Option<(Run, u64)>> {
        let mut run: Option<Run> = None;
        let mut block = first;
        while block < last {
            let (key, _, at) = self.layout.page_of(block)?;
            let Some(page) = self.table.get(key) else { break };
            let (entries, _) = page.get(at..).unwrap_or_default().as_chunks::<4>();
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

    /// What the map says of the start of `range` (clipped to the disk), and for how many bytes; `None` if not cached.
    pub(crate) fn find(&self, range: Range<u64>) -> Result<Option<(u64, Run)>> {
        let end = range.end.min(self.info.virtual_size);
        if range.start >= end {
            return Err(past_end(&self.info.name, range.start, 0, self.info.virtual_size));
        }
        let block = self.layout.block;
        let last = bytes::div_ceil(end, block)?;
        let Some((run, stop)) = self.run(bytes::div(range.start, block)?, last)? else { return Ok(None) };
        let len = bytes::sub(bytes::mul(stop, block)?.min(end), range.start)?;
        let run = match run {
            Run::Data { next, offset } => {
                Run::Data { next, offset: bytes::add(offset, bytes::rem(range.start, block)?)? }
            }
            other => other,
        };
        Ok(Some((len, run)))
    }
}

impl Image for VdiImage {
    fn info(&self) -> &ImageInfo {
        self.writer.as_ref().and_then(|writer| writer.told.get()).unwrap_or(&self.info)
    }
    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn map(&self, range: Range<u64>) -> Result<Lookup> {
        let Some((len, run)) = self.find(range)? else { return Ok(Lookup::Miss) };
        let extent = match run {
            Run::Parent => Extent::Parent,
            Run::Zero => Extent::Zero,
            Run::Data { offset, .. } => Extent::Raw { storage: 0, offset },
        };
        Ok(Lookup::Found { len, extent })
    }

    fn load(&self, range: Range<u64>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let (key, len, _) = self.layout.page_of(bytes::div(range.start, self.layout.block)?)?;
            self.table.load(key, len).await?;
            Ok(())
        })
    }

    fn writable(&self) -> Option<&dyn WritableImage> {
        self.writer.as_ref().map(|_| -> &dyn WritableImage { self })
    }
}
