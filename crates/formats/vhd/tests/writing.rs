//! Writing in place, against a byte-array model: fixed, dynamic and differencing images, many block sizes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::type_complexity
)]

mod common;
use common::guest::{DISCARD, bench, flags, run_ops};
use common::{Directory, check_of, footer_at, image_of, open_vhd, put32, run, vhd, write_options};
use vellum_conformance::format::{Model, Recipe, open_with, read_all, write_image};
use vellum_conformance::writing::Op;
use vellum_core::{Buf, ChainOptions, Code, FormatRegistry, Storage, WriteFlags, ZeroMode, block_on};
use vellum_sim::{Content, FileSet, MemoryFiles, OpKind, SimFiles};

#[test]
fn images_hold_what_was_written_and_qemu_img_agrees() {
    let directory = Directory::new();
    let cases: &[(&[(&str, &str)], u64, u64)] = &[
        (&[("subformat", "fixed")], 3 << 20, 4096),
        (&[("block_size", "4k")], (40 << 12) + 1536, 4096),
        (&[("block_size", "16k")], 50 << 14, 16 << 10),
        (&[("block_size", "64k")], (20 << 16) - 512, 64 << 10),
        (&[("block_size", "512k")], 5 << 20, 512 << 10),
        (&[], (9 << 20) + 512, 2 << 20),
        (&[("block_size", "4M"), ("force_size", "off")], 18 << 20, 4 << 20),
    ];
    for (number, (options, size, block)) in cases.iter().enumerate() {
        let seeds = if *block <= 65536 { 16 } else { 2 };
        for seed in 0..seeds {
            let files = MemoryFiles::new();
            let bench = bench(&files, "d.vhd", options, *size, None, flags(seed));
            let size = bench.disk().size().min(*size);
            let mut bench = bench;
            bench.model.resize(bench.disk().size() as usize, 0);
            let (files, model) = run_ops(bench, seed * 100 + number as u64, 120, size, *block);
            let report = check_of(&files, "d.vhd");
            assert_eq!(report.errors, 0, "{options:?} {seed}: {:?}", report.findings);
            if seed == 0 {
                let image = directory.write("d.vhd", &files.get("d.vhd").unwrap().to_vec());
                let raw = directory.write("d.raw", &model);
                run("qemu-img", &["compare", "-f", "vpc", "-F", "raw", &image, &raw]);
                run("vhdiinfo", &[&image]);
            }
        }
    }
}

#[test]
fn a_flush_costs_two_file_flushes_and_a_write_none() {
    for (options, child) in
        [(&[][..], false), (&[("block_size", "64k")], true), (&[("subformat", "fixed")], false)]
    {
        let files = MemoryFiles::new();
        let content = vec![7u8; 8 << 20];
        if child {
            write_image(
                &vhd(),
                &files,
                "base",
                &Recipe::default(),
                &Model { size: 8 << 20, data: [(0, content.clone())].into() },
            )
            .unwrap();
        }
        let mut bench =
            bench(&files, "d", options, 8 << 20, child.then_some(("base", &content[..])), DISCARD);
        bench.apply(&Op::Write(0, 512));
        bench.flush();
        let begun = bench.flushes();
        let session = if options.contains(&("subformat", "fixed")) { 1 } else { 4 };
        assert!(begun <= session, "{options:?}: {begun}");
        for round in 1..=8u64 {
            let before = bench.flushes();
            for step in 0..10 {
                bench.apply(&Op::Write((round << 20) % (8 << 20) + step * 70_144, 1024));
                bench.apply(&Op::Discard((round << 20) % (8 << 20), 2 << 20));
            }
            assert_eq!(bench.flushes(), before, "{options:?}: writes do not flush");
            bench.flush();
            assert!(bench.flushes() - before <= 2, "{options:?}: {}", bench.flushes() - before);
        }
        bench.close_and_verify();
    }
}

#[test]
fn eight_writes_cost_at_most_as_many_flushes_as_the_guest_asked_for_twice() {
    // RELIABILITY 3.4: QEMU needs 26 file flushes for 8 writes and 4 flushes of the guest.
    let files = MemoryFiles::new();
    let mut bench = bench(&files, "d", &[], 64 << 20, None, DISCARD);
    for write in 0..8u64 {
        bench.apply(&Op::Write(write * (5 << 20), 4096));
        if write % 2 == 1 {
            bench.flush();
        }
    }
    assert!(bench.flushes() <= 2 + 2 * 4, "{}", bench.flushes());
    bench.close_and_verify();
}

