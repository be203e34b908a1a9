//! A channel packed with zlib: good streams, broken ones, and bytes that are none.
#![no_main]

mod payloads;

use flate2::{Compress, Compression, FlushCompress};
use multifd::{Method, wire::Flags};

multifd_fuzz::target!(|bytes: &[u8]| {
    let mut stream = Compress::new(Compression::fast(), true);
    payloads::play(bytes, Method::Zlib, Flags::ZLIB, |pages| {
        let mut payload = Vec::with_capacity(2 * pages.len());
        stream.compress_vec(pages, &mut payload, FlushCompress::Sync).expect("packed");
        payload
    });
});
