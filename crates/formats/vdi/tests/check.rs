//! Checking and repairing, beside `qemu-img check`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod common;
use common::guest::{Random, check_storage, findings, repair};
use common::{Directory, image_of, open_vdi, put32};
use std::sync::Arc;
use vellum_conformance::format::{Model, Recipe, read_all};
use vellum_conformance::mending::carry_out_in_part;
use vellum_core::{CheckReport, Code, Memory, Severity, block_on};
use vellum_sim::MemoryFiles;

const MAP: usize = 1 << 20;
const COUNTER: usize = 0x184;

/// 10 blocks of 4 KiB; guest blocks 1, 2, 5 lie in places 0, 1, 2.
fn small() -> Vec<u8> {
    image_of(&Recipe::options(&[("block_size", "4k")]), &model())
}

fn model() -> Model {
    Model::with_runs(40 << 10, &[(4096, 5000), (20480, 10)])
}

fn checked(bytes: &[u8]) -> (CheckReport, Arc<Memory>) {
    let memory = Arc::new(Memory::from_bytes("d.vdi", bytes));
    let report = block_on(check_storage(memory.clone())).unwrap();
    assert!(memory.to_vec() == bytes, "checking changes nothing");
    assert_eq!(report.storages.len(), 1);
    (report, memory)
}

/// Mends `bytes`; asserts that nothing is wrong then.
fn mended(bytes: &[u8]) -> (CheckReport, Vec<u8>) {
    let (report, memory) = checked(bytes);
    repair(&report);
    let after = memory.to_vec();
    let (again, _) = checked(&after);
    assert_eq!((again.errors, again.fixes.len()), (0, 0), "{:?}", findings(&again));
    (report, after)
}

fn read(bytes: &[u8]) -> Vec<u8> {
    let files = MemoryFiles::new();
    files.put("d", bytes);
    read_all(&open_vdi(&files, "d").unwrap())
}

fn worst(report: &CheckReport) -> Option<Severity> {
    report.findings.iter().map(|finding| finding.severity).max()
}

#[test]
fn a_good_image_is_clean() {
    for options in [&[][..], &[("static", "on")], &[("block_size", "64k")]] {
        let (report, _) = checked(&image_of(&Recipe::options(options), &model()));
        assert_eq!((findings(&report), report.fixes.len()), (vec![], 0), "{options:?}");
        assert_eq!(report.format, "vdi");
    }
    let (report, _) = checked(&small());
    assert_eq!((report.allocated_bytes, report.end_offset), (3 * 4096, (2 << 20) + 3 * 4096));
}

#[test]
fn a_counter_that_is_wrong_is_set_right() {
    for (counter, severity) in
        [(0, Severity::Error), (2, Severity::Error), (4, Severity::Leak), (10, Severity::Leak)]
    {
        let mut bad = small();
        put32(&mut bad, COUNTER, counter);
        let (report, after) = mended(&bad);
        assert_eq!((worst(&report), report.findings.len()), (Some(severity), 1), "{:?}", findings(&report));
        assert_eq!(report.findings[0].offset, Some(COUNTER as u64));
        assert_eq!(report.fixes.len(), 1);
        assert_eq!((report.fixes[0].is_lossy, report.fixes[0].is_leak), (false, severity == Severity::Leak));
        assert!(after == small());
    }
    // More than the image has blocks: it cannot be opened before.
    let mut bad = small();
    put32(&mut bad, COUNTER, u32::MAX);
    let (report, after) = mended(&bad);
    assert_eq!((report.errors, report.fixes[0].is_leak), (1, false));
    assert!(after == small());
}

#[test]
fn entries_that_lead_nowhere_are_cleared() {
    for (entry, code) in
        [(3, Code::OutOfFile), (9, Code::OutOfFile), (10, Code::OutOfFile), (0x7FFF_FFFF, Code::OutOfFile)]
    {
        let mut bad = small();
        for block in [6, 7] {
            put32(&mut bad, MAP + block * 4, entry + block as u32 - 6);
        }
        let (report, after) = mended(&bad);
        assert!(report.errors >= 2, "{:?}", findings(&report));
        assert_eq!((report.findings[0].code, report.findings[0].offset), (code, Some(MAP as u64 + 24)));
        assert!(report.fixes.iter().any(|fix| fix.is_lossy && fix.what.contains("clear 2 bad entries")));
        assert!(after == small(), "{entry}");
    }
}

