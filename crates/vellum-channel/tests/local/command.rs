//! `Command`.

use crate::common::{
    assert_io_kind, assert_kind, noise, poll_once_and_drop, read_to_end, receive, send, within, write,
};
use std::os::unix::process::ExitStatusExt;
use std::process::Command as Process;
use std::time::{Duration, Instant};
use vellum_channel::{
    Channel, ChannelExt, Command, CommandOptions, Direction, ErrorKind, Features, Interest, Shutdown, kind_of,
};

fn shell(text: &str) -> Process {
    let mut command = Process::new("sh");
    command.arg("-c").arg(text);
    command
}

fn socat(arguments: [&str; 2]) -> Process {
    let mut command = Process::new("socat");
    command.args(arguments);
    command
}

/// Whether the process is still there, as anything but a zombie; and whether as a zombie.
fn state_of(pid: u32) -> Option<char> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    status.rsplit(')').next()?.trim().chars().next()
}

async fn wait_until_gone(pid: u32, longest: Duration) -> Duration {
    let begun = Instant::now();
    while state_of(pid).is_some() {
        assert!(begun.elapsed() < longest, "process {pid} is still there, in state {:?}", state_of(pid));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    begun.elapsed()
}

#[tokio::test]
async fn through_a_fifo_between_two_children() {
    for is_blocking in [true, false] {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("fifo");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).expect("a FIFO");
        let pipe = format!("PIPE:{},wronly", path.display());
        let mut writer = Command::spawn(socat(["-", &pipe]), Direction::Write).expect("started");
        let pipe = format!("PIPE:{},rdonly", path.display());
        let mut reader = Command::spawn(socat([&pipe, "-"]), Direction::Read).expect("started");
        let sending = tokio::spawn(async move {
            send(&mut writer, is_blocking).await.expect("sent");
            writer.close().await.expect("closed")
        });
        within(receive(&mut reader, is_blocking)).await.expect("received");
        let closed = within(sending).await.expect("no panic");
        assert!(closed.exit_status.is_some_and(|status| status.success()));
        assert!(!within(reader.read_all_eof(&mut [0])).await.expect("the end"));
        within(reader.close()).await.expect("closed");
    }
}

#[tokio::test]
async fn echoed_by_one_child() {
    for is_blocking in [true, false] {
        let child = Command::spawn(socat(["PIPE", "-"]), Direction::Both).expect("started");
        let control = child.control();
        // One task reads while the other writes.
        let (mut output, mut input) = tokio::io::split(child);
        let sending = tokio::spawn(async move {
            let all = crate::common::pattern().concat();
            tokio::io::AsyncWriteExt::write_all(&mut input, &all).await.expect("sent");
            if is_blocking {
                tokio::io::AsyncWriteExt::shutdown(&mut input).await.expect("half-closed");
            } else {
                control.shutdown(Shutdown::Write).expect("half-closed");
            }
            input
        });
        let mut all = Vec::new();
        within(tokio::io::AsyncReadExt::read_to_end(&mut output, &mut all)).await.expect("received");
        assert!(all == crate::common::pattern().concat());
        let mut child = output.unsplit(within(sending).await.expect("no panic"));
        let closed = within(child.close()).await.expect("closed");
        assert!(closed.exit_status.is_some_and(|status| status.success()));
    }
}

#[tokio::test]
async fn exit_codes_and_signals_are_told() {
    for (text, code, signal) in
        [("exit 0", Some(0), None), ("exit 3", Some(3), None), ("kill -9 $$", None, Some(9))]
    {
        let mut child = Command::shell(text).expect("started");
        assert!(child.features().contains(Features::SHUTDOWN));
        assert_eq!(within(read_to_end(&mut child)).await.expect("the end"), b"");
        // Also without close, once the output has ended.
        let waited = within(child.wait()).await.expect("exits");
        assert_eq!(child.exit_status().expect("known"), Some(waited));
        let closed = within(child.close()).await.expect("closed");
        assert_eq!(within(child.close()).await.expect("closed twice"), closed);
        let status = closed.exit_status.expect("a status");
        assert_eq!((status.code(), status.signal()), (code, signal), "{text}");
        assert_eq!(child.failure().is_some(), text != "exit 0");
        assert_kind(read_to_end(&mut child).await, ErrorKind::Closed);
        assert_kind(write(&mut child, b"x").await, ErrorKind::Closed);
        assert_kind(child.control().shutdown(Shutdown::Write), ErrorKind::Closed);
    }
}

