//! `check` and what it plans: footers, header, BAT, leaks. Every plan is carried out, and the image checked again.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod common;
use common::guest::{DISCARD, bench};
use common::{
    Directory, check_of, edit_footers, edit_header, footer_at, image_of, open_vhd, put32, repair, run,
    try_check,
};
use std::sync::Arc;
use vellum_conformance::format::{Model, Recipe, read_all};
use vellum_conformance::mending::carry_out_in_part;
use vellum_core::{CheckReport, Code, Severity};
use vellum_sim::MemoryFiles;

const SIZE: u64 = 8 << 20;

fn model() -> Model {
    Model::with_runs(SIZE, &[(0, 4096), (2 << 20, 5 << 20)])
}

fn image() -> Vec<u8> {
    image_of(&Recipe::default(), &model())
}

fn files_of(bytes: &[u8]) -> Arc<MemoryFiles> {
    let files = MemoryFiles::new();
    files.put("d", bytes);
    files
}

fn codes(report: &CheckReport) -> Vec<(Severity, Code)> {
    report.findings.iter().map(|finding| (finding.severity, finding.code)).collect()
}

/// Checks, asserts what is found, repairs, and checks again: clean. Returns the bytes then.
fn mend(bytes: &[u8], found: &[(Severity, Code)], is_lossy: bool) -> Vec<u8> {
    let files = files_of(bytes);
    let report = check_of(&files, "d");
    assert_eq!(codes(&report), found, "{:?}", report.findings);
    assert!(files.get("d").unwrap().to_vec() == bytes, "a check changes nothing");
    assert_eq!(report.fixes.iter().any(|fix| fix.is_lossy), is_lossy, "{:?}", report.fixes);
    repair(&report);
    let again = check_of(&files, "d");
    assert!(again.is_clean() && again.fixes.is_empty(), "{:?} {:?}", again.findings, again.fixes);
    files.get("d").unwrap().to_vec()
}

fn assert_content(bytes: &[u8], expected: &[u8]) {
    assert!(read_all(&open_vhd(&files_of(bytes), "d").unwrap()) == expected);
}

fn data() -> Vec<u8> {
    model().read(0, SIZE as usize)
}

#[test]
fn sound_images_are_clean() {
    for options in [&[][..], &[("subformat", "fixed")], &[("block_size", "4k")], &[("block_size", "16M")]] {
        for model in
            [model(), Model::with_runs(SIZE, &[]), Model::with_runs(SIZE - 512, &[(0, SIZE as usize)])]
        {
            let files = files_of(&image_of(&Recipe::options(options), &model));
            let report = check_of(&files, "d");
            assert_eq!(codes(&report), [], "{options:?}");
            assert!(report.fixes.is_empty());
            assert_eq!(report.end_offset, files.get("d").unwrap().to_vec().len() as u64);
        }
    }
    let report = check_of(&files_of(&image()), "d");
    assert_eq!(report.allocated_bytes, SIZE);
}

#[test]
fn images_of_qemu_img_are_clean() {
    let directory = Directory::new();
    let raw = directory.write("model.raw", &data());
    for options in ["subformat=dynamic", "subformat=dynamic,force_size=on", "subformat=fixed"] {
        let theirs = directory.path("theirs.vhd");
        run("qemu-img", &["convert", "-f", "raw", "-O", "vpc", "-o", options, &raw, &theirs]);
        let report = check_of(&files_of(&std::fs::read(&theirs).unwrap()), "d");
        assert!(report.is_clean(), "{options}: {:?}", report.findings);
    }
}

#[test]
fn a_missing_or_torn_footer_is_rebuilt_without_touching_data() {
    let image = image();
    let end = footer_at(&image);
    let leak = [(Severity::Leak, Code::Checksum)];
    let mut torn = image.clone();
    torn[end + 100] ^= 1;
    for bytes in [image[..end].to_vec(), torn, image[..end + 200].to_vec()] {
        let mended = mend(&bytes, &leak, false);
        assert!(mended[..end] == image[..end], "nothing before the footer changes");
        assert!(mended[mended.len() - 512..] == image[..512]);
        assert_content(&mended, &data());
    }
}

#[test]
fn the_copy_at_the_start_is_rebuilt() {
    let image = image();
    let mut bytes = image.clone();
    bytes[..512].fill(0);
    assert!(mend(&bytes, &[(Severity::Leak, Code::Checksum)], false) == image);
    // Two sound ones: the end counts.
    let mut bytes = image.clone();
    let end = footer_at(&bytes);
    edit_footers(&mut bytes, |footer| footer[70] ^= 0xff);
    bytes[end..].copy_from_slice(&image[end..]);
    assert!(mend(&bytes, &[(Severity::Error, Code::Corrupt)], true) == image);
}

#[test]
fn times_that_differ_are_only_noted() {
    let image = image();
    let mut bytes = image.clone();
    edit_footers(&mut bytes, |footer| footer[27] ^= 1);
    bytes[..512].copy_from_slice(&image[..512]);
    let report = check_of(&files_of(&bytes), "d");
    assert_eq!(codes(&report), [(Severity::Note, Code::Range)]);
    assert!(report.is_clean() && report.fixes.is_empty());
}

