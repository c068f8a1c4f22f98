//! Disks that several processes write at the same time: only the disk's own bytes change, in place.

use crate::storage::read_only;
use crate::{
    Code, Disk, Error, FlushPoint, Layer, Placement, Result, Storage, WritableImage, ZeroMode, flush_at,
};
use std::ops::Range;

/// Refuses an image that several processes cannot write at once.
pub(crate) async fn check(layer: &Layer) -> Result<()> {
    let refused = |error: Error| {
        let info = layer.image.info();
        error.image(&layer.location).found(format!("{} ({})", info.format, info.variant))
    };
    if layer.image.info().parent.is_some() {
        let what = "several processes cannot write it at the same time: it has a parent, so writing changes its tables";
        return Err(refused(Error::new(Code::Usage, what).hint(
            "make a disk without a parent of it (`vellum convert`): raw, a fixed VDI or VHD, or a flat VMDK; or open it \
             for writing in one process only",
        )));
    }
    let image = layer.image.writable().ok_or_else(|| read_only(&layer.location.0))?;
    image.share().await.map_err(|error| match error.code() {
        Code::Usage => refused(error),
        _ => error.image(&layer.location),
    })
}

impl Disk {
    /// Makes the bytes of the disk durable; there is nothing else.
    pub(crate) async fn flush_shared(&self) -> Result<()> {
        for storage in self.layers().iter().take(1).flat_map(|top| top.image.storages()) {
            flush_at(FlushPoint::Data, storage.as_ref()).await?;
        }
        Ok(())
    }

    /// Zeroes the places of `range`, whose lock is held.
    pub(crate) async fn zero_shared(
        &self,
        image: &dyn WritableImage,
        range: Range<u64>,
        mode: ZeroMode,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let Placement::InPlace { len, storage, offset } = self.placement(image, at..range.end).await?
            else {
                return Err(self.table_would_change(&(at..range.end)));
            };
            let len = len.max(1).min(range.end - at);
            self.top(storage)?.zero(offset..offset + len, mode).await?;
            at += len;
        }
        Ok(())
    }

    /// The error for bytes without a place, which opening has made sure of that there are none of.
    #[cold]
    pub(crate) fn table_would_change(&self, range: &Range<u64>) -> Error {
        Error::new(Code::SourceChanged, "a block has lost its place since the disk was opened")
            .image(self.name())
            .found(format!("guest bytes {:#x} to {:#x}", range.start, range.end))
            .hint("another program changes the image's tables; close the disk everywhere and check it")
    }
}