#[tokio::test]
async fn the_end_of_its_error_output_explains_a_failure() {
    let options = CommandOptions { stderr_tail: Some(40), ..CommandOptions::default() };
    // Far more than a pipe holds, while this side waits for the standard output; and a control character.
    let text = "yes noise | head -c 1000000 >&2; echo; printf 'no such \\033disk' >&2; exit 5";
    let mut child = Command::spawn_with(shell(text), Direction::Both, &options).expect("started");
    assert_eq!(within(read_to_end(&mut child)).await.expect("read"), b"\n");
    within(child.close()).await.expect("closed");
    let failure = child.failure().expect("it failed");
    assert_eq!(kind_of(&failure), Some(ErrorKind::Command));
    let message = failure.to_string();
    assert!(message.contains("exit status: 5"), "{message}");
    assert!(message.ends_with("no such \u{fffd}disk"), "{message}");
    assert!(child.stderr_tail().len() <= 42);
}

#[tokio::test]
async fn a_child_that_cannot_be_started_is_an_error() {
    let missing = Command::spawn(Process::new("/nonexistent/program"), Direction::Both);
    let error = missing.expect_err("it is not there");
    assert_eq!(kind_of(&error), Some(ErrorKind::Command));
    assert!(error.to_string().contains("/nonexistent/program"), "{error}");
}

#[tokio::test]
async fn one_direction_only() {
    let mut reader = Command::spawn(shell("cat; echo done"), Direction::Read).expect("started");
    assert_kind(write(&mut reader, b"x").await, ErrorKind::Unsupported);
    assert_eq!(within(read_to_end(&mut reader)).await.expect("read"), b"done\n");
    within(reader.close()).await.expect("closed");
    let mut writer = Command::spawn(shell("cat; exit 4"), Direction::Write).expect("started");
    assert_kind(read_to_end(&mut writer).await, ErrorKind::Unsupported);
    write(&mut writer, &noise(300_000)).await.expect("written");
    let closed = within(writer.close()).await.expect("closed");
    assert_eq!(closed.exit_status.and_then(|status| status.code()), Some(4));
}

#[tokio::test]
async fn a_child_may_close_its_output_early() {
    let mut child = Command::shell("exec >&-; cat >/dev/null; exit 6").expect("started");
    assert_eq!(within(read_to_end(&mut child)).await.expect("the end"), b"");
    assert_eq!(child.exit_status().expect("asked"), None, "it still runs");
    write(&mut child, &noise(300_000)).await.expect("it still reads");
    let closed = within(child.close()).await.expect("closed");
    assert_eq!(closed.exit_status.and_then(|status| status.code()), Some(6));
}

