//! Differencing images: made, written in place, and read by libvhdi.
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
use common::{Directory, check_of, edit_footers, run, vhd, write_options};
use vellum_conformance::format::{Recipe, open_with};
use vellum_conformance::writing::{Op, create, link, random_ops};
use vellum_core::{Buf, Code, Extent, FormatRegistry, Storage, Uuid, block_on};
use vellum_sim::MemoryFiles;

#[test]
fn children_hold_what_was_written_over_parents_of_any_size() {
    let blocks: &[(&str, u64)] = &[("4k", 4096), ("16k", 16 << 10), ("64k", 64 << 10), ("2M", 2 << 20)];
    for (name, block) in blocks {
        for (seed, parent, child) in
            [(0, 10, 10), (1, 10, 7), (2, 7, 10), (8, 3, 12), (5, 12, 12), (18, 1, 9)]
        {
            let files = MemoryFiles::new();
            let (parent, child) = (parent * block + 512, child * block);
            let base = bench(&files, "vm/base.vhd", &[("block_size", name)], parent, None, DISCARD);
            let (_, content) = run_ops(base, seed, 40, parent, *block);
            let before = files.get("vm/base.vhd").unwrap().to_vec();
            let options: &[_] = &[("block_size", if seed == 2 { "8k" } else { name })];
            let below = Some(("vm/base.vhd", &content[..]));
            let top = bench(&files, "vm/top.vhd", options, child, below, flags(seed));
            assert_eq!(top.disk().layers().len(), 2);
            let count = if *block > 65536 { 60 } else { 160 };
            run_ops(top, seed + 1000, count, child, *block);
            let report = check_of(&files, "vm/top.vhd");
            assert_eq!(report.errors, 0, "{name} {seed}: {:?}", report.findings);
            assert!(files.get("vm/base.vhd").unwrap().to_vec() == before, "the parent is as it was");
        }
    }
}

#[test]
fn a_grandchild_and_its_names() {
    let files = MemoryFiles::new();
    let mut base = bench(&files, "vm/base.vhd", &[], 6 << 20, None, DISCARD);
    base.apply(&Op::Write(0, 6 << 20));
    let content = base.model.clone();
    base.close_and_verify();
    let mut middle = bench(&files, "vm/mid.vhd", &[], 6 << 20, Some(("vm/base.vhd", &content)), DISCARD);
    middle.apply(&Op::Write(1 << 20, 70_000));
    middle.apply(&Op::Zero(3 << 20, 1 << 20));
    let content = middle.model.clone();
    middle.close_and_verify();
    let mut top = bench(&files, "vm/top.vhd", &[], 6 << 20, Some(("vm/mid.vhd", &content)), DISCARD);
    top.apply(&Op::Write((3 << 20) + 512, 512));
    let info = top.disk().layers()[0].image.info().clone();
    assert_eq!(info.variant, "differencing");
    let hints = info.parent.unwrap().hints;
    let hints: Vec<_> = hints.iter().map(|hint| (hint.field, hint.place.as_str())).collect();
    assert_eq!(hints, [("W2ru", "./mid.vhd"), ("W2ku", "vm/mid.vhd"), ("parentUnicodeName", "mid.vhd")]);
    let time = info.properties.iter().find(|property| property.name == "parentTimestamp").unwrap();
    assert_eq!(time.value, vellum_core::Value::Number(1_700_000_000));
    assert_eq!(top.disk().layers().len(), 3);
    top.close_and_verify();
}

/// Reads a chain (child first) through libvhdi's own interface, because `vhdimount` needs FUSE.
const LIBVHDI: &str = r#"
import ctypes, sys
lib = ctypes.CDLL("libvhdi.so.1")
lib.libvhdi_file_read_buffer_at_offset.restype = ctypes.c_ssize_t
error = ctypes.c_void_p()
def check(ok):
    if not ok:
        text = ctypes.create_string_buffer(4096)
        lib.libvhdi_error_backtrace_sprint(error, text, 4096)
        sys.exit(text.value.decode())
def opened(path):
    file = ctypes.c_void_p()
    check(lib.libvhdi_file_initialize(ctypes.byref(file), ctypes.byref(error)) == 1)
    check(lib.libvhdi_file_open(file, path.encode(), 1, ctypes.byref(error)) == 1)
    return file
files = [opened(path) for path in sys.argv[1:-1]]
for child, parent in zip(files, files[1:]):
    check(lib.libvhdi_file_set_parent_file(child, parent, ctypes.byref(error)) == 1)
size = ctypes.c_uint64()
check(lib.libvhdi_file_get_media_size(files[0], ctypes.byref(size), ctypes.byref(error)) == 1)
with open(sys.argv[-1], "wb") as out:
    at = 0
    while at < size.value:
        part = ctypes.create_string_buffer(min(1 << 20, size.value - at))
        done = lib.libvhdi_file_read_buffer_at_offset(
            files[0], part, ctypes.c_size_t(len(part)), ctypes.c_int64(at), ctypes.byref(error))
        check(done > 0)
        out.write(part.raw[:done])
        at += done
"#;

