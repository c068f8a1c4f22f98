//! Lookup (sheet section 2): from a guest offset through L1 and L2 to an extent. Pure, over cached pages.

use crate::alloc::Allocator;
use crate::entry::{
    COMPRESSED, COPIED, L1_RESERVED, L2_RESERVED, OFFSET_MASK, SUBCLUSTERS, ZERO, compressed_range,
};
use crate::header::Header;
use crate::layout::Layout;
use crate::write::{Session, SessionOptions};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vellum_core::{
    BoxFuture, Code, Codec, Encoded, Error, Extent, Image, ImageInfo, Lookup, Result, Snapshots, Storage,
    TableCache, WritableImage, bytes,
};

/// Tables are cached in pages of this many bytes, or whole if they are smaller.
pub(crate) const PAGE: u64 = 64 << 10;
/// Entries that one lookup goes through at most, or it could take hours: every L1 entry of a small file may name the
/// same L2 table, so that a petabyte is described by a few MiB.
const STEPS_MAX: u32 = 32_768;

/// An open image.
pub(crate) struct Qcow2Image {
    /// As it was read; what changes while the image is open is in `layout`.
    pub(crate) header: Header,
    pub(crate) info: ImageInfo,
    pub(crate) storages: Vec<Arc<dyn Storage>>,
    pub(crate) tables: Arc<TableCache>,
    pub(crate) layout: Arc<Layout>,
    pub(crate) cluster: u64,
    pub(crate) l2_covers: u64,
    /// What writing needs; none if the image was opened for reading.
    pub(crate) session: Option<Session>,
    codec: Arc<dyn Codec>,
}

/// What one step of the lookup found: an extent over some bytes, or a page that is missing.
enum Step {
    Found(u64, Extent),
    Missing { offset: u64, len: u64 },
}

impl Qcow2Image {
    pub fn new(
        header: Header,
        info: ImageInfo,
        storages: Vec<Arc<dyn Storage>>,
        tables: TableCache,
        codec: Arc<dyn Codec>,
    ) -> Result<Self> {
        let mut lens = storages.iter().map(|storage| storage.len());
        let file_len = lens.next().transpose()?.unwrap_or(0);
        let layout = Arc::new(Layout::new(&header, file_len, lens.next().transpose()?));
        let (cluster, l2_covers, tables) = (header.cluster(), header.l2_covers(), Arc::new(tables));
        Ok(Qcow2Image { header, info, storages, tables, layout, cluster, l2_covers, session: None, codec })
    }

    /// Makes the image one that can be written.
    pub fn for_writing(mut self, options: SessionOptions) -> Result<Self> {
        let (tables, layout) = (self.tables.clone(), self.layout.clone());
        let allocator = Allocator::new(tables, layout, self.cluster, self.header.refcount_order)?;
        self.session = Some(Session::new(allocator, options));
        Ok(self)
    }

    /// The start of `range`: as far as one cluster, one run of subclusters or one gap in L1 reaches.
    fn step(&self, range: &Range<u64>) -> Result<Step> {
        let l1_index = bytes::div(range.start, self.l2_covers)?;
        let (table, table_bytes) = self.layout.l1();
        let (page, within) = page_of(table, table_bytes, bytes::mul(l1_index, 8)?)?;
        let Some(l1) = self.tables.get(page.start) else { return missing(page) };
        let entry = entry(&l1, within)?;
        if entry & OFFSET_MASK == 0 && entry & L1_RESERVED == 0 {
            return self.gap(&l1, within, l1_index, range);
        }
        let at = bytes::add(page.start, within)?;
        let l2_offset = self.l2_table(entry, at)?;
        self.in_l2(l2_offset, range)
    }

    /// A run of L1 entries that name no table: nothing of it is in this image.
    fn gap(&self, l1: &[u8], within: u64, l1_index: u64, range: &Range<u64>) -> Result<Step> {
        let mut end_index = bytes::add(l1_index, 1)?;
        let mut at = bytes::add(within, 8)?;
        while bytes::mul(end_index, self.l2_covers).is_ok_and(|end| end < range.end)
            && bytes::be64(l1, bytes::index(at / 8)?) == Some(0)
        {
            end_index = bytes::add(end_index, 1)?;
            at = bytes::add(at, 8)?;
        }
        let end = end_index.saturating_mul(self.l2_covers).min(range.end);
        Ok(Step::Found(bytes::sub(end, range.start)?, Extent::Parent))
    }

