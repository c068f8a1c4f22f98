//! The disks that the tests convert.

use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// Bytes that look random and are the same on every run (xorshift64*).
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Text that compresses well.
pub fn prose(seed: u64, len: usize) -> Vec<u8> {
    const WORDS: [&str; 8] =
        ["disk ", "image ", "grain ", "cluster ", "block ", "sector ", "parent ", "chain "];
    let mut text = Vec::with_capacity(len + 8);
    for byte in noise(seed, len / 4 + 1) {
        text.extend_from_slice(WORDS[usize::from(byte % 8)].as_bytes());
    }
    text.truncate(len);
    text
}

/// Size of the demonstration disk: an odd multiple of 512, so that no block of any format divides it.
pub const DEMO_SIZE: u64 = (22 << 20) + 19 * 512;

/// The data of the demonstration disk, by offset; the rest is zeros.
///
/// What a used disk has: a boot sector, text, what does not compress, one value repeated, data with holes in it, a lone
/// sector, data across the borders of every format's blocks, data to the very end.
pub fn demo_runs() -> Vec<(u64, Vec<u8>)> {
    let mut boot = prose(1, 512);
    boot[510..].copy_from_slice(&[0x55, 0xaa]);
    let mut holey = noise(2, 640 << 10);
    for hole in holey.chunks_mut(12 << 10) {
        let len = hole.len().min(4 << 10);
        hole[..len].fill(0);
    }
    let end = 70_001;
    vec![
        (0, boot),
        ((64 << 10) - 100, prose(3, 5100)),
        (1 << 20, noise(4, 1 << 20)),
        ((3 << 20) + 512, prose(5, 200_000)),
        (4 << 20, vec![0xaa; 700 << 10]),
        (5 << 20, holey),
        (7 << 20, vec![0; 300 << 10]),
        ((13 << 20) + 512, noise(6, 512)),
        ((17 << 20) + (600 << 10), noise(7, 900 << 10)),
        (DEMO_SIZE - end, prose(8, end as usize)),
    ]
}

/// The demonstration disk, whole.
pub fn demo_disk() -> Vec<u8> {
    let mut disk = vec![0u8; DEMO_SIZE as usize];
    for (at, run) in demo_runs() {
        disk[at as usize..at as usize + run.len()].copy_from_slice(&run);
    }
    disk
}

/// Writes the demonstration disk as a raw file; what it does not hold is a hole.
pub fn write_demo(path: &Path) {
    write_runs(path, DEMO_SIZE, &demo_runs());
}

/// Writes a raw file of `size` bytes with `runs`; the rest is a hole.
pub fn write_runs(path: &Path, size: u64, runs: &[(u64, Vec<u8>)]) {
    let mut file = std::fs::File::create(path).expect("creating a raw file");
    file.set_len(size).expect("giving a raw file its length");
    for (at, run) in runs {
        file.seek(SeekFrom::Start(*at)).expect("seeking");
        file.write_all(run).expect("writing a raw file");
    }
}

/// Where two contents first differ; what lies past the end of the shorter counts as zero.
pub fn difference(left: &[u8], right: &[u8]) -> Option<usize> {
    let common = left.len().min(right.len());
    if left[..common] != right[..common] {
        return left.iter().zip(right).position(|(a, b)| a != b);
    }
    let longer = if left.len() > right.len() { left } else { right };
    longer[common..].iter().position(|byte| *byte != 0).map(|at| common + at)
}
