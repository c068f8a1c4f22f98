//! `cargo xtask bench channel`: throughput and round trips of channels beside raw Tokio streams, rustls, OpenSSL and `socat`.
//!
//! For throughput each end has a thread, a processor and an executor of its own: where two tasks share an executor of two
//! threads, it is chance whether they also share a processor, and that makes more of a difference than anything that is
//! measured here. For round trips both ends share one thread, so that no wake-up across processors hides what a channel
//! costs. The relays are processes in the middle. Contenders take turns. What is compared is the mean of the middle half of all
//! samples: the speed of a connection over the loopback device jumps between two or three values, and so would a median.

mod ends;
mod openssl;
mod relay;
mod setup;
mod streams;

use super::host;
use super::measure::check_interrupt;
use super::options::Options;
use super::report::{facts, number, write_section};
use super::{Result, tools};
use ends::Kind;
use setup::TlsSetup;
use std::fmt::Write as _;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::Instant;
use tokio::runtime::{Builder, Runtime};

/// Bytes of one turn, where nothing is computed and where everything is encrypted or masked.
const PLAIN_BYTES: u64 = 384 << 20;
const WORKED_BYTES: u64 = 256 << 20;
const RELAY_BYTES: u64 = 384 << 20;
const HANDSHAKES: u32 = 80;
/// Turns of each contender in a round: many short ones, since each connection settles at a speed of its own.
const TURNS: usize = 10;

/// Name, and what it is compared with: the contender's place in this list.
const CONTENDERS: [(Kind, &str, Option<usize>); 7] = [
    (Kind::RawTcp, "TCP, raw Tokio", None),
    (Kind::Tcp, "TCP channel", Some(0)),
    (Kind::RawUnix, "Unix, raw Tokio", None),
    (Kind::Unix, "Unix channel", Some(2)),
    (Kind::RawTls, "TLS 1.3 over TCP, tokio-rustls", None),
    (Kind::Tls, "TLS 1.3 channel over TCP", Some(4)),
    (Kind::WebSocket, "WebSocket channel over TCP, 256 KiB messages", Some(1)),
];

#[derive(Default)]
struct Row {
    forth: Vec<f64>,
    back: Vec<f64>,
    round_trip: Vec<f64>,
}

/// Samples of theirs, and of ours.
type Pair = [Vec<f64>; 2];

pub fn run(options: &Options) -> Result<()> {
    let vellum = tools::vellum(options)?;
    let tls = TlsSetup::new()?;
    let one = Builder::new_current_thread().enable_all().build().map_err(explain)?;
    let two = Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(explain)?;
    let mut rows: Vec<Row> = CONTENDERS.iter().map(|_| Row::default()).collect();
    let [mut handshakes, mut counted, mut relays] = [Pair::default(), Pair::default(), Pair::default()];
    for round in 0..options.runs {
        for turn in 0..TURNS {
            // Each other turn the other way round: what changes with time favours nobody.
            let mut order: Vec<_> = CONTENDERS.iter().zip(&mut rows).collect();
            if turn % 2 == 1 {
                order.reverse();
            }
            for ((kind, _, _), row) in order {
                check_interrupt()?;
                let [forth, back] = throughput(*kind, &tls)?;
                row.forth.push(forth);
                row.back.push(back);
                row.round_trip.push(one.block_on(async {
                    let (near, far) = kind.ends(&tls).await?;
                    streams::ping(near, far).await.map_err(explain)
                })?);
            }
            for (samples, kind) in handshakes.iter_mut().zip([Kind::RawTls, Kind::Tls]) {
                samples.push(shake_hands(&one, kind, &tls)?);
            }
            for (samples, program) in relays.iter_mut().zip(["socat", "vellum"]) {
                samples.push(relay::relay(&two, program, &vellum)?);
            }
        }
        counted[0].push(openssl::its_server(&tls)?);
        counted[1].push(openssl::our_server(&tls)?);
        eprintln!("round {} done", round + 1);
    }
    let mut text = facts(&host::facts(&tools::workspace(), &vellum));
    text.push_str(&table(&rows));
    text.push_str(&second_table(&handshakes, &counted, &relays));
    println!("{text}");
    match &options.markdown {
        Some(path) => write_section(path, "channel", &text),
        None => Ok(()),
    }
}

/// The mean of the middle half.
fn middle(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let cut = sorted.len() / 4;
    let half = &sorted[cut..sorted.len() - cut];
    half.iter().sum::<f64>() / half.len().max(1) as f64
}

fn explain(error: std::io::Error) -> String {
    format!("a channel failed: {error}")
}

