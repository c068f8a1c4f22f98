//! What a writing session costs and changes besides the data; layouts, damaged maps, children.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

mod common;
use common::guest::{Guest, check, create, findings, link_to, open_readable, open_writable};
use common::put32;
use std::sync::Arc;
use vellum_conformance::counting::CountingFiles;
use vellum_core::{Buf, Code, OpenFlags, Resolver, WriteFlags};
use vellum_sim::MemoryFiles;

const ALL: OpenFlags = OpenFlags {
    read_only: false,
    honor_zeroes: false,
    honor_same: false,
    inform_zeroes: false,
    discard: true,
    ignore_flush: false,
};

fn memory() -> (Arc<MemoryFiles>, Arc<dyn Resolver>) {
    let files = MemoryFiles::new();
    (files.clone(), files)
}

#[test]
fn a_flush_costs_two_flushes_and_a_write_none() {
    let memory = MemoryFiles::new();
    let files = Arc::new(CountingFiles::new(memory.clone()));
    let resolver: Arc<dyn Resolver> = files.clone();
    create(&resolver, "d.vdi", 64 << 20, &[], None).unwrap();
    let disk = open_writable(&resolver, "d.vdi", ALL, 1).unwrap();
    let before = memory.get("d.vdi").unwrap().to_vec();
    let cost = |what: &dyn Fn()| {
        files.reset();
        what();
        files.flushes()
    };
    let write = |offset: u64, len: usize| {
        disk.write(Buf::copy_of(&vec![5; len]), offset, WriteFlags::default()).wait().1.unwrap()
    };
    let flush = || disk.flush_all().wait().unwrap();
    assert_eq!(cost(&flush), 0, "nothing was written");
    assert!(memory.get("d.vdi").unwrap().to_vec() == before, "opening changes nothing");
    assert_eq!(cost(&|| write(0, 512)), 1, "the first of a session");
    assert_eq!(cost(&|| (1..32u64).for_each(|block| write(block << 20, 4096))), 0);
    assert_eq!(cost(&flush), 2);
    assert_eq!(cost(&|| (0..32u64).for_each(|block| write(block << 20, 8192))), 0);
    // The second half of each was in its block already.
    assert_eq!(cost(&flush), 1, "no table changed");
    assert_eq!(cost(&|| disk.discard_range(0..16 << 20).wait().unwrap()), 0);
    assert_eq!(cost(&flush), 2);
    assert_eq!(cost(&flush), 2, "blocks moved");
    assert_eq!(cost(&|| write(40 << 20, 4096)), 0);
    assert!(cost(&flush) <= 2);
    let close = cost(&|| disk.close().wait().unwrap());
    assert!(close <= 6, "closing moves what is left: {close} flushes");
}

#[test]
fn only_what_changes_is_written() {
    let memory = MemoryFiles::new();
    let files = Arc::new(CountingFiles::new(memory.clone()));
    let resolver: Arc<dyn Resolver> = files.clone();
    create(&resolver, "d.vdi", 64 << 20, &[], None).unwrap();
    let disk = open_writable(&resolver, "d.vdi", ALL, 1).unwrap();
    let write = |offset: u64, len: usize| {
        disk.write(Buf::copy_of(&vec![5; len]), offset, WriteFlags::default()).wait().1.unwrap()
    };
    write(0, 512);
    disk.flush_all().wait().unwrap();
    files.reset();
    write(3 << 20, 4096);
    disk.flush_all().wait().unwrap();
    // Data, counter, entry: nothing else.
    assert_eq!(files.writes(), [(3 << 20, 4096), (0, 512), (1 << 20, 512)]);
    files.reset();
    write(3 << 20, 4096);
    disk.flush_all().wait().unwrap();
    assert_eq!(files.writes(), [(3 << 20, 4096)]);
}

#[test]
fn the_modification_identity_changes_once_in_a_session() {
    let (memory, files) = memory();
    create(&files, "d.vdi", 1 << 20, &[], None).unwrap();
    let identity = || memory.get("d.vdi").unwrap().to_vec()[0x188..0x1A8].to_vec();
    let first = identity();
    let disk = open_writable(&files, "d.vdi", ALL, 1).unwrap();
    disk.close().wait().unwrap();
    assert_eq!(identity(), first, "nothing was written");
    let disk = open_writable(&files, "d.vdi", ALL, 1).unwrap();
    let write = |data: u8| disk.write(Buf::copy_of(&[data; 512]), 0, WriteFlags::default()).wait().1.unwrap();
    write(1);
    let second = identity();
    assert_ne!(second[16..], first[16..], "before the write is visible");
    let info = disk.layers()[0].image.info();
    let told = info.identity.modification.unwrap();
    assert_eq!(told.to_microsoft(), second[16..], "the open disk tells what stands in the file");
    let property = info.properties.iter().find(|property| property.name == "uuidModify").unwrap();
    assert_eq!(property.value, told.to_string().into());
    assert_eq!(second[..16], first[..16]);
    write(2);
    disk.close().wait().unwrap();
    assert_eq!(identity(), second);
    // A child of the first state does not take the second for its parent.
    let mut link = link_to(&files, "d.vdi");
    create(&files, "e.vdi", 1 << 20, &[], Some(link.clone())).unwrap();
    open_readable(&files, "e.vdi").unwrap();
    link.identity.modification = Some(vellum_core::Uuid([7; 16]));
    create(&files, "f.vdi", 1 << 20, &[], Some(link)).unwrap();
    assert_eq!(open_readable(&files, "f.vdi").err().unwrap().code(), Code::ParentModified);
}