#[test]
fn opening_changes_nothing_and_a_session_changes_both_footers_first() {
    let model = Model::with_runs(4 << 20, &[(0, 4096)]);
    for subformat in ["dynamic", "fixed"] {
        let files = MemoryFiles::new();
        write_image(&vhd(), &files, "d", &Recipe::options(&[("subformat", subformat)]), &model).unwrap();
        let before = files.get("d").unwrap().to_vec();
        let disk = open_with(&[vhd()], &files, "d", &write_options(DISCARD)).unwrap();
        assert!(read_all(&disk) == model.read(0, 4 << 20));
        disk.flush_all().wait().unwrap();
        disk.close().wait().unwrap();
        assert!(files.get("d").unwrap().to_vec() == before);
        let disk = open_with(&[vhd()], &files, "d", &write_options(DISCARD)).unwrap();
        disk.write(Buf::copy_of(&[1; 512]), 0, WriteFlags::default()).wait().1.unwrap();
        let after = files.get("d").unwrap().to_vec();
        let end = footer_at(&after);
        if subformat == "fixed" {
            assert!(after[end..] == before[end..], "the only footer is not written over");
        } else {
            assert_ne!(after[24..28], before[24..28]);
            assert!(after[..512] == after[end..]);
            let time = u32::from_be_bytes(after[24..28].try_into().unwrap());
            assert_eq!(u64::from(time), 1_700_000_100 - 946_684_800);
        }
        disk.close().wait().unwrap();
    }
}

#[test]
fn the_old_footer_is_never_written_over_while_the_file_grows() {
    for block in ["4k", "2M", "16M"] {
        let files = MemoryFiles::new();
        let mut bench = bench(&files, "d", &[("block_size", block)], 64 << 20, None, DISCARD);
        for write in 0..4u64 {
            let before = files.get("d").unwrap().to_vec();
            let end = footer_at(&before);
            bench.apply(&Op::Write(write << 24, 512));
            bench.flush();
            let after = files.get("d").unwrap().to_vec();
            if write > 0 {
                assert!(after[end..end + 512] == before[end..], "{block}");
            }
            assert!(after.len() > before.len() && after[..512] == after[footer_at(&after)..]);
        }
        bench.close_and_verify();
    }
}

#[test]
fn freed_places_are_used_again_and_the_end_is_cut_off() {
    let files = MemoryFiles::new();
    let len = || files.get("d").unwrap().len().unwrap();
    let mut bench = bench(&files, "d", &[], 64 << 20, None, DISCARD);
    let empty = len();
    bench.apply(&Op::Write(0, 8 << 20));
    bench.flush();
    let full = len();
    for round in 0..20u64 {
        // The second block goes, another takes its place.
        bench.apply(&Op::Discard(2 << 20, 2 << 20));
        bench.flush();
        bench.apply(&Op::Write(2 << 20, 4096));
        bench.flush();
        assert_eq!(len(), full, "{round}");
        bench.verify();
    }
    bench.apply(&Op::Discard(4 << 20, 4 << 20));
    bench.flush();
    bench.flush();
    assert!(len() < full - (3 << 20), "{} of {full}", len());
    bench.verify();
    bench.apply(&Op::Discard(0, 64 << 20));
    bench.reopen();
    assert!(len() <= empty + 8192, "{} of {empty}", len());
    for round in 0..10 {
        bench.apply(&Op::Write(0, 6 << 20));
        bench.flush();
        bench.apply(&Op::Discard(0, 6 << 20));
        bench.reopen();
        assert!(len() <= empty + 8192 + 4096 * round, "{} of {empty}", len());
        assert!(check_of(&files, "d").is_clean());
    }
    bench.close_and_verify();
}

#[test]
fn room_that_nobody_uses_is_found_again_in_the_next_session() {
    let files = MemoryFiles::new();
    let mut bench = bench(&files, "d", &[], 64 << 20, None, DISCARD);
    bench.apply(&Op::Write(0, 8 << 20));
    bench.apply(&Op::Discard(2 << 20, 2 << 20));
    bench.reopen();
    let len = files.get("d").unwrap().len().unwrap();
    let report = check_of(&files, "d");
    assert_eq!((report.errors, report.leaks), (0, 1), "{:?}", report.findings);
    bench.apply(&Op::Write((20 << 20) + 512, 512));
    bench.flush();
    assert_eq!(files.get("d").unwrap().len().unwrap(), len);
    assert!(check_of(&files, "d").is_clean());
    bench.close_and_verify();
}

