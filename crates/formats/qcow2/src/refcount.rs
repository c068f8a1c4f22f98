//! Reference counts of a new image, streamed (sheet section 3).
//!
//! Space is handed out in ascending order, so that the counts of all clusters behind the one in use are final. Only
//! the refcount block in progress is held; a finished one gets a cluster of its own and goes out.

use std::collections::VecDeque;
use vellum_core::{Code, Error, MetaWrite, Result, bytes};

/// Hands out space of the image file and counts it.
pub(crate) struct Allocator {
    cluster: u64,
    order: u32,
    /// Entries of a refcount block.
    per_block: u64,
    /// First byte never handed out.
    next: u64,
    /// Counts from cluster `base` on, the first of the block in progress.
    counts: VecDeque<u64>,
    base: u64,
    /// Where the finished blocks stand.
    blocks: Vec<u64>,
}

/// Where the refcount table ended up.
pub(crate) struct RefcountTable {
    pub offset: u64,
    pub clusters: u32,
}

impl Allocator {
    pub fn new(cluster: u64, order: u32) -> Result<Self> {
        let width = 1u64.checked_shl(order).unwrap_or(0);
        let per_block = bytes::div(bytes::mul(cluster, 8)?, width)?;
        Ok(Allocator {
            cluster,
            order,
            per_block,
            next: 0,
            counts: VecDeque::new(),
            base: 0,
            blocks: Vec::new(),
        })
    }

    /// First byte never handed out.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Hands out `len` bytes at the next cluster border.
    pub fn clusters(&mut self, len: u64, writes: &mut Vec<MetaWrite>) -> Result<u64> {
        self.align()?;
        self.finish_blocks(writes)?;
        self.take_clusters(len)
    }

    fn take_clusters(&mut self, len: u64) -> Result<u64> {
        self.align()?;
        let offset = self.next;
        self.next = bytes::align_up(bytes::add(offset, len)?, self.cluster)?;
        let mut at = offset;
        while at < self.next {
            self.count(bytes::div(at, self.cluster)?)?;
            at = bytes::add(at, self.cluster)?;
        }
        Ok(offset)
    }

    /// Hands out `len` bytes anywhere, packed behind what is there.
    pub fn packed(&mut self, len: u64, writes: &mut Vec<MetaWrite>) -> Result<u64> {
        let most = self.greatest_count();
        if self.counts_at(bytes::div(self.next, self.cluster)?)? >= most {
            self.align()?;
        }
        if bytes::rem(self.next, self.cluster)? == 0 {
            self.finish_blocks(writes)?;
        }
        let offset = self.next;
        self.next = bytes::add(offset, len.max(1))?;
        let last = bytes::div(bytes::sub(self.next, 1)?, self.cluster)?;
        let mut cluster = bytes::div(offset, self.cluster)?;
        while cluster <= last {
            self.count(cluster)?;
            cluster = bytes::add(cluster, 1)?;
        }
        Ok(offset)
    }

    fn greatest_count(&self) -> u64 {
        let width = 1u32.checked_shl(self.order).unwrap_or(64);
        match width {
            64 => u64::MAX,
            width => 1u64.checked_shl(width).unwrap_or(0).saturating_sub(1),
        }
    }

    fn align(&mut self) -> Result<()> {
        self.next = bytes::align_up(self.next, self.cluster)?;
        Ok(())
    }

    fn counts_at(&self, cluster: u64) -> Result<u64> {
        let index = bytes::index(bytes::sub(cluster, self.base)?)?;
        Ok(self.counts.get(index).copied().unwrap_or(0))
    }

    fn count(&mut self, cluster: u64) -> Result<()> {
        let index = bytes::index(bytes::sub(cluster, self.base)?)?;
        if self.counts.len() <= index {
            self.counts.resize(index.saturating_add(1), 0);
        }
        if let Some(count) = self.counts.get_mut(index) {
            *count = bytes::add(*count, 1)?;
        }
        Ok(())
    }

    /// Sends out every block whose clusters are all behind `next`, which stands at a cluster border.
    fn finish_blocks(&mut self, writes: &mut Vec<MetaWrite>) -> Result<()> {
        while bytes::div(self.next, self.cluster)? >= bytes::add(self.base, self.per_block)? {
            let offset = self.take_clusters(self.cluster)?;
            self.send_block(offset, writes)?;
        }
        Ok(())
    }

    /// The counts of the block in progress, packed, to `offset`; the next block begins.
    fn send_block(&mut self, offset: u64, writes: &mut Vec<MetaWrite>) -> Result<()> {
        let mut block = vec![0u8; bytes::index(self.cluster)?];
        let here = bytes::index(self.per_block)?.min(self.counts.len());
        for (index, count) in self.counts.drain(..here).enumerate() {
            put(&mut block, self.order, index, count);
        }
        self.base = bytes::add(self.base, self.per_block)?;
        self.blocks.push(offset);
        writes.push(MetaWrite { storage: 0, offset, bytes: block });
        Ok(())
    }

