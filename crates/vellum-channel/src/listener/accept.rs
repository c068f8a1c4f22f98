//! The task that accepts.

use super::bind::Bound;
use super::counted::{Counted, Open};
use super::handshake::{Layers, prepare};
use super::options::{Failure, Peer};
use super::{Ready, Shared};
use crate::error::{ErrorKind, error};
use crate::socket::Socket;
use rustix::io::Errno;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;
use tokio::sync::mpsc::{OwnedPermit, Sender, UnboundedReceiver};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

/// How long nothing is accepted when the process has no descriptors left: until others close some.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Failed accepts in a row after which each is followed by a short pause: whatever it is, it keeps no processor busy.
const FAILURES_MAX: u32 = 16;
const FAILURES_PAUSE: Duration = Duration::from_millis(10);

/// Between two warnings of the same.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);

pub(super) struct AcceptLoop {
    shared: Arc<Shared>,
    added: UnboundedReceiver<Bound>,
    ready: Sender<Ready>,
    places: Arc<Semaphore>,
    sockets: Vec<Bound>,
    /// The socket that is looked at first: each after the one that gave the last connection.
    first: usize,
    tasks: JoinSet<()>,
    failures: u32,
    warned: Option<Instant>,
    _gone: TellGone,
}

/// Tells that the task is gone, however it ended. The last field: by then all others are dropped.
struct TellGone(Arc<Shared>);

impl Drop for TellGone {
    fn drop(&mut self) {
        self.0.is_gone.send_replace(true);
    }
}

impl AcceptLoop {
    pub fn new(shared: Arc<Shared>, added: UnboundedReceiver<Bound>, ready: Sender<Ready>) -> Self {
        let places = shared.options.connections_max.unwrap_or(Semaphore::MAX_PERMITS);
        Self {
            added,
            ready,
            places: Arc::new(Semaphore::new(places.clamp(1, Semaphore::MAX_PERMITS))),
            sockets: Vec::new(),
            first: 0,
            tasks: JoinSet::new(),
            failures: 0,
            warned: None,
            _gone: TellGone(shared.clone()),
            shared,
        }
    }

    /// Accepts until it is told to stop.
    pub async fn run(mut self) {
        let mut stop = self.shared.stop.subscribe();
        loop {
            let accepting = accept(&self.ready, &self.places, &self.sockets, &mut self.first);
            let event = tokio::select! {
                biased;
                () = stopped(&mut stop) => break,
                Some(bound) = self.added.recv() => Event::Added(bound),
                Some((at, accepted, room)) = accepting => Event::Accepted(at, accepted, room),
            };
            let pause = match event {
                Event::Added(bound) => {
                    self.sockets.push(bound);
                    continue;
                }
                Event::Accepted(at, accepted, room) => self.take(at, accepted, room),
            };
            if !pause.is_zero() {
                // A stop does not wait for it.
                tokio::select! {
                    () = stopped(&mut stop) => break,
                    () = sleep(pause) => {}
                }
            }
            while self.tasks.try_join_next().is_some() {}
        }
        self.tasks.shutdown().await;
    }

    /// Handles the outcome of an accept; tells how long to pause.
    fn take(&mut self, at: usize, accepted: io::Result<Socket>, room: Room) -> Duration {
        let failure = match accepted {
            Ok(socket) => {
                self.failures = 0;
                self.begin(at, socket, room);
                return Duration::ZERO;
            }
            Err(failure) => failure,
        };
        match Trouble::of(&failure) {
            Trouble::Exhausted => {
                self.warn(&failure);
                EXHAUSTED_PAUSE
            }
            Trouble::Broken => {
                self.give_up(at, &failure, room);
                Duration::ZERO
            }
            Trouble::Passing => {
                tracing::debug!(error = %failure, "a connection went away before it was accepted");
                self.failures = self.failures.saturating_add(1);
                if self.failures > FAILURES_MAX { FAILURES_PAUSE } else { Duration::ZERO }
            }
        }
    }

    fn warn(&mut self, failure: &io::Error) {
        if self.warned.is_none_or(|warned| warned.elapsed() >= WARNING_INTERVAL) {
            self.warned = Some(Instant::now());
            tracing::warn!(
                error = %failure,
                open = *self.shared.open.borrow(),
                "no connections can be accepted for now: raise the limit on open files, or set a limit on connections"
            );
        }
    }

    /// Goes on without a socket that can no longer accept, and tells so.
    fn give_up(&mut self, at: usize, failure: &io::Error, room: Room) {
        let broken = self.sockets.swap_remove(at);
        tracing::error!(endpoint = %broken.endpoint, error = %failure, "a listening socket broke");
        let mut endpoints = self.shared.endpoints.lock();
        if let Some(at) = endpoints.iter().position(|endpoint| *endpoint == broken.endpoint) {
            endpoints.remove(at);
        }
        let message =
            format!("the listening socket at {} broke and was given up: {failure}", broken.endpoint);
        room.slot.send(Err(error(ErrorKind::Listen, message)));
    }

