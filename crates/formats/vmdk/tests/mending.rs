//! Tables that differ, that are missing, that lead astray: what is read, what a writer makes of it, what check finds and
//! repair mends.

mod common;

use common::model::*;
use common::*;
use std::sync::Arc;
use vellum_conformance::format::{Model, open_with, read_all};
use vellum_conformance::mending::{carry_out, carry_out_in_part};
use vellum_core::{ChainOptions, Code, OpenFlags, Severity};
use vellum_sim::MemoryFiles;

const SIZE: u64 = 34 << 20;
/// In our file of [`SIZE`] bytes: directories and the first tables.
const RGD: usize = 21 * 512;
const RGT: usize = 22 * 512;
const GD: usize = 30 * 512;
const GT: usize = 31 * 512;

/// Grains 0, 16 and 528 hold data.
fn model() -> Model {
    Model::with_runs(SIZE, &[(0, 65_536), (1 << 20, 65_536), (33 << 20, 1000)])
}

fn good() -> Vec<u8> {
    our_file(&[], &model())
}

fn set32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn get32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn one(bytes: &[u8]) -> Arc<MemoryFiles> {
    let files = MemoryFiles::new();
    files.put("d.vmdk", bytes);
    files
}

fn bytes(files: &MemoryFiles) -> Vec<u8> {
    files.get("d.vmdk").unwrap().to_vec()
}

/// Both tables say the same everywhere.
fn agree(bytes: &[u8]) -> bool {
    (0..2).all(|table| {
        let (a, b) =
            (get32(bytes, GD + table * 4) as usize * 512, get32(bytes, RGD + table * 4) as usize * 512);
        a != b && bytes[a..a + 2048] == bytes[b..b + 2048]
    })
}

/// Damages of single entries that leave all data reachable: place, value.
fn damages(good: &[u8]) -> Vec<(usize, u32)> {
    let (first, second) = (get32(good, GT), get32(good, GT + 64));
    vec![
        (GT, 0),
        (GT, 0x7fff_ffff),
        (GT, 5),
        (GT + 64, first),
        (GT, first + 8),
        (RGT, 0),
        (RGT, 0x7fff_ffff),
        (RGT, 3),
        (RGT + 64, first),
        (RGT, second),
        (RGT + 4, second),
        (GT + 4, second),
        (GT + 4, 0x7fff_0000),
    ]
}

#[test]
fn the_entry_that_lies_inside_the_file_and_is_not_shared_wins() {
    let good = good();
    let expected = model().read(0, SIZE as usize);
    for (at, value) in damages(&good) {
        for unclean in [0, 1] {
            let mut damaged = good.clone();
            set32(&mut damaged, at, value);
            damaged[72] = unclean;
            // A wild entry whose copy says "nothing" cannot be told from a lost one: it is an error where it is read.
            let is_wild = (at, value) == (GT + 4, 0x7fff_0000);
            let files = one(&damaged);
            let (disk, notes) = open_noting(&files, "d.vmdk");
            let disk = disk.unwrap();
            if is_wild {
                assert_eq!(read(&disk, 65_536, 512).unwrap_err().code(), Code::OutOfFile);
            } else {
                assert!(read_all(&disk) == expected, "{at:#x} = {value:#x}");
            }
            drop((disk, notes));
            assert!(bytes(&files) == damaged, "reading changes nothing");

            let report = check(&files, "d.vmdk", true);
            let all = findings(&report);
            assert!(all.iter().any(|f| f.contains("differs from its redundant copy")), "{all:?}");
            assert!(!report.fixes.is_empty());
            carry_out(&report, true);
            let mended = bytes(&files);
            assert!(agree(&mended), "{at:#x} = {value:#x}");
            assert_eq!(mended[72], 0);
            let after = check(&files, "d.vmdk", true);
            assert!(
                after.fixes.is_empty() && after.is_clean(),
                "{at:#x} = {value:#x}: {:?}",
                findings(&after)
            );
            if !is_wild {
                assert!(read_all(&open(&files, "d.vmdk").unwrap()) == expected);
            }
        }
    }
}

