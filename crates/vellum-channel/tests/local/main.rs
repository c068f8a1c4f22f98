//! Channels that need no network: memory, files, child processes, and the wrappers around channels.

mod command;
mod common;
mod faulty;
mod file;
mod file_cancel;
mod memory;
mod pair;
mod wrap;
