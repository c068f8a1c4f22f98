//! What the tests across crates share.

pub mod chains;
pub mod conversions;
pub mod corpus;
pub mod crash;
pub mod disks;
pub mod parallel;
pub mod tools;
pub mod variants;
pub mod wrap;
pub mod writing;