#[test]
fn of_two_entries_with_one_place_the_first_keeps_it() {
    let mut bad = small();
    put32(&mut bad, MAP + 7 * 4, 1);
    let (report, after) = mended(&bad);
    assert_eq!((report.errors, report.findings[0].code), (1, Code::Overlap), "{:?}", findings(&report));
    assert_eq!(report.fixes.len(), 1);
    assert!(report.fixes[0].is_lossy);
    assert!(after == small());
}

#[test]
fn lost_space_at_the_end_is_cut_off() {
    let mut bad = small();
    put32(&mut bad, MAP + 5 * 4, u32::MAX);
    bad.extend([0xee; 5000]);
    let (report, after) = mended(&bad);
    assert_eq!((report.errors, report.leaks), (0, 2), "{:?}", findings(&report));
    assert_eq!(report.leaked_bytes, 4096 + 5000);
    assert!(report.fixes.iter().all(|fix| fix.is_leak && !fix.is_lossy));
    assert_eq!(after.len(), (2 << 20) + 2 * 4096);
}

#[test]
fn holes_between_blocks_are_filled_with_the_last_ones() {
    for (block, guest) in [(1, 4096), (2, 8192)] {
        let mut bad = small();
        put32(&mut bad, MAP + block * 4, u32::MAX);
        let mut expected = model().read(0, 40 << 10);
        expected[guest..guest + 4096].fill(0);
        let (report, after) = mended(&bad);
        assert_eq!(
            (report.errors, report.leaks, report.leaked_bytes),
            (0, 1, 4096),
            "{:?}",
            findings(&report)
        );
        // Copy, entry, counter, length: none of them loses anything.
        assert_eq!(report.fixes.len(), 4);
        assert!(report.fixes.iter().all(|fix| fix.is_leak && !fix.is_lossy), "{:?}", report.fixes);
        assert_eq!(after.len(), (2 << 20) + 2 * 4096);
        assert!(checked(&after).0.is_clean() && read(&after) == expected);
        // Whatever an interruption leaves reads the same, and can be mended.
        for steps in 0..report.fixes.len() {
            let (report, memory) = checked(&bad);
            carry_out_in_part(&report, steps);
            let left = memory.to_vec();
            assert!(read(&left) == expected, "after {steps} steps");
            assert_eq!(checked(&left).0.errors, 0, "after {steps} steps");
            assert!(read(&mended(&left).1) == expected);
        }
    }
}

/// What only counts on a lossy step is not lossy, and nothing for those who only want space back.
#[test]
fn only_steps_that_can_lose_data_are_lossy() {
    let mut bad = small();
    put32(&mut bad, MAP + 5 * 4, 1);
    bad.extend([0xee; 5000]);
    let (report, _) = mended(&bad);
    let steps: Vec<(bool, bool)> = report.fixes.iter().map(|fix| (fix.is_lossy, fix.is_leak)).collect();
    assert!(report.fixes[0].what.contains("clear 1 bad entries"), "{}", report.fixes[0].what);
    assert_eq!(steps, [(true, false), (false, false), (false, false)]);
}

#[test]
fn a_block_that_the_file_cuts_keeps_what_is_left_of_it() {
    let mut bad = small();
    // Inside what a guest sees of the third block, and behind it.
    bad.truncate(bad.len() - 4000);
    let (report, after) = mended(&bad);
    assert_eq!((report.errors, report.findings[0].code), (1, Code::Truncated), "{:?}", findings(&report));
    assert!(report.fixes.iter().all(|fix| fix.is_lossy));
    assert!(read(&after) == model().read(0, 40 << 10), "ten bytes were left, more were not written");
    // A whole block, and a part of another.
    let mut bad = small();
    bad.truncate(bad.len() - 4096 - 2000);
    let (report, after) = mended(&bad);
    assert!(report.errors >= 2);
    let mut expected = model().read(0, 40 << 10);
    expected[20480..20490].fill(0);
    expected[8192 + 2096..12288].fill(0);
    assert!(read(&after) == expected);
}

#[test]
fn what_is_no_image_cannot_be_checked_and_a_broken_header_is_reported() {
    let check = |bytes: &[u8]| block_on(check_storage(Arc::new(Memory::from_bytes("d", bytes))));
    let good = small();
    let mut other = good.clone();
    other[0x40] = 0;
    assert_eq!(check(&other).err().unwrap().code(), Code::BadMagic);
    assert_eq!(check(&good[..100]).err().unwrap().code(), Code::Truncated);
    assert_eq!(check(&[]).err().unwrap().code(), Code::Truncated);
    for (at, value) in [(0x4C, 9), (0x154, 0), (0x178, 5), (0x180, 0)] {
        let mut bad = good.clone();
        put32(&mut bad, at, value);
        let report = check(&bad).unwrap();
        assert_eq!((report.errors, report.fixes.len()), (1, 0), "{:?}", findings(&report));
        assert!(report.findings[0].offset.is_some());
    }
    let report = check(&good[..MAP + 20]).unwrap();
    assert_eq!((report.errors, report.findings[0].code), (1, Code::Truncated));
    // Odd, but nothing to mend.
    let mut odd = good.clone();
    odd[0x188..0x1A8].fill(0);
    let report = check(&odd).unwrap();
    assert!(report.is_clean() && worst(&report) == Some(Severity::Note));
}

