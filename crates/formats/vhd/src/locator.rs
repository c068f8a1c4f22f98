//! What a differencing image says about its parent (sheet vhd.md, section 8): names as text, in search order.

use crate::header::{DynamicHeader, FORMAT, LocatorEntry, bad};
use std::ops::Range;
use vellum_core::storage::read_vec;
use vellum_core::{Code, Error, ImageInfo, ParentHint, Result, Storage, Value, bytes};

/// Greatest `dataLength` of a parent locator (section 10).
const LENGTH_MAX: u32 = 64 << 10;
/// Where the locators stand in the dynamic header, and bytes of each.
const LOCATORS_AT: u64 = 576;
const LOCATOR_BYTES: u64 = 24;
/// Where the parent's name stands in the dynamic header.
const NAME_AT: u64 = 64;

/// The order in which places are tried: what moves along with the files first, deprecated codes last.
const ORDER: [&str; 6] = ["W2ru", "W2ku", "MacX", NAME_FIELD, "Wi2r", "Wi2k"];
/// The field for a parent without a locator.
const NAME_FIELD: &str = "parentUnicodeName";

/// Reads the names of the parent from header (at byte `at`) and locators; at most 512 KiB.
///
/// # Errors
/// `RANGE` for lengths and text that cannot be, `OUT_OF_FILE`, `NUL_IN_NAME`.
pub(crate) async fn hints(
    storage: &dyn Storage,
    file_len: u64,
    header: &DynamicHeader,
    at: u64,
    info: &mut ImageInfo,
) -> Result<Vec<ParentHint>> {
    let mut hints = Vec::new();
    let mut slots = Vec::new();
    for (slot, entry) in (0u64..).zip(&header.parent_locator) {
        if entry.code == [0; 4] {
            continue;
        }
        let place = bytes::add(bytes::add(at, LOCATORS_AT)?, bytes::mul(slot, LOCATOR_BYTES)?)?;
        let mut text = None;
        if let Some(known) = Known::of(&entry.code) {
            let raw = read_entry(storage, file_len, entry, place).await?;
            let name = known.decode(&raw, entry.data_offset.get())?;
            text = Some(name.clone());
            if !name.is_empty() {
                hints.push(ParentHint { field: known.field(), place: name });
            }
        }
        slots.push(describe(entry, text));
    }
    let name_at = bytes::add(at, NAME_AT)?;
    let name = utf16(&header.parent_unicode_name, u16::from_be_bytes, NAME_FIELD, name_at)?;
    info.property(NAME_FIELD, name.as_str());
    info.property("parentLocator", Value::List(slots));
    if !name.is_empty() {
        hints.push(ParentHint { field: NAME_FIELD, place: slashes(name) });
    }
    hints.sort_by_key(|hint| ORDER.iter().position(|field| *field == hint.field));
    Ok(hints)
}

/// Where the texts of the locators stand, with the room that is kept for them.
pub(crate) fn places(header: &DynamicHeader, file_len: u64) -> Vec<Range<u64>> {
    let used = header.parent_locator.iter().filter(|entry| entry.code != [0; 4]);
    let places = used.map(|entry| {
        let start = entry.data_offset.get();
        // The specification counts sectors, everybody else bytes.
        let space = match entry.data_space.get() {
            sectors @ 0..512 => sectors.saturating_mul(512),
            bytes => bytes.min(LENGTH_MAX),
        };
        let end = start.saturating_add(space.max(entry.data_length.get()).into());
        // What a damaged entry names past the end of the file is nothing that data must keep clear of.
        start..end.min(file_len)
    });
    places.filter(|place| place.start < place.end).collect()
}

/// A locator as information.
fn describe(entry: &LocatorEntry, text: Option<String>) -> Value {
    let code = String::from_utf8_lossy(&entry.code).into_owned();
    let mut fields = vec![
        ("code", Value::from(code)),
        ("dataSpace", Value::from(entry.data_space.get())),
        ("dataLength", Value::from(entry.data_length.get())),
        ("dataOffset", Value::from(entry.data_offset.get())),
    ];
    if let Some(text) = text {
        fields.push(("place", Value::from(text)));
    }
    Value::Record(fields)
}

