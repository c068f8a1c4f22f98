//! The pipeline of convert: read, transform, place in order, write; on any number of threads, in bounded memory.
//!
//! Every thread takes a chunk of the source through all steps. Only placing is done in turn, in ascending guest
//! order, which is what makes the result independent of the threads' luck:
//!
//! ```text
//!   scan.next()  ->  read + decode  ->  find zeroes, encode  ->  in turn: place  ->  write
//! ```
//!
//! Encoded chunks whose turn has not come are left to the thread that brings the one before them, so that nobody waits
//! for a slower neighbour while there is something to encode.

use crate::scan::{Chunk, Scan};
use crate::{Control, Progress};
use parking_lot::{Condvar, Mutex};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vellum_core::{
    Buf, BufPool, Code, CopyMode, Disk, Error, ImageWriter, MetaWrite, Offloaded, Payload, Piece, PieceKind,
    Result, Storage, WriteFlags, WriterShape, bytes,
};

/// A block that was placed: what a resumed job repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub block: u64,
    pub payload: Payload,
}

/// What a pipeline is asked to do.
pub(crate) struct Plan<'a> {
    pub disk: Disk,
    pub scan: Scan,
    pub writer: Box<dyn ImageWriter>,
    /// Runs of zeros of at least this many bytes are not written; 0 writes all data as it is.
    pub sparse_bytes: u64,
    /// Place blocks without looking at them and share them with the source where the host can. Never changes during
    /// a job, nor between a job and its resumption: what is placed depends on it.
    pub share: bool,
    pub threads: usize,
    pub progress: &'a dyn Progress,
    /// Keep a record of placements for checkpoints.
    pub keep_log: bool,
}

/// The pipeline while it runs.
pub(crate) struct Pipeline<'a> {
    disk: Disk,
    scan: Scan,
    shape: WriterShape,
    storages: Vec<Arc<dyn Storage>>,
    pool: BufPool,
    sparse_bytes: u64,
    share: bool,
    progress: &'a dyn Progress,
    turn: Mutex<Turn>,
    turned: Condvar,
    done: Mutex<Done>,
    stop: AtomicBool,
    failed: Mutex<Option<Error>>,
    moved: AtomicU64,
    keep_log: bool,
    threads: usize,
}

struct Turn {
    next: u64,
    writer: Box<dyn ImageWriter>,
    /// Encoded chunks that came before their turn.
    early: BTreeMap<u64, Encoded>,
}

/// A chunk whose blocks are encoded and have no place yet.
struct Encoded {
    chunk: Chunk,
    blocks: Vec<EncodedBlock>,
}

/// A chunk whose blocks have places: what is to be written, and what a resumed job repeats.
struct PlacedChunk {
    chunk: Chunk,
    parts: Vec<MetaWrite>,
    placed: Vec<Placed>,
}

/// Chunks that are written, and what was placed for them, until a checkpoint takes it.
#[derive(Default)]
struct Done {
    log: BTreeMap<u64, (u64, Vec<Placed>)>,
    finished: BTreeMap<u64, ()>,
    next: u64,
}

/// All chunks below `position` are written.
#[derive(Debug, Default)]
pub(crate) struct Checkpoint {
    pub position: u64,
    pub placed: Vec<Placed>,
}

/// Bytes that go to one place.
struct Write {
    storage: usize,
    offset: u64,
    guest: Range<u64>,
}

/// An encoded block.
struct EncodedBlock {
    block: u64,
    bytes: Vec<u8>,
    /// It did not get smaller: stored as it is.
    plain: bool,
}

impl<'a> Pipeline<'a> {
    pub fn new(plan: Plan<'a>) -> Self {
        Pipeline {
            disk: plan.disk,
            scan: plan.scan,
            shape: plan.writer.shape().clone(),
            storages: plan.writer.storages().to_vec(),
            pool: BufPool::new(16 << 20),
            sparse_bytes: plan.sparse_bytes,
            share: plan.share,
            progress: plan.progress,
            turn: Mutex::new(Turn { next: 0, writer: plan.writer, early: BTreeMap::new() }),
            turned: Condvar::new(),
            done: Mutex::default(),
            stop: AtomicBool::new(false),
            failed: Mutex::new(None),
            moved: AtomicU64::new(0),
            keep_log: plan.keep_log,
            threads: plan.threads.max(1),
        }
    }

