//! Where warnings and information go that are no errors.

use std::sync::Arc;

/// Receives warnings. The default hands them to `tracing`.
#[derive(Clone)]
pub struct Events(Arc<dyn Fn(&str) + Send + Sync>);

impl Events {
    /// Events that `sink` receives.
    pub fn new(sink: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Events(Arc::new(sink))
    }
    /// Something is odd but was tolerated.
    pub fn warn(&self, message: &str) {
        (self.0)(message);
    }
}

impl Default for Events {
    fn default() -> Self {
        Events::new(|message| tracing::warn!("{message}"))
    }
}
