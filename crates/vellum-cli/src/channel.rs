//! `vellum channel`: joins two addresses, and counts what goes between them.

use crate::args::size as size_argument;
use crate::failure::Failure;
use crate::meter::Meter;
use crate::terminal::Terminal;
use crate::text;
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio::task::JoinSet;
use vellum::{Code, Error};
use vellum_channel::{
    Address, Channel, ChannelExt, Command, ConnectOptions, Counters, Direction, ErrorKind, Features,
    FileMode, Listener, ListenerOptions, Observe, Place, Rate, Throttle, Timeout, TimeoutOptions, connect,
    kind_of,
};

const AFTER_HELP: &str = "\
An address is one of

  tcp://HOST:PORT   unix:///PATH   unix:@NAME (abstract)   vsock://CID:PORT
  tls+tcp://HOST:PORT   tls+unix:///PATH   ws://HOST:PORT/PATH   wss://HOST:PORT/PATH
  exec:COMMAND   file:///PATH   fd:N   -  (standard input and output)   null:

with options behind a question mark, as in tls+tcp://host:10809?ca=ca.pem&sni=name. With listen: before it an address \
is listened on; every connection is joined to the other address, which is opened anew for it. When one side ends, what \
is on its way still arrives, and the other side is told; it is over when both have ended. From a file that is only written nothing is read: all goes to it.

Examples:
  vellum channel listen:tcp://127.0.0.1:10809 unix:///run/nbd.sock
  vellum channel - 'tls+tcp://disks.example:10809?ca=ca.pem'
  vellum channel --once listen:unix:///tmp/in.sock 'file:///tmp/copy?mode=write'
  vellum channel 'exec:gzip -dc disk.gz' wss://host/upload --one-way --rate 50M
  vellum channel --json tcp://host:19 null: --idle 10";

/// Bytes that wait between the two sides, in each direction.
const BUFFER: usize = 256 << 10;
/// How often signals are looked for and a bar is redrawn.
const LOOK: Duration = Duration::from_millis(100);
const LINE: Duration = Duration::from_secs(5);

/// Join two addresses: sockets, TLS, WebSocket, commands, files
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct ChannelArgs {
    /// One address; may be listened on
    a: String,
    /// The other; may be listened on, but not both
    b: String,
    /// Only from A to B
    #[arg(long)]
    one_way: bool,
    /// With listen:, end after the first connection
    #[arg(long)]
    once: bool,
    /// With listen:, connections at a time; more have to wait
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65536))]
    connections: u32,
    /// Bytes a second at most, in each direction of each connection
    #[arg(long, value_name = "SIZE", value_parser = size_argument)]
    rate: Option<u64>,
    /// End a connection on which nothing moves for so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    idle: Option<u32>,
}

/// A word of the command line.
#[derive(Clone, Debug)]
struct Side {
    address: Address,
    listens: bool,
}

impl Side {
    fn parse(text: &str) -> Result<Self, Error> {
        let (listens, text) = match text.strip_prefix("listen:") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let address = text.parse().map_err(|error| explain(io::Error::from(error), text))?;
        Ok(Self { address, listens })
    }

    fn is_stdio(&self) -> bool {
        matches!(self.address.place, Place::Stdio)
    }

    /// Whether something can be read from it.
    fn is_source(&self) -> bool {
        !matches!(self.address.place, Place::File { mode: FileMode::Write | FileMode::Append, .. })
    }
}

/// Where bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Both,
    /// From A to B.
    Forth,
    Back,
}

impl Way {
    fn of(args: &ChannelArgs, a: &Side, b: &Side) -> Result<Self, Error> {
        match (a.is_source(), b.is_source()) {
            (true, true) if !args.one_way => Ok(Self::Both),
            (true, _) => Ok(Self::Forth),
            (false, true) if !args.one_way => Ok(Self::Back),
            (false, _) => Err(usage("nothing can be read: the file is opened for writing only")),
        }
    }
}

impl Way {
    /// What is done with A, and with B.
    fn directions(self) -> [Direction; 2] {
        match self {
            Self::Both => [Direction::Both; 2],
            Self::Forth => [Direction::Read, Direction::Write],
            Self::Back => [Direction::Write, Direction::Read],
        }
    }
}

/// The counts of both sides of a connection.
#[derive(Clone)]
struct Moved {
    near: Counters,
    far: Counters,
}

impl Moved {
    /// Bytes forth and back: what the other side took, not what was read for it.
    fn bytes(&self) -> (u64, u64) {
        (self.far.snapshot().written.bytes, self.near.snapshot().written.bytes)
    }
}

/// What went through, of all connections.
#[derive(Debug, Default)]
struct Totals {
    forth: AtomicU64,
    back: AtomicU64,
    connections: AtomicU64,
    failed: AtomicU64,
}

