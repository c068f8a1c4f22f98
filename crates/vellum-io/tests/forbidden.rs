//! Where io_uring is forbidden, as in most containers, files asked for with it work by the pool.

mod common;

use common::{options, scratch};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use vellum_conformance::storage::check;
use vellum_core::Events;
use vellum_io::{ContextOptions, Create, Driver, IoContext, LocalFile, OpenOptions};

/// From now on `io_uring_setup` fails with EPERM on this thread and those that it starts.
fn forbid_io_uring() {
    let step = |code: u32, k: u32, (jt, jf): (u8, u8)| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, (0, 0)), // the number of the system call
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_io_uring_setup as u32, (0, 1)),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32, (0, 0)),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, (0, 0)),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: no pointer is passed.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: `filter` points to `program`, which lives as long as the call; the kernel copies both.
    let installed =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    assert_eq!(installed, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn without_io_uring_the_pool_takes_over_and_says_so_once() {
    let test = std::thread::spawn(|| {
        forbid_io_uring();
        let (scratch, count, warnings) = (scratch(), AtomicU32::new(0), Arc::new(AtomicU32::new(0)));
        let seen = warnings.clone();
        let events = Events::new(move |message| {
            assert!(message.contains("io_uring is not available"), "{message}");
            seen.fetch_add(1, Ordering::Relaxed);
        });
        let context = IoContext::new(ContextOptions { events, ..ContextOptions::default() });
        assert!(!context.has_ring());
        check(|| {
            let path = scratch.path().join(count.fetch_add(1, Ordering::Relaxed).to_string());
            let context = Some(context.clone());
            let options = OpenOptions { context, ..options(Driver::Uring, false, Create::New) };
            let file = LocalFile::open(path, &options).unwrap();
            assert_eq!(file.driver(), Driver::Pool);
            Arc::new(file)
        });
        assert_eq!(warnings.load(Ordering::Relaxed), 1);
    });
    test.join().unwrap();
}
