//! The engine that writes: one for all formats.
//!
//! ```text
//!   write   lock the range | everything has its place?  write it there
//!           else lock the whole units | for each: nothing to do? / reserve, complete from below, fill, commit
//!   flush   the image's group commit
//! ```
//!
//! Every change runs to its end, also when the caller drops the completion: locks are held exactly as long as the
//! storage is at work. No lock is held that another range would have to wait for.

use crate::commit::poisoned;
use crate::disk::Inner;
use crate::storage::{past_end, read_only};
use crate::{
    Buf, Code, Completion, Discarded, Disk, Error, Extent, Hold, Intent, PieceKind, Placement, RangeGuard,
    RangeLocks, Result, Storage, WithBuf, WritableImage, WriteFlags, ZeroMode, bytes,
};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// How a disk is used; the seed's open flags. Can be changed while the disk is open ([`Disk::set_flags`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags {
    /// Nothing may be changed, though the image was opened for writing.
    pub read_only: bool,
    /// Allocate blocks for zeros that a guest writes, where nothing was; else nothing is stored for them.
    pub honor_zeroes: bool,
    /// Allocate blocks in a child for data that its parent holds already; else nothing is stored for it.
    pub honor_same: bool,
    /// Hand every whole block of zeros to the format, which may have a mark for it, even where data lies.
    pub inform_zeroes: bool,
    /// Let discards reach the image; else they are accepted and change nothing.
    pub discard: bool,
    /// Answer flushes without carrying them out. **Data is lost at a power loss.**
    pub ignore_flush: bool,
}

/// What a disk that can be written has besides its layers.
pub(crate) struct Writing {
    locks: RangeLocks,
    flags: Mutex<OpenFlags>,
    begun: async_lock::OnceCell<()>,
    failed: Mutex<Option<String>>,
    is_closed: AtomicBool,
    discarded: Mutex<HashMap<u64, Vec<Range<u64>>>>,
    has_discarded: AtomicBool,
}

/// Units of which discarded pieces are remembered at most.
const DISCARDED_UNITS_MAX: usize = 1024;
/// Data is moved (to fill holes) in at most so many steps for one flush.
const MOVES_PER_FLUSH_MAX: usize = 64;
/// Zeros and moved data are written in pieces of this many bytes.
const STEP_BYTES: u64 = 1 << 20;

impl Writing {
    pub(crate) fn new(flags: OpenFlags) -> Self {
        Writing {
            locks: RangeLocks::default(),
            flags: Mutex::new(flags),
            begun: async_lock::OnceCell::new(),
            failed: Mutex::default(),
            is_closed: AtomicBool::new(false),
            discarded: Mutex::default(),
            has_discarded: AtomicBool::new(false),
        }
    }

    /// The lock of a reader, if no writer is in its way.
    pub(crate) fn try_shared(&self, range: Range<u64>) -> Option<RangeGuard> {
        self.locks.try_lock(range, Hold::Shared)
    }

    pub(crate) async fn shared(&self, range: Range<u64>) -> RangeGuard {
        self.locks.lock(range, Hold::Shared).await
    }

    fn check(&self, name: &str) -> Result<()> {
        if self.flags.lock().read_only {
            return Err(read_only(name));
        }
        if self.is_closed.load(Ordering::Acquire) {
            return Err(Error::new(Code::Usage, "the disk was closed").image(name));
        }
        match &*self.failed.lock() {
            None => Ok(()),
            Some(first) => Err(poisoned(first).image(name)),
        }
    }

