//! Owned, aligned buffers that travel with an operation and come back with its result.

use parking_lot::Mutex;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

/// Alignment of every buffer's first byte: enough for direct I/O on any disk.
pub const BUF_ALIGN: usize = 4096;

/// An owned buffer whose memory is aligned to [`BUF_ALIGN`].
///
/// A *window* narrows what a reader or writer sees, without giving up the rest: a converter reads
/// one megabyte and writes the parts of it that are not zero.
pub struct Buf {
    memory: Vec<u8>,
    base: usize,
    capacity: usize,
    window: Range<usize>,
    home: Option<Arc<PoolInner>>,
}

impl Buf {
    /// A zeroed buffer of `len` bytes.
    pub fn zeroed(len: usize) -> Self {
        let memory = vec![0u8; len.saturating_add(BUF_ALIGN)];
        let base = memory.as_ptr().align_offset(BUF_ALIGN).min(BUF_ALIGN);
        Buf { memory, base, capacity: len, window: 0..len, home: None }
    }

    /// A buffer with a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = Buf::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Bytes that the whole buffer holds, whatever its window.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Narrows the buffer to `range` of its whole capacity; clipped to it.
    pub fn set_window(&mut self, range: Range<usize>) {
        let end = range.end.min(self.capacity);
        self.window = range.start.min(end)..end;
    }

    /// The window now in force, relative to the whole buffer.
    pub fn window(&self) -> Range<usize> {
        self.window.clone()
    }

    /// Shows the whole capacity again.
    pub fn clear_window(&mut self) {
        self.window = 0..self.capacity;
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.base + self.window.start..self.base + self.window.end]
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.base + self.window.start..self.base + self.window.end]
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} of {} bytes)", self.len(), self.capacity)
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            let memory = std::mem::take(&mut self.memory);
            home.give_back(memory, self.base, self.capacity);
        }
    }
}

/// A pool that keeps up to a budget of bytes for reuse.
#[derive(Clone)]
pub struct BufPool(Arc<PoolInner>);

struct PoolInner {
    spare: Mutex<Spare>,
    budget_bytes: usize,
}

#[derive(Default)]
struct Spare {
    list: Vec<(Vec<u8>, usize, usize)>,
    bytes: usize,
}

impl BufPool {
    /// A pool that keeps at most `budget_bytes` of unused memory.
    pub fn new(budget_bytes: usize) -> Self {
        BufPool(Arc::new(PoolInner { spare: Mutex::default(), budget_bytes }))
    }

    /// A buffer of `len` bytes. **Its content is whatever the last user left.**
    pub fn take(&self, len: usize) -> Buf {
        let reused = {
            let mut spare = self.0.spare.lock();
            // A much larger buffer is left for whoever needs it.
            let found =
                spare.list.iter().position(|(_, _, cap)| *cap >= len && *cap / 4 <= len.max(BUF_ALIGN));
            found.map(|index| {
                let entry = spare.list.swap_remove(index);
                spare.bytes -= entry.2;
                entry
            })
        };
        let mut buf = match reused {
            Some((memory, base, capacity)) => Buf { memory, base, capacity, window: 0..capacity, home: None },
            None => Buf::zeroed(len),
        };
        buf.home = Some(self.0.clone());
        buf.set_window(0..len);
        buf
    }
}

impl PoolInner {
    fn give_back(&self, memory: Vec<u8>, base: usize, capacity: usize) {
        let mut spare = self.spare.lock();
        if spare.bytes + capacity <= self.budget_bytes {
            spare.bytes += capacity;
            spare.list.push((memory, base, capacity));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_window_narrows() {
        let mut buf = Buf::zeroed(10_000);
        assert_eq!(buf.as_ptr().align_offset(BUF_ALIGN), 0);
        buf[5000] = 7;
        buf.set_window(5000..5001);
        assert_eq!(&*buf, &[7]);
        buf.clear_window();
        assert_eq!(buf.len(), 10_000);
    }

    #[test]
    fn pool_reuses_and_keeps_its_budget() {
        let pool = BufPool::new(1 << 20);
        let pointer = pool.take(8192).as_ptr();
        assert_eq!(pool.take(8192).as_ptr(), pointer);
        drop((0..10).map(|_| pool.take(512 << 10)).collect::<Vec<_>>());
        assert!(pool.0.spare.lock().bytes <= 1 << 20);
    }
}
