//! Disks that are written in place, and what a reader may find in them: after success, after a failure, after a kill.

use crate::tools::text;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use vellum::{
    Buf, ChainOptions, Disk, FilePolicy, Quiet, RepairChoice, Result, Vellum, WriteFlags, ZeroMode, block_on,
};
use vellum_sim::{Random, mix};

/// What a disk writes whole.
pub const SECTOR: u64 = 512;
/// Size of the disks: no block of any format divides it.
pub const DISK_BYTES: u64 = (5 << 20) + 19 * SECTOR;

/// The formats and variants that can be written in place: name of [`crate::variants::variant`].
pub const WRITABLE: &[&str] = &[
    "raw",
    "vdi-dynamic",
    "vdi-fixed",
    "vhd-dynamic",
    "vhd-dynamic-exact",
    "vhd-fixed",
    "vmdk-sparse",
    "vmdk-flat",
    "vmdk-split-sparse",
    "vmdk-virtualbox",
    "qcow2-v2",
    "qcow2-v3",
    "qcow2-extended",
    "qcow2-data-file",
    "qcow2-512",
];

/// [`WRITABLE`], or those of them that `VELLUM_VARIANTS` names (divided by commas).
pub fn writable() -> Vec<&'static str> {
    let wanted = std::env::var("VELLUM_VARIANTS").ok();
    let is_wanted = |name: &&str| wanted.as_ref().is_none_or(|list| list.split(',').any(|one| one == *name));
    WRITABLE.iter().copied().filter(is_wanted).collect()
}

/// The content of a sector: 0 is zeros, anything else tells who wrote it.
pub type Tag = u64;

/// The bytes of a sector with this tag.
pub fn sector_bytes(tag: Tag, sector: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    if tag != 0 {
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&mix(mix(tag, sector), index as u64).to_le_bytes());
        }
    }
    bytes
}

/// One request of a guest. Ranges are in sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Writes.
    Write(Range<u64>, Tag),
    /// Zeroes.
    Zero(Range<u64>, ZeroMode),
    /// Discards.
    Discard(Range<u64>),
    /// Flushes.
    Flush,
}

impl Request {
    /// A request that `random` chooses; `tag` is what it writes. Every eighth is a flush, if `flushes`.
    pub fn random(random: &mut Random, sectors: u64, tag: Tag, flushes: bool) -> Self {
        // Now a few sectors, now several blocks; now anywhere, now where others were.
        let longest = *random.pick(&[1, 8, 200, 3000]);
        let len = 1 + random.below(longest);
        let start = match random.below(3) {
            0 => random.below(sectors),
            1 => random.below(64) * 128,
            _ => 2048 - random.below(16),
        };
        let range = start.min(sectors - 1)..(start + len).min(sectors);
        let range = range.start..range.end.max(range.start + 1);
        match random.below(16) {
            0 | 1 if flushes => Request::Flush,
            2 => Request::Zero(range, ZeroMode::MayUnmap),
            3 => Request::Zero(range, ZeroMode::KeepAllocated),
            4 | 5 => Request::Discard(range),
            _ => Request::Write(range, tag),
        }
    }

    /// Sends it and waits for the answer.
    pub fn perform(&self, disk: &Disk) -> Result<()> {
        let bytes = |range: &Range<u64>| range.start * SECTOR..range.end * SECTOR;
        match self {
            Request::Write(range, tag) => {
                let data: Vec<u8> = range.clone().flat_map(|sector| sector_bytes(*tag, sector)).collect();
                disk.write(Buf::copy_of(&data), range.start * SECTOR, WriteFlags::default()).wait().1
            }
            Request::Zero(range, mode) => disk.write_zeroes(bytes(range), *mode).wait(),
            Request::Discard(range) => disk.discard_range(bytes(range)).wait(),
            Request::Flush => disk.flush_all().wait(),
        }
    }
}

/// What each sector may hold.
#[derive(Clone, Debug)]
pub struct Model {
    sectors: Vec<Sector>,
}

#[derive(Clone, Debug)]
struct Sector {
    /// What a reader of the open disk may see.
    now: Vec<Tag>,
    /// What may be found when everything in memory was lost: what was there at the last flush, and all that came later.
    since: Vec<Tag>,
}