    /// Remembers the first failure; after it nothing more is written.
    fn fail<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.failed.lock().get_or_insert_with(|| error.to_string());
        }
        result
    }

    /// Something is written: what was remembered as discarded in these units is not any more.
    fn forget_discarded(&self, hull: &Range<u64>) {
        if self.has_discarded.load(Ordering::Acquire) {
            let mut discarded = self.discarded.lock();
            discarded.retain(|_, pieces| {
                pieces.iter().all(|piece| piece.end <= hull.start || hull.end <= piece.start)
            });
            self.has_discarded.store(!discarded.is_empty(), Ordering::Release);
        }
    }

    /// Adds a discarded piece of a unit; says whether all of the unit is discarded now.
    fn add_discarded(&self, unit: &Range<u64>, piece: Range<u64>) -> bool {
        let mut discarded = self.discarded.lock();
        if discarded.len() >= DISCARDED_UNITS_MAX && !discarded.contains_key(&unit.start) {
            discarded.clear(); // only ever costs space
        }
        let pieces = discarded.entry(unit.start).or_default();
        pieces.push(piece);
        pieces.sort_unstable_by_key(|piece| piece.start);
        let mut reached = unit.start;
        for piece in pieces.iter() {
            if piece.start > reached {
                break;
            }
            reached = reached.max(piece.end);
        }
        let whole = reached >= unit.end;
        if whole {
            discarded.remove(&unit.start);
        }
        self.has_discarded.store(!discarded.is_empty(), Ordering::Release);
        whole
    }
}

impl Disk {
    /// How the disk is used now.
    pub fn flags(&self) -> OpenFlags {
        match &self.inner().writing {
            Some(writing) => *writing.flags.lock(),
            None => OpenFlags { read_only: true, ..OpenFlags::default() },
        }
    }

    /// Changes how the disk is used from now on. Requests that are under way are not affected.
    ///
    /// # Errors
    /// `PERMISSION` if the image was not opened for writing and `read_only` is to be taken back.
    pub fn set_flags(&self, flags: OpenFlags) -> Result<()> {
        match &self.inner().writing {
            Some(writing) => *writing.flags.lock() = flags,
            None if flags.read_only => {}
            None => return Err(read_only(&self.inner().name)),
        }
        Ok(())
    }

    /// Whether the disk can be written.
    pub fn is_writable(&self) -> bool {
        self.writing().is_ok()
    }

    /// Writes `buf` at `offset`. Starts now and runs to its end, whatever becomes of the completion.
    pub fn write(&self, buf: Buf, offset: u64, flags: WriteFlags) -> Completion<WithBuf> {
        let range = match self.range_of(&buf, offset) {
            Ok(range) => range,
            Err(error) => return Completion::ready((buf, Err(error))),
        };
        if range.is_empty() {
            return Completion::ready((buf, Ok(())));
        }
        let buf = match self.write_at_once(buf, &range, flags) {
            Ok(completion) => return completion,
            Err(buf) => buf,
        };
        let disk = self.clone();
        Completion::started(async move {
            let (buf, result) = disk.write_locked(buf, range).await;
            match result {
                Ok(()) if flags.fua => {
                    let flushed = disk.flush_now().await;
                    (buf, flushed)
                }
                result => (buf, result),
            }
        })
    }

    /// Writes several buffers one after the other, beginning at `offset`; all come back.
    pub fn write_vectored(
        &self,
        bufs: Vec<Buf>,
        offset: u64,
        flags: WriteFlags,
    ) -> Completion<(Vec<Buf>, Result<()>)> {
        let mut at = offset;
        let mut parts = Vec::with_capacity(bufs.len());
        for buf in bufs {
            let len = buf.len() as u64;
            parts.push(self.write(buf, at, flags));
            at = at.saturating_add(len);
        }
        Completion::from_future(gather(parts))
    }

    /// Reads several buffers one after the other, beginning at `offset`; all come back.
    pub fn read_vectored(&self, bufs: Vec<Buf>, offset: u64) -> Completion<(Vec<Buf>, Result<()>)> {
        let mut at = offset;
        let mut parts = Vec::with_capacity(bufs.len());
        for buf in bufs {
            let len = buf.len() as u64;
            parts.push(self.read_at(buf, at));
            at = at.saturating_add(len);
        }
        Completion::from_future(gather(parts))
    }

    /// Makes `range` read as zeros. With [`ZeroMode::MayUnmap`] its space may go.
    pub fn write_zeroes(&self, range: Range<u64>, mode: ZeroMode) -> Completion<Result<()>> {
        let range = range.start..range.end.min(self.size());
        if range.start >= range.end {
            return Completion::ready(Ok(()));
        }
        let disk = self.clone();
        Completion::started(async move { disk.zero_locked(range, mode, false).await })
    }

