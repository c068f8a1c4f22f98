//! The contract of [`Storage`], as tests. [`check`] runs all of them.
//!
//! A suite gets a closure that makes a fresh, writable storage each time. Storages of fixed length are fine if they
//! have at least [`MIN_LEN`] bytes. Every change is compared with a plain vector of bytes.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vellum_core::{
    Buf, Code, Completion, Preallocate, Status, Storage, StorageLimits, WithBuf, WriteFlags, ZeroMode,
};

/// Bytes that a storage of fixed length must have.
pub const MIN_LEN: u64 = 256 << 10;

/// Runs the whole suite, with requests aligned as the storage's limits ask.
pub fn check(make: impl Fn() -> Arc<dyn Storage>) {
    let alignment = u64::from(make().limits().alignment.max(1));
    check_at(make, alignment);
}

/// Runs the whole suite with requests aligned to `alignment` bytes, for storages that promise more than their limits.
pub fn check_at(make: impl Fn() -> Arc<dyn Storage>, alignment: u64) {
    let fresh = || Subject::new(make(), alignment);
    limits_make_sense(&fresh());
    an_empty_storage_reads_nothing(&fresh());
    bytes_come_back_where_they_were_written(&fresh());
    a_write_past_the_end_extends_and_the_gap_is_zero(&fresh());
    a_read_past_the_end_fails_and_the_buffer_comes_back(&fresh());
    windows_narrow_reads_and_writes(&fresh());
    zeroed_ranges_read_as_zeros_and_no_more(&fresh());
    a_range_past_the_end_is_clipped(&fresh());
    status_has_no_gaps_and_holes_read_as_zeros(&fresh());
    a_length_that_shrank_and_grew_reads_as_zeros(&fresh());
    offsets_that_overflow_are_errors(&fresh());
    a_write_completes_though_its_completion_is_dropped(&fresh());
    requests_from_many_threads_do_not_mix(&fresh());
    try_read_tells_the_truth_or_nothing(&fresh());
    random_changes_match_a_vector(&fresh(), 0x5eed_0001);
    random_changes_match_a_vector(&fresh(), 0x5eed_0002);
}

/// A storage under test and how it is to be asked.
struct Subject {
    storage: Arc<dyn Storage>,
    limits: StorageLimits,
    unit: u64,
}

impl Subject {
    fn new(storage: Arc<dyn Storage>, alignment: u64) -> Self {
        let limits = storage.limits();
        assert!(!limits.read_only, "the suite needs a writable storage");
        Subject { storage, limits, unit: alignment }
    }

    /// Makes the storage `len` bytes of zeros; those of fixed length keep theirs.
    fn reset(&self, len: u64) -> u64 {
        if self.limits.resizable {
            self.storage.set_len(0, Preallocate::Off).wait().unwrap();
            assert_eq!(self.storage.len().unwrap(), 0);
            self.storage.set_len(len, Preallocate::Off).wait().unwrap();
            assert_eq!(self.storage.len().unwrap(), len);
            return len;
        }
        let len = self.storage.len().unwrap();
        assert!(len >= MIN_LEN, "a storage of fixed length needs {MIN_LEN} bytes, not {len}");
        self.storage.zero(0..len, ZeroMode::MayUnmap).wait().unwrap();
        len
    }

    /// `at` rounded down to what the storage may be asked for.
    fn aligned(&self, at: u64) -> u64 {
        at / self.unit * self.unit
    }

    fn write(&self, bytes: &[u8], offset: u64) {
        let (buf, result) = self.storage.write_at(Buf::copy_of(bytes), offset, WriteFlags::default()).wait();
        result.unwrap_or_else(|e| panic!("writing {} bytes at {offset}: {e:?}", bytes.len()));
        assert_eq!(&*buf, bytes, "a write changed its buffer");
    }

    fn read(&self, range: Range<u64>) -> Vec<u8> {
        let mut dirty = Buf::zeroed((range.end - range.start) as usize);
        dirty.fill(0xa5);
        let (buf, result) = self.storage.read_at(dirty, range.start).wait();
        result.unwrap_or_else(|e| panic!("reading {range:?}: {e:?}"));
        buf.to_vec()
    }

    fn whole(&self) -> Vec<u8> {
        // In one piece if the length allows it; direct storages may have a length that is not aligned.
        self.read(0..self.storage.len().unwrap())
    }
}

fn pattern(len: u64, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ seed | 1).collect()
}

#[track_caller]
fn assert_bytes(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: lengths differ");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!("{what}: byte {at} is {:#04x} instead of {:#04x}", found[at], expected[at]);
    }
}

