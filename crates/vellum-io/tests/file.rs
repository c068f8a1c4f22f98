//! What a local file promises beyond the contract of `Storage`.

mod common;

use common::{DRIVERS, LoopDevice, Mounted, fresh, options, or_say_so, scratch};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vellum_core::{Buf, Code, Preallocate, Status, Storage, WriteFlags, ZeroMode};
use vellum_io::{ContextOptions, Create, Driver, IoContext, LocalFile, LockMode, OpenOptions};

fn write(file: &LocalFile, bytes: &[u8], offset: u64) {
    file.write_at(Buf::copy_of(bytes), offset, WriteFlags::default()).wait().1.unwrap();
}

#[test]
fn fifos_sockets_and_directories_are_refused_without_hanging() {
    let scratch = scratch();
    let fifo = scratch.path().join("fifo");
    common::run("mkfifo", "coreutils", &[fifo.to_str().unwrap()]).unwrap();
    let socket = scratch.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let start = Instant::now();
    for path in [&fifo, &socket, &scratch.path().to_owned(), &"/dev/zero".into(), &"/dev/tty".into()] {
        for write in [false, true] {
            let error =
                LocalFile::open(path, &OpenOptions { write, ..OpenOptions::default() }).err().unwrap();
            assert_eq!(error.code(), Code::Usage, "{error:?}");
        }
        let error = LocalFile::open(path, &options(Driver::Inline, false, Create::Replace)).err().unwrap();
        assert_eq!(error.code(), Code::Usage, "{error:?}");
    }
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn creating_neither_overwrites_nor_follows_a_link() {
    let scratch = scratch();
    let (path, link) = (scratch.path().join("a"), scratch.path().join("link"));
    let new = options(Driver::Inline, false, Create::New);
    write(&LocalFile::open(&path, &new).unwrap(), b"precious", 0);
    assert_eq!(LocalFile::open(&path, &new).err().unwrap().code(), Code::Exists);
    std::os::unix::fs::symlink(&path, &link).unwrap();
    for create in [Create::New, Create::Replace] {
        LocalFile::open(&link, &options(Driver::Inline, false, create)).err().unwrap();
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    assert_eq!(fresh(&path, Driver::Inline, false).len().unwrap(), 0, "replacing empties a regular file");
    let missing = LocalFile::open(scratch.path().join("b"), &OpenOptions::default()).err().unwrap();
    assert_eq!(missing.code(), Code::NotFound);
}

#[test]
fn a_read_only_file_cannot_be_changed() {
    let scratch = scratch();
    let path = scratch.path().join("a");
    std::fs::write(&path, [1; 4096]).unwrap();
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    for driver in DRIVERS {
        let file = LocalFile::open(&path, &OpenOptions { driver, ..OpenOptions::default() }).unwrap();
        assert!(file.limits().read_only && !file.limits().resizable);
        let denied = [
            file.write_at(Buf::zeroed(1), 0, WriteFlags::default()).wait().1.unwrap_err(),
            file.zero(0..1, ZeroMode::MayUnmap).wait().unwrap_err(),
            file.discard(0..1).wait().unwrap_err(),
            file.set_len(0, Preallocate::Off).wait().unwrap_err(),
        ];
        assert!(denied.iter().all(|e| e.code() == Code::Permission), "{denied:?}");
        file.flush().wait().unwrap();
    }
    assert_eq!(std::fs::read(&path).unwrap(), [1; 4096]);
    assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), before);
}

