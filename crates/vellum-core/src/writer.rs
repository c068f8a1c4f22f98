//! Making new images: [`Output`] makes the files, [`ImageWriter`] lays the image out.
//!
//! A new image is written beside its final name (`disk.vdi.part`) and renamed into place when it is durable.
//! Blocks are placed in ascending guest order; a writer's placements depend on nothing but its request and the
//! sequence of [`ImageWriter::place`] calls, which makes output reproducible and an interrupted job resumable:
//! the same calls again give the same places.

use crate::resolver::{Access, Asker};
use crate::{BoxFuture, Code, Codec, Error, Location, Preallocate, Resolver, Result, Storage, StorageId};
use parking_lot::Mutex;
use std::sync::Arc;

/// Lays out a new image. Fed in ascending order of blocks; blocks that are never placed read as zeros.
///
/// # Contract
/// * `place(block)` with the same block as the last call returns the same place and writes nothing.
/// * The caller writes the payload to the returned place and every [`MetaWrite`], in any order, before `finish`.
/// * A payload place that is not written in full reads as zeros: files are fresh.
/// * `finish` writes what is left (tables, headers, footers), sets the final lengths and does not flush.
pub trait ImageWriter: Send {
    /// How the image wants its data.
    fn shape(&self) -> &WriterShape;
    /// The storages that places refer to by index.
    fn storages(&self) -> &[Arc<dyn Storage>];
    /// Where the payload of `block` goes, and what else must be written.
    fn place(&mut self, block: u64, payload: Payload, writes: &mut Vec<MetaWrite>) -> Result<Place>;
    /// Writes what is left.
    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<()>>;
}

/// How an image wants its data.
#[derive(Clone)]
pub struct WriterShape {
    /// Guest bytes of a block: the unit of `place`. A power of two, at least 512.
    pub block_size: u64,
    /// Compress each block with this first. Without it payloads are [`Payload::Data`].
    pub codec: Option<Arc<dyn Codec>>,
    /// Greatest useful length of an encoded block; what exceeds it is stored as [`Payload::Data`].
    pub encoded_limit: usize,
}

/// What is to be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// The block as it is. The last block of a disk may be written short.
    Data,
    /// The block encoded by the shape's codec.
    Encoded {
        /// Bytes after encoding.
        len: usize,
    },
}

/// Where a payload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index into [`ImageWriter::storages`].
    pub storage: usize,
    /// Byte offset of the payload's first byte.
    pub offset: u64,
}

/// Metadata that goes with a placement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaWrite {
    /// Index into [`ImageWriter::storages`].
    pub storage: usize,
    /// Byte offset.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Makes the files of a new image under temporary names and puts them in place at the end.
#[derive(Clone)]
pub struct Output(Arc<OutputInner>);

struct OutputInner {
    resolver: Arc<dyn Resolver>,
    location: Location,
    mode: OutputMode,
    files: Mutex<Vec<OutputFile>>,
    protected: Mutex<Vec<StorageId>>,
}

/// How [`Output`] treats files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutputMode {
    /// New files; a leftover `.part` is replaced.
    Fresh,
    /// Files that an interrupted job left as `.part` are opened again.
    Resume,
    /// The main file is an existing device, written in place. There is no second file.
    Device,
}

#[derive(Clone)]
struct OutputFile {
    part: Location,
    last: Location,
    storage: Arc<dyn Storage>,
}

impl Output {
    /// Output to `location`.
    pub fn new(resolver: Arc<dyn Resolver>, location: Location, mode: OutputMode) -> Self {
        let (files, protected) = (Mutex::default(), Mutex::default());
        Output(Arc::new(OutputInner { resolver, location, mode, files, protected }))
    }

    /// Files that must not be replaced, whatever their names are: those of the source.
    pub fn protect(&self, files: Vec<StorageId>) {
        *self.0.protected.lock() = files;
    }

    async fn check_protected(&self, location: &Location) -> Result<()> {
        if self.0.protected.lock().is_empty() || !self.0.resolver.exists(location).await? {
            return Ok(());
        }
        let existing = self.0.resolver.open(&location.0, &Asker::User, Access::default()).await?;
        match existing.storage.id() {
            Some(id) if self.0.protected.lock().contains(&id) => Err(Error::new(
                Code::Usage,
                "a file of the source has the name under which the new image is made",
            )
            .image(location)
            .hint("choose another target, or rename the source")),
            _ => Ok(()),
        }
    }

    /// The final location of the main file.
    pub fn location(&self) -> &Location {
        &self.0.location
    }