#[test]
fn children_are_made_as_the_sheet_says_or_not_at_all() {
    let (memory, files) = memory();
    create(&files, "base.vdi", 3 << 20, &[], None).unwrap();
    let link = link_to(&files, "base.vdi");
    create(&files, "top.vdi", 5 << 20, &[], Some(link.clone())).unwrap();
    let base = memory.get("base.vdi").unwrap().to_vec();
    let top = memory.get("top.vdi").unwrap().to_vec();
    assert_eq!(top[0x4C..0x50], [4, 0, 0, 0]);
    assert_eq!(top[0x1A8..0x1B8], base[0x188..0x198]);
    assert_eq!(top[0x1B8..0x1C8], base[0x198..0x1A8]);
    let disk = open_readable(&files, "top.vdi").unwrap();
    assert_eq!((disk.layers().len(), disk.size()), (2, 5 << 20));

    let mut nameless = link.clone();
    nameless.identity.uuid = None;
    let error = create(&files, "x.vdi", 1 << 20, &[], Some(nameless)).unwrap_err();
    assert_eq!((error.code(), error.field_name()), (Code::Usage, Some("uuidLinkage")));
    assert!(error.hint_text().is_some());
    let error = create(&files, "x.vdi", 1 << 20, &[("static", "on")], Some(link.clone())).unwrap_err();
    assert_eq!(error.code(), Code::Usage);
    assert!(memory.get("x.vdi").is_none());
    // A parent that has no modification UUID is not compared by it.
    let mut stateless = link;
    stateless.identity.modification = None;
    create(&files, "x.vdi", 1 << 20, &[], Some(stateless)).unwrap();
    assert_eq!(open_readable(&files, "x.vdi").unwrap().layers().len(), 2);
}

#[test]
fn a_map_that_contradicts_itself_is_not_written() {
    let (memory, files) = memory();
    create(&files, "d.vdi", 40 << 12, &[("block_size", "4k")], None).unwrap();
    let mut guest = Guest::new(&files, "d.vdi", vec![0; 40 << 12], ALL, 1);
    guest.write(0, &[9; 5 << 12]);
    guest.reopen();
    drop(guest);
    let good = memory.get("d.vdi").unwrap().to_vec();
    for (entry, code) in [
        (3, Code::Overlap),
        (5, Code::OutOfFile),
        (39, Code::OutOfFile),
        (40, Code::OutOfFile),
        (0x7fff_ffff, Code::OutOfFile),
    ] {
        let mut bad = good.clone();
        put32(&mut bad, (1 << 20) + 7 * 4, entry);
        memory.put("d.vdi", &bad);
        let disk = open_writable(&files, "d.vdi", ALL, 1).unwrap();
        let error = disk.write(Buf::copy_of(&[1; 512]), 0, WriteFlags::default()).wait().1.unwrap_err();
        assert_eq!(error.code(), code, "{entry}: {error:?}");
        assert_eq!(error.offset(), Some((1 << 20) + 28), "{error:?}");
        assert!(error.hint_text().unwrap().contains("vellum check"), "{error:?}");
        assert!(memory.get("d.vdi").unwrap().to_vec() == bad, "nothing was changed");
        assert!(!check(&files, "d.vdi").unwrap().is_clean());
    }
}

#[test]
fn who_insists_may_write_to_a_damaged_map_and_nothing_is_given_out_twice() {
    let (memory, files) = memory();
    create(&files, "d.vdi", 40 << 12, &[("block_size", "4k")], None).unwrap();
    let mut guest = Guest::new(&files, "d.vdi", vec![0; 40 << 12], ALL, 1);
    guest.write(0, &[9; 5 << 12]);
    guest.reopen();
    drop(guest);
    let mut bad = memory.get("d.vdi").unwrap().to_vec();
    put32(&mut bad, (1 << 20) + 7 * 4, 3);
    put32(&mut bad, (1 << 20) + 8 * 4, 9);
    memory.put("d.vdi", &bad);
    let disk = common::guest::open_insisting(&files, "d.vdi").unwrap();
    let write = |block: u64, data: u8| {
        disk.write(Buf::copy_of(&[data; 4096]), block << 12, WriteFlags::default()).wait().1.unwrap()
    };
    write(20, 1);
    disk.discard_range(0..4096).wait().unwrap();
    disk.flush_all().wait().unwrap();
    write(21, 2);
    disk.close().wait().unwrap();
    let bytes = memory.get("d.vdi").unwrap().to_vec();
    let entry = |block: usize| u32::from_le_bytes(bytes[(1 << 20) + block * 4..][..4].try_into().unwrap());
    assert_eq!([entry(0), entry(7), entry(8), entry(20), entry(21)], [0, 3, 9, 10, 11]);
}

