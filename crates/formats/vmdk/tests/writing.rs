//! Writing in place, beside a model in memory: every kind that can be written, in one file and in several, with parents.

mod common;

use common::model::*;
use common::*;
use vellum_core::{Code, Disk, OpenFlags};
use vellum_sim::MemoryFiles;

const SIZE: u64 = (5 << 20) + 3 * 512;

const KINDS: [&[(&str, &str)]; 8] = [
    &[],
    &[("zeroed_grain", "on")],
    &[("grain_size", "4096")],
    &[("grain_size", "1M"), ("dialect", "virtualbox")],
    &[("subformat", "monolithicFlat")],
    &[("subformat", "vmfs")],
    &[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "1M")],
    &[("subformat", "twoGbMaxExtentFlat"), ("extent_size", "1M")],
];

/// Random work in several sessions; after each, everything is read again by a fresh chain, and checked.
fn sessions(files: &std::sync::Arc<MemoryFiles>, path: &str, worker: &mut Worker, count: u64, steps: u64) {
    for session in 0..count {
        let disk = open_rw(files, path, 1000 + u128::from(session)).unwrap();
        for _ in 0..steps {
            worker.step(&disk);
        }
        worker.verify(&disk);
        disk.close().wait().unwrap();
        worker.verify(&disk);
        let (reopened, notes) = open_noting(files, path);
        worker.verify(&reopened.unwrap());
        assert!(notes.is_empty(), "{notes:?}");
        let report = check(files, path, true);
        assert!(
            report.errors == 0 && report.findings.iter().all(|f| f.severity < vellum_core::Severity::Error)
        );
        assert!(report.fixes.iter().all(|fix| fix.is_leak), "{:?}", findings(&report));
    }
}

#[test]
fn random_work_equals_the_model() {
    for (number, options) in KINDS.iter().enumerate() {
        for seed in 0..2 {
            let files = MemoryFiles::new();
            create(&files, "d.vmdk", SIZE, options);
            let mut worker = Worker::new(number as u64 * 100 + seed, vec![0; SIZE as usize]);
            sessions(&files, "d.vmdk", &mut worker, 2, 100);
        }
    }
}

#[test]
fn random_work_in_children_equals_the_model_and_leaves_the_parent_alone() {
    type Options = &'static [(&'static str, &'static str)];
    let styles: [(Options, Options); 6] = [
        (&[], &[]),
        (&[], &[("zeroed_grain", "on"), ("grain_size", "16384")]),
        (&[("dialect", "virtualbox")], &[("dialect", "virtualbox")]),
        (&[("dialect", "virtualbox")], &[]),
        (&[("subformat", "monolithicFlat")], &[("grain_size", "4096")]),
        (
            &[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "1M")],
            &[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "2M")],
        ),
    ];
    for (number, (base, child)) in styles.iter().enumerate() {
        for size in [SIZE, SIZE - (1 << 20) - 512, SIZE + (1 << 20)] {
            let files = MemoryFiles::new();
            create(&files, "base.vmdk", SIZE, base);
            let mut worker = Worker::new(number as u64 + size, vec![0; SIZE as usize]);
            sessions(&files, "base.vmdk", &mut worker, 1, 40);
            create_child(&files, "child.vmdk", size, child, Some("base.vmdk")).unwrap();
            let below: Vec<_> = files.paths().into_iter().filter(|p| p.starts_with("base")).collect();
            let before: Vec<_> = below.iter().map(|p| files.get(p).unwrap().to_vec()).collect();
            worker.model.resize(size as usize, 0);
            let disk = open_rw(&files, "child.vmdk", 3).unwrap();
            assert_eq!(disk.layers().len(), 2, "{child:?}");
            worker.verify(&disk);
            drop(disk);
            sessions(&files, "child.vmdk", &mut worker, 2, 50);
            let after: Vec<_> = below.iter().map(|p| files.get(p).unwrap().to_vec()).collect();
            assert!(before == after, "the parent changed");
            // A grandchild over both.
            create_child(&files, "top.vmdk", size, child, Some("child.vmdk")).unwrap();
            sessions(&files, "top.vmdk", &mut worker, 1, 25);
            // The child's content changed since: its own child must notice.
            let disk = open_rw(&files, "child.vmdk", 77).unwrap();
            write(&disk, 0, &[1]).unwrap();
            disk.close().wait().unwrap();
            let error = open(&files, "top.vmdk").map(|_| ()).unwrap_err();
            assert_eq!(error.code(), Code::ParentModified, "{error:?}");
        }
    }
}

