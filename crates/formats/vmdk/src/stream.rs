//! Laying out a stream (sheet section 4) in VMware's order: header without directory, descriptor, grains each behind a
//! marker, every table behind its grains, the directory, the footer that says where it is.
//!
//! A grain has no uncompressed form here: one that does not compress is stored as zlib all the same, a few bytes longer
//! than it was, which is why the shape allows twice the grain (what VirtualBox and QEMU read). The last grain of a
//! disk is handed over padded with zeros to a whole one, since VirtualBox wants whole grains.

use crate::create::{Plan, SPARSE_SECTORS_MAX, wrong_block, wrong_payload};
use crate::grain::stored_max;
use crate::header::{
    FLAG_COMPRESSED, FLAG_MARKERS, FLAG_NEWLINE_TEST, GD_AT_END, GRAIN_MARKER_BYTES, MAGIC_KDMV,
    MARKER_FOOTER, MARKER_GD, MARKER_GT, Marker, NEWLINE_TEST, SECTOR, SparseExtentHeader,
};
use crate::sparse::{DESCRIPTOR_SECTORS, GT_SECTORS, GTES, embedded};
use std::sync::Arc;
use vellum_core::bytes::{add, align_up, div, div_ceil, index, mul, narrow, rem, wide};
use vellum_core::storage::write_slice;
use vellum_core::{
    BoxFuture, Code, Error, ImageWriter, MetaWrite, Payload, Place, Preallocate, Result, Storage,
    WriterShape, set_len, write_all,
};
use zerocopy::{FromZeros, IntoBytes};

/// Writer of streamOptimized.
pub(crate) struct StreamWriter {
    plan: Plan,
    shape: WriterShape,
    storages: [Arc<dyn Storage>; 1],
    header: SparseExtentHeader,
    /// Sector of each grain table, 0 for one without grains.
    directory: Vec<u32>,
    /// The table that is being filled: its number and entries.
    table: Option<(usize, Vec<u32>)>,
    /// First free sector.
    free: u64,
    last: Option<(u64, Payload, Place)>,
}

impl StreamWriter {
    /// Makes the file and writes header and descriptor.
    pub(crate) async fn begin(plan: Plan) -> Result<Self> {
        let storage = plan.output.main().await?;
        if !storage.limits().resizable {
            return Err(Error::new(
                Code::Usage,
                "a stream ends with its footer; a device does not end there",
            )
            .hint("write the stream to a file, or choose subformat=monolithicSparse"));
        }
        let grain = div(plan.grain, SECTOR)?;
        let capacity = div(plan.size, SECTOR)?;
        let over_head = align_up(add(1, DESCRIPTOR_SECTORS)?, grain)?;
        let mut header = SparseExtentHeader::new_zeroed();
        header.magic = MAGIC_KDMV;
        header.version = 3.into();
        header.flags = (FLAG_NEWLINE_TEST | FLAG_COMPRESSED | FLAG_MARKERS).into();
        header.capacity = capacity.into();
        header.grain_size = grain.into();
        header.descriptor_offset = 1.into();
        header.descriptor_size = DESCRIPTOR_SECTORS.into();
        header.num_gtes_per_gt = 512.into();
        header.gd_offset = GD_AT_END.into();
        header.over_head = over_head.into();
        header.newline_test = NEWLINE_TEST;
        header.compress_algorithm = 1.into();
        write_slice(storage.as_ref(), 0, header.as_bytes()).await?;
        write_slice(storage.as_ref(), SECTOR, &embedded(&plan.descriptor.print())?).await?;
        let tables = div_ceil(capacity, mul(GTES, grain)?)?;
        let shape = WriterShape {
            block_size: plan.grain,
            codec: Some(vellum_codec::zlib(plan.level)?),
            encoded_limit: index(mul(plan.grain, 2)?)?,
        };
        Ok(StreamWriter {
            plan,
            shape,
            storages: [storage],
            header,
            directory: vec![0; index(tables)?],
            table: None,
            free: over_head,
            last: None,
        })
    }

    /// Takes `sectors` from the end of the file.
    fn take(&mut self, sectors: u64) -> Result<u64> {
        let start = self.free;
        self.free = add(start, sectors)?;
        if self.free > SPARSE_SECTORS_MAX {
            return Err(Error::new(Code::Usage, "the data does not fit into one stream of VMDK")
                .found("more than 2 TiB after compression")
                .allowed("up to 2 TiB")
                .hint("choose subformat=twoGbMaxExtentSparse, monolithicFlat or vmfs"));
        }
        Ok(start)
    }

