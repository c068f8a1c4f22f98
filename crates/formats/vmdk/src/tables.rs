//! Directories and tables of all sparse extents of a disk, in one cache.
//!
//! A page is an aligned piece of an extent's *file*, not a table: grain tables lie close together, so one read brings
//! in several, and a table that a hostile directory lays over another one is just the same bytes.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vellum_core::bytes::{add, index, is_zero, rem, sub, wide};
use vellum_core::storage::{past_end, read_only};
use vellum_core::{
    Buf, Code, Completion, Error, Preallocate, Result, Status, Storage, StorageLimits, TableCache,
    TableChange, WithBuf, WriteFlags, ZeroMode,
};

/// Bytes of a page.
pub(crate) const PAGE: u64 = 16 << 10;
/// Bits of an offset in one file; the number of the file stands above.
const FILE_BITS: u32 = 48;
/// Greatest length of a file with tables: 32-bit sectors reach 2 TiB, seSparse 64 TiB and its tables.
pub(crate) const FILE_BYTES_MAX: u64 = 1 << FILE_BITS;
/// The cache holds at least the pages that one lookup needs at the same time.
const BUDGET_MIN: usize = 256 << 10;

/// The cached pages of all files.
pub(crate) struct Tables {
    cache: TableCache,
    files: Vec<Arc<dyn Storage>>,
    /// Length of each file when it was opened. Tables that are made later have whole pages past it.
    lens: Vec<u64>,
}

/// Why a table entry was not found.
pub(crate) enum Stop {
    /// The page that starts at this address is not in memory.
    Miss(Page),
    /// This grain table was not compared with its redundant copy yet.
    Compare(u64),
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
    pub(crate) fn new(files: Vec<Arc<dyn Storage>>, budget_bytes: usize) -> Result<Self> {
        let lens = files.iter().map(|file| file.len()).collect::<Result<Vec<u64>>>()?;
        let written = files.iter().map(|_| AtomicBool::new(false)).collect();
        let space = Arc::new(Files { files: files.clone(), written });
        Ok(Tables { cache: TableCache::new(space, budget_bytes.max(BUDGET_MIN)), files, lens })
    }