#[tokio::test]
async fn a_child_that_does_not_read_holds_the_writer_up() {
    let mut child = Command::shell("exec 2>/dev/null; sleep 600").expect("started");
    let data = noise(1_000_000);
    let bufs = [std::io::IoSlice::new(&data)];
    let mut writing = child.writev_all(&bufs);
    let waited = tokio::time::timeout(Duration::from_millis(100), &mut writing).await;
    assert!(waited.is_err(), "nobody has read it");
    let sent = writing.transferred();
    assert!(sent > 0 && sent < 500_000, "{sent} bytes are on their way");
    // Another thread ends it: whoever waits is woken.
    let control = child.control();
    let waiting = tokio::spawn(async move {
        let failed = write(&mut child, &noise(1_000_000)).await;
        (child, failed)
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    std::thread::spawn(move || control.shutdown(Shutdown::Both))
        .join()
        .expect("no panic")
        .expect("shut down");
    let (mut child, failed) = within(waiting).await.expect("no panic");
    assert_io_kind(failed, std::io::ErrorKind::BrokenPipe);
    assert_eq!(within(read_to_end(&mut child)).await.expect("shut down, too"), b"");
    // A close that is given up can be repeated.
    assert!(poll_once_and_drop(child.close()).await.is_none());
    assert_kind(write(&mut child, b"x").await, ErrorKind::Closed);
    child.kill().expect("killed");
    let closed = within(child.close()).await.expect("closed");
    assert_eq!(closed.exit_status.and_then(|status| status.signal()), Some(9));
}

#[tokio::test]
async fn a_child_that_ended_breaks_the_pipe() {
    let mut child = Command::shell("exit 0").expect("started");
    within(child.wait()).await.expect("exits");
    assert_io_kind(within(write(&mut child, &noise(200_000))).await, std::io::ErrorKind::BrokenPipe);
    let ready = within(child.ready(Interest::READ | Interest::WRITE)).await.expect("both at once");
    assert_eq!(ready, Interest::READ | Interest::WRITE);
}

#[tokio::test]
async fn a_dropped_child_is_ended_and_leaves_no_zombie() {
    let child = Command::shell("exec sleep 600").expect("started");
    let pid = child.id().expect("running");
    let begun = Instant::now();
    drop(child);
    assert!(begun.elapsed() < Duration::from_millis(100), "drop does not wait");
    assert!(wait_until_gone(pid, Duration::from_secs(10)).await < Duration::from_secs(5), "SIGTERM suffices");
}

#[tokio::test]
async fn a_dropped_child_that_ignores_the_request_is_killed() {
    let options = CommandOptions { grace: Duration::from_millis(200), ..CommandOptions::default() };
    let text = "trap '' TERM PIPE HUP; echo ready; while :; do sleep 0.05; done";
    let mut child = Command::spawn_with(shell(text), Direction::Both, &options).expect("started");
    within(child.read_all(&mut [0; 6])).await.expect("the trap is set");
    let pid = child.id().expect("running");
    let begun = Instant::now();
    drop(child);
    assert!(begun.elapsed() < Duration::from_millis(100), "drop does not wait");
    let took = wait_until_gone(pid, Duration::from_secs(10)).await;
    assert!(took >= Duration::from_millis(150), "it had its grace: {took:?}");
}

#[tokio::test]
async fn readiness_and_modes() {
    let mut child = Command::shell("read line; echo \"$line\"").expect("started");
    assert_eq!(within(child.ready(Interest::WRITE)).await.expect("writable"), Interest::WRITE);
    assert!(poll_once_and_drop(child.ready(Interest::READ)).await.is_none());
    child.set_blocking(false);
    let mut line = [0; 6];
    let nothing = child.readv(&mut [std::io::IoSliceMut::new(&mut line)]).await;
    assert_io_kind(nothing, std::io::ErrorKind::WouldBlock);
    write(&mut child, b"hello\n").await.expect("written");
    assert_eq!(within(child.ready(Interest::READ)).await.expect("readable"), Interest::READ);
    within(child.read_all(&mut line)).await.expect("read");
    assert_eq!(&line, b"hello\n");
    assert!(within(child.close()).await.expect("closed").exit_status.is_some_and(|status| status.success()));
}

#[tokio::test]
async fn a_child_moves_between_executors() {
    let options = CommandOptions { stderr_tail: Some(100), ..CommandOptions::default() };
    let mut child =
        Command::spawn_with(shell("cat; echo bye >&2"), Direction::Both, &options).expect("started");
    write(&mut child, b"one").await.expect("written");
    child.detach().expect("detached");
    let mut child = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(within(async {
            child.attach(runtime.handle()).expect("attached");
            child.read_all(&mut [0; 3]).await.expect("read");
            write(&mut child, b"two").await.expect("written");
            child.detach().expect("detached");
            child
        }))
    })
    .join()
    .expect("no panic");
    child.attach(&tokio::runtime::Handle::current()).expect("attached");
    within(child.read_all(&mut [0; 3])).await.expect("read");
    child.shut_down(Shutdown::Write).expect("half-closed");
    assert_eq!(within(read_to_end(&mut child)).await.expect("read"), b"");
    assert!(within(child.close()).await.expect("closed").exit_status.is_some_and(|status| status.success()));
    assert_eq!(child.stderr_tail(), "bye");
}

#[tokio::test]
async fn detached_it_says_so_rather_than_wait() {
    let mut child = Command::shell("cat").expect("started");
    child.detach().expect("detached");
    assert_kind(within(child.read_all(&mut [0; 1])).await, ErrorKind::Detached);
    assert_kind(within(child.wait()).await, ErrorKind::Detached);
    child.attach(&tokio::runtime::Handle::current()).expect("attached");
    write(&mut child, b"x").await.expect("written");
    within(child.read_all(&mut [0; 1])).await.expect("read");
    within(child.close()).await.expect("closed");
}
