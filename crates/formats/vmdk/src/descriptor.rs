//! Reading the text descriptor (sheet section 2).
//!
//! The text is an input like any other: its length, its lines and its extents are limited, every number is
//! checked, and names are handed to the resolver as they are written, never interpreted here.

use crate::header::DISK_SECTORS_MAX;
use crate::problem;
use vellum_core::bytes::wide;
use vellum_core::{Code, Error, Limits, Result, Uuid};

/// The first lines by which a descriptor is recognised, in lower case.
const FIRST_LINES: [&[u8]; 4] =
    [b"# disk descriptorfile", b"# disk descriptor file", b"#disk descriptorfile", b"#disk descriptor file"];
/// Lines that are no extents.
const OTHER_LINES_MAX: usize = 1100;
/// Bytes of a file name.
const NAME_BYTES_MAX: usize = 4096;

/// A descriptor that was read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Descriptor {
    pub pairs: Vec<Pair>,
    pub extents: Vec<ExtentLine>,
    pub warnings: Vec<String>,
}

/// One `key = value`.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    pub key: String,
    pub value: String,
    /// Byte offset of the line in the file.
    pub at: u64,
}

/// One extent line.
#[derive(Clone, Debug)]
pub(crate) struct ExtentLine {
    pub access: ExtentAccess,
    pub sectors: u64,
    pub kind: ExtentKind,
    /// File name as written; none for ZERO.
    pub name: Option<String>,
    /// Sector in the file where a FLAT or VMFS extent begins.
    pub offset: u64,
    /// Byte offset of the line in the file.
    pub at: u64,
}

/// What a guest may do with an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExtentAccess {
    ReadWrite,
    ReadOnly,
    NoAccess,
}

/// What an extent consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExtentKind {
    Flat,
    Sparse,
    Zero,
    Vmfs,
    VmfsSparse,
    VmfsRdm,
    VmfsRaw,
    SeSparse,
}

impl ExtentKind {
    const ALL: [(&'static str, ExtentKind); 8] = [
        ("FLAT", ExtentKind::Flat),
        ("SPARSE", ExtentKind::Sparse),
        ("ZERO", ExtentKind::Zero),
        ("VMFS", ExtentKind::Vmfs),
        ("VMFSSPARSE", ExtentKind::VmfsSparse),
        ("VMFSRDM", ExtentKind::VmfsRdm),
        ("VMFSRAW", ExtentKind::VmfsRaw),
        ("SESPARSE", ExtentKind::SeSparse),
    ];

    /// The word in the descriptor.
    pub(crate) fn word(self) -> &'static str {
        Self::ALL.iter().find(|(_, kind)| *kind == self).map_or("FLAT", |(word, _)| word)
    }
}

/// Whether `head` begins with the first line of a descriptor (any spelling, after blank lines).
pub(crate) fn looks_like_one(head: &[u8]) -> bool {
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    let text = head.trim_ascii_start();
    let line = text.split(|byte| matches!(byte, b'\n' | b'\r' | 0)).next().unwrap_or_default();
    let line = line.trim_ascii_end().to_ascii_lowercase();
    FIRST_LINES.contains(&line.as_slice())
}

/// How bytes above 127 become characters.
#[derive(Clone, Copy, PartialEq)]
enum Encoding {
    Utf8,
    Windows1252,
    Unknown,
}

/// Reads a descriptor from `bytes`, which stand at byte `base` of the file. NUL padding is cut off.
pub(crate) fn parse(bytes: &[u8], base: u64, limits: &Limits) -> Result<Descriptor> {
    let bytes = cut_at_nul(bytes, base)?;
    let (bytes, base) = match bytes.strip_prefix(b"\xef\xbb\xbf") {
        Some(rest) => (rest, base.saturating_add(3)),
        None => (bytes, base),
    };
    let encoding = find_encoding(bytes);
    let mut found = Descriptor::default();
    if encoding == Encoding::Unknown {
        found.warnings.push("the descriptor is in an encoding that is not known; names may be wrong".into());
    }
    let (mut at, mut lines) = (base, 0usize);
    for raw in bytes.split(|byte| *byte == b'\n') {
        let line_at = at;
        at = at.saturating_add(wide(raw.len())).saturating_add(1);
        let line = decode(raw.trim_ascii(), encoding);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(extent) = parse_extent(&line, line_at)? {
            if found.extents.len() >= limits.extents {
                return Err(Error::new(Code::TableLimit, "the disk has more extents than the limit")
                    .at(line_at)
                    .found(format!("more than {}", found.extents.len()))
                    .allowed(format!("up to {}", limits.extents))
                    .hint("raise the limit `extents` if you trust the file"));
            }
            found.extents.push(extent);
            continue;
        }
        lines = lines.saturating_add(1);
        if lines > OTHER_LINES_MAX {
            return Err(Error::new(Code::TableLimit, "the descriptor has more lines than the limit")
                .at(line_at)
                .found(format!("more than {OTHER_LINES_MAX}"))
                .allowed(format!("up to {OTHER_LINES_MAX}"))
                .hint("no product writes such descriptors; the file is damaged or hostile"));
        }
        found.add_pair(&line, line_at);
    }
    check_total(&found.extents)?;
    Ok(found)
}

