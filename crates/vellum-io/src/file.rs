//! [`LocalFile`]: a regular file or a block device as a [`Storage`].

use crate::context::{Driver, IoContext};
use crate::copy::Copy;
use crate::pending::Pending;
use crate::quick::Quick;
use crate::raw::{FileKind, RawFile};
use crate::sys;
use crate::threads::{WorkQueue, is_io_thread};
use crate::uring::{Ring, RingRequest};
use rustix::fd::AsFd;
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;
use vellum_core::storage::past_end;
use vellum_core::{
    Buf, Completion, CopyMode, Lost, Offloaded, Preallocate, Result, Status, Storage, StorageId,
    StorageLimits, WithBuf, WriteFlags, ZeroMode,
};

/// A regular file or a block device.
///
/// * With [`crate::OpenOptions::direct`] the limits ask for aligned requests; others are carried out all the same, by
///   way of a buffer, and writes of parts of blocks keep the rest of the block whatever else is written meanwhile.
/// * After a flush that failed every change and every further flush fails: what was written may be lost, and only
///   opening the file again shows what is there.
/// * Dropping it waits for the requests that are under way (except on the threads that complete them, where the
///   requests keep what they need and end by themselves).
pub struct LocalFile {
    file: Arc<RawFile>,
    engine: Engine,
    pending: Arc<Pending>,
    quick: Quick,
}

/// Who carries requests out.
enum Engine {
    Inline,
    Pool(Arc<WorkQueue>),
    Ring(Arc<Ring>, Arc<WorkQueue>),
}

impl LocalFile {
    pub(crate) fn new(file: RawFile, driver: Driver, context: Option<&IoContext>) -> Self {
        let context = || context.cloned().unwrap_or_else(IoContext::shared);
        let engine = match driver {
            Driver::Inline => Engine::Inline,
            Driver::Pool => Engine::Pool(context().pool()),
            Driver::Uring => {
                let context = context();
                match context.ring() {
                    Some(ring) => Engine::Ring(ring, context.pool()),
                    None => Engine::Pool(context.pool()),
                }
            }
        };
        LocalFile { file: Arc::new(file), engine, pending: Arc::default(), quick: Quick::default() }
    }

    /// The driver at work: [`Driver::Pool`] where io_uring was asked for but is forbidden.
    pub fn driver(&self) -> Driver {
        match self.engine {
            Engine::Inline => Driver::Inline,
            Engine::Pool(_) => Driver::Pool,
            Engine::Ring(..) => Driver::Uring,
        }
    }

    /// Whether requests go around the page cache.
    pub fn is_direct(&self) -> bool {
        self.file.direct.is_some()
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.file.kind == FileKind::Block
    }

    /// Carries `work` out where the driver wants it.
    fn run<T: Lost + Send + 'static>(
        &self,
        work: impl FnOnce(&RawFile) -> T + Send + 'static,
    ) -> Completion<T> {
        let (Engine::Pool(pool) | Engine::Ring(_, pool)) = &self.engine else {
            return Completion::ready(work(&self.file));
        };
        let (completer, completion) = Completion::slot();
        let (file, pending) = (self.file.clone(), self.pending.enter());
        let task = Box::new(move || {
            let value = work(&file);
            // The file first: who waits for the request to end may count on the descriptor being closed.
            drop(file);
            drop(pending);
            completer.complete(value);
        });
        if let Err(task) = pool.push(task) {
            task();
        }
        completion
    }

    /// Writes on this thread, if the driver wants that or it is quicker than to change threads.
    fn write_here(&self, bytes: &[u8], offset: u64, flags: WriteFlags) -> Option<Result<()>> {
        if matches!(self.engine, Engine::Inline) {
            return Some(self.file.write_all(bytes, offset, flags.fua));
        }
        let begun = Instant::now();
        if flags.fua || self.file.direct.is_some() || !self.quick.expects(bytes.len(), begun) {
            return None;
        }
        let result = self.file.write_all(bytes, offset, false);
        self.quick.note(begun, Instant::now());
        Some(result)
    }

    /// Sends a request to the ring if it can go there; gives the buffer back if not.
    fn send(&self, mut request: Transfer) -> std::result::Result<Completion<WithBuf>, Transfer> {
        let Engine::Ring(ring, _) = &self.engine else { return Err(request) };
        if request.write.is_some_and(|flags| flags.fua) {
            return Err(request); // what fails there is tried again, and a flush must not be
        }
        let rest = request.buf.len() - request.done;
        let at = request.offset + request.done as u64;
        let Some(address) = request.buf.get(request.done..).map(<[u8]>::as_ptr) else { return Err(request) };
        if self.file.plain_fd(address, rest, at).is_none() {
            return Err(request);
        }
        let pass = match request.write {
            Some(_) => self.file.pass(&(at..at + rest as u64), false),
            None => None,
        };
        let (completer, completion) = Completion::slot();
        let sent = ring.send(RingRequest {
            pass,
            file: self.file.clone(),
            pending: self.pending.enter(),
            buf: request.buf,
            done: request.done,
            offset: request.offset,
            write: request.write,
            completer,
        });
        match sent {
            Ok(()) => Ok(completion),
            Err(back) => {
                request.buf = back.buf;
                Err(request)
            }
        }
    }
}

/// A read or write on its way.
struct Transfer {
    buf: Buf,
    /// Bytes that are there already.
    done: usize,
    offset: u64,
    write: Option<WriteFlags>,
}

impl Storage for LocalFile {
    fn name(&self) -> &str {
        &self.file.name
    }

    fn len(&self) -> Result<u64> {
        self.file.len()
    }

