//! [`Image`]: one open image of one format. It answers *where* a guest range lives.

use crate::{BoxFuture, Error, Result, Storage};
use std::ops::Range;
use std::sync::Arc;

/// One open image of one format over its storages.
///
/// # Contract
/// * `map` is pure: from cached metadata, no I/O, no blocking. It answers for a prefix of the range, at least
///   one byte, and as much of it as it cheaply can: a run of absent blocks is one extent however long.
/// * After `load(range)` succeeded, `map` of `range.start` answers unless the cache was squeezed in between;
///   callers loop.
/// * Ranges reach at most to [`ImageInfo::virtual_size`]; callers clip.
/// * Every offset in an extent was checked against the length of its storage.
pub trait Image: Send + Sync + 'static {
    /// What the image says of itself. From [`WritableImage::begin`](crate::WritableImage::begin) on, with the identity of
    /// the session.
    fn info(&self) -> &ImageInfo;
    /// The storages that extents refer to by index.
    fn storages(&self) -> &[Arc<dyn Storage>];
    /// Where the start of `range` lives.
    fn map(&self, range: Range<u64>) -> Result<Lookup>;
    /// Brings in the metadata that `map(range)` missed.
    fn load(&self, range: Range<u64>) -> BoxFuture<'_, Result<()>>;
    /// The write side, if the image was opened for writing.
    fn writable(&self) -> Option<&dyn crate::WritableImage> {
        None
    }
    /// The internal snapshots, if the format has such.
    fn snapshots(&self) -> Option<&dyn crate::Snapshots> {
        None
    }
}

/// The answer of [`Image::map`].
#[derive(Clone, Debug)]
pub enum Lookup {
    /// The first `len` bytes of the range live in `extent`.
    Found {
        /// Bytes from the start of the range, at least 1.
        len: u64,
        /// Where they live.
        extent: Extent,
    },
    /// The metadata is not in memory: `load`, then ask again.
    Miss,
}

/// Where a guest range lives.
#[derive(Clone, Debug)]
pub enum Extent {
    /// As it is, at `offset` of the storage; one byte for one byte.
    Raw {
        /// Index into [`Image::storages`].
        storage: usize,
        /// Byte offset of the first byte of the range.
        offset: u64,
    },
    /// Inside an encoded (compressed) block.
    Encoded(Encoded),
    /// Reads as zeros; does not fall through to the parent.
    Zero,
    /// Not in this image: the parent answers, or zeros without one.
    Parent,
}

/// A compressed block. The range asked for starts `skip` bytes into the decoded block.
#[derive(Clone)]
pub struct Encoded {
    /// Index into [`Image::storages`].
    pub storage: usize,
    /// Byte offset of the encoded bytes.
    pub offset: u64,
    /// Encoded bytes (an upper bound where the format stores only that).
    pub len: u32,
    /// Bytes of the decoded block.
    pub block_len: u32,
    /// Offset of the range's first byte in the decoded block.
    pub skip: u32,
    /// What decodes it.
    pub codec: Arc<dyn Codec>,
}

impl std::fmt::Debug for Encoded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Encoded({} {:#x}+{} skip {})", self.codec.name(), self.offset, self.len, self.skip)
    }
}

/// Decodes and encodes blocks of an image.
pub trait Codec: Send + Sync + 'static {
    /// `deflate`, `zlib`, `zstd`, ...
    fn name(&self) -> &'static str;
    /// Decodes `encoded` into exactly `block`: neither more nor less. Bytes after the end of the stream are ignored.
    fn decode(&self, encoded: &[u8], block: &mut [u8]) -> Result<()>;
    /// Encodes `block` into `out` (cleared first), at most `limit` bytes; `false` when it does not fit.
    fn encode(&self, block: &[u8], out: &mut Vec<u8>, limit: usize) -> Result<bool>;
}

/// What an image says of itself. All sizes in bytes.
#[derive(Clone, Debug, Default)]
pub struct ImageInfo {
    /// Name of the format, as users type it.
    pub format: &'static str,
    /// Variant: `monolithicSparse`, `dynamic`, ...
    pub variant: String,
    /// What messages call the image.
    pub name: String,
    /// Size of the disk that a guest sees.
    pub virtual_size: u64,
    /// Allocation unit; 0 if the format has none.
    pub block_size: u64,
    /// The parent that the image names.
    pub parent: Option<ParentRef>,
    /// How a child recognises this image.
    pub identity: Identity,
    /// When the image says that its content was last changed, in seconds since 1970.
    pub modified_unix: Option<u64>,
    /// Comment or description.
    pub comment: String,
    /// Physical geometry, if stored.
    pub pchs: Option<Chs>,
    /// Logical (BIOS) geometry, if stored.
    pub lchs: Option<Chs>,
    /// The image was not closed cleanly, or is marked damaged.
    pub dirty: Option<String>,
    /// Other files that belong to the image (extents, data file), as the image names them.
    pub files: Vec<String>,
    /// What the image keeps besides the disk that a guest sees, in words: "2 internal snapshots". A copy of the disk
    /// leaves it behind.
    pub besides: Vec<String>,
    /// Everything else that the format keeps, in the format's own words.
    pub properties: Vec<Property>,
    /// What is odd but was tolerated.
    pub warnings: Vec<String>,
}

impl ImageInfo {
    /// Adds a property.
    pub fn property(&mut self, name: &'static str, value: impl Into<Value>) {
        self.properties.push(Property { name, value: value.into() });
    }