impl Model {
    /// A disk of zeros.
    pub fn new(sectors: u64) -> Self {
        let sector = Sector { now: vec![0], since: vec![0] };
        Model { sectors: vec![sector; sectors as usize] }
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// A request was answered.
    pub fn answered(&mut self, request: &Request, is_ok: bool) {
        let (range, tag, is_certain) = match request {
            Request::Write(range, tag) => (range, *tag, is_ok),
            Request::Zero(range, _) => (range, 0, is_ok),
            // Zeros or what was there.
            Request::Discard(range) => (range, 0, false),
            Request::Flush => {
                if is_ok {
                    self.sectors.iter_mut().for_each(|sector| sector.since.clone_from(&sector.now));
                }
                return;
            }
        };
        for sector in &mut self.sectors[range.start as usize..range.end as usize] {
            if is_certain {
                sector.now.clear();
            }
            for tags in [&mut sector.now, &mut sector.since] {
                if !tags.contains(&tag) {
                    tags.push(tag);
                }
            }
        }
    }

    /// Compares with the open disk; what is read is certain from now on.
    pub fn check_now(&mut self, disk: &Disk) -> std::result::Result<(), String> {
        let bytes = read(disk).map_err(|error| format!("reading: {error:?}"))?;
        for (number, sector) in self.sectors.iter_mut().enumerate() {
            let tag = found(&bytes, number as u64, &sector.now)?;
            sector.now = vec![tag];
        }
        Ok(())
    }

    /// Compares with the disk that was opened again after all in memory was lost; what is read is certain then.
    pub fn check_recovered(&mut self, disk: &Disk) -> std::result::Result<(), String> {
        let bytes = read(disk).map_err(|error| format!("reading: {error:?}"))?;
        for (number, sector) in self.sectors.iter_mut().enumerate() {
            let tag = found(&bytes, number as u64, &sector.since)?;
            *sector = Sector { now: vec![tag], since: vec![tag] };
        }
        Ok(())
    }
}

fn found(bytes: &[u8], number: u64, allowed: &[Tag]) -> std::result::Result<Tag, String> {
    let at = (number * SECTOR) as usize;
    let sector = &bytes[at..at + SECTOR as usize];
    allowed.iter().copied().find(|tag| sector == sector_bytes(*tag, number)).ok_or_else(|| {
        let what = if sector.iter().all(|byte| *byte == 0) { "zeros" } else { "something else" };
        format!("sector {number:#x} holds {what} ({:02x?}...), allowed are {allowed:x?}", &sector[..8])
    })
}

/// The whole disk.
pub fn read(disk: &Disk) -> Result<Vec<u8>> {
    let (buf, result) = block_on(disk.read(Buf::zeroed(disk.size() as usize), 0));
    result.map(|()| buf.to_vec())
}

/// Asks `qemu-img check`, where it can check the format. Leaks are allowed; errors are not, but for the one that no order of
/// writes can exclude (STATUS.md of the VDI driver): a VDI counts its blocks in the header, apart from the map, and after an
/// interruption the count may be ahead of the map. It is never behind it, and a repair of leaks sets it right.
pub fn qemu_check(format: &str, image: &Path, was_interrupted: bool, what: &str) {
    if !matches!(format, "qcow2" | "vmdk" | "vdi") {
        return;
    }
    let (code, said) = qemu_says(format, image);
    // It cannot check every variant.
    if matches!(code, Some(0 | 3)) || said.contains("does not support checks") {
        return;
    }
    let excused = format == "vdi" && was_interrupted && is_count_ahead(&said);
    assert!(excused, "{what}: qemu-img check: {said}");
    let mended = tempfile::tempdir().expect("a temporary directory");
    let copy = mended.path().join("copy.img");
    std::fs::copy(image, &copy).expect("copying an image");
    repair_leaks(format, &copy).unwrap_or_else(|error| panic!("{what}: repairing: {error:?}"));
    let (code, said) = qemu_says(format, &copy);
    assert_eq!(code, Some(0), "{what}, leaks repaired: qemu-img check: {said}");
}

/// The exit code of `qemu-img check`, and what it says.
fn qemu_says(format: &str, image: &Path) -> (Option<i32>, String) {
    // QEMU takes the name of a data file relative to its own directory.
    let output = Command::new("qemu-img")
        .args(["check", "-f", format])
        .arg(image)
        .current_dir(image.parent().expect("an image lies in a directory"))
        .output()
        .unwrap_or_else(|e| panic!("qemu-img is needed for this test (Debian package qemu-utils): {e}"));
    (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

/// Gives lost space back, and does nothing else.
fn repair_leaks(format: &str, image: &Path) -> Result<()> {
    let options = ChainOptions { format: Some(format.to_owned()), ..ChainOptions::default() };
    let choice = RepairChoice { leaks_only: true, lossy: false };
    let vellum = Vellum::local(FilePolicy::default());
    vellum.plan_repair(text(image), &options, true)?.carry_out(choice, &Quiet).map(|_| ())
}

/// Whether nothing is wrong but this: the header of a VDI counts more blocks than the map names. (QEMU's "is" is the
/// number of entries, its "should be" the count in the header.)
pub fn is_count_ahead(said: &str) -> bool {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let errors: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("ERROR: ")).collect();
    let [error] = errors[..] else { return false };
    let counts =
        error.strip_prefix("allocated blocks mismatch, is ").and_then(|rest| rest.split_once(", should be "));
    let counts = counts.and_then(|(entries, count)| Some((number(entries)?, number(count)?)));
    counts.is_some_and(|(entries, count)| count > entries) && said.contains("\n1 errors were found")
}