    /// The last component of the main file's location.
    pub fn file_name(&self) -> String {
        self.0.resolver.file_name(&self.0.location)
    }

    /// The main file.
    pub async fn main(&self) -> Result<Arc<dyn Storage>> {
        let location = self.0.location.clone();
        self.file(location).await
    }

    /// Another file in the same directory. `file_name` is a name, not a path.
    pub async fn sibling(&self, file_name: &str) -> Result<Arc<dyn Storage>> {
        if self.0.mode == OutputMode::Device {
            return Err(Error::new(Code::Usage, "this variant needs several files; a device holds one")
                .image(&self.0.location)
                .hint("choose a single-file variant"));
        }
        let location = self.0.resolver.beside(&self.0.location, file_name);
        self.file(location).await
    }

    async fn file(&self, last: Location) -> Result<Arc<dyn Storage>> {
        let resolver = &self.0.resolver;
        let part = Location(format!("{}.part", last.0));
        let write = Access { write: true, ..Access::default() };
        self.check_protected(&part).await?;
        let (part, storage) = match self.0.mode {
            OutputMode::Fresh => {
                let storage = resolver.create(&part, true).await?;
                (part, storage)
            }
            OutputMode::Resume => {
                let opened = resolver.open(&part.0, &Asker::User, write).await?;
                (part, opened.storage)
            }
            OutputMode::Device => {
                let opened = resolver.open(&last.0, &Asker::User, write).await?;
                (last.clone(), opened.storage)
            }
        };
        self.0.files.lock().push(OutputFile { part, last, storage: storage.clone() });
        Ok(storage)
    }

    /// The storages made so far, main file first if it was made first.
    pub fn storages(&self) -> Vec<Arc<dyn Storage>> {
        self.0.files.lock().iter().map(|file| file.storage.clone()).collect()
    }

    /// Where the files stand until they are put in place.
    pub fn part_locations(&self) -> Vec<Location> {
        self.0.files.lock().iter().map(|file| file.part.clone()).collect()
    }

    /// Where the files will stand.
    pub fn final_locations(&self) -> Vec<Location> {
        self.0.files.lock().iter().map(|file| file.last.clone()).collect()
    }

    /// Makes everything durable and renames it into place, the main file last.
    pub async fn put_in_place(&self) -> Result<()> {
        let mut files: Vec<OutputFile> = self.0.files.lock().clone();
        for file in &files {
            file.storage.flush().await.map_err(|e| e.context(format!("flushing {}", file.part)))?;
        }
        files.sort_by_key(|file| file.last == self.0.location);
        // An old main file must never name new extents: while files change places, there is none.
        if files.len() > 1 && self.0.resolver.exists(&self.0.location).await? {
            self.0.resolver.delete(&self.0.location).await?;
            self.0.resolver.sync_directory(&self.0.location).await?;
        }
        for file in files.iter().filter(|file| file.part != file.last) {
            if file.last == self.0.location && files.len() > 1 {
                // The main file's name must not be durable before those that it names.
                self.0.resolver.sync_directory(&self.0.location).await?;
            }
            self.0.resolver.rename(&file.part, &file.last).await?;
        }
        if self.0.mode != OutputMode::Device {
            self.0.resolver.sync_directory(&self.0.location).await?;
        }
        Ok(())
    }

    /// Deletes what was made. Errors are not reported: there is already one.
    pub async fn discard(&self) {
        let files: Vec<OutputFile> = std::mem::take(&mut *self.0.files.lock());
        for file in files.iter().filter(|file| file.part != file.last) {
            let _ = self.0.resolver.delete(&file.part).await;
        }
    }
}

/// Writes a table of fixed-size entries at a fixed place, in ascending order of index, a page at a time.
///
/// Entries never set keep the fill. Memory is one page, however long the table.
pub struct TableWriter {
    storage: usize,
    offset: u64,
    entries: u64,
    entry_bytes: u64,
    fill: u8,
    page_number: u64,
    page: Vec<u8>,
    dirty: bool,
}

/// Bytes of a page of [`TableWriter`].
const TABLE_PAGE: u64 = 64 << 10;

impl TableWriter {
    /// A table of `entries` entries at byte `offset` of storage number `storage`. If the fill is not zero,
    /// [`TableWriter::write_fill`] must have been called for it.
    pub fn new(storage: usize, offset: u64, entries: u64, entry_bytes: u64, fill: u8) -> Self {
        TableWriter {
            storage,
            offset,
            entries,
            entry_bytes,
            fill,
            page_number: 0,
            page: Vec::new(),
            dirty: false,
        }
    }

