//! The text of a channel's address: read or refused; what was read prints, and reads back as the same.
#![no_main]

use vellum_channel::{ADDRESS_MAX, Address};

libfuzzer_sys::fuzz_target!(|text: &str| {
    match text.parse::<Address>() {
        Ok(address) => {
            let printed = address.to_string();
            // Whatever was not written as `%XX` may be now.
            assert!(printed.len() <= 3 * text.len() + 64, "{printed:?} of {text:?}");
            if printed.len() <= ADDRESS_MAX {
                assert_eq!(
                    printed.parse::<Address>().expect("it reads what it prints"),
                    address,
                    "{printed:?}"
                );
            }
        }
        Err(error) => assert!(error.to_string().len() < 4096, "a message as long as {text:?}"),
    }
});