fn limits_make_sense(s: &Subject) {
    assert!(s.limits.alignment.is_power_of_two(), "alignment {}", s.limits.alignment);
    assert!(s.limits.granularity.is_power_of_two(), "granularity {}", s.limits.granularity);
    assert!(!s.storage.name().is_empty(), "messages need a name");
    assert_eq!(s.storage.id(), s.storage.id());
    s.storage.flush().wait().unwrap();
}

fn an_empty_storage_reads_nothing(s: &Subject) {
    if !s.limits.resizable {
        return;
    }
    s.reset(0);
    assert!(s.storage.is_empty().unwrap());
    assert!(s.storage.read_at(Buf::zeroed(0), 0).wait().1.is_ok());
    let error = s.storage.read_at(Buf::zeroed(s.unit as usize), 0).wait().1.unwrap_err();
    assert_eq!(error.code(), Code::OutOfFile);
    s.storage.zero(0..4096, ZeroMode::MayUnmap).wait().unwrap();
    s.storage.discard(0..4096).wait().unwrap();
    assert_eq!(s.storage.len().unwrap(), 0, "zeroing past the end extended the storage");
    s.storage.flush().wait().unwrap();
    let bytes = pattern(s.unit, 9);
    s.write(&bytes, 0);
    assert_bytes(&s.whole(), &bytes, "the first write");
}

fn bytes_come_back_where_they_were_written(s: &Subject) {
    let len = s.reset(200_000 / s.unit * s.unit);
    let mut model = vec![0u8; len as usize];
    for (round, (offset, size)) in
        [(0, 1), (1, 1), (511, 2), (4095, 3), (4096, 4096), (8191, 10_000), (99_999, 65_537), (3, 150_000)]
            .into_iter()
            .enumerate()
    {
        let offset = s.aligned(offset);
        let size = s.aligned(size).max(s.unit);
        let bytes = pattern(size, round as u8);
        s.write(&bytes, offset);
        model[offset as usize..(offset + size) as usize].copy_from_slice(&bytes);
        assert_bytes(&s.read(offset..offset + size), &bytes, "what was just written");
        assert_bytes(&s.whole(), &model, "the rest");
    }
    let durable = WriteFlags { fua: true };
    let (_, result) = s.storage.write_at(Buf::copy_of(&pattern(s.unit, 3)), s.unit, durable).wait();
    result.unwrap();
    assert_bytes(&s.read(s.unit..2 * s.unit), &pattern(s.unit, 3), "a durable write");
    let (buf, result) = s.storage.write_at(Buf::zeroed(0), 0, WriteFlags::default()).wait();
    result.unwrap();
    assert_eq!(buf.len(), 0);
    s.storage.flush().wait().unwrap();
}

fn a_write_past_the_end_extends_and_the_gap_is_zero(s: &Subject) {
    let bytes = pattern(s.unit * 3, 1);
    if !s.limits.resizable {
        let end = s.reset(0);
        let start = s.aligned(end - s.unit);
        let (buf, result) = s.storage.write_at(Buf::copy_of(&bytes), start, WriteFlags::default()).wait();
        assert!(result.is_err(), "a storage of fixed length took a write past its end");
        assert_eq!(&*buf, &bytes, "the buffer comes back");
        assert_eq!(s.storage.len().unwrap(), end);
        return;
    }
    s.reset(0);
    s.write(&bytes, 0);
    let far = s.aligned(70_001) + s.unit;
    s.write(&bytes, far);
    let mut model = vec![0u8; far as usize];
    model[..bytes.len()].copy_from_slice(&bytes);
    model.extend_from_slice(&bytes);
    assert_eq!(s.storage.len().unwrap(), model.len() as u64);
    assert_bytes(&s.whole(), &model, "the gap before a write past the end");
    // A write that begins inside and ends outside.
    let across = model.len() as u64 - s.unit;
    s.write(&bytes, across);
    model.truncate(across as usize);
    model.extend_from_slice(&bytes);
    assert_bytes(&s.whole(), &model, "a write across the end");
    s.storage.flush().wait().unwrap();
    assert_bytes(&s.whole(), &model, "after the flush");
}

fn a_read_past_the_end_fails_and_the_buffer_comes_back(s: &Subject) {
    let len = s.reset(s.aligned(100_001));
    let unit = s.unit;
    for (offset, size) in
        [(len, unit), (len - s.aligned(unit), 2 * unit), (0, len + unit), (len + unit, unit), (1 << 40, unit)]
    {
        let mut buf = Buf::zeroed(size as usize + 100);
        buf.set_window(50..50 + size as usize);
        let (buf, result) = s.storage.read_at(buf, offset).wait();
        let error = result.expect_err("a read past the end succeeded");
        assert_eq!(error.code(), Code::OutOfFile, "{error:?}");
        assert_eq!(buf.window(), 50..50 + size as usize, "the window of the buffer changed");
        assert_eq!(buf.capacity(), size as usize + 100, "another buffer came back");
    }
    assert_bytes(&s.read(0..len), &vec![0; len as usize], "a read up to the end");
}

