//! [`MemoryFiles`]: a directory tree in memory that records which files were touched.

use crate::names::{directory, join, not_found, resolve};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use vellum_core::{
    Access, Asker, Code, Completion, Error, Location, Memory, Opened, Resolver, Result, Storage,
};

/// Files in memory. Locations are plain paths with `/`.
#[derive(Default)]
pub struct MemoryFiles {
    files: Mutex<BTreeMap<String, Arc<Memory>>>,
    calls: Mutex<Vec<String>>,
}

impl MemoryFiles {
    /// No files.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Puts a file with `bytes` in place.
    pub fn put(&self, path: &str, bytes: &[u8]) -> Arc<Memory> {
        let file = Arc::new(Memory::from_bytes(path, bytes));
        self.files.lock().insert(path.to_owned(), file.clone());
        file
    }

    /// The file at `path`.
    pub fn get(&self, path: &str) -> Option<Arc<Memory>> {
        self.files.lock().get(path).cloned()
    }

    /// All paths.
    pub fn paths(&self) -> Vec<String> {
        self.files.lock().keys().cloned().collect()
    }

    /// Every call so far: `open disk.vmdk`, `create disk.vdi.part`, ...
    pub fn calls(&self) -> Vec<String> {
        self.calls.lock().clone()
    }

    fn note(&self, call: String) {
        self.calls.lock().push(call);
    }
}

impl Resolver for MemoryFiles {
    fn open(&self, name: &str, asker: &Asker, _access: Access) -> Completion<Result<Opened>> {
        self.note(format!("open {name}"));
        Completion::ready(resolve(name, asker).and_then(|path| {
            let storage = self.get(&path).ok_or_else(|| not_found(&path))?;
            Ok(Opened { storage, location: Location(path) })
        }))
    }

    fn create(&self, location: &Location, replace: bool) -> Completion<Result<Arc<dyn Storage>>> {
        self.note(format!("create {location}"));
        if !replace && self.get(&location.0).is_some() {
            return Completion::ready(Err(Error::new(Code::Exists, "the file exists").image(location)));
        }
        let storage: Arc<dyn Storage> = self.put(&location.0, &[]);
        Completion::ready(Ok(storage))
    }

    fn rename(&self, from: &Location, to: &Location) -> Completion<Result<()>> {
        self.note(format!("rename {from} {to}"));
        let mut files = self.files.lock();
        Completion::ready(match files.remove(&from.0) {
            None => Err(not_found(&from.0)),
            Some(file) => {
                files.insert(to.0.clone(), file);
                Ok(())
            }
        })
    }

    fn delete(&self, location: &Location) -> Completion<Result<()>> {
        self.note(format!("delete {location}"));
        let removed = self.files.lock().remove(&location.0);
        Completion::ready(removed.map(|_| ()).ok_or_else(|| not_found(&location.0)))
    }

    fn exists(&self, location: &Location) -> Completion<Result<bool>> {
        Completion::ready(Ok(self.get(&location.0).is_some()))
    }

    fn sync_directory(&self, location: &Location) -> Completion<Result<()>> {
        self.note(format!("sync {}", directory(&location.0)));
        Completion::ready(Ok(()))
    }

    fn siblings(&self, location: &Location) -> Completion<Result<Vec<Location>>> {
        let own = directory(&location.0);
        let paths = self.paths().into_iter().filter(|path| directory(path) == own && *path != location.0);
        Completion::ready(Ok(paths.map(Location).collect()))
    }

    fn beside(&self, location: &Location, file_name: &str) -> Location {
        Location(join(directory(&location.0), file_name))
    }

    fn file_name(&self, location: &Location) -> String {
        location.0.rsplit('/').next().unwrap_or_default().to_owned()
    }
}