#[derive(Serialize)]
struct Report<'a> {
    a: &'a str,
    b: &'a str,
    connections: u64,
    failed: u64,
    bytes_a_to_b: u64,
    bytes_b_to_a: u64,
    seconds: f64,
}

pub fn run(args: &ChannelArgs, terminal: &Terminal) -> Result<(), Failure> {
    let (a, b) = (Side::parse(&args.a)?, Side::parse(&args.b)?);
    if a.listens && b.listens {
        return Err(usage("both addresses are listened on: one of the two has to be opened").into());
    }
    if terminal.wants_json() && (a.is_stdio() || b.is_stdio()) {
        return Err(usage("--json has no place beside data on standard output").into());
    }
    let way = Way::of(args, &a, &b)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::from_io(error, "threads cannot be started"))?;
    let meter = Meter::new(terminal)?;
    let work = Arc::new(Work {
        limits: Limits::of(args, way),
        totals: Totals::default(),
        live: parking_lot::Mutex::new(Vec::new()),
        began: Instant::now(),
        terminal: terminal.clone(),
    });
    let ends_by_signal = ends_by_signal(args, &a, &b);
    let ended = runtime.block_on(work.clone().carry_out(args, a, b, &meter));
    terminal.set_bar(None);
    // A read of standard input cannot be called back.
    runtime.shutdown_background();
    let is_regular_end =
        ended.as_ref().map_or_else(|error| ends_by_signal && error.code() == Code::Cancelled, |()| true);
    if is_regular_end || !terminal.wants_json() {
        work.report(args)?;
    }
    match meter.end(ended) {
        Err(Failure::Signal(signal, _)) if is_regular_end => Err(Failure::Stopped(signal)),
        ended => ended,
    }
}

/// Whether nothing else ends it.
fn ends_by_signal(args: &ChannelArgs, a: &Side, b: &Side) -> bool {
    (a.listens || b.listens) && !args.once
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    way: Way,
    rate: Option<Rate>,
    idle: Option<Duration>,
}

impl Limits {
    fn of(args: &ChannelArgs, way: Way) -> Self {
        Self {
            way,
            rate: args.rate.map(Rate::new),
            idle: args.idle.map(|seconds| Duration::from_secs(u64::from(seconds))),
        }
    }
}

struct Work {
    limits: Limits,
    /// Of connections that have ended.
    totals: Totals,
    /// Of those that go on.
    live: parking_lot::Mutex<Vec<Moved>>,
    began: Instant,
    terminal: Terminal,
}

impl Work {
    async fn carry_out(
        self: Arc<Self>,
        args: &ChannelArgs,
        a: Side,
        b: Side,
        meter: &Meter,
    ) -> Result<(), Error> {
        let listens = a.listens || b.listens;
        let ends_by_signal = ends_by_signal(args, &a, &b);
        let joining = async {
            if listens { self.clone().serve(args, a, b).await } else { self.join_opened(&a, &b).await }
        };
        tokio::select! {
            ended = joining => ended,
            () = self.watch(meter) => {
                let cut = self.live.lock().len();
                if ends_by_signal && cut > 0 {
                    let connections = if cut == 1 { "1 connection".to_owned() } else { format!("{cut} connections") };
                    self.terminal.warn(&format!("{connections} cut: what was on its way is lost"));
                }
                let lost = if cut == 0 { "" } else { ": what was on its way is lost" };
                Err(Error::new(Code::Cancelled, format!("stopped{lost}")))
            }
        }
    }

    /// Shows how it goes, until a signal comes.
    async fn watch(&self, meter: &Meter) {
        let bar = self.terminal.can_show_bar() && !self.terminal.is_quiet();
        let bar = bar.then(spinner);
        self.terminal.set_bar(bar.clone());
        let (mut shown, mut before) = (Instant::now(), self.moved());
        while !meter.is_signalled() {
            tokio::time::sleep(LOOK).await;
            let interval = if bar.is_some() { Duration::from_secs(1) } else { LINE };
            if let Some(bar) = &bar {
                bar.tick();
            }
            if shown.elapsed() < interval || self.terminal.is_quiet() {
                continue;
            }
            let (now, then) = (self.moved(), before);
            let since = (now.0 + now.1).saturating_sub(then.0 + then.1);
            let line = format!("{}, {}", sizes(now), text::rate(since, shown.elapsed()));
            match &bar {
                Some(bar) => bar.set_message(line),
                None if since > 0 => self.terminal.to_stderr(|out, _| writeln!(out, "{line}")),
                None => {}
            }
            (shown, before) = (Instant::now(), now);
        }
    }

