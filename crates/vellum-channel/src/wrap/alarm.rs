//! Timers that are made on the executor in use, when they are needed.

use crate::error::{ErrorKind, error};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::runtime::{Handle, Id};
use tokio::time::{Instant, Sleep};

/// The executor that timers are made on.
#[derive(Clone, Debug, Default)]
pub(super) enum Executor {
    /// That of the task which waits.
    #[default]
    Current,
    Attached(Handle),
    Detached,
}

impl Executor {
    fn handle(&self) -> io::Result<Handle> {
        let found = match self {
            Self::Current => Handle::try_current().ok(),
            Self::Attached(handle) => Some(handle.clone()),
            Self::Detached => None,
        };
        found.ok_or_else(|| {
            let message =
                "the channel would have to wait but is on no executor: attach it to one that has timers";
            error(ErrorKind::Detached, message)
        })
    }
}

/// A timer for one direction.
#[derive(Debug, Default)]
pub(super) struct Alarm {
    set: Option<(Id, Pin<Box<Sleep>>)>,
}

impl Alarm {
    /// Waits until `deadline`.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        executor: &Executor,
        deadline: Instant,
    ) -> Poll<io::Result<()>> {
        let handle = executor.handle()?;
        // A timer dies with its executor: never keep one of another.
        if self.set.as_ref().is_some_and(|(id, _)| *id != handle.id()) {
            self.set = None;
        }
        let (_, sleep) = self.set.get_or_insert_with(|| {
            let _context = handle.enter();
            (handle.id(), Box::pin(tokio::time::sleep_until(deadline)))
        });
        if sleep.deadline() != deadline {
            sleep.as_mut().reset(deadline);
        }
        sleep.as_mut().poll(cx).map(Ok)
    }

    /// Forgets the timer.
    pub(super) fn clear(&mut self) {
        self.set = None;
    }
}