    /// The checked offset of the L2 table that an L1 entry names.
    pub(crate) fn l2_table(&self, entry: u64, at: u64) -> Result<u64> {
        if entry & L1_RESERVED != 0 {
            return Err(bad(Code::Corrupt, "reserved bits of an L1 entry are set", "L1 entry", at, entry)
                .allowed(format!("bits of {:#018x} clear", L1_RESERVED)));
        }
        let offset = entry & OFFSET_MASK;
        self.check_cluster(offset, "L1 entry", at)?;
        if bytes::add(offset, self.cluster)? > self.layout.file_len() {
            return Err(self.out_of_file(
                "an L2 table is cut off by the end of the file",
                "L1 entry",
                at,
                offset,
            ));
        }
        Ok(offset)
    }

    fn in_l2(&self, l2_offset: u64, range: &Range<u64>) -> Result<Step> {
        let index = bytes::div(bytes::rem(range.start, self.l2_covers)?, self.cluster)?;
        let entry_bytes = if self.header.extended_l2() { 16 } else { 8 };
        let (page, within) = page_of(l2_offset, self.cluster, bytes::mul(index, entry_bytes)?)?;
        let Some(l2) = self.tables.get(page.start) else { return missing(page) };
        let at = bytes::add(page.start, within)?;
        let skip = bytes::rem(range.start, self.cluster)?;
        let entry = entry(&l2, within)?;
        if entry & COMPRESSED != 0 {
            return self.compressed(entry, at, skip, range);
        }
        if entry & L2_RESERVED != 0 {
            return Err(bad(Code::Corrupt, "reserved bits of an L2 entry are set", "L2 entry", at, entry)
                .allowed(format!("bits of {:#018x} clear", L2_RESERVED)));
        }
        if self.header.extended_l2() {
            let bitmap = self::entry(&l2, bytes::add(within, 8)?)?;
            return self.subclusters(entry, bitmap, at, skip, range);
        }
        let len = bytes::sub(self.cluster, skip)?.min(bytes::sub(range.end, range.start)?);
        if entry & ZERO != 0 {
            if self.header.version < 3 {
                let what = "the zero bit of an L2 entry is set in an image of version 2";
                return Err(bad(Code::Corrupt, what, "L2 entry", at, entry).allowed("bit 0 clear"));
            }
            return Ok(Step::Found(len, Extent::Zero));
        }
        if entry & OFFSET_MASK == l2_offset && !self.header.has_data_file() {
            let what = "an L2 entry points at its own table";
            return Err(bad(Code::Overlap, what, "L2 entry", at, entry).allowed("a cluster of guest data"));
        }
        if entry & OFFSET_MASK == 0 && !self.at_zero_of_data_file(entry, range.start) {
            return Ok(Step::Found(len, Extent::Parent));
        }
        self.standard(entry, at, skip, len, range.start)
    }

    /// Offset 0 names a cluster only in a data file, and only with COPIED.
    pub(crate) fn at_zero_of_data_file(&self, entry: u64, guest: u64) -> bool {
        self.header.has_data_file() && entry & COPIED != 0 && guest < self.cluster
    }

    /// `len` bytes from `skip` on in an allocated cluster.
    fn standard(&self, entry: u64, at: u64, skip: u64, len: u64, guest: u64) -> Result<Step> {
        let cluster = entry & OFFSET_MASK;
        let offset = bytes::add(cluster, skip)?;
        let (storage, file_len) = match self.header.has_data_file() {
            false => (0, self.layout.file_len()),
            true => (1, self.layout.data_len.load(Ordering::Acquire)),
        };
        if storage == 1 {
            if offset != guest {
                let what = "a cluster of the data file does not stand at its guest offset";
                return Err(bad(Code::Corrupt, what, "L2 entry", at, entry));
            }
        } else {
            self.check_cluster(cluster, "L2 entry", at)?;
        }
        // The file may end inside its last cluster; what is missing reads as zeros.
        let inside = file_len.saturating_sub(offset).min(len);
        if inside == 0 {
            return Ok(Step::Found(len, Extent::Zero));
        }
        Ok(Step::Found(inside, Extent::Raw { storage, offset }))
    }

