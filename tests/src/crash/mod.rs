//! The crash simulator at work on the formats (RELIABILITY.md section 3.3).
//!
//! ```text
//!   cases.rs      the formats and how their images are made      start.rs     the image that a workload begins with
//!   guest.rs      requests, workloads, and their text            workloads.rs which workloads there are
//!   run.rs        a workload runs, is recorded and watched       explore.rs   its crash states are gone through
//!   verify.rs     what must hold of every state (I1 to I11)      peer.rs      QEMU looks at some of them
//!   shrink.rs     a failure is made small                        hunt.rs      all of it for one case, with counts
//!   cost.rs       what a request costs in file flushes
//! ```

pub mod cases;
pub mod cost;
pub mod explore;
pub mod guest;
pub mod hunt;
pub mod peer;
pub mod run;
pub mod shrink;
pub mod start;
pub mod verify;
pub mod view;
pub mod workloads;
