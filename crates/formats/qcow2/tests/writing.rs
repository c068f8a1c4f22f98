//! Writing in place: every variant against a byte-array model.

use std::sync::Arc;
use vellum_conformance::format::Recipe;
use vellum_conformance::writing::{Bench, Op, random_ops};
use vellum_core::{Format, OpenFlags};
use vellum_format_qcow2::Qcow2;
use vellum_sim::MemoryFiles;

fn qcow2() -> Arc<dyn Format> {
    Arc::new(Qcow2)
}

const DISCARD: OpenFlags = OpenFlags {
    read_only: false,
    honor_zeroes: false,
    honor_same: false,
    inform_zeroes: false,
    discard: true,
    ignore_flush: false,
};

fn run(seed: u64, options: &[(&str, &str)], size: u64, cluster: u64, count: usize) -> Arc<MemoryFiles> {
    let files = MemoryFiles::new();
    let recipe = Recipe {
        options: options.iter().map(|(n, v)| (n.to_string().leak() as &'static str, v.to_string())).collect(),
        ..Recipe::default()
    };
    let mut bench =
        Bench::new(vec![qcow2()], &qcow2(), &files, "disk.img", &recipe, size, None, DISCARD).unwrap();
    for (index, op) in random_ops(seed, count, size, cluster).iter().enumerate() {
        bench.apply(op);
        if index % 16 == 0 {
            bench.verify();
        }
    }
    bench.close_and_verify()
}

#[test]
fn every_cluster_size() {
    for bits in 9..=21u32 {
        let cluster = 1u64 << bits;
        let size = (cluster * 24).clamp(1 << 20, 24 << 20) + 512 * 3;
        run(bits.into(), &[("cluster_size", &cluster.to_string())], size, cluster, 120);
    }
}

#[test]
fn every_refcount_width() {
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let bits = bits.to_string();
        for cluster in ["512", "4096", "65536"] {
            let options = [("cluster_size", cluster), ("refcount_bits", &bits)];
            run(7, &options, 3 << 20, cluster.parse().unwrap(), 150);
        }
    }
}

#[test]
fn the_other_variants() {
    for options in [
        &[("compat", "v2")][..],
        &[("extended_l2", "on")],
        &[("extended_l2", "on"), ("cluster_size", "16k")],
        &[("extended_l2", "on"), ("cluster_size", "2M")],
        &[("lazy_refcounts", "on")],
        &[("data_file", "disk.data")],
        &[("data_file", "disk.data"), ("extended_l2", "on")],
        &[("data_file", "disk.data"), ("data_file_raw", "on")],
        &[("preallocation", "metadata")],
    ] {
        for seed in 0..3 {
            run(seed, options, (8 << 20) + 1536, 65536, 120);
        }
    }
}

#[test]
fn a_flush_costs_two_file_flushes_and_a_write_none() {
    let files = MemoryFiles::new();
    let mut bench = Bench::new(
        vec![qcow2()],
        &qcow2(),
        &files,
        "disk.img",
        &Recipe::default(),
        64 << 20,
        None,
        OpenFlags::default(),
    )
    .unwrap();
    bench.apply(&Op::Write(0, 512));
    bench.flush();
    for round in 1..50u64 {
        let before = bench.flushes();
        for write in 0..10 {
            bench.apply(&Op::Write(round * 700_000 + write * 66_048, 5120));
        }
        assert_eq!(bench.flushes(), before, "writes flush nothing");
        bench.flush();
        assert!(bench.flushes() - before <= 2, "{} flushes", bench.flushes() - before);
    }
    let before = bench.flushes();
    bench.flush();
    assert_eq!(bench.flushes() - before, 1, "nothing changed in the tables");
    bench.close_and_verify();
}
