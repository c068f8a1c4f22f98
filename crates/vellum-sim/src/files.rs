//! [`SimFiles`]: a directory whose files record every operation.

use crate::content::{Content, SECTOR};
use crate::crash::Crash;
use crate::disk::SimDisk;
use crate::fault::{Fault, Faults};
use crate::mask::Mask;
use crate::names::{directory, join, not_found, resolve};
use crate::random::Random;
use crate::trace::{Event, FileId, FileSet, OnDisk, Op, OpKind, Trace};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vellum_core::{
    Access, Asker, Buf, Code, Completer, Completion, Error, Location, Opened, Resolver, Result, Storage,
    WithBuf,
};

/// Files in memory that record every operation, fail on demand, and complete operations at once or, with
/// [`SimFiles::schedule`], when the test says so and in an order that a seed chooses.
pub struct SimFiles {
    pub(crate) state: Mutex<State>,
    number: u64,
}

#[derive(Default)]
pub(crate) struct State {
    set: FileSet,
    /// The files when the trace began.
    start: FileSet,
    trace: Trace,
    faults: Faults,
    scheduler: Option<Random>,
    pending: Vec<Pending>,
    /// Files of which a flush failed while they are open.
    doomed: BTreeSet<FileId>,
}

/// An operation that was issued and did not complete.
pub(crate) enum Pending {
    /// Not recorded as an operation: reads change nothing.
    Read {
        file: FileId,
        buf: Buf,
        offset: u64,
        fault: Option<Fault>,
        answer: Completer<WithBuf>,
    },
    Write {
        op: usize,
        buf: Buf,
        fault: Option<Fault>,
        answer: Completer<WithBuf>,
    },
    Other {
        op: usize,
        fault: Option<Fault>,
        answer: Completer<Result<()>>,
    },
}

