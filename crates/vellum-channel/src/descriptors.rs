//! File descriptors that travel along a channel.

use crate::error::{ErrorKind, error};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

/// Descriptors that one message can carry: the kernel's `SCM_MAX_FD`.
pub const MESSAGE_DESCRIPTORS_MAX: usize = 253;

/// Descriptors received and not yet taken, in the order they came. Those that nobody takes are closed with it.
///
/// It holds no more than its limit: what a peer sends beyond that is closed at once, and the read is an error.
#[derive(Debug)]
pub struct Descriptors {
    received: VecDeque<OwnedFd>,
    limit: usize,
}

impl Descriptors {
    /// Room for at most `limit` descriptors at a time.
    pub fn with_limit(limit: usize) -> Self {
        Self { received: VecDeque::new(), limit }
    }

    /// The most it holds.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// How many more it takes.
    pub fn room(&self) -> usize {
        self.limit.saturating_sub(self.received.len())
    }

    /// How many wait to be taken.
    pub fn len(&self) -> usize {
        self.received.len()
    }

    /// Whether none waits to be taken.
    pub fn is_empty(&self) -> bool {
        self.received.is_empty()
    }

    /// Takes the oldest.
    pub fn take(&mut self) -> Option<OwnedFd> {
        self.received.pop_front()
    }

    /// Takes all, oldest first.
    pub fn drain(&mut self) -> impl Iterator<Item = OwnedFd> + '_ {
        self.received.drain(..)
    }

    /// Adds those of one message. For implementers of channels.
    ///
    /// # Errors
    /// [`ErrorKind::TooManyDescriptors`] when they do not fit: all of this message are closed then.
    pub fn add(&mut self, message: Vec<OwnedFd>) -> io::Result<()> {
        if message.len() > self.room() {
            return Err(error(
                ErrorKind::TooManyDescriptors,
                format!(
                    "the peer sent {} descriptors where {} more are taken (limit {}): they were closed",
                    message.len(),
                    self.room(),
                    self.limit
                ),
            ));
        }
        self.received.extend(message);
        Ok(())
    }
}

impl Default for Descriptors {
    /// As many as one message can carry.
    fn default() -> Self {
        Self::with_limit(MESSAGE_DESCRIPTORS_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::kind_of;
    use std::os::fd::AsRawFd;

    fn descriptor() -> OwnedFd {
        std::fs::File::open("/dev/null").expect("a file").into()
    }

    #[test]
    fn they_come_out_in_order_and_within_the_limit() {
        let mut all = Descriptors::with_limit(3);
        let sent: Vec<_> = (0..2).map(|_| descriptor()).collect();
        let numbers: Vec<_> = sent.iter().map(AsRawFd::as_raw_fd).collect();
        all.add(sent).expect("two fit");
        assert_eq!((all.len(), all.room()), (2, 1));
        let refused = all.add(vec![descriptor(), descriptor()]).expect_err("two more do not fit");
        assert_eq!(kind_of(&refused), Some(ErrorKind::TooManyDescriptors));
        let taken: Vec<_> = all.drain().map(|one| one.as_raw_fd()).collect();
        assert_eq!(taken, numbers);
        assert!(all.is_empty());
    }
}
