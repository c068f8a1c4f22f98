//! Ends children that nobody waits for, without making anybody wait.

use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use std::process::Child;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// How often children that are being ended are looked at.
const TICK: Duration = Duration::from_millis(10);

/// To the thread that all of the process share. It sleeps as long as no child is being ended.
static REAPER: Mutex<Option<Sender<Dying>>> = Mutex::new(None);

struct Dying {
    child: Child,
    /// When patience ends.
    until: Instant,
    is_killed: bool,
}

/// Asks the child to end (`SIGTERM`), makes it end (`SIGKILL`) when it has not after `grace`, and takes its exit status
/// from the system, so that it is no zombie. Returns at once.
pub(super) fn finish(mut child: Child, grace: Duration) {
    if is_gone(&mut child) {
        return;
    }
    signal(&child, Signal::TERM);
    let now = Instant::now();
    let until = now.checked_add(grace).unwrap_or(now);
    hand_over(Dying { child, until, is_killed: false });
}

fn is_gone(child: &mut Child) -> bool {
    // With an error somebody else has taken the exit status.
    !matches!(child.try_wait(), Ok(None))
}

fn signal(child: &Child, signal: Signal) {
    // The process identifier is this child's until its exit status is taken. Fails only for a child that has changed its
    // user, about which nothing can be done.
    let _ = kill_process(Pid::from_child(child), signal);
}

fn hand_over(mut dying: Dying) {
    let mut reaper = REAPER.lock();
    if let Some(sender) = &*reaper {
        match sender.send(dying) {
            Ok(()) => return,
            Err(back) => dying = back.0,
        }
    }
    let (sender, receiver) = channel();
    let spawned = std::thread::Builder::new().name("vellum-reaper".into()).spawn(move || reap(&receiver));
    if spawned.is_ok() && sender.send(dying).is_ok() {
        *reaper = Some(sender);
    }
    // Without a thread the child has its SIGTERM and closed pipes, and nothing to block this thread with.
}

fn reap(receiver: &Receiver<Dying>) {
    let mut dying: Vec<Dying> = Vec::new();
    loop {
        let next = match dying.is_empty() {
            true => receiver.recv().map_err(RecvTimeoutError::from),
            false => receiver.recv_timeout(TICK),
        };
        match next {
            Ok(new) => dying.push(new),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) if dying.is_empty() => return,
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
        }
        let now = Instant::now();
        dying.retain_mut(|one| !one.is_gone(now));
    }
}

impl Dying {
    fn is_gone(&mut self, now: Instant) -> bool {
        if is_gone(&mut self.child) {
            return true;
        }
        if !self.is_killed && now >= self.until {
            signal(&self.child, Signal::KILL);
            self.is_killed = true;
        }
        false
    }
}
