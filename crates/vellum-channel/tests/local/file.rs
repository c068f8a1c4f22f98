//! `File`.

use crate::common::{
    assert_io_kind, assert_kind, noise, poll_once_and_drop, read_to_end, receive, send, within, write,
};
use std::io::{IoSlice, IoSliceMut, Read, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use tokio::io::AsyncWriteExt;
use vellum_channel::{Channel, ChannelExt, ErrorKind, Features, File, FileOptions, Interest, open_fd};

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

/// Directories on the disk and in memory, whose kernel code differs.
fn directories() -> Vec<tempfile::TempDir> {
    let mut all = vec![directory()];
    match tempfile::tempdir_in("/dev/shm") {
        Ok(in_memory) => all.push(in_memory),
        Err(error) => println!("note: no files in memory on this machine ({error})"),
    }
    all.extend(tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")));
    all
}

#[tokio::test]
async fn written_by_one_channel_and_read_by_another() {
    for directory in directories() {
        for is_blocking in [true, false] {
            let path = directory.path().join("file");
            let mut file = File::create(&path, 0o600).await.expect("made");
            within(send(&mut file, is_blocking)).await.expect("written");
            assert_kind(file.read_all(&mut [0]).await, ErrorKind::Unsupported);
            file.close().await.expect("closed");
            let mode = std::fs::metadata(&path).expect("there").permissions().mode() & 0o777;
            assert_eq!(mode & !0o600, 0, "no more than asked for");
            let mut file = File::open(&path, &FileOptions::read_only()).await.expect("opened");
            within(receive(&mut file, is_blocking)).await.expect("read");
            assert!(!file.read_all_eof(&mut [0]).await.expect("the end"));
            assert_kind(write(&mut file, b"x").await, ErrorKind::Unsupported);
        }
    }
}

#[tokio::test]
async fn permissions_are_those_asked_for_less_the_mask() {
    let directory = directory();
    let path = directory.path().join("file");
    File::create(&path, 0o666).await.expect("made").close().await.expect("closed");
    // The mask of this process, without changing it under the other tests.
    let status = std::fs::read_to_string("/proc/self/status").expect("a status");
    let mask = status.lines().find_map(|line| line.strip_prefix("Umask:")).expect("a mask");
    let mask = u32::from_str_radix(mask.trim(), 8).expect("octal");
    let mode = std::fs::metadata(&path).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode, 0o666 & !mask);
}

#[tokio::test]
async fn read_and_written_by_one_channel() {
    for directory in directories() {
        for is_blocking in [true, false] {
            let options = FileOptions { create: true, truncate: true, ..FileOptions::read_write() };
            let mut file = File::open(directory.path().join("file"), &options).await.expect("made");
            assert!(file.features().contains(Features::SEEK));
            within(send(&mut file, is_blocking)).await.expect("written");
            assert_eq!(file.seek_to(SeekFrom::Start(0)).await.expect("sought"), 0);
            within(receive(&mut file, is_blocking)).await.expect("read");
            file.sync().await.expect("durable");
            file.close().await.expect("closed");
        }
    }
}

#[tokio::test]
async fn positioned_transfers_leave_the_position() {
    for directory in directories() {
        let options = FileOptions { create: true, ..FileOptions::read_write() };
        let mut file = File::open(directory.path().join("file"), &options).await.expect("made");
        write(&mut file, b"0123456789").await.expect("written");
        assert_eq!(file.seek_to(SeekFrom::Start(3)).await.expect("sought"), 3);
        assert_eq!(file.pwritev(&[IoSlice::new(b"ab"), IoSlice::new(b"c")], 8).await.expect("written"), 3);
        let (mut one, mut two) = ([0; 2], [0; 9]);
        let bufs = &mut [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
        assert_eq!(file.preadv(bufs, 6).await.expect("read"), 5);
        assert_eq!((&one[..], &two[..3]), (&b"67"[..], &b"abc"[..]));
        assert_eq!(file.preadv(&mut [IoSliceMut::new(&mut one)], 1 << 40).await.expect("beyond"), 0);
        assert_kind(file.preadv(&mut [IoSliceMut::new(&mut one)], u64::MAX).await, ErrorKind::Invalid);
        assert_kind(file.pwritev(&[IoSlice::new(b"x")], u64::MAX).await, ErrorKind::Invalid);
        assert_eq!(read_to_end(&mut file).await.expect("read"), b"34567abc");
        assert_eq!(file.seek_to(SeekFrom::End(-2)).await.expect("sought"), 9);
        assert_eq!(file.seek_to(SeekFrom::Current(-3)).await.expect("sought"), 6);
        assert_kind(file.seek_to(SeekFrom::Current(-7)).await, ErrorKind::Invalid);
        assert_kind(file.seek_to(SeekFrom::End(-20)).await, ErrorKind::Invalid);
        assert_eq!(read_to_end(&mut file).await.expect("read"), b"67abc");
    }
}

#[tokio::test]
async fn appends_go_to_the_end() {
    let directory = directory();
    let path = directory.path().join("log");
    std::fs::write(&path, "first ").expect("written");
    let options = FileOptions { append: true, ..FileOptions::default() };
    let mut file = File::open(&path, &options).await.expect("opened");
    let mut other = std::fs::OpenOptions::new().append(true).open(&path).expect("opened");
    write(&mut file, b"second ").await.expect("written");
    file.flush().await.expect("with the kernel");
    other.write_all(b"third ").expect("written");
    write(&mut file, b"fourth").await.expect("written");
    file.close().await.expect("closed");
    assert_eq!(std::fs::read_to_string(&path).expect("read"), "first second third fourth");
}

#[tokio::test]
async fn pipes_in_both_modes() {
    for is_blocking in [true, false] {
        let (out, into) = std::io::pipe().expect("a pipe");
        let mut reader = File::from_fd(out.into()).expect("a channel");
        let mut writer = File::from_fd(into.into()).expect("a channel");
        assert!(!reader.features().contains(Features::SEEK));
        assert_kind(reader.seek_to(SeekFrom::Start(0)).await, ErrorKind::Unsupported);
        let sending = tokio::spawn(async move {
            send(&mut writer, is_blocking).await.expect("sent");
            writer.shutdown().await.expect("ended in order");
            assert_io_kind(write(&mut writer, b"x").await, std::io::ErrorKind::BrokenPipe);
            writer
        });
        within(receive(&mut reader, is_blocking)).await.expect("received");
        assert!(!within(reader.read_all_eof(&mut [0])).await.expect("the end"));
        within(sending).await.expect("no panic");
    }
}

#[tokio::test]
async fn a_pipe_without_reader_is_broken() {
    let (out, into) = std::io::pipe().expect("a pipe");
    let mut writer = File::from_fd(into.into()).expect("a channel");
    drop(out);
    assert_io_kind(within(write(&mut writer, b"x")).await, std::io::ErrorKind::BrokenPipe);
    let ready = within(writer.ready(Interest::WRITE)).await.expect("ready to fail");
    assert_eq!(ready, Interest::WRITE);
}

#[tokio::test]
async fn a_shared_pipe_gets_its_mode_back() {
    let (_out, into) = std::io::pipe().expect("a pipe");
    let is_blocking = || {
        let mode = rustix::fs::fcntl_getfl(&into).expect("its mode");
        !mode.contains(rustix::fs::OFlags::NONBLOCK)
    };
    let mut file = File::from_dup(&into).expect("a channel");
    assert!(!is_blocking());
    file.close().await.expect("closed");
    assert!(is_blocking());
    drop(File::from_dup(&into).expect("a channel"));
    assert!(is_blocking());
}

#[tokio::test]
async fn a_fifo_waits_for_its_other_end() {
    let directory = directory();
    let path = directory.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .expect("a FIFO");
    // Given up while nobody reads: nothing is left behind that would hold up the end of this test.
    let options = FileOptions::write_only();
    assert!(poll_once_and_drop(File::open(&path, &options)).await.is_none());
    let opening = {
        let path = path.clone();
        tokio::spawn(async move { File::open(path, &FileOptions::write_only()).await })
    };
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    assert!(!opening.is_finished());
    let mut reader = within(File::open(&path, &FileOptions::read_only())).await.expect("opened");
    let mut writer = within(opening).await.expect("no panic").expect("opened");
    reader.set_blocking(false);
    let would_block = reader.readv(&mut [IoSliceMut::new(&mut [0])]).await;
    assert_io_kind(would_block, std::io::ErrorKind::WouldBlock);
    write(&mut writer, b"through").await.expect("written");
    drop(writer);
    assert_eq!(within(read_to_end(&mut reader)).await.expect("read"), b"through");

    let mut reader = File::open(&path, &FileOptions::read_only()).await.expect("opened");
    reader.set_blocking(false);
    let not_yet = reader.readv(&mut [IoSliceMut::new(&mut [0])]).await;
    assert_io_kind(not_yet, std::io::ErrorKind::WouldBlock);
}

#[tokio::test]
async fn what_is_no_file_is_refused() {
    let (socket, _other) = std::os::unix::net::UnixStream::pair().expect("sockets");
    assert_kind(File::from_fd(socket.into()), ErrorKind::WrongDescriptor);
    let directory = std::fs::File::open("/").expect("a directory");
    assert_kind(File::from_fd(directory.into()), ErrorKind::WrongDescriptor);
    let missing = File::open("/nonexistent/file", &FileOptions::read_only()).await;
    let error = missing.expect_err("it is not there");
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    assert!(error.to_string().contains("/nonexistent/file"), "{error}");
}

#[tokio::test]
async fn devices_of_every_kind() {
    let mut null = File::open("/dev/null", &FileOptions::read_write()).await.expect("opened");
    write(&mut null, b"away").await.expect("taken");
    assert!(!within(null.read_all_eof(&mut [0])).await.expect("the end"));
    let mut zero = File::open("/dev/zero", &FileOptions::read_only()).await.expect("opened");
    let mut bytes = vec![1; 100_000];
    within(zero.read_all(&mut bytes)).await.expect("read");
    assert!(bytes.iter().all(|byte| *byte == 0));
    match File::open("/dev/full", &FileOptions::write_only()).await {
        Ok(mut full) => {
            let written = write(&mut full, b"x").await;
            let closed = full.close().await;
            let again = full.close().await;
            assert_eq!(closed.is_err(), again.is_err(), "a second close tells the same");
            assert_io_kind(written.and(closed.map(|_| ())), std::io::ErrorKind::StorageFull);
        }
        Err(error) => println!("note: no /dev/full on this machine ({error})"),
    }
}

/// A pseudo-terminal: its channel neither blocks nor changes the mode that other programs see.
#[tokio::test]
async fn a_terminal_is_left_in_its_mode() {
    let Ok(ptmx) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/ptmx") else {
        println!("note: no pseudo-terminals on this machine");
        return;
    };
    let lock = 0_i32;
    // SAFETY: the request reads an `int` that the pointer names, and touches nothing else.
    let unlocked = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&ptmx), libc::TIOCSPTLCK, &lock) };
    let mut number = 0_i32;
    // SAFETY: the request writes an `int` where the pointer names one.
    let named = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&ptmx), libc::TIOCGPTN, &mut number) };
    assert_eq!((unlocked, named), (0, 0));
    let Ok(terminal) = std::fs::OpenOptions::new().read(true).write(true).open(format!("/dev/pts/{number}"))
    else {
        println!("note: no terminals under /dev/pts on this machine");
        return;
    };
    let mut file = File::from_fd(terminal.as_fd().try_clone_to_owned().expect("a copy")).expect("a channel");
    let mut other = File::from_fd(OwnedFd::from(ptmx)).expect("a channel");
    write(&mut other, b"line\n").await.expect("typed");
    let mut line = [0; 5];
    within(file.read_all(&mut line)).await.expect("read");
    assert_eq!(&line, b"line\n");
    let mode = rustix::fs::fcntl_getfl(&terminal).expect("its mode");
    assert!(!mode.contains(rustix::fs::OFlags::NONBLOCK));
    assert!(poll_once_and_drop(file.read_all(&mut line)).await.is_none());
}

