//! [`FilePolicy`]: which files an image may name.

use crate::open::Found;
use crate::raw::FileKind;
use std::path::{Path, PathBuf};
use vellum_core::{Asker, Code, Error, Location, Result};

/// Which files an image may name as its parent or as a part of itself. The default allows regular files in the
/// image's own directory and below it, after symbolic links are followed.
///
/// A user may name any regular file or block device; this is about names that images contain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FilePolicy {
    /// Directories whose files, at any depth, may be named too.
    pub allowed_directories: Vec<PathBuf>,
    /// Any regular file may be named.
    pub allow_any: bool,
    /// Together with [`FilePolicy::allow_any`]: block devices may be named too.
    pub allow_devices: bool,
}

impl FilePolicy {
    /// Whether an image in `directory` may name what was found; gives its canonical path.
    pub(crate) fn check(&self, found: &Found, directory: &Path, asker: &Asker) -> Result<PathBuf> {
        let path = found.canonical()?;
        if !self.allows(&path, directory) {
            return Err(self.escape(directory, asker));
        }
        match found.kind() {
            Ok(FileKind::Regular) => Ok(path),
            Ok(FileKind::Block) if self.allow_any && self.allow_devices => Ok(path),
            kind => Err(Error::new(
                Code::ExternalRef,
                format!("the image names {}", kind.err().unwrap_or("a block device")),
            )
            .allowed("regular files")
            .hint(match is_parent(asker) {
                true => "if you know what it is, name it with --parent FILE",
                false => "if you know what it is, copy its content to a file beside the image, and let the image name that",
            })),
        }
    }

    /// Whether an image in `directory` may learn that nothing is at `path`.
    pub(crate) fn check_missing(&self, path: &Path, directory: &Path, asker: &Asker) -> Result<()> {
        // The nearest directory that exists tells where the name leads.
        let there = path.ancestors().skip(1).find_map(|above| std::fs::canonicalize(above).ok());
        match there {
            Some(there) if !self.allows(&there.join("x"), directory) => Err(self.escape(directory, asker)),
            _ => Ok(()),
        }
    }

    fn allows(&self, path: &Path, directory: &Path) -> bool {
        if self.allow_any {
            return true;
        }
        // "The directory of the image and below" must not mean everything when the image lies at the root.
        let own = match directory.parent() {
            None => path.parent() == Some(directory),
            Some(_) => path.starts_with(directory),
        };
        let listed =
            |allowed: &PathBuf| std::fs::canonicalize(allowed).is_ok_and(|allowed| path.starts_with(allowed));
        own || self.allowed_directories.iter().any(listed)
    }

    fn escape(&self, directory: &Path, asker: &Asker) -> Error {
        let mut allowed = vec![directory.display().to_string()];
        allowed.extend(self.allowed_directories.iter().map(|directory| directory.display().to_string()));
        Error::new(Code::PathEscape, "the image names a file outside the directories that it may name files in")
            .allowed(allowed.join(", "))
            .hint(match is_parent(asker) {
                true => {
                    "if you trust the image, allow the directory with --allow-dir DIR, or name the file with --parent FILE"
                }
                false => "if you trust the image, allow the directory with --allow-dir DIR",
            })
    }
}

/// Only a parent can be named by the user instead: a part of an image is where the image says.
fn is_parent(asker: &Asker) -> bool {
    matches!(asker, Asker::Parent { .. })
}

/// The directory of the image at `location`, without symbolic links.
pub(crate) fn directory_of(location: &Location) -> Result<PathBuf> {
    let image = Path::new(&location.0);
    let whole = std::fs::canonicalize(image)
        .map_err(|e| Error::from_io(e, "looking for the directory of the image").image(location))?;
    whole
        .parent()
        .map(Path::to_owned)
        .ok_or_else(|| Error::new(Code::Usage, "an image cannot be the root directory").image(location))
}
