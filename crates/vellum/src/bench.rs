//! `bench`: how fast a disk answers, at a queue depth.

use crate::{Control, Latencies, Progress, Vellum};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};
use vellum_core::{Buf, Code, Completion, Disk, Error, Result, Storage, WithBuf, WriteFlags};

/// The order of the offsets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BenchOrder {
    /// Any block, each as likely as the other.
    #[default]
    Random,
    /// One after the other, from the beginning again at the end. Each thread has a part of the disk.
    Sequential,
    /// Every so many bytes, a multiple of the block, and past the end from the beginning on. The threads begin at
    /// different places.
    Stride(u64),
}

/// When to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BenchLimit {
    /// After this time.
    After(Duration),
    /// After this many requests, of all threads together.
    Requests(u64),
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchRequest {
    /// The order of the offsets.
    pub order: BenchOrder,
    /// Write; else read. **What the disk holds is lost.**
    pub write: bool,
    /// Bytes of a request.
    pub block_bytes: u64,
    /// Requests in flight, for each thread.
    pub depth: usize,
    /// Threads that ask.
    pub threads: usize,
    /// When to stop.
    pub limit: BenchLimit,
    /// The first so many bytes of the disk only.
    pub span_bytes: Option<u64>,
    /// Flush after so many writes of a thread.
    pub flush_every: Option<u64>,
    /// Of the offsets and of the data.
    pub seed: u64,
}

impl Default for BenchRequest {
    fn default() -> Self {
        BenchRequest {
            order: BenchOrder::Random,
            write: false,
            block_bytes: 4096,
            depth: 1,
            threads: 1,
            limit: BenchLimit::After(Duration::from_secs(5)),
            span_bytes: None,
            flush_every: None,
            seed: 1,
        }
    }
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct BenchReport {
    /// Requests that were answered, flushes not counted.
    pub requests: u64,
    /// Bytes that were read or written.
    pub bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// From the first request to the last answer.
    pub time: Duration,
    /// How long requests took.
    pub latencies: Latencies,
    /// What came before and after the requests, if they wrote.
    pub session: Option<BenchSession>,
}

/// What writing takes besides the requests, however many they are.
#[derive(Clone, Copy, Debug)]
pub struct BenchSession {
    /// One write before the others: it finds the image as it was opened, and sets the marks of a writing session.
    pub first_write: Duration,
    /// The flush at the end, of all that was written.
    pub last_flush: Duration,
}

impl BenchReport {
    /// Requests a second.
    pub fn iops(&self) -> f64 {
        per_second(self.requests, self.time)
    }

