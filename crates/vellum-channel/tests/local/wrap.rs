//! `Throttle`, `Timeout`, `Observe`.

use crate::common::{
    assert_io_kind, assert_kind, noise, poll_once_and_drop, read_to_end, receive, send, within, write,
};
use std::io::{IoSlice, IoSliceMut, SeekFrom};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vellum_channel::{
    Buffer, Channel, ChannelExt, Descriptors, ErrorKind, Features, File, Interest, Null, Observe, Pair, Rate,
    ReadFlags, Shutdown, Throttle, Timeout, TimeoutOptions, WriteFlags, kind_of,
};

const KIB: u64 = 1024;

/// Carries out a transfer of `bytes`, which takes what `rate` says, less the burst at the start: within a tenth, and a
/// little for timers. It is never too fast; a busy machine may make it too slow, but not every time.
async fn assert_rate(bytes: u64, rate: Rate, mut transfer: impl AsyncFnMut()) {
    let ideal = (bytes - rate.burst) as f64 / rate.bytes_per_second as f64;
    let mut seconds = f64::MAX;
    for _ in 0..4 {
        let begun = Instant::now();
        within(transfer()).await;
        seconds = begun.elapsed().as_secs_f64();
        assert!(seconds > ideal * 0.9, "{seconds} s where {ideal} s are right: too fast");
        if seconds < ideal * 1.1 + 0.02 {
            return;
        }
    }
    panic!("{seconds} s where {ideal} s are right: too slow");
}

#[tokio::test]
async fn a_throttle_keeps_the_rate_of_either_direction() {
    let rate = Rate { bytes_per_second: 4096 * KIB, burst: 256 * KIB };
    let total = 4096 * KIB;
    let data = vec![7; total as usize];
    assert_rate(total, rate, async || {
        let mut writer = Throttle::new(Null::new(), None, Some(rate));
        write(&mut writer, &data).await.expect("written");
    })
    .await;
    assert_rate(total, rate, async || {
        let mut reader = Throttle::new(Buffer::from_vec(data.clone()), Some(rate), None);
        assert!(read_to_end(&mut reader).await.expect("read") == data);
    })
    .await;
    // Small pieces, one after the other, count like large ones.
    assert_rate(total, rate, async || {
        let mut writer = Throttle::new(Null::new(), None, Some(rate));
        for piece in data.chunks(1000) {
            write(&mut writer, piece).await.expect("written");
        }
    })
    .await;
}

#[tokio::test]
async fn a_rate_can_be_changed_while_in_use() {
    let stopped = Rate { bytes_per_second: 0, burst: 10 };
    let mut channel = Throttle::new(Null::new(), None, Some(stopped));
    let rates = channel.rates();
    assert_eq!(rates.write(), Some(stopped));
    write(&mut channel, &[0; 10]).await.expect("the burst");
    let writing = tokio::spawn(async move { write(&mut channel, &[0; 1_000_000]).await.map(|()| channel) });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!writing.is_finished());
    std::thread::spawn(move || rates.set_write(None)).join().expect("no panic");
    let mut channel = within(writing).await.expect("no panic").expect("written");
    let rate = Rate { bytes_per_second: 1024 * KIB, burst: 16 * KIB };
    assert_rate(512 * KIB, rate, async || {
        // A direction that was unlimited has a burst to begin with.
        channel.rates().set_write(None);
        channel.rates().set_write(Some(rate));
        write(&mut channel, &vec![0; 512 << 10]).await.expect("written");
    })
    .await;
}

#[tokio::test]
async fn a_throttled_channel_is_ready_when_bytes_may_go() {
    let slow = Rate { bytes_per_second: 1000, burst: 100 };
    let mut channel = Throttle::new(Null::new(), None, Some(slow));
    channel.set_blocking(false);
    assert_eq!(channel.writev(&[IoSlice::new(&[0; 500])]).await.expect("the burst"), 100);
    assert_io_kind(channel.writev(&[IoSlice::new(&[0; 500])]).await, std::io::ErrorKind::WouldBlock);
    assert_eq!(channel.ready(Interest::READ | Interest::WRITE).await.expect("ready"), Interest::READ);
    let begun = Instant::now();
    assert_eq!(within(channel.ready(Interest::WRITE)).await.expect("ready"), Interest::WRITE);
    assert!(begun.elapsed() >= Duration::from_millis(15), "{:?}", begun.elapsed());
    let count = channel.writev(&[IoSlice::new(&[0; 500])]).await.expect("some may go");
    assert!((20..100).contains(&count), "{count}");
}

