//! Fairness of channels that seldom or never have to wait.

use std::io;
use std::task::{Context, Poll, ready};
use tokio::task::coop::poll_proceed;

/// Polls, and lets the other tasks of a Tokio executor run now and then though `poll` never waits. Without `waits`
/// (the operation asked not to) it has its turn at once, and waiting becomes `WouldBlock`.
pub(crate) fn in_turn<T>(
    cx: &mut Context<'_>,
    waits: bool,
    poll: impl FnOnce(&mut Context<'_>) -> Poll<io::Result<T>>,
) -> Poll<io::Result<T>> {
    if !waits {
        return match poll(cx) {
            Poll::Pending => Poll::Ready(Err(io::ErrorKind::WouldBlock.into())),
            done => done,
        };
    }
    let turn = ready!(poll_proceed(cx));
    let done = ready!(poll(cx));
    turn.made_progress();
    Poll::Ready(done)
}
