//! Writing in place, against a byte array that knows what must be read.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod common;
use common::guest::{Guest, check, create, findings, link_to, open_limited, open_readable, open_writable};
use std::sync::Arc;
use vellum_conformance::format::read_all;
use vellum_core::{Buf, Extent, Limits, OpenFlags, Resolver, Storage, WriteFlags, ZeroMode, block_on};
use vellum_sim::MemoryFiles;

const ALL: OpenFlags = OpenFlags {
    read_only: false,
    honor_zeroes: false,
    honor_same: false,
    inform_zeroes: false,
    discard: true,
    ignore_flush: false,
};

fn memory() -> (Arc<MemoryFiles>, Arc<dyn Resolver>) {
    let files = MemoryFiles::new();
    (files.clone(), files)
}

/// Each of the flags that change what is stored, by the bits of `seed`.
fn flags(seed: u64) -> OpenFlags {
    OpenFlags {
        honor_zeroes: seed & 1 != 0,
        honor_same: seed & 2 != 0,
        inform_zeroes: seed & 4 != 0,
        discard: seed & 8 == 0,
        ..ALL
    }
}

fn run_random(size: u64, options: &[(&str, &str)], unit: u64, steps: u32, seed: u64) {
    let (_, files) = memory();
    create(&files, "d.vdi", size, options, None).unwrap();
    let mut guest = Guest::new(&files, "d.vdi", vec![0; size as usize], flags(seed), seed + 1);
    for step in 0..steps {
        guest.step(unit, unit * 5);
        if step % 97 == 96 {
            guest.reopen();
            guest.verify();
        }
    }
    guest.reopen();
    guest.verify();
}

#[test]
fn a_dynamic_image_holds_what_was_written() {
    for seed in 0..16 {
        run_random((40 << 12) + 512, &[("block_size", "4k")], 4096, 300, seed);
    }
    for (unit, option) in [(16384, "16k"), (65536, "64k"), (1 << 20, "1M")] {
        run_random(unit * 20 - 1536, &[("block_size", option)], unit, 200, unit);
    }
}

#[test]
fn a_fixed_image_holds_what_was_written_and_keeps_its_length() {
    for seed in [0, 7, 9] {
        run_random(40 << 12, &[("block_size", "4k"), ("variant", "fixed")], 4096, 300, seed);
    }
    let (memory, files) = memory();
    create(&files, "d.vdi", 8 << 20, &[("static", "on")], None).unwrap();
    let len = memory.get("d.vdi").unwrap().len().unwrap();
    let mut guest = Guest::new(&files, "d.vdi", vec![0; 8 << 20], ALL, 1);
    (0..100).for_each(|_| guest.step(1 << 20, 3 << 20));
    guest.discard(0, 8 << 20);
    guest.reopen();
    guest.verify();
    assert_eq!(memory.get("d.vdi").unwrap().len().unwrap(), len);
}

#[test]
fn a_child_over_a_parent_of_another_size_holds_what_was_written() {
    for (seed, parent, child) in
        [(0, 150_000, 200_192), (3, 200_192, 150_016), (9, 100_352, 100_352), (2, 512, 1 << 17)]
    {
        let (memory, files) = memory();
        let parent = (parent as u64).next_multiple_of(512);
        create(&files, "vm/base.vdi", parent, &[("block_size", "16k")], None).unwrap();
        let mut base = Guest::new(&files, "vm/base.vdi", vec![0; parent as usize], ALL, seed);
        (0..200).for_each(|_| base.step(16 << 10, 50_000));
        base.reopen();
        let below = read_all(&base.disk);
        base.disk.close().wait().unwrap();
        let before = memory.get("vm/base.vdi").unwrap().to_vec();

        create(&files, "vm/top.vdi", child, &[("block_size", "4k")], Some(link_to(&files, "vm/base.vdi")))
            .unwrap();
        let mut model = below.clone();
        model.resize(child as usize, 0);
        let mut guest = Guest::new(&files, "vm/top.vdi", model, flags(seed), seed + 7);
        assert_eq!(guest.disk.layers().len(), 2);
        for step in 0..400 {
            guest.step(4096, 20_000);
            if step % 97 == 96 {
                guest.reopen();
                guest.verify();
            }
        }
        guest.reopen();
        guest.verify();
        guest.disk.close().wait().unwrap();
        assert!(memory.get("vm/base.vdi").unwrap().to_vec() == before, "the parent is as it was");
        let info = guest.disk.layers()[0].image.info();
        assert_eq!(info.variant, "differencing");
    }
}

