//! Sockets: the scenarios of QEMU's unit tests, and what they leave out.

mod common;
mod descriptors;
mod endings;
mod inherited;
mod listener;
mod moving;
mod transfer;
mod zero_copy;