#[test]
fn a_sparse_gibibyte_tells_its_holes_at_once() {
    let scratch = scratch();
    let file = fresh(&scratch.path().join("sparse"), Driver::Pool, false);
    file.set_len(1 << 30, Preallocate::Off).wait().unwrap();
    write(&file, &[1; 65_536], 512 << 20);
    file.flush().wait().unwrap();
    let start = Instant::now();
    let (data, end) = ((512 << 20)..(512 << 20) + 65_536, 1 << 30);
    let expected =
        [(0..data.start, Status::Hole), (data.clone(), Status::Data), (data.end..end, Status::Hole)];
    assert_eq!(file.status(0..end).wait().unwrap(), expected);
    // Past the end there is a hole, and it joins the one before.
    assert_eq!(file.status(data.end..end * 2).wait().unwrap(), [(data.end..end * 2, Status::Hole)]);
    assert_eq!(file.status(end + 5..end + 7).wait().unwrap(), [(end + 5..end + 7, Status::Hole)]);
    assert!(start.elapsed() < Duration::from_millis(200));
    assert!(file.allocated_bytes().unwrap() <= 1 << 20);
    file.zero(0..end, ZeroMode::MayUnmap).wait().unwrap();
    assert_eq!(file.allocated_bytes(), Some(0), "zeroing gives the space back");
    file.zero(0..1 << 20, ZeroMode::KeepAllocated).wait().unwrap();
    assert!(file.allocated_bytes().unwrap() >= 1 << 20, "or keeps it");
}

#[test]
fn a_file_without_holes_is_data_in_one_answer_and_many_holes_come_in_parts() {
    let scratch = scratch();
    let file = fresh(&scratch.path().join("full"), Driver::Inline, false);
    write(&file, &vec![0; 1 << 20], 0);
    file.flush().wait().unwrap();
    assert_eq!(file.status(100..1 << 20).wait().unwrap(), [(100..1 << 20, Status::Data)]);
    let file = fresh(&scratch.path().join("comb"), Driver::Inline, false);
    for tooth in 0..3000u64 {
        write(&file, &[1; 4096], tooth * 8192 + 4096);
    }
    let end = 3000 * 8192;
    let (mut at, mut pieces, mut answers) = (0, 0, 0);
    while at < end {
        let part = file.status(at..end).wait().unwrap();
        assert!(part.len() <= 1024);
        for (range, status) in part {
            assert_eq!(range, at..at + 4096);
            assert_eq!(status, if (at / 4096).is_multiple_of(2) { Status::Hole } else { Status::Data });
            at = range.end;
            pieces += 1;
        }
        answers += 1;
    }
    assert_eq!((pieces, answers), (6000, 6));
}

#[test]
fn preallocation_reserves_and_a_disk_that_is_too_small_leaves_the_length() {
    let scratch = scratch();
    for preallocate in [Preallocate::Falloc, Preallocate::Full] {
        let file = fresh(&scratch.path().join("a"), Driver::Pool, false);
        file.set_len(8 << 20, preallocate).wait().unwrap();
        file.flush().wait().unwrap();
        assert!(file.allocated_bytes().unwrap() >= 8 << 20);
    }
    let Some(small) = or_say_so(Mounted::tmpfs(1 << 20)) else { return };
    let file = fresh(&small.path.join("a"), Driver::Pool, false);
    write(&file, b"here before", 0);
    for preallocate in [Preallocate::Falloc, Preallocate::Full] {
        let error = file.set_len(64 << 20, preallocate).wait().unwrap_err();
        assert_eq!(error.code(), Code::NoSpace, "{error:?}");
        assert!(error.hint_text().is_some());
        assert_eq!(file.len().unwrap(), 11);
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_read_gives_errors_and_the_bytes_that_are_there() {
    let scratch = scratch();
    for (driver, direct) in DRIVERS.into_iter().flat_map(|driver| [(driver, false), (driver, true)]) {
        let path = scratch.path().join("shrinks");
        let file = fresh(&path, driver, direct);
        write(&file, &vec![7; 4 << 20], 0);
        let other = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        let stop = Instant::now() + Duration::from_millis(150);
        let (mut failed, mut read) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while Instant::now() < stop {
                    other.set_len(1 << 20).unwrap();
                    other.set_len(4 << 20).unwrap();
                    other.set_len(12_345).unwrap();
                }
            });
            while Instant::now() < stop {
                let (buf, result) = file.read_at(Buf::zeroed(2 << 20), 4096).wait();
                assert_eq!(buf.len(), 2 << 20);
                match result {
                    Ok(()) => {
                        assert!(buf.iter().all(|b| *b == 7 || *b == 0));
                        read += 1;
                    }
                    Err(error) => {
                        assert_eq!(error.code(), Code::OutOfFile, "{error:?}");
                        failed += 1;
                    }
                }
                let status = file.status(0..4 << 20).wait().unwrap();
                assert_eq!(status.first().unwrap().0.start, 0);
                assert_eq!(status.last().unwrap().0.end, 4 << 20);
                assert!(status.windows(2).all(|two| two[0].0.end == two[1].0.start));
            }
        });
        // Which of the two happens more often depends on the machine; at the end it is certain.
        assert!(failed + read > 0);
        other.set_len(12_345).unwrap();
        let error = file.read_at(Buf::zeroed(8192), 8192).wait().1.unwrap_err();
        assert_eq!(error.code(), Code::OutOfFile);
    }
}