#[test]
fn zeros_in_a_child_never_show_the_parent_again() {
    let (_, files) = memory();
    create(&files, "base.vdi", 1 << 20, &[("block_size", "64k")], None).unwrap();
    let mut base = Guest::new(&files, "base.vdi", vec![0; 1 << 20], ALL, 1);
    base.write(0, &[0xbb; 1 << 20]);
    base.disk.close().wait().unwrap();
    create(&files, "top.vdi", 1 << 20, &[("block_size", "64k")], Some(link_to(&files, "base.vdi"))).unwrap();
    let mut guest = Guest::new(&files, "top.vdi", vec![0xbb; 1 << 20], ALL, 2);
    guest.zero(0, 65536, ZeroMode::MayUnmap);
    guest.zero(2 << 16, 65536, ZeroMode::KeepAllocated);
    guest.write(4 << 16, &[0; 65536]);
    guest.write(6 << 16, &[1; 65536]);
    guest.flush();
    guest.zero(6 << 16, 65536, ZeroMode::MayUnmap);
    guest.write(8 << 16, &[1; 65536]);
    guest.discard(8 << 16, 65536);
    guest.reopen();
    guest.verify();
    for block in [0u64, 6, 8] {
        let found = block_on(guest.disk.lookup(block << 16..(block + 1) << 16)).unwrap();
        assert!(matches!((found.layer, found.extent), (0, Extent::Zero)), "block {block}");
    }
    // Nothing is stored for what the parent has anyway.
    let found = block_on(guest.disk.lookup(1 << 16..2 << 16)).unwrap();
    assert_eq!(found.layer, 1);
    guest.write(1 << 16, &[0xbb; 65536]);
    assert_eq!(block_on(guest.disk.lookup(1 << 16..2 << 16)).unwrap().layer, 1);
}

#[test]
fn the_file_shrinks_as_blocks_are_discarded() {
    let (memory, files) = memory();
    create(&files, "d.vdi", 32 << 20, &[], None).unwrap();
    let mut guest = Guest::new(&files, "d.vdi", vec![0; 32 << 20], ALL, 1);
    let data: Vec<u8> = (0..32 << 20).map(|i: u32| (i >> 16) as u8 | 1).collect();
    guest.write(0, &data);
    guest.flush();
    let blocks = |memory: &MemoryFiles| (memory.get("d.vdi").unwrap().len().unwrap() - (2 << 20)) >> 20;
    assert_eq!(blocks(&memory), 32);
    for block in (0..32).step_by(2) {
        guest.discard(block << 20, 1 << 20);
    }
    guest.verify();
    // Released; moved; the moves durable.
    (0..3).for_each(|_| guest.flush());
    assert_eq!(blocks(&memory), 16);
    guest.verify();
    guest.reopen();
    guest.verify();
    assert_eq!(blocks(&memory), 16);
    // Piece by piece, the pieces in any order.
    for piece in [3, 0, 2, 1] {
        guest.discard((1 << 20) + (piece << 18), 1 << 18);
    }
    guest.discard(5 << 20, 100);
    guest.reopen();
    guest.verify();
    assert_eq!(blocks(&memory), 15);
    guest.discard(0, 32 << 20);
    guest.reopen();
    assert_eq!(blocks(&memory), 0);
    assert!(read_all(&guest.disk).iter().all(|byte| *byte == 0));
}