/// The text before its NUL padding. A NUL inside quotes is no padding.
fn cut_at_nul(bytes: &[u8], base: u64) -> Result<&[u8]> {
    let Some(nul) = bytes.iter().position(|byte| *byte == 0) else { return Ok(bytes) };
    let text = bytes.get(..nul).unwrap_or_default();
    let line = text.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    let quotes = line.iter().filter(|byte| **byte == b'"').count();
    if quotes == 1 {
        return Err(Error::new(Code::NulInName, "a name in the descriptor holds a NUL byte")
            .at(base.saturating_add(wide(nul)))
            .found(String::from_utf8_lossy(line).trim())
            .allowed("names without NUL")
            .hint("the descriptor is damaged, or made to mislead; do not use the disk"));
    }
    Ok(text)
}

fn find_encoding(bytes: &[u8]) -> Encoding {
    if std::str::from_utf8(bytes).is_ok() {
        return Encoding::Utf8;
    }
    let named = bytes.split(|byte| *byte == b'\n').find_map(|line| {
        let line = String::from_utf8_lossy(line.trim_ascii()).to_ascii_lowercase();
        let (key, value) = line.split_once('=')?;
        (key.trim() == "encoding").then(|| unquote(value.trim()).to_owned())
    });
    match named.as_deref() {
        Some("windows-1252" | "cp1252" | "iso-8859-1" | "latin1") => Encoding::Windows1252,
        _ => Encoding::Unknown,
    }
}

fn decode(line: &[u8], encoding: Encoding) -> String {
    match encoding {
        Encoding::Windows1252 => line.iter().map(|byte| windows_1252(*byte)).collect(),
        _ => String::from_utf8_lossy(line).into_owned(),
    }
}

/// The 32 characters in which windows-1252 differs from ISO 8859-1; a space where it has none.
const WINDOWS_1252_HIGH: &str = "€ ‚ƒ„…†‡ˆ‰Š‹Œ Ž  ‘’“”•–—˜™š›œ žŸ";

fn windows_1252(byte: u8) -> char {
    match byte.checked_sub(0x80) {
        Some(high @ 0..32) => match WINDOWS_1252_HIGH.chars().nth(usize::from(high)) {
            Some(' ') | None => char::REPLACEMENT_CHARACTER,
            Some(c) => c,
        },
        _ => char::from(byte),
    }
}

/// Text without the quotes around it.
fn unquote(text: &str) -> &str {
    match text.strip_prefix('"') {
        Some(rest) => rest.strip_suffix('"').unwrap_or(rest),
        None => text,
    }
}

/// `None` if the line does not begin with an access word.
fn parse_extent(line: &str, at: u64) -> Result<Option<ExtentLine>> {
    let (word, rest) = next_word(line);
    let access = match word.to_ascii_uppercase().as_str() {
        "RW" => ExtentAccess::ReadWrite,
        "RDONLY" => ExtentAccess::ReadOnly,
        "NOACCESS" => ExtentAccess::NoAccess,
        _ => return Ok(None),
    };
    let (sectors, rest) = next_word(rest);
    let sectors = number(sectors, "extent sectors", at)?;
    let (word, rest) = next_word(rest);
    let known = ExtentKind::ALL.iter().find(|(name, _)| name.eq_ignore_ascii_case(word));
    let Some((_, kind)) = known.copied() else {
        let words: Vec<&str> = ExtentKind::ALL.iter().map(|(name, _)| *name).collect();
        return Err(problem(Code::Feature, "a kind of extent that is not known", "extent type", at)
            .found(word)
            .allowed(words.join(", "))
            .hint("convert the disk with the product that wrote it"));
    };
    let (name, rest) = quoted(rest, at)?;
    if name.is_none() && kind != ExtentKind::Zero {
        return Err(problem(Code::Range, "the extent names no file", "extent file", at)
            .found(line)
            .allowed("a name in quotes")
            .hint("the descriptor is damaged; restore it from a backup"));
    }
    let offset = next_word(rest).0;
    let offset = match (kind, offset) {
        (ExtentKind::Flat, "") => {
            return Err(problem(Code::Range, "the flat extent lacks its offset", "extent offset", at)
                .found(line)
                .allowed("a number after the name")
                .hint("the descriptor is damaged; write 0 for an extent with a file of its own"));
        }
        (ExtentKind::Flat | ExtentKind::Vmfs, offset) if !offset.is_empty() => {
            number(offset, "extent offset", at)?
        }
        _ => 0,
    };
    Ok(Some(ExtentLine { access, sectors, kind, name, offset, at }))
}

fn next_word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_once(char::is_whitespace).unwrap_or((text, ""))
}

