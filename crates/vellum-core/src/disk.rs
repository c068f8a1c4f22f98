//! [`Disk`]: an ordered chain of images, and the engine that reads through it.
//!
//! A read goes: split the range at extents (`lookup`), join raw neighbours, read them into the caller's buffer
//! through its window; gather compressed neighbours into one read and decode them on the CPU pool (or here).

use crate::disk_state::{OpenFlags, Writing};
use crate::image::lookup;
use crate::storage::{past_end, read_only};
use crate::{
    Buf, BufPool, Code, Codec, Completion, Encoded, Error, Extent, Image, Location, Preallocate, Result,
    Spawner, Status, Storage, StorageLimits, WithBuf, WriteFlags, ZeroMode,
};
use parking_lot::Mutex;
use std::any::Any;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// One image of a chain and where it came from.
#[derive(Clone)]
pub struct Layer {
    /// The image.
    pub image: Arc<dyn Image>,
    /// Its location.
    pub location: Location,
}

/// Options of a [`Disk`].
#[derive(Clone, Default)]
pub struct DiskOptions {
    /// Where blocks are decoded; `None` decodes on the thread that reads.
    pub spawner: Option<Arc<dyn Spawner>>,
    /// How the disk is used, if it is opened for writing.
    pub flags: OpenFlags,
}

/// An ordered chain of images: the device that a guest sees. Cheap to clone.
#[derive(Clone)]
pub struct Disk(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    layers: Vec<Layer>,
    size: u64,
    pub(crate) name: String,
    options: DiskOptions,
    pub(crate) pool: BufPool,
    /// There if the top image was opened for writing.
    pub(crate) writing: Option<Writing>,
    decoded: Mutex<VecDeque<(BlockKey, Arc<[u8]>)>>,
}

/// Layer, storage and offset of an encoded block.
type BlockKey = (usize, usize, u64);

/// Decoded blocks kept for small sequential reads.
const DECODED_BUDGET_BYTES: usize = 4 << 20;
/// Compressed neighbours are fetched in one read up to this many bytes.
const GATHER_BYTES: u64 = 4 << 20;
/// No format has larger compressed blocks in practice; a larger one would be an attack on memory.
const ENCODED_BLOCK_BYTES_MAX: u32 = 16 << 20;
/// A gap between compressed neighbours that is cheaper to read than to seek over.
const GATHER_GAP: u64 = 16 << 10;

/// Where a guest range lives, seen from the top of the chain.
#[derive(Clone, Debug)]
pub struct DiskExtent {
    /// The guest range.
    pub range: Range<u64>,
    /// Index of the layer that answers (0 = the top image); for zeros of nobody, the base.
    pub layer: usize,
    /// Where in that layer. [`Extent::Parent`] means: in no image, so zeros.
    pub extent: Extent,
}

/// A piece of the disk as convert and compare see it.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The guest range.
    pub range: Range<u64>,
    /// What is there.
    pub kind: PieceKind,
}

/// What a piece of a disk is.
#[derive(Clone, Debug)]
pub enum PieceKind {
    /// Reads as zeros; needs no reading.
    Zero,
    /// Data in one piece of a storage, as it is.
    Raw {
        /// Layer index.
        layer: usize,
        /// Storage index in that layer's image.
        storage: usize,
        /// Byte offset of the first byte.
        offset: u64,
    },
    /// Data that must be decoded.
    Encoded(usize, Encoded),
}

impl Disk {
    /// A disk of `layers`, the top image first.
    pub fn new(layers: Vec<Layer>, options: DiskOptions) -> Result<Self> {
        Self::build(layers, options, false)
    }

    /// With `is_shared`, other processes write the image, too.
    pub(crate) fn build(layers: Vec<Layer>, options: DiskOptions, is_shared: bool) -> Result<Self> {
        let Some(top) = layers.first() else {
            return Err(Error::new(Code::Usage, "a disk needs at least one image"));
        };
        let (size, name) = (top.image.info().virtual_size, top.location.0.clone());
        let (pool, decoded) = (BufPool::new(16 << 20), Mutex::default());
        let writing = top.image.writable().is_some().then(|| Writing::new(options.flags, is_shared));
        Ok(Disk(Arc::new(Inner { layers, size, name, options, pool, writing, decoded })))
    }