#[test]
fn mixed_extents_are_written_where_they_can_be() {
    let files = MemoryFiles::new();
    create(&files, "s.vmdk", 1_000_448, &[]);
    create(&files, "z.vmdk", 300_032, &[("zeroed_grain", "on"), ("grain_size", "4096")]);
    files.put("f.vmdk", &vec![7; 200 * 512]);
    let text = "# Disk DescriptorFile\nversion=1\nCID=9\nparentCID=ffffffff\ncreateType=\"custom\"\n\
                RW 100 FLAT \"f.vmdk\" 8\nRW 1954 SPARSE \"s.vmdk\"\nRW 777 ZERO\nRW 586 SPARSE \"z.vmdk\"\n\
                RW 20 FLAT \"f.vmdk\" 150\nRDONLY 5 FLAT \"r.vmdk\" 0\nNOACCESS 3 FLAT \"secret.vmdk\" 0\n";
    files.put("d.vmdk", text.as_bytes());
    files.put("r.vmdk", &[9; 5 * 512]);
    let open_size = (100 + 1954 + 777 + 586 + 20) * 512;
    let mut model = vec![0; open_size];
    model[..100 * 512].fill(7);
    model[open_size - 20 * 512..].fill(7);
    let mut worker = Worker::new(5, model);
    let zero = (100 + 1954) * 512u64..(100 + 1954 + 777) * 512;
    worker.zero_only.push(zero.clone());
    for session in 0..3 {
        let disk = open_rw(&files, "d.vmdk", session).unwrap();
        for _ in 0..150 {
            worker.step(&disk);
        }
        worker.verify(&disk);
        let error = write(&disk, zero.start + 512, &[1; 10]).unwrap_err();
        assert_eq!(error.code(), Code::Permission, "{error:?}");
        assert!(error.hint_text().is_some());
        for at in [open_size as u64, open_size as u64 + 5 * 512] {
            assert_eq!(write(&disk, at, &[1; 10]).unwrap_err().code(), Code::Permission);
        }
        assert_eq!(read(&disk, open_size as u64, 5 * 512).unwrap(), [9; 5 * 512]);
        write(&disk, zero.start - 1000, &[0; 3000]).unwrap();
        worker.model[zero.start as usize - 1000..zero.start as usize].fill(0);
        disk.close().wait().unwrap();
        worker.same(&read(&open(&files, "d.vmdk").unwrap(), 0, open_size).unwrap(), 0);
    }
    let report = check(&files, "d.vmdk", true);
    assert_eq!(report.errors, 0, "{:?}", findings(&report));
    assert!(files.get("f.vmdk").unwrap().to_vec()[..8 * 512].iter().all(|b| *b == 7));
}

