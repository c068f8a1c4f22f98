//! The case, sparse files, and how cases are declared.

use std::ops::Range;
use vellum::Code;

/// One hostile (or odd) set of files and what must happen when it is opened.
#[derive(Clone, Debug)]
pub struct HostileCase {
    /// `format/what`: `qcow2/l1-size-max`.
    pub name: String,
    /// Class of RELIABILITY.md section 1.
    pub class: u8,
    /// The files; paths are relative.
    pub files: Vec<HostileFile>,
    /// The file that is named to the library.
    pub open: String,
    /// The format that the user gives, if any.
    pub format: Option<&'static str>,
    /// What must happen.
    pub expected: Expect,
    /// The field that the error must name.
    pub field: Option<&'static str>,
    /// The byte offset that the error must give.
    pub at: Option<u64>,
    /// The error must say what it found and what is allowed.
    pub values: bool,
    /// Other files that may be opened, because the chain needs them.
    pub may_open: Vec<String>,
    /// The image that the error must name, if it is not the one that was opened.
    pub blames: Option<String>,
    /// Bytes that may be read: 16 MiB, but where one table alone is as large.
    pub read_max: u64,
}

/// What must happen.
#[derive(Clone, Debug)]
pub enum Expect {
    /// Refused, with one of these codes (nearly always one).
    Code(Vec<Code>),
    /// Accepted, with this content.
    Accept(Check),
}

/// Content of an accepted disk.
#[derive(Clone, Debug, Default)]
pub struct Check {
    /// Virtual size in bytes.
    pub size: u64,
    /// Data by guest offset.
    pub data: Vec<(u64, Vec<u8>)>,
    /// Ranges that read as zeros.
    pub zeros: Vec<Range<u64>>,
}

/// A file of a case.
#[derive(Clone, Debug)]
pub struct HostileFile {
    /// Relative path, with `/`.
    pub path: String,
    /// What it is.
    pub content: Content,
}

/// What a file is.
#[derive(Clone, Debug)]
pub enum Content {
    /// A regular file.
    Regular(Sparse),
    /// A named pipe: opening it must not hang.
    Fifo,
    /// A symbolic link to this target.
    Symlink(String),
    /// A directory.
    Directory,
}

/// A sparse file: bytes at offsets, zeros elsewhere.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sparse {
    /// Length in bytes.
    pub len: u64,
    /// Bytes by offset; later ones cover earlier ones. Always inside `len`.
    pub runs: Vec<(u64, Vec<u8>)>,
}

impl Sparse {
    /// A file of `len` zero bytes.
    pub fn zeros(len: u64) -> Self {
        Sparse { len, runs: Vec::new() }
    }

    /// A file with these bytes.
    pub fn bytes(bytes: &[u8]) -> Self {
        Sparse::default().put(0, bytes)
    }

    /// Puts bytes in place; the file grows if need be.
    pub fn put(mut self, offset: u64, bytes: &[u8]) -> Self {
        self.len = self.len.max(offset + bytes.len() as u64);
        self.runs.push((offset, bytes.to_vec()));
        self
    }
    /// Puts a little-endian u16.
    pub fn le16(self, offset: u64, value: u16) -> Self {
        self.put(offset, &value.to_le_bytes())
    }
    /// Puts a little-endian u32.
    pub fn le32(self, offset: u64, value: u32) -> Self {
        self.put(offset, &value.to_le_bytes())
    }
    /// Puts a little-endian u64.
    pub fn le64(self, offset: u64, value: u64) -> Self {
        self.put(offset, &value.to_le_bytes())
    }
    /// Puts a big-endian u16.
    pub fn be16(self, offset: u64, value: u16) -> Self {
        self.put(offset, &value.to_be_bytes())
    }
    /// Puts a big-endian u32.
    pub fn be32(self, offset: u64, value: u32) -> Self {
        self.put(offset, &value.to_be_bytes())
    }
    /// Puts a big-endian u64.
    pub fn be64(self, offset: u64, value: u64) -> Self {
        self.put(offset, &value.to_be_bytes())
    }