    /// Makes a connection ready, on a task of its own if that may take a while.
    fn begin(&mut self, at: usize, socket: Socket, room: Room) {
        self.shared.accepted.fetch_add(1, Ordering::Relaxed);
        let Some(layers) = self.sockets.get(at).map(|bound| bound.layers.clone()) else { return };
        let Room { slot, place } = room;
        let open = Open::new(self.shared.clone(), place);
        if self.shared.options.admission.is_none() && layers.is_none() {
            match Peer::of(&socket) {
                Ok(peer) => drop(slot.send(Ok((Box::new(Counted::new(socket, open)), peer)))),
                Err(error) => self.shared.count(&Failure::Failed(error), None),
            }
            return;
        }
        self.tasks.spawn(make_ready(self.shared.clone(), layers, socket, open, slot));
    }
}

async fn make_ready(
    shared: Arc<Shared>,
    layers: Arc<Layers>,
    socket: Socket,
    open: Open,
    slot: OwnedPermit<Ready>,
) {
    let peer = match Peer::of(&socket) {
        Ok(peer) => peer,
        Err(error) => return shared.count(&Failure::Failed(error), None),
    };
    match prepare(&shared.options, &layers, Counted::new(socket, open), peer.clone(), slot).await {
        Ok(()) => {}
        Err(failure) => shared.count(&failure, Some(&peer)),
    }
}

impl Shared {
    fn count(&self, failure: &Failure, peer: Option<&Peer>) {
        // One without an address went away before it could be asked for it.
        let from = peer.map(|peer| peer.endpoint.to_string()).unwrap_or_default();
        match failure {
            Failure::Refused(why) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                tracing::info!(from, %why, "a connection was refused");
            }
            Failure::Failed(error) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                tracing::info!(from, %error, "a connection failed before it was ready");
            }
        }
    }
}

/// What the loop waits for.
enum Event {
    Added(Bound),
    Accepted(usize, io::Result<Socket>, Room),
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // Fails only when there is nobody left to stop it: that is the end, too.
    let _ = stop.wait_for(|is_stopped| *is_stopped).await;
}

/// What a connection needs before it is accepted.
struct Room {
    /// Where it is put when it is ready.
    slot: OwnedPermit<Ready>,
    /// One of those that may be open.
    place: OwnedSemaphorePermit,
}

/// Waits for room, then for a connection. Dropped, it gives the room back: a connection is never accepted and lost.
///
/// `None`: nobody takes connections any more.
async fn accept(
    ready: &Sender<Ready>,
    places: &Arc<Semaphore>,
    sockets: &[Bound],
    first: &mut usize,
) -> Option<(usize, io::Result<Socket>, Room)> {
    let place = places.clone().acquire_owned().await.ok()?;
    let slot = ready.clone().reserve_owned().await.ok()?;
    let (at, accepted) = poll_fn(|cx| {
        for step in 0..sockets.len() {
            let at = (*first + step) % sockets.len();
            if let Some(bound) = sockets.get(at)
                && let Poll::Ready(accepted) = bound.socket.poll_accept(cx)
            {
                *first = at + 1;
                return Poll::Ready((at, accepted));
            }
        }
        Poll::Pending
    })
    .await;
    Some((at, accepted, Room { slot, place }))
}

/// What an error of an accept means.
#[derive(Debug, PartialEq, Eq)]
enum Trouble {
    /// The process or the machine has no more of something: later there may be.
    Exhausted,
    /// The socket will never accept again.
    Broken,
    /// It concerns one connection.
    Passing,
}

impl Trouble {
    fn of(error: &io::Error) -> Self {
        const EXHAUSTED: [Errno; 5] = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::NOSPC];
        const BROKEN: [Errno; 4] = [Errno::BADF, Errno::INVAL, Errno::NOTSOCK, Errno::OPNOTSUPP];
        let is_of = |all: &[Errno]| all.iter().any(|one| error.raw_os_error() == Some(one.raw_os_error()));
        if is_of(&EXHAUSTED) {
            Self::Exhausted
        } else if is_of(&BROKEN) || crate::error::kind_of(error) == Some(ErrorKind::Closed) {
            Self::Broken
        } else {
            Self::Passing
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_accept_are_told_apart() {
        for (errno, trouble) in [
            (Errno::MFILE, Trouble::Exhausted),
            (Errno::NFILE, Trouble::Exhausted),
            (Errno::NOMEM, Trouble::Exhausted),
            (Errno::INVAL, Trouble::Broken),
            (Errno::BADF, Trouble::Broken),
            (Errno::CONNABORTED, Trouble::Passing),
            (Errno::PERM, Trouble::Passing),
            (Errno::NETDOWN, Trouble::Passing),
        ] {
            assert_eq!(Trouble::of(&errno.into()), trouble, "{errno}");
        }
        assert_eq!(Trouble::of(&crate::poll_fd::closed()), Trouble::Broken);
    }
}
