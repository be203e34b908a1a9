//! A channel packed with zstd: good streams, broken ones, and bytes that are none.
#![no_main]

mod payloads;

use multifd::{Method, wire::Flags};
use zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer, zstd_sys::ZSTD_EndDirective};

multifd_fuzz::target!(|bytes: &[u8]| {
    let mut stream = CCtx::create();
    stream.set_parameter(CParameter::CompressionLevel(1)).expect("a level");
    payloads::play(bytes, Method::Zstd, Flags::ZSTD, |pages| {
        let mut payload = vec![0; 2 * pages.len()];
        let mut output = OutBuffer::around(&mut payload[..]);
        let mut input = InBuffer::around(pages);
        let flush = ZSTD_EndDirective::ZSTD_e_flush;
        while stream.compress_stream2(&mut output, &mut input, flush).expect("packed") > 0 {}
        let length = output.pos();
        payload.truncate(length);
        payload
    });
});
