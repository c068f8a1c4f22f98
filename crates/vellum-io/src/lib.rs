//! Storage on this machine: files and block devices, and who may open which.
//!
//! ```text
//!   LocalFiles   a Resolver: names to files, and what an image may name         resolver.rs, names.rs
//!     LocalFile  a Storage over one file or block device                        file.rs, open.rs
//!       locks    that keep other processes out, QEMU too                        lock.rs, holder.rs
//!       inline   on the thread that asks                                        raw.rs, change.rs, holes.rs, copy.rs
//!       pool     on threads of this crate                                       threads.rs
//!       uring    by io_uring, one ring and one reaping thread                   uring.rs
//!   CpuPool      a Spawner: threads that decode and encode                      threads.rs
//! ```
//!
//! | Driver | Read that the page cache holds, small write into it | Other reads and writes | Flush, zero, copy | Threads |
//! |---|---|---|---|---|
//! | `inline` | caller's thread | caller's thread | caller's thread | none |
//! | `pool` | caller's thread | pool | pool | up to [`ContextOptions::threads`] |
//! | `uring` | caller's thread | ring | pool | one reaper, and the pool when needed |
//!
//! A read that the page cache can serve never changes threads (`preadv2` with `RWF_NOWAIT`), nor does a small write into
//! the page cache as long as such writes are quick (`quick.rs`). What the ring does not carry out in full is finished by a
//! positional call on the pool, so errors are told apart in one place, `raw.rs`. When too much is under way, the thread
//! that asks does the work itself: that bounds memory and cannot deadlock.
//!
//! Operations own their buffer and the open file until the kernel is done with both; dropping a completion abandons
//! the answer only. Files are never mapped into memory: a file that shrinks gives an error, not a signal.
//!
//! `unsafe` is allowed in two modules: `uring.rs` (the ring) and `sys.rs` (three system calls that `rustix` lacks).

#![deny(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod change;
mod context;
mod copy;
mod file;
mod gate;
mod holder;
mod holes;
mod lock;
mod names;
mod open;
mod pending;
mod policy;
mod quick;
mod raw;
mod resolver;
mod sys;
mod threads;
mod uring;

pub use context::{ContextOptions, Driver, IoContext};
pub use file::LocalFile;
pub use lock::LockMode;
pub use open::{Create, OpenOptions};
pub use policy::FilePolicy;
pub use resolver::LocalFiles;
pub use threads::CpuPool;
