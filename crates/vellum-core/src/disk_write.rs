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
use crate::disk_state::{OpenFlags, Writing};
use crate::disk_zero::zero_range;
use crate::storage::{past_end, read_only};
use crate::{
    Buf, Code, Completion, Discarded, Disk, Error, Extent, Hold, Intent, PieceKind, Placement, RangeGuard,
    Result, Storage, WithBuf, WritableImage, WriteFlags, ZeroMode, bytes,
};
use std::ops::Range;
use std::sync::atomic::Ordering;
/// Zeros and moved data are written in pieces of this many bytes.
pub(crate) const STEP_BYTES: u64 = 1 << 20;

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
        let range = match self.range_of(buf.len(), offset) {
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
            (buf, disk.written(result, flags).await)
        })
    }

    /// What a write that ended with `result` says: with FUA one flush follows it.
    pub(crate) async fn written(&self, result: Result<()>, flags: WriteFlags) -> Result<()> {
        match self.noticed(result) {
            Ok(()) if flags.fua && !self.flags().ignore_flush => self.noticed(self.flush_now().await),
            result => result,
        }
    }

    /// Makes `range` read as zeros. With [`ZeroMode::MayUnmap`] its space may go.
    pub fn write_zeroes(&self, range: Range<u64>, mode: ZeroMode) -> Completion<Result<()>> {
        let range = range.start..range.end.min(self.size());
        if range.start >= range.end {
            return Completion::ready(Ok(()));
        }
        let disk = self.clone();
        Completion::started(async move { disk.noticed(disk.zero_locked(range, mode, false).await) })
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
        let unmap = ZeroMode::MayUnmap;
        Completion::started(async move { disk.noticed(disk.zero_locked(range, unmap, true).await) })
    }

    /// Makes every completed change durable.
    pub fn flush_all(&self) -> Completion<Result<()>> {
        if self.inner().writing.is_none() || self.flags().ignore_flush {
            return Completion::ready(Ok(()));
        }
        let disk = self.clone();
        Completion::started(async move { disk.noticed(disk.flush_now().await) })
    }

    /// After a flush that failed nothing more is written.
    fn noticed<T>(&self, result: Result<T>) -> Result<T> {
        match &self.inner().writing {
            Some(writing) => writing.notice(result),
            None => result,
        }
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
            let closed = match writing.is_shared {
                true => disk.flush_shared().await,
                false => image.close().await,
            };
            writing.fail(closed).map_err(|e| e.image(&disk.inner().name).context("closing the image"))
        })
    }

    fn inner(&self) -> &Inner {
        &self.0
    }

    fn image(&self) -> Option<&dyn WritableImage> {
        self.layers().first()?.image.writable()
    }
    pub(crate) fn writing(&self) -> Result<(&Writing, &dyn WritableImage)> {
        match (&self.inner().writing, self.image()) {
            (Some(writing), Some(image)) => {
                writing.check(&self.inner().name)?;
                Ok((writing, image))
            }
            _ => Err(read_only(&self.inner().name)),
        }
    }

    pub(crate) fn range_of(&self, len: usize, offset: u64) -> Result<Range<u64>> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.size() => Ok(offset..end),
            _ => Err(past_end(&self.inner().name, offset, len, self.size())),
        }
    }

    /// The storage of the top image.
    pub(crate) fn top(&self, storage: usize) -> Result<&std::sync::Arc<dyn Storage>> {
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

    pub(crate) async fn begin(&self) -> Result<(&Writing, &dyn WritableImage)> {
        let (writing, image) = self.writing()?;
        if writing.begun.get().is_none() {
            writing
                .begun
                .get_or_try_init(|| async {
                    // Of requests that wait here together, the first that fails ends writing for the others, too.
                    writing.check(&self.inner().name)?;
                    if writing.is_shared {
                        return Ok(()); // no marks: see ChainOptions::shareable
                    }
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
        match self.lock_to_write(writing, image, &range).await {
            Ok(_guard) => self.write_pieces(writing, image, buf, range).await,
            Err(error) => (buf, Err(error)),
        }
    }

    /// The lock for a write of `range`: on the range alone if all of it has a place, else on the whole units.
    pub(crate) async fn lock_to_write(
        &self,
        writing: &Writing,
        image: &dyn WritableImage,
        range: &Range<u64>,
    ) -> Result<RangeGuard> {
        let guard = writing.locks.lock(range.clone(), Hold::Exclusive).await;
        if self.is_in_place(image, range.clone()).await? {
            return Ok(guard);
        }
        // Given back first: a wider lock behind one's own would wait for ever.
        drop(guard);
        Ok(writing.locks.lock(image.hull(range.clone()), Hold::Exclusive).await)
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

    pub(crate) async fn placement(&self, image: &dyn WritableImage, range: Range<u64>) -> Result<Placement> {
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
    pub(crate) async fn write_pieces(
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
                Ok(Placement::Absent { len }) => {
                    let absent = at..at.saturating_add(len.max(1)).min(range.end);
                    let (back, result) =
                        self.allocate(writing, image, buf, &window, range.start, absent).await;
                    buf = back;
                    result
                }
                Ok(Placement::Miss) => Err(Error::new(Code::Io, "a table was not loaded")),
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
        if writing.is_shared {
            return (buf, Err(self.table_would_change(&range)));
        }
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
    pub(crate) async fn reads_as_zero(&self, range: Range<u64>) -> Result<bool> {
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
    pub(crate) async fn discard_all(&self, image: &dyn WritableImage, range: Range<u64>) -> Result<bool> {
        let mut at = range.start;
        while at < range.end {
            match image.discard(at..range.end).await? {
                Discarded::Done(len) => at = at.saturating_add(progress(len)?),
                Discarded::Cannot(_) => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Copies what the chain shows of `range` to a reserved place; past the end of the disk that is zeros.
    pub(crate) async fn complete(
        &self,
        range: Range<u64>,
        offset: u64,
        zeroed: &bool,
        storage: usize,
    ) -> Result<()> {
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
}

/// A driver that makes no step forward would be asked for ever, or at an offset inside a unit.
pub(crate) fn progress(len: u64) -> Result<u64> {
    match len {
        0 => Err(Error::new(Code::Io, "the format's driver discarded nothing and did not say why")),
        len => Ok(len),
    }
}