    /// Runs to the end, or to the first error, on `threads` threads.
    pub fn run(&self) -> Result<()> {
        std::thread::scope(|scope| {
            for _ in 1..self.threads {
                scope.spawn(|| self.work());
            }
            self.work();
        });
        match self.failed.lock().take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Bytes of data that were moved.
    pub fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    /// Whether the workers are to stop.
    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The writer, when all workers have ended.
    pub fn into_writer(self) -> Box<dyn ImageWriter> {
        self.turn.into_inner().writer
    }

    /// What was finished since the last checkpoint, if anything.
    pub fn checkpoint(&self) -> Option<Checkpoint> {
        let mut done = self.done.lock();
        let mut checkpoint = Checkpoint::default();
        while done.log.first_key_value().is_some_and(|(sequence, _)| *sequence < done.next) {
            if let Some((_, (position, placed))) = done.log.pop_first() {
                checkpoint.position = position;
                checkpoint.placed.extend(placed);
            }
        }
        (checkpoint.position > 0).then_some(checkpoint)
    }

    fn work(&self) {
        let mut buf = self.pool.take(0);
        while !self.is_stopping() {
            match self.step(buf) {
                Ok(Some(back)) => buf = back,
                Ok(None) => return,
                Err(error) => {
                    self.fail(error);
                    return;
                }
            }
        }
    }

    fn fail(&self, error: Error) {
        let mut failed = self.failed.lock();
        // The others only report that they were stopped.
        if failed.is_none() || failed.as_ref().is_some_and(|e| e.code() == Code::Cancelled) {
            *failed = Some(error);
        }
        drop(failed);
        self.stop.store(true, Ordering::Relaxed);
        let _turn = self.turn.lock();
        self.turned.notify_all();
    }

    /// Takes one chunk through; the buffer comes back for the next, `None` at the end.
    fn step(&self, mut buf: Buf) -> Result<Option<Buf>> {
        let Some(chunk) = self.scan.next()? else { return Ok(None) };
        let len = (chunk.range.end - chunk.range.start) as usize;
        let whole_blocks = len.next_multiple_of(self.shape.block_size.min(1 << 23) as usize);
        if buf.capacity() < whole_blocks {
            buf = self.pool.take(whole_blocks);
        }
        if self.shape.codec.is_some() {
            return self.encode_chunk(buf, chunk, whole_blocks).map(Some);
        }
        let (buf, placed) = match self.share && only_raw(&chunk.pieces) {
            true => self.share_chunk(buf, &chunk)?,
            false => self.copy_chunk(buf, &chunk)?,
        };
        self.finish_chunk(&chunk, placed)?;
        Ok(Some(buf))
    }

    /// Reports a chunk that is written.
    fn finish_chunk(&self, chunk: &Chunk, placed: Vec<Placed>) -> Result<()> {
        if self.keep_log {
            let mut done = self.done.lock();
            done.log.insert(chunk.sequence, (chunk.range.end, placed));
            done.finished.insert(chunk.sequence, ());
            while let Some((first, ())) = done.finished.first_key_value()
                && *first == done.next
            {
                done.finished.pop_first();
                done.next += 1;
            }
        }
        let len = chunk.range.end - chunk.range.start;
        let moved = self.moved.fetch_add(len, Ordering::Relaxed) + len;
        match self.progress.advance(chunk.range.end, moved) {
            Control::Stop => Err(stopped()),
            Control::Continue => Ok(()),
        }
    }

    /// Reads the chunk into the buffer's window `0..len`.
    fn read(&self, mut buf: Buf, chunk: &Chunk) -> Result<Buf> {
        buf.set_window(0..(chunk.range.end - chunk.range.start) as usize);
        let (buf, result) =
            vellum_core::block_on(self.disk.read_pieces(buf, chunk.range.start, &chunk.pieces));
        result.map_err(|e| e.context(format!("reading guest bytes at {:#x}", chunk.range.start)))?;
        Ok(buf)
    }

    /// Runs `place` when it is this chunk's turn.
    fn in_turn<T>(&self, chunk: &Chunk, place: impl FnOnce(&mut dyn ImageWriter) -> Result<T>) -> Result<T> {
        let mut turn = self.turn.lock();
        while turn.next != chunk.sequence {
            if self.is_stopping() {
                return Err(stopped());
            }
            self.turned.wait(&mut turn);
        }
        let result = place(turn.writer.as_mut());
        if result.is_ok() {
            turn.next += 1;
            self.turned.notify_all();
        }
        result
    }

    // Data as it is.

    fn copy_chunk(&self, buf: Buf, chunk: &Chunk) -> Result<(Buf, Vec<Placed>)> {
        let mut buf = self.read(buf, chunk)?;
        let runs = self.data_runs(&buf, chunk);
        let (writes, metadata, placed) = self.place_runs(chunk, &runs)?;
        for write in &writes {
            buf = self.write_from(buf, chunk.range.start, write)?;
        }
        self.write_metadata(metadata)?;
        Ok((buf, placed))
    }

    /// The guest ranges of the chunk that must be written.
    fn data_runs(&self, buf: &[u8], chunk: &Chunk) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for piece in chunk.pieces.iter().filter(|piece| !matches!(piece.kind, PieceKind::Zero)) {
            let from = (piece.range.start - chunk.range.start) as usize;
            let len = (piece.range.end - piece.range.start) as usize;
            self.add_data_runs(&buf[from..from + len], piece.range.start, &mut runs);
        }
        runs
    }