#[test]
fn dropping_the_file_waits_for_its_writes() {
    let scratch = scratch();
    for (driver, direct) in DRIVERS.into_iter().flat_map(|driver| [(driver, false), (driver, true)]) {
        let path = scratch.path().join("a");
        let file = fresh(&path, driver, direct);
        let bytes: Vec<u8> = (0..4u32 << 20).map(|i| (i / 4096) as u8).collect();
        // Too large to be written into the page cache on this thread.
        for part in 0..64usize {
            let part = part * 65_536..(part + 1) * 65_536;
            drop(file.write_at(Buf::copy_of(&bytes[part.clone()]), part.start as u64, WriteFlags::default()));
        }
        drop(file);
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "{driver:?} direct {direct}");
    }
}

#[test]
fn a_callback_may_drop_the_last_handle_and_ask_for_more() {
    let scratch = scratch();
    for driver in DRIVERS {
        // One thread only: whoever waits for it on itself hangs.
        let context = Some(IoContext::new(ContextOptions { threads: 1, ..ContextOptions::default() }));
        let options = OpenOptions { context, ..options(driver, true, Create::Replace) };
        let file = Arc::new(LocalFile::open(scratch.path().join("a"), &options).unwrap());
        let (send, receive) = std::sync::mpsc::channel();
        let again = file.clone();
        file.write_at(Buf::zeroed(65_536), 0, WriteFlags::default()).on_complete(move |(buf, result)| {
            result.unwrap();
            let more = again.write_at(buf, 65_536, WriteFlags::default());
            let flush = again.flush();
            drop(again);
            more.on_complete(move |(_, result)| {
                flush.on_complete(move |flushed| {
                    send.send((result.is_ok(), flushed.is_ok())).unwrap();
                })
            });
        });
        drop(file);
        assert_eq!(receive.recv_timeout(Duration::from_secs(10)), Ok((true, true)), "{driver:?}");
    }
}

#[test]
fn requests_of_threads_that_have_ended_are_carried_out() {
    let scratch = scratch();
    for direct in [false, true] {
        let path = scratch.path().join("a");
        let file = Arc::new(fresh(&path, Driver::Uring, direct));
        let asked: Vec<_> = (0..64u8)
            .map(|number| {
                let file = file.clone();
                // The kernel may cancel what a thread has under way when the thread ends.
                let asked = std::thread::spawn(move || {
                    let mut buf = Buf::zeroed(65_536);
                    buf.fill(number);
                    file.write_at(buf, u64::from(number) * 65_536, WriteFlags::default())
                });
                asked.join().unwrap()
            })
            .collect();
        asked.into_iter().for_each(|completion| completion.wait().1.unwrap());
        let read: Vec<_> = (0..64u64)
            .map(|number| {
                let file = file.clone();
                std::thread::spawn(move || file.read_at(Buf::zeroed(65_536), number * 65_536)).join().unwrap()
            })
            .collect();
        for (number, completion) in read.into_iter().enumerate() {
            let (buf, result) = completion.wait();
            result.unwrap();
            assert!(buf.iter().all(|b| usize::from(*b) == number));
        }
    }
}

