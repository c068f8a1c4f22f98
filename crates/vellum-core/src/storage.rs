//! [`Storage`]: bytes at offsets, wherever they are.

use crate::{Buf, Code, Completion, Error, Result, WithBuf};
use std::any::Any;
use std::ops::Range;

/// What a storage can do and how it wants to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageLimits {
    /// Offsets, lengths and buffers of requests must be multiples of this many bytes (1 = any).
    pub alignment: u32,
    /// Bytes that the storage reads, writes, zeroes and reports holes in most cheaply. A power of two.
    pub granularity: u32,
    /// No operation may change it.
    pub read_only: bool,
    /// [`Storage::set_len`] can change its length.
    pub resizable: bool,
    /// [`Storage::status`] can tell holes from data.
    pub knows_holes: bool,
}

impl Default for StorageLimits {
    fn default() -> Self {
        StorageLimits {
            alignment: 1,
            granularity: 4096,
            read_only: false,
            resizable: true,
            knows_holes: false,
        }
    }
}

/// How a write is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// The write is durable when it completes.
    pub fua: bool,
}

/// How bytes are made zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// The space may be given back.
    MayUnmap,
    /// The space stays allocated.
    KeepAllocated,
}

/// What the storage knows of a range without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// There may be data.
    Data,
    /// Reads as zeros and costs nothing.
    Hole,
}

/// Ranges without gaps, and what is known of each.
pub type StatusList = Vec<(Range<u64>, Status)>;

/// What to do with the space that a longer file gains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocate {
    /// Leave a hole.
    #[default]
    Off,
    /// Reserve the space without writing it.
    Falloc,
    /// Write zeros.
    Full,
}

/// How a copy between two storages may be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMode {
    /// Only by sharing blocks (reflink): costs no I/O of data.
    ShareOnly,
    /// Sharing, or a copy inside the kernel.
    InKernel,
}

/// Whether a copy was carried out by the storage itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offloaded {
    /// All bytes are there.
    Done,
    /// These two storages, or these offsets, cannot do it: read and write instead.
    Cannot,
}

/// What tells two storages apart or the same: device and inode of a local file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StorageId(pub u64, pub u64);

/// Bytes at offsets: a local file, a block device, memory, a slice of another storage, or a disk.
///
/// # Contract
/// * Operations own their buffers; the buffer comes back with the result, also on failure.
/// * Requests may be issued from any thread, any number at a time; overlapping writes are the caller's affair.
/// * A submitted operation runs to its end even if its [`Completion`] is dropped.
/// * `read_at` fills the whole buffer or fails; bytes past the end are `OUT_OF_FILE`.
/// * `write_at` writes the whole buffer or fails; past the end it extends a resizable storage,
///   and bytes between the old end and the write read as zeros.
/// * A write is durable only after a later `flush` succeeded.
pub trait Storage: Send + Sync + 'static {
    /// What messages call it: a path, a URL.
    fn name(&self) -> &str;
    /// Length in bytes.
    fn len(&self) -> Result<u64>;
    /// Whether it holds no byte.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }
    /// What it can do.
    fn limits(&self) -> StorageLimits;
    /// Reads `buf.len()` bytes at `offset`.
    fn read_at(&self, buf: Buf, offset: u64) -> Completion<WithBuf>;
    /// Writes `buf` at `offset`.
    fn write_at(&self, buf: Buf, offset: u64, flags: WriteFlags) -> Completion<WithBuf>;
    /// Makes every completed write durable.
    fn flush(&self) -> Completion<Result<()>>;
    /// Makes a range read as zeros. A range past the end is clipped.
    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Completion<Result<()>>;
    /// Gives space back if it can; the range reads as zeros or as before.
    fn discard(&self, range: Range<u64>) -> Completion<Result<()>>;
    /// Tells holes from data, without gaps, from `range.start` on; may stop before `range.end`
    /// but covers at least one byte of a non-empty range.
    fn status(&self, range: Range<u64>) -> Completion<Result<StatusList>>;
    /// Changes the length.
    fn set_len(&self, len: u64, preallocate: Preallocate) -> Completion<Result<()>>;
    /// Copies from `source` without moving the bytes through this process, or says that it cannot.
    fn copy_from(
        &self,
        source: &dyn Storage,
        source_offset: u64,
        offset: u64,
        len: u64,
        mode: CopyMode,
    ) -> Completion<Result<Offloaded>> {
        let _ = (source, source_offset, offset, len, mode);
        Completion::ready(Ok(Offloaded::Cannot))
    }
    /// Reads at once if that needs no waiting; `None` if it would wait.
    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Option<Result<()>> {
        let _ = (buf, offset);
        None
    }
    /// Identity, if the storage has one that other handles to it share.
    fn id(&self) -> Option<StorageId> {
        None
    }
    /// Bytes that it takes on its host, if known.
    fn allocated_bytes(&self) -> Option<u64> {
        None
    }
    /// Time of the last change, in nanoseconds since 1970, if known.
    fn modified_ns(&self) -> Option<u128> {
        None
    }
    /// Asks the host to begin writing a range back, without waiting. A hint.
    fn start_writeback(&self, range: Range<u64>) {
        let _ = range;
    }
    /// For storages that recognise their own kind in [`Storage::copy_from`].
    fn as_any(&self) -> &dyn Any;
}

/// The error for a read past the end of a storage.
#[cold]
pub fn past_end(name: &str, offset: u64, len: usize, end: u64) -> Error {
    Error::new(Code::OutOfFile, format!("a read of {len} bytes goes past the end of the file ({end} bytes)"))
        .image(name)
        .at(offset)
        .hint("the image may be truncated; `vellum check` tells more")
}

/// The error for changing a storage that must not change.
#[cold]
pub fn read_only(name: &str) -> Error {
    Error::new(Code::Permission, "opened read-only").image(name).hint("open it for writing")
}

/// Reads `len` bytes into a fresh buffer.
pub async fn read_vec(storage: &dyn Storage, offset: u64, len: usize) -> Result<Buf> {
    let (buf, result) = storage.read_at(Buf::zeroed(len), offset).await;
    result.map(|()| buf)
}

/// Writes a copy of `bytes`.
pub async fn write_slice(storage: &dyn Storage, offset: u64, bytes: &[u8]) -> Result<()> {
    storage.write_at(Buf::copy_of(bytes), offset, WriteFlags::default()).await.1
}