#[test]
fn version_0_2_and_snapshots_are_refused_with_a_reason() {
    let (memory, files) = memory();
    let mut bytes = vec![0u8; 420 + 12];
    put32(&mut bytes, 0x40, 0xBEDA_107F);
    put32(&mut bytes, 0x44, 2);
    put32(&mut bytes, 0x48, 1);
    put32(&mut bytes, 0x15C, 512);
    put32(&mut bytes, 0x160, 3 << 20);
    put32(&mut bytes, 0x168, 1 << 20);
    put32(&mut bytes, 0x16C, 3);
    bytes[0x174..0x194].fill(7);
    bytes[420..].fill(0xff);
    memory.put("old.vdi", &bytes);
    let error = open_writable(&files, "old.vdi", ALL, 1).err().unwrap();
    assert_eq!((error.code(), error.field_name()), (Code::Feature, Some("version")));
    assert!(error.hint_text().unwrap().contains("convert"));
    open_readable(&files, "old.vdi").unwrap();
    assert!(check(&files, "old.vdi").unwrap().is_clean());
}

#[test]
fn a_counter_that_a_crash_left_behind_is_not_believed() {
    for counter in [0, 2, 5, 40] {
        let (memory, files) = memory();
        create(&files, "d.vdi", 40 << 12, &[("block_size", "4k")], None).unwrap();
        let mut guest = Guest::new(&files, "d.vdi", vec![0; 40 << 12], ALL, 1);
        guest.write(0, &[9; 5 << 12]);
        guest.reopen();
        let mut bytes = memory.get("d.vdi").unwrap().to_vec();
        put32(&mut bytes, 0x184, counter);
        // Lost space at the end, not zero.
        bytes.extend([0xee; 10_000]);
        memory.put("d.vdi", &bytes);
        guest.disk = open_writable(&files, "d.vdi", ALL, 3).unwrap();
        guest.verify();
        guest.write((20 << 12) + 100, &[3; 100]);
        guest.write((30 << 12) + 100, &[4; 5000]);
        guest.verify();
        guest.disk.close().wait().unwrap();
        let report = check(&files, "d.vdi").unwrap();
        assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", findings(&report));
        guest.disk = open_readable(&files, "d.vdi").unwrap();
        guest.verify();
    }
}

#[test]
fn images_of_other_layouts_are_written() {
    // QEMU's: the map at 0x200, data right behind it; and data that is not aligned to sectors.
    for (off_blocks, off_data, extra) in [(0x200u32, 0x400u32, 0), (0x1D8, 0x27C, 0), (0x200, 0x400, 512)] {
        let (memory, files) = memory();
        let size = 41u32 << 12;
        create(&files, "d.vdi", size.into(), &[("block_size", "4k")], None).unwrap();
        let mut bytes = memory.get("d.vdi").unwrap().to_vec()[..0x1D8].to_vec();
        put32(&mut bytes, 0x154, off_blocks);
        put32(&mut bytes, 0x158, off_data);
        put32(&mut bytes, 0x17C, extra);
        bytes.resize(off_blocks as usize, 0);
        bytes.resize(off_data as usize, 0xff);
        memory.put("d.vdi", &bytes);
        let mut guest = Guest::new(&files, "d.vdi", vec![0; size as usize], ALL, 5);
        for step in 0..400 {
            guest.step(4096, 20_000);
            if step % 97 == 96 && extra == 0 {
                guest.reopen();
                guest.verify();
            }
        }
        guest.verify();
        guest.disk.close().wait().unwrap();
        // With private data nothing is moved: holes stay.
        assert_eq!(check(&files, "d.vdi").unwrap().errors, 0);
        guest.disk = open_readable(&files, "d.vdi").unwrap();
        guest.verify();
    }
}

#[test]
fn a_huge_disk_is_written_at_once() {
    let (_, files) = memory();
    create(&files, "d.vdi", 16 << 40, &[], None).unwrap();
    let start = std::time::Instant::now();
    let disk = open_writable(&files, "d.vdi", ALL, 1).unwrap();
    let write = |at: u64| disk.write(Buf::copy_of(&[7; 4096]), at, WriteFlags::default()).wait().1.unwrap();
    [0, 15 << 40, (16 << 40) - 4096].into_iter().for_each(write);
    disk.discard_range(0..1 << 40).wait().unwrap();
    disk.close().wait().unwrap();
    assert!(start.elapsed() < std::time::Duration::from_secs(20), "{:?}", start.elapsed());
    let report = check(&files, "d.vdi").unwrap();
    assert!(report.is_clean(), "{:?}", findings(&report));
    assert_eq!(report.allocated_bytes, 2 << 20);
}
