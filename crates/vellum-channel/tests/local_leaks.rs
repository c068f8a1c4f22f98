//! What is left when many children have come and gone. A test program of its own: it counts what the process has.

use std::io::IoSlice;
use std::time::{Duration, Instant};
use vellum_channel::{ChannelExt, Command, CommandOptions, Direction};

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("a list").count()
}

/// Children of this process, with their states.
fn children() -> Vec<String> {
    let own = std::process::id().to_string();
    let processes = std::fs::read_dir("/proc").expect("a list");
    processes
        .filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("stat")).ok())
        .filter(|status| {
            let after_name = status.rsplit(')').next().unwrap_or_default();
            after_name.split_whitespace().nth(1) == Some(own.as_str())
        })
        .collect()
}

async fn child(number: usize) {
    let options =
        CommandOptions { stderr_tail: number.is_multiple_of(3).then_some(100), ..CommandOptions::default() };
    let mut command = std::process::Command::new("sh");
    command.arg("-c").arg(if number % 5 == 4 { "exec sleep 600" } else { "cat" });
    let mut child = Command::spawn_with(command, Direction::Both, &options).expect("started");
    child.writev_all(&[IoSlice::new(b"hello")]).await.expect("written");
    match number % 5 {
        0 => {
            child.read_all(&mut [0; 5]).await.expect("read");
            child.close().await.expect("closed");
        }
        1 => {
            child.read_all(&mut [0; 5]).await.expect("read");
        }
        2 => {
            // A close that is given up.
            tokio::select! { biased; _ = child.close() => {} () = std::future::ready(()) => {} }
        }
        _ => {}
    }
}

#[tokio::test]
async fn two_hundred_children_leave_nothing() {
    child(0).await;
    let before = open_descriptors();
    for round in 0..50 {
        let all = [0, 1, 2, 3].map(|number| child(round * 4 + number));
        let [a, b, c, d] = all;
        let work = async { tokio::join!(a, b, c, d) };
        tokio::time::timeout(Duration::from_secs(60), work).await.expect("does not hang");
    }
    let begun = Instant::now();
    while !children().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(20), "left behind: {:?}", children());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(open_descriptors(), before, "descriptors are left open");
}
