//! Internal snapshots and persistent bitmaps (sheet sections 7 and 8), as far as `info` lists them.

use crate::extensions::Bitmaps;
use crate::header::{Header, check_table};
use vellum_core::storage::read_vec;
use vellum_core::{Buf, Code, Error, Limits, Result, Storage, Value, bytes};

/// Bytes of a snapshot table or bitmap directory that are looked at.
const DIRECTORY_MAX: u64 = 16 << 20;
/// Most extra data of a snapshot (QEMU's limit).
const EXTRA_MAX: u32 = 1024;
/// Most bitmaps (QEMU's limit).
const BITMAPS_MAX: u32 = 65_535;
/// Bytes of a name that are kept (QEMU writes at most 256 for a snapshot, 1023 for a bitmap).
const NAME_SHOWN_MAX: usize = 1023;

#[cold]
fn bad(code: Code, what: &str, field: &str, at: u64) -> Error {
    Error::new(code, what).field(field).at(at).hint(
        "the table is damaged; `vellum convert` of a backup, or the tool that wrote the image, may help",
    )
}

/// The part of a directory at `offset` that lies inside the file, at most `len` bytes.
async fn directory(storage: &dyn Storage, offset: u64, len: u64, file_len: u64) -> Result<Buf> {
    let len = len.min(file_len.saturating_sub(offset)).min(DIRECTORY_MAX);
    read_vec(storage, offset, bytes::index(len)?).await
}

/// A name as it is shown. Cut, because bytes that are no text take three times their room as text.
fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name.get(..NAME_SHOWN_MAX).unwrap_or(name)).into_owned()
}

/// Lists the internal snapshots.
pub(crate) async fn snapshots(
    storage: &dyn Storage,
    header: &Header,
    file_len: u64,
    limits: &Limits,
) -> Result<Vec<Value>> {
    let count = header.nb_snapshots;
    if count > limits.snapshots {
        return Err(bad(Code::TableLimit, "there are more snapshots than the limit", "nb_snapshots", 60)
            .found(count)
            .allowed(format!("up to {}", limits.snapshots)));
    }
    if count == 0 {
        return Ok(Vec::new());
    }
    let start = header.snapshots_offset;
    check_table("snapshots_offset", 64, start, 40, header.cluster(), file_len)?;
    // Names are short in practice: entries are read as they are needed, not as they could be.
    let mut have = directory(storage, start, 64 << 10, file_len).await?;
    let mut at = 0usize;
    let mut found = Vec::new();
    for index in 0..count {
        let parsed = match entry(&have, at) {
            None if bytes::wide(have.len()) < DIRECTORY_MAX => {
                have = directory(storage, start, DIRECTORY_MAX, file_len).await?;
                entry(&have, at)
            }
            other => other,
        };
        let position = bytes::add(start, bytes::wide(at))?;
        let Some(snapshot) = parsed else {
            return Err(bad(
                Code::OutOfFile,
                "a snapshot entry is cut off",
                "snapshot table entry",
                position,
            )
            .found(format!("entry {index} of {count}"))
            .allowed("inside the file"));
        };
        snapshot.check(header, position, file_len, limits)?;
        found.push(snapshot.value());
        at = at.saturating_add(snapshot.len);
    }
    Ok(found)
}

struct Snapshot {
    l1_table_offset: u64,
    l1_size: u32,
    seconds: u32,
    vm_state_size: u64,
    disk_size: Option<u64>,
    extra: u32,
    id: String,
    name: String,
    /// Bytes of the entry with its padding.
    len: usize,
}

fn entry(table: &[u8], at: usize) -> Option<Snapshot> {
    let fixed = table.get(at..at.checked_add(40)?)?;
    let id_len = usize::from(u16::from_be_bytes(bytes::array(fixed, 12)?));
    let name_len = usize::from(u16::from_be_bytes(bytes::array(fixed, 14)?));
    let extra = bytes::be32(fixed, 9)?;
    let extra_at = at.checked_add(40)?;
    // An absurd length is an error of its own; the rest of the entry is then of no interest.
    let extra_len = usize::try_from(extra).ok()?.min(usize::try_from(EXTRA_MAX).ok()?.checked_add(1)?);
    let id_at = extra_at.checked_add(extra_len)?;
    let name_at = id_at.checked_add(id_len)?;
    let end = name_at.checked_add(name_len)?;
    let extra_data = table.get(extra_at..id_at)?;
    let text = |range| table.get(range).map(shown);
    Some(Snapshot {
        l1_table_offset: bytes::be64(fixed, 0)?,
        l1_size: bytes::be32(fixed, 2)?,
        seconds: bytes::be32(fixed, 4)?,
        vm_state_size: bytes::be64(extra_data, 0).unwrap_or(bytes::be32(fixed, 8)?.into()),
        disk_size: bytes::be64(extra_data, 1),
        extra,
        id: text(id_at..name_at)?,
        name: text(name_at..end)?,
        len: end.checked_sub(at)?.checked_next_multiple_of(8)?,
    })
}