    /// Bytes forth and back so far.
    fn moved(&self) -> (u64, u64) {
        let live = self.live.lock();
        let mut forth = self.totals.forth.load(Ordering::Relaxed);
        let mut back = self.totals.back.load(Ordering::Relaxed);
        for bytes in live.iter().map(Moved::bytes) {
            forth = forth.saturating_add(bytes.0);
            back = back.saturating_add(bytes.1);
        }
        (forth, back)
    }

    async fn join_opened(&self, a: &Side, b: &Side) -> Result<(), Error> {
        let [of_a, of_b] = self.limits.way.directions();
        let (near, far) = tokio::try_join!(open(&a.address, of_a), open(&b.address, of_b))?;
        self.join(near, far).await
    }

    /// Joins every connection to the other side, which is opened for it.
    async fn serve(self: Arc<Self>, args: &ChannelArgs, a: Side, b: Side) -> Result<(), Error> {
        let (at, to) = if a.listens { (&a.address, &b.address) } else { (&b.address, &a.address) };
        let mut options = ListenerOptions::default();
        options.connections_max = usize::try_from(args.connections).ok();
        let place = std::slice::from_ref(at);
        let mut listener =
            Listener::bind(place, options).await.map_err(|error| explain(error, &at.to_string()))?;
        for endpoint in listener.local_endpoints() {
            self.terminal.note(&format!("listening on {endpoint}"));
        }
        let mut joined = JoinSet::new();
        loop {
            let (accepted, peer) = tokio::select! {
                next = listener.next() => next.map_err(|error| explain(error, &at.to_string()))?,
                Some(_) = joined.join_next() => continue,
            };
            let (work, to, swap) = (self.clone(), to.clone(), b.listens);
            let [of_a, of_b] = self.limits.way.directions();
            let one = async move {
                let other = open(&to, if swap { of_a } else { of_b }).await?;
                let (near, far) = if swap { (other, accepted) } else { (accepted, other) };
                work.join(near, far).await
            };
            if args.once {
                // Nobody else is to wait for nothing.
                listener.stop().await;
                return one.await;
            }
            let work = self.clone();
            joined.spawn(async move {
                if let Err(error) = one.await {
                    work.totals.failed.fetch_add(1, Ordering::Relaxed);
                    work.terminal.warn(&format!("connection from {}: {error}", peer.endpoint));
                }
            });
        }
    }

    /// Moves bytes until both sides have ended.
    async fn join(&self, near: Box<dyn Channel>, far: Box<dyn Channel>) -> Result<(), Error> {
        let names = [near.label(), far.label()];
        let waiting = TimeoutOptions { read: None, write: self.limits.idle };
        let rate = self.limits.rate;
        let mut far = Observe::new(Throttle::new(Timeout::new(far, waiting), rate, rate));
        let mut near = Observe::new(Timeout::new(near, waiting));
        let moved = Moved { near: near.counters(), far: far.counters() };
        self.live.lock().push(moved.clone());
        self.totals.connections.fetch_add(1, Ordering::Relaxed);
        let moving = async {
            match self.limits.way {
                Way::Forth => pump(&mut near, &mut far).await,
                Way::Back => pump(&mut far, &mut near).await,
                Way::Both => {
                    tokio::io::copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER, BUFFER).await?;
                    Ok(())
                }
            }
        };
        let ended = tokio::select! {
            ended = moving => ended,
            () = idle(&moved, self.limits.idle) => Err(idled(self.limits.idle)),
        };
        self.forget(&moved);
        // After a failure nobody waits for goodbyes: a command that goes on is ended.
        ended.map_err(|error| {
            // A file that is only read, and a peer that has something to say.
            let takes_no_answer =
                kind_of(&error) == Some(ErrorKind::Unsupported) && self.limits.way == Way::Both;
            let error = explain(error, &format!("{} and {}", names[0], names[1]));
            if takes_no_answer { error.hint("--one-way leaves out what B sends back") } else { error }
        })?;
        let closed = [near.close().await, far.close().await];
        for (closed, name) in closed.into_iter().zip(names) {
            let closed = closed.map_err(|error| explain(error, &name))?;
            if let Some(status) = closed.exit_status.filter(|status| !status.success()) {
                return Err(Error::new(Code::Io, format!("the command ended with {status}")));
            }
        }
        Ok(())
    }

    /// Moves the counts of a connection that has ended to those of all.
    fn forget(&self, moved: &Moved) {
        let (forth, back) = moved.bytes();
        let mut live = self.live.lock();
        if let Some(at) = live.iter().position(|one| one.near.is_same(&moved.near)) {
            live.swap_remove(at);
        }
        self.totals.forth.fetch_add(forth, Ordering::Relaxed);
        self.totals.back.fetch_add(back, Ordering::Relaxed);
    }

    fn report(&self, args: &ChannelArgs) -> Result<(), Failure> {
        let moved = self.moved();
        let elapsed = self.began.elapsed();
        let connections = self.totals.connections.load(Ordering::Relaxed);
        if self.terminal.wants_json() {
            return self.terminal.json(&Report {
                a: &args.a,
                b: &args.b,
                connections,
                failed: self.totals.failed.load(Ordering::Relaxed),
                bytes_a_to_b: moved.0,
                bytes_b_to_a: moved.1,
                seconds: elapsed.as_secs_f64(),
            });
        }
        if connections > 0 && !self.terminal.is_quiet() {
            let rate = text::rate(moved.0.saturating_add(moved.1), elapsed);
            let time = text::time_taken(elapsed);
            self.terminal.to_stderr(|out, _| writeln!(out, "{} in {time}, {rate}", sizes(moved)));
        }
        Ok(())
    }
}

