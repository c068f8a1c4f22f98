//! [`Format`]: what a driver of one format offers. Drivers are registered in a table; there are no globals.

use crate::{
    Access, BoxFuture, CheckReport, CheckRequest, Chs, Code, Error, Events, Identity, Image, ImageWriter,
    Limits, Location, Output, Resolver, Result, Storage, Uuid,
};
use std::sync::Arc;

/// A driver of one format.
pub trait Format: Send + Sync + 'static {
    /// The name that users type.
    fn name(&self) -> &'static str;
    /// Other names that people type for it.
    fn aliases(&self) -> &'static [&'static str] {
        &[]
    }
    /// One line for `vellum formats`.
    fn description(&self) -> &'static str;
    /// Usual file name extensions, without the dot. For display only: a format is never chosen by extension.
    fn extensions(&self) -> &'static [&'static str];
    /// Whether the sample looks like this format. Pure.
    fn probe(&self, sample: &Sample<'_>) -> Confidence;
    /// Opens an image. Changes no byte of anything, not even for writing: that begins with
    /// [`crate::WritableImage::begin`].
    fn open(&self, request: OpenRequest) -> BoxFuture<'static, Result<Arc<dyn Image>>>;
    /// The options that `create` takes.
    fn create_options(&self) -> &'static [OptionSpec];
    /// Begins a new image; the writer is fed in ascending order.
    fn create(&self, request: CreateRequest) -> BoxFuture<'static, Result<Box<dyn ImageWriter>>>;
    /// Looks for what is wrong, and plans what would mend it. Changes nothing. Fails only where nothing can be said.
    fn check(&self, request: CheckRequest) -> BoxFuture<'static, Result<CheckReport>> {
        let error = Error::new(Code::Feature, format!("{} images have nothing to check", self.name()))
            .image(request.location);
        Box::pin(async move { Err(error) })
    }
}

/// How sure a probe is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Confidence {
    /// Not this format.
    No,
    /// A weak sign (text, a trailer that data could imitate).
    Weak,
    /// The format's signature and more.
    Sure,
}

/// Head and tail of a file, for probing.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The first bytes, up to [`Sample::LEN`].
    pub head: &'a [u8],
    /// The last bytes, up to [`Sample::LEN`].
    pub tail: &'a [u8],
    /// Length of the file.
    pub len: u64,
}

impl Sample<'_> {
    /// Bytes taken from either end.
    pub const LEN: usize = 4096;
}

/// What a driver needs to open an image.
#[derive(Clone)]
pub struct OpenRequest {
    /// The file that was named.
    pub storage: Arc<dyn Storage>,
    /// Where it is.
    pub location: Location,
    /// For extents and data files only; parents are opened by the chain.
    pub resolver: Arc<dyn Resolver>,
    /// What is refused for its size.
    pub limits: Limits,
    /// Where warnings go.
    pub events: Events,
    /// Open what other files the image consists of. `false` for `info`: such files are listed, not touched,
    /// and reading guest data from the image may fail.
    pub open_parts: bool,
    /// Open for writing: [`crate::Image::writable`] is there, or opening fails and says why it cannot be. The storage
    /// is writable then; parts are to be opened for writing, too.
    pub write: bool,
    /// How the storage was opened; parts are opened alike (but those that are not written, for reading).
    pub access: Access,
    /// Do not refuse to write because of marks that say "check me first" (dirty, corrupt).
    pub skip_consistency_checks: bool,
    /// Open the state of an internal snapshot (id or name), for reading only.
    pub snapshot: Option<String>,
    /// Time and randomness, for identities that change when the image is written.
    pub providers: Providers,
}

/// What a driver needs to create an image.
pub struct CreateRequest {
    /// Where files are made.
    pub output: Output,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// The driver's own options, checked against its schema.
    pub options: OptionValues,
    /// What formats keep of a disk besides its content.
    pub traits: DiskTraits,
    /// Compress blocks, if the variant can.
    pub compress: bool,
    /// Compression level; the codec's own scale. `None` is the default.
    pub level: Option<i32>,
    /// Time and randomness.
    pub providers: Providers,
    /// Make a child of this image: what is not written shows the parent.
    pub parent: Option<ParentLink>,
}