    /// Cuts the file off at `len`, or makes it longer with zeros.
    pub fn cut(mut self, len: u64) -> Self {
        self.len = len;
        self.runs.retain(|(offset, _)| *offset < len);
        for (offset, bytes) in &mut self.runs {
            bytes.truncate(usize::try_from(len - *offset).unwrap_or(usize::MAX));
        }
        self
    }

    /// The bytes of a range (past the end: zeros).
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut found = vec![0u8; len];
        for (at, bytes) in &self.runs {
            let from = (*at).max(offset);
            let to = (at + bytes.len() as u64).min(offset + len as u64);
            if from < to {
                found[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
            }
        }
        found
    }
}

/// Bytes that no table and no header holds.
pub fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(7).wrapping_add(seed) | 1).collect()
}

/// The cases so far.
#[derive(Default)]
pub struct Cases(Vec<HostileCase>);

impl Cases {
    /// A case of one image, named `disk.EXTENSION` after the format, that must be refused with `code`.
    pub fn refuse(&mut self, name: &str, class: u8, image: Sparse, code: Code) -> Declared<'_> {
        self.add(name, class, image, Expect::Code(vec![code]))
    }

    /// A case of one image that must be accepted with this content.
    pub fn accept(&mut self, name: &str, class: u8, image: Sparse, check: Check) -> Declared<'_> {
        self.add(name, class, image, Expect::Accept(check))
    }

    fn add(&mut self, name: &str, class: u8, image: Sparse, expected: Expect) -> Declared<'_> {
        let path = format!("disk.{}", name.split('/').next().unwrap_or_default());
        self.0.push(HostileCase {
            name: name.to_owned(),
            class,
            files: vec![HostileFile { path: path.clone(), content: Content::Regular(image) }],
            open: path,
            format: None,
            expected,
            field: None,
            at: None,
            values: false,
            may_open: Vec::new(),
            blames: None,
            read_max: 16 << 20,
        });
        let last = self.0.len() - 1;
        Declared(&mut self.0[last])
    }

    /// All of them.
    pub fn into_vec(self) -> Vec<HostileCase> {
        self.0
    }
}

/// A case that was just added, to be described further.
pub struct Declared<'a>(&'a mut HostileCase);

impl Declared<'_> {
    /// The error must name this field, at this byte, with what was found and what is allowed.
    pub fn field(self, name: &'static str, at: u64) -> Self {
        (self.0.field, self.0.at, self.0.values) = (Some(name), Some(at), true);
        self
    }
    /// The error must name this field.
    pub fn about(self, name: &'static str) -> Self {
        self.0.field = Some(name);
        self
    }
    /// Any of these codes will do.
    pub fn or(self, code: Code) -> Self {
        if let Expect::Code(codes) = &mut self.0.expected {
            codes.push(code);
        }
        self
    }
    /// The user gives the format.
    pub fn as_format(self, format: &'static str) -> Self {
        self.0.format = Some(format);
        self
    }
    /// Another file, which the chain may open.
    pub fn with(self, path: &str, content: Sparse) -> Self {
        self.0.may_open.push(path.to_owned());
        self.beside(path, Content::Regular(content))
    }
    /// Another file, which nothing may open.
    pub fn beside(self, path: &str, content: Content) -> Self {
        self.0.files.push(HostileFile { path: path.to_owned(), content });
        self
    }
    /// An L1 table of 16 MiB has to be read, and that much more.
    pub fn reads(self, bytes: u64) -> Self {
        self.0.read_max = bytes;
        self
    }
    /// The error must name this image.
    pub fn blames(self, path: &str) -> Self {
        self.0.blames = Some(path.to_owned());
        self
    }
}

impl HostileCase {
    /// The part of the name before the slash.
    pub fn group(&self) -> &str {
        self.name.split('/').next().unwrap_or_default()
    }
}
