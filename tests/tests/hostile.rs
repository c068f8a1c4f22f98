//! Every hostile image: the right code, no panic, at most 2 s, 64 MiB of memory and 16 MiB read, no byte changed,
//! no file opened that the chain does not need (RELIABILITY.md section 1.1, U1 to U6).
//!
//! `HOSTILE_ONLY=qcow2/l1` runs the cases whose names start so; `HOSTILE_VERBOSE=1` prints every error.

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use vellum::{ChainOptions, Code, Error, FormatRegistry, Resolver, block_on};
use vellum_tests::corpus::harness::{CaseFiles, open_map_read};
use vellum_tests::corpus::{Expect, HostileCase, all};

/// Counts bytes in use and their peak.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn more(bytes: usize) {
    let now = IN_USE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

// SAFETY: every call goes to the system's allocator unchanged; only numbers are kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // While it is moved, both are there.
        more(size);
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const TIME_MAX: Duration = Duration::from_secs(2);
const HEAP_MAX: usize = 64 << 20;

// One test for all, so that nothing else runs beside it and counts into its memory.
#[test]
fn every_hostile_image_is_refused_by_its_code_and_within_its_limits() {
    let only = std::env::var("HOSTILE_ONLY").unwrap_or_default();
    let cases: Vec<HostileCase> = all().into_iter().filter(|case| case.name.starts_with(&only)).collect();
    std::panic::set_hook(Box::new(|_| {}));
    let mut worst = (Duration::ZERO, 0usize, 0u64);
    let mut findings = Vec::new();
    for case in &cases {
        let files = CaseFiles::new(case);
        let before = files.fingerprints();
        let heap_before = IN_USE.load(Ordering::Relaxed);
        PEAK.store(heap_before, Ordering::Relaxed);
        let started = Instant::now();
        let check = match &case.expected {
            Expect::Accept(check) => Some(check),
            Expect::Code(_) => None,
        };
        let result = catch_unwind(AssertUnwindSafe(|| {
            open_map_read(files.clone(), &case.open, case.format, check).map(|_| ())
        }));
        let wall = started.elapsed();
        let heap = PEAK.load(Ordering::Relaxed) - heap_before;
        worst = (worst.0.max(wall), worst.1.max(heap), worst.2.max(files.read_bytes()));
        let mut finding = |what: String| findings.push(format!("{}: {what}", case.name));
        match result {
            Err(panic) => finding(format!("PANIC {}", panic_text(panic.as_ref()))),
            Ok(Ok(())) => {
                if let Expect::Code(codes) = &case.expected {
                    finding(format!("accepted, expected {}", names(codes)));
                }
            }
            Ok(Err(error)) => {
                if std::env::var_os("HOSTILE_VERBOSE").is_some() {
                    println!("{}: {error:?}; hint: {}", case.name, error.hint_text().unwrap_or("none"));
                }
                judge(case, &error).into_iter().for_each(&mut finding);
            }
        }
        if wall > TIME_MAX {
            finding(format!("took {wall:?}"));
        }
        if heap > HEAP_MAX {
            finding(format!("took {} KiB of memory", heap >> 10));
        }
        if files.read_bytes() > case.read_max {
            finding(format!("read {} KiB", files.read_bytes() >> 10));
        }
        for opened in files.granted() {
            if opened != case.open && !case.may_open.contains(&opened) {
                finding(format!("opened {opened}"));
            }
        }
        look_alone(case).into_iter().for_each(&mut finding);
        if files.changes() != 0 || files.fingerprints() != before {
            finding("changed a file".to_owned());
        }
    }
    let _ = std::panic::take_hook();
    println!(
        "{} cases; worst: {:?}, {} KiB of memory, {} KiB read",
        cases.len(),
        worst.0,
        worst.1 >> 10,
        worst.2 >> 10
    );
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}

/// `info` opens one file and nothing else, whatever is in it; its errors are among those of the case.
fn look_alone(case: &HostileCase) -> Option<String> {
    let files = CaseFiles::new(case);
    let resolver: Arc<dyn Resolver> = files.clone();
    let options = ChainOptions { format: case.format.map(str::to_owned), ..ChainOptions::default() };
    let registry = FormatRegistry::new(vellum::formats());
    let open = || block_on(registry.open_alone(&resolver, &case.open, &options)).map(|_| ());
    let result = catch_unwind(AssertUnwindSafe(open));
    let granted = files.granted();
    if granted.len() > 1 || granted.iter().any(|opened| *opened != case.open) {
        return Some(format!("looked at alone, it opened {granted:?}"));
    }
    match (result, &case.expected) {
        (Err(panic), _) => Some(format!("looked at alone: PANIC {}", panic_text(panic.as_ref()))),
        (Ok(Ok(())), _) => None,
        (Ok(Err(error)), Expect::Code(codes)) if codes.contains(&error.code()) => None,
        (Ok(Err(error)), _) => Some(format!("looked at alone: {error:?}")),
    }
}

/// What is wrong with the error of a case: its code (U1), and what its message lacks (U2).
fn judge(case: &HostileCase, error: &Error) -> Vec<String> {
    let Expect::Code(codes) = &case.expected else { return vec![format!("refused: {error:?}")] };
    let mut wrong = Vec::new();
    if !codes.contains(&error.code()) {
        return vec![format!("{error:?}, expected {}", names(codes))];
    }
    let mut lacks = |missing: bool, what: &str| {
        if missing {
            wrong.push(format!("the message lacks {what}: {error:?}"));
        }
    };
    lacks(error.message().is_empty(), "its sentence");
    lacks(error.hint_text().is_none(), "a hint");
    let usage = error.code() == Code::Usage;
    let blamed = case.blames.as_deref().unwrap_or(&case.open);
    let parts: Vec<&String> = case.may_open.iter().collect();
    let named = error.image_name().unwrap_or_default();
    let known = named == blamed || (case.blames.is_none() && parts.iter().any(|part| *part == named));
    lacks(!usage && !known, "the name of the image");
    lacks(
        case.field.is_some_and(|field| !error.field_name().is_some_and(|f| f.contains(field))),
        "the field",
    );
    lacks(case.at.is_some() && error.offset() != case.at, "the byte offset");
    lacks(case.values && error.found_value().is_none(), "the value found");
    lacks(case.values && error.allowed_values().is_none(), "what is allowed");
    wrong
}

fn names(codes: &[Code]) -> String {
    codes.iter().map(|code| code.as_str()).collect::<Vec<_>>().join(" or ")
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
}
