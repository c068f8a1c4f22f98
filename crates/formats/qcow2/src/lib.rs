//! QCOW2, versions 2 and 3 (format sheet `qcow2.md`).
//!
//! A guest cluster is found through two levels of tables; every host cluster has a reference count. All numbers are
//! big-endian; a cluster is `2^cluster_bits` bytes.
//!
//! ```text
//!   cluster 0   header | header extensions | backing file name
//!   L1 table    offset of an L2 table, for each  cluster * entries-of-L2  guest bytes
//!     L2 table  one cluster of entries: absent | zero | host cluster | compressed (any byte offset)
//!               extended: entry and a bitmap of 32 subclusters
//!   refcount table -> refcount blocks -> one count for each host cluster
//!   snapshot table, bitmap directory, (data file: another file, guest offset = host offset)
//! ```
//!
//! New images: header and L1 in front, then L2 tables, data and refcount blocks in the order in which they are
//! allocated, the refcount table last, the header when everything else stands (`create`, `refcount`).
//!
//! Writing in place: whatever is pointed to is counted and durable before the pointer, and let go after the pointer is
//! gone, so that a crash loses space at most. Tables change in memory and go out in groups:
//!
//! ```text
//!   guest data, copied edges      -> file at once                      reserve
//!   counts + 1, fresh L2 tables   -> rank 0  | FLUSH                   alloc, refpage
//!   L2 entries, L1 entries        -> rank 1  | FLUSH                   reserve, discard
//!   counts - 1, holes             -> after that, with the next group   release
//!   refcount blocks, their table  -> a sequence of their own           grow
//! ```

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
mod backing;
mod bitmaps;
mod check;
mod compare;
mod counts;
mod create;
mod discard;
mod entry;
mod extensions;
mod grow;
mod header;
mod judge;
mod layout;
mod map;
mod open;
mod plan;
mod rebuild;
mod refcount;
mod refpage;
mod release;
mod reserve;
mod roots;
mod session;
mod snapshot;
mod snapshot_table;
mod snapshot_tree;
mod snapshots;
mod stored;
mod tally;
mod walk;
mod write;

use std::sync::Arc;
use vellum_core::{
    BoxFuture, CheckReport, CheckRequest, Confidence, CreateRequest, Format, Image, ImageWriter, OpenRequest,
    OptionSpec, Result, Sample, bytes,
};

/// The driver of QCOW2.
#[derive(Clone, Copy, Debug, Default)]
pub struct Qcow2;

impl Format for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }
    fn description(&self) -> &'static str {
        "QEMU copy-on-write, versions 2 and 3"
    }
    fn extensions(&self) -> &'static [&'static str] {
        &["qcow2"]
    }
    fn probe(&self, sample: &Sample<'_>) -> Confidence {
        let magic = bytes::be32(sample.head, 0) == Some(header::MAGIC);
        match bytes::be32(sample.head, 1) {
            // Version 1 is another format, with a driver of its own.
            Some(version) if magic && version >= 2 => Confidence::Sure,
            _ => Confidence::No,
        }
    }
    fn open(&self, request: OpenRequest) -> BoxFuture<'static, Result<Arc<dyn Image>>> {
        Box::pin(open::open(request))
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