/// A direction that is not there is not what becomes ready, nor what fails, while the other one waits for its rate.
#[tokio::test]
async fn a_throttled_pipe_waits_for_the_direction_that_it_has() {
    let (out, mut into) = std::io::pipe().expect("a pipe");
    let slow = Rate { bytes_per_second: 1000, burst: 40 };
    let mut reader = Throttle::new(File::from_fd(out.into()).expect("a channel"), Some(slow), None);
    std::io::Write::write_all(&mut into, &[7; 100]).expect("written");
    within(reader.read_all(&mut [0; 40])).await.expect("the burst");
    assert_eq!(within(reader.ready(Interest::all())).await.expect("ready"), Interest::READ);
    assert_kind(within(reader.ready(Interest::WRITE)).await, ErrorKind::Unsupported);
}

#[tokio::test]
async fn a_dropped_throttled_write_says_what_it_sent() {
    let (near, mut far) = Pair::with_capacity(1 << 20);
    let rate = Rate { bytes_per_second: 100_000, burst: 1000 };
    let mut near = Throttle::new(near, None, Some(rate));
    let data = noise(10_000);
    let mut sent = 0;
    while sent < data.len() {
        let rest = [IoSlice::new(&data[sent..])];
        let mut writing = near.writev_all(&rest);
        let _ = tokio::time::timeout(Duration::from_millis(3), &mut writing).await;
        sent += writing.transferred();
    }
    drop(near);
    assert!(within(read_to_end(&mut far)).await.expect("read") == data);
}

#[test]
fn timers_are_made_where_the_channel_is() {
    let rate = Rate { bytes_per_second: 100_000, burst: 1000 };
    let mut channel = Throttle::new(Timeout::new(Null::new(), TimeoutOptions::default()), None, Some(rate));
    for _ in 0..2 {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        channel.attach(runtime.handle()).expect("attached");
        runtime.block_on(within(async {
            write(&mut channel, &noise(5000)).await.expect("written");
            // Left waiting, with a timer, when the executor ends.
            assert!(poll_once_and_drop(write(&mut channel, &noise(50_000))).await.is_none());
        }));
        channel.detach().expect("detached");
        runtime.block_on(async {
            assert_kind(write(&mut channel, &noise(50_000)).await, ErrorKind::Detached);
        });
    }
}

#[tokio::test]
async fn a_timeout_fires_and_the_channel_goes_on() {
    let (near, mut far) = Pair::with_capacity(10);
    let limit = Duration::from_millis(60);
    let options = TimeoutOptions { read: Some(limit), write: Some(limit) };
    let mut near = Timeout::new(near, options);
    let mut room = [0; 4];
    for _ in 0..2 {
        let begun = Instant::now();
        let timed_out = within(near.read_all(&mut room)).await;
        assert!(
            begun.elapsed() >= limit && begun.elapsed() < Duration::from_secs(5),
            "{:?}",
            begun.elapsed()
        );
        assert_kind(timed_out, ErrorKind::Timeout);
    }
    write(&mut far, b"late").await.expect("sent");
    within(near.read_all(&mut room)).await.expect("the channel is as usable as before");
    assert_eq!(&room, b"late");
    let data = noise(25);
    let bufs = [IoSlice::new(&data)];
    let mut writing = near.writev_all(&bufs);
    let error = within(&mut writing).await.expect_err("nobody reads");
    assert_eq!(kind_of(&error), Some(ErrorKind::Timeout));
    assert!(error.to_string().contains("pair channel"), "{error}");
    let sent = writing.transferred();
    assert_eq!(sent, 10);
    let ready = within(near.ready(Interest::READ)).await;
    assert_kind(ready, ErrorKind::Timeout);
    let rest = tokio::spawn(async move { write(&mut near, &data[sent..]).await });
    let mut all = vec![0; 25];
    within(far.read_all(&mut all)).await.expect("read");
    within(rest).await.expect("no panic").expect("written");
    assert_eq!(all, noise(25));
}

