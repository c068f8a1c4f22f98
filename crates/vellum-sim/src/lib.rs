//! Simulated storage for tests.
//!
//! ```text
//!   MemoryFiles   files in memory; records which were touched                       memory_files.rs
//!   SimFiles      files that record every operation, fail on demand and complete
//!                 operations late and out of order, as a seed says                  files.rs, disk.rs, fault.rs
//!     Trace       what was done, in the order of issue and of completion            trace.rs
//!       Crash     what a power loss at a moment may leave: states by mask           crash.rs, mask.rs
//!   Oracle        what each sector may hold after a power loss                      oracle.rs, request.rs, sector.rs
//!   FileSet, Content   the bytes, shared by all states (copy-on-write)              trace.rs, content.rs
//! ```
//!
//! The model of the disk (RELIABILITY.md section 3.1): operations between two flushes may persist in any subset, each
//! torn at 512 bytes (and sectors with a checksum inside, too: [`Crash::garbling`]); the length of a file is separate from its content; names are durable after the directory is
//! synchronised. A flush that fails saves nothing, and what was written before it may be lost for good; when the file
//! is closed, it is what the disk holds, for then Vellum has the kernel forget what it has cached of it.

#![forbid(unsafe_code)]

mod content;
mod crash;
mod disk;
mod fault;
mod files;
mod mask;
mod memory_files;
mod names;
mod oracle;
mod random;
mod request;
mod sector;
mod trace;

pub use content::{Content, SECTOR, hash_of, mix};
pub use crash::{Crash, Member};
pub use disk::SimDisk;
pub use fault::{Fault, FaultKind, FaultOn};
pub use files::SimFiles;
pub use mask::{Depth, Mask, Part, masks};
pub use memory_files::MemoryFiles;
pub use oracle::{Allowed, Oracle};
pub use random::Random;
pub use request::{Request, RequestKind};
pub use sector::{Tag, sector_bytes};
pub use trace::{Event, FileId, FileSet, OnDisk, Op, OpKind, Trace};
