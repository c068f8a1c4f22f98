//! The reference counts as the file stores them (sheet section 3), for `check`: read in order, a block at a time.

use crate::header::Header;
use crate::tally::{CHUNK, Tally};
use std::ops::Range;
use vellum_core::{Buf, Code, Error, Result, Status, Storage, bytes, storage::read_vec};

/// Bits of a refcount table entry that are the offset of a block.
const BLOCK_MASK: u64 = 0xffff_ffff_ffff_fe00;
/// Bits that must be 0.
const BLOCK_RESERVED: u64 = 0x1ff;

/// A file that may end early: what is missing reads as zeros.
pub(crate) struct Source<'a> {
    pub storage: &'a dyn Storage,
    pub len: u64,
    knows_holes: bool,
}

impl<'a> Source<'a> {
    pub fn new(storage: &'a dyn Storage) -> Result<Self> {
        Ok(Source { storage, len: storage.len()?, knows_holes: storage.limits().knows_holes })
    }

    /// `len` bytes at `offset`, zeros past the end of the file. The caller has bounded `len`.
    pub async fn read(&self, offset: u64, len: u64) -> Result<Buf> {
        let inside = self.len.saturating_sub(offset).min(len);
        let wanted = bytes::index(len)?;
        if inside == len {
            return read_vec(self.storage, offset, wanted).await;
        }
        let mut whole = Buf::zeroed(wanted);
        if inside > 0 {
            let part = read_vec(self.storage, offset, bytes::index(inside)?).await?;
            for (to, from) in whole.iter_mut().zip(part.iter()) {
                *to = *from;
            }
        }
        Ok(whole)
    }

    /// Whether a range reads as zeros for certain, found without reading it.
    pub async fn is_hole(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len).min(self.len);
        if offset >= end {
            return true;
        }
        if !self.knows_holes {
            return false;
        }
        match self.storage.status(offset..end).await {
            Ok(list) => list.first().is_some_and(|(range, status)| {
                *status == Status::Hole && range.start <= offset && range.end >= end
            }),
            Err(_) => false,
        }
    }
}

/// The refcount table, whole.
pub(crate) struct RefTable {
    pub entries: Vec<u64>,
    pub order: u32,
    pub cluster: u64,
    /// Counts of a block.
    pub per_block: u64,
}

/// What a refcount table entry names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    /// No block: the counts are 0.
    None,
    /// A block at this offset.
    At(u64),
    /// Nothing that can be read.
    Misaligned,
}

impl RefTable {
    pub async fn load(source: &Source<'_>, header: &Header) -> Result<Self> {
        let cluster = header.cluster();
        let len = bytes::mul(header.refcount_table_clusters.into(), cluster)?;
        let raw = source.read(header.refcount_table_offset, len).await?;
        let entries = raw.as_chunks::<8>().0.iter().map(|bytes| u64::from_be_bytes(*bytes)).collect();
        let width = 1u64.checked_shl(header.refcount_order).unwrap_or(1);
        let per_block = bytes::div(bytes::mul(cluster, 8)?, width)?;
        Ok(RefTable { entries, order: header.refcount_order, cluster, per_block })
    }

    /// The block for cluster counts `index * per_block` and on.
    pub fn block(&self, index: u64) -> Block {
        let entry = bytes::index(index).ok().and_then(|index| self.entries.get(index)).copied().unwrap_or(0);
        let offset = entry & BLOCK_MASK;
        match offset {
            0 => Block::None,
            _ if bytes::rem(offset, self.cluster).is_ok_and(|rest| rest == 0) => Block::At(offset),
            _ => Block::Misaligned,
        }
    }

    /// The block that an entry names, if it is one that can be used in a file of `clusters` clusters.
    ///
    /// # Errors
    /// What is wrong with the entry.
    pub fn usable(&self, index: u64, clusters: u64) -> std::result::Result<Option<u64>, &'static str> {
        let entry = bytes::index(index).ok().and_then(|index| self.entries.get(index)).copied().unwrap_or(0);
        if entry & BLOCK_RESERVED != 0 {
            return Err("reserved bits are set");
        }
        match self.block(index) {
            Block::None => Ok(None),
            Block::Misaligned => Err("the refcount block is not aligned to clusters"),
            Block::At(offset) if offset.checked_div(self.cluster).is_none_or(|number| number >= clusters) => {
                Err("the refcount block lies outside of the file")
            }
            Block::At(offset) => Ok(Some(offset)),
        }
    }

    /// Number of the block that counts `cluster`.
    pub fn index_of(&self, cluster: u64) -> u64 {
        cluster.checked_div(self.per_block).unwrap_or(0)
    }

    /// Clusters that block number `index` counts.
    pub fn covers(&self, index: u64) -> Range<u64> {
        let start = index.saturating_mul(self.per_block);
        start..start.saturating_add(self.per_block)
    }

    /// The next stretch of clusters from `at` on for which there is a block, or something in the tally. It lies in
    /// what one block counts.
    pub fn next(&self, tally: &Tally, at: u64, until: u64) -> Option<(Range<u64>, Block)> {
        if at >= until {
            return None;
        }
        let counted = tally.next_counted(at, until);
        let index = self.index_of(at);
        let stored = bytes::index(index).ok().and_then(|index| {
            let ahead = self.entries.get(index..)?.iter().position(|entry| entry & BLOCK_MASK != 0)?;
            let found = bytes::wide(index.saturating_add(ahead));
            Some(self.covers(found).start.max(at)).filter(|start| *start < until)
        });
        let start = match (counted, stored) {
            (Some(a), Some(b)) => a.min(b),
            (a, b) => a.or(b)?,
        };
        let index = self.index_of(start);
        let block = self.block(index);
        let mut end = self.covers(index).end.min(until);
        if block == Block::None {
            let chunk_end = start.checked_div(CHUNK).unwrap_or(0).saturating_add(1).saturating_mul(CHUNK);
            end = end.min(chunk_end);
        }
        Some((start..end, block))
    }

    /// Reads the block at `offset`.
    pub async fn read(&self, source: &Source<'_>, offset: u64) -> Result<Buf> {
        source.read(offset, self.cluster).await.map_err(|e: Error| e.context("reading a refcount block"))
    }
}

/// The error for an image that asks for too much work.
#[cold]
pub(crate) fn too_much(what: &str, field: &str, found: impl std::fmt::Display, allowed: String) -> Error {
    Error::new(Code::TableLimit, what).field(field).found(found).allowed(allowed).hint(
        "the image is damaged or was made to keep a reader busy; `vellum convert` may still save its content",
    )
}
