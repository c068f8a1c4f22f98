//! Damaged disks that are opened for writing: refused or written, never a panic, and never growing without measure.

mod common;

use common::model::*;
use common::*;
use proptest::prelude::*;
use vellum_conformance::format::{Model, open_with};
use vellum_conformance::mending::carry_out;
use vellum_core::{ChainOptions, OpenFlags, ZeroMode};
use vellum_sim::MemoryFiles;

/// Writes here and there, whatever comes of it.
fn abuse(bytes: &[u8], skip: bool) {
    let files = MemoryFiles::new();
    files.put("d.vmdk", bytes);
    let flags = OpenFlags { discard: true, ..OpenFlags::default() };
    let options = ChainOptions { skip_consistency_checks: skip, ..writing(1, flags) };
    let request = || open_with(&formats(), &files, "d.vmdk", &options);
    let Ok(disk) = request() else {
        assert!(files.get("d.vmdk").unwrap().to_vec() == bytes, "a disk that is refused is not changed");
        return;
    };
    let size = disk.size().min(3 << 20);
    let mut random = Random(bytes.len() as u64 | 1);
    let mut written = 0;
    for _ in 0..30 {
        let start = random.below(size);
        let len = random.below(150_000).min(size - start);
        written += len;
        let _ = match random.below(8) {
            0 => disk.discard_range(start..start + len).wait(),
            1 => disk.write_zeroes(start..start + len, ZeroMode::MayUnmap).wait(),
            2 => disk.flush_all().wait(),
            3 => read(&disk, start, len as usize).map(drop),
            _ => write(&disk, start, &vec![0x5a; len as usize]),
        };
    }
    let closed = disk.close().wait();
    let len = vellum_core::Storage::len(files.get("d.vmdk").unwrap().as_ref()).unwrap();
    // Grains can be large; each write takes at most two that it does not fill, and tables come in pages.
    let grain = disk.layers()[0].image.info().block_size;
    let most = bytes.len() as u64 + written + 30 * (2 * grain + (64 << 10)) + (2 << 20) + 2 * grain;
    assert!(len <= most, "{len} bytes, at most {most} make sense");
    if closed.is_ok() {
        let _ = request().map(|disk| read(&disk, 0, size as usize));
        let _ = check(&files, "d.vmdk", true);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_disks_are_refused_or_written(
        zeroed: bool,
        skip: bool,
        changes in proptest::collection::vec((0usize..80, any::<u8>()), 0..3),
        tables in proptest::collection::vec((10_752usize..22_000, 0u32..300), 0..6),
        cut in proptest::option::of(0usize..140_000),
    ) {
        let small = Model::with_runs(3 << 20, &[(0, 70_000), (2 << 20, 10)]);
        let mut bytes = our_file(&[("zeroed_grain", if zeroed { "on" } else { "off" })], &small);
        for (at, value) in changes {
            bytes[at] = value;
        }
        for (at, value) in tables {
            bytes[at / 4 * 4..at / 4 * 4 + 4].copy_from_slice(&value.to_le_bytes());
        }
        if let Some(cut) = cut {
            let len = bytes.len().saturating_sub(cut);
            bytes.truncate(len);
        }
        abuse(&bytes, skip);
    }

    #[test]
    fn mutated_disks_are_checked_and_what_is_planned_can_be_carried_out(
        tables in proptest::collection::vec((10_752usize..22_000, prop_oneof![0u32..600, any::<u32>()]), 0..8),
        unclean: bool,
    ) {
        let small = Model::with_runs(3 << 20, &[(0, 70_000), (1 << 20, 300_000), (2 << 20, 10)]);
        let mut bytes = our_file(&[], &small);
        for (at, value) in tables {
            bytes[at / 4 * 4..at / 4 * 4 + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes[72] = unclean.into();
        let files = MemoryFiles::new();
        files.put("d.vmdk", &bytes);
        let content = |files| open(files, "d.vmdk").and_then(|disk| read(&disk, 0, 3 << 20)).ok();
        let before = content(&files);
        let report = check(&files, "d.vmdk", true);
        let is_lossy = report.fixes.iter().any(|fix| fix.is_lossy);
        carry_out(&report, true);
        if let (Some(before), false) = (before, is_lossy) {
            prop_assert!(content(&files).as_ref() == Some(&before), "{:?}", findings(&report));
        }
        let again = check(&files, "d.vmdk", true);
        // Tables that lie over each other cannot be told apart.
        if !findings(&report).iter().any(|finding| finding.contains("tables")) {
            prop_assert_eq!(again.errors, 0, "{:?}\n{:?}", findings(&report), findings(&again));
        }
    }
}
