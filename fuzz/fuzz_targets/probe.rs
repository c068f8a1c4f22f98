//! Any file, no format given: recognised, then opened, mapped and read as what it was taken for.
#![no_main]

libfuzzer_sys::fuzz_target!(|files: vellum_fuzz::Files| vellum_fuzz::run(files, None));