#[tokio::test]
async fn progress_starts_the_time_anew() {
    let (near, mut far) = Pair::new();
    let options = TimeoutOptions { read: Some(Duration::from_millis(400)), write: None };
    let mut near = Timeout::new(near, options);
    let sending = tokio::spawn(async move {
        for _ in 0..10 {
            tokio::time::sleep(Duration::from_millis(80)).await;
            write(&mut far, b"x").await.expect("sent");
        }
        far
    });
    // Longer in all than the limit, each byte well within it; every second wait is dropped and begun again.
    let mut got = 0;
    while got < 10 {
        let room = &mut [0; 1];
        let waited = tokio::time::timeout(Duration::from_millis(50), near.read_all(room)).await;
        if let Ok(read) = waited {
            read.expect("in time");
            got += 1;
        }
    }
    let _far = within(sending).await.expect("no panic");
    // Dropped again and again without a byte, the wait is over all the same.
    let begun = Instant::now();
    let timed_out = loop {
        let room = &mut [0; 1];
        match tokio::time::timeout(Duration::from_millis(30), near.read_all(room)).await {
            Ok(done) => break done,
            Err(_) => assert!(begun.elapsed() < Duration::from_secs(10), "never times out"),
        }
    };
    assert_kind(timed_out, ErrorKind::Timeout);
}

#[tokio::test]
async fn time_in_which_nothing_waits_does_not_count() {
    let (near, mut far) = Pair::new();
    let options = TimeoutOptions { read: Some(Duration::from_millis(100)), write: None };
    let mut near = Timeout::new(near, options);
    assert!(poll_once_and_drop(near.read_all(&mut [0; 1])).await.is_none());
    tokio::time::sleep(Duration::from_millis(400)).await;
    let answering = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        write(&mut far, b"x").await
    };
    let room = &mut [0; 1];
    let (read, written) = within(async { tokio::join!(near.read_all(room), answering) }).await;
    read.expect("in time");
    written.expect("sent");
}

#[tokio::test]
async fn counts_are_exact() {
    let (near, mut far) = Pair::with_capacity(1000);
    let mut near = Observe::new(near);
    let counters = near.counters();
    let echoing = tokio::spawn(async move {
        let mut block = vec![0; 700];
        while far.read_all_eof(&mut block).await.expect("read") {
            tokio::time::sleep(Duration::from_millis(5)).await;
            write(&mut far, &block).await.expect("written");
        }
    });
    let data = noise(700);
    for _ in 0..10 {
        within(write(&mut near, &data)).await.expect("written");
        let mut back = vec![0; 700];
        assert_eq!(near.ready(Interest::READ).await.expect("ready"), Interest::READ);
        near.peek(&mut back).await.expect("a peek is not counted");
        within(near.read_all(&mut back)).await.expect("read");
        assert_eq!(back, data);
    }
    // From another thread, while the channel is in use.
    let counts = std::thread::spawn(move || counters.snapshot()).join().expect("no panic");
    assert_eq!((counts.read.bytes, counts.written.bytes), (7000, 7000));
    assert!(counts.read.operations >= 10 && counts.written.operations >= 10);
    assert_eq!((counts.read.errors, counts.written.errors, counts.read.waits), (0, 0, 10));
    assert!(counts.read.blocked >= Duration::from_millis(50) && counts.read.blocked <= counts.age);
    near.set_blocking(false);
    assert_io_kind(near.readv(&mut [IoSliceMut::new(&mut [0; 1])]).await, std::io::ErrorKind::WouldBlock);
    near.shut_down(Shutdown::Write).expect("shut down");
    assert_io_kind(write(&mut near, b"x").await, std::io::ErrorKind::BrokenPipe);
    let counters = near.counters();
    drop(near);
    within(echoing).await.expect("no panic");
    let after = counters.snapshot();
    assert_eq!((after.read.waits, after.read.errors, after.written.errors), (11, 0, 1));
    assert_eq!(after.written.operations, counts.written.operations + 1);
}