#[test]
fn what_cannot_be_written_says_so_and_changes_nothing() {
    let model = sample(3 << 20);
    let files = MemoryFiles::new();
    files.put("stream.vmdk", &our_file(&[("subformat", "streamOptimized")], &model));
    let mut tracked = our_file(&[], &model);
    let text = String::from_utf8_lossy(&tracked[512..512 + 10_240]).into_owned();
    let at = 512 + text.find('\0').unwrap();
    tracked[at..at + 33].copy_from_slice(b"changeTrackPath=\"stream-ctk.vmdk\"");
    files.put("tracked.vmdk", &tracked);
    let mut version = our_file(&[], &model);
    version[4] = 3;
    files.put("version.vmdk", &version);
    let mut lost = our_file(&[], &model);
    lost[48..56].copy_from_slice(&(1u64 << 40).to_le_bytes());
    files.put("lost.vmdk", &lost);
    let mut bare = our_file(&[], &model);
    bare[28..44].fill(0);
    files.put("bare.vmdk", &bare);
    files.put("ro.vmdk", b"# Disk DescriptorFile\nCID=1\ncreateType=\"custom\"\nRDONLY 1 FLAT \"x\" 0\n");
    files.put("x", &[0; 512]);
    for (path, code) in [
        ("stream.vmdk", Code::Feature),
        ("tracked.vmdk", Code::Feature),
        ("version.vmdk", Code::Feature),
        ("lost.vmdk", Code::Corrupt),
        ("bare.vmdk", Code::Permission),
        ("ro.vmdk", Code::Permission),
    ] {
        let before = files.get(path).unwrap().to_vec();
        let error = open_rw(&files, path, 1).map(|_| ()).unwrap_err();
        assert_eq!(error.code(), code, "{path}: {error:?}");
        assert!(error.hint_text().is_some(), "{error:?}");
        assert!(open(&files, path).is_ok(), "{path} can be read");
        assert!(files.get(path).unwrap().to_vec() == before);
    }
}

#[test]
fn opening_for_writing_changes_nothing_until_something_is_written() {
    for options in KINDS {
        let files = MemoryFiles::new();
        create(&files, "d.vmdk", SIZE, options);
        let all = || -> Vec<_> { files.paths().iter().map(|p| files.get(p).unwrap().to_vec()).collect() };
        let before = all();
        let disk = open_rw(&files, "d.vmdk", 1).unwrap();
        read(&disk, 0, 1 << 20).unwrap();
        disk.flush_all().wait().unwrap();
        disk.close().wait().unwrap();
        assert!(before == all());
    }
}

#[test]
fn a_session_marks_the_extents_and_changes_the_content_id_once() {
    let files = MemoryFiles::new();
    let options = [("subformat", "twoGbMaxExtentSparse"), ("extent_size", "1M"), ("dialect", "virtualbox")];
    create(&files, "d.vmdk", 3 << 20, &options);
    let identity = || open(&files, "d.vmdk").unwrap().layers()[0].image.info().identity;
    let marks = || -> Vec<u8> {
        (1..4).map(|n| files.get(&format!("d-s00{n}.vmdk")).unwrap().to_vec()[72]).collect()
    };
    let first = identity();
    let disk = open_rw(&files, "d.vmdk", 1).unwrap();
    let told = |disk: &Disk| disk.layers()[0].image.info().clone();
    assert_eq!(told(&disk).identity, first);
    write(&disk, 100, &[1; 100]).unwrap();
    assert_eq!(marks(), [1, 1, 1]);
    let second = identity();
    assert_eq!(told(&disk).identity, second, "the open disk tells what stands in the file");
    let cid = told(&disk).properties.into_iter().find(|property| property.name == "CID").unwrap();
    assert_eq!(cid.value, format!("{:08x}", second.cid.unwrap()).into());
    assert!(second.cid != first.cid && second.modification != first.modification);
    assert_eq!(second.uuid, first.uuid);
    let (unclean, notes) = open_noting(&files, "d.vmdk");
    drop(unclean);
    assert!(notes.iter().any(|note| note.contains("not closed cleanly")), "{notes:?}");
    write(&disk, 1 << 20, &[1; 100]).unwrap();
    disk.flush_all().wait().unwrap();
    assert_eq!(identity(), second);
    disk.close().wait().unwrap();
    assert_eq!((marks(), identity()), (vec![0, 0, 0], second));
    let disk = open_rw(&files, "d.vmdk", 2).unwrap();
    write(&disk, 100, &[1; 100]).unwrap();
    disk.close().wait().unwrap();
    assert_ne!(identity().cid, second.cid);
    // Nothing was written: nothing changed.
    let third = identity();
    open_rw(&files, "d.vmdk", 3).unwrap().close().wait().unwrap();
    assert_eq!(identity(), third);
}

