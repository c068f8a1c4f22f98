//! Writing: every byte has its place, so there is nothing to reserve and nothing to order.

use crate::map::RawImage;
use std::ops::Range;
use vellum_core::{
    BoxFuture, Code, Committer, Discarded, Error, Intent, Placement, Reservation, Result, Storage,
    WritableImage, ZeroMode, bytes,
};

impl RawImage {
    fn nothing_to_reserve(&self) -> Error {
        Error::new(Code::Usage, "a raw image has a place for every byte; there is nothing to reserve")
            .image(&self.info.name)
    }
}

impl WritableImage for RawImage {
    fn begin(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn hull(&self, range: Range<u64>) -> Range<u64> {
        range
    }

    fn place(&self, range: Range<u64>) -> Result<Placement> {
        let len = bytes::sub(range.end, range.start)?;
        Ok(Placement::InPlace { len, storage: 0, offset: range.start })
    }

    fn reserve(&self, _range: Range<u64>, _intent: Intent) -> BoxFuture<'_, Result<Reservation>> {
        Box::pin(async { Err(self.nothing_to_reserve()) })
    }

    fn commit(&self, _filled: Reservation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Err(self.nothing_to_reserve()) })
    }

    fn abort(&self, _unused: Reservation) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn discard(&self, range: Range<u64>) -> BoxFuture<'_, Result<Discarded>> {
        Box::pin(async move {
            let len = bytes::sub(range.end, range.start)?;
            self.storages[0].zero(range, ZeroMode::MayUnmap).await?;
            Ok(Discarded::Done(len))
        })
    }

    fn share(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.committer.commit(&[], &self.storages, || (), |()| ()))
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        self.flush()
    }
}

/// What a raw image that is opened for writing needs of its storage.
pub(crate) fn check_writable(storage: &dyn Storage) -> Result<Committer> {
    if storage.limits().read_only {
        return Err(Error::new(Code::Permission, "the file cannot be written")
            .image(storage.name())
            .hint("open it for reading, or change its permissions"));
    }
    Ok(Committer::default())
}
