//! A guest at work, beside a byte-array model.

use super::vhd;
use std::sync::Arc;
use vellum_conformance::format::Recipe;
use vellum_conformance::writing::{Bench, random_ops};
use vellum_core::OpenFlags;
use vellum_sim::MemoryFiles;

pub const DISCARD: OpenFlags = OpenFlags {
    read_only: false,
    honor_zeroes: false,
    honor_same: false,
    inform_zeroes: false,
    discard: true,
    ignore_flush: false,
};

pub fn bench(
    files: &Arc<MemoryFiles>,
    path: &str,
    options: &[(&'static str, &str)],
    size: u64,
    parent: Option<(&str, &[u8])>,
    flags: OpenFlags,
) -> Bench {
    let recipe = Recipe::options(options);
    Bench::new(vec![vhd()], &vhd(), files, path, &recipe, size, parent, flags).unwrap()
}

pub fn flags(seed: u64) -> OpenFlags {
    OpenFlags {
        honor_zeroes: seed & 1 != 0,
        honor_same: seed & 2 != 0,
        inform_zeroes: seed & 4 != 0,
        discard: seed & 8 == 0,
        ..DISCARD
    }
}

pub fn run_ops(
    mut bench: Bench,
    seed: u64,
    count: usize,
    size: u64,
    block: u64,
) -> (Arc<MemoryFiles>, Vec<u8>) {
    for (step, op) in random_ops(seed, count, size, block).iter().enumerate() {
        bench.apply(op);
        if step % 16 == 0 {
            bench.verify();
        }
    }
    let model = bench.model.clone();
    (bench.close_and_verify(), model)
}
