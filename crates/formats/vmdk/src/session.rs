//! A writing session: the marks and identities that it begins with, and the marks that it takes back.
//!
//! ```text
//!   begin   check what was left unclean | uncleanShutdown = 1 | new CID | FLUSH
//!   close   group commit | cut the file's end | uncleanShutdown = 0 | FLUSH
//! ```
//!
//! A new CID has as many digits as the old one, so that the descriptor keeps its length and is changed in place: nothing
//! but those digits can tear, and any mixture of two ids is a third one.

use crate::descriptor::{Descriptor, Pair};
use crate::header::{MAGIC_KDMV, SECTOR};
use crate::image::VmdkImage;
use crate::problem;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vellum_core::bytes::{add, align_up, array, index, rem, sub, wide};
use vellum_core::storage::{read_vec, write_slice};
use vellum_core::{Code, Error, FlushPoint, ImageInfo, Providers, Result, Storage, Uuid, flush_at};

/// Where `uncleanShutdown` stands in the header.
pub(crate) const UNCLEAN_AT: usize = 72;
/// Bytes of a line of the descriptor that are looked at.
const LINE_BYTES: u64 = 4096;

/// The keys of the descriptor that change with the content.
pub(crate) struct ContentIdentity {
    storage: Arc<dyn Storage>,
    fields: Vec<(Field, Pair)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    ContentId,
    LongContentId,
    Modification,
}

impl Field {
    /// `text` is the new value of the key.
    fn tell(self, text: &str, info: &mut ImageInfo) {
        match self {
            Field::ContentId => info.identity.cid = u32::from_str_radix(text, 16).ok(),
            Field::Modification => info.identity.modification = Uuid::parse(text),
            Field::LongContentId => {}
        }
        if let Some((key, _)) = FIELDS.iter().find(|(_, field)| *field == self) {
            info.change_property(key, text);
        }
    }
}

const FIELDS: [(&str, Field); 3] = [
    ("CID", Field::ContentId),
    ("ddb.longContentID", Field::LongContentId),
    ("ddb.uuid.modification", Field::Modification),
];

impl ContentIdentity {
    /// Those of `descriptor`, which stands in `storage`.
    pub(crate) fn of(descriptor: &Descriptor, storage: Arc<dyn Storage>) -> Self {
        let fields = FIELDS
            .iter()
            .filter_map(|(key, field)| Some((*field, descriptor.pair(key)?.clone())))
            .filter(|(field, pair)| match field {
                Field::ContentId => true,
                Field::LongContentId => pair.value.len() == 32,
                Field::Modification => Uuid::parse(&pair.value).is_some(),
            })
            .collect();
        ContentIdentity { storage, fields }
    }

    /// Writes new ones in place, and tells `info` of them. Not durable yet.
    pub(crate) async fn change(&self, providers: &Providers, info: &mut ImageInfo) -> Result<()> {
        let old = self.fields.iter().find(|(field, _)| *field == Field::ContentId);
        let old = old.map_or("", |(_, pair)| pair.value.as_str());
        let cid = new_content_id(old, providers);
        let mut patches = Vec::new();
        for (field, pair) in &self.fields {
            let text = match field {
                Field::ContentId => cid.clone(),
                Field::LongContentId => {
                    let (high, low) = (providers.random_u64(), providers.random_u64());
                    let keeps_low = pair.value.to_ascii_lowercase().ends_with(&old.to_ascii_lowercase());
                    match keeps_low && cid.len() == 8 {
                        true => format!("{high:016x}{:08x}{cid}", low >> 32),
                        false => format!("{high:016x}{low:016x}"),
                    }
                }
                Field::Modification => {
                    let uuid = providers.random_uuid().to_string();
                    if pair.value.starts_with('{') { format!("{{{uuid}}}") } else { uuid }
                }
            };
            if text.len() == pair.value.len() {
                field.tell(&text, info);
                patches.push((self.place(pair).await?, text));
            }
        }
        self.write(&patches).await
    }

