//! VHD: the disk image of Virtual PC, Hyper-V generation 1, Xen and Azure.
//!
//! ```text
//!   fixed                      | guest data                                            | footer |
//!
//!   dynamic and differencing   | footer copy | dynamic header | BAT | parent locators |
//!                              | bitmap, data | bitmap, data | ...                     | footer |
//!                                   ^
//!                BAT: [absent, sector of a block's bitmap, absent, ...]
//! ```
//!
//! All integers are big-endian. The footer in the last 512 bytes says what the file is; the copy at the start is there for
//! the case that the last write was torn. A block is a bitmap, one bit for each sector, and then its data: a set bit
//! means that the sector is here; a clear bit, that the parent has it (differencing) or that it is zero (dynamic). The
//! bitmap of a block of 2 MiB is one sector, so data starts at odd places in files of most writers; our writer lets each
//! block's *data* start on a boundary of 4 KiB, so that file systems can share it.
//!
//! Writing: the file grows behind its footer, never over it; a block that was freed is used again (`alloc.rs`). What is
//! durable when stands at the head of `write.rs`.
//!
//! A differencing image names its parent several times: as relative and absolute path of Windows, as URL, as bare
//! name, and by the parent's UUID, which decides.

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

mod alloc;
mod check;
mod create;
mod header;
mod locator;
mod map;
mod open;
mod parent;
mod repair;
mod survey;
mod write;

use std::sync::Arc;
use vellum_core::{
    BoxFuture, CheckReport, CheckRequest, Confidence, CreateRequest, Format, Image, ImageWriter, OpenRequest,
    OptionSpec, Result, Sample,
};

/// The driver of VHD images.
#[derive(Clone, Copy, Debug, Default)]
pub struct Vhd;

impl Format for Vhd {
    fn name(&self) -> &'static str {
        header::FORMAT
    }
    fn aliases(&self) -> &'static [&'static str] {
        &["vpc"]
    }
    fn description(&self) -> &'static str {
        "Virtual PC and Hyper-V disk image"
    }
    fn extensions(&self) -> &'static [&'static str] {
        &["vhd", "vpc", "avhd", "vud"]
    }
    fn probe(&self, sample: &Sample<'_>) -> Confidence {
        open::probe(sample)
    }
    fn open(&self, request: OpenRequest) -> BoxFuture<'static, Result<Arc<dyn Image>>> {
        Box::pin(async move {
            let image: Arc<dyn Image> = Arc::new(open::open(request).await?);
            Ok(image)
        })
    }
    fn create_options(&self) -> &'static [OptionSpec] {
        create::OPTIONS
    }
    fn create(&self, request: CreateRequest) -> BoxFuture<'static, Result<Box<dyn ImageWriter>>> {
        Box::pin(create::create(request))
    }
    fn check(&self, request: CheckRequest) -> BoxFuture<'static, Result<CheckReport>> {
        Box::pin(check::check(request))
    }
}
