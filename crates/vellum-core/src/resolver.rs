//! [`Resolver`]: the only way by which anything reaches a file.

use crate::{Completion, Result, Storage};
use std::fmt;
use std::sync::Arc;

/// Where something is: a path, or a URL. Compared and printed as text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Location(pub String);

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Location {
    fn from(text: &str) -> Self {
        Location(text.to_owned())
    }
}

/// Who asks for a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asker {
    /// The user named it.
    User,
    /// An image names it as its parent.
    Parent {
        /// The image that names it.
        of: Location,
    },
    /// An image names it as a part of itself (extent, data file).
    Part {
        /// The image that names it.
        of: Location,
    },
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// For reading and writing; else for reading.
    pub write: bool,
    /// Together with `write`: other processes that open the file in the same way may write it at the same time. Those that
    /// do not are kept out, and keep this one out. See [`crate::ChainOptions::shareable`].
    pub shareable: bool,
    /// A hint: the file will be read or written mostly from its start to its end.
    pub sequential: bool,
}

/// Maps locations to storages, and decides who may open what.
///
/// A resolver denies unless told otherwise: a name found *inside* an image (`Asker::Parent`, `Asker::Part`) is
/// refused with `REMOTE_REF` (URL, UNC, pseudo-protocol), `NUL_IN_NAME`, `PATH_ESCAPE` (outside the allowed
/// directories) or `EXTERNAL_REF` (not a regular file, not allowed at all).
pub trait Resolver: Send + Sync + 'static {
    /// Opens `name`. For [`Asker::Parent`] and [`Asker::Part`], `name` is the text found in the image and is taken
    /// relative to the directory of that image.
    fn open(&self, name: &str, asker: &Asker, access: Access) -> Completion<Result<Opened>>;
    /// Creates a file that must not exist, or with `replace` empties one that does.
    fn create(&self, location: &Location, replace: bool) -> Completion<Result<Arc<dyn Storage>>>;
    /// Renames a file, replacing the target if there is one.
    fn rename(&self, from: &Location, to: &Location) -> Completion<Result<()>>;
    /// Deletes a file.
    fn delete(&self, location: &Location) -> Completion<Result<()>>;
    /// Whether something is there.
    fn exists(&self, location: &Location) -> Completion<Result<bool>>;
    /// Makes renames, creations and deletions in the directory of `location` durable.
    fn sync_directory(&self, location: &Location) -> Completion<Result<()>>;
    /// The regular files beside `location` (itself left out), in order of name, at most 10 000.
    fn siblings(&self, location: &Location) -> Completion<Result<Vec<Location>>>;
    /// The location of `file_name` in the directory of `location`.
    fn beside(&self, location: &Location, file_name: &str) -> Location;
    /// The last component of a location.
    fn file_name(&self, location: &Location) -> String;
    /// The name by which an image at `from` (which need not be there yet) can refer to `to` in its own directory or
    /// below it; `None` if `to` is elsewhere.
    fn relative(&self, from: &Location, to: &Location) -> Option<String> {
        let directory = from.0.rfind('/').map_or("", |slash| from.0.get(..=slash).unwrap_or(""));
        let name = to.0.strip_prefix(directory)?;
        let is_below = !name.is_empty() && !name.starts_with('/');
        is_below.then(|| name.to_owned())
    }
}

/// A storage and the location it was found at.
#[derive(Clone)]
pub struct Opened {
    /// The bytes.
    pub storage: Arc<dyn Storage>,
    /// Where they are.
    pub location: Location,
}
