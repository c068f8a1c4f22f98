//! An open raw image: guest offset = file offset.

use crate::write::check_writable;
use std::ops::Range;
use std::sync::Arc;
use vellum_core::storage::past_end;
use vellum_core::{
    BoxFuture, Committer, Extent, Image, ImageInfo, Lookup, OpenRequest, Result, Storage, WritableImage,
    bytes,
};

/// The name that users type.
pub(crate) const FORMAT: &str = "raw";

/// An open raw image.
pub(crate) struct RawImage {
    pub(crate) info: ImageInfo,
    pub(crate) storages: [Arc<dyn Storage>; 1],
    pub(crate) committer: Committer,
    write: bool,
}

impl RawImage {
    /// Opens. Reads nothing: the length of the file is all there is to know.
    pub(crate) fn open(request: OpenRequest) -> Result<Self> {
        let virtual_size = request.storage.len()?;
        let mut info = ImageInfo {
            format: FORMAT,
            variant: FORMAT.to_owned(),
            name: request.location.0.clone(),
            virtual_size,
            ..ImageInfo::default()
        };
        if bytes::rem(virtual_size, 512)? != 0 {
            let warning = format!(
                "{}: the length of {virtual_size} bytes is not a multiple of 512; it is kept as it is, but a guest \
                 would not see the last incomplete sector",
                request.location
            );
            request.events.warn(&warning);
            info.warnings.push(warning);
        }
        let committer =
            if request.write { check_writable(request.storage.as_ref())? } else { Committer::default() };
        Ok(RawImage { info, storages: [request.storage], committer, write: request.write })
    }
}

impl Image for RawImage {
    fn info(&self) -> &ImageInfo {
        &self.info
    }
    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }
    fn map(&self, range: Range<u64>) -> Result<Lookup> {
        let end = range.end.min(self.info.virtual_size);
        if range.start >= end {
            return Err(past_end(&self.info.name, range.start, 0, self.info.virtual_size));
        }
        let len = bytes::sub(end, range.start)?;
        Ok(Lookup::Found { len, extent: Extent::Raw { storage: 0, offset: range.start } })
    }
    fn load(&self, _range: Range<u64>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    fn writable(&self) -> Option<&dyn WritableImage> {
        self.write.then_some(self)
    }
}
