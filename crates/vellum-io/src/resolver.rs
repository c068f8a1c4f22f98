//! [`LocalFiles`]: the resolver for files of this machine.

use crate::file::LocalFile;
use crate::lock::LockMode;
use crate::names;
use crate::open::{Create, Found, OpenOptions, sync_directory};
use crate::policy::{FilePolicy, directory_of};
use rustix::fs::OFlags;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vellum_core::{Access, Asker, Code, Completion, Error, Location, Opened, Resolver, Result, Storage};

/// Files of this machine: any that the user names, and those that the policy lets images name.
///
/// Locations are canonical paths, so that two names of one file are one location. Names of users may be `file:` URLs;
/// other URLs are refused until there are storages for them.
pub struct LocalFiles {
    policy: FilePolicy,
    options: OpenOptions,
}

/// Files that [`Resolver::siblings`] tells of at most.
const SIBLINGS_MAX: usize = 10_000;

impl LocalFiles {
    /// A resolver that opens files with `options` (whose `write` and `create` are not looked at).
    pub fn new(policy: FilePolicy, options: OpenOptions) -> Self {
        LocalFiles { policy, options }
    }

    /// The policy for names in images.
    pub fn policy(&self) -> &FilePolicy {
        &self.policy
    }

    fn options(&self, access: Access, create: Create) -> OpenOptions {
        let lock = match self.options.lock {
            LockMode::None => LockMode::None,
            _ if access.write && access.shareable => LockMode::SharedWrite,
            lock => lock,
        };
        let sequential = access.sequential || self.options.sequential;
        OpenOptions { write: access.write, create, lock, sequential, ..self.options.clone() }
    }

    fn open_for_user(&self, name: &str, access: Access) -> Result<Opened> {
        let path = names::from_user(name)?;
        let found = Found::at(&path, OFlags::empty()).map_err(|error| match error.code() {
            Code::NotFound => error.hint("check the name; `ls -l` shows what is there"),
            _ => error,
        })?;
        // Messages call it what the user called it.
        let storage = found.open(path.display().to_string(), &self.options(access, Create::No))?;
        Ok(Opened { location: location(&found.canonical()?, &path)?, storage: Arc::new(storage) })
    }

    /// Opens what an image names. Nothing is opened before the policy has seen what it is.
    fn open_for_image(&self, name: &str, asker: &Asker, of: &Location, access: Access) -> Result<Opened> {
        let directory = directory_of(of)?;
        let mut missing = None;
        let candidates = names::from_image(name).map_err(|error| match (error.code(), asker) {
            (Code::RemoteRef | Code::ExternalRef, Asker::Part { .. }) => error.replace_hint(
                "if you trust the image, put the file beside it, and let the image name it there",
            ),
            _ => error,
        })?;
        for candidate in candidates {
            let path = directory.join(candidate);
            let found = match Found::at(&path, OFlags::empty()) {
                Ok(found) => found,
                Err(error) => {
                    self.policy.check_missing(&path, &directory, asker)?;
                    if error.code() != Code::NotFound {
                        return Err(error);
                    }
                    missing.get_or_insert(error);
                    continue;
                }
            };
            let canonical = self.policy.check(&found, &directory, asker)?;
            let location = location(&canonical, &path)?;
            let storage = found.open(location.0.clone(), &self.options(access, Create::No))?;
            return Ok(Opened { storage: Arc::new(storage), location });
        }
        Err(missing.unwrap_or_else(|| Error::new(Code::NotFound, "there is no such file")))
    }

    fn open_now(&self, name: &str, asker: &Asker, access: Access) -> Result<Opened> {
        match asker {
            Asker::User => self.open_for_user(name, access),
            Asker::Parent { of } | Asker::Part { of } => {
                self.open_for_image(name, asker, of, access).map_err(|error| {
                    // A missing or locked file is about that file; a refusal is about the image that asked.
                    let about = match error.code() {
                        Code::NotFound | Code::Locked => error,
                        _ => error.image(of).found(name),
                    };
                    let what = if matches!(asker, Asker::Parent { .. }) { "parent" } else { "part" };
                    about.context(format!("opening {name:?}, which {of} names as its {what}"))
                })
            }
        }
    }
}

impl Resolver for LocalFiles {
    fn open(&self, name: &str, asker: &Asker, access: Access) -> Completion<Result<Opened>> {
        Completion::ready(self.open_now(name, asker, access))
    }

