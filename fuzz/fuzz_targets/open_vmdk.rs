//! A file opened as vmdk: open, map, read, and open alone.
#![no_main]

libfuzzer_sys::fuzz_target!(|files: vellum_fuzz::Files| vellum_fuzz::run(files, Some("vmdk")));
