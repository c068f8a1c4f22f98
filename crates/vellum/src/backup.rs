//! The backup that a repair keeps: `<image>.vellum-backup-<unix time>`, beside the image.
//!
//! ```text
//!   vellum-backup 1                                    text lines, ended by an empty one
//!   image=<place>   format=<name>   created=<seconds since 1970>
//!   file=<number> length=<bytes before the repair> place=<relative to the image; empty: the image itself>
//!
//!   record = kind u32 | file u32 | offset u64 | length u32 | crc32c u32 | payload         little-endian
//!   1 OLD      bytes that stood at offset before the repair
//!   2 WRITE    bytes that the repair writes at offset, in the order of its steps
//!   3 LENGTH   the repair makes the file `offset` bytes long
//!   4 END      the backup is complete; without it the repair did not begin
//! ```
//!
//! The checksum covers the 20 bytes before it and the payload. What the repair writes is kept too, so that undoing can
//! tell whether the image is still the one that was repaired.

use std::fmt::Write;
use std::sync::Arc;
use vellum_core::storage::{read_vec, write_slice};
use vellum_core::{Code, Error, Location, Resolver, Result, Storage, bytes};

const MAGIC: &str = "vellum-backup 1";
const HEADER_BYTES: usize = 24;
const TEXT_BYTES_MAX: u64 = 1 << 20;
const RECORD_BYTES_MAX: u32 = 64 << 20;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Old,
    Write,
    Length,
    End,
}

impl Kind {
    const ALL: [(u32, Kind); 4] = [(1, Kind::Old), (2, Kind::Write), (3, Kind::Length), (4, Kind::End)];

    fn number(self) -> u32 {
        Kind::ALL.iter().find(|(_, kind)| *kind == self).map_or(0, |(number, _)| *number)
    }

    fn of(number: u32) -> Option<Self> {
        Kind::ALL.iter().find(|(known, _)| *known == number).map(|(_, kind)| *kind)
    }
}

/// One record, without its payload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    pub kind: Kind,
    pub file: usize,
    pub offset: u64,
    pub len: u32,
    /// Where the payload stands in the backup.
    at: u64,
}

/// A file of the image as the backup names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BackedFile {
    pub len: u64,
    /// Empty: the image itself.
    pub place: String,
}

/// A backup that is being written.
pub(crate) struct Writer {
    storage: Arc<dyn Storage>,
    end: u64,
}

impl Writer {
    pub async fn begin(
        resolver: &dyn Resolver,
        location: &Location,
        image: &Location,
        format: &str,
        created_unix: u64,
        files: &[BackedFile],
    ) -> Result<Self> {
        let storage = resolver.create(location, false).await?;
        let mut text = format!("{MAGIC}\nimage={}\nformat={format}\n", image.0.escape_debug());
        let _ = writeln!(text, "created={created_unix}");
        for (number, file) in files.iter().enumerate() {
            let _ = writeln!(text, "file={number} length={} place={}", file.len, file.place.escape_debug());
        }
        text.push('\n');
        write_slice(storage.as_ref(), 0, text.as_bytes()).await?;
        Ok(Writer { storage, end: text.len() as u64 })
    }

    pub async fn append(&mut self, kind: Kind, file: usize, offset: u64, payload: &[u8]) -> Result<()> {
        let mut record = Vec::with_capacity(HEADER_BYTES + payload.len());
        record.extend_from_slice(&kind.number().to_le_bytes());
        record.extend_from_slice(&(file as u32).to_le_bytes());
        record.extend_from_slice(&offset.to_le_bytes());
        record.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&record), payload);
        record.extend_from_slice(&crc.to_le_bytes());
        record.extend_from_slice(payload);
        write_slice(self.storage.as_ref(), self.end, &record).await?;
        self.end += record.len() as u64;
        Ok(())
    }

    /// Makes the backup complete and durable, its name too.
    pub async fn finish(mut self, resolver: &dyn Resolver, location: &Location) -> Result<u64> {
        self.append(Kind::End, 0, 0, &[]).await?;
        self.storage.flush().await?;
        resolver.sync_directory(location).await?;
        Ok(self.end)
    }
}

/// A backup that is complete.
pub(crate) struct Backup {
    storage: Arc<dyn Storage>,
    pub files: Vec<BackedFile>,
    pub records: Vec<Record>,
}

impl Backup {
    pub async fn read(storage: Arc<dyn Storage>) -> Result<Self> {
        let len = storage.len()?;
        let head = read_vec(storage.as_ref(), 0, len.min(TEXT_BYTES_MAX) as usize).await?;
        let text_end = head.windows(2).position(|pair| pair == b"\n\n");
        let text = text_end.and_then(|end| std::str::from_utf8(head.get(..end)?).ok());
        let Some(text) = text.filter(|text| text.lines().next() == Some(MAGIC)) else {
            return Err(damaged(storage.as_ref(), "it does not begin as a backup of vellum does"));
        };
        let mut backup = Backup {
            storage: storage.clone(),
            files: files_of(storage.as_ref(), text)?,
            records: Vec::new(),
        };
        let mut at = text.len() as u64 + 2;
        loop {
            let record = backup.record(at, len).await?;
            if record.kind == Kind::End {
                return Ok(backup);
            }
            at = record.at + u64::from(record.len);
            backup.records.push(record);
        }
    }