#[test]
fn a_writer_mends_what_it_finds() {
    let good = good();
    let mut expected = model().read(0, SIZE as usize);
    expected[5 << 20..(5 << 20) + 100].fill(0x55);
    expected[..100].fill(0x66);
    for (at, value) in damages(&good).into_iter().filter(|damage| *damage != (GT + 4, 0x7fff_0000)) {
        for unclean in [0, 1] {
            let mut damaged = good.clone();
            set32(&mut damaged, at, value);
            damaged[72] = unclean;
            let files = one(&damaged);
            let disk = open_rw(&files, "d.vmdk", 1).unwrap();
            write(&disk, 5 << 20, &[0x55; 100]).unwrap();
            write(&disk, 0, &[0x66; 100]).unwrap();
            assert!(read_all(&disk) == expected, "{at:#x} = {value:#x}");
            disk.close().wait().unwrap();
            let mended = bytes(&files);
            assert!(agree(&mended) && mended[72] == 0, "{at:#x} = {value:#x}");
            let report = check(&files, "d.vmdk", true);
            assert!(report.is_clean(), "{at:#x} = {value:#x}: {:?}", findings(&report));
            assert!(read_all(&open(&files, "d.vmdk").unwrap()) == expected);
        }
    }
}

#[test]
fn an_unclean_image_with_shared_grains_is_written_only_on_demand() {
    let mut damaged = good();
    let first = get32(&damaged, GT);
    for table in [GT, RGT] {
        set32(&mut damaged, table + 64, first);
    }
    damaged[72] = 1;
    let files = one(&damaged);
    let error = open_rw(&files, "d.vmdk", 1).and_then(|disk| write(&disk, 3 << 20, &[1])).unwrap_err();
    assert_eq!(error.code(), Code::Dirty, "{error:?}");
    assert!(bytes(&files) == damaged);
    let options = ChainOptions { skip_consistency_checks: true, ..writing(1, OpenFlags::default()) };
    let disk = open_with(&formats(), &files, "d.vmdk", &options).unwrap();
    write(&disk, 3 << 20, &[1]).unwrap();
    disk.close().wait().unwrap();
    assert_eq!(bytes(&files)[72], 1, "the mark stays");

    let before = read_all(&open(&files, "d.vmdk").unwrap());
    let report = check(&files, "d.vmdk", true);
    assert_eq!(report.errors, 1, "{:?}", findings(&report));
    assert!(report.fixes.iter().all(|fix| !fix.is_lossy));
    carry_out(&report, false);
    let report = check(&files, "d.vmdk", true);
    // The grain that grain 16 had before is nobody's now.
    assert_eq!((report.errors, report.leaks, report.leaked_bytes), (0, 1, 65_536), "{:?}", findings(&report));
    assert!(read_all(&open(&files, "d.vmdk").unwrap()) == before);
    let disk = open_rw(&files, "d.vmdk", 1).unwrap();
    write(&disk, 0, &[9; 10]).unwrap();
    assert_eq!(read(&disk, 1 << 20, 10).unwrap(), before[1 << 20..(1 << 20) + 10]);
    disk.close().wait().unwrap();
}

#[test]
fn discarding_a_grain_that_another_entry_leads_to_does_not_give_it_away() {
    let mut damaged = good();
    let first = get32(&damaged, GT);
    for table in [GT, RGT] {
        set32(&mut damaged, table + 64, first);
    }
    let files = one(&damaged);
    let disk = open_rw(&files, "d.vmdk", 1).unwrap();
    let before = read(&disk, 0, 65_536).unwrap();
    disk.discard_range(1 << 20..(1 << 20) + 65_536).wait().unwrap();
    disk.flush_all().wait().unwrap();
    for grain in 20..30 {
        write(&disk, grain << 16, &[1; 65_536]).unwrap();
    }
    assert!(read(&disk, 0, 65_536).unwrap() == before);
    disk.close().wait().unwrap();
}

