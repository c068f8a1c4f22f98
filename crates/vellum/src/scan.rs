//! [`Scan`]: walks one disk in ascending order and hands out the chunks that hold data, to any number of threads.

use parking_lot::Mutex;
use std::collections::VecDeque;
use std::ops::Range;
use vellum_core::{Disk, Piece, PieceKind, Result, block_on};

/// Bytes of a chunk, unless a block of source or target is larger.
pub(crate) const CHUNK_BYTES: u64 = 1 << 20;
/// Chunks never exceed this, whatever blocks an image has.
const CHUNK_BYTES_MAX: u64 = 8 << 20;
/// Pieces fetched from the map at a time.
const PIECES_AT_A_TIME: usize = 256;

/// A chunk of the disk that holds data.
pub(crate) struct Chunk {
    /// Counts chunks from 0 without gaps.
    pub sequence: u64,
    /// The guest range: aligned to the chunk size, clipped to the disk.
    pub range: Range<u64>,
    /// What is there, without gaps.
    pub pieces: Vec<Piece>,
}

/// Hands out chunks.
pub(crate) struct Scan {
    disk: Disk,
    chunk_bytes: u64,
    state: Mutex<State>,
}

struct State {
    position: u64,
    sequence: u64,
    ahead: VecDeque<Piece>,
}

/// The chunk size that suits blocks of these sizes.
pub(crate) fn chunk_bytes(blocks: impl IntoIterator<Item = u64>) -> u64 {
    let largest = blocks.into_iter().max().unwrap_or(0);
    largest.clamp(CHUNK_BYTES, CHUNK_BYTES_MAX).next_power_of_two()
}

impl Scan {
    /// A scan of `disk` from `start` (a multiple of `chunk_bytes`, a power of two).
    pub fn new(disk: Disk, chunk_bytes: u64, start: u64) -> Self {
        let state = State { position: start, sequence: 0, ahead: VecDeque::new() };
        Scan { disk, chunk_bytes, state: Mutex::new(state) }
    }

    /// The next chunk that holds data, or `None` at the end of the disk.
    pub fn next(&self) -> Result<Option<Chunk>> {
        let mut state = self.state.lock();
        if !self.skip_zeroes(&mut state)? {
            return Ok(None);
        }
        let start = state.position / self.chunk_bytes * self.chunk_bytes;
        let end = start.saturating_add(self.chunk_bytes).min(self.disk.size());
        let mut pieces = Vec::new();
        if state.position > start {
            pieces.push(Piece { range: start..state.position, kind: PieceKind::Zero });
        }
        while state.position < end {
            if state.ahead.is_empty() {
                self.fetch(&mut state)?;
            }
            let Some(piece) = state.ahead.pop_front() else { break };
            let (now, later) = split(piece, end);
            state.position = now.range.end;
            pieces.push(now);
            if let Some(later) = later {
                state.ahead.push_front(later);
            }
        }
        let sequence = state.sequence;
        state.sequence += 1;
        Ok(Some(Chunk { sequence, range: start..end, pieces }))
    }

    /// Moves on to the next piece that is not zero; `false` at the end.
    fn skip_zeroes(&self, state: &mut State) -> Result<bool> {
        loop {
            if state.position >= self.disk.size() {
                return Ok(false);
            }
            match state.ahead.front() {
                None => self.fetch(state)?,
                Some(piece) if matches!(piece.kind, PieceKind::Zero) => {
                    state.position = piece.range.end;
                    state.ahead.pop_front();
                }
                Some(_) => return Ok(true),
            }
        }
    }

    fn fetch(&self, state: &mut State) -> Result<()> {
        let pieces = block_on(self.disk.pieces(state.position..self.disk.size(), PIECES_AT_A_TIME))?;
        state.ahead.extend(pieces);
        Ok(())
    }
}

/// Cuts a piece at guest offset `at`.
pub(crate) fn split(mut piece: Piece, at: u64) -> (Piece, Option<Piece>) {
    if piece.range.end <= at {
        return (piece, None);
    }
    let first = at - piece.range.start;
    let kind = match &piece.kind {
        PieceKind::Zero => PieceKind::Zero,
        PieceKind::Raw { layer, storage, offset } => {
            PieceKind::Raw { layer: *layer, storage: *storage, offset: offset + first }
        }
        PieceKind::Encoded(layer, encoded) => {
            let mut encoded = encoded.clone();
            encoded.skip = encoded.skip.saturating_add(u32::try_from(first).unwrap_or(u32::MAX));
            PieceKind::Encoded(*layer, encoded)
        }
    };
    let later = Piece { range: at..piece.range.end, kind };
    piece.range.end = at;
    (piece, Some(later))
}
