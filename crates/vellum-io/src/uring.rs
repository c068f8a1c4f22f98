//! The `uring` driver: one ring, submitted to by any thread, and one thread that reaps what is complete.
//!
//! The ring carries reads and writes only. What it does not carry out in full (an error, a short transfer, the end of
//! the file) goes to the pool, which repeats the rest with a positional call and reports what that says. So there is one
//! place that tells errors apart, and what the kernel cancels because the submitting thread ended is simply done again:
//! positional reads and writes may be repeated. (Durable writes may not: after a flush that failed, a second one can succeed
//! without the data. They never go to the ring.)
#![allow(unsafe_code)]

use crate::file::read_rest;
use crate::gate::Pass;
use crate::pending::PendingGuard;
use crate::raw::RawFile;
use crate::threads::{WorkQueue, become_io_thread};
use io_uring::{IoUring, Probe, opcode, squeue, types};
use parking_lot::Mutex;
use rustix::fd::AsRawFd;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use vellum_core::{Buf, Completer, Result, WithBuf, WriteFlags};

/// A read or write for the ring. Owns all that the kernel uses until it is done.
pub(crate) struct RingRequest {
    pub(crate) pass: Option<Pass>,
    pub(crate) file: Arc<RawFile>,
    pub(crate) pending: PendingGuard,
    pub(crate) buf: Buf,
    /// Bytes that were transferred before.
    pub(crate) done: usize,
    pub(crate) offset: u64,
    /// `None` reads.
    pub(crate) write: Option<WriteFlags>,
    pub(crate) completer: Completer<WithBuf>,
}

/// A ring and its thread. Dropped, the thread ends as soon as nothing is under way.
pub(crate) struct Ring(Arc<Shared>);

struct Shared {
    ring: IoUring,
    state: Mutex<State>,
    pool: Arc<WorkQueue>,
}

/// Guarded together with the submission queue.
struct State {
    /// Requests that the kernel has, by the number that it gives back.
    slots: Vec<Option<RingRequest>>,
    free: Vec<usize>,
    closing: bool,
}

/// The number of the request that only wakes the reaper.
const WAKE: u64 = u64::MAX;
/// Bytes of one request at most; the pool goes on with the rest.
const REQUEST_MAX: usize = 1 << 30;
/// `IORING_ENTER_GETEVENTS`.
const GETEVENTS: u32 = 1;

impl Ring {
    /// Sets a ring up, or says why there cannot be one.
    pub(crate) fn new(entries: u32, pool: Arc<WorkQueue>) -> io::Result<Self> {
        let ring = IoUring::builder().setup_clamp().dontfork().build(entries)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE)
            || !probe.is_supported(opcode::Write::CODE)
            || !ring.params().is_feature_nodrop()
        {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's io_uring is too old"));
        }
        // One entry stays free for the request that wakes the reaper.
        let slots = (ring.params().sq_entries() as usize).saturating_sub(1).max(1);
        let state =
            State { slots: (0..slots).map(|_| None).collect(), free: (0..slots).collect(), closing: false };
        let shared = Arc::new(Shared { ring, state: Mutex::new(state), pool });
        let reaper = shared.clone();
        std::thread::Builder::new().name("vellum-uring".to_owned()).spawn(move || reaper.reap())?;
        Ok(Ring(shared))
    }

    /// Hands a request to the kernel; gives it back if too many are under way.
    pub(crate) fn send(&self, request: RingRequest) -> std::result::Result<(), Box<RingRequest>> {
        self.0.send(request)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.closing = true;
        let wake = opcode::Nop::new().build().user_data(WAKE);
        self.0.submit(&mut state, &wake);
    }
}

impl Shared {
    fn send(&self, mut request: RingRequest) -> std::result::Result<(), Box<RingRequest>> {
        let mut state = self.state.lock();
        let Some(number) = state.free.pop() else { return Err(Box::new(request)) };
        let Some(entry) = request.entry(number) else {
            state.free.push(number);
            return Err(Box::new(request));
        };
        if let Some(slot) = state.slots.get_mut(number) {
            *slot = Some(request);
        }
        if self.submit(&mut state, &entry) {
            return Ok(());
        }
        // The kernel never saw the entry.
        state.free.push(number);
        match state.slots.get_mut(number).and_then(Option::take) {
            Some(request) => Err(Box::new(request)),
            None => Ok(()),
        }
    }