/// The text in quotes at the start of `text`, and what follows.
fn quoted(text: &str, at: u64) -> Result<(Option<String>, &str)> {
    let Some(rest) = text.trim_start().strip_prefix('"') else { return Ok((None, "")) };
    let Some((name, rest)) = rest.split_once('"') else {
        return Err(problem(Code::Range, "a name without its closing quote", "extent file", at)
            .found(rest)
            .allowed("a name in quotes")
            .hint("the descriptor is damaged; restore it from a backup"));
    };
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(problem(Code::Range, "a file name that cannot be", "extent file", at)
            .found(format!("{} bytes", name.len()))
            .allowed(format!("1 to {NAME_BYTES_MAX} bytes"))
            .hint("the descriptor is damaged; restore it from a backup"));
    }
    Ok((Some(name.to_owned()), rest))
}

/// A decimal number; one that does not fit is OVERFLOW, not something near it.
fn number(text: &str, field: &'static str, at: u64) -> Result<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(problem(Code::Range, "this is not a number", field, at)
            .found(text)
            .allowed("decimal digits")
            .hint("the descriptor is damaged; restore it from a backup"));
    }
    match text.parse::<u64>() {
        Ok(value) if value <= DISK_SECTORS_MAX => Ok(value),
        _ => Err(problem(Code::Overflow, "a number that is too large", field, at)
            .found(text)
            .allowed(format!("up to {DISK_SECTORS_MAX} sectors"))
            .hint("the descriptor is damaged; restore it from a backup")),
    }
}

fn check_total(extents: &[ExtentLine]) -> Result<()> {
    let mut total = 0u64;
    for extent in extents {
        total = total.saturating_add(extent.sectors);
        if total > DISK_SECTORS_MAX {
            return Err(problem(
                Code::Overflow,
                "the extents together are too large",
                "extent sectors",
                extent.at,
            )
            .found(format!("more than {total} sectors"))
            .allowed(format!("up to {DISK_SECTORS_MAX} sectors"))
            .hint("the descriptor is damaged; restore it from a backup"));
        }
    }
    Ok(())
}

impl Descriptor {
    fn add_pair(&mut self, line: &str, at: u64) {
        let Some((key, value)) = line.split_once('=') else {
            let line = vellum_core::Printable(line);
            self.warnings.push(format!("a line of the descriptor at byte {at:#x} is ignored: {line}"));
            return;
        };
        let (key, value) = (key.trim(), unquote(value.trim()));
        if let Some(first) = self.pair(key)
            && first.value != value
        {
            let key = vellum_core::Printable(key);
            self.warnings.push(format!("the descriptor sets {key} twice; the first value is used"));
        }
        self.pairs.push(Pair { key: key.to_owned(), value: value.to_owned(), at });
    }

    /// The first pair with this key, in any case.
    pub(crate) fn pair(&self, key: &str) -> Option<&Pair> {
        self.pairs.iter().find(|pair| pair.key.eq_ignore_ascii_case(key))
    }

    /// The first value of this key, if it is there and not empty.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.pair(key).map(|pair| pair.value.as_str()).filter(|value| !value.is_empty())
    }

    /// A content id: up to 8 hexadecimal digits.
    pub(crate) fn content_id(&self, key: &'static str) -> Result<Option<u32>> {
        let Some(pair) = self.pair(key) else { return Ok(None) };
        let value = pair.value.as_str();
        let digits = (1..=8).contains(&value.len()) && value.bytes().all(|byte| byte.is_ascii_hexdigit());
        match u32::from_str_radix(value, 16) {
            Ok(id) if digits => Ok(Some(id)),
            _ => Err(problem(Code::Range, "this is not a content id", key, pair.at)
                .found(value)
                .allowed("8 hexadecimal digits")
                .hint("the descriptor is damaged; restore it from a backup")),
        }
    }

    /// A UUID of VirtualBox; `None` if it is not there or all zeros.
    pub(crate) fn uuid(&self, key: &'static str) -> Result<Option<Uuid>> {
        let Some(pair) = self.pair(key).filter(|pair| !pair.value.is_empty()) else { return Ok(None) };
        match Uuid::parse(&pair.value) {
            Some(uuid) => Ok(Some(uuid).filter(|uuid| !uuid.is_nil())),
            None => Err(problem(Code::Range, "this is not a UUID", key, pair.at)
                .found(&pair.value)
                .allowed("a UUID")
                .hint("the descriptor is damaged; restore it from a backup")),
        }
    }

    /// A number that only describes; `None` if it is not there or not a number.
    pub(crate) fn small_number(&self, key: &str) -> Option<u32> {
        self.get(key)?.parse().ok()
    }

    /// The comment, with VirtualBox's escapes undone.
    pub(crate) fn comment(&self) -> String {
        let mut text = String::new();
        let mut rest = self.get("ddb.comment").unwrap_or_default().chars();
        while let Some(c) = rest.next() {
            match c {
                '\\' => match rest.next() {
                    Some('n') => text.push('\n'),
                    Some('r') => text.push('\r'),
                    Some('\\') | None => text.push('\\'),
                    Some(other) => text.extend(['\\', other]),
                },
                c => text.push(c),
            }
        }
        text
    }
}

#[cfg(test)]
#[path = "descriptor_tests.rs"]
mod tests;