    /// The images, the top one first.
    pub fn layers(&self) -> &[Layer] {
        &self.0.layers
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// The storage that a [`PieceKind::Raw`] or an encoded piece names.
    pub fn storage(&self, layer: usize, storage: usize) -> Result<&Arc<dyn Storage>> {
        self.0.layers.get(layer).and_then(|layer| layer.image.storages().get(storage)).ok_or_else(|| {
            Error::new(Code::Corrupt, "an extent names a storage that the image does not have")
        })
    }

    /// Where the start of `range` lives; at least one byte of a non-empty range, clipped to the disk.
    pub async fn lookup(&self, range: Range<u64>) -> Result<DiskExtent> {
        let mut end = range.end.min(self.size());
        if range.start >= end {
            return Err(past_end(&self.0.name, range.start, 0, self.size()));
        }
        let start = range.start;
        let last = self.0.layers.len() - 1;
        for (index, layer) in self.0.layers.iter().enumerate() {
            let layer_size = layer.image.info().virtual_size;
            if start >= layer_size {
                // A parent shorter than its child reads as zeros beyond its end.
                return Ok(DiskExtent { range: start..end, layer: index, extent: Extent::Zero });
            }
            let wanted = start..end.min(layer_size);
            let (len, extent) = lookup(layer.image.as_ref(), wanted.clone()).await.map_err(|e| {
                e.image(&layer.location).context(format!("looking up guest bytes at {start:#x}"))
            })?;
            end = (start + len.max(1)).min(wanted.end);
            if !matches!(extent, Extent::Parent) || index == last {
                return Ok(DiskExtent { range: start..end, layer: index, extent });
            }
        }
        Err(Error::new(Code::Usage, "a disk needs at least one image"))
    }

    /// The pieces of `range`, without gaps, at most `max` of them. Holes of the storages count as zeros.
    pub async fn pieces(&self, range: Range<u64>, max: usize) -> Result<Vec<Piece>> {
        self.split(range, max, true).await
    }

    /// The pieces of `range`; holes of the storages are looked for only if asked, since some file systems search
    /// the whole file for them.
    async fn split(&self, range: Range<u64>, max: usize, find_holes: bool) -> Result<Vec<Piece>> {
        let mut found: Vec<Piece> = Vec::new();
        let mut at = range.start;
        let end = range.end.min(self.size());
        while at < end && found.len() < max {
            let extent = self.lookup(at..end).await?;
            at = extent.range.end;
            match extent.extent {
                Extent::Zero | Extent::Parent => {
                    push(&mut found, Piece { range: extent.range, kind: PieceKind::Zero })
                }
                Extent::Encoded(encoded) => {
                    let kind = PieceKind::Encoded(extent.layer, encoded);
                    found.push(Piece { range: extent.range, kind });
                }
                Extent::Raw { storage, offset } if !find_holes => {
                    let kind = PieceKind::Raw { layer: extent.layer, storage, offset };
                    push(&mut found, Piece { range: extent.range, kind });
                }
                Extent::Raw { storage, offset } => {
                    at = self.push_raw(&mut found, extent.range, extent.layer, storage, offset).await?;
                }
            }
        }
        Ok(found)
    }

    /// Adds a raw extent, split at the holes of its storage; returns how far the storage told.
    async fn push_raw(
        &self,
        found: &mut Vec<Piece>,
        range: Range<u64>,
        layer: usize,
        storage: usize,
        offset: u64,
    ) -> Result<u64> {
        let bytes = self.storage(layer, storage)?;
        if !bytes.limits().knows_holes {
            let end = range.end;
            push(found, Piece { range, kind: PieceKind::Raw { layer, storage, offset } });
            return Ok(end);
        }
        let mut at = range.start;
        let host = offset..offset + (range.end - range.start);
        for (part, status) in bytes.status(host).await? {
            let len = part.end - part.start;
            let guest = at..at + len;
            at = guest.end;
            let kind = match status {
                Status::Hole => PieceKind::Zero,
                Status::Data => PieceKind::Raw { layer, storage, offset: part.start },
            };
            push(found, Piece { range: guest, kind });
        }
        Ok(at)
    }

    /// Reads at once if metadata and data are cached and no writer is in the way: no waiting, no allocation.
    pub fn try_read(&self, buf: &mut [u8], offset: u64) -> Option<Result<()>> {
        let _guard = match &self.0.writing {
            Some(writing) => Some(writing.try_shared(offset..offset.saturating_add(buf.len() as u64))?),
            None => None,
        };
        self.try_read_unlocked(buf, offset)
    }

    pub(crate) fn try_read_unlocked(&self, buf: &mut [u8], offset: u64) -> Option<Result<()>> {
        let mut done = 0usize;
        while done < buf.len() {
            let start = offset.checked_add(done as u64)?;
            let end = start.checked_add((buf.len() - done) as u64)?;
            if end > self.size() {
                return Some(Err(past_end(&self.0.name, offset, buf.len(), self.size())));
            }
            let (len, source) = match self.try_lookup(start..end)? {
                Ok(found) => found,
                Err(error) => return Some(Err(error)),
            };
            let part = &mut buf[done..done + len];
            match source {
                None => part.fill(0),
                Some((storage, at)) => match storage.try_read_at(part, at)? {
                    Ok(()) => {}
                    Err(error) => return Some(Err(error)),
                },
            }
            done += len;
        }
        Some(Ok(()))
    }

    #[allow(clippy::type_complexity)]
    fn try_lookup(&self, range: Range<u64>) -> Option<Result<(usize, Option<(&dyn Storage, u64)>)>> {
        let mut end = range.end;
        for layer in &self.0.layers {
            let size = layer.image.info().virtual_size;
            if range.start >= size {
                break;
            }
            let found = match layer.image.map(range.start..end.min(size)) {
                Ok(crate::Lookup::Found { len, extent }) => {
                    end = (range.start + len).min(end).min(size);
                    extent
                }
                Ok(crate::Lookup::Miss) => return None,
                Err(error) => return Some(Err(error)),
            };
            let len = (end - range.start) as usize;
            match found {
                Extent::Parent => {}
                Extent::Zero => return Some(Ok((len, None))),
                Extent::Encoded(_) => return None,
                Extent::Raw { storage, offset } => {
                    let storage = layer.image.storages().get(storage)?;
                    return Some(Ok((len, Some((storage.as_ref(), offset)))));
                }
            }
        }
        Some(Ok(((end - range.start) as usize, None)))
    }

    /// Fills the window of `buf` from `offset` on.
    pub async fn read(&self, mut buf: Buf, offset: u64) -> WithBuf {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.size()) {
            let error = past_end(&self.0.name, offset, buf.len(), self.size());
            return (buf, Err(error));
        }
        if let Some(result) = self.try_read(&mut buf, offset) {
            return (buf, result);
        }
        // A reader keeps the place that it found from being given to someone else.
        let _guard = match &self.0.writing {
            Some(writing) => Some(writing.shared(offset..offset + buf.len() as u64).await),
            None => None,
        };
        self.read_unlocked(buf, offset).await
    }

