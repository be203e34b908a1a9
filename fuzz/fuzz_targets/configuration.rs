//! Header and configuration of a main stream: what is read can be written, and reads back as the same.
#![no_main]

use multifd_fuzz::shown;
use qemu_stream::{
    error::StreamKind,
    format::{Reader, decode_header, encode_header},
};

multifd_fuzz::target!(|bytes: &[u8]| {
    let Some(configuration) = shown(decode_header(&mut Reader::new(bytes, StreamKind::Main))) else { return };
    let mut written = Vec::new();
    encode_header(configuration.as_ref(), &mut written);
    // Behind it something else must come that is no subsection: the first section.
    written.push(0x01);
    let again = decode_header(&mut Reader::new(&written[..], StreamKind::Main)).expect("what was written");
    assert_eq!(again, configuration);
});