    /// Checks the place of a cluster in the image's own file.
    pub(crate) fn check_cluster(&self, offset: u64, name: &str, at: u64) -> Result<()> {
        self.check_offset(offset, name, at)?;
        let range = offset..offset.saturating_add(self.cluster);
        if let Some(what) = self.layout.header_table(&range, self.cluster) {
            let what = format!("an offset points into {what}");
            return Err(bad(Code::Overlap, &what, name, at, offset)
                .allowed("a cluster of its own, outside of header, L1 and refcount table"));
        }
        Ok(())
    }

    /// Checks that an offset is one of a cluster in the file.
    pub(crate) fn check_offset(&self, offset: u64, name: &str, at: u64) -> Result<()> {
        // The size of a cluster is a power of two.
        if offset & self.cluster.saturating_sub(1) != 0 {
            let allowed = format!("a multiple of {}", self.cluster);
            return Err(bad(Code::Misaligned, "an offset is not aligned to clusters", name, at, offset)
                .allowed(allowed));
        }
        if offset >= self.layout.file_len() {
            return Err(self.out_of_file("an offset points past the end of the file", name, at, offset));
        }
        Ok(())
    }

    #[cold]
    fn out_of_file(&self, what: &str, name: &str, at: u64, offset: u64) -> Error {
        bad(Code::OutOfFile, what, name, at, offset)
            .allowed(format!("inside the file of {} bytes", self.layout.file_len()))
    }

    fn compressed(&self, entry: u64, at: u64, skip: u64, range: &Range<u64>) -> Result<Step> {
        if self.header.has_data_file() {
            let what = "an image with a data file cannot hold compressed clusters";
            return Err(bad(Code::Corrupt, what, "L2 entry", at, entry));
        }
        let Range { start: offset, end } = compressed_range(entry, self.header.cluster_bits)?;
        let file_len = self.layout.file_len();
        if offset < self.cluster {
            return Err(bad(Code::Overlap, "compressed data stands in the header", "L2 entry", at, offset)
                .allowed(format!("from {}", self.cluster)));
        }
        if offset >= file_len || end > bytes::align_up(file_len, 512)? {
            return Err(self.out_of_file(
                "compressed data reaches past the end of the file",
                "L2 entry",
                at,
                offset,
            ));
        }
        let len = bytes::sub(end.min(file_len), offset)?;
        let encoded = Encoded {
            storage: 0,
            offset,
            len: bytes::narrow(len)?,
            block_len: bytes::narrow(self.cluster)?,
            skip: bytes::narrow(skip)?,
            codec: self.codec.clone(),
        };
        let guest = bytes::sub(self.cluster, skip)?.min(bytes::sub(range.end, range.start)?);
        Ok(Step::Found(guest, Extent::Encoded(encoded)))
    }

    /// The run of subclusters of the same kind from `skip` on.
    fn subclusters(&self, entry: u64, bitmap: u64, at: u64, skip: u64, range: &Range<u64>) -> Result<Step> {
        if entry & ZERO != 0 {
            let what = "the zero bit of an L2 entry is set in an image with subclusters";
            return Err(bad(Code::Corrupt, what, "L2 entry", at, entry));
        }
        let (allocated, zero) = (bitmap & 0xffff_ffff, bitmap.checked_shr(32).unwrap_or(0));
        let at_bitmap = bytes::add(at, 8)?;
        if allocated & zero != 0 {
            let what = "a subcluster is both allocated and zero";
            return Err(bad(Code::Corrupt, what, "L2 subcluster bitmap", at_bitmap, bitmap));
        }
        if allocated != 0 && entry & OFFSET_MASK == 0 && !self.at_zero_of_data_file(entry, range.start) {
            let what = "subclusters are allocated without a cluster";
            return Err(bad(Code::Corrupt, what, "L2 subcluster bitmap", at_bitmap, bitmap));
        }
        let size = bytes::div(self.cluster, SUBCLUSTERS.into())?;
        let kind = |index: u32| {
            let bit = 1u64.checked_shl(index).unwrap_or(0);
            (allocated & bit != 0, zero & bit != 0)
        };
        let first = bytes::narrow(bytes::div(skip, size)?)?;
        let mut end = first.saturating_add(1);
        while end < SUBCLUSTERS && kind(end) == kind(first) {
            end = end.saturating_add(1);
        }
        let stop = bytes::mul(end.into(), size)?;
        let len = bytes::sub(stop, skip)?.min(bytes::sub(range.end, range.start)?);
        match kind(first) {
            (true, _) => self.standard(entry, at, skip, len, range.start),
            (false, true) => Ok(Step::Found(len, Extent::Zero)),
            (false, false) => Ok(Step::Found(len, Extent::Parent)),
        }
    }
}