    /// [`Disk::read`] for those who hold the range.
    pub(crate) async fn read_unlocked(&self, buf: Buf, offset: u64) -> WithBuf {
        let pieces = match self.split(offset..offset + buf.len() as u64, usize::MAX, false).await {
            Ok(pieces) => pieces,
            Err(error) => return (buf, Err(error)),
        };
        self.read_pieces(buf, offset, &pieces).await
    }

    /// Fills the window of `buf`, which starts at guest `offset`, from `pieces` that cover it without gaps.
    pub async fn read_pieces(&self, mut buf: Buf, offset: u64, pieces: &[Piece]) -> WithBuf {
        let window = buf.window();
        let mut rest = pieces;
        while let Some(first) = rest.first() {
            let at = window.start + (first.range.start - offset) as usize;
            let len = (first.range.end - first.range.start) as usize;
            let result = match &first.kind {
                PieceKind::Zero => {
                    rest = &rest[1..];
                    buf.set_window(at..at + len);
                    buf.fill(0);
                    Ok(())
                }
                PieceKind::Raw { layer, storage, offset } => {
                    rest = &rest[1..];
                    buf.set_window(at..at + len);
                    match self.storage(*layer, *storage) {
                        Ok(storage) => {
                            let (back, result) = storage.read_at(buf, *offset).await;
                            buf = back;
                            result
                        }
                        Err(error) => Err(error),
                    }
                }
                PieceKind::Encoded(..) => {
                    let group = gather(rest);
                    let (now, later) = rest.split_at(group);
                    rest = later;
                    buf.set_window(window.clone());
                    let (back, result) = self.read_encoded(buf, offset, now).await;
                    buf = back;
                    result
                }
            };
            if let Err(error) = result {
                buf.set_window(window);
                return (buf, Err(error));
            }
        }
        buf.set_window(window);
        (buf, Ok(()))
    }