    fn create(&self, location: &Location, replace: bool) -> Completion<Result<Arc<dyn Storage>>> {
        let create = if replace { Create::Replace } else { Create::New };
        let made = names::from_user(&location.0).and_then(|path| {
            LocalFile::open(path, &self.options(Access { write: true, ..Access::default() }, create))
        });
        Completion::ready(made.map(|file| Arc::new(file) as Arc<dyn Storage>))
    }

    fn rename(&self, from: &Location, to: &Location) -> Completion<Result<()>> {
        let rename = || {
            let (from, to) = (names::from_user(&from.0)?, names::from_user(&to.0)?);
            std::fs::rename(&from, &to).map_err(|e| {
                Error::from_io(e, format!("renaming it to {}", to.display())).image(from.display())
            })
        };
        Completion::ready(rename())
    }

    fn delete(&self, location: &Location) -> Completion<Result<()>> {
        let delete = || {
            let path = names::from_user(&location.0)?;
            std::fs::remove_file(&path).map_err(|e| Error::from_io(e, "deleting").image(path.display()))
        };
        Completion::ready(delete())
    }

    fn exists(&self, location: &Location) -> Completion<Result<bool>> {
        let exists = || {
            let path = names::from_user(&location.0)?;
            match std::fs::symlink_metadata(&path) {
                Ok(_) => Ok(true),
                Err(e)
                    if matches!(
                        e.kind(),
                        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
                    ) =>
                {
                    Ok(false)
                }
                Err(e) => Err(Error::from_io(e, "asking whether it exists").image(path.display())),
            }
        };
        Completion::ready(exists())
    }

    fn sync_directory(&self, location: &Location) -> Completion<Result<()>> {
        let sync = || sync_directory(parent(&names::from_user(&location.0)?));
        Completion::ready(sync())
    }

    fn siblings(&self, location: &Location) -> Completion<Result<Vec<Location>>> {
        let list = || {
            let path = names::from_user(&location.0)?;
            siblings(parent(&path), path.file_name())
        };
        Completion::ready(list())
    }

    fn beside(&self, location: &Location, file_name: &str) -> Location {
        // A name, not a path: nothing before its last slash counts.
        let name = file_name.rsplit('/').next().unwrap_or(file_name);
        match location.0.rfind('/') {
            Some(slash) => Location(format!("{}{name}", location.0.get(..=slash).unwrap_or("/"))),
            None => Location(name.to_owned()),
        }
    }

    fn file_name(&self, location: &Location) -> String {
        location.0.rsplit('/').next().unwrap_or(&location.0).to_owned()
    }

    fn relative(&self, from: &Location, to: &Location) -> Option<String> {
        let (from, to) = (names::from_user(&from.0).ok()?, names::from_user(&to.0).ok()?);
        let canonical_directory = |path: &Path| std::fs::canonicalize(parent(path)).ok();
        let directory = canonical_directory(&from)?;
        let below = canonical_directory(&to)?.join(to.file_name()?);
        below.strip_prefix(directory).ok()?.to_str().map(str::to_owned)
    }
}

/// The directory that holds `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// Locations are text: the canonical path if it is, else the path as it was asked for, made absolute.
fn location(canonical: &Path, asked: &Path) -> Result<Location> {
    let absolute = || std::path::absolute(asked).ok()?.to_str().map(str::to_owned);
    canonical.to_str().map(str::to_owned).or_else(absolute).map(Location).ok_or_else(|| {
        Error::new(Code::Usage, "the path is not valid UTF-8")
            .image(canonical.display())
            .hint("rename the file")
    })
}

/// The first regular files of a directory by name, without `except`. Bounded, however large the directory is.
fn siblings(directory: &Path, except: Option<&OsStr>) -> Result<Vec<Location>> {
    let failed = |e| Error::from_io(e, "listing the directory").image(directory.display());
    let mut names: BTreeSet<String> = BTreeSet::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if Some(name.as_os_str()) == except || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        let Ok(name) = name.into_string() else { continue };
        names.insert(name);
        if names.len() > SIBLINGS_MAX {
            names.pop_last();
        }
    }
    let directory: PathBuf = std::fs::canonicalize(directory).map_err(failed)?;
    names.iter().map(|name| location(&directory.join(name), &directory.join(name))).collect()
}
