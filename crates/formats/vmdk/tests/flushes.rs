//! What writing costs: a guest flush at most two flushes of each file, a guest write none; and many writers at once.

mod common;

use common::model::*;
use common::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vellum_core::{
    Access, Asker, Buf, Completion, Disk, Error, FormatRegistry, Location, OpenFlags, Opened, Preallocate,
    Resolver, Status, Storage, StorageLimits, WithBuf, WriteFlags, ZeroMode, block_on,
};
use vellum_sim::MemoryFiles;

/// Counts the flushes of a file.
struct Counted(Arc<dyn Storage>, Arc<AtomicU64>);

impl Storage for Counted {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn len(&self) -> Result<u64, Error> {
        self.0.len()
    }
    fn limits(&self) -> StorageLimits {
        self.0.limits()
    }
    fn read_at(&self, buf: Buf, offset: u64) -> Completion<WithBuf> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: Buf, offset: u64, flags: WriteFlags) -> Completion<WithBuf> {
        self.0.write_at(buf, offset, flags)
    }
    fn flush(&self) -> Completion<Result<(), Error>> {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.flush()
    }
    fn zero(&self, range: std::ops::Range<u64>, mode: ZeroMode) -> Completion<Result<(), Error>> {
        self.0.zero(range, mode)
    }
    fn discard(&self, range: std::ops::Range<u64>) -> Completion<Result<(), Error>> {
        self.0.discard(range)
    }
    fn status(
        &self,
        range: std::ops::Range<u64>,
    ) -> Completion<Result<Vec<(std::ops::Range<u64>, Status)>, Error>> {
        self.0.status(range)
    }
    fn set_len(&self, len: u64, preallocate: Preallocate) -> Completion<Result<(), Error>> {
        self.0.set_len(len, preallocate)
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Files whose flushes are counted together.
struct CountedFiles(Arc<MemoryFiles>, Arc<AtomicU64>);

impl Resolver for CountedFiles {
    fn open(&self, name: &str, asker: &Asker, access: Access) -> Completion<Result<Opened, Error>> {
        let opened = self.0.open(name, asker, access).wait();
        Completion::ready(opened.map(|Opened { storage, location }| {
            let storage: Arc<dyn Storage> = Arc::new(Counted(storage, self.1.clone()));
            Opened { storage, location }
        }))
    }
    fn create(&self, location: &Location, replace: bool) -> Completion<Result<Arc<dyn Storage>, Error>> {
        self.0.create(location, replace)
    }
    fn rename(&self, from: &Location, to: &Location) -> Completion<Result<(), Error>> {
        self.0.rename(from, to)
    }
    fn delete(&self, location: &Location) -> Completion<Result<(), Error>> {
        self.0.delete(location)
    }
    fn exists(&self, location: &Location) -> Completion<Result<bool, Error>> {
        self.0.exists(location)
    }
    fn sync_directory(&self, location: &Location) -> Completion<Result<(), Error>> {
        self.0.sync_directory(location)
    }
    fn siblings(&self, location: &Location) -> Completion<Result<Vec<Location>, Error>> {
        self.0.siblings(location)
    }
    fn beside(&self, location: &Location, file_name: &str) -> Location {
        self.0.beside(location, file_name)
    }
    fn file_name(&self, location: &Location) -> String {
        self.0.file_name(location)
    }
}

fn counted(options: &[(&'static str, &str)], size: u64) -> (Disk, Arc<AtomicU64>, Arc<MemoryFiles>) {
    let files = MemoryFiles::new();
    create(&files, "d.vmdk", size, options);
    let flushes = Arc::new(AtomicU64::new(0));
    let resolver: Arc<dyn Resolver> = Arc::new(CountedFiles(files.clone(), flushes.clone()));
    let flags = OpenFlags { discard: true, ..OpenFlags::default() };
    let registry = FormatRegistry::new(formats());
    let disk = block_on(registry.open_chain(&resolver, "d.vmdk", &writing(1, flags))).unwrap().0;
    (disk, flushes, files)
}

#[test]
fn a_guest_flush_costs_two_flushes_and_a_guest_write_none() {
    for (options, files) in [
        (&[][..], 1),
        (&[("zeroed_grain", "on")], 1),
        (&[("subformat", "monolithicFlat")], 1),
        (&[("subformat", "twoGbMaxExtentSparse"), ("extent_size", "4M")], 4),
    ] {
        let (disk, flushes, _) = counted(options, 16 << 20);
        let cost = |what: &dyn Fn()| {
            let before = flushes.load(Ordering::SeqCst);
            what();
            flushes.load(Ordering::SeqCst) - before
        };
        let begin = cost(&|| write(&disk, 0, &[1; 512]).unwrap());
        assert!(begin <= files + 1, "{options:?}: beginning costs {begin}");
        let writes = cost(&|| {
            for at in 0..200u64 {
                write(&disk, (at * 77_777) % (16 << 20), &[at as u8 + 1; 300]).unwrap();
            }
            disk.discard_range(1 << 20..3 << 20).wait().unwrap();
        });
        assert_eq!(writes, 0, "{options:?}");
        let flush = cost(&|| disk.flush_all().wait().unwrap());
        assert!(flush <= 2 * files, "{options:?}: {flush}");
        let in_place = cost(&|| {
            write(&disk, 0, &[9; 512]).unwrap();
            disk.flush_all().wait().unwrap();
        });
        assert!(in_place <= files, "{options:?}: {in_place}");
        // One extent of many has new grains: the others are flushed for their data only.
        let one = cost(&|| {
            write(&disk, (2 << 20) + 1000, &[7; 10]).unwrap();
            disk.flush_all().wait().unwrap();
        });
        assert!(one <= files + 1, "{options:?}: {one}");
        disk.close().wait().unwrap();
    }
}

#[test]
fn many_writers_at_once_lose_nothing() {
    for options in [&[][..], &[("zeroed_grain", "on"), ("grain_size", "4096")], &[("grain_size", "256k")]] {
        let files = MemoryFiles::new();
        let size = 8usize << 20;
        create(&files, "d.vmdk", size as u64, options);
        let mut expected = vec![0u8; size];
        for round in 0..2u8 {
            let disk = open_rw(&files, "d.vmdk", round.into()).unwrap();
            std::thread::scope(|scope| {
                for writer in 0..4u64 {
                    let disk = disk.clone();
                    scope.spawn(move || {
                        let mut random = Random(writer + 17);
                        for step in 0..300u64 {
                            // Each writer has every fourth block of 3000 bytes.
                            let block = random.below(size as u64 / 3000 / 4) * 4 + writer;
                            write(&disk, block * 3000, &[(block % 250) as u8 + 1 + round; 3000]).unwrap();
                            if step % 37 == 0 {
                                disk.flush_all().wait().unwrap();
                            }
                        }
                    });
                }
            });
            for writer in 0..4u64 {
                let mut random = Random(writer + 17);
                for _ in 0..300u64 {
                    let block = (random.below(size as u64 / 3000 / 4) * 4 + writer) as usize;
                    expected[block * 3000..(block + 1) * 3000].fill((block % 250) as u8 + 1 + round);
                }
            }
            disk.close().wait().unwrap();
            let disk = open(&files, "d.vmdk").unwrap();
            assert!(vellum_conformance::format::read_all(&disk) == expected, "{options:?}");
            let report = check(&files, "d.vmdk", true);
            assert!(report.is_clean(), "{:?}", findings(&report));
        }
    }
}