#[test]
fn clear_bits_of_a_dynamic_image_are_set_with_their_data() {
    let model = Model::with_runs(8 << 20, &[(0, 8 << 20)]);
    let mut bytes = image_of(&Recipe::default(), &model);
    let entry = u32::from_be_bytes(bytes[0x604..0x608].try_into().unwrap()) as usize * 512;
    bytes[entry..entry + 4].fill(0);
    let files = MemoryFiles::new();
    files.put("d", &bytes);
    let mut expected = model.read(0, 8 << 20);
    expected[2 << 20..(2 << 20) + 32 * 512].fill(0);
    let disk = open_with(&[vhd()], &files, "d", &write_options(DISCARD)).unwrap();
    assert!(read_all(&disk) == expected);
    // In the middle of two sectors: their other halves read as zeros, not as what is stored there.
    let at = (2 << 20) + 3 * 512 + 100;
    disk.write(Buf::copy_of(&[9; 512]), at, WriteFlags::default()).wait().1.unwrap();
    expected[at as usize..at as usize + 512].fill(9);
    assert!(read_all(&disk) == expected);
    disk.close().wait().unwrap();
    assert!(read_all(&open_vhd(&files, "d").unwrap()) == expected);
    let after = files.get("d").unwrap().to_vec();
    assert_eq!(after[entry..entry + 4], [0b0001_1000, 0, 0, 0]);
}

#[test]
fn a_torn_end_is_written_anew_by_the_next_session() {
    let model = Model::with_runs(6 << 20, &[(0, 4096), (4 << 20, 4096)]);
    let image = image_of(&Recipe::default(), &model);
    let end = footer_at(&image);
    let mut torn = image.clone();
    torn[end..].fill(0xaa);
    let mut longer = image[..end].to_vec();
    longer.extend(vec![0; 700]);
    for (bytes, len) in
        [(image[..end].to_vec(), image.len()), (torn, image.len()), (longer, end + 1024 + 512)]
    {
        let files = MemoryFiles::new();
        files.put("d", &bytes);
        let disk = open_vhd(&files, "d").unwrap();
        assert!(disk.layers()[0].image.info().dirty.is_some());
        let disk = open_with(&[vhd()], &files, "d", &write_options(DISCARD)).unwrap();
        disk.write(Buf::copy_of(&[5; 512]), 512, WriteFlags::default()).wait().1.unwrap();
        disk.close().wait().unwrap();
        let after = files.get("d").unwrap().to_vec();
        assert_eq!(after.len(), len);
        assert!(after[..512] == after[after.len() - 512..]);
        let disk = open_vhd(&files, "d").unwrap();
        assert_eq!(disk.layers()[0].image.info().dirty, None);
        let mut expected = model.read(0, 6 << 20);
        expected[512..1024].fill(5);
        assert!(read_all(&disk) == expected);
    }
}

#[test]
fn old_footers_become_whole_ones() {
    let model = Model::with_runs(4 << 20, &[(0, 4096)]);
    let mut image = image_of(&Recipe::default(), &model);
    image.pop();
    let files = MemoryFiles::new();
    files.put("d", &image);
    let disk = open_with(&[vhd()], &files, "d", &write_options(DISCARD)).unwrap();
    disk.write(Buf::copy_of(&[5; 512]), 2 << 20, WriteFlags::default()).wait().1.unwrap();
    disk.close().wait().unwrap();
    let disk = open_vhd(&files, "d").unwrap();
    assert_eq!(disk.layers()[0].image.info().warnings, [] as [&str; 0]);
    assert_eq!(files.get("d").unwrap().len().unwrap() % 512, 0);
}

#[test]
fn images_with_wrong_entries_are_not_written() {
    let model = Model::with_runs(8 << 20, &[(0, 8 << 20)]);
    let image = image_of(&Recipe::default(), &model);
    let first = u32::from_be_bytes(image[0x600..0x604].try_into().unwrap());
    for (entry, code) in
        [(first, Code::Overlap), (first + 1, Code::Overlap), (2, Code::Overlap), (1 << 28, Code::OutOfFile)]
    {
        let mut bytes = image.clone();
        put32(&mut bytes, 0x60c, entry);
        let files = MemoryFiles::new();
        files.put("d", &bytes);
        let error = open_with(&[vhd()], &files, "d", &write_options(DISCARD)).err().unwrap();
        assert_eq!(error.code(), code, "{error:?}");
        assert!(error.hint_text().unwrap().contains("repair"));
        assert!(files.get("d").unwrap().to_vec() == bytes);
        assert!(open_vhd(&files, "d").is_ok());
    }
}