fn windows_narrow_reads_and_writes(s: &Subject) {
    let len = s.reset(s.aligned(65_536));
    // 4096 suits every alignment; the smaller window does not where any is allowed.
    let edge = if s.unit == 1 { 77 } else { s.unit.max(4096) as usize };
    let size = s.aligned(20_000) as usize;
    let bytes = pattern(size as u64 + 2 * edge as u64, 5);
    let mut buf = Buf::copy_of(&bytes);
    buf.set_window(edge..edge + size);
    let (buf, result) = s.storage.write_at(buf, s.unit, WriteFlags::default()).wait();
    result.unwrap();
    assert_eq!(buf.window(), edge..edge + size);
    let mut model = vec![0u8; len as usize];
    model[s.unit as usize..s.unit as usize + size].copy_from_slice(&bytes[edge..edge + size]);
    assert_bytes(&s.whole(), &model, "a windowed write");
    let mut buf = Buf::zeroed(size + 2 * edge);
    buf.fill(0xee);
    buf.set_window(edge..edge + size);
    let (mut buf, result) = s.storage.read_at(buf, s.unit).wait();
    result.unwrap();
    buf.clear_window();
    assert!(buf[..edge].iter().chain(&buf[edge + size..]).all(|b| *b == 0xee), "read outside its window");
    assert_bytes(&buf[edge..edge + size], &bytes[edge..edge + size], "a windowed read");
}

fn zeroed_ranges_read_as_zeros_and_no_more(s: &Subject) {
    for mode in [ZeroMode::MayUnmap, ZeroMode::KeepAllocated] {
        let len = s.reset(s.aligned(150_000));
        let mut model = pattern(len, 7);
        s.write(&model, 0);
        for (start, end) in
            [(0, 1), (4095, 4097), (5000, 17_001), (20_480, 36_864), (100_001, 149_000), (9, 9)]
        {
            let (start, end) = (s.aligned(start), s.aligned(end + s.unit - 1));
            s.storage.zero(start..end, mode).wait().unwrap();
            model[start as usize..end as usize].fill(0);
            assert_bytes(&s.whole(), &model, &format!("zeroing {start}..{end} with {mode:?}"));
        }
        // What was zeroed can be written again.
        s.write(&pattern(s.unit * 2, 8), s.aligned(25_000));
        let at = s.aligned(25_000) as usize;
        model[at..at + 2 * s.unit as usize].copy_from_slice(&pattern(s.unit * 2, 8));
        assert_bytes(&s.whole(), &model, "a write into zeros");
        assert_eq!(s.storage.len().unwrap(), len);
    }
}

fn a_range_past_the_end_is_clipped(s: &Subject) {
    let len = s.reset(s.aligned(50_000));
    let mut model = pattern(len, 2);
    s.write(&model, 0);
    let start = s.aligned(len - 10_000);
    for mode in [ZeroMode::MayUnmap, ZeroMode::KeepAllocated] {
        s.storage.zero(start..len + (1 << 30), mode).wait().unwrap();
    }
    s.storage.zero(len + 4096..len + 8192, ZeroMode::KeepAllocated).wait().unwrap();
    s.storage.zero(start..u64::MAX, ZeroMode::MayUnmap).wait().unwrap();
    s.storage.discard(len..u64::MAX).wait().unwrap();
    model[start as usize..].fill(0);
    assert_eq!(s.storage.len().unwrap(), len, "zeroing past the end changed the length");
    assert_bytes(&s.whole(), &model, "zeroing across the end");
}

/// All of `status` for a range, and that it is in order.
fn status_of(s: &Subject, range: Range<u64>) -> Vec<(Range<u64>, Status)> {
    let mut all: Vec<(Range<u64>, Status)> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let some = s.storage.status(at..range.end).wait().unwrap();
        assert!(!some.is_empty(), "status of {at}..{} says nothing", range.end);
        for (part, status) in some {
            assert_eq!(part.start, at, "a gap in the status");
            assert!(part.end > at && part.end <= range.end, "status {part:?} of {range:?}");
            at = part.end;
            all.push((part, status));
        }
    }
    all
}

