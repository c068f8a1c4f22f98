//! Virtual disks: open, write, convert, compare, map, digest, check, repair, measure.
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

mod backup;
mod bench;
mod check;
mod compare;
mod context;
mod convert;
mod create;
mod digest;
mod journal;
mod latency;
mod map;
mod pipeline;
mod progress;
mod repair;
mod scan;
mod seed;
mod snapshots;
mod stamp;
mod target;
mod undo;

pub use bench::{BenchLimit, BenchOrder, BenchReport, BenchRequest, BenchSession};
pub use compare::{CompareReport, CompareRequest};
pub use context::{FilePolicy, Vellum, formats};
pub use convert::{ConvertReport, ConvertRequest};
pub use create::{CreateDiskRequest, CreateReport, ParentReport, ParentRequest};
pub use digest::{DigestReport, DigestRequest, TREE_BLOCK_BYTES, TreeHash};
pub use latency::Latencies;
pub use map::{MapEntry, MapKind};
pub use progress::{Control, Progress, Quiet};
pub use repair::{RepairChoice, RepairPlan, RepairReport};
pub use undo::UndoReport;
pub use vellum_core::*;
pub use vellum_io as io;
