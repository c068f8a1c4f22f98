//! Progress of long jobs: a bar on a terminal, a line every few seconds elsewhere, nothing with `--quiet`; and the
//! way to stop them. The first SIGINT or SIGTERM asks the job to stop, the second ends the process at once.
//!
//! Jobs report from several threads, up to thousands of times a second; all that costs is a few atomic operations,
//! and a look at the clock.

use crate::failure::Failure;
use crate::terminal::Terminal;
use crate::text;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vellum::{Code, Control, Error, Progress};

const BAR_INTERVAL: Duration = Duration::from_millis(100);
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// No position yet.
const UNKNOWN: u64 = u64::MAX;
const BAR: &str = "{prefix} [{bar:32}] {percent:>3} %  {msg}";

/// Shows the progress of one job after the other.
pub struct Meter {
    terminal: Terminal,
    signal: Signal,
    look: Look,
    started: Instant,
    /// When to show something again, in milliseconds since `started`.
    next_ms: AtomicU64,
    position: AtomicU64,
    moved: AtomicU64,
    /// Where the job stood at its first report (not at 0 if it was resumed); [`UNKNOWN`] before.
    first_position: AtomicU64,
    phase: Mutex<Phase>,
}

/// How progress looks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    Bar,
    Lines,
    Nothing,
}

/// What is being done.
struct Phase {
    name: String,
    total: u64,
    began: Instant,
    bar: Option<ProgressBar>,
}

impl Meter {
    /// A meter that also watches for signals from here on.
    pub fn new(terminal: &Terminal) -> Result<Self, Failure> {
        let look = match (terminal.is_quiet(), terminal.can_show_bar()) {
            (true, _) => Look::Nothing,
            (false, true) => Look::Bar,
            (false, false) => Look::Lines,
        };
        let started = Instant::now();
        let phase = Phase { name: String::new(), total: 0, began: started, bar: None };
        Ok(Meter {
            terminal: terminal.clone(),
            signal: Signal::watch()?,
            look,
            started,
            next_ms: AtomicU64::new(0),
            position: AtomicU64::new(0),
            moved: AtomicU64::new(0),
            first_position: AtomicU64::new(UNKNOWN),
            phase: Mutex::new(phase),
        })
    }

    /// Ends the display of a job that succeeded or failed; tells the job's own errors from an interruption.
    pub fn end<T>(&self, result: Result<T, Error>) -> Result<T, Failure> {
        self.remove_bar();
        result.map_err(|error| match self.signal.received() {
            Some(signal) if error.code() == Code::Cancelled => Failure::Signal(signal, error),
            _ => Failure::Error(error),
        })
    }

    /// The name of the phase that the job reached.
    pub fn phase(&self) -> String {
        self.lock().name.clone()
    }

    /// Time since the meter was made.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether a signal asks to stop.
    pub fn check_signal(&self) -> Control {
        match self.signal.received() {
            Some(_) => {
                self.signal.announce(&self.terminal);
                Control::Stop
            }
            None => Control::Continue,
        }
    }