/// Moves all that comes from `from`, and ends `to`.
async fn pump(from: &mut impl Channel, to: &mut impl Channel) -> io::Result<()> {
    let answers = to.features().contains(Features::SHUTDOWN);
    let (unwanted, mut to) = tokio::io::split(to);
    let moving = async {
        let mut reader = tokio::io::BufReader::with_capacity(BUFFER, from);
        tokio::io::copy_buf(&mut reader, &mut to).await?;
        to.shutdown().await
    };
    tokio::select! {
        moved = moving => moved,
        never = discard(unwanted), if answers => match never {},
    }
}

/// Takes what a peer says to whom nobody listens: one that cannot go on saying it would stop to listen itself, and pings and
/// alerts would go unnoticed. (Not of files, whose position it would move.) That it ends, or fails, the writes tell.
async fn discard(mut unwanted: impl AsyncRead + Unpin) -> Infallible {
    let _: io::Result<u64> = tokio::io::copy(&mut unwanted, &mut tokio::io::sink()).await;
    std::future::pending().await
}

/// Ends when nothing has moved for so long; never without a limit.
async fn idle(moved: &Moved, limit: Option<Duration>) {
    let Some(limit) = limit else { return std::future::pending().await };
    let look = (limit / 10).min(Duration::from_secs(1));
    let (mut before, mut since) = (moved.bytes(), Instant::now());
    loop {
        tokio::time::sleep(look).await;
        let now = moved.bytes();
        if now != before {
            (before, since) = (now, Instant::now());
        } else if since.elapsed() >= limit {
            return;
        }
    }
}

fn idled(limit: Option<Duration>) -> io::Error {
    let seconds = limit.unwrap_or_default().as_secs();
    vellum_channel::error(ErrorKind::Timeout, format!("nothing moved for {seconds} s (--idle)"))
}

/// Opens what the address leads to, of a command the streams that are used: it need not wait for input that never comes, nor
/// for somebody to read its output.
async fn open(address: &Address, direction: Direction) -> Result<Box<dyn Channel>, Error> {
    let opened = match &address.place {
        Place::Exec { command } if direction != Direction::Both => {
            let mut shell = std::process::Command::new("sh");
            shell.arg("-c").arg(command);
            Command::spawn(shell, direction).map(|mut channel| {
                channel.set_name(command);
                Box::new(channel) as Box<dyn Channel>
            })
        }
        _ => connect(address, &ConnectOptions::default()).await,
    };
    opened.map_err(|error| explain(error, &address.to_string()))
}

fn sizes((forth, back): (u64, u64)) -> String {
    format!("{} from A to B, {} back", text::size(forth), text::size(back))
}

fn spinner() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{spinner} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar
}

fn usage(message: &str) -> Error {
    Error::new(Code::Usage, message).hint("`vellum channel --help` tells more")
}

/// An error of a channel as one of Vellum.
fn explain(error: io::Error, what: &str) -> Error {
    let Some(kind) = kind_of(&error) else { return Error::from_io(error, what.to_owned()) };
    let code = match kind {
        ErrorKind::AddressSyntax
        | ErrorKind::Invalid
        | ErrorKind::Unsupported
        | ErrorKind::WrongDescriptor
        // Of this side: the address names the wrong files.
        | ErrorKind::TlsCredentials => Code::Usage,
        ErrorKind::Resolve => Code::NotFound,
        ErrorKind::Limit => Code::ProtoLimit,
        ErrorKind::Refused => Code::Permission,
        kind if kind.code().starts_with("TLS_") || kind.code().starts_with("WEBSOCKET_") => Code::Proto,
        _ => Code::Io,
    };
    // The cause is not cut: what to do about it comes last.
    Error::new(code, what).caused_by(error)
}