    async fn record(&self, at: u64, len: u64) -> Result<Record> {
        let storage = self.storage.as_ref();
        let cut_off = || {
            damaged(storage, "it is cut off")
                .hint("a backup is complete before a repair begins: the image was not changed")
        };
        if len.saturating_sub(at) < HEADER_BYTES as u64 {
            return Err(cut_off());
        }
        let header = read_vec(storage, at, HEADER_BYTES).await?;
        let field = |index| bytes::le32(&header, index).unwrap_or(0);
        let record = Record {
            kind: Kind::of(field(0)).ok_or_else(|| damaged(storage, "a record is of no known kind"))?,
            file: field(1) as usize,
            offset: bytes::le64(&header, 1).unwrap_or(0),
            len: field(4),
            at: at + HEADER_BYTES as u64,
        };
        if record.file >= self.files.len() && record.kind != Kind::End {
            return Err(damaged(storage, "a record is about a file that it does not name"));
        }
        if record.len > RECORD_BYTES_MAX || record.offset.checked_add(u64::from(record.len)).is_none() {
            return Err(damaged(storage, "a record is too large"));
        }
        if u64::from(record.len) > len - record.at {
            return Err(cut_off());
        }
        let payload = self.payload(&record).await?;
        let crc = crc32c::crc32c_append(crc32c::crc32c(header.get(..20).unwrap_or_default()), &payload);
        match crc == field(5) {
            true => Ok(record),
            false => Err(damaged(storage, "the checksum of a record does not match").at(at)),
        }
    }

    pub async fn payload(&self, record: &Record) -> Result<Vec<u8>> {
        Ok(read_vec(self.storage.as_ref(), record.at, record.len as usize).await?.to_vec())
    }
}

fn files_of(storage: &dyn Storage, text: &str) -> Result<Vec<BackedFile>> {
    let mut files = Vec::new();
    for line in text.lines().filter(|line| line.starts_with("file=")) {
        let mut words = line.splitn(3, ' ');
        let number = words.next().and_then(|word| word.strip_prefix("file=")?.parse::<usize>().ok());
        let len = words.next().and_then(|word| word.strip_prefix("length=")?.parse().ok());
        let place = words.next().and_then(|word| unescape(word.strip_prefix("place=")?));
        match (number, len, place) {
            (Some(number), Some(len), Some(place)) if number == files.len() => {
                files.push(BackedFile { len, place });
            }
            _ => return Err(damaged(storage, "a line about a file is not understood").found(line)),
        }
    }
    Ok(files)
}

/// Takes back `str::escape_debug`.
fn unescape(text: &str) -> Option<String> {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        if c != '\\' {
            plain.push(c);
            continue;
        }
        plain.push(match rest.next()? {
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            '0' => '\0',
            'u' => {
                let digits: String = rest.by_ref().skip(1).take_while(|c| *c != '}').collect();
                char::from_u32(u32::from_str_radix(&digits, 16).ok()?)?
            }
            other => other,
        });
    }
    Some(plain)
}

#[cold]
fn damaged(storage: &dyn Storage, why: &str) -> Error {
    Error::new(Code::JournalMismatch, format!("the backup cannot be used: {why}")).image(storage.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vellum_core::block_on;
    use vellum_sim::MemoryFiles;

    fn made() -> (Arc<MemoryFiles>, Location, Vec<BackedFile>) {
        let (files, at) = (MemoryFiles::new(), Location::from("d/a.vmdk.vellum-backup-7"));
        let named =
            [("", 512), ("ä \"b\"\n.vmdk", 0)].map(|(place, len)| BackedFile { len, place: place.into() });
        block_on(async {
            let image = Location::from("d/a.vmdk");
            let begun = Writer::begin(files.as_ref(), &at, &image, "vmdk", 7, &named);
            let mut writer = begun.await.unwrap();
            writer.append(Kind::Old, 0, 100, b"old").await.unwrap();
            writer.append(Kind::Write, 0, 100, b"new").await.unwrap();
            writer.append(Kind::Length, 1, 4096, &[]).await.unwrap();
            writer.finish(files.as_ref(), &at).await.unwrap();
        });
        (files, at, named.to_vec())
    }

    fn read(files: &MemoryFiles, at: &Location) -> Result<Backup> {
        block_on(Backup::read(files.get(&at.0).unwrap()))
    }

    #[test]
    fn a_backup_reads_back_as_it_was_written() {
        let (files, at, named) = made();
        let backup = read(&files, &at).unwrap();
        assert_eq!(backup.files, named);
        let seen: Vec<_> = backup.records.iter().map(|r| (r.kind, r.file, r.offset, r.len)).collect();
        assert_eq!(seen, [(Kind::Old, 0, 100, 3), (Kind::Write, 0, 100, 3), (Kind::Length, 1, 4096, 0)]);
        assert_eq!(block_on(backup.payload(&backup.records[1])).unwrap(), b"new");
    }

    #[test]
    fn a_backup_that_is_cut_off_or_changed_anywhere_is_refused() {
        let (files, at, _) = made();
        let whole = block_on(read_vec(
            files.get(&at.0).unwrap().as_ref(),
            0,
            10_000.min(files.get(&at.0).unwrap().len().unwrap() as usize),
        ))
        .unwrap()
        .to_vec();
        for len in 0..whole.len() {
            files.put(&at.0, &whole[..len]);
            assert_eq!(read(&files, &at).map(|_| ()).unwrap_err().code(), Code::JournalMismatch, "{len}");
        }
        let text = whole.windows(2).position(|pair| pair == b"\n\n").unwrap();
        for byte in text + 2..whole.len() {
            let mut changed = whole.clone();
            changed[byte] ^= 0x10;
            files.put(&at.0, &changed);
            assert!(read(&files, &at).is_err(), "{byte}");
        }
    }
}