#[test]
fn parts_of_a_block_written_at_the_same_time_all_arrive() {
    let scratch = scratch();
    for driver in DRIVERS {
        let file = fresh(&scratch.path().join("a"), driver, true);
        file.set_len(64 << 10, Preallocate::Off).wait().unwrap();
        // Neighbours of 100 bytes, next to whole blocks, in the same pages: a lost update shows as a wrong byte.
        for round in 1..=20u8 {
            std::thread::scope(|scope| {
                for thread in 0..8u64 {
                    let file = &file;
                    scope.spawn(move || {
                        for step in 0..5u64 {
                            let at = 4096 * step + 100 * thread;
                            write(file, &[round ^ thread as u8; 100], at);
                        }
                        write(file, &[round; 512], 4096 * (thread % 5) + 1024 + 512 * (thread / 5));
                    });
                }
            });
            let (buf, result) = file.read_at(Buf::zeroed(20_480), 0).wait();
            result.unwrap();
            for step in 0..5usize {
                for thread in 0..8usize {
                    let at = 4096 * step + 100 * thread;
                    assert_eq!(buf[at..at + 100], [round ^ thread as u8; 100], "{driver:?}");
                }
                assert_eq!(buf[4096 * step + 1024..4096 * step + 1536], [round; 512], "{driver:?}");
            }
        }
        assert_eq!(file.len().unwrap(), 64 << 10);
    }
}

#[test]
fn a_flush_that_failed_stays_failed() {
    // A device over a file on a full disk: what it is given is lost when it is written back.
    let Some(small) = or_say_so(Mounted::tmpfs(1 << 20)) else { return };
    let backing = small.path.join("backing.img");
    for driver in DRIVERS {
        std::fs::File::create(&backing).unwrap().set_len(64 << 20).unwrap();
        let Some(device) = or_say_so(LoopDevice::over(&backing)) else { return };
        let file = LocalFile::open(&device.path, &options(driver, false, Create::No)).unwrap();
        write(&file, &vec![1; 16 << 20], 0);
        let error = file.flush().wait().unwrap_err();
        assert!(matches!(error.code(), Code::Io | Code::NoSpace), "{error:?}");
        // The kernel would say yes now, for it has forgotten.
        let again = file.flush().wait().unwrap_err();
        assert!(again.message().contains("earlier flush failed"), "{again:?}");
        file.write_at(Buf::zeroed(512), 0, WriteFlags::default()).wait().1.unwrap_err();
        file.zero(0..4096, ZeroMode::MayUnmap).wait().unwrap_err();
        // Keeps the kernel's cache of the device alive.
        let other = std::fs::File::open(&device.path).unwrap();
        drop(file);
        let mut last = [9];
        other.read_exact_at(&mut last, (16 << 20) - 1).unwrap();
        assert_eq!(last, [0], "{driver:?}: who reads now gets what the disk holds");
        std::fs::remove_file(&backing).unwrap();
    }
}

#[test]
fn identity_time_and_writeback() {
    let scratch = scratch();
    let (path, link) = (scratch.path().join("a"), scratch.path().join("link"));
    let file = fresh(&path, Driver::Pool, false);
    write(&file, &[1; 1 << 20], 0);
    file.start_writeback(0..1 << 20);
    file.start_writeback(7..7);
    file.start_writeback(0..u64::MAX);
    std::fs::hard_link(&path, &link).unwrap();
    let unlocked = OpenOptions { lock: LockMode::None, ..OpenOptions::default() };
    let same = LocalFile::open(&link, &unlocked).unwrap();
    assert_eq!(file.id(), same.id());
    assert_ne!(file.id(), fresh(&scratch.path().join("b"), Driver::Pool, false).id());
    let before = file.modified_ns().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    assert!(now.abs_diff(before) < 60_000_000_000, "{before} is not within a minute of {now}");
}
