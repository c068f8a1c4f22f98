//! Laying out hosted sparse disks: one file with its descriptor, or several beside theirs.
//!
//! Grain tables of the whole disk are there from the start (as holes), both copies, in VMware's order. Grains follow in
//! the order in which they are placed, aligned to their size in the file, so that a copy can share blocks.

use crate::create::{Plan, SPARSE_SECTORS_MAX, wrong_block, wrong_payload};
use crate::header::{
    FLAG_NEWLINE_TEST, FLAG_REDUNDANT, FLAG_ZEROED_GRAIN, MAGIC_KDMV, NEWLINE_TEST, SECTOR,
    SparseExtentHeader,
};
use std::sync::Arc;
use vellum_core::bytes::{add, align_up, div, div_ceil, index, mul, narrow, rem, wide};
use vellum_core::storage::write_slice;
use vellum_core::{
    BoxFuture, Code, Error, ImageWriter, MetaWrite, Payload, Place, Preallocate, Result, Storage,
    TableWriter, WriterShape, ZeroMode, set_len, write_all,
};
use zerocopy::{FromZeros, IntoBytes};

/// Sectors of an embedded descriptor.
pub(crate) const DESCRIPTOR_SECTORS: u64 = 20;
/// Entries of a grain table.
pub(crate) const GTES: u64 = 512;
/// Sectors of a grain table.
pub(crate) const GT_SECTORS: u64 = 4;
/// Entries of a grain directory written at a time.
const GD_STEP: u64 = 16_384;

/// Where everything stands in a hosted sparse file. All in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    capacity: u64,
    grain: u64,
    descriptor: u64,
    tables: u64,
    rgd: u64,
    rgts: u64,
    gd: u64,
    gts: u64,
    over_head: u64,
}

impl Layout {
    fn new(capacity: u64, grain: u64, embedded: bool) -> Result<Self> {
        let descriptor = if embedded { DESCRIPTOR_SECTORS } else { 0 };
        let tables = div_ceil(capacity, mul(GTES, grain)?)?;
        let gd_sectors = div_ceil(mul(tables, 4)?, SECTOR)?;
        let rgd = add(1, descriptor)?;
        let rgts = add(rgd, gd_sectors)?;
        let gd = add(rgts, mul(tables, GT_SECTORS)?)?;
        let gts = add(gd, gd_sectors)?;
        let over_head = align_up(add(gts, mul(tables, GT_SECTORS)?)?, grain)?;
        Ok(Layout { capacity, grain, descriptor, tables, rgd, rgts, gd, gts, over_head })
    }

    fn header(&self, zeroed: bool) -> SparseExtentHeader {
        let mut header = SparseExtentHeader::new_zeroed();
        header.magic = MAGIC_KDMV;
        header.version = if zeroed { 2 } else { 1 }.into();
        let flag = if zeroed { FLAG_ZEROED_GRAIN } else { 0 };
        header.flags = (FLAG_NEWLINE_TEST | FLAG_REDUNDANT | flag).into();
        header.capacity = self.capacity.into();
        header.grain_size = self.grain.into();
        header.descriptor_offset = u64::from(self.descriptor != 0).into();
        header.descriptor_size = self.descriptor.into();
        header.num_gtes_per_gt = 512.into();
        header.rgd_offset = self.rgd.into();
        header.gd_offset = self.gd.into();
        header.over_head = self.over_head.into();
        header.newline_test = NEWLINE_TEST;
        header
    }

    /// A table over all grain tables that begin at sector `start`.
    fn table(&self, storage: usize, start: u64) -> Result<TableWriter> {
        Ok(TableWriter::new(storage, mul(start, SECTOR)?, mul(self.tables, GTES)?, 4, 0))
    }
}

/// The embedded descriptor, padded to its sectors.
pub(crate) fn embedded(text: &str) -> Result<Vec<u8>> {
    let max = index(mul(DESCRIPTOR_SECTORS, SECTOR)?)?;
    let mut bytes = text.as_bytes().to_vec();
    if bytes.len() > max {
        return Err(Error::new(Code::Usage, "the descriptor does not fit into its place")
            .found(format!("{} bytes", bytes.len()))
            .allowed(format!("up to {max} bytes"))
            .hint("shorten the file name or the comment"));
    }
    bytes.resize(max, 0);
    Ok(bytes)
}