/// The bytes of a locator's text.
async fn read_entry(
    storage: &dyn Storage,
    file_len: u64,
    entry: &LocatorEntry,
    place: u64,
) -> Result<Vec<u8>> {
    let (length, offset) = (entry.data_length.get(), entry.data_offset.get());
    if length > LENGTH_MAX {
        return Err(bad(
            Code::Range,
            "dataLength of a parent locator",
            place.saturating_add(8),
            "a name of the parent is too long",
        )
        .found(length)
        .allowed(format!("up to {LENGTH_MAX} bytes")));
    }
    if offset.saturating_add(length.into()) > file_len {
        return Err(bad(
            Code::OutOfFile,
            "dataOffset of a parent locator",
            place.saturating_add(16),
            "a name of the parent lies past the end of the file",
        )
        .found(format!("{length} bytes at {offset:#x}"))
        .allowed(format!("up to the end of the file, {file_len}")));
    }
    let buf = read_vec(storage, offset, bytes::index(length.into())?).await?;
    Ok(buf.to_vec())
}

/// Codes whose text is understood. (`Mac ` is an alias of old Mac OS: opaque.)
#[derive(Clone, Copy)]
enum Known {
    /// Relative path of Windows, UTF-16LE.
    W2ru,
    /// Absolute path of Windows, UTF-16LE.
    W2ku,
    /// URL, UTF-8.
    MacX,
    /// Relative path of Windows, 8 bits.
    Wi2r,
    /// Absolute path of Windows, 8 bits.
    Wi2k,
}

impl Known {
    fn of(code: &[u8; 4]) -> Option<Self> {
        match code {
            b"W2ru" => Some(Known::W2ru),
            b"W2ku" => Some(Known::W2ku),
            b"MacX" => Some(Known::MacX),
            b"Wi2r" => Some(Known::Wi2r),
            b"Wi2k" => Some(Known::Wi2k),
            _ => None,
        }
    }

    fn field(self) -> &'static str {
        match self {
            Known::W2ru => "W2ru",
            Known::W2ku => "W2ku",
            Known::MacX => "MacX",
            Known::Wi2r => "Wi2r",
            Known::Wi2k => "Wi2k",
        }
    }

    /// The place as text. Relative paths get `/`; absolute ones stay as they are written.
    fn decode(self, raw: &[u8], at: u64) -> Result<String> {
        let field = self.field();
        match self {
            Known::W2ru => utf16(raw, u16::from_le_bytes, field, at).map(slashes),
            Known::W2ku => utf16(raw, u16::from_le_bytes, field, at),
            Known::MacX => file_url(&utf8(raw, field, at)?, field, at),
            Known::Wi2r => bytes_text(raw, field, at).map(slashes),
            Known::Wi2k => bytes_text(raw, field, at),
        }
    }
}

fn nul(field: &'static str, at: u64) -> Error {
    bad(Code::NulInName, field, at, "a name of the parent holds a NUL byte")
        .hint("the name is damaged or forged; do not trust the image before you know where it came from")
}

fn not_text(field: &'static str, at: u64, found: String, allowed: &str) -> Error {
    bad(Code::Range, field, at, "a name of the parent is not text").found(found).allowed(allowed)
}

/// Text of 16-bit units, padded with NUL.
fn utf16(raw: &[u8], unit: fn([u8; 2]) -> u16, field: &'static str, at: u64) -> Result<String> {
    let (pairs, rest) = raw.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(not_text(field, at, format!("{} bytes", raw.len()), "an even number of bytes of UTF-16"));
    }
    let units: Vec<u16> = pairs.iter().map(|pair| unit(*pair)).collect();
    let end = units.iter().rposition(|unit| *unit != 0).map_or(0, |last| last.saturating_add(1));
    let units = units.get(..end).unwrap_or_default();
    if units.contains(&0) {
        return Err(nul(field, at));
    }
    char::decode_utf16(units.iter().copied())
        .collect::<std::result::Result<String, _>>()
        .map_err(|e| not_text(field, at, format!("{e}"), "UTF-16"))
}

/// The bytes of 8-bit text, without the NULs that pad it.
fn unpadded<'a>(raw: &'a [u8], field: &'static str, at: u64) -> Result<&'a [u8]> {
    let end = raw.iter().rposition(|byte| *byte != 0).map_or(0, |last| last.saturating_add(1));
    let text = raw.get(..end).unwrap_or_default();
    if text.contains(&0) { Err(nul(field, at)) } else { Ok(text) }
}