#[tokio::test]
async fn every_operation_is_told() {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let told = lines.clone();
    let mut channel = Observe::new(Buffer::with_limit(100))
        .with_trace(move |trace| told.lock().expect("no panic").push(trace.to_string()));
    channel.set_name("disk");
    write(&mut channel, b"abc").await.expect("written");
    channel.pwritev(&[IoSlice::new(&[0xFF; 90])], 3).await.expect("written");
    channel.seek_to(SeekFrom::Start(1)).await.expect("sought");
    channel.read_all(&mut [0; 2]).await.expect("read");
    channel.preadv(&mut [IoSliceMut::new(&mut [0; 2])], 0).await.expect("read");
    channel.seek_to(SeekFrom::Start(100)).await.expect("sought");
    write(&mut channel, b"x").await.expect_err("full");
    tokio::io::AsyncWriteExt::flush(&mut channel).await.expect("flushed");
    channel.close().await.expect("closed");
    let lines = lines.lock().expect("no panic");
    assert_eq!(lines[0], "write 3 bytes: 61 62 63");
    assert!(
        lines[1].starts_with("write at 3 90 bytes: ff ff") && lines[1].ends_with("ff ..."),
        "{}",
        lines[1]
    );
    assert_eq!(lines[2], "seek to 1");
    assert_eq!(lines[3], "read 2 bytes: 62 63");
    assert_eq!(lines[4], "read at 0 2 bytes: 61 62");
    assert!(lines[6].starts_with("write failed: buffer channel \"disk\" holds at most"), "{}", lines[6]);
    assert_eq!(lines[7..], ["flush", "close"]);
}

#[tokio::test]
async fn wrappers_pass_on_what_they_do_not_change() {
    let fast = Some(Rate::new(1 << 40));
    let options =
        TimeoutOptions { read: Some(Duration::from_secs(60)), write: Some(Duration::from_secs(60)) };
    for is_blocking in [true, false] {
        let (near, far) = Pair::with_capacity(5000);
        let mut near: Box<dyn Channel> =
            Box::new(Observe::new(Timeout::new(Throttle::new(near, fast, fast), options)).with_tracing());
        let mut far = Throttle::new(Observe::new(Timeout::new(far, options)), fast, fast);
        near.set_name("inner");
        assert_eq!(near.label(), "pair channel \"inner\"");
        assert!(near.features().contains(Features::DESCRIPTORS | Features::PEEK | Features::SHUTDOWN));
        let sending = tokio::spawn(async move {
            send(&mut near, is_blocking).await.expect("sent");
            near
        });
        within(receive(&mut far, is_blocking)).await.expect("received");
        let mut near = within(sending).await.expect("no panic");
        let null = std::fs::File::open("/dev/null").expect("a file");
        let fds = [null.as_fd()];
        near.writev_full_all(&[IoSlice::new(b"fd")], &fds, WriteFlags::empty()).await.expect("sent");
        let mut received = Descriptors::default();
        let room = &mut [0; 2];
        let bufs = &mut [IoSliceMut::new(room)];
        far.readv_full_all(bufs, Some(&mut received), ReadFlags::empty()).await.expect("read");
        assert_eq!(received.len(), 1);
        near.shut_down(Shutdown::Write).expect("shut down");
        assert!(!within(far.read_all_eof(room)).await.expect("the end"));
        near.close().await.expect("closed");
        assert_kind(near.ready(Interest::READ).await, ErrorKind::Closed);
    }
    let mut seekable = Observe::new(Timeout::new(Throttle::new(Buffer::new(), fast, fast), options));
    assert!(seekable.features().contains(Features::SEEK));
    seekable.pwritev(&[IoSlice::new(b"x")], 9).await.expect("written");
    assert_eq!(seekable.seek_to(SeekFrom::End(0)).await.expect("sought"), 10);
}
