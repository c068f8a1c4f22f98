//! What writing refuses, what it warns of, and that threads do not get in each other's way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use vellum_conformance::format::{Recipe, pattern};
use vellum_conformance::writing::create;
use vellum_core::{
    Buf, ChainOptions, Code, Disk, Events, Format, FormatRegistry, Resolver, Result, Storage, WriteAccess,
    WriteFlags, block_on,
};
use vellum_format_qcow2::Qcow2;
use vellum_sim::MemoryFiles;

fn qcow2() -> Arc<dyn Format> {
    Arc::new(Qcow2)
}

fn new_image(recipe: &Recipe, size: u64) -> Arc<MemoryFiles> {
    let files = MemoryFiles::new();
    create(&qcow2(), &files, "disk.img", recipe, size, None).unwrap();
    files
}

fn open(files: &Arc<MemoryFiles>, options: ChainOptions) -> Result<Disk> {
    let resolver: Arc<dyn Resolver> = files.clone();
    let options = ChainOptions { write: WriteAccess::Yes, ..options };
    block_on(FormatRegistry::new(vec![qcow2()]).open_chain(&resolver, "disk.img", &options)).map(|(d, _)| d)
}

fn write(disk: &Disk, offset: u64, len: usize) -> Result<()> {
    disk.write(Buf::copy_of(&pattern(offset, len)), offset, WriteFlags::default()).wait().1
}

fn put(files: &Arc<MemoryFiles>, offset: u64, bytes: &[u8]) {
    let file = files.get("disk.img").unwrap();
    file.write_at(Buf::copy_of(bytes), offset, WriteFlags::default()).wait().1.unwrap();
}

fn be64(files: &Arc<MemoryFiles>, offset: usize) -> u64 {
    u64::from_be_bytes(files.get("disk.img").unwrap().to_vec()[offset..offset + 8].try_into().unwrap())
}

#[test]
fn a_corrupt_image_is_not_written_unless_asked() {
    for bits in [2u64, 3] {
        let files = new_image(&Recipe::default(), 1 << 20);
        put(&files, 72, &bits.to_be_bytes());
        let before = files.get("disk.img").unwrap().to_vec();
        let error = open(&files, ChainOptions::default()).err().expect("refused");
        assert_eq!(error.code(), Code::CorruptFlag);
        assert!(error.hint_text().unwrap().contains("vellum repair"), "{error}");
        assert!(files.get("disk.img").unwrap().to_vec() == before, "a refused opening changes nothing");
        let asked = ChainOptions { skip_consistency_checks: true, ..ChainOptions::default() };
        let disk = open(&files, asked).unwrap();
        write(&disk, 0, 512).unwrap();
        disk.close().wait().unwrap();
        assert_eq!(be64(&files, 72), bits, "marks stay");
    }
}

#[test]
fn a_dirty_image_is_counted_anew_before_the_first_write() {
    let files = new_image(&Recipe::options(&[("lazy_refcounts", "on")]), 1 << 20);
    let disk = open(&files, ChainOptions::default()).unwrap();
    write(&disk, 0, 300_000).unwrap();
    disk.close().wait().unwrap();
    // As after a crash of a writer that postpones refcounts.
    let block = be64(&files, be64(&files, 48) as usize);
    put(&files, block + 8, &[0; 56]);
    put(&files, 72, &1u64.to_be_bytes());
    let before = files.get("disk.img").unwrap().to_vec();
    let disk = open(&files, ChainOptions::default()).unwrap();
    assert!(files.get("disk.img").unwrap().to_vec() == before, "opening changes nothing");
    write(&disk, 500_000, 300_000).unwrap();
    disk.close().wait().unwrap();
    assert_eq!(be64(&files, 72), 0);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::write(&path, files.get("disk.img").unwrap().to_vec()).unwrap();
    let check = std::process::Command::new("qemu-img").arg("check").arg(&path).output().unwrap();
    let text = String::from_utf8_lossy(&check.stdout);
    assert!(text.contains("No errors were found"), "{text}");
}

#[test]
fn opening_for_writing_changes_nothing_and_the_first_write_clears_autoclear_bits() {
    let files = new_image(&Recipe::default(), 1 << 20);
    put(&files, 88, &(1u64 << 40 | 1).to_be_bytes());
    let before = files.get("disk.img").unwrap().to_vec();
    let disk = open(&files, ChainOptions::default()).unwrap();
    disk.flush_all().wait().unwrap();
    disk.close().wait().unwrap();
    assert!(files.get("disk.img").unwrap().to_vec() == before);
    let disk = open(&files, ChainOptions::default()).unwrap();
    write(&disk, 4096, 512).unwrap();
    assert_eq!(be64(&files, 88), 0);
    disk.close().wait().unwrap();
}