    /// Where the value of `pair` stands in the file.
    async fn place(&self, pair: &Pair) -> Result<u64> {
        let len = self.storage.len()?.saturating_sub(pair.at).min(LINE_BYTES);
        let line = read_vec(self.storage.as_ref(), pair.at, index(len)?).await?;
        let line = line.split(|byte| matches!(byte, b'\n' | 0)).next().unwrap_or_default();
        let start = line.iter().position(|byte| *byte == b'=').and_then(|equals| {
            let from = equals.checked_add(1)?;
            let rest = line.get(from..)?;
            from.checked_add(rest.iter().position(|byte| !matches!(byte, b' ' | b'\t' | b'"'))?)
        });
        let start = start.unwrap_or(line.len());
        if line.get(start..).is_some_and(|rest| rest.starts_with(pair.value.as_bytes())) {
            return add(pair.at, wide(start));
        }
        Err(Error::new(Code::SourceChanged, "the descriptor was changed since the disk was opened")
            .image(self.storage.name())
            .field(pair.key.clone())
            .at(pair.at)
            .allowed(&pair.value)
            .hint("another program uses the disk; close it there and try again"))
    }

    /// Writes the sectors that `patches` touch, in one go.
    async fn write(&self, patches: &[(u64, String)]) -> Result<()> {
        let start = patches.iter().map(|(at, _)| *at).min();
        let end = patches.iter().map(|(at, text)| at.saturating_add(wide(text.len()))).max();
        let (Some(start), Some(end)) = (start, end) else { return Ok(()) };
        let start = sub(start, rem(start, SECTOR)?)?;
        let end = align_up(end, SECTOR)?.min(self.storage.len()?);
        let mut bytes = read_vec(self.storage.as_ref(), start, index(sub(end, start)?)?).await?.to_vec();
        for (at, text) in patches {
            let from = index(sub(*at, start)?)?;
            if let Some(place) = bytes.get_mut(from..from.saturating_add(text.len())) {
                place.copy_from_slice(text.as_bytes());
            }
        }
        write_slice(self.storage.as_ref(), start, &bytes).await
    }

    /// The storage that holds the descriptor.
    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }
}

/// A content id that is not the old one and means nothing else, in as many digits.
fn new_content_id(old: &str, providers: &Providers) -> String {
    let digits = old.len().clamp(1, 8);
    let bits = digits.saturating_mul(4);
    let old = u64::from_str_radix(old, 16).unwrap_or(0);
    let mask: Range<u64> = 1..1u64.checked_shl(u32::try_from(bits).unwrap_or(32)).unwrap_or(u64::MAX);
    let id = std::iter::repeat_with(|| providers.random_u64() & mask.end.saturating_sub(1))
        .take(64)
        .find(|id| mask.contains(id) && *id < 0xffff_fffe && *id != old);
    let id = id.unwrap_or(if old == 1 { 2 } else { 1 });
    format!("{id:0digits$x}")
}

impl VmdkImage {
    /// Begins a session: checks what was left unclean, sets the marks, changes the content's identity.
    pub(crate) async fn begin_session(&self) -> Result<()> {
        let writer = self.writer()?;
        for target in self.targets()? {
            let (extent, storage) = (target.extent, target.storage.as_ref());
            if extent.is_unclean || extent.disputes.any_decided() {
                let verdict = extent.verdict(storage, &self.events).await?;
                if verdict.is_doubtful {
                    if !writer.skip_consistency_checks {
                        return Err(doubtful(&extent.name));
                    }
                    writer.keeps_marks.store(true, Ordering::Relaxed);
                }
            }
            target.space.complete(extent, storage).await?;
            if extent.is_unclean {
                for table in &extent.verdict(storage, &self.events).await?.single {
                    self.ensure_table(&target, *table).await?;
                }
            }
            mark(storage, true).await.map_err(|e| e.image(&extent.name))?;
        }
        self.mend().await?;
        let mut info = self.info.clone();
        writer.identity.change(&writer.providers, &mut info).await?;
        for storage in &writer.storages {
            flush_at(FlushPoint::Session, storage.as_ref()).await?;
        }
        if !self.is_among(writer.identity.storage(), &writer.storages) {
            flush_at(FlushPoint::Session, writer.identity.storage().as_ref()).await?;
        }
        writer.told.get_or_init(|| info);
        Ok(())
    }

