//! An initial packet is read or refused, and what is read is written back to the same meaning.
#![no_main]

use libfuzzer_sys::fuzz_target;
use multifd::wire::{INITIAL_LEN, Initial};

fuzz_target!(|bytes: [u8; INITIAL_LEN]| {
    if let Ok(initial) = Initial::decode(&bytes) {
        assert_eq!(Initial::decode(&initial.encode()), Ok(initial));
    }
});
