//! Writing raw images in place.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::sync::Arc;
use vellum_conformance::format::Recipe;
use vellum_conformance::writing::{Bench, Op, random_ops};
use vellum_core::{Format, OpenFlags};
use vellum_format_raw::Raw;
use vellum_sim::MemoryFiles;

fn bench(size: u64, flags: OpenFlags) -> Bench {
    let raw: Arc<dyn Format> = Arc::new(Raw);
    Bench::new(vec![raw.clone()], &raw, &MemoryFiles::new(), "d.raw", &Recipe::default(), size, None, flags)
        .unwrap()
}

#[test]
fn random_operations_match_the_model() {
    for seed in 0..20 {
        let mut disk = bench(300_000, OpenFlags { discard: seed % 2 == 0, ..OpenFlags::default() });
        for op in random_ops(seed, 100, 300_000, 4096) {
            disk.apply(&op);
        }
        disk.verify();
        disk.close_and_verify();
    }
}

#[test]
fn a_guest_flush_costs_one_file_flush() {
    let mut disk = bench(1 << 20, OpenFlags::default());
    for i in 0..10 {
        disk.apply(&Op::Write(i * 5000, 700));
    }
    assert_eq!(disk.flushes(), 0);
    disk.flush();
    assert_eq!(disk.flushes(), 1);
}