fn status_has_no_gaps_and_holes_read_as_zeros(s: &Subject) {
    let len = s.reset(s.aligned(1 << 20));
    for at in [0, 200_000, 300_001, 655_360] {
        if at + 70_000 < len {
            s.write(&pattern(s.aligned(60_000).max(s.unit), at as u8), s.aligned(at));
        }
    }
    s.storage.discard(s.aligned(10_000)..s.aligned(40_000)).wait().unwrap();
    s.storage.flush().wait().unwrap();
    let bytes = s.whole();
    for range in [0..len, s.aligned(5000)..s.aligned(250_000), len - s.unit..len] {
        for (part, status) in status_of(s, range) {
            let zero = bytes[part.start as usize..part.end as usize].iter().all(|b| *b == 0);
            assert!(zero || status == Status::Data, "the hole {part:?} holds data");
        }
    }
    if s.limits.knows_holes && s.limits.resizable {
        let last = status_of(s, 800_000..900_000);
        assert_eq!(last, [(800_000..900_000, Status::Hole)], "what was never written is a hole");
    }
    // Past the end there is nothing, and asking is no crime.
    let _ = s.storage.status(len..len + 4096).wait();
    let _ = s.storage.status(0..0).wait();
}

fn a_length_that_shrank_and_grew_reads_as_zeros(s: &Subject) {
    if !s.limits.resizable {
        assert!(s.storage.set_len(1 << 30, Preallocate::Off).wait().is_err());
        return;
    }
    for preallocate in [Preallocate::Off, Preallocate::Falloc, Preallocate::Full] {
        s.reset(0);
        let mut model = pattern(s.aligned(100_001), 4);
        s.write(&model, 0);
        for len in [s.aligned(50_001), s.aligned(2_100_001), s.aligned(4096), s.unit, s.aligned(9_999)] {
            s.storage.set_len(len, preallocate).wait().unwrap();
            model.resize(len as usize, 0);
            assert_eq!(s.storage.len().unwrap(), len);
            assert_bytes(&s.whole(), &model, &format!("length {len} with {preallocate:?}"));
        }
        s.storage.flush().wait().unwrap();
    }
}

fn offsets_that_overflow_are_errors(s: &Subject) {
    let len = s.reset(s.aligned(70_000));
    let size = s.unit as usize;
    for offset in
        [u64::MAX, s.aligned(u64::MAX), s.aligned(u64::MAX) - s.unit, s.aligned(u64::MAX / 2) + s.unit]
    {
        let error = s.storage.read_at(Buf::zeroed(size), offset).wait().1.unwrap_err();
        assert_eq!(error.code(), Code::OutOfFile, "{error:?}");
        let mut small = vec![0u8; size];
        if let Some(result) = s.storage.try_read_at(&mut small, offset) {
            result.unwrap_err();
        }
        if offset.checked_add(s.unit).is_none() || !s.limits.resizable {
            let (buf, result) = s.storage.write_at(Buf::zeroed(size), offset, WriteFlags::default()).wait();
            result.unwrap_err();
            assert_eq!(buf.len(), size);
        }
        s.storage.zero(offset..u64::MAX, ZeroMode::MayUnmap).wait().unwrap();
        let _ = s.storage.discard(offset..u64::MAX).wait();
        let _ = s.storage.status(offset..u64::MAX).wait();
    }
    assert_eq!(s.storage.len().unwrap(), len);
    if s.limits.resizable {
        // More than most can do: an error, or done; never a panic.
        let _ = s.storage.set_len(u64::MAX, Preallocate::Off).wait();
        s.storage.set_len(0, Preallocate::Off).wait().unwrap();
    }
}

