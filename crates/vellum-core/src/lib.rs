//! The nouns of Vellum, as the code sees them.
//!
//! ```text
//!   Disk      an ordered chain of images: the device that a guest sees          disk.rs, chain.rs
//!     Image   one image of one format: answers *where* a range lives            image.rs, format.rs
//!       Storage  bytes at offsets: a file, memory, a slice, and every Disk      storage.rs, memory.rs
//!   Output, ImageWriter   new images, laid out in ascending order               writer.rs
//!   Completion  the result of an operation that may not have ended yet          completion.rs
//!   WritableImage, Committer, RangeLocks   changing images                        write.rs, commit.rs, locks.rs, disk_write.rs
//!   Resolver    the only way to a file                                          resolver.rs
//! ```
//!
//! Nothing here knows a runtime, a file system or a format.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod buf;
pub mod bytes;
mod chain;
mod check;
mod commit;
mod completion;
mod concat;
mod disk;
mod disk_state;
mod disk_vectored;
mod disk_write;
mod disk_zero;
mod error;
mod events;
mod format;
pub mod geometry;
mod image;
mod limits;
mod locks;
mod memory;
mod resolver;
mod shareable;
mod slice;
mod snapshots;
mod spawner;
pub mod storage;
mod sync;
mod table;
mod write;
mod writer;

pub use buf::{BUF_ALIGN, Buf, BufPool};
pub use chain::{ChainOptions, FormatRegistry, OpenedImage, Probe, WriteAccess};
pub use check::{CheckReport, CheckRequest, FINDINGS_MAX, Finding, Fix, Patch, Severity};
pub use commit::{Committer, FlushPoint, flush_at, mutation};
pub use completion::{BoxFuture, Completer, Completion, Lost, WithBuf, block_on};
pub use concat::Concat;
pub use disk::{Disk, DiskExtent, DiskOptions, Layer, Piece, PieceKind};
pub use disk_state::OpenFlags;
pub use error::{Code, Error, Kind, Printable, Result};
pub use events::Events;
pub use format::{
    Confidence, CreateRequest, DiskTraits, Format, OpenRequest, OptionKind, OptionSpec, OptionValues,
    ParentLink, Providers, Sample, parse_size,
};
pub use image::{
    Chs, Codec, Encoded, Extent, Identity, Image, ImageInfo, Lookup, ParentHint, ParentRef, Property, Uuid,
    Value, lookup,
};
pub use limits::Limits;
pub use locks::{Acquire, Hold, RangeGuard, RangeLocks};
pub use memory::Memory;
pub use resolver::{Access, Asker, Location, Opened, Resolver};
pub use slice::Slice;
pub use snapshots::{SnapshotInfo, Snapshots};
pub use spawner::Spawner;
pub use storage::{
    CopyMode, Offloaded, Preallocate, Status, StatusList, Storage, StorageId, StorageLimits, WriteFlags,
    ZeroMode,
};
pub use table::{PAGE_BYTES_MAX, Rank, TableCache, TableChange, TableView};
pub use write::{Discarded, Intent, Placement, Reservation, WritableImage, not_shareable};
pub use writer::{
    ImageWriter, MetaWrite, Output, OutputMode, Payload, Place, TableWriter, WriterShape, fill_range,
    set_len, write_all,
};
