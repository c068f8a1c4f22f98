//! The snapshot table (sheet section 7), entry by entry: read whole, written anew beside the old one.
//!
//! ```text
//!   0  l1_table_offset u64      12 id length u16       16 seconds u32, nanoseconds u32    32 VM state size u32
//!   8  l1_size u32              14 name length u16     24 guest run time u64              36 extra data size u32
//!   40 extra data: VM state size u64, disk size u64, icount u64; id; name; padding to 8
//! ```

use crate::header::{Header, check_table};
use crate::stored::Source;
use vellum_core::{Code, Error, Limits, Result, SnapshotInfo, bytes};

/// Longest table that is read (QEMU's limit).
const TABLE_MAX: u64 = 64 << 20;
/// Bytes that are read at a time.
const STEP: u64 = 64 << 10;
const FIXED: u64 = 40;
/// Most extra data (QEMU's limit).
const EXTRA_MAX: u32 = 1024;
/// Extra data that version 3 must have, and that we write.
pub(crate) const EXTRA_NEEDED: usize = 16;
const EXTRA_WRITTEN: usize = 24;

/// One entry, as it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    pub l1_table_offset: u64,
    pub l1_size: u32,
    pub seconds: u32,
    pub nanoseconds: u32,
    pub run_time: u64,
    pub vm_state_size: u32,
    pub extra: Vec<u8>,
    pub id: Vec<u8>,
    pub name: Vec<u8>,
}

/// The table and its length in bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Table {
    pub entries: Vec<Entry>,
    pub len: u64,
}

#[cold]
fn bad(code: Code, what: &str, field: &str, at: u64) -> Error {
    Error::new(code, what)
        .field(field)
        .at(at)
        .hint("the snapshot table is damaged; `vellum convert` still saves the disk's present content")
}

/// Reads the table that the header names.
pub(crate) async fn read(source: &Source<'_>, header: &Header, limits: &Limits) -> Result<Table> {
    let count = header.nb_snapshots;
    if count > limits.snapshots {
        return Err(bad(Code::TableLimit, "there are more snapshots than the limit", "nb_snapshots", 60)
            .found(count)
            .allowed(format!("up to {}", limits.snapshots)));
    }
    let mut table = Table::default();
    if count == 0 {
        return Ok(table);
    }
    let start = header.snapshots_offset;
    check_table("snapshots_offset", 64, start, FIXED, header.cluster(), source.len)?;
    let mut window = Window { source, start, have: Vec::new() };
    for _ in 0..count {
        let at = bytes::add(start, table.len)?;
        let entry = window.entry(table.len, at).await?;
        table.len = bytes::add(table.len, entry.len())?;
        if table.len > TABLE_MAX {
            return Err(bad(
                Code::TableLimit,
                "the snapshot table is larger than the limit",
                "nb_snapshots",
                60,
            )
            .found(count)
            .allowed(format!("{TABLE_MAX} bytes of table")));
        }
        table.entries.push(entry);
    }
    Ok(table)
}

/// The part of the table that was read.
struct Window<'a> {
    source: &'a Source<'a>,
    start: u64,
    have: Vec<u8>,
}

