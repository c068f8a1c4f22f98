//! Header extensions (sheet section 1): type, length, data, padding to 8 bytes, until type 0.

use crate::header::Header;
use vellum_core::{Code, Error, Printable, Result, bytes};

const END: u32 = 0;
pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const DATA_FILE: u32 = 0x4441_5441;
pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const ENCRYPTION: u32 = 0x0537_be77;

/// The bitmaps extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bitmaps {
    pub count: u32,
    pub directory_size: u64,
    pub directory_offset: u64,
}

/// A name from the feature name table: kind (0 incompatible, 1 compatible, 2 autoclear), bit, name.
pub(crate) type FeatureName = (u8, u8, String);

/// What the extensions say.
#[derive(Clone, Debug, Default)]
pub(crate) struct Extensions {
    pub backing_format: Option<String>,
    pub data_file: Option<String>,
    pub feature_names: Vec<FeatureName>,
    pub bitmaps: Option<Bitmaps>,
    pub unknown: Vec<u32>,
}

impl Extensions {
    /// Reads the extensions from cluster 0 (`cluster_0` may be shorter in a short file).
    pub fn read(header: &Header, cluster_0: &[u8]) -> Result<Self> {
        let mut found = Extensions::default();
        let mut seen = Vec::new();
        let mut at = bytes::index(header.header_length.into())?;
        // The backing name, if there is one, follows the extensions.
        let name_at = bytes::index(header.backing_file_offset)?;
        let end = if name_at > 0 { name_at.min(cluster_0.len()) } else { cluster_0.len() };
        while at.saturating_add(8) <= end {
            let (Some(kind), Some(len)) = (be32_at(cluster_0, at), be32_at(cluster_0, at.saturating_add(4)))
            else {
                break;
            };
            if kind == END {
                break;
            }
            let offset = bytes::wide(at);
            let start = at.saturating_add(8);
            let stop = start.saturating_add(bytes::index(len.into())?);
            let Some(data) = cluster_0.get(start..stop).filter(|_| stop <= end) else {
                return Err(bad(Code::Range, "a header extension reaches past its room", offset, kind)
                    .found(format!("{len} bytes"))
                    .allowed(format!("{} bytes", end.saturating_sub(start))));
            };
            if seen.contains(&kind) {
                return Err(bad(Code::Corrupt, "a header extension stands twice", offset, kind));
            }
            seen.push(kind);
            found.take(kind, data, offset)?;
            at = bytes::index(bytes::align_up(bytes::wide(stop), 8)?)?;
        }
        Ok(found)
    }

    fn take(&mut self, kind: u32, data: &[u8], offset: u64) -> Result<()> {
        match kind {
            BACKING_FORMAT => self.backing_format = Some(name(data, offset, kind)?),
            DATA_FILE => self.data_file = Some(name(data, offset, kind)?),
            FEATURE_NAMES => self.feature_names = data.chunks_exact(48).filter_map(feature_name).collect(),
            BITMAPS => {
                let (Some(count), Some(directory_size), Some(directory_offset)) =
                    (bytes::be32(data, 0), bytes::be64(data, 1), bytes::be64(data, 2))
                else {
                    return Err(bad(Code::Range, "the bitmaps extension is too short", offset, kind)
                        .allowed("24 bytes"));
                };
                self.bitmaps = Some(Bitmaps { count, directory_size, directory_offset });
            }
            ENCRYPTION => {
                return Err(bad(
                    Code::Corrupt,
                    "an encryption header in an image that is not encrypted",
                    offset,
                    kind,
                ));
            }
            other => self.unknown.push(other),
        }
        Ok(())
    }

    /// What the image itself calls a feature.
    pub fn feature(&self, kind: u8, bit: u32) -> String {
        let named = self.feature_names.iter().find(|(k, b, _)| *k == kind && u32::from(*b) == bit);
        named.map_or_else(|| format!("bit {bit}"), |(_, _, name)| format!("bit {bit} ({})", Printable(name)))
    }
}

/// Where the bitmaps extension begins, if no other extension follows it.
pub(crate) fn last_is_bitmaps(cluster_0: &[u8], header_length: u64) -> Option<u64> {
    let mut at = usize::try_from(header_length).ok()?;
    let mut last = None;
    while let (Some(kind), Some(len)) = (be32_at(cluster_0, at), be32_at(cluster_0, at.checked_add(4)?)) {
        if kind == END {
            break;
        }
        last = Some((kind, at));
        at = at.checked_add(8)?.checked_add(usize::try_from(len).ok()?)?.checked_next_multiple_of(8)?;
    }
    last.filter(|(kind, _)| *kind == BITMAPS).map(|(_, at)| bytes::wide(at))
}

#[cold]
fn bad(code: Code, what: &str, offset: u64, kind: u32) -> Error {
    Error::new(code, what)
        .field(format!("header extension {kind:#010x}"))
        .at(offset)
        .hint("the header is damaged; restore the image from a backup")
}

fn be32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes::array(bytes, at).map(u32::from_be_bytes)
}

fn feature_name(entry: &[u8]) -> Option<FeatureName> {
    let (kind, bit, name) = (entry.first()?, entry.get(1)?, entry.get(2..)?);
    let name = name.split(|byte| *byte == 0).next().unwrap_or(name);
    Some((*kind, *bit, String::from_utf8_lossy(name).into_owned()))
}

/// A name from the image: UTF-8 without NUL.
pub(crate) fn name(data: &[u8], offset: u64, kind: u32) -> Result<String> {
    if data.contains(&0) {
        return Err(bad(Code::NulInName, "a name holds a NUL byte", offset, kind)
            .found(String::from_utf8_lossy(data)));
    }
    String::from_utf8(data.to_vec()).map_err(|_| {
        bad(Code::Range, "a name is not UTF-8", offset, kind).found(String::from_utf8_lossy(data))
    })
}

/// An extension as bytes, padded.
pub(crate) fn write(kind: u32, data: &[u8], out: &mut Vec<u8>) -> Result<()> {
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&bytes::narrow(bytes::wide(data.len()))?.to_be_bytes());
    out.extend_from_slice(data);
    let padded = bytes::index(bytes::align_up(bytes::wide(out.len()), 8)?)?;
    out.resize(padded, 0);
    Ok(())
}