    /// Bytes a second.
    pub fn bytes_per_second(&self) -> f64 {
        per_second(self.bytes, self.time)
    }
}

fn per_second(count: u64, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

/// Requests between two looks at the progress.
const REPORT_EVERY: u64 = 256;
/// Requests in flight of a thread at most.
const DEPTH_MAX: usize = 4096;

impl Vellum {
    /// Measures `disk`. Writing begins with one write more and ends with a flush, which are measured apart.
    pub fn bench(&self, disk: &Disk, request: &BenchRequest, progress: &dyn Progress) -> Result<BenchReport> {
        let span = request.span_bytes.unwrap_or(u64::MAX).min(disk.size());
        let threads = request.threads.clamp(1, 256);
        let blocks = span / request.block_bytes.max(1);
        if request.block_bytes == 0 || blocks < threads as u64 {
            return Err(Error::new(Code::Usage, "the disk is smaller than one block for each thread")
                .image(disk.name())
                .found(format!("{span} bytes"))
                .hint("choose smaller blocks or a larger disk"));
        }
        if let BenchOrder::Stride(stride) = request.order
            && (stride == 0 || !stride.is_multiple_of(request.block_bytes))
        {
            return Err(Error::new(Code::Usage, "the stride is not a multiple of the block")
                .found(format!("{stride} bytes"))
                .allowed(format!("a multiple of {} bytes", request.block_bytes)));
        }
        let total = match request.limit {
            BenchLimit::After(time) => time.as_millis() as u64,
            BenchLimit::Requests(count) => count.saturating_mul(request.block_bytes),
        };
        progress.begin(if request.write { "writing" } else { "reading" }, total);
        let first_write = if request.write { Some(first_write(disk, request)?) } else { None };
        let started = Instant::now();
        let done = AtomicU64::new(0);
        let results = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|number| {
                    let mine = Share::new(request, number as u64, threads as u64, blocks);
                    let shown = Shown { progress, done: &done, started };
                    scope.spawn(move || Worker::new(disk, request, mine, shown).run())
                })
                .collect();
            workers.into_iter().map(|worker| worker.join()).collect::<Vec<_>>()
        });
        let mut all = Latencies::default();
        let mut flushes = 0;
        for result in results {
            let part = result.unwrap_or_else(|_| Err(Error::new(Code::Lost, "a thread ended early")))?;
            all.merge(&part.latencies);
            flushes += part.flushes;
        }
        let time = started.elapsed();
        let session = match first_write {
            None => None,
            Some(first_write) => {
                let began = Instant::now();
                disk.flush_all().wait()?;
                flushes += 1;
                Some(BenchSession { first_write, last_flush: began.elapsed() })
            }
        };
        let requests = all.count();
        let bytes = requests.saturating_mul(request.block_bytes);
        Ok(BenchReport { requests, bytes, flushes, time, latencies: all, session })
    }
}

/// Writes the first block.
fn first_write(disk: &Disk, request: &BenchRequest) -> Result<Duration> {
    let mut buf = Buf::zeroed(request.block_bytes as usize);
    buf.fill(request.seed as u8 | 1);
    let began = Instant::now();
    disk.write(buf, 0, WriteFlags::default()).wait().1?;
    Ok(began.elapsed())
}

/// What one thread does.
struct Share {
    blocks: Range<u64>,
    first: u64,
    requests: u64,
    seed: u64,
}

impl Share {
    fn new(request: &BenchRequest, number: u64, threads: u64, blocks: u64) -> Self {
        let part = |whole: u64| {
            let cut = |n: u64| (u128::from(whole) * u128::from(n) / u128::from(threads)) as u64;
            cut(number)..cut(number + 1)
        };
        let mine = match request.order {
            BenchOrder::Random | BenchOrder::Stride(_) => 0..blocks,
            BenchOrder::Sequential => part(blocks),
        };
        let first = part(blocks).start;
        let requests = match request.limit {
            BenchLimit::After(_) => u64::MAX,
            BenchLimit::Requests(count) => part(count).end - part(count).start,
        };
        Share {
            blocks: mine,
            first,
            requests,
            seed: request.seed.wrapping_add(number.wrapping_mul(0x9e37_79b9)),
        }
    }
}

/// Where progress goes.
struct Shown<'a> {
    progress: &'a dyn Progress,
    done: &'a AtomicU64,
    started: Instant,
}

#[derive(Default)]
struct Part {
    latencies: Latencies,
    flushes: u64,
}

/// A request that was answered later.
type Answer = (WithBuf, Instant, Instant);

struct Worker<'a> {
    disk: &'a Disk,
    request: &'a BenchRequest,
    share: Share,
    shown: Shown<'a>,
    part: Part,
    /// When the last answer came.
    now: Instant,
    next: u64,
    issued: u64,
    reported: u64,
    since_flush: u64,
    state: u64,
    answers: (Sender<Answer>, Receiver<Answer>),
}

impl<'a> Worker<'a> {
    fn new(disk: &'a Disk, request: &'a BenchRequest, share: Share, shown: Shown<'a>) -> Self {
        let (next, state) = (share.first, share.seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1);
        let (part, answers) = (Part::default(), channel());
        let (issued, reported, since_flush, now) = (0, 0, 0, Instant::now());
        Worker { disk, request, share, shown, part, now, next, issued, reported, since_flush, state, answers }
    }

