//! How a new image names its parent (sheet section 6): format in a header extension, name behind the extensions.

use crate::extensions;
use vellum_core::{Code, Error, ParentLink, Result, bytes};

/// Longest backing file name.
const NAME_MAX: usize = 1023;
/// Header fields `backing_file_offset` and `backing_file_size`.
const OFFSET_FIELD: usize = 8;
const SIZE_FIELD: usize = 16;

/// The parent of a new image.
pub(crate) struct Backing {
    name: String,
    format: &'static str,
}

impl Backing {
    pub fn new(parent: &ParentLink) -> Result<Self> {
        let name = match parent.place.split('/').next() {
            // A name with a colon would be taken for a protocol.
            Some(first) if first.contains(':') => format!("./{}", parent.place),
            _ => parent.place.clone(),
        };
        if name.is_empty() || name.len() > NAME_MAX || name.contains('\0') {
            return Err(Error::new(Code::Usage, "the parent has a name that a qcow2 image cannot hold")
                .format("qcow2")
                .found(format!("{} bytes: {name:?}", name.len()))
                .allowed(format!("1 to {NAME_MAX} bytes without NUL"))
                .hint("move the parent to a shorter path, or name it relative to the child"));
        }
        // The name that QEMU has for it.
        let format = if parent.format == "vhd" { "vpc" } else { parent.format };
        Ok(Backing { name, format })
    }

    /// Adds the format to the extensions.
    pub fn write_format(&self, header: &mut Vec<u8>) -> Result<()> {
        extensions::write(extensions::BACKING_FORMAT, self.format.as_bytes(), header)
    }

    /// Bytes that the name takes behind the extensions.
    pub fn room(&self) -> usize {
        self.name.len()
    }

    /// Adds the name behind the extensions, and says in the header where it is.
    pub fn write_name(&self, header: &mut Vec<u8>) -> Result<()> {
        let offset = bytes::wide(header.len()).to_be_bytes();
        let size = bytes::narrow(bytes::wide(self.name.len()))?.to_be_bytes();
        for (field, value) in [(OFFSET_FIELD, &offset[..]), (SIZE_FIELD, &size[..])] {
            if let Some(target) = header.get_mut(field..field.saturating_add(value.len())) {
                target.copy_from_slice(value);
            }
        }
        header.extend_from_slice(self.name.as_bytes());
        Ok(())
    }
}