#[test]
fn closing_leaves_no_hole() {
    let (memory, files) = memory();
    create(&files, "d.vdi", 400 << 12, &[("block_size", "4k")], None).unwrap();
    let mut guest = Guest::new(&files, "d.vdi", vec![0; 400 << 12], ALL, 1);
    guest.write(0, &[7; 400 << 12]);
    (0..400).filter(|block| block % 3 != 1).for_each(|block| guest.discard(block << 12, 4096));
    guest.reopen();
    guest.verify();
    assert_eq!(memory.get("d.vdi").unwrap().len().unwrap(), (2 << 20) + (133 << 12));
}

#[test]
fn a_full_disk_is_discarded_and_written_again_without_a_flush() {
    let (memory, files) = memory();
    create(&files, "d.vdi", 16 << 12, &[("block_size", "4k")], None).unwrap();
    let mut guest = Guest::new(&files, "d.vdi", vec![0; 16 << 12], ALL, 1);
    for round in 1..6u8 {
        guest.write(0, &[round; 16 << 12]);
        guest.discard(u64::from(round) << 12, 8 << 12);
        guest.write(u64::from(round) << 12, &[round + 100; 8 << 12]);
        guest.verify();
    }
    guest.reopen();
    guest.verify();
    assert_eq!(memory.get("d.vdi").unwrap().len().unwrap(), (2 << 20) + (16 << 12));
}

#[test]
fn a_map_over_many_pages_is_written_with_a_small_cache() {
    let (_, files) = memory();
    let size = 100_000u64 << 12;
    create(&files, "d.vdi", size, &[("block_size", "4k")], None).unwrap();
    // Seven pages of map, and room for a few.
    let mut limits = Limits::default();
    limits.table_cache_bytes = 1000;
    let disk = open_limited(&files, "d.vdi", ALL, 1, limits).unwrap();
    let mut random = common::guest::Random(3);
    let mut written = std::collections::BTreeMap::new();
    for step in 0..3000u64 {
        let block = random.below(100_000);
        let data = (step as u8) | 1;
        disk.write(Buf::copy_of(&[data; 4096]), block << 12, WriteFlags::default()).wait().1.unwrap();
        written.insert(block, data);
        if step % 3 == 0 {
            let gone = random.below(99_000);
            disk.discard_range(gone << 12..(gone + 1000) << 12).wait().unwrap();
            written.retain(|block, _| !(gone..gone + 1000).contains(block));
        }
        if step % 500 == 0 {
            disk.flush_all().wait().unwrap();
        }
    }
    // A run over pages.
    disk.write(Buf::copy_of(&vec![8; 40 << 20]), 16_000 << 12, WriteFlags::default()).wait().1.unwrap();
    (16_000..16_000 + 10_240).for_each(|block| {
        written.insert(block, 8);
    });
    disk.close().wait().unwrap();
    let report = check(&files, "d.vdi").unwrap();
    assert!(report.is_clean(), "{:?}", findings(&report));
    assert_eq!(report.allocated_bytes, (written.len() as u64) << 12);
    let disk = open_readable(&files, "d.vdi").unwrap();
    for block in 0..100_000u64 {
        let (buf, result) = disk.read_at(Buf::zeroed(4096), block << 12).wait();
        result.unwrap();
        let expected = written.get(&block).copied().unwrap_or(0);
        assert!(buf.iter().all(|byte| *byte == expected), "block {block}");
    }
}

#[test]
fn many_threads_write_at_once() {
    let (_, files) = memory();
    let size = 64u64 << 14;
    create(&files, "d.vdi", size, &[("block_size", "16k")], None).unwrap();
    let disk = open_writable(&files, "d.vdi", ALL, 1).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let disk = disk.clone();
            scope.spawn(move || {
                // Each thread has its own sectors of every block.
                let mut random = common::guest::Random(thread);
                for round in 0..400u64 {
                    let block = random.below(64);
                    let at = (block << 14) + thread * 2048;
                    let data = vec![(round as u8) | 1; 2048];
                    disk.write(Buf::copy_of(&data), at, WriteFlags::default()).wait().1.unwrap();
                    let (buf, result) = disk.read_at(Buf::zeroed(2048), at).wait();
                    result.unwrap();
                    assert_eq!(buf.to_vec(), data);
                    match random.below(20) {
                        0 => disk.flush_all().wait().unwrap(),
                        1 if thread == 0 => {
                            // Blocks that nobody writes to.
                            disk.discard_range(at..at + 2048).wait().unwrap();
                        }
                        _ => {}
                    }
                }
            });
        }
    });
    disk.close().wait().unwrap();
    let report = check(&files, "d.vdi").unwrap();
    assert!(report.is_clean(), "{:?}", findings(&report));
}