    fn run(mut self) -> Result<Part> {
        let depth = self.request.depth.clamp(1, DEPTH_MAX);
        let mut idle: Vec<Buf> = (0..depth).map(|_| self.buffer()).collect();
        let mut flying = 0usize;
        let mut outcome = Ok(());
        loop {
            while outcome.is_ok()
                && self.goes_on()
                && let Some(buf) = idle.pop()
            {
                let started = Instant::now();
                match self.issue(buf).try_take() {
                    Ok((buf, result)) => {
                        idle.push(buf);
                        outcome = result.and_then(|()| self.count(started, Instant::now()));
                    }
                    Err(pending) => {
                        flying += 1;
                        let answers = self.answers.0.clone();
                        // Nobody listens any more only after an error.
                        pending.on_complete(move |done| drop(answers.send((done, started, Instant::now()))));
                    }
                }
            }
            if flying == 0 {
                return outcome.map(|()| self.part);
            }
            let Ok(((buf, result), started, ended)) = self.answers.1.recv() else {
                return Err(Error::new(Code::Lost, "an answer never came"));
            };
            flying -= 1;
            idle.push(buf);
            let counted = result.and_then(|()| self.count(started, ended));
            outcome = outcome.and(counted);
        }
    }

    fn buffer(&mut self) -> Buf {
        let mut buf = Buf::zeroed(self.request.block_bytes as usize);
        if self.request.write {
            for word in buf.chunks_mut(8) {
                let random = self.random().to_le_bytes();
                word.iter_mut().zip(random).for_each(|(to, from)| *to = from);
            }
        }
        buf
    }

    fn goes_on(&self) -> bool {
        match self.request.limit {
            BenchLimit::After(time) => self.now.duration_since(self.shown.started) < time,
            BenchLimit::Requests(_) => self.issued < self.share.requests,
        }
    }

    fn issue(&mut self, buf: Buf) -> Completion<WithBuf> {
        self.issued += 1;
        let offset = self.block() * self.request.block_bytes;
        match self.request.write {
            true => self.disk.write(buf, offset, WriteFlags::default()),
            false => self.disk.read_at(buf, offset),
        }
    }

    fn block(&mut self) -> u64 {
        let blocks = self.share.blocks.clone();
        match self.request.order {
            BenchOrder::Random => {
                let random = u128::from(self.random());
                blocks.start + ((random * u128::from(blocks.end - blocks.start)) >> 64) as u64
            }
            BenchOrder::Sequential => {
                let at = self.next;
                self.next = if at + 1 < blocks.end { at + 1 } else { blocks.start };
                at
            }
            BenchOrder::Stride(stride) => {
                let (at, step) = (self.next, stride / self.request.block_bytes % blocks.end);
                self.next = (at + step) % blocks.end;
                at
            }
        }
    }

    /// xorshift64*
    fn random(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn count(&mut self, started: Instant, ended: Instant) -> Result<()> {
        self.part.latencies.add(ended - started);
        self.now = self.now.max(ended);
        self.since_flush += 1;
        if self.request.write && self.request.flush_every.is_some_and(|every| self.since_flush >= every) {
            self.since_flush = 0;
            self.part.flushes += 1;
            self.disk.flush_all().wait()?;
        }
        self.reported += 1;
        if self.reported < REPORT_EVERY && self.share.requests > REPORT_EVERY {
            return Ok(());
        }
        let block_bytes = self.request.block_bytes;
        let moved = self.reported.saturating_mul(block_bytes);
        let moved = self.shown.done.fetch_add(moved, Ordering::Relaxed).saturating_add(moved);
        self.reported = 0;
        let position = match self.request.limit {
            BenchLimit::After(_) => self.shown.started.elapsed().as_millis() as u64,
            BenchLimit::Requests(_) => moved,
        };
        match self.shown.progress.advance(position, moved) {
            Control::Continue => Ok(()),
            Control::Stop => Err(Error::new(Code::Cancelled, "stopped before the end")),
        }
    }
}