#[test]
fn checksums_are_mended_where_the_fields_are_plausible() {
    let image = image();
    let mut bytes = image.clone();
    bytes[0x200 + 900] ^= 1;
    let mended = mend(&bytes, &[(Severity::Error, Code::Checksum)], true);
    assert_content(&mended, &data());
    // A header that says nothing: no plan, but the finding.
    let mut bytes = image.clone();
    bytes[0x200..0x208].fill(0);
    let report = check_of(&files_of(&bytes), "d");
    assert_eq!((codes(&report), report.fixes.len()), (vec![(Severity::Error, Code::BadMagic)], 0));
    // Both footers have the checksum 0, as some write it.
    let mut bytes = image.clone();
    let end = footer_at(&bytes);
    for at in [0, end] {
        put32(&mut bytes, at + 64, 0);
    }
    let found = [(Severity::Error, Code::Checksum), (Severity::Leak, Code::Checksum)];
    assert!(mend(&bytes, &found, true) == image);
    assert!(try_check(&files_of(&[0; 4096]), "d").is_err());
    assert!(try_check(&files_of(&[0; 100]), "d").is_err());
}

#[test]
fn wrong_entries_are_cleared_and_the_other_blocks_stay() {
    let image = image();
    let entry =
        |block: usize| u32::from_be_bytes(image[0x600 + block * 4..0x604 + block * 4].try_into().unwrap());
    let error = |code| (Severity::Error, code);
    let leak = (Severity::Leak, Code::Corrupt);
    let cases = [
        (1u32, vec![error(Code::Overlap)]),
        (3, vec![error(Code::Overlap)]),
        (entry(0), vec![error(Code::Overlap)]),
        (entry(1) + 8, vec![error(Code::Overlap)]),
        (0x7fff_ffff, vec![error(Code::OutOfFile)]),
        (entry(3) + 8, vec![error(Code::Truncated)]),
    ];
    for (wrong, mut found) in cases {
        let mut bytes = image.clone();
        put32(&mut bytes, 0x608, wrong);
        found.push(leak);
        let files = files_of(&bytes);
        let report = check_of(&files, "d");
        assert_eq!(codes(&report), found, "{wrong}");
        assert_eq!(report.leaked_bytes >> 20, 2);
        assert_eq!(report.findings[0].offset, Some(0x608));
        repair(&report);
        let again = check_of(&files, "d");
        assert_eq!((again.errors, again.leaks), (0, 1), "the place of the block is lost");
        let mut expected = data();
        expected[4 << 20..6 << 20].fill(0);
        assert!(read_all(&open_vhd(&files, "d").unwrap()) == expected);
    }
    // Every entry wrong: patches are joined.
    let mut bytes = image.clone();
    (0..4).for_each(|block| put32(&mut bytes, 0x600 + block * 4, 1));
    let report = check_of(&files_of(&bytes), "d");
    let patches: usize = report.fixes.iter().filter(|fix| fix.is_lossy).map(|fix| fix.patches.len()).sum();
    assert_eq!((report.errors, patches), (4, 1));
}

#[test]
fn a_file_that_was_cut_off_keeps_what_is_left_of_its_last_block() {
    let image = image();
    let cut = footer_at(&image) - (1 << 20);
    let found = [(Severity::Error, Code::Truncated), (Severity::Leak, Code::Checksum)];
    let mended = mend(&image[..cut], &found, true);
    let mut expected = data();
    expected[7 << 20..].fill(0);
    assert_content(&mended, &expected);
}

#[test]
fn room_at_the_end_is_given_back() {
    let image = image();
    let end = footer_at(&image);
    let mut bytes = image[..end].to_vec();
    bytes.extend(vec![0xcc; 6 << 20]);
    bytes.extend(&image[end..]);
    let mended = mend(&bytes, &[(Severity::Leak, Code::Corrupt)], false);
    assert!(mended == image);
    // Not while an entry is wrong: what it meant could be there.
    put32(&mut bytes, 0x608, 1);
    let report = check_of(&files_of(&bytes), "d");
    assert!(report.fixes.iter().all(|fix| !fix.is_leak));
}

#[test]
fn holes_between_blocks_are_filled_with_the_last_ones() {
    let directory = Directory::new();
    let image = image();
    for block in [1, 2] {
        let mut bytes = image.clone();
        put32(&mut bytes, 0x600 + block * 4, u32::MAX);
        let mut expected = data();
        expected[block << 21..(block + 1) << 21].fill(0);
        let mended = mend(&bytes, &[(Severity::Leak, Code::Corrupt)], false);
        assert_content(&mended, &expected);
        assert!(mended.len() <= image.len() - (2 << 20));
        let (path, raw) = (directory.write("d.vhd", &mended), directory.write("d.raw", &expected));
        run("qemu-img", &["compare", "-f", "vpc", "-F", "raw", &path, &raw]);
        // Whatever an interruption leaves reads the same, and can be mended.
        let report = check_of(&files_of(&bytes), "d");
        assert!(report.fixes.iter().all(|fix| fix.is_leak), "{:?}", report.fixes);
        for steps in 0..report.fixes.len() {
            let files = files_of(&bytes);
            carry_out_in_part(&check_of(&files, "d"), steps);
            let left = files.get("d").unwrap().to_vec();
            assert_content(&left, &expected);
            repair(&check_of(&files, "d"));
            assert!(check_of(&files, "d").is_clean(), "after {steps} steps");
            assert_content(&files.get("d").unwrap().to_vec(), &expected);
        }
    }
}