    /// Puts an entry into the submission queue and submits it. `false` if the queue is full. Whoever calls holds the
    /// state, which guards the queue.
    fn submit(&self, _guard: &mut State, entry: &squeue::Entry) -> bool {
        // SAFETY: the queue is touched in this function only, and the exclusive borrow of the state, which exists once
        // behind its mutex, keeps two threads from being in it.
        let mut queue = unsafe { self.ring.submission_shared() };
        // SAFETY: the entry's descriptor and memory belong to the request, which sits in its slot until the kernel's
        // completion for it has been seen (`reap` alone takes requests out, by the number of a completion); moving
        // the request into the slot did not move the buffer's heap memory. The entry that wakes uses no memory.
        let pushed = unsafe { queue.push(entry) }.is_ok();
        drop(queue); // publishes the new tail
        if !pushed {
            return false;
        }
        // Every entry is consumed before the next one is pushed. The kernel refuses only for a while (no memory, or
        // interrupted); completions that do not fit are kept by it (`is_feature_nodrop`).
        while let Err(error) = self.ring.submit() {
            if error.kind() != io::ErrorKind::Interrupted {
                tracing::warn!("io_uring refuses a request for now: {error}");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        true
    }

    /// The reaper's thread.
    fn reap(&self) {
        become_io_thread();
        let mut completed = Vec::new();
        loop {
            {
                // SAFETY: the completion queue is touched by this thread only, here only.
                let queue = unsafe { self.ring.completion_shared() };
                completed.extend(queue.map(|entry| (entry.user_data(), entry.result())));
            }
            if completed.is_empty() {
                if self.is_over() {
                    return;
                }
                self.wait();
            }
            for (number, result) in completed.drain(..) {
                let request = usize::try_from(number).ok().and_then(|number| self.take(number));
                if let Some(request) = request {
                    // A callback that panics must not take the thread away from everybody.
                    let outcome = catch_unwind(AssertUnwindSafe(|| self.complete(request, result)));
                    if outcome.is_err() {
                        tracing::error!("a callback on the ring's thread panicked");
                    }
                }
            }
        }
    }

    fn is_over(&self) -> bool {
        let state = self.state.lock();
        state.closing && state.free.len() == state.slots.len()
    }

    fn take(&self, number: usize) -> Option<RingRequest> {
        let mut state = self.state.lock();
        let request = state.slots.get_mut(number)?.take()?;
        state.free.push(number);
        Some(request)
    }

    /// Waits for a completion without submitting anything: other threads may be between push and submit.
    fn wait(&self) {
        // SAFETY: no entry is submitted, no signal mask is passed, and the flags ask for nothing but waiting.
        let waited = unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 1, GETEVENTS, None) };
        if let Err(error) = waited
            && error.kind() != io::ErrorKind::Interrupted
        {
            tracing::warn!("waiting for io_uring: {error}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn complete(&self, mut request: RingRequest, result: i32) {
        request.done += usize::try_from(result).unwrap_or(0);
        if request.done >= request.buf.len() {
            request.finish(Ok(()));
            return;
        }
        let task = Box::new(move || {
            // The positional call takes its own pass.
            request.pass = None;
            let result = request.rest();
            request.finish(result);
        });
        if let Err(task) = self.pool.push(task) {
            task();
        }
    }
}

impl RingRequest {
    /// The entry for what is still to be transferred.
    fn entry(&mut self, number: usize) -> Option<squeue::Entry> {
        let at = self.offset + self.done as u64;
        let rest = self.buf.get_mut(self.done..)?;
        let len = u32::try_from(rest.len().min(REQUEST_MAX)).ok()?;
        let address = rest.as_mut_ptr();
        let fd = types::Fd(self.file.plain_fd(address, rest.len(), at)?.as_raw_fd());
        let entry = match self.write {
            None => opcode::Read::new(fd, address, len).offset(at).build(),
            Some(_) => opcode::Write::new(fd, address, len).offset(at).build(),
        };
        Some(entry.user_data(u64::try_from(number).ok()?))
    }

    fn rest(&mut self) -> Result<()> {
        match self.write {
            None => read_rest(&self.file, &mut self.buf, self.done, self.offset),
            Some(flags) => {
                let rest = self.buf.get(self.done..).unwrap_or_default();
                self.file.write_all(rest, self.offset + self.done as u64, flags.fua)
            }
        }
    }

    fn finish(self, result: Result<()>) {
        let RingRequest { pass, file, pending, buf, offset, write, completer, .. } = self;
        if write.is_some() && result.is_ok() {
            file.note_end(offset + buf.len() as u64);
        }
        drop(pass);
        // The file first: who waits for the request to end may count on the descriptor being closed.
        drop(file);
        drop(pending);
        completer.complete((buf, result));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pending::Pending;
    use crate::raw::FileKind;
    use vellum_core::{Code, Completion};

    fn request(buf: Buf, done: usize, write: bool) -> (RingRequest, Completion<WithBuf>) {
        let scratch = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        std::fs::write(scratch.path(), (0..=255u8).collect::<Vec<_>>()).unwrap();
        let file = scratch.reopen().unwrap();
        let file =
            RawFile::new("test".to_owned(), file.into(), None, FileKind::Regular, true, false).unwrap();
        let (completer, completion) = Completion::slot();
        let write = write.then(WriteFlags::default);
        let pending = Arc::<Pending>::default().enter();
        let file = Arc::new(file);
        (RingRequest { pass: None, file, pending, buf, done, offset: 10, write, completer }, completion)
    }

    fn ring() -> Ring {
        Ring::new(8, Arc::new(WorkQueue::new("test", 1, 8, true))).unwrap()
    }

    #[test]
    fn what_the_kernel_cancels_or_cuts_short_is_finished_by_the_pool() {
        let ring = ring();
        // ECANCELED and EFAULT are what the kernel says when the submitting thread is ending.
        for (result, there) in
            [(-libc::ECANCELED, 0usize), (-libc::EFAULT, 0), (-libc::EAGAIN, 0), (0, 0), (60, 60)]
        {
            let mut buf = Buf::zeroed(100);
            (0..there).for_each(|at| buf[at] = 10 + at as u8);
            let (read, completion) = request(buf, 0, false);
            ring.0.complete(read, result);
            let (buf, outcome) = completion.wait();
            outcome.unwrap();
            assert_eq!(*buf, (10..110).collect::<Vec<u8>>(), "result {result}");

            let (write, completion) = request(Buf::copy_of(&[7; 100]), 0, true);
            let file = write.file.clone();
            ring.0.complete(write, result);
            completion.wait().1.unwrap();
            let mut found = [0; 256];
            file.read_exact(&mut found, 0).unwrap();
            // What the kernel counted as written it did not write here: only the rest may have changed.
            let expected: Vec<u8> = (0..=255u8)
                .map(|i| if (10 + there..110).contains(&usize::from(i)) { 7 } else { i })
                .collect();
            assert_eq!(found[..], expected, "result {result}");
        }
    }

    #[test]
    fn the_end_of_the_file_is_reported_for_the_whole_request() {
        let (read, completion) = request(Buf::zeroed(300), 0, false);
        ring().0.complete(read, 246);
        let error = completion.wait().1.unwrap_err();
        assert_eq!((error.code(), error.offset()), (Code::OutOfFile, Some(10)));
        assert!(error.message().contains("300 bytes"), "{error:?}");
    }

    #[test]
    fn a_full_ring_gives_the_request_back_and_a_dropped_ring_finishes() {
        let ring = ring();
        let mut sent = Vec::new();
        for _ in 0..100 {
            let (read, completion) = request(Buf::zeroed(100), 0, false);
            match ring.send(read) {
                Ok(()) => sent.push(completion),
                Err(back) => assert_eq!(back.buf.len(), 100),
            }
        }
        drop(ring);
        assert!(!sent.is_empty());
        for completion in sent {
            let (buf, result) = completion.wait();
            result.unwrap();
            assert_eq!(*buf, (10..110).collect::<Vec<u8>>());
        }
    }
}
