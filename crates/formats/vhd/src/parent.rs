//! How a new differencing image names its parent (sheet vhd.md, section 8): by UUID, by file name, and by paths in
//! the words of Windows, which every reader of VHD understands.

use crate::header::{DynamicHeader, EPOCH, FORMAT, LocatorEntry};
use vellum_core::{Code, Error, ParentLink, Result, bytes};

/// Units of UTF-16 in `parentUnicodeName`, without the NUL at its end.
const NAME_UNITS_MAX: usize = 255;
/// Bytes of a path at most.
const PATH_BYTES_MAX: usize = 64 << 10;

/// Where a text goes, and its bytes.
pub(crate) type Text<'a> = (u64, &'a [u8]);

/// What a child stores of its parent.
pub(crate) struct Names {
    unique_id: [u8; 16],
    timestamp: u32,
    unicode_name: [u8; 512],
    /// Code and text of each locator.
    locators: Vec<([u8; 4], Vec<u8>)>,
}

impl Names {
    /// The names of `parent`.
    ///
    /// # Errors
    /// `USAGE` for a parent that has no UUID or that cannot be named.
    pub(crate) fn of(parent: &ParentLink) -> Result<Names> {
        let about = |message: &str| Error::new(Code::Usage, message).format(FORMAT).found(&parent.place);
        let Some(unique_id) = parent.identity.uuid.filter(|uuid| !uuid.is_nil()) else {
            let message =
                format!("the parent ({}) has no UUID, by which a VHD child knows it", parent.format);
            return Err(about(&message).field("parentUniqueId").hint(
                "make the child in a format that knows its parent by place (qcow2), or convert the parent to VHD",
            ));
        };
        let name = parent.place.rsplit(['/', '\\']).next().unwrap_or_default();
        let units: Vec<u16> = name.encode_utf16().collect();
        if units.is_empty() || units.len() > NAME_UNITS_MAX {
            return Err(about("the name of the parent cannot be stored in a VHD image")
                .field("parentUnicodeName")
                .allowed(format!("1 to {NAME_UNITS_MAX} units of UTF-16")));
        }
        let mut unicode_name = [0u8; 512];
        let stored = units.iter().flat_map(|unit| unit.to_be_bytes());
        unicode_name.iter_mut().zip(stored).for_each(|(to, from)| *to = from);
        let mut locators = Vec::new();
        if let Some(path) = relative(&parent.place) {
            locators.push((*b"W2ru", utf16le(&path)));
        }
        if !parent.absolute.is_empty() {
            locators.push((*b"W2ku", utf16le(&parent.absolute)));
        }
        if locators.iter().any(|(_, text)| text.len() > PATH_BYTES_MAX) {
            return Err(about("the path of the parent is too long")
                .field("dataLength of a parent locator")
                .allowed(format!("up to {PATH_BYTES_MAX} bytes")));
        }
        let seconds = parent.modified_unix.unwrap_or(EPOCH).saturating_sub(EPOCH);
        let timestamp = u32::try_from(seconds).unwrap_or(u32::MAX);
        Ok(Names { unique_id: unique_id.0, timestamp, unicode_name, locators })
    }

    /// Where each text goes if the first is stored at byte `at`, and where the last ends.
    pub(crate) fn texts(&self, at: u64) -> Result<(Vec<Text<'_>>, u64)> {
        let mut end = at;
        let mut texts = Vec::new();
        for (_, text) in &self.locators {
            texts.push((end, &text[..]));
            end = bytes::add(end, bytes::align_up(bytes::wide(text.len()), 512)?)?;
        }
        Ok((texts, end))
    }

    /// Writes the names into a header; the texts are stored from byte `at` on.
    pub(crate) fn enter(&self, header: &mut DynamicHeader, at: u64) -> Result<()> {
        header.parent_unique_id = self.unique_id;
        header.parent_timestamp = self.timestamp.into();
        header.parent_unicode_name = self.unicode_name;
        let (texts, _) = self.texts(at)?;
        let locators = self.locators.iter().zip(texts);
        for (entry, ((code, _), (at, text))) in header.parent_locator.iter_mut().zip(locators) {
            let len = bytes::wide(text.len());
            *entry = LocatorEntry {
                code: *code,
                data_space: bytes::narrow(bytes::align_up(len, 512)?)?.into(),
                data_length: bytes::narrow(len)?.into(),
                reserved: 0.into(),
                data_offset: at.into(),
            };
        }
        Ok(())
    }
}

/// A relative place as Windows writes it; `None` for an absolute one.
fn relative(place: &str) -> Option<String> {
    let is_absolute = place.starts_with(['/', '\\']) || place.as_bytes().get(1) == Some(&b':');
    if is_absolute {
        return None;
    }
    let path = place.trim_start_matches("./").replace('/', "\\");
    Some(if path.starts_with("..") { path } else { format!(".\\{path}") })
}

fn utf16le(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_places_are_written_as_windows_does() {
        assert_eq!(relative("p.vhd").as_deref(), Some(r".\p.vhd"));
        assert_eq!(relative("./a/p.vhd").as_deref(), Some(r".\a\p.vhd"));
        assert_eq!(relative("../p.vhd").as_deref(), Some(r"..\p.vhd"));
        assert_eq!(relative("/a/p.vhd"), None);
        assert_eq!(relative(r"C:\p.vhd"), None);
    }
}