impl SimFiles {
    /// The files of `set`, with an empty trace.
    pub fn new(set: FileSet) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let state = Mutex::new(State { start: set.clone(), set, ..State::default() });
        Arc::new(SimFiles { state, number: NEXT.fetch_add(1, Ordering::Relaxed) })
    }

    /// The files as a running program sees them.
    pub fn snapshot(&self) -> FileSet {
        self.state.lock().set.clone()
    }

    /// A copy of what was recorded.
    pub fn trace(&self) -> Trace {
        self.state.lock().trace.clone()
    }

    /// Forgets what was recorded so far; returns it.
    pub fn take_trace(&self) -> Trace {
        let mut state = self.state.lock();
        state.start = state.set.clone();
        std::mem::take(&mut state.trace)
    }

    /// The number of events so far: a moment of the trace.
    pub fn now(&self) -> usize {
        self.state.lock().trace.events.len()
    }

    /// Notes that the guest submits request `number`; returns the moment.
    pub fn guest_begins(&self, number: usize) -> usize {
        self.mark(Event::GuestBegins(number))
    }

    /// Notes that request `number` of the guest was answered; returns the moment.
    pub fn guest_ends(&self, number: usize, is_ok: bool) -> usize {
        self.mark(Event::GuestEnds(number, is_ok))
    }

    fn mark(&self, event: Event) -> usize {
        let events = &mut self.state.lock().trace.events;
        events.push(event);
        events.len() - 1
    }

    /// From now on, operations are counted and `fault` strikes.
    pub fn arm(&self, fault: Option<Fault>) {
        self.state.lock().faults.arm(fault);
    }

    /// Whether the fault struck.
    pub fn fault_struck(&self) -> bool {
        self.state.lock().faults.struck
    }

    /// Flushes that failed so far.
    pub fn failed_flushes(&self) -> usize {
        let state = self.state.lock();
        state.trace.ops.iter().filter(|op| op.kind == OpKind::Flush && op.failed).count()
    }

    /// With a seed, operations wait for [`SimFiles::pump`]; without, they complete at once.
    pub fn schedule(&self, seed: Option<u64>) {
        self.state.lock().scheduler = seed.map(Random::new);
    }

    /// Operations that wait.
    pub fn waiting(&self) -> usize {
        self.state.lock().pending.len()
    }

    /// Completes one of the operations that wait, chosen by the seed; `false` if there is none.
    pub fn pump(&self) -> bool {
        let pending = {
            let mut state = self.state.lock();
            let count = state.pending.len();
            if count == 0 {
                return false;
            }
            let chosen = state.scheduler.as_mut().map_or(0, |random| random.index(count));
            state.pending.swap_remove(chosen)
        };
        // Whoever is woken runs here, and asks for more: the state is not locked.
        match pending {
            Pending::Read { file, mut buf, offset, fault, answer } => {
                let result = self.state.lock().read(&mut buf, file, offset, fault);
                answer.complete((buf, result));
            }
            Pending::Write { op, buf, fault, answer } => {
                let result = self.state.lock().perform(op, fault);
                answer.complete((buf, result));
            }
            Pending::Other { op, fault, answer } => {
                let result = self.state.lock().perform(op, fault);
                answer.complete(result);
            }
        }
        true
    }

    pub(crate) fn submit_read(&self, file: FileId, mut buf: Buf, offset: u64) -> Completion<WithBuf> {
        let mut state = self.state.lock();
        let fault = state.faults.strike(true, false);
        if state.scheduler.is_none() {
            let result = state.read(&mut buf, file, offset, fault);
            return Completion::ready((buf, result));
        }
        let (answer, completion) = Completion::slot();
        state.pending.push(Pending::Read { file, buf, offset, fault, answer });
        completion
    }

    pub(crate) fn submit_write(&self, file: FileId, buf: Buf, offset: u64, fua: bool) -> Completion<WithBuf> {
        let mut state = self.state.lock();
        let fault = state.faults.strike(false, false);
        let op = state.trace.issue(file, OpKind::Write { offset, bytes: Arc::from(&*buf) }, fua);
        if state.scheduler.is_none() {
            let result = state.perform(op, fault);
            return Completion::ready((buf, result));
        }
        let (answer, completion) = Completion::slot();
        state.pending.push(Pending::Write { op, buf, fault, answer });
        completion
    }

    pub(crate) fn submit(&self, file: FileId, kind: OpKind) -> Completion<Result<()>> {
        let mut state = self.state.lock();
        let fault = state.faults.strike(false, kind == OpKind::Flush);
        let op = state.trace.issue(file, kind, false);
        if state.scheduler.is_none() {
            return Completion::ready(state.perform(op, fault));
        }
        let (answer, completion) = Completion::slot();
        state.pending.push(Pending::Other { op, fault, answer });
        completion
    }

    /// A file that was open for writing is closed. If a flush of it failed, its cache is given up: what that flush did
    /// not save is gone from now on, whoever opens the file.
    pub(crate) fn close(&self, file: FileId) {
        let mut state = self.state.lock();
        if state.doomed.remove(&file) {
            state.reread(file);
        }
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn with<T>(&self, file: FileId, look: impl FnOnce(&Content) -> T) -> T {
        look(self.state.lock().set.contents.get(file).unwrap_or(&Content::default()))
    }

    /// Whether reads are answered at once and without faults.
    pub(crate) fn is_quiet(&self) -> bool {
        let state = self.state.lock();
        state.scheduler.is_none() && !state.faults.is_armed()
    }

    fn handle(self: &Arc<Self>, file: FileId, name: &str, is_read_only: bool) -> Arc<SimDisk> {
        Arc::new(SimDisk::new(self.clone(), file, name, is_read_only))
    }
}

impl State {
    fn read(&mut self, buf: &mut Buf, file: FileId, offset: u64, fault: Option<Fault>) -> Result<()> {
        if let Some(fault) = fault {
            return Err(fault.error("a simulated file"));
        }
        let content = self.set.contents.get(file).cloned().unwrap_or_default();
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > content.len()) {
            return Err(vellum_core::storage::past_end("a simulated file", offset, buf.len(), content.len()));
        }
        content.read(buf, offset);
        Ok(())
    }

    /// Carries out an operation that was issued.
    fn perform(&mut self, number: usize, fault: Option<Fault>) -> Result<()> {
        let Some(op) = self.trace.ops.get_mut(number) else { return Ok(()) };
        op.len_before = self.set.contents.get(op.file).map_or(0, Content::len);
        if let Some(fault) = fault {
            cut_short(op, &fault);
        }
        clip(op);
        self.set.apply(op);
        if op.kind == OpKind::Flush && fault.is_some() {
            self.doomed.insert(op.file);
        }
        self.trace.complete(number, fault.is_some());
        fault.map_or(Ok(()), |fault| Err(fault.error("a simulated file")))
    }
}

impl State {
    fn reread(&mut self, file: FileId) {
        let now = Crash::at(&self.trace, &self.start, self.trace.events.len());
        let on_disk = now.state(&Mask(Vec::new())).contents.get(file).cloned().unwrap_or_default();
        // What is read from the disk is durable.
        let op = self.trace.issue(file, OpKind::Reread(OnDisk(Arc::new(on_disk))), true);
        self.set.apply(&self.trace.ops[op]);
        self.trace.complete(op, false);
    }
}

