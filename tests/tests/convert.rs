//! Conversions that are stopped, starved of space, lied to: the result is the right one or none.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use vellum::{Code, Control, ConvertRequest, Error, Progress, Quiet, Resolver, Storage, Vellum, block_on};
use vellum_tests::conversions::{
    StopAfter, TARGET, assert_reads_as_source, assert_same_files, convert, convert_with, files_with_source,
    request, source_bytes, under,
};
use vellum_tests::parallel::two_at_a_time;
use vellum_tests::variants::{VARIANTS, variant};
use vellum_tests::wrap::{BitRot, Op, Wrapped, os_error};

// Reproducible.

#[test]
fn reproducible_results_are_the_same_bytes_with_any_number_of_threads() {
    two_at_a_time(VARIANTS, |variant| {
        let files = files_with_source(9);
        for (directory, threads) in [("one", 1), ("seven", 7), ("again", 7)] {
            let mut request = request(variant, &format!("{directory}/disk.img"));
            request.threads = Some(threads);
            convert(&files, &request, &Quiet).unwrap();
        }
        let one = under(&files, "one/");
        assert_same_files(&under(&files, "seven/"), &one);
        assert_same_files(&under(&files, "again/"), &one);
    });
}

#[test]
fn without_reproducible_every_image_has_an_identity_of_its_own() {
    for name in ["vdi-dynamic", "vhd-dynamic", "vmdk-sparse"] {
        let files = files_with_source(1);
        for target in ["a", "b"] {
            let request = ConvertRequest { reproducible: false, ..request(&variant(name), target) };
            convert(&files, &request, &Quiet).unwrap();
        }
        assert_ne!(files.get("a").unwrap().to_vec(), files.get("b").unwrap().to_vec(), "{name}");
    }
}

// What stops a conversion, and what it leaves.

#[test]
fn a_conversion_stopped_before_its_first_checkpoint_leaves_nothing() {
    for variant in VARIANTS {
        let files = files_with_source(6);
        let error = convert(&files, &request(variant, TARGET), &StopAfter(AtomicUsize::new(3))).unwrap_err();
        assert_eq!(error.code(), Code::Cancelled, "{}", variant.name);
        assert_eq!(files.paths(), ["source.raw"], "{}", variant.name);
    }
}

#[test]
fn a_full_disk_leaves_nothing_that_looks_finished() {
    two_at_a_time(VARIANTS, |variant| {
        let files = files_with_source(4);
        let mut number = 0;
        // The n-th write fails, for larger and larger n, until the conversion succeeds.
        let failures = loop {
            number += 1 + number / 5;
            let left = AtomicU64::new(number);
            let outcome = convert_with(&files, &request(variant, TARGET), move |file, op| {
                let counts = file.ends_with(".part") && matches!(op, Op::Write(_) | Op::SetLen(_));
                // Once full, it stays full.
                let count = |n: u64| Some(n.saturating_sub(1));
                if counts && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count) == Ok(0) {
                    return Err(os_error(28));
                }
                Ok(())
            });
            match outcome {
                Ok(_) => break number,
                Err(error) => {
                    assert_eq!(error.code(), Code::NoSpace, "{error:?}");
                    assert_eq!(files.paths(), ["source.raw"], "{}, write {number}", variant.name);
                }
            }
        };
        assert!(failures > 3, "the conversion failed at several places");
        assert_reads_as_source(&files, TARGET, variant.format, 4);
    });
}

#[test]
fn a_source_that_cannot_be_read_leaves_nothing_that_looks_finished() {
    for name in ["raw", "vdi-dynamic", "vhd-dynamic", "vmdk-sparse", "vmdk-stream", "qcow2-v3", "qcow2-zlib"]
    {
        for bad in [0u64, 2_500_000, (6 << 20) - 1] {
            let files = files_with_source(6);
            let outcome = convert_with(&files, &request(&variant(name), TARGET), move |file, op| match op {
                Op::Read(range) if file == "source.raw" && range.contains(&bad) => Err(os_error(5)),
                _ => Ok(()),
            });
            let error = outcome.expect_err("a source that cannot be read");
            assert_eq!(error.code(), Code::Io, "{name}, byte {bad}: {error:?}");
            assert_eq!(files.paths(), ["source.raw"], "{name}, byte {bad}");
        }
    }
}

