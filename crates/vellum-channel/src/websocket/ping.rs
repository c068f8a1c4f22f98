//! Pings of our own.

use super::wakers::Wakers;
use crate::error::{ErrorKind, error};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep};

/// What is known of answers.
#[derive(Clone, Copy, Debug, Default)]
struct Answers {
    /// The number of the last ping that was answered: all before it are, too.
    last: u64,
    /// There will be no more.
    is_over: bool,
}

/// What the tasks that ping and the channel share.
#[derive(Debug)]
struct Requests {
    /// The number of the last ping that somebody wants sent.
    last: AtomicU64,
    wakers: Arc<Wakers>,
}

impl Requests {
    fn add(&self) -> u64 {
        let number = self.last.fetch_add(1, Ordering::AcqRel).wrapping_add(1);
        self.wakers.wake_all();
        number
    }
}

/// The channel's side: what to send, and who waits for the answer.
#[derive(Debug)]
pub(super) struct Pings {
    requests: Arc<Requests>,
    sent: u64,
    answers: watch::Sender<Answers>,
}

impl Pings {
    pub fn new(wakers: Arc<Wakers>) -> Self {
        let requests = Arc::new(Requests { last: AtomicU64::new(0), wakers });
        Self { requests, sent: 0, answers: watch::Sender::new(Answers::default()) }
    }

    /// Wants a ping sent; its number.
    pub fn request(&self) -> u64 {
        self.requests.add()
    }

    /// The payload of the ping to send now, if any. One answers all that were wanted.
    pub fn due(&self) -> Option<u64> {
        let wanted = self.requests.last.load(Ordering::Acquire);
        (wanted > self.sent).then_some(wanted)
    }

    /// That ping is on its way.
    pub fn sent(&mut self, number: u64) {
        self.sent = number;
    }

    /// A pong came. One that answers no ping of ours is nothing (RFC 6455, section 5.5.3).
    pub fn answered(&self, payload: &[u8]) {
        let Ok(number) = payload.try_into().map(u64::from_be_bytes) else { return };
        if number <= self.sent {
            self.answers.send_if_modified(|answers| {
                let is_news = number > answers.last;
                answers.last = answers.last.max(number);
                is_news
            });
        }
    }

    pub fn is_answered(&self, number: u64) -> bool {
        self.answers.borrow().last >= number
    }

    /// There will be no more answers.
    pub fn end(&self) {
        self.answers.send_if_modified(|answers| !std::mem::replace(&mut answers.is_over, true));
    }

    pub fn pinger(&self) -> Pinger {
        Pinger { requests: self.requests.clone(), answers: self.answers.subscribe() }
    }
}

/// Pings the peer of a [`WebSocket`](crate::WebSocket) while other tasks use it: clone it, send it anywhere.
///
/// It is the task that reads which finds the answer: somebody must be reading.
#[derive(Clone, Debug)]
pub struct Pinger {
    requests: Arc<Requests>,
    answers: watch::Receiver<Answers>,
}

impl Pinger {
    /// Sends a ping and waits for the answer; tells how long that took. Pings at the same time may share an answer.
    ///
    /// # Errors
    /// [`ErrorKind::WebSocketClosed`] when the WebSocket ends before.
    pub async fn ping(&self) -> io::Result<Duration> {
        let mut answers = self.answers.clone();
        let started = Instant::now();
        let number = self.requests.add();
        match answers.wait_for(|answers| answers.last >= number || answers.is_over).await {
            Ok(answers) if answers.last >= number => Ok(started.elapsed()),
            _ => Err(error(
                ErrorKind::WebSocketClosed,
                "the WebSocket ended before the peer answered the ping",
            )),
        }
    }
}

/// Asks a silent peer whether it is there.
#[derive(Debug)]
pub(super) struct KeepAlive {
    interval: Duration,
    /// `None` while off the executor.
    timer: Option<Pin<Box<Sleep>>>,
    pub was_heard: bool,
    is_asked: bool,
}

/// What is to be done about a silent peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Silence {
    Ask,
    GiveUp(Duration),
}

impl KeepAlive {
    pub fn new(interval: Duration) -> Self {
        Self { interval, timer: None, was_heard: true, is_asked: false }
    }

    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Silence> {
        loop {
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(self.interval)));
            ready!(timer.as_mut().poll(cx));
            timer.as_mut().reset(Instant::now() + self.interval);
            if std::mem::take(&mut self.was_heard) {
                self.is_asked = false;
            } else if self.is_asked {
                return Poll::Ready(Silence::GiveUp(self.interval.saturating_mul(2)));
            } else {
                self.is_asked = true;
                return Poll::Ready(Silence::Ask);
            }
        }
    }

    /// Lets go of the executor.
    pub fn detach(&mut self) {
        self.timer = None;
    }
}
