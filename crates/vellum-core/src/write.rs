//! [`WritableImage`]: what an image offers to those who change it.
//!
//! A write goes *place, (reserve, fill,) commit*: where the bytes have a place of their own already, they are written
//! there; else the image reserves one, the engine fills it (completing partial blocks from the chain below) and
//! commits it. Nothing is visible before its bytes are there, and nothing points at bytes that are not durable.

use crate::{BoxFuture, Code, Error, Result};
use std::ops::Range;

/// The write side of an image that was opened for writing.
///
/// # Contract
/// * The engine holds the [`WritableImage::hull`] of a range exclusively while it reserves, fills, commits or discards
///   in it, and the range itself while it writes in place; no reader is under way there. Different hulls are worked on
///   at the same time, from any thread.
/// * The engine calls `begin` once, before the first change, and nothing else meanwhile.
/// * Every reservation is committed or aborted. A crash in between loses space at most.
/// * Changes count for [`crate::Image::map`] when `commit` or `discard` returns, and are durable after `flush`.
/// * Space that something durable may still point to is not given out again before a `flush` that covers its release.
pub trait WritableImage: Send + Sync {
    /// Sets the marks and identities that a writing session begins with, and makes them durable.
    fn begin(&self) -> BoxFuture<'_, Result<()>>;

    /// The whole allocation units that `range` touches; may reach past the end of the disk.
    fn hull(&self, range: Range<u64>) -> Range<u64>;

    /// Where the start of `range` can be written. Pure, from cached metadata.
    fn place(&self, range: Range<u64>) -> Result<Placement>;

    /// Makes room for a prefix of `range`, which begins with a byte that has no place of its own. With
    /// [`Intent::Move`] room is made although it has one (see [`WritableImage::wants_move`]).
    ///
    /// # Errors
    /// `NO_SPACE` and the like; the image is as before then.
    fn reserve(&self, range: Range<u64>, intent: Intent) -> BoxFuture<'_, Result<Reservation>>;

    /// The reservation is filled: from now on its range lives there.
    fn commit(&self, filled: Reservation) -> BoxFuture<'_, Result<()>>;

    /// The reservation is not needed.
    fn abort(&self, unused: Reservation) -> BoxFuture<'_, ()>;

    /// Makes a prefix of `range` read as zeros without storing them, and lets its space go. `range` consists of whole
    /// units, but for the end of the disk.
    fn discard(&self, range: Range<u64>) -> BoxFuture<'_, Result<Discarded>>;

    /// Makes everything durable that was written, committed or discarded before the call, in the format's order.
    fn flush(&self) -> BoxFuture<'_, Result<()>>;

    /// Ends the session: flushes and takes the marks back. The image is not changed afterwards.
    fn close(&self) -> BoxFuture<'_, Result<()>>;

    /// Begins a session in which other processes write the image at the same time, in place of `begin`: only the bytes of the
    /// disk itself may change, at the places that `place` names. Checks, and changes nothing in the file. Afterwards
    /// nothing but `place` and `hull` is called.
    ///
    /// # Errors
    /// `USAGE` if some part of the disk has no place yet, or if writing changes anything else (a table, a counter, the
    /// length): the default.
    fn share(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Err(not_shareable()) })
    }

    /// Tables in memory want to be flushed before more is changed.
    fn wants_flush(&self) -> bool {
        false
    }

    /// A guest range whose data should move to another place, because its own lies past a hole that a discard left.
    /// The engine answers by reserving with [`Intent::Move`], copying and committing, when it has nothing else to do.
    fn wants_move(&self) -> Option<Range<u64>> {
        None
    }
}

/// The error of [`WritableImage::share`] for images with tables.
#[cold]
pub fn not_shareable() -> Error {
    Error::new(Code::Usage, "several processes cannot write it at the same time: writing changes its tables").hint(
        "convert it to raw, a fixed VDI or VHD, or a flat VMDK; or open it for writing in one process only",
    )
}

/// The answer of [`WritableImage::place`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    /// The first `len` bytes of the range have a place of their own, which nobody else refers to.
    InPlace {
        /// Bytes from the start of the range, at least 1.
        len: u64,
        /// Index into [`crate::Image::storages`].
        storage: usize,
        /// Byte offset of the first byte.
        offset: u64,
    },
    /// The first `len` bytes have none: reserve.
    Absent {
        /// Bytes from the start of the range, at least 1.
        len: u64,
    },
    /// The metadata is not in memory: [`crate::Image::load`], then ask again.
    Miss,
}

/// Why room is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// A guest writes.
    Write,
    /// Data that has a place moves to a better one. `reserve` fails with `USAGE` if there is no better one any more.
    Move,
}

/// Room that was made.
#[derive(Debug)]
pub struct Reservation {
    /// The guest range that must be filled: it contains the start of the range asked for, may begin before it, and may
    /// end past the disk (where zeros belong).
    pub range: Range<u64>,
    /// Index into [`crate::Image::storages`].
    pub storage: usize,
    /// Byte offset of the first byte of `range`; contiguous.
    pub offset: u64,
    /// The place reads as zeros as long as it is not written: zeros need not be written.
    pub zeroed: bool,
    /// The driver's own.
    pub token: u64,
}

/// The answer of [`WritableImage::discard`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discarded {
    /// The first bytes read as zeros now.
    Done(u64),
    /// The format cannot say "zeros" there (a child whose parent would shine through, say): zeros must be written.
    Cannot(u64),
}
