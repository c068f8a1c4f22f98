//! Test suites that every Storage, every format and every channel passes. Panics are how a suite says no.

#![forbid(unsafe_code)]

#[cfg(feature = "channel")]
pub mod channel;
pub mod counting;
pub mod format;
pub mod mending;
pub mod peers;
pub mod power_loss;
pub mod storage;
pub mod writing;
