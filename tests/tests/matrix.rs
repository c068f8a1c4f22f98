//! Every format and variant into every other: Vellum and QEMU both call source and result the same disk.
//!
//! Sources written by `qemu-img` are in `interop.rs`.

use std::path::{Path, PathBuf};
use vellum::{ChainOptions, CompareRequest, FilePolicy, Quiet, Vellum};
use vellum_tests::disks::{DEMO_SIZE, demo_disk, difference, write_demo};
use vellum_tests::parallel::two_at_a_time;
use vellum_tests::tools::{assert_qemu_same, qemu_to_raw, text};
use vellum_tests::variants::{VARIANTS, Variant};

fn vellum() -> Vellum {
    Vellum::local(FilePolicy::default())
}

/// The format is given for raw only: the others must be recognised by content.
fn options(format: &str) -> ChainOptions {
    let format = (format == "raw").then(|| "raw".to_owned());
    ChainOptions { format, ..ChainOptions::default() }
}

/// Converts the demonstration disk into `variant`, in a directory of its own.
fn source_of(directory: &Path, demo: &Path, variant: &Variant) -> PathBuf {
    let own = directory.join(format!("from-{}", variant.name));
    std::fs::create_dir(&own).unwrap();
    let source = own.join("disk.img");
    let mut request = variant.request(text(demo), text(&source));
    request.source_options = options("raw");
    vellum().convert(&request, &Quiet).unwrap_or_else(|e| panic!("writing {}: {e:?}", variant.name));
    source
}

fn convert_and_compare(directory: &Path, source: (&Path, &Variant), target: &Variant) {
    let own = directory.join(format!("{}-to-{}", source.1.name, target.name));
    std::fs::create_dir(&own).unwrap();
    let result = own.join("disk.img");
    let vellum = vellum();
    let mut request = target.request(text(source.0), text(&result));
    request.source_options = options(source.1.format);
    // The matrix is two threads wide already.
    request.threads = Some(1);
    let report = vellum.convert(&request, &Quiet).unwrap_or_else(|e| panic!("converting: {e:?}"));
    assert_eq!(report.source_format, source.1.format);

    let open = |path: &Path, format| {
        vellum.open(text(path), &options(format)).unwrap_or_else(|e| panic!("opening: {e:?}")).0
    };
    let (left, right) = (open(source.0, source.1.format), open(&result, target.format));
    let request = CompareRequest { threads: Some(1), ..CompareRequest::default() };
    let compared = vellum.compare(&left, &right, &request, &Quiet).unwrap();
    assert!(compared.same, "{compared:?}");
    assert!(compared.compared_bytes > 3 << 20, "the data was compared: {compared:?}");
    assert!(right.size() >= left.size(), "{compared:?}");
    assert_qemu_same((source.0, source.1.qemu), (&result, target.qemu));
    std::fs::remove_dir_all(own).unwrap();
}

#[test]
fn every_variant_converts_into_every_variant() {
    let directory = tempfile::tempdir().unwrap();
    let demo = directory.path().join("demo.raw");
    write_demo(&demo);
    let sources: Vec<(PathBuf, &Variant)> =
        VARIANTS.iter().map(|variant| (source_of(directory.path(), &demo, variant), variant)).collect();
    for (source, variant) in &sources {
        // All are one disk: what follows compares each with each, but nothing with the truth.
        let raw = directory.path().join("truth.raw");
        qemu_to_raw(source, variant.qemu, &raw);
        let content = std::fs::read(&raw).unwrap();
        assert!(content.len() as u64 >= DEMO_SIZE, "{}", variant.name);
        assert_eq!(difference(&content, &demo_disk()), None, "QEMU reads {}", variant.name);
    }
    let pairs: Vec<(&str, &str)> =
        VARIANTS.iter().flat_map(|s| VARIANTS.iter().map(|t| (s.name, t.name))).collect();
    two_at_a_time(&pairs, |(from, to)| {
        let (source, from) = sources.iter().find(|(_, variant)| variant.name == *from).unwrap();
        let to = VARIANTS.iter().find(|variant| variant.name == *to).unwrap();
        convert_and_compare(directory.path(), (source, from), to);
    });
}