    fn limits(&self) -> StorageLimits {
        let regular = self.file.kind == FileKind::Regular;
        let alignment = self.file.direct.as_ref().map_or(1, |direct| direct.alignment);
        StorageLimits {
            alignment: u32::try_from(alignment).unwrap_or(4096),
            granularity: self.file.granularity,
            read_only: !self.file.write,
            resizable: regular && self.file.write,
            knows_holes: regular,
        }
    }

    fn read_at(&self, mut buf: Buf, offset: u64) -> Completion<WithBuf> {
        if matches!(self.engine, Engine::Inline)
            || buf.is_empty()
            || self.file.span(offset, buf.len()).is_none()
        {
            let result = self.file.read_exact(&mut buf, offset);
            return Completion::ready((buf, result));
        }
        let done = self.file.read_cached(&mut buf, offset);
        if done == buf.len() {
            return Completion::ready((buf, Ok(())));
        }
        match self.send(Transfer { buf, done, offset, write: None }) {
            Ok(completion) => completion,
            Err(Transfer { mut buf, done, .. }) => self.run(move |file| {
                let result = read_rest(file, &mut buf, done, offset);
                (buf, result)
            }),
        }
    }

    fn write_at(&self, buf: Buf, offset: u64, flags: WriteFlags) -> Completion<WithBuf> {
        if let Some(result) = self.write_here(&buf, offset, flags) {
            return Completion::ready((buf, result));
        }
        let refused = match self.file.check_writable() {
            Err(error) => Some(error),
            Ok(()) if self.file.span(offset, buf.len()).is_none() => Some(self.file.overflow(offset)),
            Ok(()) => None,
        };
        if let Some(error) = refused {
            return Completion::ready((buf, Err(error)));
        }
        if buf.is_empty() {
            return Completion::ready((buf, Ok(())));
        }
        match self.send(Transfer { buf, done: 0, offset, write: Some(flags) }) {
            Ok(completion) => completion,
            Err(Transfer { buf, .. }) => self.run(move |file| {
                let result = file.write_all(&buf, offset, flags.fua);
                (buf, result)
            }),
        }
    }

    fn flush(&self) -> Completion<Result<()>> {
        self.run(RawFile::flush)
    }

    fn zero(&self, range: Range<u64>, mode: ZeroMode) -> Completion<Result<()>> {
        self.run(move |file| file.zero(range, mode))
    }

    fn discard(&self, range: Range<u64>) -> Completion<Result<()>> {
        self.run(move |file| file.discard(range))
    }

    fn status(&self, range: Range<u64>) -> Completion<Result<Vec<(Range<u64>, Status)>>> {
        // The extent map is in memory as a rule, and the answer is wanted before anything else can go on.
        Completion::ready(self.file.status(range))
    }

    fn set_len(&self, len: u64, preallocate: Preallocate) -> Completion<Result<()>> {
        self.run(move |file| file.set_len(len, preallocate))
    }

    fn copy_from(
        &self,
        source: &dyn Storage,
        source_offset: u64,
        offset: u64,
        len: u64,
        mode: CopyMode,
    ) -> Completion<Result<Offloaded>> {
        let Some(source) = source.as_any().downcast_ref::<LocalFile>() else {
            return Completion::ready(Ok(Offloaded::Cannot));
        };
        let (source, source_pending) = (source.file.clone(), source.pending.enter());
        self.run(move |target| {
            let outcome = Copy { source: &source, source_offset, target, offset, len }.run(mode);
            drop(source);
            drop(source_pending);
            outcome
        })
    }

    fn try_read_at(&self, buf: &mut [u8], offset: u64) -> Option<Result<()>> {
        let len = self.file.read_cached(buf, offset);
        if len == buf.len() {
            return Some(Ok(()));
        }
        match self.file.len() {
            Ok(end) if self.file.span(offset, buf.len()).is_none_or(|span| span.end > end) => {
                Some(Err(past_end(&self.file.name, offset, buf.len(), end)))
            }
            _ => None,
        }
    }

    fn id(&self) -> Option<StorageId> {
        Some(self.file.id)
    }

    fn allocated_bytes(&self) -> Option<u64> {
        let stat = rustix::fs::fstat(&self.file.fd).ok()?;
        match self.file.kind {
            FileKind::Regular => u64::try_from(stat.st_blocks).ok()?.checked_mul(512),
            FileKind::Block => None,
        }
    }

    fn modified_ns(&self) -> Option<u128> {
        let stat = rustix::fs::fstat(&self.file.fd).ok()?;
        let seconds = u128::try_from(stat.st_mtime).ok()?;
        (self.file.kind == FileKind::Regular)
            .then_some(seconds * 1_000_000_000 + u128::from(stat.st_mtime_nsec))
    }

    fn start_writeback(&self, range: Range<u64>) {
        if self.file.write {
            sys::start_writeback(self.file.fd.as_fd(), range);
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Reads what is still missing. A short file is reported for the whole request.
pub(crate) fn read_rest(file: &RawFile, buf: &mut [u8], done: usize, offset: u64) -> Result<()> {
    let len = buf.len();
    match file.read_exact(&mut buf[done..], offset + done as u64) {
        Err(error) if error.code() == vellum_core::Code::OutOfFile => {
            Err(past_end(&file.name, offset, len, file.len()?))
        }
        result => result,
    }
}

impl Drop for LocalFile {
    fn drop(&mut self) {
        // A thread that completes requests must not wait for one: nobody else might complete it.
        if !is_io_thread() {
            self.pending.wait_for_none();
        }
    }
}