#[test]
fn a_flush_that_fails_is_a_conversion_that_failed() {
    for variant in VARIANTS {
        let files = files_with_source(2);
        let outcome = convert_with(&files, &request(variant, TARGET), |file, op| match op {
            Op::Flush if file.ends_with(".part") => Err(os_error(5)),
            _ => Ok(()),
        });
        assert_eq!(outcome.expect_err("a failed flush").code(), Code::Io, "{}", variant.name);
        assert_eq!(files.paths(), ["source.raw"], "{}", variant.name);
    }
}

#[test]
fn a_failed_conversion_over_an_old_file_leaves_the_old_file() {
    let files = files_with_source(3);
    files.put(TARGET, b"precious");
    let forced = ConvertRequest { force: true, ..request(&variant("vdi-dynamic"), TARGET) };
    let error = convert_with(&files, &forced, |file, op| match op {
        Op::Read(range) if file == "source.raw" && range.end > 2 << 20 => Err(os_error(5)),
        _ => Ok(()),
    });
    assert!(error.is_err());
    assert_eq!(under(&files, "out/"), BTreeMap::from([("disk.img".to_owned(), b"precious".to_vec())]));
    convert(&files, &forced, &Quiet).unwrap();
    assert_reads_as_source(&files, TARGET, "vdi", 3);
}

// Targets.

#[test]
fn an_existing_target_is_kept() {
    for variant in VARIANTS {
        let files = files_with_source(1);
        files.put(TARGET, b"precious");
        let error = convert(&files, &request(variant, TARGET), &Quiet).unwrap_err();
        assert_eq!(error.code(), Code::Exists, "{}", variant.name);
        assert!(error.hint_text().unwrap().contains("--force"));
        assert_eq!(files.get(TARGET).unwrap().to_vec(), b"precious");
        assert_eq!(files.paths().len(), 2, "{}: {:?}", variant.name, files.paths());
    }
}

#[test]
fn existing_extents_of_a_new_image_are_kept_too() {
    for (name, extent) in
        [("vmdk-flat", "-flat."), ("vmdk-split-sparse", "-s00"), ("qcow2-data-file", ".data")]
    {
        let files = files_with_source(1);
        convert(&files, &request(&variant(name), TARGET), &Quiet).unwrap();
        let extent = files.paths().into_iter().find(|path| path.contains(extent)).expect("an extent");
        block_on(files.delete(&TARGET.into()).into_future()).unwrap();
        files.put(&extent, b"precious");
        let error = convert(&files, &request(&variant(name), TARGET), &Quiet).unwrap_err();
        assert_eq!(error.code(), Code::Exists, "{name}: {error:?}");
        assert_eq!(files.get(&extent).unwrap().to_vec(), b"precious");
        assert!(files.get(TARGET).is_none());
    }
}

#[test]
fn a_target_that_is_part_of_the_source_is_refused_even_by_force() {
    let files = files_with_source(1);
    let flat = request(&variant("vmdk-flat"), "flat.vmdk");
    convert(&files, &flat, &Quiet).unwrap();
    let extent = files.paths().into_iter().find(|path| path.contains("flat-")).expect("an extent");
    let overlay = vellum_tests::chains::Qcow2Image {
        content: vellum_tests::chains::Content::new(1 << 20),
        backing: Some("source.raw"),
        backing_format: Some("raw"),
    };
    files.put("overlay", &overlay.build());
    let before: Vec<_> = files.paths().iter().map(|path| files.get(path).unwrap().to_vec()).collect();
    for (source, target) in [
        ("source.raw", "source.raw"),
        ("flat.vmdk", "flat.vmdk"),
        ("flat.vmdk", extent.as_str()),
        ("overlay", "source.raw"),
        ("overlay", "overlay"),
    ] {
        let request = ConvertRequest { force: true, ..ConvertRequest::new(source, target, "vdi") };
        let error = convert(&files, &request, &Quiet).expect_err(target);
        assert_eq!(error.code(), Code::Usage, "{source} to {target}: {error:?}");
        let after: Vec<_> = files.paths().iter().map(|path| files.get(path).unwrap().to_vec()).collect();
        assert!(before == after, "{source} to {target} changed something");
    }
}

