//! An initial packet is read or refused, and what is read is written back to the same meaning.
#![no_main]

use multifd::wire::{INITIAL_LEN, Initial};

multifd_fuzz::target!(|bytes: &[u8]| {
    let Some(bytes) = bytes.first_chunk::<INITIAL_LEN>() else { return };
    if let Ok(initial) = Initial::decode(bytes) {
        assert_eq!(Initial::decode(&initial.encode()), Ok(initial));
    }
});