#[test]
fn a_short_last_block_of_another_writer_is_not_lengthened_over_its_neighbour() {
    // The disk ends in the middle of block 1, and so does the file that holds it, with block 0 behind it.
    let size = (2 << 20) + 4096u64;
    let model = Model::with_runs(size, &[(0, size as usize)]);
    let image = image_of(&Recipe::default(), &model);
    let data = model.read(0, size as usize);
    let mut bytes = image[..0x800].to_vec();
    put32(&mut bytes, 0x604, 4);
    bytes.extend([0xff; 512]);
    bytes.extend(&data[2 << 20..]);
    let sector = (bytes.len() / 512) as u32;
    put32(&mut bytes, 0x600, sector);
    bytes.extend([0xff; 512]);
    bytes.extend(&data[..2 << 20]);
    bytes.extend(&image[..512]);
    let files = MemoryFiles::new();
    files.put("d", &bytes);
    let mut expected = data.clone();
    let disk = open_with(&[vhd()], &files, "d", &write_options(DISCARD)).unwrap();
    assert!(read_all(&disk) == expected);
    disk.discard_range(2 << 20..size).wait().unwrap();
    disk.flush_all().wait().unwrap();
    disk.write(Buf::copy_of(&[3; 1024]), 2 << 20, WriteFlags::default()).wait().1.unwrap();
    expected[2 << 20..].fill(0);
    expected[2 << 20..(2 << 20) + 1024].fill(3);
    assert!(read_all(&disk) == expected);
    disk.close().wait().unwrap();
    assert!(read_all(&open_vhd(&files, "d").unwrap()) == expected);
}

#[test]
fn many_requests_at_once_end_as_one_after_the_other_would() {
    let files = MemoryFiles::new();
    let bench = bench(&files, "d", &[("block_size", "64k")], 16 << 20, None, DISCARD);
    let disk = bench.disk();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            scope.spawn(move || {
                for round in 0..60u64 {
                    let at = (thread * 8 + round * 64 * 7) % 32768 * 512;
                    let data = [thread as u8 + 1; 8 * 512];
                    disk.write(Buf::copy_of(&data), at, WriteFlags::default()).wait().1.unwrap();
                    match round % 9 {
                        3 => disk.flush_all().wait().unwrap(),
                        5 => disk.discard_range(thread << 20..(thread << 20) + 65536).wait().unwrap(),
                        7 => disk.write_zeroes(at..at + 4096, ZeroMode::MayUnmap).wait().unwrap(),
                        _ => {}
                    }
                }
            });
        }
    });
    let seen = read_all(disk);
    for sector in seen.chunks(512) {
        assert!(sector[0] <= 8 && sector.iter().all(|byte| *byte == sector[0]));
    }
    disk.close().wait().unwrap();
    assert!(read_all(&open_vhd(&files, "d").unwrap()) == seen);
    assert_eq!(check_of(&files, "d").errors, 0);
}

#[test]
fn snapshots_by_name_are_refused_and_fixed_images_are_discarded_in_place() {
    let files = MemoryFiles::new();
    let mut bench = bench(&files, "d", &[("subformat", "fixed")], 4 << 20, None, DISCARD);
    bench.apply(&Op::Write(0, 4 << 20));
    let len = files.get("d").unwrap().len().unwrap();
    bench.apply(&Op::Discard(1 << 20, 2 << 20));
    assert!(bench.model[1 << 20..3 << 20].iter().all(|byte| *byte == 0));
    bench.close_and_verify();
    assert_eq!(files.get("d").unwrap().len().unwrap(), len);
    let options = ChainOptions { snapshot: Some("s".into()), ..ChainOptions::default() };
    assert_eq!(open_with(&[vhd()], &files, "d", &options).err().unwrap().code(), Code::Feature);
}

/// What a session writes first, up to its first data: offsets, and `None` for a flush.
fn beginning_of_a_session(image: &[u8]) -> Vec<Option<u64>> {
    let mut set = FileSet::default();
    set.put("d", Content::from_bytes(image));
    let files = SimFiles::new(set);
    let registry = FormatRegistry::new(vec![vhd()]);
    let (disk, _) = block_on(registry.open_chain(&files.resolver(), "d", &write_options(DISCARD))).unwrap();
    disk.write(Buf::copy_of(&[5; 512]), 0, WriteFlags::default()).wait().1.unwrap();
    let ops = files.trace().ops;
    ops.iter()
        .take(4)
        .map(|op| match &op.kind {
            OpKind::Write { offset, .. } => Some(*offset),
            OpKind::Flush => None,
            other => panic!("{other:?}"),
        })
        .collect()
}

#[test]
fn never_are_both_footers_written_at_once() {
    // The simulator keeps sectors whole; a disk may damage the one that it is writing when the power goes.
    let mut image = image_of(&Recipe::default(), &Model::with_runs(4 << 20, &[(0, 4096)]));
    let end = footer_at(&image) as u64;
    assert_eq!(beginning_of_a_session(&image), [Some(end), None, Some(0), None]);
    // If the copy is damaged, the footer at the end is the only one: it comes second.
    image[100] ^= 1;
    assert_eq!(beginning_of_a_session(&image), [Some(0), None, Some(end), None]);
}