    /// Gives a property that is there another value.
    pub fn change_property(&mut self, name: &str, value: impl Into<Value>) {
        if let Some(property) = self.properties.iter_mut().find(|property| property.name == name) {
            property.value = value.into();
        }
    }
}

/// A property that the format keeps.
#[derive(Clone, Debug, PartialEq)]
pub struct Property {
    /// The format's own name for it.
    pub name: &'static str,
    /// Its value.
    pub value: Value,
}

/// The value of a property.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Words.
    Text(String),
    /// A number.
    Number(u64),
    /// A number of bytes.
    Bytes(u64),
    /// Yes or no.
    Flag(bool),
    /// Several.
    List(Vec<Value>),
    /// Several, with names.
    Record(Vec<(&'static str, Value)>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::Text(text.to_owned())
    }
}
impl From<String> for Value {
    fn from(text: String) -> Self {
        Value::Text(text)
    }
}
impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Value::Number(number)
    }
}
impl From<u32> for Value {
    fn from(number: u32) -> Self {
        Value::Number(number.into())
    }
}
impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Value::Flag(flag)
    }
}

/// Cylinders, heads, sectors per track.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chs {
    /// Cylinders.
    pub cylinders: u32,
    /// Heads.
    pub heads: u32,
    /// Sectors per track.
    pub sectors: u32,
}

/// A UUID in the byte order in which it is printed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// Whether all bytes are zero.
    pub fn is_nil(&self) -> bool {
        self.0 == [0; 16]
    }

    /// From Microsoft's order on disk: the first three groups little-endian.
    pub fn from_microsoft(bytes: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, rest @ ..] = bytes;
        let [i, j, k, l, m, n, o, p] = rest;
        Uuid([d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p])
    }

    /// To Microsoft's order on disk. (The exchange is its own inverse.)
    pub fn to_microsoft(self) -> [u8; 16] {
        Uuid::from_microsoft(self.0).0
    }

    /// Reads `aabbccdd-eeff-0011-2233-445566778899`, with or without braces.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let text = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')).unwrap_or(text);
        let well_formed = text.len() == 36
            && text.bytes().enumerate().all(|(i, c)| match i {
                8 | 13 | 18 | 23 => c == b'-',
                _ => c.is_ascii_hexdigit(),
            });
        let digits: String = text.chars().filter(|c| *c != '-').collect();
        let number = u128::from_str_radix(&digits, 16).ok()?;
        well_formed.then(|| Uuid(number.to_be_bytes()))
    }
}

impl std::fmt::Display for Uuid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for Uuid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// How a child recognises an image: whatever of these the format has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Stays for the life of the image.
    pub uuid: Option<Uuid>,
    /// Changes whenever the content changes.
    pub modification: Option<Uuid>,
    /// VMDK content id; changes whenever the content changes.
    pub cid: Option<u32>,
}

/// The parent that an image names: where it may be and how to recognise it.
#[derive(Clone, Debug, Default)]
pub struct ParentRef {
    /// Where it may be, best first. Empty when the format stores no place (VDI, VirtualBox's VMDK).
    pub hints: Vec<ParentHint>,
    /// Format that the child states, if it does.
    pub format: Option<String>,
    /// What the parent must say of itself. Fields that are `None` are not compared.
    pub expected: Identity,
    /// When the parent was last changed, in seconds since 1970, as far as the child knows. Clocks and copies make this a
    /// hint, so that a difference is a warning.
    pub modified_unix: Option<u64>,
}

/// One place where a parent may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentHint {
    /// Which field says so: `backing_file`, `parentFileNameHint`, `W2ru`, ...
    pub field: &'static str,
    /// The place, as written (decoded to text, not otherwise changed).
    pub place: String,
}

impl ParentRef {
    /// What the child looks for, for messages.
    pub fn describe(&self) -> String {
        let mut parts: Vec<String> =
            self.hints.iter().map(|h| format!("{} {:?}", h.field, h.place)).collect();
        if let Some(uuid) = self.expected.uuid {
            parts.push(format!("UUID {uuid}"));
        }
        if let Some(cid) = self.expected.cid {
            parts.push(format!("CID {cid:08x}"));
        }
        parts.join(", ")
    }
}

/// Maps a prefix of `range`, loading what is missing. The usual way to ask an image.
pub async fn lookup(image: &dyn Image, range: Range<u64>) -> Result<(u64, Extent)> {
    // Between load and map another reader may squeeze the page out again; that cannot go on for ever
    // unless the cache cannot hold even one page.
    for _ in 0..1000 {
        match image.map(range.clone())? {
            Lookup::Found { len, extent } => return Ok((len, extent)),
            Lookup::Miss => image.load(range.clone()).await?,
        }
    }
    Err(Error::new(crate::Code::Io, "the table cache is too small to hold one page")
        .image(&image.info().name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuid_text_and_microsoft_order() {
        let uuid = Uuid::parse("{c9cc8ff4-b6c0-4e54-9dee-acaa4fe4add5}").unwrap();
        assert_eq!(uuid.to_microsoft()[..6], [0xf4, 0x8f, 0xcc, 0xc9, 0xc0, 0xb6]);
        assert_eq!(Uuid::from_microsoft(uuid.to_microsoft()), uuid);
        assert_eq!(uuid.to_string(), "c9cc8ff4-b6c0-4e54-9dee-acaa4fe4add5");
        assert_eq!(Uuid::parse("c9cc8ff4b6c0-4e54-9dee-acaa4fe4add5"), None);
    }
}