/// The parent of a new image, as the child is to name it.
#[derive(Clone, Debug)]
pub struct ParentLink {
    /// Its place as the child writes it: relative to the child, or absolute.
    pub place: String,
    /// Its absolute place.
    pub absolute: String,
    /// Its format.
    pub format: &'static str,
    /// Its size in bytes.
    pub virtual_size: u64,
    /// How a child recognises it.
    pub identity: Identity,
    /// Time of its last change, in seconds since 1970, if known.
    pub modified_unix: Option<u64>,
}

/// What formats keep of a disk besides its content; carried along by convert.
#[derive(Clone, Debug, Default)]
pub struct DiskTraits {
    /// Comment.
    pub comment: String,
    /// Physical geometry.
    pub pchs: Option<Chs>,
    /// Logical (BIOS) geometry.
    pub lchs: Option<Chs>,
    /// Identity to give to the new image; a random one otherwise.
    pub uuid: Option<Uuid>,
}

/// Time and randomness come through here, so that a seed replays any run.
#[derive(Clone)]
pub struct Providers {
    /// Seconds since 1970.
    pub unix_time: u64,
    state: Arc<parking_lot::Mutex<[u64; 2]>>,
}

impl Providers {
    /// Providers that give the same values for the same seed and time.
    pub fn seeded(seed: u128, unix_time: u64) -> Self {
        let state = [(seed >> 64) as u64 ^ 0x9e37_79b9_7f4a_7c15, seed as u64 | 1];
        Providers { unix_time, state: Arc::new(parking_lot::Mutex::new(state)) }
    }

    /// Providers from the clock and the machine's randomness.
    ///
    /// # Errors
    /// `IO` if the machine has no randomness to give.
    pub fn system() -> Result<Self> {
        let mut seed = [0u8; 16];
        getrandom::fill(&mut seed)
            .map_err(|e| Error::new(Code::Io, "the machine gives no random numbers").found(e))?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Ok(Providers::seeded(u128::from_le_bytes(seed), now.map_or(0, |now| now.as_secs())))
    }

    /// 64 bits of identity (not of secrecy): xoroshiro128+ over the seed.
    pub fn random_u64(&self) -> u64 {
        let mut state = self.state.lock();
        let [a, b] = *state;
        let result = a.wrapping_add(b);
        let b = b ^ a;
        *state = [a.rotate_left(24) ^ b ^ (b << 16), b.rotate_left(37)];
        result
    }

    /// A random (version 4) UUID.
    pub fn random_uuid(&self) -> Uuid {
        let mut bytes = [0u8; 16];
        bytes[..8].copy_from_slice(&self.random_u64().to_be_bytes());
        bytes[8..].copy_from_slice(&self.random_u64().to_be_bytes());
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Uuid(bytes)
    }
}

/// One option of a driver.
#[derive(Clone, Copy, Debug)]
pub struct OptionSpec {
    /// Its name: what stands before the `=`.
    pub name: &'static str,
    /// What values it takes.
    pub kind: OptionKind,
    /// The default, as text.
    pub default: &'static str,
    /// For those who know the format.
    pub expert: bool,
    /// One line.
    pub help: &'static str,
}

/// The type of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionKind {
    /// Any text.
    Text,
    /// `on` or `off`.
    Flag,
    /// A number.
    Number {
        /// Least value.
        min: u64,
        /// Greatest value.
        max: u64,
    },
    /// A size with an optional suffix K, M, G, T (binary).
    Size {
        /// Least value in bytes.
        min: u64,
        /// Greatest value in bytes.
        max: u64,
    },
    /// One of these words.
    OneOf(&'static [&'static str]),
}

