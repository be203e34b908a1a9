//! An initial packet is read or refused, and what is read is written back to the same meaning.
#![no_main]

use multifd::wire::{INITIAL_LEN, Initial};
use multifd_fuzz::shown;

multifd_fuzz::target!(|bytes: &[u8]| {
    let Some(bytes) = bytes.first_chunk::<INITIAL_LEN>() else { return };
    if let Some(initial) = shown(Initial::decode(bytes)) {
        assert_eq!(Initial::decode(&initial.encode()), Ok(initial));
    }
});