    /// The same, for those who stop at once: nothing is said about a step that is under way.
    pub fn is_signalled(&self) -> bool {
        self.signal.received().is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn interval(&self) -> Duration {
        if self.look == Look::Bar { BAR_INTERVAL } else { LINE_INTERVAL }
    }

    fn remove_bar(&self) {
        if let Some(bar) = self.lock().bar.take() {
            self.terminal.set_bar(None);
            bar.finish_and_clear();
        }
    }

    /// Whether it is time to show something, for one of the threads that ask.
    fn is_due(&self) -> bool {
        let now_ms = millis(self.started.elapsed());
        let due_ms = self.next_ms.load(Ordering::Relaxed);
        let next_ms = now_ms.saturating_add(millis(self.interval()));
        now_ms >= due_ms
            && self.next_ms.compare_exchange(due_ms, next_ms, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn show(&self) {
        let phase = self.lock();
        let position = self.position.load(Ordering::Relaxed).min(phase.total);
        let moved = self.moved.load(Ordering::Relaxed);
        let first = self.first_position.load(Ordering::Relaxed).min(position);
        let elapsed = phase.began.elapsed();
        let left = time_left(elapsed, position.saturating_sub(first), phase.total.saturating_sub(position));
        let mut message = format!("{} of {}", text::size(position), text::size(phase.total));
        message.push_str(&format!(", {}", text::rate(moved, elapsed)));
        if let Some(left) = left {
            message.push_str(&format!(", {} left", text::duration(left)));
        }
        match &phase.bar {
            Some(bar) => {
                bar.set_message(message);
                bar.set_position(position);
            }
            None => {
                let percent = percent(position, phase.total);
                let name = phase.name.clone();
                drop(phase);
                self.terminal.to_stderr(|out, _| writeln!(out, "{name}: {percent} %, {message}"));
            }
        }
    }
}

impl Progress for Meter {
    fn begin(&self, phase: &str, total: u64) {
        self.remove_bar();
        self.position.store(0, Ordering::Relaxed);
        self.moved.store(0, Ordering::Relaxed);
        self.first_position.store(UNKNOWN, Ordering::Relaxed);
        let next_ms = millis(self.started.elapsed()).saturating_add(millis(self.interval()));
        self.next_ms.store(next_ms, Ordering::Relaxed);
        let bar = (self.look == Look::Bar).then(|| bar(phase, total));
        self.terminal.set_bar(bar.clone());
        *self.lock() = Phase { name: phase.to_owned(), total, began: Instant::now(), bar };
    }

    fn advance(&self, position: u64, moved: u64) -> Control {
        // Reports of several threads arrive in any order.
        self.position.fetch_max(position, Ordering::Relaxed);
        self.moved.fetch_max(moved, Ordering::Relaxed);
        if self.first_position.load(Ordering::Relaxed) == UNKNOWN {
            self.first_position.fetch_min(position, Ordering::Relaxed);
        }
        if self.check_signal() == Control::Stop {
            return Control::Stop;
        }
        if self.look != Look::Nothing && self.is_due() {
            self.show();
        }
        Control::Continue
    }
}

fn bar(phase: &str, total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.progress_chars("=> "));
    bar.set_prefix(phase.to_owned());
    bar
}

/// How long the rest takes if it goes on like this; `None` while it is too early to tell.
fn time_left(elapsed: Duration, done: u64, rest: u64) -> Option<Duration> {
    if done == 0 || elapsed < Duration::from_secs(1) {
        return None;
    }
    Duration::try_from_secs_f64(elapsed.as_secs_f64() * (rest as f64 / done as f64)).ok()
}

fn percent(position: u64, total: u64) -> u64 {
    let percent = u128::from(position) * 100 / u128::from(total.max(1));
    u64::try_from(percent).unwrap_or(100)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The signals that stop a job.
struct Signal {
    received: Arc<AtomicUsize>,
    announced: AtomicBool,
}

impl Signal {
    fn watch() -> Result<Self, Failure> {
        let signal = Signal { received: Arc::default(), announced: AtomicBool::new(false) };
        let second = Arc::new(AtomicBool::new(false));
        for (number, status) in [(SIGINT, 130), (SIGTERM, 143)] {
            let watch = || -> io::Result<()> {
                // In this order: the first signal finds `second` unset, and sets it for the next one.
                signal_hook::flag::register_conditional_shutdown(number, status, second.clone())?;
                signal_hook::flag::register(number, second.clone())?;
                let value = usize::try_from(number).unwrap_or(usize::MAX);
                signal_hook::flag::register_usize(number, signal.received.clone(), value)?;
                Ok(())
            };
            watch().map_err(|error| Error::from_io(error, "signals cannot be watched"))?;
        }
        Ok(signal)
    }

    fn received(&self) -> Option<usize> {
        Some(self.received.load(Ordering::Relaxed)).filter(|number| *number != 0)
    }

    /// Says once that the signal was heard.
    fn announce(&self, terminal: &Terminal) {
        if !self.announced.swap(true, Ordering::Relaxed) {
            terminal.note("stopping after the step that is under way; once more stops at once");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_is_proportional_and_never_absurd() {
        let ten = Duration::from_secs(10);
        assert_eq!(time_left(ten, 100, 300), Some(Duration::from_secs(30)));
        assert_eq!(time_left(ten, 0, 300), None);
        assert_eq!(time_left(Duration::from_millis(10), 100, 300), None);
        assert_eq!(time_left(Duration::MAX, 1, u64::MAX), None);
    }

    #[test]
    fn percents_do_not_overflow() {
        assert_eq!(percent(0, 0), 0);
        assert_eq!(percent(u64::MAX, u64::MAX), 100);
        assert_eq!(percent(1, 3), 33);
    }

    #[test]
    fn reports_are_cheap_from_many_threads() {
        let terminal = Terminal::new(false, true, crate::args::ColorChoice::Never);
        let meter = Meter::new(&terminal).unwrap();
        meter.begin("converting", 1 << 40);
        let started = Instant::now();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let meter = &meter;
                scope.spawn(move || {
                    for step in 0..25_000 {
                        assert_eq!(meter.advance(step * 4 + thread, step), Control::Continue);
                    }
                });
            }
        });
        // 100 000 reports: minutes of a real job.
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
        assert_eq!(meter.position.load(Ordering::Relaxed), 99_999);
    }
}