    /// The guest does not need `range` any more: it reads as zeros or as before, and whole units lose their space.
    /// Pieces of units are remembered until the unit is complete.
    pub fn discard_range(&self, range: Range<u64>) -> Completion<Result<()>> {
        let range = range.start..range.end.min(self.size());
        if range.start >= range.end || !self.flags().discard {
            let writable = self.writing().map(|_| ());
            return Completion::ready(writable);
        }
        let disk = self.clone();
        Completion::started(async move { disk.zero_locked(range, ZeroMode::MayUnmap, true).await })
    }

    /// Makes every completed change durable.
    pub fn flush_all(&self) -> Completion<Result<()>> {
        if self.inner().writing.is_none() || self.flags().ignore_flush {
            return Completion::ready(Ok(()));
        }
        let disk = self.clone();
        Completion::started(async move { disk.flush_now().await })
    }

    /// Ends writing: flushes, takes the image's marks back. Changes that are under way are waited for; later ones fail.
    pub fn close(&self) -> Completion<Result<()>> {
        let Some(writing) = &self.inner().writing else { return Completion::ready(Ok(())) };
        if writing.is_closed.swap(true, Ordering::AcqRel) {
            return Completion::ready(Ok(()));
        }
        let disk = self.clone();
        Completion::started(async move {
            let Some(writing) = &disk.inner().writing else { return Ok(()) };
            let _everything = writing.locks.lock(0..u64::MAX, Hold::Exclusive).await;
            if let Some(first) = &*writing.failed.lock() {
                return Err(poisoned(first).image(&disk.inner().name));
            }
            if writing.begun.get().is_none() {
                return Ok(());
            }
            let image = disk.image().ok_or_else(|| read_only(&disk.inner().name))?;
            let closed = image.close().await;
            writing.fail(closed).map_err(|e| e.image(&disk.inner().name).context("closing the image"))
        })
    }

    fn inner(&self) -> &Inner {
        &self.0
    }

    fn image(&self) -> Option<&dyn WritableImage> {
        self.layers().first()?.image.writable()
    }

    fn writing(&self) -> Result<(&Writing, &dyn WritableImage)> {
        match (&self.inner().writing, self.image()) {
            (Some(writing), Some(image)) => {
                writing.check(&self.inner().name)?;
                Ok((writing, image))
            }
            _ => Err(read_only(&self.inner().name)),
        }
    }

    fn range_of(&self, buf: &Buf, offset: u64) -> Result<Range<u64>> {
        match offset.checked_add(buf.len() as u64) {
            Some(end) if end <= self.size() => Ok(offset..end),
            _ => Err(past_end(&self.inner().name, offset, buf.len(), self.size())),
        }
    }

    /// The storage of the top image.
    fn top(&self, storage: usize) -> Result<&std::sync::Arc<dyn Storage>> {
        self.storage(0, storage)
    }

    /// A write whose place is known and that nobody is in the way of goes to the storage on the caller's thread.
    fn write_at_once(
        &self,
        buf: Buf,
        range: &Range<u64>,
        flags: WriteFlags,
    ) -> std::result::Result<Completion<WithBuf>, Buf> {
        let Ok((writing, image)) = self.writing() else { return Err(buf) };
        if writing.begun.get().is_none() || flags.fua {
            return Err(buf);
        }
        let Some(guard) = writing.locks.try_lock(range.clone(), Hold::Exclusive) else { return Err(buf) };
        let Ok(Placement::InPlace { len, storage, offset }) = image.place(range.clone()) else {
            return Err(buf);
        };
        if len < range.end - range.start {
            return Err(buf);
        }
        let Ok(storage) = self.top(storage) else { return Err(buf) };
        writing.forget_discarded(range);
        match storage.write_at(buf, offset, WriteFlags::default()).try_take() {
            Ok(done) => {
                drop(guard);
                Ok(Completion::ready(done))
            }
            Err(pending) => Ok(Completion::started(async move {
                let done = pending.await;
                drop(guard);
                done
            })),
        }
    }

    async fn begin(&self) -> Result<(&Writing, &dyn WritableImage)> {
        let (writing, image) = self.writing()?;
        if writing.begun.get().is_none() {
            writing
                .begun
                .get_or_try_init(|| async {
                    let begun = image.begin().await;
                    writing.fail(begun).map_err(|e| e.context("marking the image as being written"))
                })
                .await?;
        }
        Ok((writing, image))
    }

