//! Requests of several buffers are one request: they never interleave, cost one group commit, and read what was written.

use std::path::Path;
use std::sync::Arc;
use vellum::{Buf, ChainOptions, Disk, FilePolicy, Resolver, Vellum, WriteAccess, WriteFlags};
use vellum_conformance::counting::CountingFiles;
use vellum_sim::{MemoryFiles, Random};
use vellum_tests::tools::text;
use vellum_tests::variants::variant;
use vellum_tests::writing::{DISK_BYTES, qemu_check, read, writable};

/// Small ones are gathered into one buffer, large ones written from where they are.
const SHAPES: [&[usize]; 2] = [&[512; 32], &[65536, 4096, 512, 0, 131_072, 33_280, 65536]];

fn create(vellum: &Vellum, name: &str, image: &str) {
    let variant = variant(name);
    let request = variant.empty_disk(image);
    vellum.create(&request).unwrap();
}

fn open(vellum: &Vellum, name: &str, image: &str, write: WriteAccess) -> Disk {
    let options =
        ChainOptions { format: Some(variant(name).format.into()), write, ..ChainOptions::default() };
    vellum.open(image, &options).unwrap().0
}

fn filled(shape: &[usize], byte: u8) -> Vec<Buf> {
    shape.iter().map(|len| Buf::copy_of(&vec![byte; *len])).collect()
}

#[test]
fn overlapping_vectored_writes_never_interleave_and_no_read_sees_half_of_one() {
    for name in writable() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.img");
        let vellum = Vellum::local(FilePolicy::default());
        create(&vellum, name, text(&image));
        let disk = open(&vellum, name, text(&image), WriteAccess::Yes);
        for shape in SHAPES {
            race(&disk, name, shape);
        }
        disk.close().wait().unwrap();
        drop(disk);
        qemu_check(variant(name).qemu, &image, false, name);
    }
}

/// Two write the same place again and again, each with a byte of its own; a third reads it.
fn race(disk: &Disk, name: &str, shape: &[usize]) {
    let len: usize = shape.iter().sum();
    for round in 0..60u64 {
        // Every round begins where nothing was written at first, and ends inside of a unit.
        let offset = 512 * (round * 37 % ((DISK_BYTES - len as u64) / 512));
        let before = disk.read_vectored(filled(shape, 0), offset).wait();
        before.1.unwrap();
        let start = std::sync::Barrier::new(3);
        std::thread::scope(|scope| {
            for byte in [0x5a, 0xa5] {
                let start = &start;
                scope.spawn(move || {
                    let bufs = filled(shape, byte);
                    start.wait();
                    let (bufs, result) = disk.write_vectored(bufs, offset, WriteFlags::default()).wait();
                    result.unwrap();
                    assert!(
                        bufs.iter().map(|buf| buf.len()).eq(shape.iter().copied()),
                        "other buffers came back"
                    );
                });
            }
            start.wait();
            let (bufs, result) = disk.read_vectored(filled(shape, 0xff), offset).wait();
            result.unwrap();
            let seen: Vec<u8> = bufs.iter().flat_map(|buf| buf.to_vec()).collect();
            let old: Vec<u8> = before.0.iter().flat_map(|buf| buf.to_vec()).collect();
            let is_whole = seen == old || seen.iter().all(|byte| *byte == seen[0] && *byte != 0xff);
            assert!(is_whole, "{name}, round {round}, {} buffers: a read saw a part of a write", shape.len());
        });
        let (all, result) = vellum::block_on(disk.read(Buf::zeroed(len), offset));
        result.unwrap();
        assert!(
            matches!(all[0], 0x5a | 0xa5) && all.iter().all(|byte| *byte == all[0]),
            "{name}, round {round}, {} buffers: what two writes left is a mixture of them",
            shape.len()
        );
    }
}

