//! Virtual disks: open, convert, compare, map and digest.
//!
//! [`Vellum`] is the entry: it holds the formats, the [`Resolver`] through which every file is reached, and the
//! limits. Each verb is a job in a module of its own.
//!
//! ```no_run
//! use vellum::{ConvertRequest, FilePolicy, Quiet, Vellum};
//! let vellum = Vellum::local(FilePolicy::default());
//! let report = vellum.convert(&ConvertRequest::new("disk.vmdk", "disk.qcow2", "qcow2"), &Quiet)?;
//! println!("{} bytes of data", report.data_bytes);
//! # Ok::<(), vellum::Error>(())
//! ```

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod compare;
mod context;
mod convert;
mod create;
mod digest;
mod journal;
mod map;
mod pipeline;
mod progress;
mod scan;
mod target;

pub use compare::{CompareReport, CompareRequest};
pub use context::{FilePolicy, Vellum, formats};
pub use convert::{ConvertReport, ConvertRequest};
pub use create::CreateDiskRequest;
pub use digest::{DigestReport, DigestRequest, TREE_BLOCK_BYTES, TreeHash};
pub use map::{MapEntry, MapKind};
pub use progress::{Control, Progress, Quiet};
pub use vellum_core::*;
pub use vellum_io as io;
