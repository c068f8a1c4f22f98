//! Files and block devices keep the contract of `Storage`, with every driver, with and without the page cache.

mod common;

use common::{DRIVERS, LoopDevice, fresh, options, or_say_so, scratch};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use vellum_conformance::storage::{check, check_at};
use vellum_core::Storage;
use vellum_io::{ContextOptions, Create, Driver, IoContext, LocalFile, OpenOptions};

/// Makes files with names of their own in `directory`.
fn files(directory: &std::path::Path, driver: Driver, direct: bool) -> impl Fn() -> Arc<dyn Storage> {
    let (directory, count) = (directory.to_owned(), AtomicU32::new(0));
    move || {
        let path = directory.join(format!("{}.img", count.fetch_add(1, Ordering::Relaxed)));
        let file = fresh(&path, driver, direct);
        assert_eq!(file.driver(), driver, "io_uring must work where these tests run");
        assert_eq!(file.is_direct(), direct, "/var/tmp must be on a file system with direct I/O");
        Arc::new(file)
    }
}

#[test]
fn buffered_inline() {
    check(files(scratch().path(), Driver::Inline, false));
}

#[test]
fn buffered_pool() {
    check(files(scratch().path(), Driver::Pool, false));
}

#[test]
fn buffered_uring() {
    check(files(scratch().path(), Driver::Uring, false));
}

#[test]
fn direct_inline() {
    check(files(scratch().path(), Driver::Inline, true));
}

#[test]
fn direct_pool() {
    check(files(scratch().path(), Driver::Pool, true));
}

#[test]
fn direct_uring() {
    check(files(scratch().path(), Driver::Uring, true));
}

#[test]
fn direct_files_take_requests_that_are_not_aligned() {
    for driver in DRIVERS {
        check_at(files(scratch().path(), driver, true), 1);
    }
}

#[test]
fn a_context_that_is_full_all_the_time_changes_nothing() {
    let scratch = scratch();
    for driver in [Driver::Pool, Driver::Uring] {
        let context = IoContext::new(ContextOptions {
            threads: 1,
            waiting_max: 1,
            ring_entries: 2,
            ..ContextOptions::default()
        });
        let count = AtomicU32::new(0);
        check(|| {
            let path = scratch.path().join(format!("{driver:?}{}", count.fetch_add(1, Ordering::Relaxed)));
            let context = Some(context.clone());
            let options = OpenOptions { context, ..options(driver, true, Create::New) };
            Arc::new(LocalFile::open(path, &options).unwrap())
        });
    }
}

#[test]
fn block_devices() {
    let scratch = scratch();
    let backing = scratch.path().join("backing.img");
    std::fs::File::create(&backing).unwrap().set_len(1 << 20).unwrap();
    let Some(device) = or_say_so(LoopDevice::over(&backing)) else { return };
    // Not every pair: a loop device takes its time to zero.
    for (driver, direct) in [(Driver::Pool, false), (Driver::Inline, true), (Driver::Uring, true)] {
        let open = || {
            let file = LocalFile::open(&device.path, &options(driver, direct, Create::No)).unwrap();
            assert!(file.is_device() && file.is_direct() == direct);
            assert_eq!(file.len().unwrap(), 1 << 20);
            assert!(!file.limits().resizable);
            Arc::new(file) as Arc<dyn Storage>
        };
        check_at(open, 1);
    }
    // Two nodes of a device are one device; the file below it is another storage.
    let device = LocalFile::open(&device.path, &OpenOptions::default()).unwrap();
    let below = LocalFile::open(&backing, &OpenOptions::default()).unwrap();
    assert_ne!(device.id(), below.id());
}