    /// Writes a metadata marker and what it announces; returns the sector of the latter.
    fn announce(&mut self, kind: u32, bytes: &[u8], writes: &mut Vec<MetaWrite>) -> Result<u64> {
        let sectors = div_ceil(wide(bytes.len()), SECTOR)?;
        let start = self.take(add(sectors, 1)?)?;
        let marker = Marker { val: sectors.into(), size: 0.into(), kind: kind.into() };
        let mut all = marker.as_bytes().to_vec();
        all.resize(index(SECTOR)?, 0);
        all.extend_from_slice(bytes);
        all.resize(index(mul(add(sectors, 1)?, SECTOR)?)?, 0);
        writes.push(MetaWrite { storage: 0, offset: mul(start, SECTOR)?, bytes: all });
        add(start, 1)
    }

    /// Writes the table that is being filled.
    fn end_table(&mut self, writes: &mut Vec<MetaWrite>) -> Result<()> {
        let Some((number, entries)) = self.table.take() else { return Ok(()) };
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        debug_assert_eq!(wide(bytes.len()), GT_SECTORS.saturating_mul(SECTOR));
        let sector = self.announce(MARKER_GT, &bytes, writes)?;
        if let Some(entry) = self.directory.get_mut(number) {
            *entry = narrow(sector)?;
        }
        Ok(())
    }

    fn end_stream(&mut self, writes: &mut Vec<MetaWrite>) -> Result<()> {
        self.end_table(writes)?;
        let bytes: Vec<u8> = self.directory.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let sector = self.announce(MARKER_GD, &bytes, writes)?;
        let mut footer = self.header;
        footer.gd_offset = sector.into();
        self.announce(MARKER_FOOTER, footer.as_bytes(), writes)?;
        let end = self.take(1)?;
        writes.push(MetaWrite { storage: 0, offset: mul(end, SECTOR)?, bytes: vec![0; index(SECTOR)?] });
        Ok(())
    }
}

impl ImageWriter for StreamWriter {
    fn shape(&self) -> &WriterShape {
        &self.shape
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn place(&mut self, block: u64, payload: Payload, writes: &mut Vec<MetaWrite>) -> Result<Place> {
        if let Some((last, with, place)) = self.last {
            if last == block && with == payload {
                return Ok(place);
            }
            if block <= last {
                return Err(wrong_block(block));
            }
        }
        let Payload::Encoded { len } = payload else { return Err(wrong_payload()) };
        let guest = mul(block, self.plan.grain)?;
        let stored = add(GRAIN_MARKER_BYTES, wide(len))?;
        if guest >= self.plan.size {
            return Err(wrong_block(block));
        }
        if len == 0 || stored > stored_max(self.plan.grain)? {
            return Err(wrong_payload());
        }
        let (number, entry) = (index(div(block, GTES)?)?, index(rem(block, GTES)?)?);
        if self.table.as_ref().is_some_and(|(current, _)| *current != number) {
            self.end_table(writes)?;
        }
        let sector = self.take(div_ceil(stored, SECTOR)?)?;
        let table = self.table.get_or_insert_with(|| (number, vec![0; GTES_LEN]));
        if let Some(slot) = table.1.get_mut(entry) {
            *slot = narrow(sector)?;
        }
        let offset = mul(sector, SECTOR)?;
        let marker =
            Marker { val: div(guest, SECTOR)?.into(), size: narrow(wide(len))?.into(), kind: 0.into() };
        let bytes = marker.as_bytes().iter().copied().take(index(GRAIN_MARKER_BYTES)?).collect();
        writes.push(MetaWrite { storage: 0, offset, bytes });
        let place = Place { storage: 0, offset: add(offset, GRAIN_MARKER_BYTES)? };
        self.last = Some((block, payload, place));
        Ok(place)
    }

    fn finish(mut self: Box<Self>) -> BoxFuture<'static, Result<()>> {
        Box::pin(async move {
            let mut writes = Vec::new();
            self.end_stream(&mut writes)?;
            write_all(&self.storages, writes).await?;
            let [storage] = &self.storages;
            set_len(storage.as_ref(), mul(self.free, SECTOR)?, Preallocate::Off).await
        })
    }
}

/// [`GTES`] as a length.
const GTES_LEN: usize = 512;