#[test]
fn tables_that_are_missing_are_made_when_they_are_needed() {
    for (gd, rgd) in [(true, true), (true, false), (false, true)] {
        for options in [&[][..], &[("grain_size", "4096")], &[("zeroed_grain", "on")]] {
            let files = MemoryFiles::new();
            create(&files, "d.vmdk", 20 << 20, options);
            let mut made = bytes(&files);
            let word = |at: usize| u64::from_le_bytes(made[at..at + 8].try_into().unwrap()) as usize * 512;
            let (rgd_at, gd_at) = (word(48), word(56));
            let tables = (20usize << 20).div_ceil(512 * word(20));
            if gd {
                made[gd_at..gd_at + 4 * tables].fill(0);
            }
            if rgd {
                made[rgd_at..rgd_at + 4 * tables].fill(0);
            }
            made[72] = 1;
            files.put("d.vmdk", &made);
            let mut worker = Worker::new(7, vec![0; 20 << 20]);
            for session in 0..2 {
                let disk = open_rw(&files, "d.vmdk", session).unwrap();
                for _ in 0..100 {
                    worker.step(&disk);
                }
                worker.verify(&disk);
                disk.close().wait().unwrap();
                worker.verify(&open(&files, "d.vmdk").unwrap());
            }
            let report = check(&files, "d.vmdk", true);
            assert_eq!(report.errors, 0, "{gd} {rgd} {options:?}: {:?}", findings(&report));
            // What is not there twice is made again.
            carry_out(&report, true);
            worker.verify(&open(&files, "d.vmdk").unwrap());
            assert_eq!(check(&files, "d.vmdk", false).errors, 0);
        }
    }
}

#[test]
fn lost_directory_entries_are_mended_from_the_other_directory() {
    let expected = model().read(0, SIZE as usize);
    for at in [GD, GD + 4, RGD, RGD + 4] {
        for value in [0u32, 0x7fff_ffff] {
            let mut damaged = good();
            set32(&mut damaged, at, value);
            let files = one(&damaged);
            assert!(read_all(&open(&files, "d.vmdk").unwrap()) == expected, "{at:#x}");
            if value != 0 {
                assert_eq!(open_rw(&files, "d.vmdk", 1).map(|_| ()).unwrap_err().code(), Code::OutOfFile);
            }
            let report = check(&files, "d.vmdk", true);
            assert_eq!(report.errors, 1, "{:?}", findings(&report));
            carry_out(&report, false);
            let after = check(&files, "d.vmdk", true);
            assert_eq!(after.errors, 0, "{at:#x} {value:#x}: {:?}", findings(&after));
            assert!(agree(&bytes(&files)));
            assert!(read_all(&open(&files, "d.vmdk").unwrap()) == expected);
            let disk = open_rw(&files, "d.vmdk", 1).unwrap();
            write(&disk, 12_345, b"more").unwrap();
            disk.close().wait().unwrap();
        }
    }
}

#[test]
fn what_is_bad_in_both_copies_is_cleared_and_called_a_loss() {
    let mut damaged = good();
    for table in [GT, RGT] {
        set32(&mut damaged, table + 64, 0x7fff_ffff);
    }
    let files = one(&damaged);
    let report = check(&files, "d.vmdk", true);
    assert_eq!(report.errors, 1);
    assert_eq!(report.fixes.iter().filter(|fix| fix.is_lossy).count(), 1);
    assert!(check(&files, "d.vmdk", false).fixes.is_empty());
    carry_out(&report, true);
    let after = check(&files, "d.vmdk", true);
    assert_eq!(after.errors, 0);
    let read = read_all(&open(&files, "d.vmdk").unwrap());
    let expected = model().read(0, SIZE as usize);
    assert!(read[..1 << 20] == expected[..1 << 20] && read[2 << 20..] == expected[2 << 20..]);
    assert!(read[1 << 20..2 << 20].iter().all(|b| *b == 0));
}

#[test]
fn a_lost_directory_is_given_up_and_the_disk_written_with_the_other() {
    let expected = model().read(0, SIZE as usize);
    for field in [48usize, 56] {
        let mut damaged = good();
        damaged[field..field + 8].copy_from_slice(&(1u64 << 40).to_le_bytes());
        let files = one(&damaged);
        assert_eq!(open_rw(&files, "d.vmdk", 1).map(|_| ()).unwrap_err().code(), Code::Corrupt);
        let report = check(&files, "d.vmdk", true);
        assert_eq!(report.errors, 1, "{:?}", findings(&report));
        carry_out(&report, false);
        assert!(check(&files, "d.vmdk", true).is_clean());
        let disk = open_rw(&files, "d.vmdk", 1).unwrap();
        write(&disk, 20 << 20, &[3; 300_000]).unwrap();
        disk.close().wait().unwrap();
        let read = read_all(&open(&files, "d.vmdk").unwrap());
        assert!(read[..20 << 20] == expected[..20 << 20] && read[33 << 20..] == expected[33 << 20..]);
        assert!(read[20 << 20..(20 << 20) + 300_000].iter().all(|b| *b == 3));
        assert!(check(&files, "d.vmdk", true).is_clean());
    }
}