#[test]
fn a_source_that_has_the_name_of_the_targets_part_file_is_not_overwritten() {
    let files = files_with_source(1);
    let content = source_bytes(1);
    files.put("disk.vdi.part", &content);
    let mut request = ConvertRequest::new("disk.vdi.part", "disk.vdi", "vdi");
    request.source_options.format = Some("raw".into());
    for force in [false, true] {
        request.force = force;
        let error = convert(&files, &request, &Quiet).expect_err("the source is the part file");
        assert_eq!(error.code(), Code::Usage, "{error:?}");
        assert!(files.get("disk.vdi.part").unwrap().to_vec() == content, "the source is as it was");
    }
}

// Lies.

#[test]
fn verify_finds_a_bit_that_the_target_did_not_keep() {
    for (name, at) in [("raw", 2_500_001), ("vdi-dynamic", (2 << 20) + 700_000), ("qcow2-v3", 1_400_000)] {
        let files = files_with_source(4);
        let rot = Arc::new(BitRot { suffix: "disk.img.part", at });
        let vellum = Vellum::new(Wrapped::over(files.clone(), rot));
        let trusting = request(&variant(name), TARGET);
        let report = vellum.convert(&trusting, &Quiet).unwrap();
        assert!(!report.verified);
        block_on(files.delete(&TARGET.into()).into_future()).unwrap();
        let error = vellum.convert(&ConvertRequest { verify: true, ..trusting.clone() }, &Quiet).unwrap_err();
        assert_eq!(error.code(), Code::Mismatch, "{name}: {error:?}");
        assert!(error.offset().is_some(), "it says where: {error:?}");
        assert!(files.get(TARGET).is_none(), "{name}: nothing looks finished");
        // Over files that keep what they get, verify is content.
        for path in files.paths().into_iter().filter(|path| path.starts_with("out/")) {
            block_on(files.delete(&path.as_str().into()).into_future()).unwrap();
        }
        assert!(convert(&files, &ConvertRequest { verify: true, ..trusting }, &Quiet).unwrap().verified);
    }
}

#[test]
fn verify_is_content_with_every_variant() {
    for variant in VARIANTS {
        let files = files_with_source(3);
        let verified = ConvertRequest { verify: true, ..request(variant, TARGET) };
        assert!(convert(&files, &verified, &Quiet).unwrap().verified, "{}", variant.name);
    }
}

/// Calls a closure at the third step.
struct AtThirdStep<F>(AtomicUsize, F);

impl<F: Fn() + Send + Sync> Progress for AtThirdStep<F> {
    fn begin(&self, _phase: &str, _total: u64) {}
    fn advance(&self, _position: u64, _moved: u64) -> Control {
        if self.0.fetch_add(1, Ordering::Relaxed) == 2 {
            (self.1)();
        }
        Control::Continue
    }
}

#[test]
fn a_source_that_changes_while_it_is_read_is_an_error() {
    let files = files_with_source(6);
    let source = files.get("source.raw").unwrap();
    let grow = move || block_on(source.set_len(7 << 20, Default::default()).into_future()).unwrap();
    let error =
        convert(&files, &request(&variant("vdi-dynamic"), TARGET), &AtThirdStep(AtomicUsize::new(0), grow));
    assert_eq!(error.unwrap_err().code(), Code::SourceChanged);
    assert_eq!(files.paths(), ["source.raw"]);

    // A real file whose length stays: the time tells.
    let directory = tempfile::tempdir().unwrap();
    let (source, target) = (directory.path().join("source.raw"), directory.path().join("out.qcow2"));
    std::fs::write(&source, source_bytes(6)).unwrap();
    let touch = || {
        std::thread::sleep(Duration::from_millis(20));
        let file = std::fs::OpenOptions::new().write(true).open(&source).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"changed", 5 << 20).unwrap();
    };
    let vellum = Vellum::local(vellum::FilePolicy::default());
    let text = vellum_tests::tools::text;
    let mut request = ConvertRequest::new(text(&source), text(&target), "qcow2");
    request.source_options.format = Some("raw".into());
    request.threads = Some(1);
    let error: Error = vellum.convert(&request, &AtThirdStep(AtomicUsize::new(0), touch)).unwrap_err();
    assert_eq!(error.code(), Code::SourceChanged, "{error:?}");
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["source.raw"]);
}