impl Window<'_> {
    /// The bytes up to `end` of the table, read as far as needed.
    async fn upto(&mut self, end: u64, at: u64) -> Result<&[u8]> {
        let inside = self.source.len.saturating_sub(self.start);
        if end > inside {
            return Err(bad(Code::OutOfFile, "a snapshot entry is cut off", "snapshot table entry", at)
                .allowed("inside the file"));
        }
        while bytes::wide(self.have.len()) < end {
            let from = bytes::add(self.start, bytes::wide(self.have.len()))?;
            let len = STEP.min(self.source.len.saturating_sub(from));
            let part = self.source.read(from, len).await?;
            self.have.extend_from_slice(&part);
        }
        self.have.get(..bytes::index(end)?).ok_or_else(|| bad(Code::Truncated, "cut off", "snapshot", at))
    }

    async fn entry(&mut self, from: u64, at: u64) -> Result<Entry> {
        let cut = || bad(Code::OutOfFile, "a snapshot entry is cut off", "snapshot table entry", at);
        let fixed_end = bytes::add(from, FIXED)?;
        let start = bytes::index(from)?;
        let fixed: [u8; 40] = bytes::array(self.upto(fixed_end, at).await?, start).ok_or_else(cut)?;
        let extra_len = bytes::be32(&fixed, 9).ok_or_else(cut)?;
        if extra_len > EXTRA_MAX {
            let what = "a snapshot has too much extra data";
            return Err(bad(Code::TableLimit, what, "snapshot extra_data_size", at)
                .found(extra_len)
                .allowed(format!("up to {EXTRA_MAX} bytes")));
        }
        let short = |offset| bytes::array(&fixed, offset).map_or(0, |b| u64::from(u16::from_be_bytes(b)));
        let id_at = bytes::add(fixed_end, extra_len.into())?;
        let name_at = bytes::add(id_at, short(12))?;
        let end = bytes::add(name_at, short(14))?;
        let have = self.upto(end, at).await?;
        let slice = |from: u64, to: u64| -> Result<Vec<u8>> {
            Ok(have.get(bytes::index(from)?..bytes::index(to)?).ok_or_else(cut)?.to_vec())
        };
        Ok(Entry {
            l1_table_offset: bytes::be64(&fixed, 0).ok_or_else(cut)?,
            l1_size: bytes::be32(&fixed, 2).ok_or_else(cut)?,
            seconds: bytes::be32(&fixed, 4).ok_or_else(cut)?,
            nanoseconds: bytes::be32(&fixed, 5).ok_or_else(cut)?,
            run_time: bytes::be64(&fixed, 3).ok_or_else(cut)?,
            vm_state_size: bytes::be32(&fixed, 8).ok_or_else(cut)?,
            extra: slice(fixed_end, id_at)?,
            id: slice(id_at, name_at)?,
            name: slice(name_at, end)?,
        })
    }
}

impl Entry {
    /// Bytes that the entry takes, with its padding.
    pub fn len(&self) -> u64 {
        let parts = [self.extra.len(), self.id.len(), self.name.len()];
        let len = parts.iter().fold(FIXED, |sum, part| sum.saturating_add(bytes::wide(*part)));
        len.checked_next_multiple_of(8).unwrap_or(len)
    }

    /// Size of the disk in this state; that of the image where the entry does not say.
    pub fn disk_size(&self, header: &Header) -> u64 {
        bytes::be64(&self.extra, 1).unwrap_or(header.size)
    }

    /// Bytes of saved machine state.
    pub fn vm_state(&self) -> u64 {
        bytes::be64(&self.extra, 0).unwrap_or(self.vm_state_size.into())
    }

    /// Fills in the extra data that version 3 must have.
    pub fn complete(&mut self, header: &Header) {
        if header.version < 3 || self.extra.len() >= EXTRA_NEEDED {
            return;
        }
        let (vm_state, disk_size) = (self.vm_state(), self.disk_size(header));
        self.extra = [vm_state.to_be_bytes(), disk_size.to_be_bytes()].concat();
    }

    /// The extra data of a new snapshot without machine state.
    pub fn new_extra(disk_size: u64) -> Vec<u8> {
        let mut extra = vec![0u8; 8];
        extra.extend_from_slice(&disk_size.to_be_bytes());
        // The instruction counter is not known.
        extra.extend_from_slice(&u64::MAX.to_be_bytes());
        extra.truncate(EXTRA_WRITTEN);
        extra
    }