fn a_write_completes_though_its_completion_is_dropped(s: &Subject) {
    let len = s.reset(s.aligned(MIN_LEN));
    let bytes = pattern(len, 6);
    drop(s.storage.write_at(Buf::copy_of(&bytes), 0, WriteFlags::default()));
    let patience = Instant::now();
    while s.read(0..len) != bytes {
        assert!(patience.elapsed() < Duration::from_secs(10), "a write whose completion was dropped is lost");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(s.storage.zero(0..len, ZeroMode::MayUnmap));
    let patience = Instant::now();
    while s.read(0..len).iter().any(|b| *b != 0) {
        assert!(
            patience.elapsed() < Duration::from_secs(10),
            "a zeroing whose completion was dropped is lost"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn requests_from_many_threads_do_not_mix(s: &Subject) {
    const THREADS: u64 = 8;
    let len = s.reset(s.aligned(MIN_LEN));
    // Stripes of whole units: neighbours share blocks where the storage's own blocks are larger.
    let stripe = s.aligned(len / THREADS / 3).max(s.unit);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                let base = thread * stripe;
                let mut model = vec![0u8; stripe as usize];
                let mut random = Random(thread + 1);
                for round in 0..60u8 {
                    let (from, to) = random.range(stripe, s.unit);
                    let bytes = pattern(to - from, round ^ thread as u8);
                    let written: Vec<Completion<WithBuf>> = [(from, (from + to) / 2), ((from + to) / 2, to)]
                        .map(|(from, to)| (s.aligned(from), s.aligned(to)))
                        .into_iter()
                        .filter(|(from, to)| from < to)
                        .map(|(a, b)| {
                            let part = &bytes[(a - from) as usize..(b - from) as usize];
                            s.storage.write_at(Buf::copy_of(part), base + a, WriteFlags::default())
                        })
                        .collect();
                    written.into_iter().for_each(|c| c.wait().1.unwrap());
                    model[from as usize..to as usize].copy_from_slice(&bytes);
                    assert_bytes(&s.read(base..base + stripe), &model, &format!("stripe {thread}"));
                }
            });
        }
    });
}

fn try_read_tells_the_truth_or_nothing(s: &Subject) {
    let len = s.reset(s.aligned(100_000));
    let model = pattern(len, 11);
    s.write(&model, 0);
    let mut random = Random(3);
    for _ in 0..100 {
        let (from, to) = random.range(len, s.unit);
        let mut bytes = vec![0x55u8; (to - from) as usize];
        match s.storage.try_read_at(&mut bytes, from) {
            None => {}
            Some(result) => {
                result.unwrap();
                assert_bytes(&bytes, &model[from as usize..to as usize], "try_read_at");
            }
        }
    }
    let mut bytes = vec![0u8; s.unit as usize * 2];
    if let Some(result) = s.storage.try_read_at(&mut bytes, len - s.unit) {
        assert_eq!(result.unwrap_err().code(), Code::OutOfFile);
    }
}

/// A long sequence of changes, each with its outcome in a vector.
fn random_changes_match_a_vector(s: &Subject, seed: u64) {
    let mut model = vec![0u8; s.reset(s.aligned(200_000)) as usize];
    let mut random = Random(seed);
    for step in 0..250 {
        let len = model.len() as u64;
        let (from, to) = random.range(len.max(s.unit), s.unit);
        let span = from as usize..to.min(len) as usize;
        match random.next() % 10 {
            0..4 => {
                let to = to.min(if s.limits.resizable { u64::MAX } else { len });
                let bytes = pattern(to - from, step as u8);
                s.write(&bytes, from);
                model.resize(model.len().max(to as usize), 0);
                model[from as usize..to as usize].copy_from_slice(&bytes);
            }
            4 => {
                s.storage.zero(from..to, ZeroMode::MayUnmap).wait().unwrap();
                model.get_mut(span).unwrap_or_default().fill(0);
            }
            5 => {
                s.storage.zero(from..to, ZeroMode::KeepAllocated).wait().unwrap();
                model.get_mut(span).unwrap_or_default().fill(0);
            }
            6 => {
                s.storage.discard(from..to).wait().unwrap();
                let now = s.whole();
                for at in span {
                    assert!(now[at] == 0 || now[at] == model[at], "step {step}: discard invented byte {at}");
                    model[at] = now[at];
                }
            }
            7 if s.limits.resizable => {
                let len = s.aligned(random.next() % 300_000);
                s.storage.set_len(len, Preallocate::Off).wait().unwrap();
                model.resize(len as usize, 0);
            }
            8 => s.storage.flush().wait().unwrap(),
            _ if !span.is_empty() => {
                let found = s.read(span.start as u64..span.end as u64);
                assert_bytes(&found, &model[span], &format!("seed {seed:#x} step {step}"));
            }
            _ => {}
        }
        if step % 10 == 0 {
            assert_bytes(&s.whole(), &model, &format!("seed {seed:#x} step {step}"));
        }
    }
    assert_bytes(&s.whole(), &model, &format!("seed {seed:#x} at the end"));
}

/// Xorshift: enough to choose ranges, and the same every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    /// A non-empty aligned range inside `0..len`.
    fn range(&mut self, len: u64, unit: u64) -> (u64, u64) {
        let units = (len / unit).max(1);
        let from = self.next() % units;
        // Mostly short, sometimes up to the end.
        let most =
            if self.next().is_multiple_of(4) { units - from } else { (units - from).min(9000 / unit + 2) };
        let to = from + 1 + self.next() % most;
        (from * unit, to.min(units) * unit)
    }
}