    /// Reads neighbouring encoded pieces with one request and decodes them into `buf`.
    async fn read_encoded(&self, mut buf: Buf, offset: u64, pieces: &[Piece]) -> WithBuf {
        let encoded = |piece: &Piece| match &piece.kind {
            PieceKind::Encoded(layer, encoded) => Some((*layer, encoded.clone())),
            _ => None,
        };
        let Some((layer, first)) = pieces.first().and_then(encoded) else { return (buf, Ok(())) };
        if let [piece] = pieces
            && let Some(block) = self.cached((layer, first.storage, first.offset))
        {
            let at = (piece.range.start - offset) as usize;
            let len = (piece.range.end - piece.range.start) as usize;
            let skip = first.skip as usize;
            buf[at..at + len].copy_from_slice(&block[skip..skip + len]);
            return (buf, Ok(()));
        }
        let parts: Vec<(Range<u64>, Encoded)> =
            pieces.iter().filter_map(|p| encoded(p).map(|(_, e)| (p.range.clone(), e))).collect();
        if let Some((_, e)) = parts.iter().find(|(_, e)| e.block_len.max(e.len / 2) > ENCODED_BLOCK_BYTES_MAX)
        {
            let error = Error::new(Code::TableLimit, "a compressed block is larger than the limit")
                .at(e.offset)
                .found(e.block_len)
                .allowed(format!("up to {ENCODED_BLOCK_BYTES_MAX} bytes"))
                .hint("convert the image with the tool that made it");
            return (buf, Err(error));
        }
        let end = parts.iter().map(|(_, e)| e.offset + u64::from(e.len)).max().unwrap_or(first.offset);
        let storage = match self.storage(layer, first.storage) {
            Ok(storage) => storage.clone(),
            Err(error) => return (buf, Err(error)),
        };
        let (fetched, result) =
            storage.read_at(self.0.pool.take((end - first.offset) as usize), first.offset).await;
        if let Err(error) = result {
            return (buf, Err(error.context("reading compressed data")));
        }
        let base = first.offset;
        let disk = self.clone();
        let work = move || {
            for (range, encoded) in &parts {
                let from = (encoded.offset - base) as usize;
                let source = &fetched[from..from + encoded.len as usize];
                let at = (range.start - offset) as usize;
                let target = &mut buf[at..at + (range.end - range.start) as usize];
                if let Err(error) = disk.decode(layer, encoded, source, target) {
                    let error = error
                        .image(storage.name())
                        .at(encoded.offset)
                        .context(format!("decoding the block of guest bytes at {:#x}", range.start));
                    return (buf, Err(error));
                }
            }
            (buf, Ok(()))
        };
        match &self.0.options.spawner {
            None => work(),
            Some(spawner) => {
                let (completer, completion) = Completion::<WithBuf>::slot();
                spawner.spawn(Box::new(move || completer.complete(work())));
                completion.await
            }
        }
    }