    /// Hands out the last blocks and the table, which count themselves, and sends all of it out.
    pub fn finish(&mut self, writes: &mut Vec<MetaWrite>) -> Result<RefcountTable> {
        self.align()?;
        self.finish_blocks(writes)?;
        let used = bytes::div(self.next, self.cluster)?;
        let done = bytes::wide(self.blocks.len());
        let mut total = bytes::add(done, 1)?;
        let table_clusters = |blocks: u64| bytes::div_ceil(bytes::mul(blocks, 8)?, self.cluster);
        loop {
            let all = bytes::add(bytes::add(used, bytes::sub(total, done)?)?, table_clusters(total)?)?;
            let needed = bytes::div_ceil(all, self.per_block)?.max(total);
            if needed == total {
                break;
            }
            total = needed;
        }
        let clusters = table_clusters(total)?;
        if bytes::mul(clusters, self.cluster)? > crate::header::REFCOUNT_TABLE_MAX {
            return Err(Error::new(Code::TableLimit, "the image needs a refcount table larger than 8 MiB")
                .hint("choose a larger cluster_size or fewer refcount_bits"));
        }
        let table = self.take_clusters(bytes::mul(clusters, self.cluster)?)?;
        let remaining = bytes::sub(total, done)?;
        let first = self.take_clusters(bytes::mul(remaining, self.cluster)?)?;
        for index in 0..remaining {
            self.send_block(bytes::add(first, bytes::mul(index, self.cluster)?)?, writes)?;
        }
        let entries: Vec<u8> = self.blocks.iter().flat_map(|offset| offset.to_be_bytes()).collect();
        writes.push(MetaWrite { storage: 0, offset: table, bytes: entries });
        Ok(RefcountTable { offset: table, clusters: bytes::narrow(clusters)? })
    }
}

/// How many clusters `counted` ones become with the refcount blocks and the table that count them and themselves.
pub(crate) fn with_refcounts(counted: u64, cluster: u64, order: u32) -> Result<u64> {
    let per_block = Allocator::new(cluster, order)?.per_block;
    let mut blocks = 1;
    loop {
        let table = bytes::div_ceil(bytes::mul(blocks, 8)?, cluster)?;
        let all = bytes::add(counted, bytes::add(blocks, table)?)?;
        let needed = bytes::div_ceil(all, per_block)?;
        if needed <= blocks {
            return Ok(all);
        }
        blocks = needed;
    }
}

/// Puts count number `index` into a block: big-endian, narrow ones from the least significant end of each byte.
fn put(block: &mut [u8], order: u32, index: usize, count: u64) {
    let wide = count.to_be_bytes();
    match order {
        0..=2 => {
            let width = 1usize.checked_shl(order).unwrap_or(1);
            let bit = index.saturating_mul(width);
            let shift = u32::try_from(bit % 8).unwrap_or(0);
            let [.., low] = wide;
            if let Some(byte) = block.get_mut(bit / 8) {
                *byte |= low.checked_shl(shift).unwrap_or(0);
            }
        }
        _ => {
            let len = 1usize.checked_shl(order.saturating_sub(3)).unwrap_or(1);
            let at = index.saturating_mul(len);
            let tail = wide.get(8usize.saturating_sub(len)..).unwrap_or(&[]);
            if let Some(target) = block.get_mut(at..at.saturating_add(len)) {
                target.copy_from_slice(tail);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_counts_of_one_look_as_in_the_sheet() {
        let expected: [&[u8]; 5] = [
            &[0x3f],
            &[0x55, 0x05],
            &[0x11, 0x11, 0x11],
            &[1, 1, 1, 1, 1, 1],
            &[0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1],
        ];
        for (order, bytes) in expected.iter().enumerate() {
            let mut block = [0u8; 64];
            (0..6).for_each(|index| put(&mut block, order as u32, index, 1));
            assert_eq!(&block[..bytes.len()], *bytes, "order {order}");
            assert!(block[bytes.len()..].iter().all(|b| *b == 0));
        }
    }

    #[test]
    fn what_is_reserved_is_what_the_allocator_takes() {
        let cases = [(512, 6), (512, 0), (4096, 4), (65536, 4)];
        for (cluster, order) in cases {
            for clusters in (1..400).chain([4095, 4096, 30_000]) {
                let mut allocator = Allocator::new(cluster, order).unwrap();
                let mut writes = Vec::new();
                for _ in 0..clusters {
                    allocator.clusters(cluster, &mut writes).unwrap();
                }
                allocator.finish(&mut writes).unwrap();
                assert_eq!(
                    with_refcounts(clusters, cluster, order).unwrap() * cluster,
                    allocator.next(),
                    "{clusters} clusters of {cluster} bytes, refcount order {order}"
                );
            }
        }
    }

    #[test]
    fn a_narrow_count_never_overflows() {
        let mut allocator = Allocator::new(512, 1).unwrap();
        let mut writes = Vec::new();
        allocator.clusters(512, &mut writes).unwrap();
        let offsets: Vec<u64> = (0..8).map(|_| allocator.packed(10, &mut writes).unwrap()).collect();
        // Three users fit into two bits.
        assert_eq!(offsets, [512, 522, 532, 1024, 1034, 1044, 1536, 1546]);
    }
}
