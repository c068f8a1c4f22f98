//! VMDK: the virtual disk family of VMware, as VMware, VirtualBox and QEMU write it.
//!
//! A disk is one text *descriptor* and one or more *extents* that follow each other. The descriptor is a file of its
//! own, or stands inside the only extent. An extent is raw bytes (FLAT, VMFS), nothing (ZERO), or one of three sparse
//! files: the hosted one drawn here, ESX's older COWD and newer seSparse (read only).
//!
//! ```text
//!  hosted sparse (monolithicSparse, twoGbMaxExtentSparse)        streamOptimized
//!  sector 0   header "KDMV"                                      header, gdOffset = -1
//!         1   descriptor, 20 sectors (if embedded)               descriptor
//!        21   redundant grain directory                          ... pad to overHead (128)
//!             redundant grain tables                             marker, zlib data   } grains of the
//!             grain directory:  u32 sector of each table         marker, zlib data   } first table
//!             grain tables:     u32 sector of each grain         GT marker, grain table
//!  overHead   grains of 64 KiB, in the order of allocation       marker, zlib data ...
//!                                                                GD marker, grain directory
//!                                                                footer marker, footer, end of stream
//! ```
//!
//! Who reads what: `descriptor` the text, `header` the binary structures, `open` puts a disk together
//! from both, `extent` says what table entries mean, `tables` caches them, `map` answers where a range lives, `grain`
//! decompresses. `create`, `flat`, `sparse` and `stream` lay out new disks, `print` writes their descriptors, `child`
//! links them to a parent.
//!
//! Who writes: `open_write` says whether a disk can be written, `session` begins and ends, `write` changes tables, `alloc`
//! finds room. Who doubts: `audit` walks through all tables, `disputes` decides between a table and its copy, `check`
//! reports, `repair` plans what mends it.

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
mod audit;
mod check;
mod child;
mod create;
mod descriptor;
mod disputes;
mod extent;
mod flat;
mod grain;
mod header;
mod holes;
mod image;
mod info;
mod map;
mod open;
mod open_write;
mod print;
mod repair;
mod session;
mod sparse;
mod stream;
mod tables;
mod unwritten;
mod write;

use std::sync::Arc;
use vellum_core::{
    BoxFuture, CheckReport, CheckRequest, Code, Confidence, CreateRequest, Error, Format, Image, ImageWriter,
    OpenRequest, OptionSpec, Result, Sample, bytes,
};

/// The name that users type.
pub(crate) const NAME: &str = "vmdk";

/// The driver of VMDK.
#[derive(Clone, Copy, Debug, Default)]
pub struct Vmdk;

impl Format for Vmdk {
    fn name(&self) -> &'static str {
        NAME
    }

    fn description(&self) -> &'static str {
        "VMware virtual disk (sparse, flat, split, stream-optimized), also of VirtualBox and QEMU"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["vmdk"]
    }

    fn probe(&self, sample: &Sample<'_>) -> Confidence {
        let magic: Option<[u8; 4]> = bytes::array(sample.head, 0);
        let sparse = matches!(magic, Some(header::MAGIC_KDMV | header::MAGIC_COWD))
            || bytes::le64(sample.head, 0) == Some(header::MAGIC_SESPARSE);
        if sparse || descriptor::looks_like_one(sample.head) { Confidence::Sure } else { Confidence::No }
    }

    fn open(&self, request: OpenRequest) -> BoxFuture<'static, Result<Arc<dyn Image>>> {
        Box::pin(async move {
            let location = request.location.clone();
            match open::open(request).await {
                Ok(image) => {
                    let image: Arc<dyn Image> = Arc::new(image);
                    Ok(image)
                }
                Err(error) => Err(error.format(NAME).image(location)),
            }
        })
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        create::OPTIONS
    }

    fn check(&self, request: CheckRequest) -> BoxFuture<'static, Result<CheckReport>> {
        Box::pin(async move {
            let location = request.location.clone();
            check::check(request).await.map_err(|e| e.format(NAME).image(location))
        })
    }

    fn create(&self, request: CreateRequest) -> BoxFuture<'static, Result<Box<dyn ImageWriter>>> {
        Box::pin(async move {
            let location = request.output.location().clone();
            create::create(request).await.map_err(|e| e.format(NAME).image(location))
        })
    }
}

/// An error about a field of the format.
#[cold]
pub(crate) fn problem(code: Code, message: &str, field: &'static str, at: u64) -> Error {
    Error::new(code, message).format(NAME).field(field).at(at)
}