    async fn write_locked(&self, buf: Buf, range: Range<u64>) -> WithBuf {
        let (writing, image) = match self.begin().await {
            Ok(both) => both,
            Err(error) => return (buf, Err(error)),
        };
        {
            let _guard = writing.locks.lock(range.clone(), Hold::Exclusive).await;
            match self.is_in_place(image, range.clone()).await {
                Ok(true) => return self.write_pieces(writing, image, buf, range).await,
                Ok(false) => {}
                Err(error) => return (buf, Err(error)),
            }
        }
        let _guard = writing.locks.lock(image.hull(range.clone()), Hold::Exclusive).await;
        self.write_pieces(writing, image, buf, range).await
    }

    /// Whether every byte of `range` has a place of its own.
    async fn is_in_place(&self, image: &dyn WritableImage, range: Range<u64>) -> Result<bool> {
        let mut at = range.start;
        while at < range.end {
            match self.placement(image, at..range.end).await? {
                Placement::InPlace { len, .. } => at = at.saturating_add(len.max(1)),
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    async fn placement(&self, image: &dyn WritableImage, range: Range<u64>) -> Result<Placement> {
        for _ in 0..1000 {
            match image.place(range.clone())? {
                Placement::Miss => {
                    if let Some(layer) = self.layers().first() {
                        layer.image.load(range.clone()).await?;
                    }
                }
                found => return Ok(found),
            }
        }
        Err(Error::new(Code::Io, "the table cache is too small to hold one page").image(&self.inner().name))
    }

    /// Writes `buf` over `range`; the locks are held.
    async fn write_pieces(
        &self,
        writing: &Writing,
        image: &dyn WritableImage,
        mut buf: Buf,
        range: Range<u64>,
    ) -> WithBuf {
        let window = buf.window();
        writing.forget_discarded(&image.hull(range.clone()));
        let mut at = range.start;
        while at < range.end {
            let step = match self.placement(image, at..range.end).await {
                Ok(Placement::InPlace { len, storage, offset }) => {
                    let end = at.saturating_add(len.max(1)).min(range.end);
                    let (back, result) =
                        self.write_part(buf, &window, range.start, at..end, storage, offset).await;
                    buf = back;
                    result.map(|()| end)
                }
                Ok(_) => {
                    let (back, result) =
                        self.allocate(writing, image, buf, &window, range.start, at..range.end).await;
                    buf = back;
                    result
                }
                Err(error) => Err(error),
            };
            match step {
                Ok(reached) => at = reached,
                Err(error) => {
                    buf.set_window(window);
                    return (buf, Err(error.context(format!("writing guest bytes at {at:#x}"))));
                }
            }
        }
        buf.set_window(window);
        (buf, Ok(()))
    }

    /// Writes the part `part` of a buffer whose `window` stands for guest bytes from `base` on.
    async fn write_part(
        &self,
        mut buf: Buf,
        window: &Range<usize>,
        base: u64,
        part: Range<u64>,
        storage: usize,
        offset: u64,
    ) -> WithBuf {
        let from = window.start + (part.start - base) as usize;
        buf.set_window(from..from + (part.end - part.start) as usize);
        match self.top(storage) {
            Ok(storage) => storage.write_at(buf, offset, WriteFlags::default()).await,
            Err(error) => (buf, Err(error)),
        }
    }

    /// Writes the start of `range`, which has no place yet; returns how far it came.
    async fn allocate(
        &self,
        writing: &Writing,
        image: &dyn WritableImage,
        mut buf: Buf,
        window: &Range<usize>,
        base: u64,
        range: Range<u64>,
    ) -> (Buf, Result<u64>) {
        let run = match self.worth_storing(writing, image, &mut buf, window, base, range.clone()).await {
            Ok(Ok(run)) => run,
            Ok(Err(skipped_to)) => return (buf, Ok(skipped_to)),
            Err(error) => return (buf, Err(error)),
        };
        let place = match image.reserve(run.clone(), Intent::Write).await {
            Ok(place) => place,
            Err(error) => return (buf, Err(error)),
        };
        let own = run.start.max(place.range.start)..run.end.min(place.range.end);
        let head =
            self.complete(place.range.start..own.start, place.offset, &place.zeroed, place.storage).await;
        let tail_at = place.offset + (own.end - place.range.start);
        let filled = match head {
            Ok(()) => self.complete(own.end..place.range.end, tail_at, &place.zeroed, place.storage).await,
            failed => failed,
        };
        let filled = match filled {
            Ok(()) => {
                let at = place.offset + (own.start - place.range.start);
                let (back, result) = self.write_part(buf, window, base, own.clone(), place.storage, at).await;
                buf = back;
                result
            }
            failed => failed,
        };
        let result = match filled {
            Ok(()) => image.commit(place).await.map(|()| own.end),
            Err(error) => {
                image.abort(place).await;
                Err(error)
            }
        };
        if result.is_ok() && image.wants_flush() {
            let flushed = image.flush().await;
            return (buf, writing.fail(flushed).map(|()| own.end));
        }
        (buf, result)
    }

    /// How much of the start of `range` must be stored; or, as an inner error, up to where nothing need be.
    async fn worth_storing(
        &self,
        writing: &Writing,
        image: &dyn WritableImage,
        buf: &mut Buf,
        window: &Range<usize>,
        base: u64,
        range: Range<u64>,
    ) -> Result<std::result::Result<Range<u64>, u64>> {
        let flags = *writing.flags.lock();
        if flags.honor_zeroes && flags.honor_same && !flags.inform_zeroes {
            return Ok(Ok(range));
        }
        let has_parent = self.layers().len() > 1;
        let mut at = range.start;
        while at < range.end {
            let unit = image.hull(at..at + 1);
            let part = at..unit.end.clamp(at + 1, range.end);
            buf.set_window(window.clone());
            let from = (part.start - base) as usize;
            let is_zero = bytes::is_zero(&buf[from..from + (part.end - part.start) as usize]);
            let skip = if is_zero && (!flags.honor_zeroes || flags.inform_zeroes) {
                self.reads_as_zero(part.clone()).await? || {
                    let whole = part.start <= unit.start && part.end >= unit.end.min(self.size());
                    // Only at the start: what comes before must be written first.
                    whole && at == range.start && self.discard_all(image, part.clone()).await?
                }
            } else {
                !flags.honor_same && has_parent && self.is_same(buf, from, part.clone()).await?
            };
            match (skip, at == range.start) {
                (true, true) => return Ok(Err(part.end)),
                (true, false) => return Ok(Ok(range.start..at)),
                // A block of zeros that the format may have a mark for is looked at on its own.
                (false, false) if is_zero && !flags.honor_zeroes => return Ok(Ok(range.start..at)),
                (false, true) if is_zero && !flags.honor_zeroes => return Ok(Ok(part)),
                (false, _) => at = part.end,
            }
        }
        Ok(Ok(range))
    }

    /// Whether all of `range` reads as zeros, by the tables alone.
    async fn reads_as_zero(&self, range: Range<u64>) -> Result<bool> {
        let mut at = range.start;
        let end = range.end.min(self.size());
        while at < end {
            let found = self.lookup(at..end).await?;
            match found.extent {
                Extent::Zero | Extent::Parent => at = found.range.end,
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Whether the chain already holds these bytes.
    async fn is_same(&self, buf: &Buf, from: usize, range: Range<u64>) -> Result<bool> {
        let len = (range.end - range.start) as usize;
        let (old, result) = self.read_unlocked(self.inner().pool.take(len), range.start).await;
        result?;
        Ok(old[..] == buf[from..from + len])
    }

    /// Discards all of `range` (whole units) or says that the format cannot.
    async fn discard_all(&self, image: &dyn WritableImage, range: Range<u64>) -> Result<bool> {
        let mut at = range.start;
        while at < range.end {
            match image.discard(at..range.end).await? {
                Discarded::Done(len) => at = at.saturating_add(len.max(1)),
                Discarded::Cannot(_) => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Copies what the chain shows of `range` to a reserved place; past the end of the disk that is zeros.
    async fn complete(&self, range: Range<u64>, offset: u64, zeroed: &bool, storage: usize) -> Result<()> {
        let target = self.top(storage)?;
        let end = range.end.min(self.size()).max(range.start);
        let mut at = range.start;
        while at < end {
            let step = at..end.min(at + STEP_BYTES);
            for piece in self.pieces(step.clone(), usize::MAX).await? {
                let place = offset + (piece.range.start - range.start);
                let len = piece.range.end - piece.range.start;
                match piece.kind {
                    PieceKind::Zero if *zeroed => {}
                    PieceKind::Zero => zero_range(target.as_ref(), place..place + len).await?,
                    _ => {
                        let buf = self.inner().pool.take(len as usize);
                        let (buf, result) =
                            self.read_pieces(buf, piece.range.start, std::slice::from_ref(&piece)).await;
                        result.map_err(|e| e.context("completing a block from what lies below"))?;
                        target.write_at(buf, place, WriteFlags::default()).await.1?;
                    }
                }
            }
            at = step.end;
        }
        if range.end > end && !zeroed {
            let place = offset + (end - range.start);
            zero_range(target.as_ref(), place..place + (range.end - end)).await?;
        }
        Ok(())
    }

    async fn zero_locked(&self, range: Range<u64>, mode: ZeroMode, is_discard: bool) -> Result<()> {
        let (writing, image) = self.begin().await?;
        let hull = image.hull(range.clone());
        let _guard = writing.locks.lock(hull.clone(), Hold::Exclusive).await;
        if !is_discard {
            writing.forget_discarded(&hull);
        }
        let mut at = range.start;
        while at < range.end {
            let unit = image.hull(at..at + 1);
            let is_whole = |at: u64, unit: &Range<u64>| {
                at <= unit.start && unit.end.min(self.size()) <= range.end && mode == ZeroMode::MayUnmap
            };
            if !is_whole(at, &unit) {
                let part = at..unit.end.min(range.end).max(at + 1);
                at = part.end;
                self.zero_part(writing, image, &unit, part, mode, is_discard).await?;
                continue;
            }
            let last = image.hull(range.end - 1..range.end);
            let end = if is_whole(last.start, &last) { range.end } else { last.start };
            match image.discard(at..end).await? {
                Discarded::Done(len) => at = at.saturating_add(len.max(1)).min(end),
                Discarded::Cannot(len) => {
                    let part = at..at.saturating_add(len.max(1)).min(end);
                    at = part.end;
                    if !is_discard {
                        self.store_zeros(image, part).await?;
                    }
                }
            }
            if image.wants_flush() {
                let flushed = image.flush().await;
                writing.fail(flushed)?;
            }
        }
        Ok(())
    }

    /// Zeroes a part of a unit; a discarded part is remembered, and the last one lets the unit go.
    async fn zero_part(
        &self,
        writing: &Writing,
        image: &dyn WritableImage,
        unit: &Range<u64>,
        part: Range<u64>,
        mode: ZeroMode,
        is_discard: bool,
    ) -> Result<()> {
        if !is_discard {
            return self.store_zeros_with(image, part, mode).await;
        }
        let mut at = part.start;
        while at < part.end {
            // Only what has a place of its own is worth zeroing; the rest costs nothing as it is.
            match self.placement(image, at..part.end).await? {
                Placement::InPlace { len, storage, offset } => {
                    let len = len.max(1).min(part.end - at);
                    self.top(storage)?.zero(offset..offset + len, ZeroMode::MayUnmap).await?;
                    at += len;
                }
                Placement::Absent { len } => at = at.saturating_add(len.max(1)),
                Placement::Miss => return Err(Error::new(Code::Io, "a table was not loaded")),
            }
        }
        let whole = unit.start..unit.end.min(self.size());
        if writing.add_discarded(&whole, part) {
            self.discard_all(image, whole).await?;
        }
        Ok(())
    }

    async fn store_zeros(&self, image: &dyn WritableImage, range: Range<u64>) -> Result<()> {
        self.store_zeros_with(image, range, ZeroMode::MayUnmap).await
    }

    /// Stores zeros where the range does not read as zeros anyway.
    async fn store_zeros_with(
        &self,
        image: &dyn WritableImage,
        range: Range<u64>,
        mode: ZeroMode,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            match self.placement(image, at..range.end).await? {
                Placement::InPlace { len, storage, offset } => {
                    let len = len.max(1).min(range.end - at);
                    self.top(storage)?.zero(offset..offset + len, mode).await?;
                    at += len;
                }
                Placement::Absent { len } => {
                    let part = at..at.saturating_add(len.max(1)).min(range.end).min(at + STEP_BYTES);
                    if self.reads_as_zero(part.clone()).await? {
                        at = part.end;
                        continue;
                    }
                    at = self.reserve_zeros(image, part).await?;
                }
                Placement::Miss => return Err(Error::new(Code::Io, "a table was not loaded")),
            }
        }
        Ok(())
    }

    /// Makes a place for the start of `part` and leaves zeros in it; returns how far it reaches.
    async fn reserve_zeros(&self, image: &dyn WritableImage, part: Range<u64>) -> Result<u64> {
        let place = image.reserve(part.clone(), Intent::Write).await?;
        let own = part.start.max(place.range.start)..part.end.min(place.range.end);
        let at = |guest: u64| place.offset + (guest - place.range.start);
        let filled = async {
            self.complete(place.range.start..own.start, place.offset, &place.zeroed, place.storage).await?;
            self.complete(own.end..place.range.end, at(own.end), &place.zeroed, place.storage).await?;
            match place.zeroed {
                true => Ok(()),
                false => zero_range(self.top(place.storage)?.as_ref(), at(own.start)..at(own.end)).await,
            }
        };
        match filled.await {
            Ok(()) => image.commit(place).await.map(|()| own.end),
            Err(error) => {
                image.abort(place).await;
                Err(error)
            }
        }
    }

    async fn flush_now(&self) -> Result<()> {
        let (writing, image) = self.writing()?;
        if writing.begun.get().is_none() {
            return Ok(());
        }
        let flushed = image.flush().await;
        writing.fail(flushed)?;
        for _ in 0..MOVES_PER_FLUSH_MAX {
            let Some(range) = image.wants_move() else { break };
            if self.move_data(writing, image, range).await? == Moved::NotNow {
                break;
            }
        }
        Ok(())
    }

    /// Moves the data of a guest range to the place that the image has for it.
    async fn move_data(
        &self,
        writing: &Writing,
        image: &dyn WritableImage,
        range: Range<u64>,
    ) -> Result<Moved> {
        let hull = image.hull(range.clone());
        // Whoever is writing there comes first; the next flush tries again.
        let Some(_guard) = writing.locks.try_lock(hull, Hold::Exclusive) else { return Ok(Moved::NotNow) };
        let place = match image.reserve(range, Intent::Move).await {
            Ok(place) => place,
            Err(error) if error.code() == Code::Usage => return Ok(Moved::NotNow),
            Err(error) => return Err(error),
        };
        match self.complete(place.range.clone(), place.offset, &place.zeroed, place.storage).await {
            Ok(()) => image.commit(place).await.map(|()| Moved::Done),
            Err(error) => {
                image.abort(place).await;
                Err(error)
            }
        }
    }
}

#[derive(PartialEq, Eq)]
enum Moved {
    Done,
    NotNow,
}

async fn gather(parts: Vec<Completion<WithBuf>>) -> (Vec<Buf>, Result<()>) {
    let mut bufs = Vec::with_capacity(parts.len());
    let mut outcome = Ok(());
    for part in parts {
        let (buf, result) = part.await;
        bufs.push(buf);
        if outcome.is_ok() {
            outcome = result;
        }
    }
    (bufs, outcome)
}

/// Writes zeros for sure (a storage's `zero` clips at its end, which a fresh place may lie past).
async fn zero_range(storage: &dyn Storage, range: Range<u64>) -> Result<()> {
    let inside = range.end.min(storage.len()?).max(range.start);
    if inside > range.start {
        storage.zero(range.start..inside, ZeroMode::KeepAllocated).await?;
    }
    crate::fill_range(storage, inside, range.end - inside, 0).await
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Some(writing) = &self.writing else { return };
        if writing.begun.get().is_some() && !writing.is_closed.load(Ordering::Acquire) {
            tracing::warn!("{}: dropped without close(); what was not flushed may be lost", self.name);
        }
    }
}