    /// Bytes of the whole table.
    pub fn len_bytes(&self) -> u64 {
        self.entries.saturating_mul(self.entry_bytes)
    }

    /// Writes the fill over the whole table.
    pub async fn write_fill(&self, storage: &dyn Storage) -> Result<()> {
        fill_range(storage, self.offset, self.len_bytes(), self.fill).await
    }

    /// Sets an entry. Indexes ascend.
    pub fn set(&mut self, index: u64, entry: &[u8], writes: &mut Vec<MetaWrite>) -> Result<()> {
        let at = index.saturating_mul(self.entry_bytes);
        if index >= self.entries
            || entry.len() as u64 != self.entry_bytes
            || at / TABLE_PAGE < self.page_number
        {
            return Err(Error::new(Code::Usage, "blocks must be placed in ascending order inside the disk")
                .found(index));
        }
        if at / TABLE_PAGE != self.page_number || self.page.is_empty() {
            self.finish(writes);
            self.page_number = at / TABLE_PAGE;
            let len = TABLE_PAGE.min(self.len_bytes() - self.page_number * TABLE_PAGE);
            self.page = vec![self.fill; len as usize];
        }
        let within = (at % TABLE_PAGE) as usize;
        self.page[within..within + entry.len()].copy_from_slice(entry);
        self.dirty = true;
        Ok(())
    }

    /// Hands out the page that is still held.
    pub fn finish(&mut self, writes: &mut Vec<MetaWrite>) {
        if std::mem::take(&mut self.dirty) {
            let offset = self.offset + self.page_number * TABLE_PAGE;
            writes.push(MetaWrite { storage: self.storage, offset, bytes: std::mem::take(&mut self.page) });
        }
    }
}

/// Writes `len` bytes of `byte` at `offset`.
pub async fn fill_range(storage: &dyn Storage, offset: u64, len: u64, byte: u8) -> Result<()> {
    const STEP: u64 = 1 << 20;
    let mut buf = crate::Buf::zeroed(STEP.min(len) as usize);
    buf.fill(byte);
    let mut done = 0;
    while done < len {
        buf.set_window(0..STEP.min(len - done) as usize);
        let step = buf.len() as u64;
        let (back, result) = storage.write_at(buf, offset + done, crate::WriteFlags::default()).await;
        result?;
        buf = back;
        done += step;
    }
    Ok(())
}

/// Carries out metadata writes.
pub async fn write_all(storages: &[Arc<dyn Storage>], writes: Vec<MetaWrite>) -> Result<()> {
    for write in writes {
        let Some(storage) = storages.get(write.storage) else {
            return Err(Error::new(Code::Usage, "a metadata write names a storage that is not there"));
        };
        crate::storage::write_slice(storage.as_ref(), write.offset, &write.bytes).await?;
    }
    Ok(())
}

/// Lengthens (or shortens) a fresh file to `len`.
pub async fn set_len(storage: &dyn Storage, len: u64, preallocate: Preallocate) -> Result<()> {
    if storage.limits().resizable {
        return storage.set_len(len, preallocate).await;
    }
    let have = storage.len()?;
    if have < len {
        return Err(Error::new(Code::NoSpace, "the device is smaller than the image")
            .image(storage.name())
            .found(have)
            .allowed(len));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memory;

    #[test]
    fn a_table_is_written_page_by_page_over_its_fill() {
        let storages: [Arc<dyn Storage>; 1] = [Arc::new(Memory::new("t", 0))];
        let mut table = TableWriter::new(0, 512, 40_000, 4, 0xff);
        crate::block_on(table.write_fill(storages[0].as_ref())).unwrap();
        let mut writes = Vec::new();
        for index in [0u64, 5, 20_000, 39_999] {
            table.set(index, &(index as u32).to_le_bytes(), &mut writes).unwrap();
        }
        assert!(table.set(3, &[0; 4], &mut writes).is_err());
        assert!(table.set(40_000, &[0; 4], &mut writes).is_err());
        table.finish(&mut writes);
        crate::block_on(write_all(&storages, writes)).unwrap();
        let bytes = crate::block_on(crate::storage::read_vec(storages[0].as_ref(), 512, 160_000)).unwrap();
        for (index, entry) in bytes.chunks(4).enumerate() {
            let set = [0, 5, 20_000, 39_999].contains(&index);
            let expected = if set { (index as u32).to_le_bytes() } else { [0xff; 4] };
            assert_eq!(entry, expected);
        }
        assert_eq!(storages[0].len().unwrap(), 512 + 160_000);
    }
}