#[test]
fn holes_in_a_child_are_filled_too() {
    let files = MemoryFiles::new();
    let parent = Model::with_runs(SIZE, &[(0, SIZE as usize)]);
    files.put("base.vhd", &image_of(&Recipe::default(), &parent));
    let content = parent.read(0, SIZE as usize);
    let below = Some(("base.vhd", &content[..]));
    let mut bench = bench(&files, "d", &[("block_size", "64k")], SIZE, below, DISCARD);
    for at in [0u64, 1 << 20, 2 << 20, 3 << 20] {
        bench.apply(&vellum_conformance::writing::Op::Write(at + 512, 3 * 512));
    }
    let mut expected = bench.model.clone();
    let files = bench.close_and_verify();
    let mut bytes = files.get("d").unwrap().to_vec();
    let bat = u64::from_be_bytes(bytes[0x210..0x218].try_into().unwrap()) as usize;
    // The second block of the file is nobody's: the parent shows.
    put32(&mut bytes, bat + 16 * 4, u32::MAX);
    files.put("d", &bytes);
    expected[1 << 20..(1 << 20) + 65536].copy_from_slice(&parent.read(1 << 20, 65536));
    let report = check_of(&files, "d");
    assert_eq!(codes(&report), [(Severity::Leak, Code::Corrupt)]);
    repair(&report);
    assert!(check_of(&files, "d").is_clean());
    assert!(read_all(&open_vhd(&files, "d").unwrap()) == expected);
}

#[test]
fn a_tail_that_was_lost_with_its_footer_is_given_back() {
    let image = image();
    let end = footer_at(&image);
    let mut bytes = image[..end].to_vec();
    bytes.extend(vec![0; 6 << 20]);
    let found = [(Severity::Leak, Code::Checksum), (Severity::Leak, Code::Corrupt)];
    assert!(mend(&bytes, &found, false) == image);
}

#[test]
fn fixed_images_that_are_too_short_are_errors() {
    let image = image_of(&Recipe::options(&[("subformat", "fixed")]), &model());
    let mut bytes = image[..SIZE as usize - 4096].to_vec();
    bytes.extend(&image[SIZE as usize..]);
    let report = check_of(&files_of(&bytes), "d");
    assert_eq!(codes(&report), [(Severity::Error, Code::SizeLie)]);
    let mut bytes = image[..SIZE as usize].to_vec();
    bytes.extend([0; 4096]);
    bytes.extend(&image[SIZE as usize..]);
    assert!(check_of(&files_of(&bytes), "d").is_clean());
}

#[test]
fn a_bat_that_does_not_cover_the_disk_is_an_error() {
    let mut bytes = image();
    edit_header(&mut bytes, |header| put32(header, 28, 3));
    let report = check_of(&files_of(&bytes), "d");
    assert_eq!(codes(&report), [(Severity::Error, Code::SizeLie)]);
}

#[test]
fn mutated_images_are_checked_and_repaired_without_a_panic() {
    let image =
        image_of(&Recipe::options(&[("block_size", "64k")]), &Model::with_runs(1 << 20, &[(0, 1 << 20)]));
    let mut random = 0x1234_5678_9abc_def1u64;
    let mut next = || {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        random >> 33
    };
    for round in 0..3000 {
        let mut bytes = image.clone();
        for _ in 0..1 + next() % 4 {
            let at = [next() % 0x640, 0x600 + next() % 64, 0x200 + next() % 64][next() as usize % 3] as usize;
            bytes[at] = next() as u8;
        }
        if round % 2 == 0 {
            edit_header(&mut bytes, |_| ());
        }
        if round % 3 == 0 {
            bytes.truncate(bytes.len() - (next() % 100_000) as usize);
        }
        let files = files_of(&bytes);
        let Ok(report) = try_check(&files, "d") else { continue };
        repair(&report);
        let again = try_check(&files, "d").unwrap();
        assert!(again.errors <= report.errors, "{:?} then {:?}", report.findings, again.findings);
        let options = common::write_options(vellum_core::OpenFlags { discard: true, ..Default::default() });
        let formats = [common::vhd()];
        let Ok(disk) = vellum_conformance::format::open_with(&formats, &files, "d", &options) else {
            continue;
        };
        let at = next() % 2048 * 512 % disk.size().max(512);
        if disk.size() >= at + 512 {
            let data = vellum_core::Buf::copy_of(&[7; 512]);
            let _ = disk.write(data, at, vellum_core::WriteFlags::default()).wait();
            let _ = disk.discard_range(0..disk.size()).wait();
        }
        let _ = disk.close().wait();
        assert!(try_check(&files, "d").unwrap().errors <= again.errors);
    }
}
