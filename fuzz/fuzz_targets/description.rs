//! The JSON that describes devices: parsed or refused, however deep and large it says it is.
#![no_main]

use multifd_fuzz::shown;
use qemu_stream::format::{Description, EndFinder};

multifd_fuzz::target!(|bytes: &[u8]| {
    shown(Description::parse(bytes));
    let mut collected = bytes.to_vec();
    shown(EndFinder::new(true).find(&mut collected));
    for footers in [false, true] {
        shown(EndFinder::new(footers).without_description(bytes.to_vec()));
    }
});