/// Writer of monolithicSparse and twoGbMaxExtentSparse.
pub(crate) struct SparseWriter {
    plan: Plan,
    shape: WriterShape,
    /// The files of a split disk follow its descriptor.
    storages: Vec<Arc<dyn Storage>>,
    layouts: Vec<Layout>,
    /// First free sector of each extent.
    free: Vec<u64>,
    current: Option<Current>,
    last: Option<(u64, Place)>,
}

/// The extent that is being filled.
struct Current {
    extent: usize,
    primary: TableWriter,
    redundant: TableWriter,
}

impl SparseWriter {
    /// Makes the files and writes headers and directories.
    pub(crate) async fn begin(plan: Plan) -> Result<Self> {
        let split = plan.descriptor.create_type == "twoGbMaxExtentSparse";
        let main = plan.output.main().await?;
        let mut storages = vec![main];
        let mut layouts = Vec::new();
        let grain = div(plan.grain, SECTOR)?;
        for extent in &plan.descriptor.extents {
            let layout = Layout::new(extent.sectors, grain, !split)?;
            if split {
                storages.push(plan.output.sibling(&extent.name).await?);
            }
            if let Some(storage) = storages.last() {
                write_front(storage.as_ref(), &layout, plan.zeroed_grain).await?;
            }
            layouts.push(layout);
        }
        let free = layouts.iter().map(|layout| layout.over_head).collect();
        let shape = WriterShape { block_size: plan.grain, codec: None, encoded_limit: 0 };
        Ok(SparseWriter { plan, shape, storages, layouts, free, current: None, last: None })
    }

    /// Index of the storage of an extent.
    fn storage_of(&self, extent: usize) -> usize {
        let split = self.plan.descriptor.create_type == "twoGbMaxExtentSparse";
        extent.saturating_add(usize::from(split))
    }

    /// Makes `extent` the one that is being filled.
    fn turn_to(&mut self, extent: usize, writes: &mut Vec<MetaWrite>) -> Result<()> {
        if self.current.as_ref().is_some_and(|current| current.extent == extent) {
            return Ok(());
        }
        if let Some(mut old) = self.current.take() {
            old.primary.finish(writes);
            old.redundant.finish(writes);
        }
        let storage = self.storage_of(extent);
        let layout = self.layouts.get(extent).ok_or_else(|| wrong_block(wide(extent)))?;
        let primary = layout.table(storage, layout.gts)?;
        let redundant = layout.table(storage, layout.rgts)?;
        self.current = Some(Current { extent, primary, redundant });
        Ok(())
    }
}

async fn write_front(storage: &dyn Storage, layout: &Layout, zeroed: bool) -> Result<()> {
    if !storage.limits().resizable {
        // A device holds what was there before; entries that are never set must be zero.
        storage.zero(0..mul(layout.over_head, SECTOR)?, ZeroMode::MayUnmap).await?;
    }
    write_slice(storage, 0, layout.header(zeroed).as_bytes()).await?;
    for (directory, tables) in [(layout.rgd, layout.rgts), (layout.gd, layout.gts)] {
        let mut first = 0;
        while first < layout.tables {
            let count = GD_STEP.min(layout.tables.saturating_sub(first));
            let mut bytes = Vec::new();
            for number in first..add(first, count)? {
                let sector = narrow(add(tables, mul(number, GT_SECTORS)?)?)?;
                bytes.extend_from_slice(&sector.to_le_bytes());
            }
            write_slice(storage, add(mul(directory, SECTOR)?, mul(first, 4)?)?, &bytes).await?;
            first = add(first, count)?;
        }
    }
    Ok(())
}

