//! Test suites that every Storage and every format passes. Panics are how a suite says no.

#![forbid(unsafe_code)]

pub mod counting;
pub mod format;
pub mod peers;
pub mod storage;
pub mod writing;
