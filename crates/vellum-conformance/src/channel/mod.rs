//! What every channel passes, on both of its ends, by the asynchronous and by the blocking operations.

mod blocking;
mod ends;
mod moves;
mod nowhere;
mod one_way;
mod refusals;
mod transfer;
mod waits;
mod whole;

use std::fmt::Debug;
use std::future::Future;
use std::io::{self, IoSlice, IoSliceMut};
use std::pin::Pin;
use std::time::Duration;
use vellum_channel::Channel;

/// One end of a connection.
pub type End = Box<dyn Channel>;

type Making = Pin<Box<dyn Future<Output = io::Result<(End, End)>> + Send>>;

/// Where bytes that are written come out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carries {
    /// At the other end, in either direction.
    BothWays,
    /// From the first end to the second: pipes.
    OneWay,
    /// At the same end, which has positions: files and memory. The two ends are two separate ones, both empty.
    ToItself,
    /// Nowhere.
    Nothing,
}

/// What holds for some kinds and not for others.
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    /// Where bytes come out.
    pub carries: Carries,
    /// It can be detached from its executor and attached to another one.
    pub moves: bool,
    /// Its operations wait for an executor, and say so when they have to wait without one.
    pub needs_executor: bool,
    /// After one direction has ended the other goes on.
    pub half_closes: bool,
    /// A writer is held up when nobody reads.
    pub is_bounded: bool,
    /// What was flushed reaches the peer also when the end is dropped rather than closed.
    pub delivers_when_dropped: bool,
}

impl Default for Traits {
    fn default() -> Self {
        Self {
            carries: Carries::BothWays,
            moves: true,
            needs_executor: true,
            half_closes: true,
            is_bounded: true,
            delivers_when_dropped: true,
        }
    }
}

/// What a case has the ends do.
#[derive(Clone, Copy, Debug)]
enum Needs {
    /// No bytes have to arrive.
    Nothing,
    /// The first end that it is given writes, the second one reads.
    NearToFar,
    /// The second one writes, the first one reads.
    FarToNear,
    /// Both do both.
    BothWays,
}

/// A kind of channel: how to make two connected ends of it.
pub struct Subject {
    name: String,
    traits: Traits,
    make: Box<dyn Fn() -> Making + Send + Sync>,
}

impl Subject {
    /// Channels made by `make`, on the executor that it is awaited on.
    pub fn new<F>(name: &str, traits: Traits, make: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = io::Result<(End, End)>> + Send + 'static,
    {
        Self { name: name.to_owned(), traits, make: Box::new(move || Box::pin(make())) }
    }

    /// Whether the ends are exchanged, for each time that a case is carried out. None if it asks for more than the kind has.
    fn orders(&self, needs: Needs) -> &'static [bool] {
        match (self.traits.carries, needs) {
            (Carries::BothWays, _) | (_, Needs::Nothing) => &[false, true],
            (Carries::OneWay, Needs::NearToFar) => &[false],
            (Carries::OneWay, Needs::FarToNear) => &[true],
            _ => &[],
        }
    }

    async fn ends(&self) -> (End, End) {
        (self.make)().await.unwrap_or_else(|error| panic!("{}: cannot be made: {error}", self.name))
    }
}

/// Longer than any case takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Long enough to see that nothing happens.
const MOMENT: Duration = Duration::from_millis(30);

/// Carries out every case that the kind's traits leave. Panics name the channel and the case.
pub fn passes(subject: &Subject) {
    transfer::cases(subject);
    ends::cases(subject);
    waits::cases(subject);
    refusals::cases(subject);
    moves::cases(subject);
    blocking::cases(subject);
    match subject.traits.carries {
        Carries::BothWays => {}
        Carries::OneWay => one_way::cases(subject),
        Carries::ToItself => whole::cases(subject),
        Carries::Nothing => nowhere::cases(subject),
    }
}

/// Runs one case, if it can also with the ends exchanged, each time on an executor of its own.
fn case<F>(subject: &Subject, needs: Needs, name: &str, body: impl Fn(End, End) -> F)
where
    F: Future<Output = ()>,
{
    for &exchanged in subject.orders(needs) {
        eprintln!("{}: {name}{}", subject.name, if exchanged { ", ends exchanged" } else { "" });
        let runtime = executor();
        runtime.block_on(async {
            let whole = async {
                let (near, far) = subject.ends().await;
                if exchanged { body(far, near).await } else { body(near, far).await }
            };
            tokio::time::timeout(PATIENCE, whole)
                .await
                .unwrap_or_else(|_| panic!("{}: {name}: hangs", subject.name));
        });
        // A blocking read that nobody answers must not hold up the next case.
        runtime.shutdown_background();
    }
}

fn executor() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("an executor")
}

/// Awaits something that must happen.
async fn soon<T>(what: &str, happening: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, happening).await.unwrap_or_else(|_| panic!("{what}: never happened"))
}

/// Awaits something that must not happen yet.
async fn not_yet<T: Debug>(what: &str, happening: impl Future<Output = T>) {
    if let Ok(happened) = tokio::time::timeout(MOMENT, happening).await {
        panic!("{what}: happened too early: {happened:?}");
    }
}

/// QEMU's pattern: 250 chunks of 4 194 bytes, each filled with its number.
fn chunks() -> Vec<Vec<u8>> {
    (0..250_u8).map(|number| vec![number; 4194]).collect()
}

fn slices(chunks: &[Vec<u8>]) -> Vec<IoSlice<'_>> {
    chunks.iter().map(|chunk| IoSlice::new(chunk)).collect()
}

fn rooms(chunks: &mut [Vec<u8>]) -> Vec<IoSliceMut<'_>> {
    chunks.iter_mut().map(|chunk| IoSliceMut::new(chunk)).collect()
}

/// Bytes that tell where they belong.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect()
}