#[test]
fn dropped_bitmaps_are_told_loudly() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img").display().to_string();
    for words in [&["create", "-f", "qcow2", &path, "4M"][..], &["bitmap", "--add", &path, "b0"]] {
        assert!(std::process::Command::new("qemu-img").args(words).output().unwrap().status.success());
    }
    let files = MemoryFiles::new();
    files.put("disk.img", &std::fs::read(&path).unwrap());
    assert_eq!(be64(&files, 88), 1);
    let warned = Arc::new(AtomicUsize::new(0));
    let sink = warned.clone();
    let events = Events::new(move |text| {
        sink.fetch_add(usize::from(text.contains("bitmaps")), Ordering::Relaxed);
    });
    let disk = open(&files, ChainOptions { events, ..ChainOptions::default() }).unwrap();
    assert_eq!(warned.load(Ordering::Relaxed), 0);
    write(&disk, 0, 512).unwrap();
    disk.close().wait().unwrap();
    assert_eq!((warned.load(Ordering::Relaxed), be64(&files, 88)), (1, 1));
    std::fs::write(&path, files.get("disk.img").unwrap().to_vec()).unwrap();
    let run = |words: &[&str]| {
        let output = std::process::Command::new("qemu-img").args(words).arg(&path).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(run(&["check"]).contains("No errors were found"));
    assert!(run(&["info"]).contains("in-use"), "QEMU does not trust the bitmap either");
}

#[test]
fn guest_data_never_goes_over_a_table() {
    // Where a fresh image's tables stand: found through the header.
    for table in ["header", "l1", "refcount table", "refcount block", "own l2"] {
        let files = new_image(&Recipe::default(), 1 << 20);
        let disk = open(&files, ChainOptions::default()).unwrap();
        write(&disk, 0, 65536).unwrap();
        disk.close().wait().unwrap();
        drop(disk);
        let (l1, refcounts) = (be64(&files, 40), be64(&files, 48));
        let l2 = be64(&files, l1 as usize) & 0x00ff_ffff_ffff_fe00;
        let target = match table {
            // Offset 0 means "nothing": the header can only be named by an offset inside it.
            "header" => 512,
            "l1" => l1,
            "refcount table" => refcounts,
            "refcount block" => be64(&files, refcounts as usize),
            _ => l2,
        };
        put(&files, l2, &(target | 1 << 63).to_be_bytes());
        let before = files.get("disk.img").unwrap().to_vec();
        let disk = open(&files, ChainOptions::default()).unwrap();
        let error = write(&disk, 4096, 512).expect_err("refused");
        assert!(matches!(error.code(), Code::Overlap | Code::Misaligned), "{table}: {error}");
        assert!(disk.flush_all().wait().is_err() || table == "header", "{table}");
        let after = files.get("disk.img").unwrap().to_vec();
        assert!(before[80..] == after[80..], "{table}: nothing but the mark changed");
        if table != "header" {
            assert_eq!(be64(&files, 72), 2, "{table}: marked corrupt");
        }
    }
}

#[test]
fn refcounts_that_call_a_table_free_stop_the_writer() {
    let files = new_image(&Recipe::default(), 1 << 20);
    let block = be64(&files, be64(&files, 48) as usize);
    put(&files, block, &[0; 64]);
    let disk = open(&files, ChainOptions::default()).unwrap();
    let error = write(&disk, 0, 512).expect_err("refused");
    assert_eq!(error.code(), Code::Corrupt, "{error}");
}

#[test]
fn a_hundred_writers_at_once() {
    for options in [&[("cluster_size", "4k")][..], &[("extended_l2", "on"), ("cluster_size", "16k")]] {
        let files = new_image(&Recipe::options(options), 16 << 20);
        let disk = open(&files, ChainOptions::default()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let disk = disk.clone();
                scope.spawn(move || {
                    for step in 0..128u64 {
                        // Neighbours share clusters, so that they meet in reserve and copy-on-write.
                        let offset = (step * 8 + thread) * 1536;
                        write(&disk, offset, 1536).unwrap();
                        if step % 16 == thread {
                            disk.flush_all().wait().unwrap();
                        }
                    }
                });
            }
        });
        disk.close().wait().unwrap();
        let resolver: Arc<dyn Resolver> = files.clone();
        let registry = FormatRegistry::new(vec![qcow2()]);
        let (disk, _) =
            block_on(registry.open_chain(&resolver, "disk.img", &ChainOptions::default())).unwrap();
        for piece in 0..1024u64 {
            let (buf, result) = disk.read_at(Buf::zeroed(1536), piece * 1536).wait();
            result.unwrap();
            assert!(buf[..] == pattern(piece * 1536, 1536)[..], "piece {piece}");
        }
    }
}

#[test]
fn an_entry_that_points_at_its_own_large_table_is_refused() {
    // An L2 table of 2 MiB has 32 pages; only the one in use is in memory.
    let files = new_image(&Recipe::options(&[("cluster_size", "2M")]), 256 << 30);
    let disk = open(&files, ChainOptions::default()).unwrap();
    let guest = 100 << 30;
    write(&disk, guest, 512).unwrap();
    disk.close().wait().unwrap();
    drop(disk);
    let l1 = be64(&files, 40);
    let l2 = be64(&files, l1 as usize) & 0x00ff_ffff_ffff_fe00;
    put(&files, l2 + (guest >> 21) * 8, &(l2 | 1 << 63).to_be_bytes());
    let disk = open(&files, ChainOptions::default()).unwrap();
    let error = write(&disk, guest, 512).expect_err("refused");
    assert_eq!(error.code(), Code::Overlap, "{error}");
}