#[test]
fn a_vectored_write_with_fua_costs_one_group_commit() {
    for name in writable() {
        let files = MemoryFiles::new();
        let counting = Arc::new(CountingFiles::new(files));
        let vellum = Vellum::new(counting.clone() as Arc<dyn Resolver>);
        create(&vellum, name, "/disk");
        let disk = open(&vellum, name, "/disk", WriteAccess::Yes);
        let fua = WriteFlags { fua: true };
        // The first write of a session sets marks.
        disk.write(Buf::copy_of(&[1; 512]), 0, fua).wait().1.unwrap();
        for (index, shape) in SHAPES.into_iter().enumerate() {
            let offset = (2 + index as u64) << 20;
            let one = {
                let len = shape.iter().sum();
                counting.reset();
                disk.write(Buf::copy_of(&vec![7; len]), offset - (1 << 20), fua).wait().1.unwrap();
                counting.flushes()
            };
            counting.reset();
            disk.write_vectored(filled(shape, 9), offset, fua).wait().1.unwrap();
            let several = counting.flushes();
            assert!(
                several >= 1 && several <= one.max(2),
                "{name}: {several} flushes, one buffer costs {one}"
            );
            counting.reset();
            disk.write_vectored(filled(shape, 9), offset, WriteFlags::default()).wait().1.unwrap();
            assert_eq!(counting.flushes(), 0, "{name}: a write without FUA flushes");
        }
        disk.close().wait().unwrap();
    }
}

#[test]
fn vectored_requests_read_and_write_what_the_model_has() {
    for name in writable() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.img");
        live_through(name, &image);
        qemu_check(variant(name).qemu, &image, false, name);
    }
}

fn live_through(name: &str, image: &Path) {
    let vellum = Vellum::local(FilePolicy::default());
    create(&vellum, name, text(image));
    let disk = open(&vellum, name, text(image), WriteAccess::Yes);
    let mut model = vec![0u8; disk.size() as usize];
    let mut random = Random::new(0x7ec + name.len() as u64);
    for step in 0..150u64 {
        let longest = *random.pick(&[1usize, 600, 40_000, 200_000]) as u64;
        let lens: Vec<usize> = (0..random.below(9)).map(|_| random.below(longest + 1) as usize).collect();
        let total: usize = lens.iter().sum();
        let start = random.below((model.len() - total) as u64 + 1) as usize;
        let place = start..start + total;
        if random.below(3) == 0 {
            let (bufs, result) = disk.read_vectored(filled(&lens, 0xee), start as u64).wait();
            result.unwrap();
            let found: Vec<u8> = bufs.iter().flat_map(|buf| buf.to_vec()).collect();
            assert!(found == model[place], "{name}, step {step}: read something else");
            continue;
        }
        let mut bufs = filled(&lens, 0);
        for buf in &mut bufs {
            // Zeros among them: formats treat them in their own way.
            let byte = random.below(4) as u8;
            buf.fill(byte);
        }
        let mut at = start;
        for buf in &bufs {
            model[at..at + buf.len()].copy_from_slice(buf);
            at += buf.len();
        }
        let flags = WriteFlags { fua: random.below(8) == 0 };
        let (back, result) = disk.write_vectored(bufs, start as u64, flags).wait();
        result.unwrap();
        assert!(back.iter().map(|buf| buf.len()).eq(lens.iter().copied()));
    }
    assert!(read(&disk).unwrap() == model, "{name}: the disk is not what was written");
    disk.close().wait().unwrap();
    drop(disk);
    let again = open(&vellum, name, text(image), WriteAccess::No);
    assert!(read(&again).unwrap() == model, "{name}: after reopening");
    // Read-only disks have no locks, and large reads there take the other way, too.
    let shape = [300_000, 5, 100_000];
    let (bufs, result) = again.read_vectored(filled(&shape, 0xee), 7).wait();
    result.unwrap();
    assert!(bufs.iter().flat_map(|buf| buf.to_vec()).eq(model[7..400_012].iter().copied()));
}

#[test]
fn a_vectored_request_past_the_end_changes_nothing_and_gives_all_buffers_back() {
    let vellum = Vellum::new(MemoryFiles::new() as Arc<dyn Resolver>);
    create(&vellum, "vdi-dynamic", "/disk");
    let disk = open(&vellum, "vdi-dynamic", "/disk", WriteAccess::Yes);
    for offset in [disk.size() - 1000, u64::MAX - 5] {
        let (bufs, result) = disk.write_vectored(filled(&[512; 2], 3), offset, WriteFlags::default()).wait();
        assert_eq!((bufs.len(), result.unwrap_err().code()), (2, vellum::Code::OutOfFile));
        let (bufs, result) = disk.read_vectored(filled(&[512; 2], 3), offset).wait();
        assert_eq!((bufs.len(), result.unwrap_err().code()), (2, vellum::Code::OutOfFile));
    }
    assert!(read(&disk).unwrap().iter().all(|byte| *byte == 0));
    disk.close().wait().unwrap();
}
