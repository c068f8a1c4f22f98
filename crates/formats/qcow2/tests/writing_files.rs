//! Writing into files of this machine, from many threads, through every I/O driver; QEMU's tools judge.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use vellum_core::{
    Buf, ChainOptions, Disk, Format, FormatRegistry, OpenFlags, Resolver, Storage, WriteAccess, WriteFlags,
    ZeroMode, block_on,
};
use vellum_format_qcow2::Qcow2;
use vellum_format_raw::Raw;
use vellum_io::{Driver, FilePolicy, LocalFiles, OpenOptions};
use vellum_sim::Random;

const THREADS: u64 = 8;
/// Threads work on strips of their own, which cut clusters in pieces.
const STRIP: u64 = 24 << 10;
const STRIPS: u64 = 40;

fn run(dir: &Path, line: &str) -> String {
    let mut words = line.split_whitespace();
    let tool = words.next().expect("a command");
    let output = Command::new(tool).args(words).current_dir(dir).output();
    let output = output.unwrap_or_else(|e| panic!("{tool}: {e} (Debian: qemu-utils)"));
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}\n{text}");
    text
}

/// Random writes, zeros and discards of one thread; returns what its strips hold then. What was discarded and not
/// written again may become zeros at any later time, when neighbours have discarded the rest of the cluster: it is
/// looked at when all threads are done.
fn work(disk: &Disk, thread: u64, mine: &mut [Vec<u8>]) -> BTreeSet<u64> {
    let mut open = BTreeSet::new();
    let mut random = Random::new(thread + 1);
    for step in 0..400u64 {
        let strip = random.below(STRIPS);
        let first = random.below(STRIP / 512);
        let len = ((1 + random.below(24)) * 512).min(STRIP - first * 512);
        let (from, to) = ((first * 512) as usize, (first * 512 + len) as usize);
        let at = (strip * THREADS + thread) * STRIP + first * 512;
        let part = &mut mine[strip as usize][from..to];
        match random.below(10) {
            0..=6 => {
                part.fill((step + thread) as u8 | 1);
                open.retain(|sector| !(at..at + len).contains(sector));
                disk.write(Buf::copy_of(part), at, WriteFlags::default()).wait().1.unwrap();
            }
            7 => {
                part.fill(0);
                open.retain(|sector| !(at..at + len).contains(sector));
                disk.write_zeroes(at..at + len, ZeroMode::MayUnmap).wait().unwrap();
            }
            8 => {
                disk.discard_range(at..at + len).wait().unwrap();
                open.extend((at..at + len).step_by(512));
            }
            _ => disk.flush_all().wait().unwrap(),
        }
    }
    open
}

#[test]
fn threads_on_real_files() {
    let size = THREADS * STRIP * STRIPS;
    let content: Vec<u8> = (0..size).map(|i| (i / 3000 % 251) as u8).collect();
    let at = |strip: u64, thread: u64| {
        let from = ((strip * THREADS + thread) * STRIP) as usize;
        from..from + STRIP as usize
    };
    for (driver, made) in [
        (Driver::Pool, "qemu-img convert -O qcow2 base.raw disk.img"),
        (Driver::Pool, "qemu-img convert -c -O qcow2 -o cluster_size=4k base.raw disk.img"),
        (Driver::Inline, "qemu-img create -q -f qcow2 -F raw -b base.raw -o extended_l2=on disk.img"),
        (Driver::Pool, "qemu-img create -q -f qcow2 -F raw -b base.raw -o cluster_size=8k disk.img"),
        (Driver::Uring, "qemu-img create -q -f qcow2 -F raw -b base.raw -o extended_l2=on disk.img"),
        (Driver::Uring, "qemu-img convert -O qcow2 -o data_file=disk.data base.raw disk.img"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("base.raw"), &content).unwrap();
        run(dir.path(), made);
        let files = LocalFiles::new(FilePolicy::default(), OpenOptions { driver, ..OpenOptions::default() });
        let resolver: Arc<dyn Resolver> = Arc::new(files);
        let mut options = ChainOptions { write: WriteAccess::Yes, ..ChainOptions::default() };
        options.disk.flags = OpenFlags { discard: true, ..OpenFlags::default() };
        let registry = FormatRegistry::new(vec![Arc::new(Qcow2) as Arc<dyn Format>, Arc::new(Raw)]);
        let path = dir.path().join("disk.img").display().to_string();
        let (disk, _) = block_on(registry.open_chain(&resolver, &path, &options)).unwrap();
        let mut model = content.clone();
        let mut open = BTreeSet::new();
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let mut mine: Vec<Vec<u8>> =
                        (0..STRIPS).map(|strip| content[at(strip, thread)].to_vec()).collect();
                    let disk = disk.clone();
                    scope.spawn(move || {
                        let open = work(&disk, thread, &mut mine);
                        (mine, open)
                    })
                })
                .collect();
            for (thread, worker) in workers.into_iter().enumerate() {
                let (mine, more) = worker.join().unwrap();
                open.extend(more);
                for (strip, bytes) in mine.into_iter().enumerate() {
                    model[at(strip as u64, thread as u64)].copy_from_slice(&bytes);
                }
            }
        });
        for sector in open {
            let part = &mut model[sector as usize..sector as usize + 512];
            let (buf, result) = disk.read_at(Buf::zeroed(512), sector).wait();
            result.unwrap();
            assert!(buf[..] == *part || buf.iter().all(|b| *b == 0), "{made}: foreign data at {sector}");
            part.copy_from_slice(&buf);
        }
        disk.close().wait().unwrap();
        drop(disk);
        std::fs::write(dir.path().join("model.raw"), &model).unwrap();
        let check = run(dir.path(), "qemu-img check -f qcow2 disk.img");
        assert!(check.contains("No errors were found"), "{made}: {check}");
        run(dir.path(), "qemu-img convert -f qcow2 -O raw disk.img found.raw");
        let found = std::fs::read(dir.path().join("found.raw")).unwrap();
        let difference = found.iter().zip(&model).position(|(a, b)| a != b);
        assert_eq!(difference, None, "{made}");
        let compare = run(dir.path(), "qemu-img compare -f qcow2 -F raw disk.img model.raw");
        assert!(compare.contains("Images are identical"), "{made}: {compare}");
        assert!(std::fs::read(dir.path().join("base.raw")).unwrap() == content, "the parent is unchanged");
    }
}