    /// The cache, for the group commit.
    pub(crate) fn cache(&self) -> &TableCache {
        &self.cache
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

    /// File number `file`.
    pub(crate) fn file(&self, file: usize) -> Result<&Arc<dyn Storage>> {
        self.files.get(file).ok_or_else(|| Error::new(Code::Usage, "a file that was not opened"))
    }

    /// The page that holds byte `offset` of file number `file`, and where in it.
    fn page_of(&self, file: usize, offset: u64) -> Result<(Page, u64)> {
        let within = rem(offset, PAGE)?;
        let start = sub(offset, within)?;
        let file_len = self.lens.get(file).copied().unwrap_or(0);
        let len = if start < file_len { PAGE.min(sub(file_len, start)?) } else { PAGE };
        Ok((Page { address: (wide(file) << FILE_BITS) | start, len: index(len)? }, within))
    }

    /// The entry of `size` (4 or 8) bytes at byte `offset` of file number `file`.
    pub(crate) fn entry(&self, held: &mut Held, file: usize, offset: u64, size: u64) -> Result<u64, Stop> {
        let (wanted, within) = self.page_of(file, offset)?;
        let page = match &held.0 {
            Some((at, page)) if *at == wanted.address => page,
            _ => {
                let Some(page) = self.cache.get(wanted.address) else {
                    return Err(Stop::Miss(wanted));
                };
                &held.0.insert((wanted.address, page)).1
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

/// Bytes of tables that are to change, cut at the borders of pages.
#[derive(Default)]
pub(crate) struct Changes(Vec<(Page, u64, Vec<u8>)>);

impl Tables {
    /// Adds `bytes` at byte `offset` of file number `file` to `changes`.
    pub(crate) fn change(
        &self,
        changes: &mut Changes,
        file: usize,
        mut offset: u64,
        mut bytes: &[u8],
    ) -> Result<()> {
        while !bytes.is_empty() {
            let (page, within) = self.page_of(file, offset)?;
            let room = index(sub(PAGE, within)?)?.min(bytes.len());
            let (part, rest) = bytes.split_at(room);
            changes.0.push((page, within, part.to_vec()));
            bytes = rest;
            offset = add(offset, wide(room))?;
        }
        Ok(())
    }

    /// Makes the changes in memory, all or (`false`: [`Tables::load_for`] first) none.
    pub(crate) fn apply(&self, changes: &Changes) -> Result<bool> {
        let changes: Vec<TableChange<'_>> = changes
            .0
            .iter()
            .map(|(page, at, bytes)| TableChange { page: page.address, at: *at, bytes, rank: 1 })
            .collect();
        self.cache.update(&changes)
    }

    /// Brings in the pages that `changes` are about.
    pub(crate) async fn load_for(&self, changes: &Changes) -> Result<()> {
        for (page, ..) in &changes.0 {
            self.load(*page).await?;
        }
        Ok(())
    }

    /// A new page of zeros at byte `offset` of file number `file`, which begins a page past the file's old end.
    pub(crate) fn put(&self, file: usize, offset: u64) -> Result<()> {
        let (page, _) = self.page_of(file, offset)?;
        self.cache.put(page.address, vec![0; page.len])
    }

    /// Reads `len` bytes of tables, through the cache.
    pub(crate) async fn read(&self, file: usize, mut offset: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(index(len)?);
        let end = add(offset, len)?;
        while offset < end {
            let (page, within) = self.page_of(file, offset)?;
            let data = self.cache.load(page.address, page.len).await?;
            let stop = index(PAGE.min(add(within, sub(end, offset)?)?))?;
            let part = data.get(index(within)?..stop).ok_or_else(|| {
                Error::new(Code::OutOfFile, "a table lies past the end of the file").at(offset)
            })?;
            bytes.extend_from_slice(part);
            offset = add(offset, wide(part.len()))?;
        }
        Ok(bytes)
    }

    /// Bytes of tables that are in memory; `None` if a page is not.
    pub(crate) fn peek(&self, file: usize, mut offset: u64, len: u64) -> Result<Option<Vec<u8>>> {
        let mut bytes = Vec::with_capacity(index(len)?);
        let end = add(offset, len)?;
        while offset < end {
            let (page, within) = self.page_of(file, offset)?;
            let stop = index(PAGE.min(add(within, sub(end, offset)?)?))?;
            let Some(data) = self.cache.get(page.address) else { return Ok(None) };
            let Some(part) = data.get(index(within)?..stop) else { return Ok(None) };
            bytes.extend_from_slice(part);
            offset = add(offset, wide(part.len()))?;
        }
        Ok(Some(bytes))
    }
}

/// All files as one address space, for the cache.
struct Files {
    files: Vec<Arc<dyn Storage>>,
    /// Which of them have tables that were written and not flushed.
    written: Vec<AtomicBool>,
}

impl Files {
    fn file(&self, offset: u64) -> Option<(usize, &Arc<dyn Storage>)> {
        let number = usize::try_from(offset >> FILE_BITS).ok()?;
        Some((number, self.files.get(number)?))
    }

    fn past_end(&self, offset: u64, len: usize) -> Error {
        past_end(self.name(), offset, len, wide(self.files.len()) << FILE_BITS)
    }
}

impl Storage for Files {
    fn name(&self) -> &str {
        "grain tables"
    }
    fn len(&self) -> Result<u64> {
        Ok(wide(self.files.len()) << FILE_BITS)
    }
    fn limits(&self) -> StorageLimits {
        StorageLimits { resizable: false, ..StorageLimits::default() }
    }
    fn read_at(&self, buf: Buf, offset: u64) -> Completion<WithBuf> {
        match self.file(offset) {
            Some((_, file)) => file.read_at(buf, offset & (FILE_BYTES_MAX - 1)),
            None => {
                let error = self.past_end(offset, buf.len());
                Completion::ready((buf, Err(error)))
            }
        }
    }
    fn write_at(&self, buf: Buf, offset: u64, flags: WriteFlags) -> Completion<WithBuf> {
        match self.file(offset) {
            Some((number, file)) => {
                if let Some(written) = self.written.get(number) {
                    written.store(true, Ordering::SeqCst);
                }
                file.write_at(buf, offset & (FILE_BYTES_MAX - 1), flags)
            }
            None => {
                let error = self.past_end(offset, buf.len());
                Completion::ready((buf, Err(error)))
            }
        }
    }
    /// Flushes the files whose tables were written. The group commit that asks for it is alone.
    fn flush(&self) -> Completion<Result<()>> {
        let written = self.files.iter().zip(&self.written);
        let flushes: Vec<_> = written
            .filter(|(_, written)| written.swap(false, Ordering::SeqCst))
            .map(|(file, _)| file.flush())
            .collect();
        Completion::from_future(async move {
            for flush in flushes {
                flush.await?;
            }
            Ok(())
        })
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
