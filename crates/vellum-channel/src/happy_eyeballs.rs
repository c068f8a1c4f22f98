//! Connecting to whichever of several addresses answers first (RFC 8305).

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// The addresses in the order in which they are tried: the families take turns, the resolver's first choice first.
pub(crate) fn interleaved(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let leads = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (mut first, mut second): (Vec<SocketAddr>, Vec<SocketAddr>) =
        addresses.iter().partition(|address| address.is_ipv6() == leads);
    first.reverse();
    second.reverse();
    let mut order = Vec::with_capacity(addresses.len());
    while order.len() < addresses.len() {
        order.extend(first.pop());
        order.extend(second.pop());
    }
    order
}

/// The first connection that comes about. A new attempt begins when the last one has failed, or has not succeeded
/// within `stagger`; the earlier ones go on. All but the winner are dropped before this returns.
///
/// Each error of an attempt is added to `errors`, also when this is dropped.
///
/// `None`: all failed.
pub(crate) async fn race<C, F>(
    addresses: &[SocketAddr],
    stagger: Duration,
    mut connect: impl FnMut(SocketAddr) -> F,
    errors: &mut Vec<(SocketAddr, io::Error)>,
) -> Option<C>
where
    F: Future<Output = io::Result<C>>,
{
    let mut waiting = addresses.iter();
    let mut running: Vec<(SocketAddr, Pin<Box<F>>)> = Vec::new();
    let mut next = Box::pin(sleep_until(Instant::now()));
    std::future::poll_fn(move |cx| {
        loop {
            let mut at = 0;
            let mut has_failed = false;
            while let Some((address, attempt)) = running.get_mut(at) {
                match attempt.as_mut().poll(cx) {
                    Poll::Pending => at += 1,
                    Poll::Ready(Ok(channel)) => {
                        running.clear();
                        return Poll::Ready(Some(channel));
                    }
                    Poll::Ready(Err(error)) => {
                        errors.push((*address, error));
                        running.remove(at);
                        has_failed = true;
                    }
                }
            }
            if waiting.len() == 0 {
                return if running.is_empty() { Poll::Ready(None) } else { Poll::Pending };
            }
            if !has_failed && next.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if let Some(address) = waiting.next() {
                running.push((*address, Box::pin(connect(*address))));
                next.as_mut().reset(Instant::now() + stagger);
            }
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};
    use tokio::time::{sleep, timeout};

    const STAGGER: Duration = Duration::from_millis(250);

    fn addresses(all: &[&str]) -> Vec<SocketAddr> {
        all.iter().map(|one| one.parse().expect("an address")).collect()
    }

    #[test]
    fn families_take_turns() {
        let order = |all: &[&str]| {
            let order: Vec<_> = interleaved(&addresses(all)).iter().map(ToString::to_string).collect();
            order.join(" ")
        };
        assert_eq!(
            order(&["[::1]:1", "[::2]:1", "[::3]:1", "1.0.0.1:1", "1.0.0.2:1"]),
            "[::1]:1 1.0.0.1:1 [::2]:1 1.0.0.2:1 [::3]:1"
        );
        assert_eq!(order(&["1.0.0.1:1", "[::1]:1", "1.0.0.2:1"]), "1.0.0.1:1 [::1]:1 1.0.0.2:1");
        assert_eq!(order(&["1.0.0.1:1", "1.0.0.2:1"]), "1.0.0.1:1 1.0.0.2:1");
        assert_eq!(order(&[]), "");
    }

    /// Counts the attempts that exist.
    struct Alive<'a>(&'a Cell<i32>);

    impl<'a> Alive<'a> {
        fn new(count: &'a Cell<i32>) -> Self {
            count.set(count.get() + 1);
            Self(count)
        }
    }

    impl Drop for Alive<'_> {
        fn drop(&mut self) {
            self.0.set(self.0.get() - 1);
        }
    }

    /// What becomes of an attempt, and after how many milliseconds.
    type Plan = fn(u16) -> (u64, bool);

    /// Runs the race over ports 1 to `count`; tells the winner, when attempts began, and when it ended.
    async fn run(count: u16, plan: Plan) -> (Option<u16>, Vec<(u16, u128)>, Vec<u16>, u128) {
        let start = Instant::now();
        let all: Vec<_> = (1..=count).map(|port| SocketAddr::from(([127, 0, 0, 1], port))).collect();
        let (alive, began, mut errors) = (Cell::new(0), RefCell::new(Vec::new()), Vec::new());
        let connect = |at: SocketAddr| {
            began.borrow_mut().push((at.port(), start.elapsed().as_millis()));
            let one = Alive::new(&alive);
            async move {
                let _one = one;
                let (after, is_good) = plan(at.port());
                sleep(Duration::from_millis(after)).await;
                if is_good { Ok(at.port()) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
            }
        };
        let winner = timeout(Duration::from_secs(60), race(&all, STAGGER, connect, &mut errors))
            .await
            .expect("in time");
        assert_eq!(alive.get(), 0, "the others are dropped");
        let failed = errors.iter().map(|(at, _)| at.port()).collect();
        (winner, began.into_inner(), failed, start.elapsed().as_millis())
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_wins_if_it_is_quick() {
        let (winner, began, failed, took) = run(3, |_| (100, true)).await;
        assert_eq!((winner, began, failed), (Some(1), vec![(1, 0)], vec![]));
        assert!((100..250).contains(&took), "{took}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_one_does_not_hold_up_the_next() {
        let (winner, began, failed, took) = run(3, |port| (if port == 2 { 10 } else { 5000 }, true)).await;
        assert_eq!((winner, failed), (Some(2), vec![]));
        assert_eq!(began.iter().map(|one| one.0).collect::<Vec<_>>(), [1, 2]);
        assert!((250..=255).contains(&began[1].1), "{began:?}");
        assert!((260..=265).contains(&took), "{took}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_earlier_attempt_can_still_win() {
        let (winner, began, _, took) = run(2, |port| (if port == 1 { 300 } else { 5000 }, true)).await;
        assert_eq!((winner, began.len()), (Some(1), 2));
        assert!((300..=305).contains(&took), "{took}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_begins_the_next_at_once() {
        let (winner, began, failed, took) = run(4, |port| (10, port == 4)).await;
        assert_eq!((winner, failed), (Some(4), vec![1, 2, 3]));
        assert_eq!(began.iter().map(|one| one.0).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert!(took < 60, "{took}");
    }

    #[tokio::test(start_paused = true)]
    async fn all_errors_are_collected() {
        let (winner, began, mut failed, _) = run(3, |port| (if port == 1 { 1000 } else { 10 }, false)).await;
        failed.sort_unstable();
        assert_eq!((winner, began.len(), failed), (None, 3, vec![1, 2, 3]));
        let (winner, ..) = run(0, |_| (0, true)).await;
        assert_eq!(winner, None);
    }
}