#[test]
fn libvhdi_reads_children_that_we_wrote() {
    let directory = Directory::new();
    // With blocks of 512 KiB, libvhdi 20210425 shows the parent's data for some blocks that are wholly the child's.
    let block = "2M";
    let files = MemoryFiles::new();
    let mut base = bench(&files, "base.vhd", &[("block_size", block)], 8 << 20, None, DISCARD);
    base.apply(&Op::Write(0, 5 << 20));
    let content = base.model.clone();
    base.close_and_verify();
    let top =
        bench(&files, "top.vhd", &[("block_size", block)], 8 << 20, Some(("base.vhd", &content)), DISCARD);
    let mut top = top;
    for op in random_ops(7, 60, 8 << 20, 512 << 10) {
        // libvhdi 20210425 takes the clear bits that follow a set one in a byte for set: whole bytes only.
        top.apply(&match op {
            Op::Write(at, len) => Op::Write(at & !4095, (len + 4095) & !4095),
            Op::WriteZeros(at, len) => Op::WriteZeros(at & !4095, (len + 4095) & !4095),
            Op::Zero(at, len) => Op::Zero(at & !4095, (len + 4095) & !4095),
            Op::Discard(at, len) => Op::Discard(at & !4095, (len + 4095) & !4095),
            other => other,
        });
    }
    let model = top.model.clone();
    let files = top.close_and_verify();
    let base = directory.write("base.vhd", &files.get("base.vhd").unwrap().to_vec());
    let top = directory.write("top.vhd", &files.get("top.vhd").unwrap().to_vec());
    let info = run("vhdiinfo", &[&top]);
    assert!(info.contains("Differential") && info.contains("base.vhd"), "{info}");
    let raw = directory.path("top.raw");
    run("python3", &["-c", LIBVHDI, &top, &base, &raw]);
    assert!(std::fs::read(&raw).unwrap() == model, "{block}");
}

#[test]
fn zeros_in_a_child_never_show_the_parent_again() {
    let files = MemoryFiles::new();
    let mut base = bench(&files, "base", &[], 8 << 20, None, DISCARD);
    base.apply(&Op::Write(0, 8 << 20));
    let content = base.model.clone();
    base.close_and_verify();
    let mut top = bench(&files, "top", &[], 8 << 20, Some(("base", &content)), DISCARD);
    top.apply(&Op::Zero(0, 2 << 20));
    top.apply(&Op::WriteZeros((2 << 20) + 4096, 4096));
    top.apply(&Op::Write(4 << 20, 1024));
    top.apply(&Op::Zero(4 << 20, 2 << 20));
    top.apply(&Op::Write(6 << 20, 2 << 20));
    top.apply(&Op::Discard(6 << 20, 2 << 20));
    top.reopen();
    top.verify();
    let (buf, _) = top.disk().read_at(Buf::zeroed(2 << 20), 6 << 20).wait();
    assert!(buf.iter().all(|byte| *byte == 0), "a whole block of a child becomes zeros, not the parent");
    // Only the sectors that were written are the child's.
    let found = block_on(top.disk().lookup(2 << 20..4 << 20)).unwrap();
    assert_eq!((found.layer, found.range), (1, 2 << 20..(2 << 20) + 4096));
    let found = block_on(top.disk().lookup((2 << 20) + 4096..4 << 20)).unwrap();
    assert_eq!((found.layer, found.range.end), (0, (2 << 20) + 8192));
    assert!(matches!(found.extent, Extent::Raw { .. }));
    top.close_and_verify();
}

#[test]
fn parents_that_cannot_be_named_are_refused() {
    let files = MemoryFiles::new();
    bench(&files, "base.vhd", &[], 1 << 20, None, DISCARD).close_and_verify();
    let registry = FormatRegistry::new(vec![vhd()]);
    let good = link(&registry, &files, "base.vhd").unwrap();
    let child = |link, options: &[(&'static str, &str)]| {
        create(&vhd(), &files, "c.vhd", &Recipe::options(options), 1 << 20, link).err()
    };
    assert!(child(Some(good.clone()), &[]).is_none());
    let mut nameless = good.clone();
    nameless.identity.uuid = None;
    let error = child(Some(nameless.clone()), &[]).unwrap();
    assert_eq!((error.code(), error.field_name()), (Code::Usage, Some("parentUniqueId")));
    nameless.identity.uuid = Some(Uuid::default());
    assert!(child(Some(nameless), &[]).is_some());
    assert_eq!(child(Some(good.clone()), &[("subformat", "fixed")]).unwrap().code(), Code::Usage);
    assert_eq!(child(None, &[("subformat", "differencing")]).unwrap().code(), Code::Usage);
    let mut long = good;
    long.place = "x".repeat(300);
    assert_eq!(child(Some(long), &[]).unwrap().field_name(), Some("parentUnicodeName"));
}

#[test]
fn a_child_is_not_written_over_another_parent() {
    let files = MemoryFiles::new();
    bench(&files, "base.vhd", &[], 1 << 20, None, DISCARD).close_and_verify();
    bench(&files, "c.vhd", &[], 1 << 20, Some(("base.vhd", &[])), DISCARD).close_and_verify();
    let mut other = files.get("base.vhd").unwrap().to_vec();
    edit_footers(&mut other, |footer| footer[70] ^= 1);
    files.put("base.vhd", &other);
    let error = open_with(&[vhd()], &files, "c.vhd", &write_options(DISCARD)).err().unwrap();
    assert_eq!(error.code(), Code::ParentWrong);
}
