//! Operations of `File` that are dropped midway. A file system in memory has no reads and writes "that need not wait":
//! there, every transfer goes through a blocking thread.

use crate::common::{noise, poll_once_and_drop, within, write};
use std::io::{IoSlice, IoSliceMut, SeekFrom};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use vellum_channel::{ChannelExt, File, FileOptions};

async fn files() -> Vec<(tempfile::TempDir, File)> {
    let mut files = Vec::new();
    for place in ["/dev/shm".into(), std::env::temp_dir(), env!("CARGO_MANIFEST_DIR").into()] {
        let Ok(directory) = tempfile::tempdir_in(&place) else {
            println!("note: no files under {}", place.display());
            continue;
        };
        let options = FileOptions { create: true, ..FileOptions::read_write() };
        let file = File::open(directory.path().join("file"), &options).await.expect("made");
        files.push((directory, file));
    }
    files
}

/// Writes past the kernel's cache are far away: this makes reads miss it, where the file system lets us.
fn forget(file: &File) {
    let fd = file.fd().expect("open");
    let _ = rustix::fs::fdatasync(fd);
    let _ = rustix::fs::fadvise(fd, 0, None, rustix::fs::Advice::DontNeed);
}

#[tokio::test]
async fn dropped_reads_lose_nothing() {
    for (_directory, mut file) in files().await {
        let data = noise(500_000);
        write(&mut file, &data).await.expect("written");
        file.flush().await.expect("with the kernel");
        forget(&file);
        file.seek_to(SeekFrom::Start(0)).await.expect("sought");
        let mut got = Vec::new();
        let mut dropped = 0;
        while got.len() < data.len() {
            let mut room = vec![0; 7001];
            let bufs = &mut [IoSliceMut::new(&mut room)];
            match poll_once_and_drop(file.readv(bufs)).await {
                Some(read) => {
                    let read = read.expect("read");
                    assert!(read > 0, "not at the end yet");
                    got.extend_from_slice(&room[..read]);
                }
                None => {
                    dropped += 1;
                    tokio::time::sleep(Duration::from_micros(200)).await;
                }
            }
        }
        println!("{dropped} reads were dropped");
        assert!(got == data, "bytes were lost or doubled");
    }
}

#[tokio::test]
async fn a_dropped_read_does_not_move_what_follows() {
    for (_directory, mut file) in files().await {
        let data = noise(100_000);
        write(&mut file, &data).await.expect("written");
        for after in 0..4_u64 {
            forget(&file);
            file.seek_to(SeekFrom::Start(1000 * after)).await.expect("sought");
            let mut room = [0; 100];
            let was_read = poll_once_and_drop(file.read_all(&mut room)).await.is_some();
            let position = 1000 * after + if was_read { 100 } else { 0 };
            match after {
                0 => {
                    let here = file.seek_to(SeekFrom::Current(0)).await.expect("told");
                    assert_eq!(here, position);
                }
                1 => {
                    write(&mut file, b"written here").await.expect("written");
                    let mut back = [0; 12];
                    let bufs = &mut [IoSliceMut::new(&mut back)];
                    assert_eq!(within(file.preadv(bufs, position)).await.expect("read"), 12);
                    assert_eq!(&back, b"written here");
                }
                2 => {
                    let here = file.seek_to(SeekFrom::Current(-50)).await.expect("sought");
                    assert_eq!(here, position - 50);
                }
                _ => {
                    within(file.read_all(&mut room)).await.expect("read");
                    let from = usize::try_from(position).expect("small");
                    assert_eq!(&room[..], &data[from..from + 100]);
                }
            }
        }
    }
}

#[tokio::test]
async fn a_dropped_positioned_read_is_not_mixed_up() {
    for (_directory, mut file) in files().await {
        let data = noise(200_000);
        write(&mut file, &data).await.expect("written");
        file.flush().await.expect("with the kernel");
        for offset in [0_u64, 150_000, 70_000] {
            forget(&file);
            let mut room = [0; 500];
            let _ = poll_once_and_drop(file.preadv(&mut [IoSliceMut::new(&mut room)], offset + 1000)).await;
            let read = within(file.preadv(&mut [IoSliceMut::new(&mut room)], offset)).await.expect("read");
            let from = usize::try_from(offset).expect("small");
            assert_eq!(&room[..read], &data[from..from + read]);
            // A write between a dropped read and its repetition shows.
            forget(&file);
            let _ = poll_once_and_drop(file.preadv(&mut [IoSliceMut::new(&mut room)], offset)).await;
            file.pwritev(&[IoSlice::new(b"new")], offset).await.expect("written");
            let read = within(file.preadv(&mut [IoSliceMut::new(&mut room)], offset)).await.expect("read");
            assert_eq!(&room[..read.min(3)], b"new");
            file.pwritev(&[IoSlice::new(&data[from..from + 3])], offset).await.expect("written");
        }
    }
}

#[tokio::test]
async fn dropped_writes_write_what_they_reported() {
    for (directory, mut file) in files().await {
        let data = noise(3_000_000);
        let mut sent = 0;
        while sent < data.len() {
            let rest = [IoSlice::new(&data[sent..data.len().min(sent + 70_001)])];
            let mut writing = file.writev_all(&rest);
            poll_once_and_drop(&mut writing).await;
            sent += writing.transferred();
            tokio::task::yield_now().await;
        }
        within(file.flush()).await.expect("with the kernel");
        let written = std::fs::read(directory.path().join("file")).expect("read");
        assert!(written == data, "bytes were lost or doubled");
    }
}

#[tokio::test]
async fn a_dropped_close_can_be_repeated() {
    for (directory, mut file) in files().await {
        write(&mut file, &noise(1_500_000)).await.expect("written");
        while poll_once_and_drop(file.close()).await.is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        file.close().await.expect("closed twice");
        let written = std::fs::read(directory.path().join("file")).expect("read");
        assert!(written == noise(1_500_000));
    }
}

/// An executor that ends drops the work that it has not begun: it is done by the next one.
#[test]
fn reported_writes_outlive_their_executor() {
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        println!("note: no files in memory on this machine");
        return;
    };
    let path = directory.path().join("file");
    let first = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .build()
        .expect("a runtime");
    let mut file = first.block_on(File::create(&path, 0o600)).expect("made");
    // Its only thread for such work has something else to do.
    let busy = first.handle().spawn_blocking(|| std::thread::sleep(Duration::from_millis(300)));
    first.block_on(write(&mut file, b"reported")).expect("written");
    first.shutdown_background();
    drop(busy);
    let second = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    second.block_on(within(async {
        file.flush().await.expect("flushed, where the task is now");
        file.close().await.expect("closed");
    }));
    assert_eq!(std::fs::read(&path).expect("read"), b"reported");
}
