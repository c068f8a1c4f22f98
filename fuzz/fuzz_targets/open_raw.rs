//! A file opened as raw: open, map, read, and open alone.
#![no_main]

libfuzzer_sys::fuzz_target!(|files: vellum_fuzz::Files| vellum_fuzz::run(files, Some("raw")));
