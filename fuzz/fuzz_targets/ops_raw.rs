//! Requests to a raw image, valid or mutated, compared with an array of bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: vellum_fuzz::input::Input| vellum_fuzz::ops::run(input, "raw"));
