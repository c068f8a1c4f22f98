//! The text of a VMDK descriptor, with a file for its extents under a few names.
#![no_main]

use vellum_fuzz::Files;
use vellum_tests::corpus::Sparse;

libfuzzer_sys::fuzz_target!(|text: &[u8]| {
    // The text alone decides; the signature is given, or most inputs would end at it.
    let mut whole = b"# Disk DescriptorFile\n".to_vec();
    whole.extend_from_slice(text);
    let files = Files { first: Sparse::bytes(&whole), second: Some(Sparse::zeros(1 << 30)) };
    vellum_fuzz::run(files, Some("vmdk"));
});