impl Snapshot {
    fn check(&self, header: &Header, at: u64, file_len: u64, limits: &Limits) -> Result<()> {
        if self.extra > EXTRA_MAX {
            return Err(bad(
                Code::TableLimit,
                "a snapshot has too much extra data",
                "snapshot extra_data_size",
                at,
            )
            .found(self.extra)
            .allowed(format!("up to {EXTRA_MAX} bytes")));
        }
        let l1_bytes = u64::from(self.l1_size).saturating_mul(8);
        if l1_bytes > limits.table_bytes {
            return Err(bad(
                Code::TableLimit,
                "the L1 table of a snapshot is too large",
                "snapshot l1_size",
                at,
            )
            .found(self.l1_size)
            .allowed(format!("up to {} entries", limits.table_bytes / 8)));
        }
        if l1_bytes == 0 {
            return Ok(());
        }
        check_table(
            "snapshot l1_table_offset",
            at,
            self.l1_table_offset,
            l1_bytes,
            header.cluster(),
            file_len,
        )
    }

    fn value(&self) -> Value {
        let mut fields = vec![
            ("id", Value::Text(self.id.clone())),
            ("name", Value::Text(self.name.clone())),
            ("created_unix", Value::Number(self.seconds.into())),
            ("vm_state_size", Value::Bytes(self.vm_state_size)),
        ];
        if let Some(size) = self.disk_size {
            fields.push(("disk_size", Value::Bytes(size)));
        }
        Value::Record(fields)
    }
}

/// Lists the persistent bitmaps.
pub(crate) async fn bitmaps(
    storage: &dyn Storage,
    header: &Header,
    ext: Bitmaps,
    file_len: u64,
) -> Result<Vec<Value>> {
    const FIELD: &str = "bitmaps extension";
    if ext.count > BITMAPS_MAX || ext.directory_size > 64 << 20 {
        return Err(bad(
            Code::TableLimit,
            "there are more bitmaps than the limit",
            FIELD,
            header.header_length.into(),
        )
        .found(format!("{} bitmaps, directory of {} bytes", ext.count, ext.directory_size))
        .allowed(format!("up to {BITMAPS_MAX} bitmaps and 64 MiB")));
    }
    check_table(
        "bitmap_directory_offset",
        header.header_length.into(),
        ext.directory_offset,
        ext.directory_size,
        header.cluster(),
        file_len,
    )?;
    let table = directory(storage, ext.directory_offset, ext.directory_size, file_len).await?;
    let mut at = 0usize;
    let mut found = Vec::new();
    for _ in 0..ext.count {
        let Some((bitmap, len)) = bitmap(&table, at) else {
            let position = bytes::add(ext.directory_offset, bytes::wide(at))?;
            return Err(bad(
                Code::Corrupt,
                "a bitmap directory entry is cut off",
                "bitmap directory",
                position,
            ));
        };
        found.push(bitmap);
        at = at.saturating_add(len);
    }
    Ok(found)
}

fn bitmap(table: &[u8], at: usize) -> Option<(Value, usize)> {
    let fixed = table.get(at..at.checked_add(24)?)?;
    let flags = bytes::be32(fixed, 3)?;
    let granularity = *fixed.get(17)?;
    let name_len = usize::from(u16::from_be_bytes(bytes::array(fixed, 18)?));
    let extra = usize::try_from(bytes::be32(fixed, 5)?).ok()?;
    let name_at = at.checked_add(24)?.checked_add(extra)?;
    let end = name_at.checked_add(name_len)?;
    let name = shown(table.get(name_at..end)?);
    let value = Value::Record(vec![
        ("name", Value::Text(name)),
        ("granularity", Value::Bytes(1u64.checked_shl(granularity.into()).unwrap_or(0))),
        ("in_use", Value::Flag(flags & 1 != 0)),
        ("auto", Value::Flag(flags & 2 != 0)),
    ]);
    Some((value, end.checked_sub(at)?.checked_next_multiple_of(8)?))
}