#[test]
fn freed_grains_are_used_again_after_a_flush_and_the_file_is_cut() {
    let files = MemoryFiles::new();
    create(&files, "d.vmdk", 4 << 20, &[]);
    let len = || files.get("d.vmdk").unwrap().to_vec().len();
    let disk = open_rw(&files, "d.vmdk", 1).unwrap();
    write(&disk, 0, &[1; 1 << 20]).unwrap();
    disk.close().wait().unwrap();
    let full = len();
    let disk = open_rw(&files, "d.vmdk", 2).unwrap();
    disk.discard_range(0..512 << 10).wait().unwrap();
    disk.flush_all().wait().unwrap();
    write(&disk, 2 << 20, &[2; 512 << 10]).unwrap();
    disk.close().wait().unwrap();
    assert_eq!(len(), full);
    let disk = open_rw(&files, "d.vmdk", 3).unwrap();
    // In pieces smaller than a grain, out of order.
    for part in [2u64, 0, 3, 1] {
        disk.discard_range((2 << 20) + part * 16_384..(2 << 20) + (part + 1) * 16_384).wait().unwrap();
    }
    disk.discard_range((2 << 20) + 65_536..4 << 20).wait().unwrap();
    disk.discard_range(512 << 10..1 << 20).wait().unwrap();
    disk.close().wait().unwrap();
    assert_eq!(read(&disk, 0, 4 << 20).unwrap(), vec![0; 4 << 20]);
    assert_eq!(len(), full - (1 << 20));
    let report = check(&files, "d.vmdk", true);
    assert!(report.is_clean() && report.allocated_bytes == 0, "{:?}", findings(&report));
}

#[test]
fn zeros_in_a_child_never_become_the_parents_data() {
    for options in [&[][..], &[("zeroed_grain", "on")]] {
        let files = MemoryFiles::new();
        create(&files, "base.vmdk", 1 << 20, &[]);
        let disk = open_rw(&files, "base.vmdk", 1).unwrap();
        write(&disk, 0, &[0xaa; 1 << 20]).unwrap();
        disk.close().wait().unwrap();
        create_child(&files, "top.vmdk", 1 << 20, options, Some("base.vmdk")).unwrap();
        let disk = open_rw(&files, "top.vmdk", 2).unwrap();
        write(&disk, 0, &vec![0; 200_000]).unwrap();
        disk.write_zeroes(300_000..500_000, vellum_core::ZeroMode::MayUnmap).wait().unwrap();
        disk.discard_range(600_000..800_000).wait().unwrap();
        let before = read(&disk, 0, 1 << 20).unwrap();
        disk.close().wait().unwrap();
        let after = read(&open(&files, "top.vmdk").unwrap(), 0, 1 << 20).unwrap();
        assert!(before == after);
        assert!(
            after[..200_000].iter().all(|b| *b == 0) && after[200_000..300_000].iter().all(|b| *b == 0xaa)
        );
        assert!(after[300_000..500_000].iter().all(|b| *b == 0));
    }
}

#[test]
fn flags_decide_what_is_stored() {
    let files = MemoryFiles::new();
    create(&files, "base.vmdk", 1 << 20, &[]);
    let disk = open_rw(&files, "base.vmdk", 1).unwrap();
    write(&disk, 0, &[0xaa; 65_536]).unwrap();
    disk.close().wait().unwrap();
    for (honor, expected) in [(false, 0), (true, 2 * 65_536)] {
        let name = format!("top{honor}.vmdk");
        create_child(&files, &name, 1 << 20, &[], Some("base.vmdk")).unwrap();
        let flags = OpenFlags { honor_zeroes: honor, honor_same: honor, ..OpenFlags::default() };
        let options = writing(1, flags);
        let disk = vellum_conformance::format::open_with(&formats(), &files, &name, &options).unwrap();
        write(&disk, 0, &[0xaa; 65_536]).unwrap();
        write(&disk, 1 << 19, &[0; 65_536]).unwrap();
        disk.close().wait().unwrap();
        assert_eq!(check(&files, &name, false).allocated_bytes, expected);
    }
}