/// UTF-8, padded with NUL.
fn utf8(raw: &[u8], field: &'static str, at: u64) -> Result<String> {
    let text = unpadded(raw, field, at)?;
    let text = std::str::from_utf8(text).map_err(|e| not_text(field, at, e.to_string(), "UTF-8"))?;
    Ok(text.to_owned())
}

/// Text in a code page that the image does not tell: UTF-8 if it is, else Latin-1, which at least loses nothing.
fn bytes_text(raw: &[u8], field: &'static str, at: u64) -> Result<String> {
    let text = unpadded(raw, field, at)?;
    Ok(match std::str::from_utf8(text) {
        Ok(text) => text.to_owned(),
        Err(_) => text.iter().map(|byte| char::from(*byte)).collect(),
    })
}

/// A relative path of Windows with `/`. What is not relative (`C:\`, `\\server`) stays as it is, so that it is
/// still recognised for what it is.
fn slashes(path: String) -> String {
    let drive = path.as_bytes().get(1) == Some(&b':');
    if path.starts_with('\\') || drive { path } else { path.replace('\\', "/") }
}

/// The path of a `file://` URL of this machine; any other URL as it is (a resolver refuses it).
fn file_url(url: &str, field: &'static str, at: u64) -> Result<String> {
    let Some(rest) = url.strip_prefix("file://") else { return Ok(url.to_owned()) };
    let path = rest.strip_prefix("localhost").unwrap_or(rest);
    if !path.starts_with('/') {
        return Ok(url.to_owned());
    }
    let mut decoded = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let digits = after.get(..2).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        let Some(value) = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) else {
            return Err(not_text(field, at, url.to_owned(), "a URL with %XX escapes"));
        };
        decoded.push(value);
        rest = after.get(2..).unwrap_or_default();
    }
    if decoded.contains(&0) {
        return Err(nul(field, at).format(FORMAT));
    }
    String::from_utf8(decoded).map_err(|e| not_text(field, at, e.to_string(), "UTF-8 after unescaping"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_become_paths() {
        let path = |url: &str| file_url(url, "MacX", 0);
        assert_eq!(path("file:///Users/a%20b/p.vhd").unwrap(), "/Users/a b/p.vhd");
        assert_eq!(path("file://localhost/p.vhd").unwrap(), "/p.vhd");
        assert_eq!(path("file://server/p.vhd").unwrap(), "file://server/p.vhd");
        assert_eq!(path("http://x/").unwrap(), "http://x/");
        assert_eq!(path("file:///a%00b").unwrap_err().code(), Code::NulInName);
        assert_eq!(path("file:///a%zz").unwrap_err().code(), Code::Range);
        assert_eq!(path("file:///a%2").unwrap_err().code(), Code::Range);
    }

    #[test]
    fn only_relative_paths_get_slashes() {
        assert_eq!(slashes(r".\a\b.vhd".into()), "./a/b.vhd");
        assert_eq!(slashes(r"\\server\share".into()), r"\\server\share");
        assert_eq!(slashes(r"C:\a".into()), r"C:\a");
    }

    #[test]
    fn odd_lengths_surrogates_and_nul_are_refused() {
        let text = |raw: &[u8]| utf16(raw, u16::from_le_bytes, "W2ru", 0);
        assert_eq!(text(b"a\0b\0\0\0\0\0").unwrap(), "ab");
        assert_eq!(text(b"a\0b").unwrap_err().code(), Code::Range);
        assert_eq!(text(b"a\0\0\0b\0").unwrap_err().code(), Code::NulInName);
        assert_eq!(text(&[0x00, 0xd8]).unwrap_err().code(), Code::Range);
        assert_eq!(bytes_text(b"a\0b", "Wi2k", 0).unwrap_err().code(), Code::NulInName);
        assert_eq!(utf8(&[0xff], "MacX", 0).unwrap_err().code(), Code::Range);
        assert_eq!(bytes_text(b"\xe4.vhd\0", "Wi2k", 0).unwrap(), "\u{e4}.vhd");
    }
}
