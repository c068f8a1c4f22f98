//! Requests whose answers nobody waits for: a guest that is stopped, a server whose client went away. Changes are carried
//! out all the same, each whole; what was only read is forgotten; locks are given back; the image is sound.

use std::ops::Range;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use vellum::io::{Driver, LocalFiles, OpenOptions};
use vellum::{Buf, ChainOptions, Disk, FilePolicy, Storage, Vellum, WriteAccess, WriteFlags};
use vellum_sim::Random;
use vellum_tests::tools::text;
use vellum_tests::variants::{Variant, variant};
use vellum_tests::writing::{SECTOR, Tag, qemu_check, read, sector_bytes, writable};

/// Each session writes every sector once: answers that were dropped have no order among requests that overlap.
const SESSIONS: Tag = 3;

#[test]
fn a_request_whose_answer_is_dropped_is_carried_out_all_the_same() {
    for name in writable() {
        for driver in [Driver::Inline, Driver::Pool, Driver::Uring] {
            let directory = tempfile::tempdir().unwrap();
            live_through(&variant(name), driver, &directory.path().join("disk.img"));
        }
    }
}

fn live_through(variant: &Variant, driver: Driver, image: &Path) {
    let options = OpenOptions { driver, ..OpenOptions::default() };
    let vellum = Vellum::new(Arc::new(LocalFiles::new(FilePolicy::default(), options)));
    let request = variant.empty_disk(text(image));
    vellum.create(&request).unwrap();
    let open = |write| {
        let options = ChainOptions { format: Some(variant.format.into()), write, ..ChainOptions::default() };
        vellum.open(text(image), &options).unwrap().0
    };
    let mut random = Random::new(variant.name.len() as u64);
    for tag in 1..=SESSIONS {
        let disk = open(WriteAccess::Yes);
        let sectors = disk.size() / SECTOR;
        write_and_forget(&disk, &mut random, sectors, tag);
        // Waits for what is under way.
        disk.close().wait().unwrap();
        drop(disk);
        let found = read(&open(WriteAccess::No)).unwrap();
        for (sector, bytes) in (0..).zip(found.chunks_exact(SECTOR as usize)) {
            let what = format!("{}, {driver:?}, session {tag}, sector {sector:#x}", variant.name);
            assert!(bytes == sector_bytes(tag, sector), "{what}");
        }
    }
    qemu_check(variant.qemu, image, false, variant.name);
}

/// Writes every sector with `tag`, in pieces, in any order, and hardly ever waits.
fn write_and_forget(disk: &Disk, random: &mut Random, sectors: u64, tag: Tag) {
    let mut kept = Vec::new();
    for range in pieces(random, sectors) {
        let data: Vec<u8> = range.clone().flat_map(|sector| sector_bytes(tag, sector)).collect();
        let start = range.start * SECTOR;
        let written = disk.write(Buf::copy_of(&data), start, WriteFlags::default());
        match random.below(4) {
            0 => drop(written),
            1 => poll_once(written),
            2 => written.wait().1.unwrap(),
            _ => kept.push(written),
        }
        match random.below(8) {
            0 => drop(disk.flush_all()),
            1 => poll_once(disk.flush_all()),
            2 => poll_once(disk.read_at(Buf::zeroed(data.len()), start)),
            // Gives up while it waits for a writer, or while it reads.
            3 => poll_once(disk.read(Buf::zeroed(data.len()), start)),
            _ => {}
        }
    }
}

/// `0..sectors` in pieces of all sizes, shuffled.
fn pieces(random: &mut Random, sectors: u64) -> Vec<Range<u64>> {
    let mut pieces = Vec::new();
    let mut start = 0;
    while start < sectors {
        let longest = *random.pick(&[1, 20, 300]);
        let end = (start + 1 + random.below(longest)).min(sectors);
        pieces.push(start..end);
        start = end;
    }
    for index in (1..pieces.len()).rev() {
        pieces.swap(index, random.below(index as u64 + 1) as usize);
    }
    pieces
}

fn poll_once<T>(future: impl Future<Output = T>) {
    let _ = pin!(future).poll(&mut Context::from_waker(Waker::noop()));
}
