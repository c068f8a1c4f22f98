//! What the fuzz targets share: an input that describes sparse files, and the bounded work done on them.
//!
//! The input is a list of operations that place bytes at offsets of up to two files, so that a hostile image of many TiB
//! takes a few bytes. It is read by hand rather than by derive, so that [`encode`] can write seeds in the same form.
//!
//! ```text
//!   file:  op* end          op:  0 put   offset(u64) len(u16) bytes
//!                                1 fill  offset(u64) count(u32, at most 1 Mi) len(u8) bytes, repeated count times
//!                                2 cut   length(u64)
//!                                3 seal  put the checksums of VHD right
//!                                4..     end of the file; a second file follows
//! ```

mod data;
mod files;
pub mod input;
mod mutated;
pub mod ops;
pub mod shapes;

use arbitrary::{Arbitrary, Unstructured};
use std::sync::Arc;
use vellum::{ChainOptions, Disk, FormatRegistry, Resolver, block_on};
use vellum_tests::corpus::harness::{CaseFiles, open_map_read};
use vellum_tests::corpus::{Content, Expect, HostileCase, HostileFile, Sparse};

/// Bytes that all operations of one file put at most.
const PUT_MAX: u64 = 2 << 20;
/// Files are no longer than any system lets them be.
const LEN_MAX: u64 = i64::MAX as u64;
/// Operations of one file.
const OPS_MAX: usize = 256;

/// One or two sparse files.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// The image that is opened.
    pub first: Sparse,
    /// A file beside it: parent, extent or data file, under any name that it is asked for by.
    pub second: Option<Sparse>,
}

impl<'a> Arbitrary<'a> for Files {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let first = file(u)?;
        let second = if u.is_empty() { None } else { Some(file(u)?) };
        Ok(Files { first, second })
    }
}

fn file(u: &mut Unstructured<'_>) -> arbitrary::Result<Sparse> {
    let (mut file, mut left) = (Sparse::default(), PUT_MAX);
    for _ in 0..OPS_MAX {
        if u.is_empty() {
            break;
        }
        match u.arbitrary::<u8>()? {
            0 => {
                let offset = u.arbitrary::<u64>()?;
                let len = usize::from(u.arbitrary::<u16>()?).min(u.len());
                let bytes = u.bytes(len)?;
                if offset <= LEN_MAX - bytes.len() as u64 && bytes.len() as u64 <= left {
                    left -= bytes.len() as u64;
                    file = file.put(offset, bytes);
                }
            }
            1 => {
                let offset = u.arbitrary::<u64>()?;
                let count = u.arbitrary::<u32>()? % (1 << 20);
                let len = usize::from(u.arbitrary::<u8>()?).min(u.len());
                let bytes = u.bytes(len)?.repeat(count as usize % (1 + left as usize / len.max(1)));
                if offset <= LEN_MAX - bytes.len() as u64 {
                    left = left.saturating_sub(bytes.len() as u64);
                    file = file.put(offset, &bytes);
                }
            }
            2 => file = file.cut(u.arbitrary::<u64>()?.min(LEN_MAX)),
            3 => file = vellum_tests::corpus::seal_vhd(file),
            _ => break,
        }
    }
    Ok(file)
}

/// `file` as input, for seeds. Runs are cut into what one operation can put.
pub fn encode(files: &[&Sparse]) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, file) in files.iter().enumerate() {
        if number > 0 {
            out.push(255);
        }
        for (offset, bytes) in &file.runs {
            for (index, part) in bytes.chunks(0xFFFF).enumerate() {
                out.push(0);
                out.extend((offset + index as u64 * 0xFFFF).to_le_bytes());
                out.extend((part.len() as u16).to_le_bytes());
                out.extend(part);
            }
        }
        out.push(2);
        out.extend(file.len.to_le_bytes());
    }
    out
}

/// Opens the first file as `format` (or as whatever it is), maps it and reads a sample; then opens it alone, as `info`
/// does. Errors are what is expected; panics, hangs and memory are what is looked for.
pub fn run(files: Files, format: Option<&'static str>) {
    let case = case(files, format);
    let in_memory = CaseFiles::new(&case);
    let before = in_memory.fingerprints();
    let _ = open_map_read(in_memory.clone(), &case.open, format, None).map(drop::<Disk>);
    let resolver: Arc<dyn Resolver> = in_memory.clone();
    let options = ChainOptions { format: format.map(str::to_owned), ..ChainOptions::default() };
    let registry = FormatRegistry::new(vellum::formats());
    let opened = in_memory.granted().len();
    let _ = block_on(registry.open_alone(&resolver, &case.open, &options));
    assert_eq!(in_memory.granted().len(), opened + 1, "opening an image alone opens one file");
    assert_eq!(in_memory.changes(), 0, "nothing asks for a change");
    assert!(in_memory.fingerprints() == before, "no byte is changed");
}

/// The names under which the second file can be found; seeds and dictionaries use them.
pub const NAMES: [&str; 3] = ["b", "x-flat.vmdk", "disk.img.parent"];

/// The files as a case of the corpus.
pub fn case(files: Files, format: Option<&'static str>) -> HostileCase {
    let regular =
        |path: &str, content: Sparse| HostileFile { path: path.into(), content: Content::Regular(content) };
    let mut list = vec![regular("disk.img", files.first)];
    if let Some(second) = files.second {
        list.extend(NAMES.map(|name| regular(name, second.clone())));
    }
    HostileCase {
        name: "fuzz/input".into(),
        class: 1,
        files: list,
        open: "disk.img".into(),
        format,
        expected: Expect::Code(Vec::new()),
        field: None,
        at: None,
        values: false,
        may_open: Vec::new(),
        blames: None,
        read_max: u64::MAX,
    }
}
