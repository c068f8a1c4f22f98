//! `vellum bench`: how fast a disk answers, at a queue depth.

use crate::args::{OpenArgs, note_raw, size as size_argument};
use crate::failure::Failure;
use crate::meter::Meter;
use crate::terminal::{Style, Terminal};
use crate::text::{clean, exact_size, rate, size};
use crate::writing::FlagArgs;
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::io::{self, Write};
use std::time::Duration;
use vellum::io::Driver;
use vellum::{
    BenchLimit, BenchOrder, BenchReport, BenchRequest, ChainOptions, Code, Control, Disk, DiskOptions, Error,
    Progress,
};

const AFTER_HELP: &str = "\
Reads, unless --write is given; that destroys what the disk holds, and needs --force too. Where nothing was ever written \
a read costs nothing: --fill writes the whole range first. Speed and latency are those of the requests; the first write, \
which marks the image as being written, and the flush of everything at the end are told apart.

Examples:
  vellum bench disk.qcow2
  vellum bench --order sequential --block-size 1M disk.vmdk
  vellum bench --write --force --fill --depth 32 --seconds 10 scratch.vdi
  vellum bench --requests 100000 --depth 32 --driver uring --cache none --json disk.img";

/// Measure random or sequential reads or writes of a disk
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub struct BenchArgs {
    /// The top image of the disk
    image: String,
    /// Format of the image; recognised by content if left out
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<String>,
    /// Write, which destroys what the disk holds; needs --force
    #[arg(short, long, requires = "force")]
    write: bool,
    /// What the disk holds may be destroyed
    #[arg(long)]
    force: bool,
    /// Write the whole range once before measuring; needs --force
    #[arg(long, requires = "force")]
    fill: bool,
    /// Order of the offsets
    #[arg(long, value_enum, default_value_t = OrderChoice::Random, value_name = "ORDER")]
    order: OrderChoice,
    /// Instead of an order: every so many bytes, and past the end from the beginning on, as qemu-img bench -S
    #[arg(long, value_name = "SIZE", value_parser = size_argument, conflicts_with = "order")]
    stride: Option<u64>,
    /// Bytes of a request
    #[arg(short, long, value_name = "SIZE", default_value = "4K", value_parser = block_size)]
    block_size: u64,
    /// Requests in flight, for each thread
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=4096))]
    depth: u16,
    /// Threads that ask
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// How long to measure
    #[arg(short, long, value_name = "SECONDS", default_value_t = 5, conflicts_with = "requests", value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// How many requests to measure, of all threads together
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    requests: Option<u64>,
    /// The first bytes of the disk only
    #[arg(long, value_name = "SIZE", value_parser = size_argument)]
    span: Option<u64>,
    /// Flush after so many writes of a thread
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    flush_every: Option<u64>,
    /// Seed of the offsets
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    writing: FlagArgs,
    #[command(flatten)]
    open: OpenArgs,
}

/// The order of the offsets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OrderChoice {
    Random,
    Sequential,
}

#[derive(Serialize)]
struct Report<'a> {
    image: &'a str,
    format: Option<&'static str>,
    virtual_size: u64,
    operation: &'static str,
    order: &'static str,
    driver: &'static str,
    block_size: u64,
    depth: u16,
    threads: u16,
    requests: u64,
    bytes: u64,
    flushes: u64,
    seconds: f64,
    iops: f64,
    bytes_per_second: f64,
    latency_ns: LatencyReport,
    /// None when reading.
    first_write_seconds: Option<f64>,
    last_flush_seconds: Option<f64>,
}

#[derive(Serialize)]
struct LatencyReport {
    mean: u64,
    p50: u64,
    p99: u64,
    max: u64,
}

fn block_size(text: &str) -> Result<u64, String> {
    match size_argument(text)? {
        0 => Err("a request has at least one byte".to_owned()),
        bytes if bytes > 1 << 30 => Err("a request has 1 GiB at most".to_owned()),
        bytes => Ok(bytes),
    }
}

/// Runs the verb.
pub fn run(args: &BenchArgs, terminal: &Terminal) -> Result<(), Failure> {
    let driver = args.writing.driver(usize::from(args.depth));
    let mut files = args.open.files.clone();
    files.direct |= args.writing.is_direct();
    let vellum = files.vellum_with(driver);
    let options = ChainOptions {
        disk: DiskOptions { flags: args.writing.flags(), ..DiskOptions::default() },
        skip_consistency_checks: args.writing.skip_checks,
        shareable: args.writing.shareable,
        sequential: args.writing.sequential,
        ..args.open.chain(args.format.as_deref(), terminal)
    };
    let (disk, images) = match args.write || args.fill {
        true => vellum.open_for_writing(&args.image, &options),
        false => vellum.open(&args.image, &options),
    }?;
    note_raw(&images, terminal);
    let meter = Meter::new(terminal)?;
    let measured = meter.end(measure(args, &vellum, &disk, &meter));
    let closed = disk.close().wait();
    let found = measured?;
    closed?;
    if !terminal.wants_json() {
        return terminal.report(|out, style| write_report(out, style, args, driver, &found));
    }
    let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    terminal.json(&Report {
        image: &args.image,
        format: images.first().map(|image| image.format.name()),
        virtual_size: disk.size(),
        operation: if args.write { "write" } else { "read" },
        order: args.order_name(),
        driver: driver_name(driver),
        block_size: args.block_size,
        depth: args.depth,
        threads: args.threads,
        requests: found.requests,
        bytes: found.bytes,
        flushes: found.flushes,
        seconds: found.time.as_secs_f64(),
        iops: found.iops(),
        bytes_per_second: found.bytes_per_second(),
        latency_ns: LatencyReport {
            mean: ns(found.latencies.mean()),
            p50: ns(found.latencies.percentile(50.0)),
            p99: ns(found.latencies.percentile(99.0)),
            max: ns(found.latencies.max()),
        },
        first_write_seconds: found.session.map(|session| session.first_write.as_secs_f64()),
        last_flush_seconds: found.session.map(|session| session.last_flush.as_secs_f64()),
    })
}