#[test]
fn threads_discard_and_write_their_own_blocks_while_others_move() {
    let (memory, files) = memory();
    let size = 256u64 << 12;
    create(&files, "d.vdi", size, &[("block_size", "4k")], None).unwrap();
    let disk = open_writable(&files, "d.vdi", ALL, 1).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let disk = disk.clone();
            scope.spawn(move || {
                let mut random = common::guest::Random(thread + 50);
                let mut held = [0u8; 32];
                for round in 0..500u64 {
                    let index = random.below(32) as usize;
                    let at = (index as u64 * 8 + thread) << 12;
                    match random.below(8) {
                        0..=2 => {
                            held[index] = (round as u8) | 1;
                            let data = vec![held[index]; 4096];
                            disk.write(Buf::copy_of(&data), at, WriteFlags::default()).wait().1.unwrap();
                        }
                        3..=5 => {
                            disk.discard_range(at..at + 4096).wait().unwrap();
                            held[index] = 0;
                        }
                        6 => disk.flush_all().wait().unwrap(),
                        _ => {}
                    }
                    let (buf, result) = disk.read_at(Buf::zeroed(4096), at).wait();
                    result.unwrap();
                    assert!(buf.iter().all(|byte| *byte == held[index]), "thread {thread} round {round}");
                }
                (0..32u64).for_each(|index| {
                    let at = (index * 8 + thread) << 12;
                    let (buf, result) = disk.read_at(Buf::zeroed(4096), at).wait();
                    result.unwrap();
                    assert!(buf.iter().all(|byte| *byte == held[index as usize]));
                });
            });
        }
    });
    let before = read_all(&disk);
    disk.close().wait().unwrap();
    let report = check(&files, "d.vdi").unwrap();
    assert!(report.is_clean(), "{:?}", findings(&report));
    assert!(read_all(&open_readable(&files, "d.vdi").unwrap()) == before);
    let len = memory.get("d.vdi").unwrap().len().unwrap();
    assert_eq!(len, (2 << 20) + report.allocated_bytes);
}

/// The suite of all formats: its own workloads, block sizes from 4 KiB up, alone and over parents.
#[test]
fn the_common_suite_passes() {
    use vellum_conformance::format::Recipe;
    use vellum_conformance::writing::{Bench, random_ops};
    for seed in 0..24u64 {
        let block = 4096u64 << (seed % 5);
        let size = block * 20 + 512 * (seed % 7);
        let option = block.to_string();
        let variant = if seed % 6 == 5 { "fixed" } else { "dynamic" };
        let recipe = Recipe::options(&[("block_size", &option), ("variant", variant)]);
        let files = MemoryFiles::new();
        let formats = || vec![common::vdi()];
        let flags = flags(seed << 1);
        let mut bench =
            Bench::new(formats(), &common::vdi(), &files, "base.vdi", &recipe, size, None, flags).unwrap();
        random_ops(seed, 250, size, block).iter().for_each(|op| bench.apply(op));
        let content = bench.model.clone();
        bench.close_and_verify();
        let parent = Some(("base.vdi", &content[..]));
        let recipe = Recipe::options(&[("block_size", "8k")]);
        let size = if seed % 2 == 0 { size + 70_144 } else { size / 1024 * 512 };
        let mut bench =
            Bench::new(formats(), &common::vdi(), &files, "top.vdi", &recipe, size, parent, flags).unwrap();
        for op in random_ops(seed + 100, 250, size, 8192) {
            bench.apply(&op);
        }
        bench.close_and_verify();
    }
}