/// What a failing operation still does: the whole sectors in the first half of a write, or nothing.
fn cut_short(op: &mut Op, fault: &Fault) {
    match &mut op.kind {
        OpKind::Write { offset, bytes } => {
            let middle = (*offset + bytes.len() as u64 / 2) / SECTOR * SECTOR;
            let keep = match fault.kind {
                crate::FaultKind::Short => middle.saturating_sub(*offset) as usize,
                _ => 0,
            };
            *bytes = Arc::from(&bytes[..keep]);
        }
        OpKind::Zero(range) | OpKind::Discard(range) => range.end = range.start,
        OpKind::SetLen(len) => *len = op.len_before,
        _ => {}
    }
}

/// Zeroing does not lengthen a file.
fn clip(op: &mut Op) {
    if let OpKind::Zero(range) | OpKind::Discard(range) = &mut op.kind {
        range.end = range.end.min(op.len_before).max(range.start);
    }
}

/// A `SimFiles` is used behind an `Arc`, because its files keep it.
pub(crate) struct Shared(pub(crate) Arc<SimFiles>);

impl SimFiles {
    /// The resolver of these files.
    pub fn resolver(self: &Arc<Self>) -> Arc<dyn Resolver> {
        Arc::new(Shared(self.clone()))
    }
}

impl Resolver for Shared {
    fn open(&self, name: &str, asker: &Asker, access: Access) -> Completion<Result<Opened>> {
        Completion::ready(resolve(name, asker).and_then(|path| {
            let file = self.0.state.lock().set.names.get(&path).copied();
            let file = file.ok_or_else(|| not_found(&path))?;
            Ok(Opened { storage: self.0.handle(file, &path, !access.write), location: Location(path) })
        }))
    }

    fn create(&self, location: &Location, replace: bool) -> Completion<Result<Arc<dyn Storage>>> {
        let mut state = self.0.state.lock();
        let known = state.set.names.get(&location.0).copied();
        if known.is_some() && !replace {
            return Completion::ready(Err(Error::new(Code::Exists, "the file exists").image(location)));
        }
        let (file, kind) = match known {
            Some(file) => (file, OpKind::SetLen(0)),
            None => {
                state.set.contents.push(Content::default());
                (state.set.contents.len() - 1, OpKind::Create(location.0.clone()))
            }
        };
        let op = state.trace.issue(file, kind, false);
        let made = state.perform(op, None);
        drop(state);
        let storage: Arc<dyn Storage> = self.0.handle(file, &location.0, false);
        Completion::ready(made.map(|()| storage))
    }

    fn rename(&self, from: &Location, to: &Location) -> Completion<Result<()>> {
        Completion::ready(self.0.change_name(from, |_| OpKind::Rename(from.0.clone(), to.0.clone())))
    }

    fn delete(&self, location: &Location) -> Completion<Result<()>> {
        Completion::ready(self.0.change_name(location, |_| OpKind::Delete(location.0.clone())))
    }

    fn exists(&self, location: &Location) -> Completion<Result<bool>> {
        Completion::ready(Ok(self.0.state.lock().set.names.contains_key(&location.0)))
    }

    fn sync_directory(&self, _location: &Location) -> Completion<Result<()>> {
        self.0.submit(0, OpKind::SyncDirectory)
    }

    fn siblings(&self, location: &Location) -> Completion<Result<Vec<Location>>> {
        let own = directory(&location.0);
        let state = self.0.state.lock();
        let paths = state.set.names.keys().filter(|path| directory(path) == own && **path != location.0);
        Completion::ready(Ok(paths.map(|path| Location(path.clone())).collect()))
    }

    fn beside(&self, location: &Location, file_name: &str) -> Location {
        Location(join(directory(&location.0), file_name))
    }

    fn file_name(&self, location: &Location) -> String {
        location.0.rsplit('/').next().unwrap_or_default().to_owned()
    }
}

impl SimFiles {
    fn change_name(&self, location: &Location, kind: impl FnOnce(FileId) -> OpKind) -> Result<()> {
        let mut state = self.state.lock();
        let file = state.set.names.get(&location.0).copied().ok_or_else(|| not_found(&location.0))?;
        let fault = state.faults.strike(false, false);
        if let Some(fault) = fault {
            return Err(fault.error(&location.0));
        }
        let op = state.trace.issue(file, kind(file), false);
        state.perform(op, None)
    }
}