    /// As users see it.
    pub fn info(&self, header: &Header) -> SnapshotInfo {
        SnapshotInfo {
            id: String::from_utf8_lossy(&self.id).into_owned(),
            name: String::from_utf8_lossy(&self.name).into_owned(),
            created_unix: self.seconds.into(),
            disk_size: self.disk_size(header),
            vm_state_size: self.vm_state(),
        }
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<()> {
        let short = |what: &[u8]| {
            u16::try_from(what.len()).map_err(|_| {
                Error::new(Code::Usage, "an id or name of a snapshot is too long").allowed("65535 bytes")
            })
        };
        out.extend_from_slice(&self.l1_table_offset.to_be_bytes());
        out.extend_from_slice(&self.l1_size.to_be_bytes());
        out.extend_from_slice(&short(&self.id)?.to_be_bytes());
        out.extend_from_slice(&short(&self.name)?.to_be_bytes());
        out.extend_from_slice(&self.seconds.to_be_bytes());
        out.extend_from_slice(&self.nanoseconds.to_be_bytes());
        out.extend_from_slice(&self.run_time.to_be_bytes());
        out.extend_from_slice(&self.vm_state_size.to_be_bytes());
        out.extend_from_slice(&bytes::narrow(bytes::wide(self.extra.len()))?.to_be_bytes());
        for part in [&self.extra, &self.id, &self.name] {
            out.extend_from_slice(part);
        }
        let padded = bytes::index(bytes::align_up(bytes::wide(out.len()), 8)?)?;
        out.resize(padded, 0);
        Ok(())
    }
}

/// The entries as a table.
pub(crate) fn write(entries: &[Entry]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for entry in entries {
        entry.write(&mut out)?;
    }
    if bytes::wide(out.len()) > TABLE_MAX {
        return Err(Error::new(Code::TableLimit, "the snapshot table would become larger than the limit")
            .allowed(format!("{TABLE_MAX} bytes"))
            .hint("delete a snapshot first"));
    }
    Ok(out)
}

/// The number of the entry that `wanted` names: by id first, then by name.
pub(crate) fn find(entries: &[Entry], wanted: &str) -> Result<usize> {
    let by =
        |field: fn(&Entry) -> &Vec<u8>| entries.iter().position(|entry| field(entry) == wanted.as_bytes());
    by(|entry| &entry.id).or_else(|| by(|entry| &entry.name)).ok_or_else(|| {
        let known: Vec<String> = entries
            .iter()
            .take(20)
            .map(|entry| {
                format!("{} ({})", String::from_utf8_lossy(&entry.id), String::from_utf8_lossy(&entry.name))
            })
            .collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        Error::new(Code::NotFound, "the image has no such snapshot")
            .found(wanted)
            .allowed(known)
            .hint("`vellum snapshot list` shows ids and names")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vellum_core::{Memory, block_on};

    fn header() -> Header {
        let mut head = [0u8; 104];
        head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        head[23] = 16;
        head[53] = 1;
        head[59] = 1;
        head[99] = 4;
        head[103] = 104;
        Header::read(&head, 1 << 20, &Limits::default()).unwrap()
    }

    #[test]
    fn what_is_written_is_read_again() {
        let entry = |n: u32, extra: Vec<u8>| Entry {
            l1_table_offset: u64::from(n) << 16,
            l1_size: n,
            seconds: 1_700_000_000,
            nanoseconds: n,
            run_time: 77,
            vm_state_size: 5,
            extra,
            id: n.to_string().into_bytes(),
            name: format!("snap{n}").into_bytes(),
        };
        let entries = vec![
            entry(1, Entry::new_extra(10 << 20)),
            entry(2, Vec::new()),
            entry(30, vec![0, 0, 0, 0, 0, 0, 1, 0]),
        ];
        let mut file = vec![0u8; 0x10000];
        file[..4].copy_from_slice(b"QFI\xfb");
        file.extend(write(&entries).unwrap());
        let memory = Memory::from_bytes("t", &file);
        let source = Source::new(&memory).unwrap();
        let header = Header { nb_snapshots: 3, snapshots_offset: 0x10000, ..header() };
        let table = block_on(read(&source, &header, &Limits::default())).unwrap();
        assert_eq!(table.entries, entries);
        assert_eq!(table.len, file.len() as u64 - 0x10000);
        assert_eq!((table.entries[2].vm_state(), table.entries[1].vm_state()), (256, 5));
        assert_eq!(find(&entries, "2").unwrap(), 1);
        assert_eq!(find(&entries, "snap30").unwrap(), 2);
        assert!(find(&entries, "snap3").is_err());
        let cut = Header { nb_snapshots: 4, ..header };
        assert_eq!(block_on(read(&source, &cut, &Limits::default())).unwrap_err().code(), Code::OutOfFile);
    }
}