/// Whether `qemu-img check` finds an error.
fn qemu_finds(path: &str) -> bool {
    let output = std::process::Command::new("qemu-img").args(["check", "-f", "vdi", path]).output().unwrap();
    match output.status.code() {
        Some(0) => false,
        Some(2 | 3) => true,
        other => panic!("qemu-img check: {other:?} {}", String::from_utf8_lossy(&output.stderr)),
    }
}

#[test]
fn qemu_img_agrees_on_what_is_wrong_with_the_map_and_the_counter() {
    let directory = Directory::new();
    let good = image_of(&Recipe::default(), &Model::with_runs(9 << 20, &[(0, 3 << 20), (7 << 20, 1 << 20)]));
    let mut random = Random(11);
    let (mut bad, mut fine) = (0, 0);
    for round in 0..60 {
        let mut bytes = good.clone();
        match round {
            0 => {}
            _ if random.below(3) == 0 => put32(&mut bytes, COUNTER, random.below(10) as u32),
            _ => {
                for _ in 0..=random.below(2) {
                    // Places that the file has, or that no image of this size can have.
                    let entry = [0, 1, 2, 3, 9, 1000, u32::MAX, u32::MAX - 1][random.below(8) as usize];
                    put32(&mut bytes, MAP + random.below(9) as usize * 4, entry);
                }
            }
        }
        let (report, memory) = checked(&bytes);
        let theirs = qemu_finds(&directory.write("d.vdi", &bytes));
        // What we call lost space between and behind blocks shows in their count.
        let ours = report.errors > 0 || report.findings.iter().any(|f| f.severity == Severity::Leak);
        assert_eq!(ours, theirs, "round {round}: {:?}", findings(&report));
        if theirs {
            bad += 1;
        } else {
            fine += 1;
        }
        if theirs {
            repair(&report);
            let after = memory.to_vec();
            let (again, _) = checked(&after);
            assert!(again.is_clean() && again.fixes.is_empty(), "round {round}: {:?}", findings(&again));
            assert!(!qemu_finds(&directory.write("d.vdi", &after)), "round {round}");
        }
    }
    assert!(bad > 20 && fine > 2, "{bad} {fine}");
}

/// Why a power loss may leave an image that `qemu-img check` does not like, whatever the order of writes: the counter of the
/// header and the entry of the map stand in different sectors, of which one is written first, and either alone is an error
/// to it. We write the counter first: then the next writer's block is a new one.
#[test]
fn no_order_of_writes_pleases_qemu_img_check_in_between() {
    assert_ne!(COUNTER / 512, MAP / 512);
    let directory = Directory::new();
    let after = image_of(&Recipe::default(), &Model::with_runs(9 << 20, &[(0, 3 << 20), (7 << 20, 1 << 20)]));
    let mut before = after.clone();
    put32(&mut before, COUNTER, 3);
    put32(&mut before, MAP + 7 * 4, u32::MAX);
    let (mut counter_first, mut entry_first) = (before.clone(), before.clone());
    put32(&mut counter_first, COUNTER, 4);
    put32(&mut entry_first, MAP + 7 * 4, 3);
    for (state, bytes, theirs, ours) in [
        ("before", &before, false, Severity::Leak), // the file is longer already
        ("counter first", &counter_first, true, Severity::Leak),
        ("entry first", &entry_first, true, Severity::Error),
        ("after", &after, false, Severity::Note),
    ] {
        assert_eq!(qemu_finds(&directory.write("d.vdi", bytes)), theirs, "{state}");
        assert_eq!(worst(&checked(bytes).0).unwrap_or(Severity::Note), ours, "{state}");
    }
}

#[test]
fn a_map_of_a_huge_disk_is_checked_in_little_memory() {
    let (_, files) = {
        let files = MemoryFiles::new();
        (files.clone(), files as Arc<dyn vellum_core::Resolver>)
    };
    common::guest::create(&files, "d.vdi", 16 << 40, &[], None).unwrap();
    let report = common::guest::check(&files, "d.vdi").unwrap();
    assert!(report.is_clean());
    assert_eq!(report.storages[0].len().unwrap(), report.end_offset);
}
