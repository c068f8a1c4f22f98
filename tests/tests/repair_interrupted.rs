//! Repairs that are interrupted at any write, flush or change of length, and undone; undoing that is interrupted, too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vellum::{
    Buf, ChainOptions, Code, CreateDiskRequest, Error, Quiet, RepairChoice, Resolver, Result, Storage,
    Vellum, WriteFlags,
};
use vellum_sim::MemoryFiles;
use vellum_tests::disks::noise;
use vellum_tests::wrap::{Hook, Op, Wrapped};

const IMAGE: &str = "d/image";
const ALL: RepairChoice = RepairChoice { leaks_only: false, lossy: true };

/// The power goes after so many changes: the next is torn in the middle, and nothing works any more.
struct PowerLoss {
    left: AtomicU64,
    files: Arc<MemoryFiles>,
}

impl PowerLoss {
    fn after(changes: u64, files: &Arc<MemoryFiles>) -> Arc<Self> {
        Arc::new(PowerLoss { left: AtomicU64::new(changes + 1), files: files.clone() })
    }

    fn is_over(&self) -> bool {
        self.left.load(Ordering::Relaxed) == 0
    }
}

impl Hook for PowerLoss {
    fn before(&self, _file: &str, op: &Op) -> Result<()> {
        let changes = !matches!(op, Op::Read(_));
        let left = self.left.load(Ordering::Relaxed);
        let now = if changes { left.saturating_sub(1) } else { left };
        self.left.store(now, Ordering::Relaxed);
        match now {
            0 => Err(Error::new(Code::Io, "the power is gone")),
            _ => Ok(()),
        }
    }

    fn falsify(&self, file: &str, offset: u64, bytes: &mut [u8]) {
        if self.left.load(Ordering::Relaxed) != 1 || bytes.len() <= 512 {
            return;
        }
        // The last write that is still carried out keeps whole sectors of what was there.
        let Some(storage) = self.files.get(file) else { return };
        let old = content(storage.as_ref());
        for at in (512..bytes.len()).step_by(1024) {
            let end = (at + 512).min(bytes.len());
            let from = offset as usize + at;
            match old.get(from..from + (end - at)) {
                Some(old) => bytes[at..end].copy_from_slice(old),
                None => bytes[at..end].fill(0),
            }
        }
    }
}

fn content(storage: &dyn Storage) -> Vec<u8> {
    let (buf, result) = storage.read_at(Buf::zeroed(storage.len().unwrap() as usize), 0).wait();
    result.unwrap();
    buf.to_vec()
}

fn image(files: &MemoryFiles) -> Vec<u8> {
    content(files.get(IMAGE).unwrap().as_ref())
}

fn backup(files: &MemoryFiles) -> Option<String> {
    files.paths().into_iter().find(|path| path.contains(".vellum-backup-"))
}

/// An image of `format` with data, damaged by `damage`.
fn damaged(format: &str, damage: fn(&mut Vec<u8>)) -> Vec<u8> {
    let files = MemoryFiles::new();
    let vellum = Vellum::new(files.clone());
    vellum
        .create(&CreateDiskRequest {
            target: IMAGE.into(),
            format: format.into(),
            virtual_size: 16 << 20,
            reproducible: true,
            ..CreateDiskRequest::default()
        })
        .unwrap();
    let (disk, _) = vellum.open_for_writing(IMAGE, &ChainOptions::default()).unwrap();
    for (index, offset) in [0u64, 3 << 20, 9 << 20].into_iter().enumerate() {
        let data = Buf::copy_of(&noise(index as u64, 300_000));
        disk.write(data, offset, WriteFlags::default()).wait().1.unwrap();
    }
    disk.close().wait().unwrap();
    let mut bytes = image(&files);
    damage(&mut bytes);
    bytes
}

