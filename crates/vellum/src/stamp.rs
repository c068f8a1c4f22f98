//! [`SourceStamp`]: whether the files of a source are still what they were.

use vellum_core::{Code, Error, OpenedImage, Result, Storage};

/// Identity, size and time of the files of the source: they must not change while they are read.
pub(crate) struct SourceStamp(pub(crate) Vec<Vec<Stamp>>);

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    id: Option<vellum_core::StorageId>,
    len: Option<u64>,
    modified_ns: Option<u128>,
}

impl SourceStamp {
    pub(crate) fn take(images: &[OpenedImage]) -> Self {
        let stamp = |storage: &dyn Storage| Stamp {
            id: storage.id(),
            len: storage.len().ok(),
            modified_ns: storage.modified_ns(),
        };
        let of_image = |image: &OpenedImage| {
            let parts = image.layer.image.storages().iter().map(|s| stamp(s.as_ref()));
            std::iter::once(stamp(image.storage.as_ref())).chain(parts).collect()
        };
        SourceStamp(images.iter().map(of_image).collect())
    }

    pub(crate) fn check(&self, images: &[OpenedImage]) -> Result<()> {
        let now = SourceStamp::take(images);
        match self.0.iter().zip(&now.0).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(index) => {
                let name = images.get(index).map_or("", |image| image.layer.location.0.as_str());
                Err(Error::new(Code::SourceChanged, "the source was changed while it was read")
                    .image(name)
                    .hint("stop whatever writes to it, then convert again without --resume"))
            }
        }
    }
}
