//! The JSON that describes devices: parsed or refused, however deep and large it says it is.
#![no_main]

use qemu_stream::format::{Description, EndFinder};

multifd_fuzz::target!(|bytes: &[u8]| {
    let _ = Description::parse(bytes);
    let mut collected = bytes.to_vec();
    let _ = EndFinder::new(true).find(&mut collected);
    for footers in [false, true] {
        let _ = EndFinder::new(footers).without_description(bytes.to_vec());
    }
});
