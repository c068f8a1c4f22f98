//! Copies that the kernel makes: between files of one file system, of two, with and without shared blocks.

mod common;

use common::{DRIVERS, Mounted, fresh, or_say_so, scratch};
use std::path::Path;
use vellum_core::{Buf, Code, CopyMode, Memory, Offloaded, Preallocate, Storage, WriteFlags};
use vellum_io::{Driver, LocalFile, LockMode, OpenOptions};

const LEN: u64 = (4 << 20) + 1000;

fn source(path: &Path, driver: Driver) -> (LocalFile, Vec<u8>) {
    let file = fresh(path, driver, false);
    let bytes: Vec<u8> = (0..LEN).map(|i| (i / 1021) as u8).collect();
    file.write_at(Buf::copy_of(&bytes), 0, WriteFlags::default()).wait().1.unwrap();
    (file, bytes)
}

fn copy(to: &LocalFile, from: &LocalFile, at: (u64, u64, u64), mode: CopyMode) -> Offloaded {
    to.copy_from(from, at.0, at.1, at.2, mode).wait().unwrap()
}

#[test]
fn btrfs_shares_whole_blocks_and_the_short_last_one() {
    let Some(btrfs) = or_say_so(Mounted::btrfs()) else { return };
    for driver in DRIVERS {
        let (from, bytes) = source(&btrfs.path.join("from"), driver);
        from.flush().wait().unwrap();
        let to = fresh(&btrfs.path.join("to"), driver, false);
        assert_eq!(copy(&to, &from, (0, 0, LEN), CopyMode::ShareOnly), Offloaded::Done);
        to.flush().wait().unwrap();
        assert_eq!(std::fs::read(btrfs.path.join("to")).unwrap(), bytes, "{driver:?}");
        assert!(shares_blocks(&btrfs.path.join("to")), "the copy takes space of its own");
        // The original may change; the copy does not.
        from.write_at(Buf::zeroed(8192), 0, WriteFlags::default()).wait().1.unwrap();
        let (buf, result) = to.read_at(Buf::zeroed(8192), 0).wait();
        result.unwrap();
        assert_eq!(&*buf, &bytes[..8192]);
    }
}

/// What the file system says: `filefrag` marks shared extents.
fn shares_blocks(path: &Path) -> bool {
    common::run("filefrag", "e2fsprogs", &["-v", path.to_str().unwrap()]).unwrap().contains("shared")
}

#[test]
fn btrfs_does_not_share_parts_of_blocks() {
    let Some(btrfs) = or_say_so(Mounted::btrfs()) else { return };
    let (from, bytes) = source(&btrfs.path.join("from"), Driver::Pool);
    let to = fresh(&btrfs.path.join("to"), Driver::Pool, false);
    for at in [(512, 512, 4096), (0, 512, 4096), (512, 0, 4096), (0, 0, 5000)] {
        assert_eq!(copy(&to, &from, at, CopyMode::ShareOnly), Offloaded::Cannot, "{at:?}");
    }
    // The short last block cannot be shared into the middle of a longer file.
    to.set_len(LEN + 100_000, Preallocate::Off).wait().unwrap();
    assert_eq!(copy(&to, &from, (0, 0, LEN), CopyMode::ShareOnly), Offloaded::Cannot);
    // The kernel can still copy it.
    assert_eq!(copy(&to, &from, (512, 1024, 70_001), CopyMode::InKernel), Offloaded::Done);
    assert_eq!(std::fs::read(btrfs.path.join("to")).unwrap()[1024..71_025], bytes[512..70_513]);
    // And sharing goes on working after all these refusals.
    assert_eq!(copy(&to, &from, (4096, 8192, 1 << 20), CopyMode::ShareOnly), Offloaded::Done);
    let shared = std::fs::read(btrfs.path.join("to")).unwrap();
    assert_eq!(shared[8192..8192 + (1 << 20)], bytes[4096..4096 + (1 << 20)]);
    assert_eq!(to.len().unwrap(), LEN + 100_000);
}

#[test]
fn between_two_file_systems_nothing_is_shared() {
    let Some(btrfs) = or_say_so(Mounted::btrfs()) else { return };
    let scratch = scratch();
    let (from, bytes) = source(&btrfs.path.join("from"), Driver::Pool);
    let to = fresh(&scratch.path().join("to"), Driver::Pool, false);
    for _ in 0..3 {
        assert_eq!(copy(&to, &from, (0, 0, 1 << 20), CopyMode::ShareOnly), Offloaded::Cannot);
    }
    // Whatever the kernel answers between two file systems, it is either done or refused as a whole.
    if copy(&to, &from, (0, 0, LEN), CopyMode::InKernel) == Offloaded::Done {
        assert_eq!(std::fs::read(scratch.path().join("to")).unwrap(), bytes);
    }
}

#[test]
fn without_reflinks_the_kernel_copies() {
    let scratch = scratch();
    for (driver, direct) in DRIVERS.into_iter().flat_map(|driver| [(driver, false), (driver, true)]) {
        let (from, bytes) = source(&scratch.path().join("from"), driver);
        let to = fresh(&scratch.path().join("to"), driver, direct);
        assert_eq!(copy(&to, &from, (1001, 77, 3_000_000), CopyMode::InKernel), Offloaded::Done);
        assert_eq!(to.len().unwrap(), 3_000_077);
        let (buf, result) = to.read_at(Buf::zeroed(3_000_000), 77).wait();
        result.unwrap();
        assert_eq!(*buf, bytes[1001..3_001_001], "{driver:?} direct {direct}");
        assert_eq!(copy(&to, &from, (0, 0, 0), CopyMode::InKernel), Offloaded::Done);
    }
}

#[test]
fn impossible_copies_are_refused_not_half_done() {
    let scratch = scratch();
    let (from, _) = source(&scratch.path().join("from"), Driver::Inline);
    let path = scratch.path().join("to");
    let to = fresh(&path, Driver::Inline, false);
    let code = |from_at, at, len| {
        to.copy_from(&from, from_at, at, len, CopyMode::InKernel).wait().unwrap_err().code()
    };
    assert_eq!(code(LEN - 10, 0, 11), Code::OutOfFile);
    assert_eq!(code(u64::MAX, 0, 1), Code::OutOfFile);
    assert_eq!(code(u64::MAX, 0, u64::MAX), Code::OutOfFile);
    assert_eq!(code(0, u64::MAX, 1), Code::Overflow);
    assert_eq!(to.len().unwrap(), 0);
    let memory = Memory::from_bytes("m", &[1; 4096]);
    let foreign = to.copy_from(&memory, 0, 0, 4096, CopyMode::InKernel).wait().unwrap();
    assert_eq!(foreign, Offloaded::Cannot);
    // A file onto itself, overlapping.
    let outcome = from.copy_from(&from, 0, 100, 1000, CopyMode::InKernel).wait().unwrap();
    assert_eq!(outcome, Offloaded::Cannot);
    let unlocked = OpenOptions { lock: LockMode::None, ..OpenOptions::default() };
    let read_only = LocalFile::open(&path, &unlocked).unwrap();
    let error = read_only.copy_from(&from, 0, 0, 10, CopyMode::InKernel).wait().unwrap_err();
    assert_eq!(error.code(), Code::Permission);
}