#[tokio::test]
async fn a_file_moves_between_executors() {
    let directory = directory();
    let path = directory.path().join("file");
    let data = noise(300_000);
    let mut file =
        File::open(&path, &FileOptions { create: true, ..FileOptions::read_write() }).await.expect("made");
    write(&mut file, &data[..100_000]).await.expect("written");
    file.detach().expect("detached");
    let expected = data.clone();
    let mut file = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            file.attach(runtime.handle()).expect("attached");
            write(&mut file, &data[100_000..]).await.expect("written");
            file
        })
        // The executor ends here, with or without the last piece of work.
    })
    .join()
    .expect("no panic");
    file.attach(&tokio::runtime::Handle::current()).expect("attached");
    within(file.flush()).await.expect("all is with the kernel");
    file.close().await.expect("closed");
    let mut all = Vec::new();
    std::fs::File::open(&path).expect("opened").read_to_end(&mut all).expect("read");
    assert!(all == expected, "bytes were lost or doubled");
}

#[tokio::test]
async fn a_descriptor_chooses_its_channel() {
    let (near, mut far) = std::os::unix::net::UnixStream::pair().expect("sockets");
    let mut socket = open_fd(near.into()).expect("a channel");
    assert_eq!(socket.kind(), "unix");
    write(&mut socket, b"x").await.expect("sent");
    far.read_exact(&mut [0]).expect("received");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let stream =
        std::net::TcpStream::connect(listener.local_addr().expect("its address")).expect("connected");
    assert_eq!(open_fd(stream.into()).expect("a channel").kind(), "tcp");
    let file = open_fd(tempfile::tempfile().expect("a file").into()).expect("a channel");
    assert_eq!((file.kind(), file.features().contains(Features::SEEK)), ("file", true));
    let (out, _into) = std::io::pipe().expect("a pipe");
    assert_eq!(open_fd(out.into()).expect("a channel").kind(), "file");
    let directory = std::fs::File::open("/").expect("a directory");
    assert_kind(open_fd(directory.into()), ErrorKind::WrongDescriptor);
}
