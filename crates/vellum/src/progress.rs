//! What long jobs tell about themselves, and how they are stopped.

/// Whether a job goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Stop soon, in a state from which the job can be resumed or repeated.
    Stop,
}

/// Receives the progress of a job. Called from several threads, a few hundred times a second at most.
pub trait Progress: Send + Sync {
    /// A phase begins: `converting`, `verifying`, ...; `total` is the disk's size in bytes.
    fn begin(&self, phase: &str, total: u64);
    /// The job has dealt with the disk up to `position`, and moved `moved` bytes of data in all.
    fn advance(&self, position: u64, moved: u64) -> Control;
}

/// Tells nobody, stops never.
pub struct Quiet;

impl Progress for Quiet {
    fn begin(&self, _phase: &str, _total: u64) {}
    fn advance(&self, _position: u64, _moved: u64) -> Control {
        Control::Continue
    }
}