fn measure(
    args: &BenchArgs,
    vellum: &vellum::Vellum,
    disk: &Disk,
    meter: &Meter,
) -> Result<BenchReport, Error> {
    let request = BenchRequest {
        order: match (args.stride, args.order) {
            (Some(stride), _) => BenchOrder::Stride(stride),
            (None, OrderChoice::Random) => BenchOrder::Random,
            (None, OrderChoice::Sequential) => BenchOrder::Sequential,
        },
        write: args.write,
        block_bytes: args.block_size,
        depth: usize::from(args.depth),
        threads: usize::from(args.threads),
        limit: match args.requests {
            Some(count) => BenchLimit::Requests(count),
            None => BenchLimit::After(Duration::from_secs(args.seconds.into())),
        },
        span_bytes: args.span,
        flush_every: args.flush_every,
        seed: args.seed,
    };
    if args.write && args.writing.is_writethrough() {
        let message = "bench measures flushes with --flush-every, not with this cache mode";
        return Err(Error::new(Code::Usage, message).hint("use --flush-every 1"));
    }
    if args.fill {
        fill(vellum, disk, &request, meter)?;
    }
    if args.requests.is_some() {
        return vellum.bench(disk, &request, meter);
    }
    vellum.bench(disk, &request, &Timed(meter))
}

/// A measurement by time: the position is one in time, which a meter of bytes cannot show, but signals count.
struct Timed<'a>(&'a Meter);

impl Progress for Timed<'_> {
    fn begin(&self, _phase: &str, _total: u64) {}
    fn advance(&self, _position: u64, _moved: u64) -> Control {
        self.0.check_signal()
    }
}

/// Writes the whole range once, in large blocks.
fn fill(vellum: &vellum::Vellum, disk: &Disk, request: &BenchRequest, meter: &Meter) -> Result<(), Error> {
    let span = request.span_bytes.unwrap_or(u64::MAX).min(disk.size());
    let block_bytes = (1u64 << 20).min(span.max(1));
    let whole = BenchRequest {
        order: BenchOrder::Sequential,
        write: true,
        block_bytes,
        depth: 4,
        threads: 1,
        limit: BenchLimit::Requests(span / block_bytes),
        span_bytes: Some(span),
        flush_every: None,
        seed: request.seed,
    };
    vellum.bench(disk, &whole, meter).map(drop).map_err(|error| error.context("filling the disk"))
}

fn write_report(
    out: &mut dyn Write,
    style: Style,
    args: &BenchArgs,
    driver: Driver,
    found: &BenchReport,
) -> io::Result<()> {
    let operation = if args.write { "writes" } else { "reads" };
    let (depth, threads) = (args.depth, args.threads);
    writeln!(
        out,
        "{}: {} {operation} of {}, depth {depth}, {threads} {}, {}",
        style.title(&clean(&args.image)),
        args.order_name(),
        size(args.block_size),
        if threads == 1 { "thread" } else { "threads" },
        driver_name(driver),
    )?;
    let seconds = found.time.as_secs_f64();
    let data = exact_size(found.bytes);
    writeln!(out, "  {} requests, {data}, in {seconds:.2} s", found.requests)?;
    if found.flushes > 0 {
        writeln!(out, "  {} flushes", found.flushes)?;
    }
    let speed = rate(found.bytes, found.time);
    writeln!(out, "  {}  {:.0} requests/s, {speed}", style.key("speed  "), found.iops())?;
    let us = |time: Duration| format!("{:.1} us", time.as_nanos() as f64 / 1000.0);
    let all = &found.latencies;
    writeln!(
        out,
        "  {}  mean {}, p50 {}, p99 {}, max {}",
        style.key("latency"),
        us(all.mean()),
        us(all.percentile(50.0)),
        us(all.percentile(99.0)),
        us(all.max()),
    )?;
    if let Some(session) = &found.session {
        let ms = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1000.0);
        let (first, last) = (ms(session.first_write), ms(session.last_flush));
        writeln!(out, "  {}  first write of the session {first}, last flush {last}", style.key("besides"))?;
    }
    Ok(())
}

impl BenchArgs {
    fn order_name(&self) -> &'static str {
        match (self.stride, self.order) {
            (Some(_), _) => "stride",
            (None, OrderChoice::Random) => "random",
            (None, OrderChoice::Sequential) => "sequential",
        }
    }
}

fn driver_name(driver: Driver) -> &'static str {
    match driver {
        Driver::Inline => "inline",
        Driver::Pool => "pool",
        Driver::Uring => "uring",
    }
}
