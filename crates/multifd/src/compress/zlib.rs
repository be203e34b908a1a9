//! zlib: one stream per channel (RFC 1950). Each packet ends with a sync flush; the stream never ends.

use flate2::{Compress, Compression, Decompress, DecompressError, FlushCompress, FlushDecompress, Status};

use super::{
    codec::{Decode, Description, Level},
    noise,
    stream::{Compressor, Encoder, Step},
};
use crate::{
    error::{Error, Malformed, Result},
    parameters::Parameter,
    wire::Flags,
};

pub(super) const METHOD: Description = Description {
    name: "zlib",
    flags: Flags::ZLIB,
    level: Some(Level {
        parameter: Parameter::new("multifd-zlib-level", 0, 9, 1),
        meaning: "0 (stored) to 9 (smallest)",
    }),
    encoder: |level| {
        Ok(Some(match level {
            // Level 0 does not compress, so the sieve saves nothing.
            0 => Box::new(Encoder::new(Plain::new(level))),
            _ => Box::new(noise::zlib::Encoder::new(level)),
        }))
    },
    decoder: |_| Ok(Some(Box::new(Decoder(Decompress::new(true))))),
};

/// The library without a sieve.
struct Plain(Compress);

impl Plain {
    fn new(level: u8) -> Self {
        Self(Compress::new(Compression::new(level.into()), true))
    }
}

impl Compressor for Plain {
    const NAME: &'static str = METHOD.name;

    fn compress(&mut self, input: &[u8], room: &mut [u8], flush: bool) -> Result<Step> {
        let flush = if flush { FlushCompress::Sync } else { FlushCompress::None };
        let (taken, given) = (self.0.total_in(), self.0.total_out());
        let outcome = self.0.compress(input, room, flush);
        outcome.map_err(|error| Error::other("compress a page with zlib", error))?;
        let (used, made) = (length(self.0.total_in() - taken), length(self.0.total_out() - given));
        // If the room is full, bytes may still be buffered.
        Ok(Step { used, made, flushed: made < room.len() })
    }
}

struct Decoder(Decompress);

impl Decode for Decoder {
    fn decode(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<usize> {
        let (mut used, mut made) = (0, 0);
        while used < payload.len() {
            let (taken, given) = (self.0.total_in(), self.0.total_out());
            let status = self
                .0
                .decompress(&payload[used..], &mut pages[made..], FlushDecompress::Sync)
                .map_err(|error| malformed(why(&error)))?;
            let (input, output) = (length(self.0.total_in() - taken), length(self.0.total_out() - given));
            (used, made) = (used + input, made + output);
            if status == Status::StreamEnd {
                return Err(malformed("the stream ends").into());
            }
            if made == pages.len() {
                // The payload is longer than its pages, so the rest does not matter.
                break;
            }
            if input == 0 && output == 0 {
                return Err(malformed("it makes no progress").into());
            }
        }
        Ok(made)
    }
}

fn why(error: &DecompressError) -> &str {
    let otherwise =
        if error.needs_dictionary().is_some() { "it needs a dictionary" } else { "it is corrupt" };
    error.message().unwrap_or(otherwise)
}

fn malformed(why: &str) -> Malformed {
    Malformed::Compressed { method: METHOD.name, why: why.into() }
}

/// The number is within one packet, so it fits.
fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