    fn decode(&self, layer: usize, encoded: &Encoded, source: &[u8], target: &mut [u8]) -> Result<()> {
        let codec: &dyn Codec = encoded.codec.as_ref();
        if encoded.skip == 0 && target.len() == encoded.block_len as usize {
            return codec.decode(source, target);
        }
        let mut block = vec![0u8; encoded.block_len as usize];
        codec.decode(source, &mut block)?;
        let skip = encoded.skip as usize;
        target.copy_from_slice(&block[skip..skip + target.len()]);
        let mut cache = self.0.decoded.lock();
        cache.push_back(((layer, encoded.storage, encoded.offset), block.into()));
        while cache.iter().map(|(_, block)| block.len()).sum::<usize>() > DECODED_BUDGET_BYTES {
            cache.pop_front();
        }
        Ok(())
    }

    fn cached(&self, key: BlockKey) -> Option<Arc<[u8]>> {
        self.0.decoded.lock().iter().find(|(at, _)| *at == key).map(|(_, block)| block.clone())
    }
}

/// How many of the first pieces are encoded neighbours worth one read.
fn gather(pieces: &[Piece]) -> usize {
    let mut last: Option<(usize, usize, u64, u64)> = None;
    for (count, piece) in pieces.iter().enumerate() {
        let PieceKind::Encoded(layer, e) = &piece.kind else { return count };
        let end = e.offset + u64::from(e.len);
        last = match last {
            None => Some((*layer, e.storage, e.offset, end)),
            Some((l, s, start, reached))
                if l == *layer
                    && s == e.storage
                    && e.offset >= start
                    && e.offset <= reached + GATHER_GAP
                    && end - start <= GATHER_BYTES =>
            {
                Some((l, s, start, reached.max(end)))
            }
            Some(_) => return count,
        };
    }
    pieces.len()
}

/// Adds a piece, joined with the last one where they continue each other.
fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    if let Some(last) = pieces.last_mut() {
        let joined = match (&last.kind, &piece.kind) {
            (PieceKind::Zero, PieceKind::Zero) => true,
            (
                PieceKind::Raw { layer: l, storage: s, offset: o },
                PieceKind::Raw { layer, storage, offset },
            ) => l == layer && s == storage && o + (last.range.end - last.range.start) == *offset,
            _ => false,
        };
        if joined {
            last.range.end = piece.range.end;
            return;
        }
    }
    pieces.push(piece);
}

impl Storage for Disk {
    fn name(&self) -> &str {
        &self.0.name
    }
    fn len(&self) -> Result<u64> {
        Ok(self.size())
    }
    fn limits(&self) -> StorageLimits {
        StorageLimits {
            read_only: !self.is_writable(),
            resizable: false,
            knows_holes: true,
            ..StorageLimits::default()
        }
    }
    fn read_at(&self, mut buf: Buf, offset: u64) -> Completion<WithBuf> {
        if let Some(result) = self.try_read(&mut buf, offset) {
            return Completion::ready((buf, result));
        }
        let disk = self.clone();
        Completion::started(async move { disk.read(buf, offset).await })
    }
    fn write_at(&self, buf: Buf, offset: u64, flags: WriteFlags) -> Completion<WithBuf> {
        self.write(buf, offset, flags)
    }
    fn flush(&self) -> Completion<Result<()>> {
        self.flush_all()
    }
    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Completion<Result<()>> {
        self.write_zeroes(range, mode)
    }
    fn discard(&self, range: Range<u64>) -> Completion<Result<()>> {
        self.discard_range(range)
    }
    fn status(&self, range: Range<u64>) -> Completion<Result<crate::StatusList>> {
        let disk = self.clone();
        Completion::from_future(async move {
            let pieces = disk.pieces(range, 1024).await?;
            Ok(pieces
                .into_iter()
                .map(|piece| match piece.kind {
                    PieceKind::Zero => (piece.range, Status::Hole),
                    _ => (piece.range, Status::Data),
                })
                .collect())
        })
    }
    fn set_len(&self, _len: u64, _preallocate: Preallocate) -> Completion<Result<()>> {
        Completion::ready(Err(read_only(&self.0.name)))
    }
    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Option<Result<()>> {
        self.try_read(buf, offset)
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}
