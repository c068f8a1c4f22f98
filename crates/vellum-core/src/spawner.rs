//! [`Spawner`]: where CPU work goes. The core knows no runtime.

/// Runs work on other threads.
pub trait Spawner: Send + Sync + 'static {
    /// Runs `work` soon, on a thread where it may compute for long.
    fn spawn(&self, work: Box<dyn FnOnce() + Send>);
    /// Threads that compute at the same time.
    fn threads(&self) -> usize;
}