    /// Adds the ranges of `content`, which begins at guest byte `start`, that are not zero.
    fn add_data_runs(&self, content: &[u8], start: u64, runs: &mut Vec<Range<u64>>) {
        let end = start + content.len() as u64;
        let mut add = |range: Range<u64>| match runs.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => runs.push(range),
        };
        if self.sparse_bytes == 0 {
            return add(start..end);
        }
        let mut at = start;
        while at < end {
            // Cut at multiples of the unit, so that what is written stays aligned.
            let stop = (at / self.sparse_bytes + 1).saturating_mul(self.sparse_bytes).min(end);
            if !bytes::is_zero(&content[(at - start) as usize..(stop - start) as usize]) {
                add(at..stop);
            }
            at = stop;
        }
    }

    /// Places the blocks of `runs`; neighbours in guest and file become one write.
    fn place_runs(
        &self,
        chunk: &Chunk,
        runs: &[Range<u64>],
    ) -> Result<(Vec<Write>, Vec<MetaWrite>, Vec<Placed>)> {
        let block_size = self.shape.block_size;
        self.in_turn(chunk, |writer| {
            let (mut writes, mut metadata, mut placed) =
                (Vec::<Write>::new(), Vec::new(), Vec::<Placed>::new());
            for run in runs {
                let mut at = run.start;
                while at < run.end {
                    let block = at / block_size;
                    let end = run.end.min((block + 1).saturating_mul(block_size));
                    let place = writer.place(block, Payload::Data, &mut metadata)?;
                    if self.keep_log && placed.last().is_none_or(|last| last.block != block) {
                        placed.push(Placed { block, payload: Payload::Data });
                    }
                    let offset = place.offset + (at - block * block_size);
                    match writes.last_mut() {
                        Some(last)
                            if last.storage == place.storage
                                && last.guest.end == at
                                && last.offset + (last.guest.end - last.guest.start) == offset =>
                        {
                            last.guest.end = end;
                        }
                        _ => writes.push(Write { storage: place.storage, offset, guest: at..end }),
                    }
                    at = end;
                }
            }
            Ok((writes, metadata, placed))
        })
    }

    fn storage(&self, index: usize) -> Result<&Arc<dyn Storage>> {
        self.storages
            .get(index)
            .ok_or_else(|| Error::new(Code::Corrupt, "a place names a storage that is not there"))
    }

    /// Writes a part of the buffer, whose byte 0 is guest byte `start`.
    fn write_from(&self, mut buf: Buf, start: u64, write: &Write) -> Result<Buf> {
        buf.set_window((write.guest.start - start) as usize..(write.guest.end - start) as usize);
        let storage = self.storage(write.storage)?;
        let len = buf.len() as u64;
        let (mut buf, result) = storage.write_at(buf, write.offset, WriteFlags::default()).wait();
        result.map_err(|e| e.context(format!("writing guest bytes at {:#x}", write.guest.start)))?;
        start_writeback(storage.as_ref(), write.offset..write.offset + len);
        buf.clear_window();
        Ok(buf)
    }

    fn write_metadata(&self, metadata: Vec<MetaWrite>) -> Result<()> {
        vellum_core::block_on(vellum_core::write_all(&self.storages, metadata))
    }

    // Blocks shared with the source.

    /// Places the chunk's data without looking at it and asks the host to share the blocks.
    fn share_chunk(&self, mut buf: Buf, chunk: &Chunk) -> Result<(Buf, Vec<Placed>)> {
        let runs: Vec<Range<u64>> = chunk
            .pieces
            .iter()
            .filter(|piece| !matches!(piece.kind, PieceKind::Zero))
            .map(|piece| piece.range.clone())
            .collect();
        let (writes, metadata, placed) = self.place_runs(chunk, &runs)?;
        for write in &writes {
            for piece in &chunk.pieces {
                buf = self.share_piece(buf, write, piece)?;
            }
        }
        self.write_metadata(metadata)?;
        Ok((buf, placed))
    }

    /// Brings the part of `write` that `piece` covers to its place: shared if possible, else read and written.
    fn share_piece(&self, mut buf: Buf, write: &Write, piece: &Piece) -> Result<Buf> {
        let guest = piece.range.start.max(write.guest.start)..piece.range.end.min(write.guest.end);
        let PieceKind::Raw { layer, storage, offset } = &piece.kind else { return Ok(buf) };
        if guest.start >= guest.end {
            return Ok(buf);
        }
        let len = guest.end - guest.start;
        let source = self.disk.storage(*layer, *storage)?;
        let target = self.storage(write.storage)?;
        let from = offset + (guest.start - piece.range.start);
        let to = write.offset + (guest.start - write.guest.start);
        let unit = u64::from(target.limits().granularity.max(1));
        let aligned = (from | to | len).is_multiple_of(unit);
        if aligned {
            let mode = if self.sparse_bytes == 0 { CopyMode::InKernel } else { CopyMode::ShareOnly };
            match target.copy_from(source.as_ref(), from, to, len, mode).wait()? {
                Offloaded::Done => return Ok(buf),
                Offloaded::Cannot => {}
            }
        }
        buf.set_window(0..len as usize);
        let (mut back, result) = source.read_at(buf, from).wait();
        result.map_err(|e| e.context(format!("reading guest bytes at {:#x}", guest.start)))?;
        let mut runs = Vec::new();
        self.add_data_runs(&back, guest.start, &mut runs);
        for run in runs {
            let part = Write { storage: write.storage, offset: to + (run.start - guest.start), guest: run };
            back = self.write_from(back, guest.start, &part)?;
        }
        back.clear_window();
        Ok(back)
    }

    // Encoded blocks.

    /// Reads and encodes a chunk, then places and writes it and those behind it that were waiting for it.
    fn encode_chunk(&self, buf: Buf, chunk: Chunk, whole_blocks: usize) -> Result<Buf> {
        let mut buf = self.read(buf, &chunk)?;
        let len = buf.len();
        buf.set_window(0..whole_blocks);
        // A last block that the disk does not fill is encoded with zeros behind it.
        buf[len..].fill(0);
        let blocks = self.encode_blocks(&buf, &chunk)?;
        for placed in self.place_encoded(Encoded { chunk, blocks })? {
            self.write_joined(placed.parts)?;
            self.finish_chunk(&placed.chunk, placed.placed)?;
        }
        Ok(buf)
    }

    /// Places every chunk whose turn has come. Waits only where too many are early: then another thread has the chunk
    /// that they wait for, and will place them all.
    fn place_encoded(&self, encoded: Encoded) -> Result<Vec<PlacedChunk>> {
        let mut ready = Vec::new();
        let mut turn = self.turn.lock();
        turn.early.insert(encoded.chunk.sequence, encoded);
        loop {
            let next = turn.next;
            let Some(encoded) = turn.early.remove(&next) else { break };
            ready.push(place_blocks(turn.writer.as_mut(), encoded)?);
            turn.next += 1;
        }
        if !ready.is_empty() {
            self.turned.notify_all();
        }
        while turn.early.len() > EARLY_CHUNKS_A_THREAD * self.threads {
            if self.is_stopping() {
                return Err(stopped());
            }
            self.turned.wait(&mut turn);
        }
        Ok(ready)
    }

    fn encode_blocks(&self, content: &[u8], chunk: &Chunk) -> Result<Vec<EncodedBlock>> {
        let Some(codec) = &self.shape.codec else { return Ok(Vec::new()) };
        let block_size = self.shape.block_size;
        let mut blocks = Vec::new();
        let mut scratch = Vec::new();
        for (index, source) in content.chunks(block_size as usize).enumerate() {
            let start = chunk.range.start + index as u64 * block_size;
            let range = start..start + block_size;
            if is_hole(&chunk.pieces, &range) || bytes::is_zero(source) {
                continue;
            }
            let fits = codec.encode(source, &mut scratch, self.shape.encoded_limit)?;
            let in_disk = (self.disk.size() - start).min(block_size) as usize;
            let bytes = if fits { scratch.clone() } else { source[..in_disk].to_vec() };
            blocks.push(EncodedBlock { block: start / block_size, bytes, plain: !fits });
        }
        Ok(blocks)
    }

    /// Writes `parts`, neighbours (and what lies in the same sector) together.
    fn write_joined(&self, mut parts: Vec<MetaWrite>) -> Result<()> {
        parts.sort_unstable_by_key(|part| (part.storage, part.offset));
        let mut rest = parts.as_slice();
        while let Some(first) = rest.first() {
            let (now, later) = rest.split_at(joinable(rest));
            rest = later;
            let place = |part: &MetaWrite| (part.offset - first.offset) as usize;
            let len = now.last().map_or(0, |last| place(last) + last.bytes.len());
            let mut buf = self.pool.take(len);
            let mut filled = 0;
            for part in now {
                let (from, to) = (place(part), place(part) + part.bytes.len());
                buf[filled..from].fill(0);
                buf[from..to].copy_from_slice(&part.bytes);
                filled = to;
            }
            let target = self.storage(first.storage)?;
            let result = target.write_at(buf, first.offset, WriteFlags::default()).wait().1;
            result.map_err(|e| e.context("writing compressed blocks"))?;
            start_writeback(target.as_ref(), first.offset..first.offset + len as u64);
        }
        Ok(())
    }
}

