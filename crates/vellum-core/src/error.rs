//! The one public error: what happened, in which image, where, and what to do next.
//!
//! Codes are stable across releases (RELIABILITY.md section 1.1); the text is not.

use std::fmt;

/// `Result` with Vellum's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose fault it is, and so what a caller can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// The image (or what a peer sent) contradicts its own format.
    Damaged,
    /// Valid, but this build does not implement it; the message names the feature.
    NotImplemented,
    /// Refused by a limit or a policy that the caller can change.
    NotAllowed,
    /// The caller asked for something that makes no sense here.
    Misuse,
    /// A file, a parent or an extent is not there.
    NotFound,
    /// Someone else holds it.
    Busy,
    /// The machine could not do it: I/O error, out of space.
    Io,
    /// The caller asked to stop.
    Cancelled,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $kind:ident;)*) => {
        /// Stable machine code of an error.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Code { $($(#[$doc])* $name,)* }
        impl Code {
            /// The code as scripts see it.
            pub fn as_str(self) -> &'static str { match self { $(Code::$name => $text,)* } }
            /// The kind that an error with this code has.
            pub fn kind(self) -> Kind { match self { $(Code::$name => Kind::$kind,)* } }
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];
        }
    };
}

codes! {
    /// The file ends before a structure that it must hold.
    Truncated = "TRUNCATED", Damaged;
    /// The signature of the format is missing.
    BadMagic = "BAD_MAGIC", Damaged;
    /// A version of the format that is not known.
    Version = "VERSION", NotImplemented;
    /// A feature of the format that is not implemented or must be refused.
    Feature = "FEATURE", NotImplemented;
    /// A field holds a value that the format does not allow.
    Range = "RANGE", Damaged;
    /// Two fields together exceed what can be computed with.
    Overflow = "OVERFLOW", Damaged;
    /// An offset that must be aligned is not.
    Misaligned = "MISALIGNED", Damaged;
    /// An offset points past the end of the file.
    OutOfFile = "OUT_OF_FILE", Damaged;
    /// Two structures claim the same bytes.
    Overlap = "OVERLAP", Damaged;
    /// Structures contradict each other.
    Corrupt = "CORRUPT", Damaged;
    /// A table is larger than the limit.
    TableLimit = "TABLE_LIMIT", NotAllowed;
    /// The chain of parents comes back to itself.
    Cycle = "CYCLE", Damaged;
    /// The chain of parents is longer than the limit.
    Depth = "DEPTH", NotAllowed;
    /// The image names another file and that is not allowed here.
    ExternalRef = "EXTERNAL_REF", NotAllowed;
    /// The image names a file outside the directories that are allowed.
    PathEscape = "PATH_ESCAPE", NotAllowed;
    /// The image names a URL, a UNC path or a pseudo-protocol.
    RemoteRef = "REMOTE_REF", NotAllowed;
    /// A name inside the image holds a NUL byte.
    NulInName = "NUL_IN_NAME", Damaged;
    /// More than one format claims the file.
    Ambiguous = "AMBIGUOUS", NotAllowed;
    /// The format must be given by the caller.
    FormatRequired = "FORMAT_REQUIRED", NotAllowed;
    /// A checksum does not match.
    Checksum = "CHECKSUM", Damaged;
    /// Compressed data does not decompress to exactly its block.
    Decompress = "DECOMPRESS", Damaged;
    /// A key derivation asks for more work than the limit.
    KdfLimit = "KDF_LIMIT", NotAllowed;
    /// A cipher that protects nothing.
    WeakCipher = "WEAK_CIPHER", NotAllowed;
    /// Declared sizes contradict each other or the file.
    SizeLie = "SIZE_LIE", Damaged;
    /// The parent was not found.
    ParentMissing = "PARENT_MISSING", NotFound;
    /// The image found in the parent's place is another one.
    ParentWrong = "PARENT_WRONG", Damaged;
    /// The parent was written to after the child was made.
    ParentModified = "PARENT_MODIFIED", Damaged;
    /// The image was not closed cleanly.
    Dirty = "DIRTY", Damaged;
    /// The image is marked corrupt.
    CorruptFlag = "CORRUPT_FLAG", Damaged;
    /// Another process uses the image.
    Locked = "LOCKED", Busy;
    /// The peer broke the protocol.
    Proto = "PROTO", Damaged;
    /// The peer exceeded a limit of the protocol.
    ProtoLimit = "PROTO_LIMIT", NotAllowed;
    /// The peer wants TLS.
    TlsRequired = "TLS_REQUIRED", NotAllowed;
    /// A job file does not belong to these images.
    JournalMismatch = "JOURNAL_MISMATCH", Damaged;
    /// The operating system reported an error.
    Io = "IO", Io;
    /// No space left.
    NoSpace = "NO_SPACE", Io;
    /// The file was not found.
    NotFound = "NOT_FOUND", NotFound;
    /// The target exists already.
    Exists = "EXISTS", Misuse;
    /// Reading or writing is not permitted.
    Permission = "PERMISSION", NotAllowed;
    /// An option or argument is wrong.
    Usage = "USAGE", Misuse;
    /// The source changed while it was read.
    SourceChanged = "SOURCE_CHANGED", Damaged;
    /// Source and result differ.
    Mismatch = "MISMATCH", Damaged;
    /// The caller asked to stop.
    Cancelled = "CANCELLED", Cancelled;
    /// The component that should have answered went away.
    Lost = "LOST", Io;
}