fn be64(bytes: &[u8], at: usize) -> usize {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

/// Counts of a qcow2 that are wrong in both directions.
fn wrong_refcounts(bytes: &mut Vec<u8>) {
    let block = be64(bytes, be64(bytes, 48));
    let clusters = bytes.len() / 65536;
    bytes.resize((clusters + 3) * 65536, 0x77);
    bytes[block + 2 * (clusters + 1) + 1] = 1;
    bytes[block + 2 * (clusters - 1) + 1] = 0;
    bytes[block + 2 * (clusters - 2) + 1] = 3;
}

/// A map entry of a VDI that points past the end, and space at the end that belongs to nobody.
fn wrong_map(bytes: &mut Vec<u8>) {
    let map = u32::from_le_bytes(bytes[0x154..0x158].try_into().unwrap()) as usize;
    bytes[map + 12..map + 16].copy_from_slice(&0x1234u32.to_le_bytes());
    bytes.resize(bytes.len() + (2 << 20), 0x77);
}

/// A VHD that lost its footer.
#[allow(clippy::ptr_arg)] // a Damage
fn lost_footer(bytes: &mut Vec<u8>) {
    let end = bytes.len();
    bytes[end - 512..].fill(0);
}

fn le32(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

/// A block of a VDI that no guest block names any more, between others.
#[allow(clippy::ptr_arg)] // a Damage
fn hole_in_map(bytes: &mut Vec<u8>) {
    let map = le32(bytes, 0x154);
    bytes[map + 12..map + 16].fill(0xff);
}

/// The same in a VHD.
#[allow(clippy::ptr_arg)] // a Damage
fn hole_in_bat(bytes: &mut Vec<u8>) {
    let bat = be64(bytes, 0x210);
    assert_ne!(bytes[bat + 4..bat + 8], [0xff; 4]);
    bytes[bat + 4..bat + 8].fill(0xff);
}

/// Two grains of a VMDK, which was not closed cleanly either.
#[allow(clippy::ptr_arg)] // a Damage
fn hole_in_tables(bytes: &mut Vec<u8>) {
    for directory in [48, 56] {
        let table = le32(bytes, le32(bytes, directory) * 512) * 512;
        assert_ne!(le32(bytes, table + 48 * 4), 0);
        bytes[table + 48 * 4..table + 50 * 4].fill(0);
    }
    bytes[72] = 1;
}

/// Damages the bytes of an image, which may grow.
type Damage = fn(&mut Vec<u8>);

const CASES: [(&str, Damage); 6] = [
    ("qcow2", wrong_refcounts),
    ("vdi", wrong_map),
    ("vhd", lost_footer),
    ("vdi", hole_in_map),
    ("vhd", hole_in_bat),
    ("vmdk", hole_in_tables),
];

/// Repairs over files of which the power goes after `changes`; whether it went.
fn repair(files: &Arc<MemoryFiles>, changes: u64) -> (bool, Result<bool>) {
    let loss = PowerLoss::after(changes, files);
    let resolver: Arc<dyn Resolver> = Wrapped::over(files.clone(), loss.clone());
    let vellum = Vellum::new(resolver);
    let plan = vellum.plan_repair(IMAGE, &ChainOptions::default(), true);
    let repaired = plan.and_then(|plan| plan.carry_out(ALL, &Quiet)).map(|done| done.after.errors == 0);
    (loss.is_over(), repaired)
}

#[test]
fn an_interrupted_repair_can_be_undone_or_repeated() {
    for (format, damage) in CASES {
        let before = damaged(format, damage);
        let (mut undone, mut unchanged) = (0, 0);
        for changes in 0.. {
            let files = MemoryFiles::new();
            files.put(IMAGE, &before);
            let (is_over, repaired) = repair(&files, changes);
            if !is_over {
                assert!(repaired.unwrap(), "{format}: there are no errors if it was not interrupted");
                assert!(changes > 5, "{format}");
                break;
            }
            let at = format!("{format} after {changes} changes");
            let vellum = Vellum::new(files.clone());
            let interrupted = image(&files);
            match backup(&files) {
                Some(backup) => {
                    match vellum.undo_repair(IMAGE, &backup) {
                        Ok(_) => undone += 1,
                        // Not complete: then the repair had not begun.
                        Err(error) => {
                            assert_eq!(error.code(), Code::JournalMismatch, "{at}: {error}");
                            unchanged += 1;
                        }
                    }
                    assert!(image(&files) == before, "{at}");
                }
                None => assert!(image(&files) == before, "{at}"),
            }
            // Or one goes on.
            files.put(IMAGE, &interrupted);
            let (_, repaired) = repair(&files, u64::MAX - 1);
            assert!(repaired.unwrap_or_else(|error| panic!("{at}: {error:?}")), "{at}");
        }
        println!("{format}: {undone} states undone, {unchanged} not begun");
        assert!(undone > 0, "{format}");
    }
}

#[test]
fn undoing_that_is_interrupted_can_be_repeated() {
    for (format, damage) in CASES {
        let before = damaged(format, damage);
        let files = MemoryFiles::new();
        files.put(IMAGE, &before);
        assert!(repair(&files, u64::MAX - 1).1.unwrap());
        let mended = image(&files);
        let backup = backup(&files).unwrap();
        for changes in 0.. {
            files.put(IMAGE, &mended);
            let loss = PowerLoss::after(changes, &files);
            let wrapped: Arc<dyn Resolver> = Wrapped::over(files.clone(), loss.clone());
            let first = Vellum::new(wrapped).undo_repair(IMAGE, &backup);
            assert_eq!(first.is_err(), loss.is_over(), "{format}");
            Vellum::new(files.clone()).undo_repair(IMAGE, &backup).unwrap();
            assert!(image(&files) == before, "{format} after {changes} changes");
            if !loss.is_over() {
                break;
            }
        }
    }
}

#[test]
fn an_image_that_was_written_to_is_not_undone() {
    for (format, damage) in CASES {
        let files = MemoryFiles::new();
        files.put(IMAGE, &damaged(format, damage));
        assert!(repair(&files, u64::MAX - 1).1.unwrap());
        let vellum = Vellum::new(files.clone());
        let (disk, _) = vellum.open_for_writing(IMAGE, &ChainOptions::default()).unwrap();
        let data = Buf::copy_of(&noise(9, 2 << 20));
        disk.write(data, 12 << 20, WriteFlags::default()).wait().1.unwrap();
        disk.close().wait().unwrap();
        let written = image(&files);
        let refused = vellum.undo_repair(IMAGE, &backup(&files).unwrap()).unwrap_err();
        assert_eq!(refused.code(), Code::Mismatch, "{format}: {refused}");
        assert!(image(&files) == written, "{format}");
    }
}