impl ImageWriter for SparseWriter {
    fn shape(&self) -> &WriterShape {
        &self.shape
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn place(&mut self, block: u64, payload: Payload, writes: &mut Vec<MetaWrite>) -> Result<Place> {
        if payload != Payload::Data {
            return Err(wrong_payload());
        }
        if let Some((last, place)) = self.last {
            if last == block {
                return Ok(place);
            }
            if block < last {
                return Err(wrong_block(block));
            }
        }
        let at = mul(block, self.plan.grain)?;
        if at >= self.plan.size {
            return Err(wrong_block(block));
        }
        let extent = index(div(at, self.plan.extent_bytes)?)?;
        self.turn_to(extent, writes)?;
        let storage = self.storage_of(extent);
        let (Some(free), Some(current)) = (self.free.get_mut(extent), self.current.as_mut()) else {
            return Err(wrong_block(block));
        };
        let sector = *free;
        if sector >= SPARSE_SECTORS_MAX {
            return Err(Error::new(Code::Usage, "the data does not fit into one sparse file of VMDK")
                .found("more than 2 TiB of data and tables")
                .allowed("up to 2 TiB")
                .hint("choose subformat=twoGbMaxExtentSparse, monolithicFlat or vmfs"));
        }
        *free = add(sector, div(self.plan.grain, SECTOR)?)?;
        let number = div(rem(at, self.plan.extent_bytes)?, self.plan.grain)?;
        let entry = narrow(sector)?.to_le_bytes();
        current.primary.set(number, &entry, writes)?;
        current.redundant.set(number, &entry, writes)?;
        let place = Place { storage, offset: mul(sector, SECTOR)? };
        self.last = Some((block, place));
        Ok(place)
    }

    fn finish(mut self: Box<Self>) -> BoxFuture<'static, Result<()>> {
        Box::pin(async move {
            let mut writes = Vec::new();
            if let Some(mut current) = self.current.take() {
                current.primary.finish(&mut writes);
                current.redundant.finish(&mut writes);
            }
            write_all(&self.storages, writes).await?;
            for (extent, sectors) in self.free.iter().enumerate() {
                if let Some(storage) = self.storages.get(self.storage_of(extent)) {
                    set_len(storage.as_ref(), mul(*sectors, SECTOR)?, Preallocate::Off).await?;
                }
            }
            let text = self.plan.descriptor.print();
            let Some(main) = self.storages.first() else { return Ok(()) };
            if self.storage_of(0) == 0 {
                return write_slice(main.as_ref(), SECTOR, &embedded(&text)?).await;
            }
            write_slice(main.as_ref(), 0, text.as_bytes()).await?;
            set_len(main.as_ref(), wide(text.len()), Preallocate::Off).await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_that_of_the_worked_example() {
        let layout = Layout::new(0x14000, 128, true).unwrap();
        assert_eq!((layout.rgd, layout.rgts, layout.gd, layout.gts), (21, 22, 30, 31));
        assert_eq!((layout.over_head, layout.tables), (128, 2));
        let header = layout.header(false);
        let expected: [u8; 79] = [
            0x4b, 0x44, 0x4d, 0x56, 0x01, 0, 0, 0, 0x03, 0, 0, 0, 0x00, 0x40, 0x01, 0, //
            0, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0x01, 0, 0, 0, //
            0, 0, 0, 0, 0x14, 0, 0, 0, 0, 0, 0, 0, 0x00, 0x02, 0, 0, //
            0x15, 0, 0, 0, 0, 0, 0, 0, 0x1e, 0, 0, 0, 0, 0, 0, 0, //
            0x80, 0, 0, 0, 0, 0, 0, 0, 0x00, 0x0a, 0x20, 0x0d, 0x0a, 0x00, 0x00,
        ];
        assert_eq!(header.as_bytes()[..79], expected);
        assert_eq!(layout.header(true).flags.get(), 7);
    }

    #[test]
    fn a_descriptor_that_is_too_long_is_refused() {
        assert_eq!(embedded("x").unwrap().len(), 10_240);
        assert_eq!(embedded(&"x".repeat(10_241)).unwrap_err().code(), Code::Usage);
    }
}
