//! [`Trace`]: every operation on simulated files, in the order of its issue and of its completion.

use crate::content::Content;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Number of a file. It stays when the file is renamed.
pub type FileId = usize;

/// One operation on a file or on the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Bytes at an offset; past the end they extend the file.
    Write {
        /// Byte offset.
        offset: u64,
        /// The bytes.
        bytes: Arc<[u8]>,
    },
    /// A range is made zero.
    Zero(Range<u64>),
    /// A range is given back to the host: it reads as zeros then.
    Discard(Range<u64>),
    /// The length is set.
    SetLen(u64),
    /// What was completed before becomes durable.
    Flush,
    /// A name for a new file.
    Create(String),
    /// Another name.
    Rename(String, String),
    /// A name goes.
    Delete(String),
    /// Name operations that were completed before become durable.
    SyncDirectory,
    /// After a flush that failed, the cache is given up, and the file is what the disk holds.
    Reread(OnDisk),
}

/// What the disk holds of a file.
#[derive(Clone)]
pub struct OnDisk(pub(crate) Arc<Content>);

impl PartialEq for OnDisk {
    fn eq(&self, other: &Self) -> bool {
        self.0.hash() == other.0.hash()
    }
}

impl Eq for OnDisk {}

impl std::fmt::Debug for OnDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl OpKind {
    /// Whether it concerns names, not bytes.
    pub fn is_of_directory(&self) -> bool {
        matches!(self, OpKind::Create(_) | OpKind::Rename(..) | OpKind::Delete(_) | OpKind::SyncDirectory)
    }
}

/// An operation and what became of it. Times are indexes into [`Trace::events`].
#[derive(Clone, Debug)]
pub struct Op {
    /// The file.
    pub file: FileId,
    /// What was done.
    pub kind: OpKind,
    /// When it was issued.
    pub issued: usize,
    /// When it completed, if it did.
    pub done: Option<usize>,
    /// It failed. A failed write may have written less than was asked for; `kind` says what.
    pub failed: bool,
    /// It is durable when it completes.
    pub fua: bool,
    /// The number of flushes of its file that had completed when it was issued.
    pub epoch: u64,
    /// Length of the file before it took effect.
    pub len_before: u64,
}

/// What happened, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An operation (index into [`Trace::ops`]) was issued.
    Issued(usize),
    /// An operation completed.
    Done(usize),
    /// A guest request (the guest's number) was submitted.
    GuestBegins(usize),
    /// A guest request was answered: `true` if it succeeded.
    GuestEnds(usize, bool),
}

/// Everything that happened to a set of files.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// Operations in the order of their issue.
    pub ops: Vec<Op>,
    /// Everything, in order.
    pub events: Vec<Event>,
}

impl Trace {
    /// Notes that an operation was issued; its number.
    pub(crate) fn issue(&mut self, file: FileId, kind: OpKind, fua: bool) -> usize {
        let (number, issued) = (self.ops.len(), self.events.len());
        let same_kind = kind.is_of_directory();
        let flushes = self.ops.iter().filter(|op| {
            op.kind.is_of_directory() == same_kind
                && op.done.is_some()
                && !op.failed
                && (op.kind == OpKind::SyncDirectory || op.kind == OpKind::Flush && op.file == file)
        });
        let epoch = flushes.count() as u64;
        self.ops.push(Op { file, kind, issued, done: None, failed: false, fua, epoch, len_before: 0 });
        self.events.push(Event::Issued(number));
        number
    }

    /// Notes that an operation completed.
    pub(crate) fn complete(&mut self, number: usize, failed: bool) {
        let done = self.events.len();
        if let Some(op) = self.ops.get_mut(number) {
            op.done = Some(done);
            op.failed = failed;
        }
        self.events.push(Event::Done(number));
    }

    /// Whether anything was changed: something else than flushes was issued.
    pub fn changed_anything(&self) -> bool {
        self.ops.iter().any(|op| !matches!(op.kind, OpKind::Flush | OpKind::SyncDirectory))
    }
}

/// Files and their names at one moment. Clones share their bytes.
#[derive(Clone, Default)]
pub struct FileSet {
    /// Contents by [`FileId`].
    pub contents: Vec<Content>,
    /// Which file a name leads to.
    pub names: BTreeMap<String, FileId>,
}

impl FileSet {
    /// Adds a file.
    pub fn put(&mut self, name: &str, content: Content) -> FileId {
        let id = self.contents.len();
        self.contents.push(content);
        self.names.insert(name.to_owned(), id);
        id
    }

    /// The content that `name` leads to.
    pub fn get(&self, name: &str) -> Option<&Content> {
        self.names.get(name).and_then(|id| self.contents.get(*id))
    }

    /// Tells states apart: names and what they lead to.
    pub fn hash(&self) -> u64 {
        self.names.iter().fold(7, |hash, (name, id)| {
            let name = crate::content::hash_of(name.as_bytes());
            let content = self.contents.get(*id).map_or(0, Content::hash);
            crate::content::mix(crate::content::mix(hash, name), content)
        })
    }

    /// Carries out an operation in full.
    pub(crate) fn apply(&mut self, op: &Op) {
        match &op.kind {
            OpKind::Create(name) => {
                self.names.insert(name.clone(), op.file);
            }
            OpKind::Rename(from, to) => {
                // Without the name that it starts from (its creation was lost) a rename has no effect.
                if let Some(id) = self.names.remove(from) {
                    self.names.insert(to.clone(), id);
                }
            }
            OpKind::Delete(name) => {
                self.names.remove(name);
            }
            OpKind::Flush | OpKind::SyncDirectory => {}
            kind => {
                while self.contents.len() <= op.file {
                    self.contents.push(Content::default());
                }
                let content = &mut self.contents[op.file];
                match kind {
                    OpKind::Write { offset, bytes } => {
                        content.write(bytes, *offset);
                        content.grow(offset + bytes.len() as u64);
                    }
                    OpKind::Zero(range) | OpKind::Discard(range) => content.zero(range.clone()),
                    OpKind::SetLen(len) => content.set_len(*len),
                    OpKind::Reread(on_disk) => *content = on_disk.0.as_ref().clone(),
                    _ => {}
                }
            }
        }
    }
}
