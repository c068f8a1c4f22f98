//! Raw: the bytes of the disk, and nothing else.
//!
//! ```text
//!   file    0                                        length of the file
//!           | guest byte 0 ... guest byte size - 1 |
//! ```
//!
//! There is no header, so there is nothing to recognise: any file is a raw image, and a guest can write a header
//! of any other format into its first sectors. That is why raw never claims a file; the registry falls back to
//! it, and says that it did. Sparseness is the storage's: holes of the file are holes of the disk.

#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::as_conversions
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::as_conversions
    )
)]

mod create;
mod map;
mod write;

use map::RawImage;
use std::sync::Arc;
use vellum_core::{
    BoxFuture, Confidence, CreateRequest, Format, Image, ImageWriter, OpenRequest, OptionSpec, Result, Sample,
};

/// The driver of raw images.
#[derive(Clone, Copy, Debug, Default)]
pub struct Raw;

impl Format for Raw {
    fn name(&self) -> &'static str {
        map::FORMAT
    }
    fn aliases(&self) -> &'static [&'static str] {
        &["img", "dd"]
    }
    fn description(&self) -> &'static str {
        "the bytes of the disk and nothing else"
    }
    fn extensions(&self) -> &'static [&'static str] {
        &["raw", "img", "dd", "bin"]
    }
    fn probe(&self, _sample: &Sample<'_>) -> Confidence {
        Confidence::No
    }
    fn open(&self, request: OpenRequest) -> BoxFuture<'static, Result<Arc<dyn Image>>> {
        Box::pin(async move {
            let image: Arc<dyn Image> = Arc::new(RawImage::open(request)?);
            Ok(image)
        })
    }
    fn create_options(&self) -> &'static [OptionSpec] {
        create::OPTIONS
    }
    fn create(&self, request: CreateRequest) -> BoxFuture<'static, Result<Box<dyn ImageWriter>>> {
        Box::pin(create::create(request))
    }
}