/// An error of Vellum. One pointer wide.
pub struct Error(Box<Inner>);

#[derive(Default)]
struct Inner {
    code: Option<Code>,
    message: String,
    image: Option<String>,
    format: Option<&'static str>,
    field: Option<String>,
    offset: Option<u64>,
    found: Option<String>,
    allowed: Option<String>,
    hint: Option<String>,
    context: Vec<String>,
    source: Option<std::io::Error>,
    is_flush_failure: bool,
}

impl Error {
    /// An error with its code and a sentence that says what is wrong.
    #[cold]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Error(Box::new(Inner { code: Some(code), message: message.into(), ..Inner::default() }))
    }

    /// An error of the operating system, with the code that fits it.
    #[cold]
    pub fn from_io(source: std::io::Error, message: impl Into<String>) -> Self {
        use std::io::ErrorKind as K;
        let code = match source.kind() {
            K::NotFound => Code::NotFound,
            K::AlreadyExists => Code::Exists,
            K::PermissionDenied | K::ReadOnlyFilesystem => Code::Permission,
            K::StorageFull | K::QuotaExceeded | K::FileTooLarge => Code::NoSpace,
            K::UnexpectedEof => Code::Truncated,
            _ => Code::Io,
        };
        let mut error = Error::new(code, message);
        error.0.source = Some(source);
        error
    }

    /// Adds what caused it, where that says more than a sentence. It is shown as it is: text of a peer or an image in it has
    /// to be made safe before.
    pub fn caused_by(mut self, source: std::io::Error) -> Self {
        self.0.source = Some(source);
        self
    }
    /// Names the image or file that it is about. The innermost name given stays.
    pub fn image(mut self, name: impl fmt::Display) -> Self {
        self.0.image.get_or_insert_with(|| name.to_string());
        self
    }
    /// Names the format that found it.
    pub fn format(mut self, name: &'static str) -> Self {
        self.0.format.get_or_insert(name);
        self
    }
    /// Names the structure and field, in the words of the format sheet.
    pub fn field(mut self, name: impl Into<String>) -> Self {
        self.0.field = Some(name.into());
        self
    }
    /// The byte offset of the field in the file.
    pub fn at(mut self, offset: u64) -> Self {
        self.0.offset = Some(offset);
        self
    }
    /// The value found.
    pub fn found(mut self, value: impl fmt::Display) -> Self {
        self.0.found = Some(value.to_string());
        self
    }
    /// What would have been allowed.
    pub fn allowed(mut self, range: impl fmt::Display) -> Self {
        self.0.allowed = Some(range.to_string());
        self
    }
    /// What to do next. The innermost hint stays.
    pub fn hint(mut self, advice: impl Into<String>) -> Self {
        self.0.hint.get_or_insert_with(|| advice.into());
        self
    }
    /// Another advice in place of the one that is there, which does not help where the error ended up.
    pub fn replace_hint(mut self, advice: impl Into<String>) -> Self {
        self.0.hint = Some(advice.into());
        self
    }
    /// A flush failed, or a write on which one depends: what was written before may be lost.
    pub fn flush_failure(mut self) -> Self {
        self.0.is_flush_failure = true;
        self
    }
    /// Adds what was being done, outermost last.
    pub fn context(mut self, doing: impl Into<String>) -> Self {
        self.0.context.push(doing.into());
        self
    }

    /// The stable machine code.
    pub fn code(&self) -> Code {
        self.0.code.unwrap_or(Code::Io)
    }
    /// Whose fault it is.
    pub fn kind(&self) -> Kind {
        self.code().kind()
    }
    /// The sentence alone.
    pub fn message(&self) -> &str {
        &self.0.message
    }
    /// The image that it is about, if known.
    pub fn image_name(&self) -> Option<&str> {
        self.0.image.as_deref()
    }
    /// The format that found it, if any.
    pub fn format_name(&self) -> Option<&'static str> {
        self.0.format
    }
    /// The field, if it is about one.
    pub fn field_name(&self) -> Option<&str> {
        self.0.field.as_deref()
    }
    /// The byte offset of the field, if known.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }
    /// The value found, if it is about one.
    pub fn found_value(&self) -> Option<&str> {
        self.0.found.as_deref()
    }
    /// What would have been allowed, if it is about a value.
    pub fn allowed_values(&self) -> Option<&str> {
        self.0.allowed.as_deref()
    }
    /// What to do next.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }
    /// What was being done, innermost first.
    pub fn contexts(&self) -> &[String] {
        &self.0.context
    }
    /// The operating system's error, if that was the cause.
    pub fn io_error(&self) -> Option<&std::io::Error> {
        self.0.source.as_ref()
    }
    /// Whether a flush failed, so that what was written before may be lost.
    pub fn is_flush_failure(&self) -> bool {
        self.0.is_flush_failure
    }
    /// Whether the operating system said that the operation is not supported here.
    pub fn is_unsupported_by_os(&self) -> bool {
        self.io_error().is_some_and(|e| e.kind() == std::io::ErrorKind::Unsupported)
    }

    /// A copy to hand to a second waiter (the operating system's error is kept as its number or text).
    pub fn duplicate(&self) -> Self {
        let source = self.0.source.as_ref().map(|e| match e.raw_os_error() {
            Some(number) => std::io::Error::from_raw_os_error(number),
            None => std::io::Error::new(e.kind(), e.to_string()),
        });
        Error(Box::new(Inner {
            code: self.0.code,
            message: self.0.message.clone(),
            image: self.0.image.clone(),
            format: self.0.format,
            field: self.0.field.clone(),
            offset: self.0.offset,
            found: self.0.found.clone(),
            allowed: self.0.allowed.clone(),
            hint: self.0.hint.clone(),
            context: self.0.context.clone(),
            source,
            is_flush_failure: self.0.is_flush_failure,
        }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let e = &*self.0;
        if let Some(image) = &e.image {
            write!(f, "{}: ", Printable(image))?;
        }
        write!(f, "{}", Printable(&e.message))?;
        let mut details = Vec::new();
        match (e.format, &e.field) {
            (Some(format), Some(field)) => details.push(format!("{format} field {field}")),
            (None, Some(field)) => details.push(format!("field {field}")),
            (Some(format), None) => details.push(format.to_string()),
            (None, None) => {}
        }
        if let Some(offset) = e.offset {
            details.push(format!("at byte {offset:#x}"));
        }
        if let Some(found) = &e.found {
            details.push(format!("found {}", Printable(found)));
        }
        if let Some(allowed) = &e.allowed {
            details.push(format!("allowed {}", Printable(allowed)));
        }
        if !details.is_empty() {
            write!(f, " ({})", details.join(", "))?;
        }
        if let Some(source) = &e.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {self}", self.code().as_str())?;
        for context in &self.0.context {
            write!(f, "; while {context}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|e| e as _)
    }
}

/// Text from an image or a peer, made safe for a terminal and cut at 256 characters.
pub struct Printable<'a>(pub &'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (count, c) in self.0.chars().enumerate() {
            if count >= 256 {
                return f.write_str("...");
            }
            if c.is_control() {
                write!(f, "{}", c.escape_default())?;
            } else {
                write!(f, "{c}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pointer_wide() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }

    #[test]
    fn display_names_image_field_offset_found_and_allowed() {
        let e = Error::new(Code::Range, "block size is not a power of two")
            .image("a.vdi")
            .format("vdi")
            .field("cbBlock")
            .at(0x178)
            .found(3)
            .allowed("4 KiB to 256 MiB");
        assert_eq!(
            e.to_string(),
            "a.vdi: block size is not a power of two (vdi field cbBlock, at byte 0x178, found 3, allowed 4 KiB to 256 MiB)"
        );
    }

    #[test]
    fn text_from_images_cannot_reach_the_terminal_raw() {
        let e = Error::new(Code::Corrupt, "bad name").found("\x1b[31mred\n");
        assert!(!e.to_string().contains('\x1b'));
    }
}
