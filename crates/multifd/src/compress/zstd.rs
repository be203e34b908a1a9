//! zstd: one frame per channel (RFC 8878). Each packet ends with a flush; the frame never ends.

use zstd_safe::{
    CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, get_error_name, zstd_sys::ZSTD_EndDirective,
};

use super::{
    codec::{Decode, Description, Level},
    noise,
    stream::{Compressor, Encoder, Step},
};
use crate::{
    error::{Error, Malformed, Result},
    parameters::Parameter,
    wire::{Flags, limits::ZSTD_WINDOW_LOG},
};

pub(super) const METHOD: Description = Description {
    name: "zstd",
    flags: Flags::ZSTD,
    level: Some(Level {
        parameter: Parameter::new("multifd-zstd-level", 0, 20, 1),
        meaning: "1 (fastest) to 20 (smallest); 0 = zstd's own default",
    }),
    encoder: |level| {
        Ok(Some(match level {
            0..=noise::zstd::MOST_LEVEL => Box::new(Encoder::new(noise::zstd::Sifted::new(level)?)),
            _ => Box::new(Encoder::new(Plain::new(level)?)),
        }))
    },
    decoder: || Ok(Some(Box::new(Decoder::new()?))),
};

/// The library without a sieve.
struct Plain(CCtx<'static>);

impl Plain {
    fn new(level: u8) -> Result<Self> {
        let mut stream = CCtx::try_create().ok_or_else(no_memory)?;
        stream.set_parameter(CParameter::CompressionLevel(level.into())).map_err(refused)?;
        Ok(Self(stream))
    }
}

impl Compressor for Plain {
    const NAME: &'static str = METHOD.name;

    fn compress(&mut self, input: &[u8], room: &mut [u8], flush: bool) -> Result<Step> {
        let end = if flush { ZSTD_EndDirective::ZSTD_e_flush } else { ZSTD_EndDirective::ZSTD_e_continue };
        let (mut input, mut output) = (InBuffer::around(input), OutBuffer::around(room));
        let left = self.0.compress_stream2(&mut output, &mut input, end).map_err(refused)?;
        Ok(Step { used: input.pos(), made: output.pos(), flushed: left == 0 })
    }
}

struct Decoder(DCtx<'static>);

impl Decoder {
    fn new() -> Result<Self> {
        let mut stream = DCtx::try_create().ok_or_else(no_memory)?;
        stream.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG)).map_err(refused)?;
        Ok(Self(stream))
    }
}

impl Decode for Decoder {
    fn decode(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<usize> {
        let mut input = InBuffer::around(payload);
        let mut output = OutBuffer::around(pages);
        loop {
            let before = (input.pos(), output.pos());
            let left = self
                .0
                .decompress_stream(&mut output, &mut input)
                .map_err(|code| malformed(get_error_name(code)))?;
            if left == 0 {
                return Err(malformed("the frame ends").into());
            }
            // If the output is full, the payload is longer than its pages. If it is not full, nothing is buffered.
            if output.pos() == output.capacity() || input.pos() == payload.len() {
                return Ok(output.pos());
            }
            if (input.pos(), output.pos()) == before {
                return Err(malformed("it makes no progress").into());
            }
        }
    }
}

fn malformed(why: &str) -> Malformed {
    Malformed::Compressed { method: METHOD.name, why: why.to_lowercase() }
}

fn refused(code: usize) -> Error {
    Error::other("use zstd", get_error_name(code))
}

fn no_memory() -> Error {
    Error::io("use zstd", std::io::ErrorKind::OutOfMemory.into())
}