#[test]
fn the_end_of_a_file_that_belongs_to_nothing_is_a_leak() {
    let good = good();
    let mut longer = good.clone();
    longer.resize(good.len() + 300_000, 7);
    let files = one(&longer);
    let report = check(&files, "d.vmdk", true);
    assert_eq!((report.errors, report.leaks, report.leaked_bytes), (0, 4, 4 * 65_536));
    assert_eq!(report.findings[0].severity, Severity::Leak);
    carry_out(&report, false);
    assert!(bytes(&files) == good);
    assert!(check(&files, "d.vmdk", true).is_clean());
    // A writer does not mistake what is there for zeros.
    let files = one(&longer);
    let disk = open_rw(&files, "d.vmdk", 1).unwrap();
    for grain in 100..110u64 {
        write(&disk, (grain << 16) + 100, &[5; 10]).unwrap();
        let read = read(&disk, grain << 16, 65_536).unwrap();
        assert!(read.iter().filter(|b| **b != 0).count() == 10);
    }
    disk.close().wait().unwrap();
}

#[test]
fn the_mark_alone_is_taken_back() {
    for options in [&[][..], &[("zeroed_grain", "on")], &[("subformat", "twoGbMaxExtentSparse")]] {
        let files = MemoryFiles::new();
        create(&files, "d.vmdk", 4 << 20, options);
        let extents: Vec<String> = files
            .paths()
            .into_iter()
            .filter(|path| files.get(path).unwrap().to_vec().starts_with(b"KDMV"))
            .collect();
        let [extent] = &extents[..] else { panic!("{extents:?}") };
        let good = files.get(extent).unwrap().to_vec();
        let mut marked = good.clone();
        marked[72] = 1;
        files.put(extent, &marked);
        let report = check(&files, "d.vmdk", true);
        assert!(report.is_clean() && !report.findings.is_empty(), "{:?}", findings(&report));
        assert_eq!(report.fixes.len(), 1, "{:?}", report.fixes);
        assert!(!report.fixes[0].is_lossy && report.fixes[0].what.contains("uncleanShutdown"));
        carry_out(&report, false);
        assert!(files.get(extent).unwrap().to_vec() == good);
        assert!(check(&files, "d.vmdk", true).fixes.is_empty());
    }
}

#[test]
fn holes_between_grains_are_filled_with_the_last_ones() {
    let directory = tempfile::tempdir().unwrap();
    let good = good();
    for (grain, unclean) in [(0, 0), (16, 0), (16, 1)] {
        let mut holed = good.clone();
        set32(&mut holed, GT + grain * 4, 0);
        set32(&mut holed, RGT + grain * 4, 0);
        holed[72] = unclean;
        let mut expected = model().read(0, SIZE as usize);
        expected[grain << 16..(grain + 1) << 16].fill(0);
        let files = one(&holed);
        let report = check(&files, "d.vmdk", true);
        assert_eq!(
            (report.errors, report.leaks, report.leaked_bytes),
            (0, 1, 65_536),
            "{:?}",
            findings(&report)
        );
        // Copy, entries, length, and the mark, which is no leak.
        assert_eq!(report.fixes.len(), 3 + usize::from(unclean), "{:?}", report.fixes);
        assert!(report.fixes.iter().take(3).all(|fix| fix.is_leak && !fix.is_lossy));
        carry_out(&report, false);
        let after = check(&files, "d.vmdk", true);
        assert!(after.is_clean() && after.fixes.is_empty(), "{:?}", findings(&after));
        let mended = bytes(&files);
        assert!(agree(&mended) && mended.len() == good.len() - 65_536 && mended[72] == 0);
        assert!(read_all(&open(&files, "d.vmdk").unwrap()) == expected);
        store(&files, directory.path());
        std::fs::write(directory.path().join("raw"), &expected).unwrap();
        run(directory.path(), "qemu-img", &["compare", "-f", "vmdk", "-F", "raw", "d.vmdk", "raw"]);
        // Whatever an interruption leaves reads the same, and can be mended.
        for steps in 0..report.fixes.len() {
            let files = one(&holed);
            carry_out_in_part(&check(&files, "d.vmdk", true), steps);
            assert!(read_all(&open(&files, "d.vmdk").unwrap()) == expected, "after {steps} steps");
            for _ in 0..2 {
                carry_out(&check(&files, "d.vmdk", true), false);
            }
            let after = check(&files, "d.vmdk", true);
            assert!(
                after.is_clean() && after.fixes.is_empty(),
                "after {steps} steps: {:?}",
                findings(&after)
            );
            assert!(read_all(&open(&files, "d.vmdk").unwrap()) == expected);
        }
    }
}

