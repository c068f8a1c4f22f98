//! Directories and tables of all sparse extents of a disk, in one cache.
//!
//! A page is an aligned piece of an extent's *file*, not a table: grain tables lie close together, so one read brings
//! in several, and a table that a hostile directory lays over another one is just the same bytes.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use vellum_core::bytes::{add, index, is_zero, rem, sub, wide};
use vellum_core::storage::{past_end, read_only};
use vellum_core::{
    Buf, Code, Completion, Error, Preallocate, Result, Status, Storage, StorageLimits, TableCache, WithBuf,
    WriteFlags, ZeroMode,
};

/// Bytes of a page.
const PAGE: u64 = 16 << 10;
/// Bits of an offset in one file; the number of the file stands above.
const FILE_BITS: u32 = 48;
/// Greatest length of a file with tables: 32-bit sectors reach 2 TiB, seSparse 64 TiB and its tables.
pub(crate) const FILE_BYTES_MAX: u64 = 1 << FILE_BITS;
/// The cache holds at least the pages that one lookup needs at the same time.
const BUDGET_MIN: usize = 256 << 10;

/// The cached pages of all files.
pub(crate) struct Tables {
    cache: TableCache,
}

/// Why a table entry was not found.
pub(crate) enum Stop {
    /// The page that starts at this address is not in memory.
    Miss(Page),
    /// The image is damaged.
    Bad(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Bad(error)
    }
}

/// A page: where it stands and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    address: u64,
    len: usize,
}

/// A page that stays in hand from one entry to the next.
#[derive(Default)]
pub(crate) struct Held(Option<(u64, Arc<[u8]>)>);

impl Tables {
    /// Tables of `files`, whose lengths were checked with [`Tables::admit`].
    pub(crate) fn new(files: Vec<Arc<dyn Storage>>, budget_bytes: usize) -> Self {
        Tables { cache: TableCache::new(Arc::new(Files(files)), budget_bytes.max(BUDGET_MIN)) }
    }

    /// Whether file number `file` of `len` bytes can have tables.
    pub(crate) fn admit(file: usize, len: u64) -> Result<()> {
        if len > FILE_BYTES_MAX {
            return Err(Error::new(Code::Range, "a sparse extent cannot be that long")
                .found(format!("{len} bytes"))
                .allowed(format!("up to {FILE_BYTES_MAX} bytes"))
                .hint("the file is not what its header says"));
        }
        if wide(file) >= 1 << 16 {
            return Err(Error::new(Code::TableLimit, "too many sparse extents")
                .found(file)
                .allowed(1u32 << 16)
                .hint("lower the limit `extents`"));
        }
        Ok(())
    }

    /// The entry of `size` (4 or 8) bytes at byte `offset` of file number `file`, which is `file_len` long.
    pub(crate) fn entry(
        &self,
        held: &mut Held,
        file: usize,
        file_len: u64,
        offset: u64,
        size: u64,
    ) -> Result<u64, Stop> {
        let within = rem(offset, PAGE)?;
        let start = sub(offset, within)?;
        let address = (wide(file) << FILE_BITS) | start;
        let page = match &held.0 {
            Some((at, page)) if *at == address => page,
            _ => {
                let Some(page) = self.cache.get(address) else {
                    let len = index(PAGE.min(file_len.saturating_sub(start)))?;
                    return Err(Stop::Miss(Page { address, len }));
                };
                &held.0.insert((address, page)).1
            }
        };
        let within = index(within)?;
        let end = index(add(wide(within), size)?)?;
        match page.get(within..end) {
            Some(&[a, b, c, d]) => Ok(u64::from(u32::from_le_bytes([a, b, c, d]))),
            Some(&[a, b, c, d, e, f, g, h]) => Ok(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
            _ => Err(Stop::Bad(
                Error::new(Code::OutOfFile, "a table lies past the end of the file")
                    .at(offset)
                    .allowed(format!("inside {file_len} bytes"))
                    .hint("the file is truncated; copy it again from its source"),
            )),
        }
    }

    /// How many zero bytes stand at `offset`, up to `max`, as far as the page in hand shows, in steps of 64.
    pub(crate) fn zeros(held: &Held, offset: u64, max: u64) -> Result<u64> {
        let (Some((_, page)), start) = (&held.0, index(rem(offset, PAGE)?)?) else { return Ok(0) };
        let end = start.saturating_add(index(max.min(PAGE))?).min(page.len());
        let bytes = page.get(start..end).unwrap_or_default();
        let zeros = bytes.chunks(64).take_while(|chunk| is_zero(chunk)).map(<[u8]>::len).sum::<usize>();
        Ok(wide(zeros))
    }

    /// Brings a page into memory.
    pub(crate) async fn load(&self, page: Page) -> Result<()> {
        self.cache.load(page.address, page.len).await.map(drop)
    }
}

/// All files as one address space, for the cache. Read-only.
struct Files(Vec<Arc<dyn Storage>>);

impl Storage for Files {
    fn name(&self) -> &str {
        "grain tables"
    }
    fn len(&self) -> Result<u64> {
        Ok(wide(self.0.len()) << FILE_BITS)
    }
    fn limits(&self) -> StorageLimits {
        StorageLimits { read_only: true, resizable: false, ..StorageLimits::default() }
    }
    fn read_at(&self, buf: Buf, offset: u64) -> Completion<WithBuf> {
        let file = usize::try_from(offset >> FILE_BITS).ok().and_then(|file| self.0.get(file));
        match file {
            Some(file) => file.read_at(buf, offset & (FILE_BYTES_MAX - 1)),
            None => {
                let error = past_end(self.name(), offset, buf.len(), wide(self.0.len()) << FILE_BITS);
                Completion::ready((buf, Err(error)))
            }
        }
    }
    fn write_at(&self, buf: Buf, _offset: u64, _flags: WriteFlags) -> Completion<WithBuf> {
        Completion::ready((buf, Err(read_only(self.name()))))
    }
    fn flush(&self) -> Completion<Result<()>> {
        Completion::ready(Ok(()))
    }
    fn zero(&self, _range: Range<u64>, _mode: ZeroMode) -> Completion<Result<()>> {
        Completion::ready(Err(read_only(self.name())))
    }
    fn discard(&self, _range: Range<u64>) -> Completion<Result<()>> {
        Completion::ready(Err(read_only(self.name())))
    }
    fn status(&self, range: Range<u64>) -> Completion<Result<Vec<(Range<u64>, Status)>>> {
        Completion::ready(Ok(vec![(range, Status::Data)]))
    }
    fn set_len(&self, _len: u64, _preallocate: Preallocate) -> Completion<Result<()>> {
        Completion::ready(Err(read_only(self.name())))
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}
