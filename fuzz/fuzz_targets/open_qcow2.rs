//! A file opened as qcow2: open, map, read, and open alone.
#![no_main]

libfuzzer_sys::fuzz_target!(|files: vellum_fuzz::Files| vellum_fuzz::run(files, Some("qcow2")));
