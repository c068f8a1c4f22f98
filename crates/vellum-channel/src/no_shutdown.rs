//! The control of channels that have no directions to end.

use crate::channel::Shutdown;
use crate::control::Controls;
use crate::error::{ErrorKind, error};
use std::io;

/// Refuses to shut down: `.0` is the kind of channel.
#[derive(Debug)]
pub(crate) struct NoShutdown(pub &'static str);

impl Controls for NoShutdown {
    fn shutdown(&self, _how: Shutdown) -> io::Result<()> {
        Err(error(
            ErrorKind::Unsupported,
            format!("a {} channel has no peer and cannot be shut down: close it", self.0),
        ))
    }
}
