//! [`Snapshots`]: states of a disk that an image keeps inside itself.

use crate::{BoxFuture, Result};

/// One snapshot, as the image lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique in the image; given by the writer.
    pub id: String,
    /// Given by the user; may be empty or repeated.
    pub name: String,
    /// Seconds since 1970.
    pub created_unix: u64,
    /// Size of the disk in the snapshot, in bytes.
    pub disk_size: u64,
    /// Bytes of saved machine state.
    pub vm_state_size: u64,
}

/// The snapshots of an open image. Changing ones need an image that was opened for writing and a disk that is idle:
/// nothing else may be under way. Each is durable when it returns, and a crash leaves the state before or after.
pub trait Snapshots: Send + Sync {
    /// All snapshots, oldest first.
    fn list(&self) -> BoxFuture<'_, Result<Vec<SnapshotInfo>>>;
    /// Keeps the present state under `name`; returns the new id.
    fn create(&self, name: String, now_unix: u64) -> BoxFuture<'_, Result<SnapshotInfo>>;
    /// Makes the disk what it was in a snapshot (id or name). What it is now is lost.
    fn apply(&self, snapshot: String) -> BoxFuture<'_, Result<()>>;
    /// Deletes a snapshot (id or name).
    fn delete(&self, snapshot: String) -> BoxFuture<'_, Result<()>>;
}
