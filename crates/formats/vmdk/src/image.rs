//! An open disk: its parts in order, and the [`Image`] that answers for them.

use crate::extent::SparseExtent;
use crate::map::Lookups;
use crate::tables::Tables;
use crate::write::Writer;
use std::ops::Range;
use std::sync::Arc;
use vellum_core::bytes::{add, sub};
use vellum_core::{
    BoxFuture, Code, Codec, Error, Events, Extent, Image, ImageInfo, Lookup, Result, Storage, WritableImage,
};

/// An open VMDK.
pub(crate) struct VmdkImage {
    pub info: ImageInfo,
    pub storages: Vec<Arc<dyn Storage>>,
    /// In the order of the disk, without gaps.
    pub parts: Vec<Part>,
    pub tables: Tables,
    pub zlib: Arc<dyn Codec>,
    pub events: Events,
    /// There if the disk was opened for writing.
    pub writer: Option<Writer>,
}

/// One extent and the bytes of the disk that it covers.
pub(crate) struct Part {
    pub start: u64,
    pub end: u64,
    pub source: Source,
    /// The descriptor does not allow writing to it.
    pub is_read_only: bool,
}

/// Where a part has its bytes.
pub(crate) enum Source {
    Flat {
        storage: usize,
        offset: u64,
    },
    Sparse(Box<SparseExtent>),
    Zero,
    /// The descriptor forbids access.
    NoAccess,
    /// The image was opened without its parts; the file's name.
    Closed(String),
}

impl VmdkImage {
    fn part(&self, at: u64) -> Result<&Part> {
        Ok(self.numbered_part(at)?.1)
    }

    /// The part that guest byte `at` is in, and its number.
    pub(crate) fn numbered_part(&self, at: u64) -> Result<(usize, &Part)> {
        let index = self.parts.partition_point(|part| part.end <= at);
        self.parts.get(index).map(|part| (index, part)).ok_or_else(|| {
            Error::new(Code::OutOfFile, "a lookup goes past the end of the disk")
                .image(&self.info.name)
                .found(at)
                .allowed(format!("up to {}", self.info.virtual_size))
        })
    }

    pub(crate) fn lookups(&self, part: &Part) -> Lookups<'_> {
        Lookups {
            tables: &self.tables,
            events: &self.events,
            zlib: &self.zlib,
            extent_start: part.start,
            is_written: self.writer.is_some(),
        }
    }
}

impl Image for VmdkImage {
    fn info(&self) -> &ImageInfo {
        self.writer.as_ref().and_then(|writer| writer.told.get()).unwrap_or(&self.info)
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn map(&self, range: Range<u64>) -> Result<Lookup> {
        let part = self.part(range.start)?;
        let start = sub(range.start, part.start)?;
        let end = sub(range.end.min(part.end), part.start)?;
        let len = sub(end, start)?;
        let extent = match &part.source {
            Source::Sparse(extent) => return self.lookups(part).map(extent, start..end),
            Source::Flat { storage, offset } => {
                Extent::Raw { storage: *storage, offset: add(*offset, start)? }
            }
            Source::Zero => Extent::Zero,
            Source::NoAccess => {
                return Err(Error::new(Code::Permission, "the descriptor forbids access to this extent")
                    .image(&self.info.name)
                    .found(format!("NOACCESS at guest byte {:#x}", part.start))
                    .hint("the extent's content is not meant to be read; read the other ranges only"));
            }
            Source::Closed(name) => {
                return Err(Error::new(Code::Usage, "the image was opened without its extents")
                    .image(&self.info.name)
                    .found(format!("extent {name:?}"))
                    .hint("open it with its parts to read its data"));
            }
        };
        Ok(Lookup::Found { len, extent })
    }

    fn load(&self, range: Range<u64>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let part = self.part(range.start)?;
            match &part.source {
                Source::Sparse(extent) => {
                    self.lookups(part).load(extent, sub(range.start, part.start)?).await
                }
                _ => Ok(()),
            }
        })
    }

    fn writable(&self) -> Option<&dyn WritableImage> {
        match &self.writer {
            Some(_) => Some(self),
            None => None,
        }
    }
}