/// Options of a driver, checked against its schema.
#[derive(Clone, Debug, Default)]
pub struct OptionValues {
    values: Vec<(&'static OptionSpec, String)>,
}

impl OptionValues {
    /// Checks `given` (name, value) against `schema`: unknown names and bad values are refused by name.
    pub fn check(
        format: &'static str,
        schema: &'static [OptionSpec],
        given: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self> {
        let mut values: Vec<(&'static OptionSpec, String)> = Vec::new();
        for (name, value) in given {
            let Some(spec) = schema.iter().find(|spec| spec.name == name) else {
                let known: Vec<&str> = schema.iter().map(|spec| spec.name).collect();
                return Err(Error::new(Code::Usage, format!("{format} has no option {name:?}"))
                    .allowed(known.join(", "))
                    .hint(format!("`vellum formats {format}` lists the options")));
            };
            check_value(format, spec, &value)?;
            values.retain(|(old, _)| old.name != spec.name);
            values.push((spec, value));
        }
        Ok(OptionValues { values })
    }

    /// The text given for an option, if any.
    pub fn given(&self, name: &str) -> Option<&str> {
        self.values.iter().find(|(spec, _)| spec.name == name).map(|(_, value)| value.as_str())
    }
    /// The text of an option, `default` if it was not given.
    pub fn text<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        self.given(name).unwrap_or(default)
    }
    /// The number or size of an option, `default` if it was not given.
    pub fn number(&self, name: &str, default: u64) -> u64 {
        self.given(name).and_then(parse_size).unwrap_or(default)
    }
    /// Whether a flag is on, `default` if it was not given.
    pub fn flag(&self, name: &str, default: bool) -> bool {
        self.given(name).map_or(default, |value| value == "on")
    }
    /// All that was given, sorted by name: the same options always give the same list.
    pub fn list(&self) -> Vec<(&'static str, &str)> {
        let mut list: Vec<_> = self.values.iter().map(|(spec, value)| (spec.name, value.as_str())).collect();
        list.sort_unstable();
        list
    }
}

fn check_value(format: &'static str, spec: &'static OptionSpec, value: &str) -> Result<()> {
    let bad = |allowed: String| {
        Err(Error::new(Code::Usage, format!("{format} option {} cannot be {value:?}", spec.name))
            .allowed(allowed)
            .hint(format!("`vellum formats {format}` lists the options")))
    };
    match spec.kind {
        OptionKind::Text => Ok(()),
        OptionKind::Flag if matches!(value, "on" | "off") => Ok(()),
        OptionKind::Flag => bad("on, off".into()),
        OptionKind::OneOf(words) if words.contains(&value) => Ok(()),
        OptionKind::OneOf(words) => bad(words.join(", ")),
        OptionKind::Number { min, max } => match value.parse::<u64>() {
            Ok(number) if (min..=max).contains(&number) => Ok(()),
            _ => bad(format!("{min} to {max}")),
        },
        OptionKind::Size { min, max } => match parse_size(value) {
            Some(size) if (min..=max).contains(&size) => Ok(()),
            _ => bad(format!("{min} to {max} bytes")),
        },
    }
}

/// Reads a size: digits with an optional binary suffix `b k K M G T P E`, also `KiB` and the like.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let suffix = suffix.trim();
    let suffix = suffix.strip_suffix("iB").unwrap_or(suffix);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        "P" | "p" => 50,
        "E" | "e" => 60,
        _ => return None,
    };
    number.checked_mul(1u64 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("64k"), Some(65536));
        assert_eq!(parse_size("2 GiB"), Some(2 << 30));
        assert_eq!(parse_size("16E"), None);
        assert_eq!(parse_size("1.5G"), None);
        assert_eq!(parse_size("-1"), None);
    }

    #[test]
    fn unknown_options_are_refused_by_name() {
        static SCHEMA: &[OptionSpec] = &[OptionSpec {
            name: "subformat",
            kind: OptionKind::OneOf(&["fixed", "dynamic"]),
            default: "dynamic",
            expert: false,
            help: "",
        }];
        let given = |n: &str, v: &str| OptionValues::check("vhd", SCHEMA, [(n.to_owned(), v.to_owned())]);
        assert!(given("subfromat", "fixed").unwrap_err().to_string().contains("subfromat"));
        assert!(given("subformat", "thin").unwrap_err().to_string().contains("thin"));
        assert_eq!(given("subformat", "fixed").unwrap().text("subformat", "dynamic"), "fixed");
    }

    #[test]
    fn the_same_seed_gives_the_same_uuids() {
        let (a, b) = (Providers::seeded(7, 0), Providers::seeded(7, 0));
        assert_eq!(a.random_uuid(), b.random_uuid());
        assert_ne!(a.random_uuid(), Providers::seeded(8, 0).random_uuid());
    }
}