/// Bytes a second from client to server, and back.
fn throughput(kind: Kind, tls: &TlsSetup) -> Result<[f64; 2]> {
    let [near, far] = kind.sockets()?;
    let ((near_tells, far_hears), (far_tells, near_hears)) = (mpsc::channel(), mpsc::channel());
    let [near, far] = std::thread::scope(|scope| {
        let near = scope.spawn(move || one_end(kind, near, true, tls, &near_tells, &near_hears));
        let far = scope.spawn(move || one_end(kind, far, false, tls, &far_tells, &far_hears));
        [near, far].map(|end| end.join().unwrap_or_else(|_| Err("an end panicked".to_owned())))
    });
    Ok([far?, near?])
}

/// The client sends, then the server does. Gives the bytes a second that this end received.
fn one_end(
    kind: Kind,
    socket: OwnedFd,
    is_client: bool,
    tls: &TlsSetup,
    tells: &mpsc::Sender<()>,
    hears: &mpsc::Receiver<()>,
) -> Result<f64> {
    stay_on(usize::from(!is_client));
    let bytes = match kind {
        Kind::RawTcp | Kind::Tcp | Kind::RawUnix | Kind::Unix => PLAIN_BYTES,
        Kind::RawTls | Kind::Tls | Kind::WebSocket => WORKED_BYTES,
    };
    let runtime = Builder::new_current_thread().enable_all().build().map_err(explain)?;
    runtime.block_on(async {
        let mut end = kind.end(socket, is_client, tls).await.map_err(explain)?;
        let mut rate = 0.0;
        for sends in [is_client, !is_client] {
            // Both begin at once; one that has failed is not waited for.
            let _ = tells.send(());
            hears.recv().map_err(|_| "the other end failed".to_owned())?;
            if sends {
                streams::send(&mut end, bytes).await.map_err(explain)?;
            } else {
                rate = bytes as f64 / streams::receive(&mut end, bytes).await.map_err(explain)?;
            }
        }
        // Nobody hangs up before the other has all.
        let _ = tells.send(());
        let _ = hears.recv();
        Ok(rate)
    })
}

/// Keeps this thread on one processor, where there are several.
fn stay_on(processor: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(processor);
    // Without it figures vary more.
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

/// Full TLS handshakes a second, connections included.
fn shake_hands(runtime: &Runtime, kind: Kind, tls: &TlsSetup) -> Result<f64> {
    runtime.block_on(async {
        let started = Instant::now();
        for _ in 0..HANDSHAKES {
            drop(kind.ends(tls).await?);
        }
        Ok(f64::from(HANDSHAKES) / started.elapsed().as_secs_f64())
    })
}

fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "\n| | MiB/s, client to server | by what it is compared with | MiB/s, server to client | by that | round trip us | by that |\n\
         |---|--:|--:|--:|--:|--:|--:|\n",
    );
    let mib = |samples: &[f64]| middle(samples) / f64::from(1 << 20);
    for ((_, name, peer), row) in CONTENDERS.iter().zip(rows) {
        let by = |pick: fn(&Row) -> &Vec<f64>| {
            let ratio = peer.map(|peer| middle(pick(row)) / middle(pick(&rows[peer])));
            ratio.map_or(String::new(), |ratio| format!("**{}**", number(Some(ratio))))
        };
        let _ = writeln!(
            text,
            "| {name} | {:.0} | {} | {:.0} | {} | {:.1} | {} |",
            mib(&row.forth),
            by(|row| &row.forth),
            mib(&row.back),
            by(|row| &row.back),
            middle(&row.round_trip) * 1e6,
            by(|row| &row.round_trip)
        );
    }
    text
}

fn second_table(handshakes: &Pair, counted: &Pair, relays: &Pair) -> String {
    let of = |samples: &[f64]| middle(samples);
    let mib = |samples: &[f64]| of(samples) / f64::from(1 << 20);
    format!(
        "\n| | theirs | ours | ours by theirs |\n|---|--:|--:|--:|\n\
         | full TLS handshakes a second, tokio-rustls and TLS channel | {:.0} | {:.0} | **{}** |\n\
         | the same as `openssl s_time -new` counts them, `openssl s_server` and TLS channel | {:.0} | {:.0} | **{}** |\n\
         | relay between two TCP connections, `socat -b262144` and `vellum channel`, MiB/s | {:.0} | {:.0} | **{}** |\n",
        of(&handshakes[0]),
        of(&handshakes[1]),
        number(Some(of(&handshakes[1]) / of(&handshakes[0]))),
        of(&counted[0]),
        of(&counted[1]),
        number(Some(of(&counted[1]) / of(&counted[0]))),
        mib(&relays[0]),
        mib(&relays[1]),
        number(Some(of(&relays[1]) / of(&relays[0]))),
    )
}