    fn is_among(&self, storage: &Arc<dyn Storage>, storages: &[Arc<dyn Storage>]) -> bool {
        storages.iter().any(|other| Arc::ptr_eq(other, storage))
    }

    /// Ends a session whose tables are durable.
    pub(crate) async fn end_session(&self) -> Result<()> {
        let writer = self.writer()?;
        let targets = self.targets()?;
        for target in &targets {
            let storage = target.storage.as_ref();
            target.space.trim(target.extent, storage).await?;
            if !writer.keeps_marks.load(Ordering::Relaxed) {
                mark(storage, false).await.map_err(|e| e.image(&target.extent.name))?;
            }
        }
        for target in &targets {
            flush_at(FlushPoint::Session, target.storage.as_ref()).await?;
        }
        Ok(())
    }
}

#[cold]
fn doubtful(name: &str) -> Error {
    Error::new(Code::Dirty, "the extent was not closed cleanly, and its grain tables contradict each other")
        .image(name)
        .found("grains that two table entries lead to, or too many differences between the tables and their copies")
        .hint("`vellum check` tells more and `vellum repair` mends it; to write all the same, skip the consistency checks")
}

/// Sets or clears `uncleanShutdown` in the header at the start of `storage`.
async fn mark(storage: &dyn Storage, is_unclean: bool) -> Result<()> {
    let mut header = read_vec(storage, 0, index(SECTOR)?).await?.to_vec();
    if array::<4>(&header, 0) != Some(MAGIC_KDMV) {
        return Err(problem(Code::SourceChanged, "the header was overwritten", "magic", 0)
            .hint("another program uses the disk; close it there and try again"));
    }
    match header.get_mut(UNCLEAN_AT) {
        // A mark that is there may not be durable: a flush that failed before may have lost it for good.
        Some(byte) if is_unclean || *byte != 0 => *byte = u8::from(is_unclean),
        _ => return Ok(()),
    }
    write_slice(storage, 0, &header).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor;
    use vellum_core::{Limits, Memory, block_on};

    #[test]
    fn identities_change_in_place() {
        let text = "# Disk DescriptorFile\r\nversion=1\r\nCID = 5689b500 \r\nparentCID=ffffffff\r\n\
                    ddb.longContentID = \"0123456789abcdef012345675689b500\"\r\n\
                    ddb.uuid.modification=\"6dcd6d83-0d2a-4b11-b0f0-9d7b2b9f6c11\"\r\nRW 1 ZERO\r\n";
        let memory = Arc::new(Memory::from_bytes("d", text.as_bytes()));
        let before = descriptor::parse(text.as_bytes(), 0, &Limits::default()).unwrap();
        let identity = ContentIdentity::of(&before, memory.clone());
        let mut info = ImageInfo::default();
        block_on(identity.change(&Providers::seeded(1, 0), &mut info)).unwrap();
        let bytes = memory.to_vec();
        assert_eq!(bytes.len(), text.len());
        let after = descriptor::parse(&bytes, 0, &Limits::default()).unwrap();
        let cid = after.get("CID").unwrap();
        assert!(cid != "5689b500" && cid.len() == 8);
        let long = after.get("ddb.longContentID").unwrap();
        assert!(long.ends_with(cid) && !long.starts_with("01234567"));
        assert_ne!(
            after.uuid("ddb.uuid.modification").unwrap(),
            before.uuid("ddb.uuid.modification").unwrap()
        );
        assert_eq!(after.get("parentCID"), Some("ffffffff"));
        assert_eq!(info.identity.cid, after.content_id("CID").unwrap());
        assert_eq!(info.identity.modification, after.uuid("ddb.uuid.modification").unwrap());
        // Again with what was read before: somebody else was there.
        let error = block_on(identity.change(&Providers::seeded(1, 0), &mut info)).unwrap_err();
        assert_eq!(error.code(), Code::SourceChanged);
    }

    #[test]
    fn short_content_ids_stay_short() {
        for _ in 0..50 {
            let id = new_content_id("1", &Providers::seeded(3, 0));
            assert!(id.len() == 1 && id != "1" && id != "0", "{id}");
        }
        assert_eq!(new_content_id("89abcdef", &Providers::seeded(3, 0)).len(), 8);
    }
}
