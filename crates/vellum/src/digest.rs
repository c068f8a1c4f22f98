//! `digest`: one hash of what a guest sees, the same whatever the format.
//!
//! The tree hash, `vellum-tree-sha256`:
//!
//! * The disk is cut into blocks of 64 KiB; the last is filled with zeros. `leaf = SHA-256(0x00 || block)`.
//! * Leaves are the bottom of a perfect binary tree, filled with leaves of zero blocks to a power of two.
//!   `node = SHA-256(0x01 || left || right)`. A disk of at most one block is its leaf.
//! * `digest = SHA-256(0x02 || size of the disk in bytes, 64 bits little-endian || root)`.
//!
//! A subtree of zero blocks has a known hash, so that zeros cost nothing however many there are.

use crate::compare::default_threads;
use crate::scan::Scan;
use crate::{Control, Progress, Vellum};
use parking_lot::{Condvar, Mutex};
use sha2::{Digest, Sha256};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vellum_core::{Buf, Code, Disk, Error, Result, block_on, bytes};

/// Bytes of a leaf's block.
pub const TREE_BLOCK_BYTES: u64 = 64 << 10;
/// Bytes of a chunk: a subtree of 16 leaves.
const CHUNK: u64 = 1 << 20;

type Hash = [u8; 32];

/// Blocks of the perfect tree over a disk of `size` bytes.
fn tree_blocks(size: u64) -> u64 {
    size.div_ceil(TREE_BLOCK_BYTES).max(1).next_power_of_two()
}

/// The level of the subtree that one chunk is: the whole tree, for a disk of less than a chunk.
fn chunk_level(size: u64) -> usize {
    tree_blocks(size).min(CHUNK / TREE_BLOCK_BYTES).ilog2() as usize
}

/// How a disk is digested.
#[derive(Clone, Debug, Default)]
pub struct DigestRequest {
    /// Plain SHA-256 over all bytes, zeros included, instead of the tree hash.
    pub flat: bool,
    /// Threads; `None` is one for each processor.
    pub threads: Option<usize>,
}

/// A digest and how it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DigestReport {
    /// `vellum-tree-sha256` or `sha256`.
    pub algorithm: &'static str,
    /// Lower-case hexadecimal.
    pub digest: String,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes that had to be read.
    pub data_bytes: u64,
}

impl Vellum {
    /// Hashes what a guest sees of `disk`.
    pub fn digest(
        &self,
        disk: &Disk,
        request: &DigestRequest,
        progress: &dyn Progress,
    ) -> Result<DigestReport> {
        progress.begin("hashing", disk.size());
        if request.flat { flat(disk, progress) } else { tree(disk, request, progress) }
    }
}

fn hex(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn leaf(block: &[u8]) -> Hash {
    let mut hasher = Sha256::new();
    hasher.update([0]);
    hasher.update(block);
    hasher.finalize().into()
}

fn node(left: &Hash, right: &Hash) -> Hash {
    let mut hasher = Sha256::new();
    hasher.update([1]);
    hasher.update(left);
    hasher.update(right);
    hasher.finalize().into()
}

/// Builds the tree hash from subtrees in ascending order.
pub struct TreeHash {
    /// `zero[l]` is the hash of a subtree of `2^l` zero blocks.
    zero: Vec<Hash>,
    /// Subtrees that wait for their right neighbour, by level.
    pending: Vec<Option<Hash>>,
    leaves: u64,
}

impl Default for TreeHash {
    fn default() -> Self {
        let mut zero = vec![leaf(&[0; TREE_BLOCK_BYTES as usize])];
        for level in 0..64 {
            zero.push(node(&zero[level], &zero[level]));
        }
        TreeHash { zero, pending: vec![None; 65], leaves: 0 }
    }
}

impl TreeHash {
    /// The hash of the subtree over `content`, zero-filled to `2^level` blocks.
    pub fn subtree(&self, content: &[u8], level: usize) -> Hash {
        if bytes::is_zero(content) {
            return self.zero[level];
        }
        if level == 0 {
            let mut hasher = Sha256::new();
            hasher.update([0]);
            hasher.update(content);
            // The filling of a last block, without a copy of the block.
            hasher.update(&[0u8; TREE_BLOCK_BYTES as usize][content.len().min(TREE_BLOCK_BYTES as usize)..]);
            return hasher.finalize().into();
        }
        let half = (TREE_BLOCK_BYTES as usize) << (level - 1);
        let (left, right) = content.split_at(half.min(content.len()));
        node(&self.subtree(left, level - 1), &self.subtree(right, level - 1))
    }

    /// Adds a subtree of `2^level` blocks; all before it together are a multiple of as many.
    fn push(&mut self, mut hash: Hash, level: usize) {
        self.leaves += 1u64 << level;
        for slot in self.pending.iter_mut().skip(level) {
            match slot.take() {
                None => {
                    *slot = Some(hash);
                    return;
                }
                Some(left) => hash = node(&left, &hash),
            }
        }
    }

    /// Adds `count` zero blocks.
    fn push_zeroes(&mut self, mut count: u64) {
        while count > 0 {
            let aligned = if self.leaves == 0 { 63 } else { self.leaves.trailing_zeros() };
            let level = aligned.min(count.ilog2());
            self.push(self.zero[level as usize], level as usize);
            count -= 1 << level;
        }
    }

    /// The digest of a disk of `size` bytes.
    fn finish(mut self, size: u64) -> Hash {
        let blocks = tree_blocks(size);
        self.push_zeroes(blocks.saturating_sub(self.leaves));
        let root = self.pending[blocks.ilog2() as usize].unwrap_or(self.zero[0]);
        let mut hasher = Sha256::new();
        hasher.update([2]);
        hasher.update(size.to_le_bytes());
        hasher.update(root);
        hasher.finalize().into()
    }
}

struct Work<'a> {
    disk: &'a Disk,
    scan: Scan,
    // Next sequence number, and the tree so far.
    turn: Mutex<(u64, TreeHash)>,
    turned: Condvar,
    stop: AtomicBool,
    moved: AtomicU64,
    progress: &'a dyn Progress,
}