/// How many of the first parts, which are sorted, make one write: less than a sector between them is padding that
/// belongs to nobody.
fn joinable(parts: &[MetaWrite]) -> usize {
    let end = |part: &MetaWrite| part.offset + part.bytes.len() as u64;
    let apart = parts.windows(2).position(|pair| {
        let near = pair[1].storage == pair[0].storage
            && pair[1].offset >= end(&pair[0])
            && pair[1].offset - end(&pair[0]) < 512;
        !near || end(&pair[0]) - parts[0].offset >= JOINED_BYTES
    });
    apart.map_or(parts.len(), |last| last + 1)
}

/// Parts are joined until they are this long.
const JOINED_BYTES: u64 = 4 << 20;

/// How many encoded chunks may wait for their turn, by the number of threads.
const EARLY_CHUNKS_A_THREAD: usize = 2;

/// Lets the host begin with what is large enough to be worth it: the flush at the end is then short.
fn start_writeback(storage: &dyn Storage, range: Range<u64>) {
    if range.end - range.start >= 64 << 10 {
        storage.start_writeback(range);
    }
}

/// Gives every block of a chunk its place.
fn place_blocks(writer: &mut dyn ImageWriter, encoded: Encoded) -> Result<PlacedChunk> {
    let (mut parts, mut placed, mut metadata) = (Vec::new(), Vec::new(), Vec::new());
    for block in encoded.blocks {
        let len = block.bytes.len();
        let payload = if block.plain { Payload::Data } else { Payload::Encoded { len } };
        let place = writer.place(block.block, payload, &mut metadata)?;
        parts.push(MetaWrite { storage: place.storage, offset: place.offset, bytes: block.bytes });
        placed.push(Placed { block: block.block, payload });
    }
    parts.extend(metadata);
    Ok(PlacedChunk { chunk: encoded.chunk, parts, placed })
}

fn stopped() -> Error {
    Error::new(Code::Cancelled, "stopped before the end")
}

fn only_raw(pieces: &[Piece]) -> bool {
    pieces.iter().all(|piece| matches!(piece.kind, PieceKind::Raw { .. } | PieceKind::Zero))
}

/// Whether every piece in `range` is a hole.
fn is_hole(pieces: &[Piece], range: &Range<u64>) -> bool {
    pieces
        .iter()
        .filter(|piece| piece.range.start < range.end && piece.range.end > range.start)
        .all(|piece| matches!(piece.kind, PieceKind::Zero))
}