/// The cached page that holds byte `at` of a table of `len` bytes at `table`, and where in it.
pub(crate) fn page_of(table: u64, len: u64, at: u64) -> Result<(Range<u64>, u64)> {
    let start = at & !(PAGE.saturating_sub(1));
    let end = start.saturating_add(PAGE).min(len);
    Ok((bytes::add(table, start)?..bytes::add(table, end)?, bytes::sub(at, start)?))
}

fn missing(page: Range<u64>) -> Result<Step> {
    Ok(Step::Missing { offset: page.start, len: bytes::sub(page.end, page.start)? })
}

pub(crate) fn entry(page: &[u8], within: u64) -> Result<u64> {
    bytes::be64(page, bytes::index(within / 8)?)
        .ok_or_else(|| Error::new(Code::OutOfFile, "a table entry lies outside its table"))
}

#[cold]
pub(crate) fn bad(code: Code, what: &str, name: &str, at: u64, found: u64) -> Error {
    Error::new(code, what)
        .field(name)
        .at(at)
        .found(format!("{found:#x}"))
        .hint("the image is damaged; `vellum check` tells more, `vellum repair` may mend it")
}

/// Whether `next` goes on where `len` bytes of `run` end.
fn continues(run: &Extent, len: u64, next: &Extent) -> bool {
    match (run, next) {
        (Extent::Zero, Extent::Zero) | (Extent::Parent, Extent::Parent) => true,
        (Extent::Raw { storage: a, offset: from }, Extent::Raw { storage: b, offset: to }) => {
            a == b && from.checked_add(len) == Some(*to)
        }
        _ => false,
    }
}

impl Image for Qcow2Image {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn storages(&self) -> &[Arc<dyn Storage>] {
        &self.storages
    }

    fn map(&self, range: Range<u64>) -> Result<Lookup> {
        let mut run: Option<(u64, Extent)> = None;
        for _ in 0..STEPS_MAX {
            let at = range.start.saturating_add(run.as_ref().map_or(0, |(len, _)| *len));
            if at >= range.end {
                break;
            }
            match self.step(&(at..range.end)) {
                Ok(Step::Found(len, extent)) => match &mut run {
                    None => run = Some((len, extent)),
                    Some((total, first)) if continues(first, *total, &extent) => {
                        *total = total.saturating_add(len)
                    }
                    Some(_) => break,
                },
                // What was found so far is an answer; the rest is asked for again.
                Ok(Step::Missing { .. }) | Err(_) if run.is_some() => break,
                Ok(Step::Missing { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(run.map_or(Lookup::Miss, |(len, extent)| Lookup::Found { len, extent }))
    }

    fn load(&self, range: Range<u64>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            // An L1 page, then an L2 page.
            for _ in 0..2 {
                match self.step(&range)? {
                    Step::Found(..) => return Ok(()),
                    Step::Missing { offset, len } => {
                        self.tables.load(offset, bytes::index(len)?).await?;
                    }
                }
            }
            Ok(())
        })
    }

    fn writable(&self) -> Option<&dyn WritableImage> {
        self.session.as_ref().map(|_| -> &dyn WritableImage { self })
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }
}
