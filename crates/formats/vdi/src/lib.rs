//! VDI: the disk image of VirtualBox.
//!
//! ```text
//!   0x000       text (64 bytes), signature, version
//!   0x048       header: sizes, counters, geometry, UUIDs (0x180 or 0x190 bytes, or 348 bytes in version 0.2)
//!   offBlocks   block map: cBlocks entries of 32 bits, little-endian
//!   offData     block 0 | block 1 | block 2 | ...        each cbBlockExtra + cbBlock bytes
//!                  ^         ^
//!     map: [FREE, 1, FREE, 0, ZERO, ...]      guest block 3 is the first block of the file
//! ```
//!
//! A file grows by one block at a time, at its end; the next block has the index `cBlocksAllocated`. An entry of the
//! map is such an index, or FREE (not here: the parent answers, or zeros), or ZERO (zeros, whatever the parent holds).
//! A differencing image names no file: it knows its parent by UUID only, and by a second UUID the state of the parent
//! at the time when the child was made.
//!
//! Written in place, an image stays dense: the last block moves into the hole that a discarded one leaves, and the file
//! ends with its last block. Data is durable before the entry that points to it, and so is the counter.
//!
//! The map of a large disk is large (256 MiB for 64 TiB), so it is never held whole: it is read in pages through the
//! table cache and written a page at a time.

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
mod layout;
mod map;
mod open;
mod repair;
mod scan;
mod session;
mod slots;
mod write;

use std::sync::Arc;
use vellum_core::{
    BoxFuture, CheckReport, CheckRequest, Confidence, CreateRequest, Format, Image, ImageWriter, OpenRequest,
    OptionSpec, Result, Sample,
};

/// The driver of VDI images.
#[derive(Clone, Copy, Debug, Default)]
pub struct Vdi;

impl Format for Vdi {
    fn name(&self) -> &'static str {
        header::FORMAT
    }
    fn description(&self) -> &'static str {
        "VirtualBox disk image"
    }
    fn extensions(&self) -> &'static [&'static str] {
        &["vdi"]
    }
    fn probe(&self, sample: &Sample<'_>) -> Confidence {
        match header::signature_and_version(sample.head) {
            Some((header::SIGNATURE, header::VERSION_1_1 | header::VERSION_0_2)) => Confidence::Sure,
            // An unknown version is still nobody else's file: opening it names the version.
            Some((header::SIGNATURE, _)) => Confidence::Weak,
            _ => Confidence::No,
        }
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
