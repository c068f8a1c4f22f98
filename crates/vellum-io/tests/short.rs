//! Calls that are interrupted or do less than they were asked for: nobody notices.
//!
//! The kernel does so to regular files only when a disk is full or a file system is of a network. Here a thread asks the
//! kernel to hand its calls to another one (seccomp's user notification), which answers EINTR, or carries out a part.

#![cfg(target_arch = "x86_64")]

mod common;

use common::{options, scratch};
use rustix::fd::{AsRawFd, FromRawFd, OwnedFd};
use vellum_core::{Buf, Preallocate, Storage, WriteFlags, ZeroMode};
use vellum_io::{Create, Driver, LocalFile};

const CALLS: [i64; 9] = [
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_pwritev2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_lseek,
    libc::SYS_fcntl,
];

/// From now on the calls of this thread go to whoever reads the descriptor.
fn hand_over_calls() -> OwnedFd {
    let step = |code: u32, k: u32, (jt, jf): (u8, u8)| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = vec![step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, (0, 0))];
    for (index, call) in CALLS.iter().enumerate() {
        let to_notify = (CALLS.len() - index) as u8;
        program.push(step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, *call as u32, (to_notify, 0)));
    }
    program.push(step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, (0, 0)));
    program.push(step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF, (0, 0)));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: no pointer is passed.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: `filter` points to `program`, which lives as long as the call; the kernel copies both.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const filter,
        )
    };
    assert!(listener >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(listener as i32) }
}

/// What is made of a call: every second one is interrupted; of transfers at most 1 to 97 bytes are carried out, if
/// `shorten`.
fn carry_out(call: &libc::seccomp_notif, count: u64, shorten: bool) -> Result<i64, i32> {
    if count.is_multiple_of(2) {
        return Err(libc::EINTR);
    }
    let [a, b, c, d, e, f] = call.data.args;
    let few = |count_max: u64| if shorten { count_max.min(1 + count % 97) } else { count_max };
    let number = i64::from(call.data.nr);
    let mut short = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
    let (b, c) = match number {
        libc::SYS_pread64 | libc::SYS_pwrite64 => (b, few(c)),
        libc::SYS_pwritev2 => {
            // SAFETY: the thread that waits for the answer passed a pointer to `c` (at least one) such structures.
            let first = unsafe { *(b as *const libc::iovec) };
            short = libc::iovec { iov_len: few(first.iov_len as u64) as usize, ..first };
            (&raw const short as u64, 1)
        }
        _ => (b, c),
    };
    // SAFETY: the very call that the waiting thread made, with memory that it keeps until it is answered; of the memory
    // no more is touched than it offered.
    let value = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    let _ = short;
    if value < 0 {
        Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
    } else {
        Ok(value)
    }
}

/// Answers calls until the thread that makes them has ended; how many there were.
fn answer(listener: OwnedFd, shorten: bool) -> u64 {
    let mut count = 0;
    loop {
        let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure, exclusively borrowed for the call.
        unsafe { libc::poll(&raw mut poll, 1, -1) };
        if poll.revents & libc::POLLIN == 0 {
            return count;
        }
        // SAFETY: the structure consists of numbers, and the kernel wants it zeroed.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the structure that this request fills; it lives longer than the call.
        let got = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) };
        if got != 0 {
            continue;
        }
        let (value, error) = match carry_out(&call, count, shorten) {
            Ok(value) => (value, 0),
            Err(error) => (0, -error),
        };
        let reply = libc::seccomp_notif_resp { id: call.id, val: value, error, flags: 0 };
        // SAFETY: the structure that this request reads.
        unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw const reply) };
        count += 1;
    }
}

#[test]
fn short_transfers_and_interruptions_change_nothing() {
    let scratch = scratch();
    for direct in [false, true] {
        let path = scratch.path().join("a");
        let (send, receive) = std::sync::mpsc::channel();
        let worker = std::thread::spawn(move || {
            send.send(hand_over_calls()).unwrap();
            let file = LocalFile::open(&path, &options(Driver::Inline, direct, Create::Replace)).unwrap();
            let mut model: Vec<u8> = (0..20_000u32).map(|i| (i * 7 / 3) as u8).collect();
            let write = |at: usize, bytes: &[u8], fua| {
                let flags = WriteFlags { fua };
                file.write_at(Buf::copy_of(bytes), at as u64, flags).wait().1.unwrap();
            };
            write(0, &model, false);
            write(5000, &[9; 3000], true);
            model[5000..8000].fill(9);
            file.zero(100..9000, ZeroMode::KeepAllocated).wait().unwrap();
            model[100..9000].fill(0);
            file.flush().wait().unwrap();
            file.set_len(25_000, Preallocate::Off).wait().unwrap();
            model.resize(25_000, 0);
            file.zero(10_000..12_000, ZeroMode::MayUnmap).wait().unwrap();
            model[10_000..12_000].fill(0);
            file.flush().wait().unwrap();
            let (buf, result) = file.read_at(Buf::zeroed(25_000), 0).wait();
            result.unwrap();
            assert!(buf[..] == model, "direct {direct}");
            let status = file.status(0..25_000).wait().unwrap();
            assert_eq!(status.last().unwrap().0.end, 25_000);
            // The locks were taken in spite of all; a second handle meets them.
            let again = LocalFile::open(&path, &options(Driver::Inline, false, Create::No));
            assert_eq!(again.err().unwrap().code(), vellum_core::Code::Locked);
        });
        // A part of a direct request would have to be aligned, too.
        let count = answer(receive.recv().unwrap(), !direct);
        worker.join().unwrap();
        assert!(count > 500 || direct, "{count} calls only");
        println!("direct {direct}: {count} calls");
    }
}
