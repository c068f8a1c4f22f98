//! The job file of a conversion: `<target>.convert.vellum-job`, beside the target (RELIABILITY.md section 3.5, class A).
//!
//! ```text
//!   record = length u32 | kind u32 | sequence u64 | crc32c u32 | payload | zeros to a multiple of 4096
//!   BEGIN    text, `name=value` lines: what is converted into what, and the seed of the writer
//!   DONE     watermark u64 | check u32 | blocks placed since the last DONE, as runs
//! ```
//!
//! All numbers little-endian. A torn record ends the log: its checksum does not match. A DONE record is appended only
//! after the target's data below its watermark was flushed, so the log never claims more than is there.

use crate::pipeline::Placed;
use std::sync::Arc;
use vellum_core::storage::{read_vec, write_slice};
use vellum_core::{
    Access, Asker, Code, Error, Location, Payload, Resolver, Result, Storage, block_on, bytes,
};

const RECORD_ALIGN: u64 = 4096;
const HEADER_BYTES: u64 = 20;
const BEGIN: u32 = 1;
const DONE: u32 = 2;
/// A record larger than this is no record of ours.
const RECORD_BYTES_MAX: u64 = 256 << 20;

/// A job file that is open for appending.
pub(crate) struct Journal {
    storage: Arc<dyn Storage>,
    end: u64,
    sequence: u64,
}

/// What a job file says.
pub(crate) struct Progressed {
    pub begin: String,
    /// All guest data below this is in the target.
    pub position: u64,
    /// Blocks that were placed, in order.
    pub placed: Vec<Placed>,
}

/// Where the job file of a conversion to `target` stands.
pub(crate) fn location(resolver: &dyn Resolver, target: &Location) -> Location {
    resolver.beside(target, &format!("{}.convert.vellum-job", resolver.file_name(target)))
}

/// Deletes the job file that an earlier conversion left, if there is one, before its `.part` file is replaced.
pub(crate) fn forget(resolver: &dyn Resolver, location: &Location) -> Result<()> {
    block_on(async {
        if resolver.exists(location).await? {
            resolver.delete(location).await?;
            resolver.sync_directory(location).await?;
        }
        Ok(())
    })
}

impl Journal {
    /// Begins a job file, replacing an old one, and makes it durable.
    pub async fn begin(resolver: &dyn Resolver, location: &Location, begin: &str) -> Result<Self> {
        let storage = resolver.create(location, true).await?;
        let mut journal = Journal { storage, end: 0, sequence: 0 };
        journal.append(BEGIN, begin.as_bytes()).await?;
        resolver.sync_directory(location).await?;
        Ok(journal)
    }

    /// Opens the job file that an interrupted conversion left; `None` if there is none.
    pub async fn resume(resolver: &dyn Resolver, location: &Location) -> Result<Option<(Self, Progressed)>> {
        if !resolver.exists(location).await? {
            return Ok(None);
        }
        let opened =
            resolver.open(&location.0, &Asker::User, Access { write: true, ..Access::default() }).await?;
        let mut journal = Journal { storage: opened.storage, end: 0, sequence: 0 };
        let Some((BEGIN, begin)) = journal.next().await? else {
            return Err(damaged(location, "it has no beginning"));
        };
        let begin = String::from_utf8(begin).map_err(|_| damaged(location, "its beginning is no text"))?;
        let mut progressed = Progressed { begin, position: 0, placed: Vec::new() };
        while let Some((kind, payload)) = journal.next().await? {
            let position = bytes::le64(&payload, 0).filter(|_| kind == DONE);
            let (Some(position), Some(runs)) = (position, payload.get(8..)) else {
                return Err(damaged(location, "a record is of no known kind"));
            };
            progressed.position = position;
            decode(runs, &mut progressed.placed).ok_or_else(|| damaged(location, "a record is cut off"))?;
        }
        Ok(Some((journal, progressed)))
    }

    /// Records that all data below `position` is durable in the target, and what was placed since the last record.
    pub async fn done(&mut self, position: u64, placed: &[Placed]) -> Result<()> {
        let mut payload = position.to_le_bytes().to_vec();
        encode(placed, &mut payload);
        self.append(DONE, &payload).await
    }

    async fn append(&mut self, kind: u32, payload: &[u8]) -> Result<()> {
        let mut record = Vec::with_capacity(payload.len() + HEADER_BYTES as usize);
        record.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        record.extend_from_slice(&kind.to_le_bytes());
        record.extend_from_slice(&self.sequence.to_le_bytes());
        record.extend_from_slice(&[0; 4]);
        record.extend_from_slice(payload);
        let crc = crc32c::crc32c(&record).to_le_bytes();
        record[16..20].copy_from_slice(&crc);
        record.resize((record.len() as u64).next_multiple_of(RECORD_ALIGN) as usize, 0);
        write_slice(self.storage.as_ref(), self.end, &record).await?;
        self.storage.flush().await?;
        self.end += record.len() as u64;
        self.sequence += 1;
        Ok(())
    }