fn tree(disk: &Disk, request: &DigestRequest, progress: &dyn Progress) -> Result<DigestReport> {
    let work = Work {
        disk,
        scan: Scan::new(disk.clone(), CHUNK, 0),
        turn: Mutex::new((0, TreeHash::default())),
        turned: Condvar::new(),
        stop: AtomicBool::new(false),
        moved: AtomicU64::new(0),
        progress,
    };
    let threads = request.threads.unwrap_or_else(default_threads).clamp(1, 256);
    let results = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| work.run())).collect();
        workers.into_iter().map(|worker| worker.join()).collect::<Vec<_>>()
    });
    for result in results {
        result.unwrap_or_else(|_| Err(Error::new(Code::Lost, "a hashing thread ended early")))?;
    }
    let (_, hash) = work.turn.into_inner();
    let data_bytes = work.moved.into_inner();
    progress.advance(disk.size(), data_bytes);
    let digest = hex(&hash.finish(disk.size()));
    Ok(DigestReport { algorithm: "vellum-tree-sha256", digest, size: disk.size(), data_bytes })
}

impl Work<'_> {
    fn run(&self) -> Result<()> {
        let zeroes = TreeHash::default();
        let mut buf = Buf::zeroed(CHUNK as usize);
        loop {
            match self.step(&zeroes, buf) {
                Ok(Some(back)) => buf = back,
                Ok(None) => return Ok(()),
                Err(error) => {
                    self.stop.store(true, Ordering::Relaxed);
                    let _turn = self.turn.lock();
                    self.turned.notify_all();
                    return Err(error);
                }
            }
        }
    }

    fn step(&self, zeroes: &TreeHash, mut buf: Buf) -> Result<Option<Buf>> {
        let Some(chunk) = self.scan.next()? else { return Ok(None) };
        buf.set_window(0..(chunk.range.end - chunk.range.start) as usize);
        let (buf, result) = block_on(self.disk.read_pieces(buf, chunk.range.start, &chunk.pieces));
        result?;
        let level = chunk_level(self.disk.size());
        let hash = zeroes.subtree(&buf, level);
        let moved = self.moved.fetch_add(buf.len() as u64, Ordering::Relaxed) + buf.len() as u64;
        let mut turn = self.turn.lock();
        while turn.0 != chunk.sequence {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            self.turned.wait(&mut turn);
        }
        let skipped = chunk.range.start / TREE_BLOCK_BYTES - turn.1.leaves;
        turn.1.push_zeroes(skipped);
        turn.1.push(hash, level);
        turn.0 += 1;
        drop(turn);
        self.turned.notify_all();
        if self.progress.advance(chunk.range.end, moved) == Control::Stop {
            return Err(Error::new(Code::Cancelled, "stopped before the end"));
        }
        Ok(Some(buf))
    }
}

fn flat(disk: &Disk, progress: &dyn Progress) -> Result<DigestReport> {
    let mut hasher = Sha256::new();
    let mut buf = Buf::zeroed(CHUNK as usize);
    let mut at = 0;
    while at < disk.size() {
        buf.set_window(0..CHUNK.min(disk.size() - at) as usize);
        let (back, result) = block_on(disk.read(buf, at));
        result?;
        hasher.update(&*back);
        at += back.len() as u64;
        buf = back;
        if progress.advance(at, at) == Control::Stop {
            return Err(Error::new(Code::Cancelled, "stopped before the end"));
        }
    }
    Ok(DigestReport {
        algorithm: "sha256",
        digest: hex(&hasher.finalize()),
        size: disk.size(),
        data_bytes: at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition at the top of the module, word for word.
    fn by_definition(content: &[u8]) -> Hash {
        let mut level: Vec<Hash> = content
            .chunks(TREE_BLOCK_BYTES as usize)
            .map(|block| {
                let mut whole = block.to_vec();
                whole.resize(TREE_BLOCK_BYTES as usize, 0);
                leaf(&whole)
            })
            .collect();
        let zero = leaf(&[0; TREE_BLOCK_BYTES as usize]);
        level.resize(level.len().max(1).next_power_of_two(), zero);
        while level.len() > 1 {
            level = level.chunks(2).map(|pair| node(&pair[0], &pair[1])).collect();
        }
        let mut hasher = Sha256::new();
        hasher.update([2]);
        hasher.update((content.len() as u64).to_le_bytes());
        hasher.update(level[0]);
        hasher.finalize().into()
    }

    #[test]
    fn the_streamed_tree_is_the_tree_of_the_definition() {
        for (size, data) in [
            (0usize, 0..0usize),
            (512, 0..10),
            (100_000, 70_000..70_001),
            (1 << 20, 70_000..70_001),
            (5_000_000, 3_000_000..3_500_000),
        ] {
            let mut content = vec![0u8; size];
            content[data].fill(7);
            let mut tree = TreeHash::default();
            let level = chunk_level(size as u64);
            for chunk in content.chunks(CHUNK as usize) {
                if bytes::is_zero(chunk) {
                    tree.push_zeroes(1 << level);
                } else {
                    let hash = tree.subtree(chunk, level);
                    tree.push(hash, level);
                }
            }
            assert_eq!(tree.finish(size as u64), by_definition(&content), "{size}");
        }
    }
}