#[test]
fn what_discards_left_in_the_middle_is_given_back() {
    for options in [&[("grain_size", "4096")][..], &[("zeroed_grain", "on")]] {
        let files = MemoryFiles::new();
        create(&files, "d.vmdk", 8 << 20, options);
        let disk = open_rw(&files, "d.vmdk", 1).unwrap();
        write(&disk, 0, &[0x21; 4 << 20]).unwrap();
        let mut expected = vec![0u8; 8 << 20];
        expected[..4 << 20].fill(0x21);
        for at in (0u64..3 << 20).step_by(256 << 10) {
            disk.discard_range(at..at + (128 << 10)).wait().unwrap();
            expected[at as usize..][..128 << 10].fill(0);
        }
        disk.close().wait().unwrap();
        let before = bytes(&files).len();
        let report = check(&files, "d.vmdk", true);
        assert_eq!((report.errors, report.leaked_bytes), (0, 12 * (128 << 10)), "{:?}", findings(&report));
        carry_out(&report, false);
        let after = check(&files, "d.vmdk", true);
        assert!(after.is_clean() && after.fixes.is_empty(), "{:?}", findings(&after));
        assert_eq!(bytes(&files).len(), before - 12 * (128 << 10));
        assert!(agree_everywhere(&files) && read_all(&open(&files, "d.vmdk").unwrap()) == expected);
    }
}

/// Every table and its copy say the same: nothing is in dispute.
fn agree_everywhere(files: &Arc<MemoryFiles>) -> bool {
    !findings(&check(files, "d.vmdk", false)).iter().any(|finding| finding.contains("differs"))
}

#[test]
fn a_last_grain_that_is_cut_off_is_made_whole_by_a_writer() {
    let good = good();
    let files = one(&good[..good.len() - 65_000]);
    let disk = open_rw(&files, "d.vmdk", 1).unwrap();
    write(&disk, (33 << 20) + 60_000, &[5; 10]).unwrap();
    write(&disk, 40 << 16, &[6; 10]).unwrap();
    disk.close().wait().unwrap();
    let disk = open(&files, "d.vmdk").unwrap();
    let grain = read(&disk, 33 << 20, 65_536).unwrap();
    assert_eq!(grain[..536], model().read(33 << 20, 536));
    assert!(grain[536..60_000].iter().all(|b| *b == 0) && grain[60_000..60_010] == [5; 10]);
    assert!(check(&files, "d.vmdk", true).is_clean());
}

#[test]
fn streams_and_esx_disks_are_checked_too() {
    let files = one(&our_file(&[("subformat", "streamOptimized")], &sample(40 << 20)));
    let report = check(&files, "d.vmdk", true);
    assert!(report.is_clean() && report.fixes.is_empty(), "{:?}", findings(&report));
    assert!(report.compressed_bytes > 0 && report.compressed_bytes == report.allocated_bytes);
    let mut damaged = bytes(&files);
    // The first grain table follows the grains of its 32 MiB; aim its first entry at another grain.
    let gd = u64::from_le_bytes(damaged[damaged.len() - 1024 + 56..][..8].try_into().unwrap()) as usize * 512;
    let gt = get32(&damaged, gd) as usize * 512;
    let other = (1..512).map(|n| get32(&damaged, gt + n * 4)).find(|v| *v != 0).unwrap();
    set32(&mut damaged, gt, other);
    let report = check(&one(&damaged), "d.vmdk", true);
    assert_eq!(report.errors, 1, "{:?}", findings(&report));
    assert!(report.fixes.is_empty());
}