    /// The next whole record; `None` at the end or at a torn one, which the next append overwrites.
    async fn next(&mut self) -> Result<Option<(u32, Vec<u8>)>> {
        let len = self.storage.len()?;
        if self.end + HEADER_BYTES > len {
            return Ok(None);
        }
        let header = read_vec(self.storage.as_ref(), self.end, HEADER_BYTES as usize).await?;
        let field = |index| bytes::le32(&header, index).unwrap_or(0);
        let (payload_len, kind, crc) = (u64::from(field(0)), field(1), field(4));
        let sequence = bytes::le64(&header, 1);
        let total = HEADER_BYTES + payload_len;
        if sequence != Some(self.sequence) || total > RECORD_BYTES_MAX || self.end + total > len {
            return Ok(None);
        }
        let mut record = read_vec(self.storage.as_ref(), self.end, total as usize).await?;
        record[16..20].fill(0);
        if crc32c::crc32c(&record) != crc {
            return Ok(None);
        }
        self.end += total.next_multiple_of(RECORD_ALIGN);
        self.sequence += 1;
        Ok(Some((kind, record[HEADER_BYTES as usize..].to_vec())))
    }
}

#[cold]
fn damaged(location: &Location, why: &str) -> Error {
    Error::new(Code::JournalMismatch, format!("the job file cannot be used: {why}"))
        .image(location)
        .hint("start over without --resume")
}

/// Runs of neighbours: `first block u64 | count u32 | 0` for data, `first block u64 | count u32 | 1 | lengths u32...`
/// for encoded blocks.
fn encode(placed: &[Placed], out: &mut Vec<u8>) {
    let encoded = |p: &Placed| matches!(p.payload, Payload::Encoded { .. });
    let runs = placed.chunk_by(|a, b| b.block == a.block + 1 && encoded(a) == encoded(b));
    for run in runs {
        let Some(first) = run.first() else { continue };
        out.extend_from_slice(&first.block.to_le_bytes());
        out.extend_from_slice(&(run.len() as u32).to_le_bytes());
        out.extend_from_slice(&u32::from(encoded(first)).to_le_bytes());
        for placed in run {
            if let Payload::Encoded { len } = placed.payload {
                out.extend_from_slice(&(len as u32).to_le_bytes());
            }
        }
    }
}

fn decode(mut runs: &[u8], placed: &mut Vec<Placed>) -> Option<()> {
    while !runs.is_empty() {
        let (head, rest) = runs.split_at_checked(16)?;
        let (first, count, encoded) = (bytes::le64(head, 0)?, bytes::le32(head, 2)?, bytes::le32(head, 3)?);
        let lengths = if encoded == 1 { (count as usize).checked_mul(4)? } else { 0 };
        let (lengths, rest) = rest.split_at_checked(lengths)?;
        for index in 0..count {
            let payload = match encoded {
                1 => Payload::Encoded { len: bytes::le32(lengths, index as usize)? as usize },
                _ => Payload::Data,
            };
            placed.push(Placed { block: first.checked_add(u64::from(index))?, payload });
        }
        runs = rest;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(block: u64, len: Option<usize>) -> Placed {
        Placed { block, payload: len.map_or(Payload::Data, |len| Payload::Encoded { len }) }
    }

    #[test]
    fn a_torn_record_ends_the_log_and_is_overwritten() {
        let files = vellum_sim::MemoryFiles::new();
        let at = location(files.as_ref(), &Location::from("d/out.qcow2"));
        assert_eq!(at.0, "d/out.qcow2.convert.vellum-job");
        let first = [placed(3, None), placed(4, None), placed(7, Some(100)), placed(8, Some(65_000))];
        let second = [placed(9, None)];
        let mut journal = block_on(Journal::begin(files.as_ref(), &at, "source=a\n")).unwrap();
        block_on(journal.done(1 << 20, &first)).unwrap();
        block_on(journal.done(2 << 20, &second)).unwrap();

        let (_, all) = block_on(Journal::resume(files.as_ref(), &at)).unwrap().unwrap();
        assert_eq!((all.begin.as_str(), all.position), ("source=a\n", 2 << 20));
        assert_eq!(all.placed, [&first[..], &second[..]].concat());

        let file = files.get(&at.0).unwrap();
        block_on(write_slice(file.as_ref(), 2 * RECORD_ALIGN + 25, &[0xff])).unwrap();
        let (mut journal, torn) = block_on(Journal::resume(files.as_ref(), &at)).unwrap().unwrap();
        assert_eq!((torn.position, torn.placed.as_slice()), (1 << 20, &first[..]));
        block_on(journal.done(3 << 20, &second)).unwrap();
        let (_, mended) = block_on(Journal::resume(files.as_ref(), &at)).unwrap().unwrap();
        assert_eq!(mended.position, 3 << 20);
    }
}
