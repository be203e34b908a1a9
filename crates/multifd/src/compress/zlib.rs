//! zlib: one stream a channel (RFC 1950), a sync flush at the end of each packet, never an end of the stream.

use flate2::{Compress, Compression, Decompress, DecompressError, FlushCompress, FlushDecompress, Status};

use super::{Decode, Encode, Pages};
use crate::{
    error::{Error, Malformed, Result},
    wire::limits::PAYLOAD_BYTES,
};

pub(super) struct Encoder {
    stream: Compress,
    page: Vec<u8>,
    payload: Box<[u8]>,
}

impl Encoder {
    pub(super) fn new(level: u8) -> Self {
        let stream = Compress::new(Compression::new(level.into()), true);
        Self { stream, page: Vec::new(), payload: vec![0; PAYLOAD_BYTES as usize].into() }
    }
}

impl Encode for Encoder {
    fn encode(&mut self, pages: &Pages<'_>) -> Result<&[u8]> {
        let mut made = 0;
        for at in 0..pages.len() {
            pages.copy(at, &mut self.page)?;
            let last = at + 1 == pages.len();
            let flush = if last { FlushCompress::Sync } else { FlushCompress::None };
            let (taken, given) = (self.stream.total_in(), self.stream.total_out());
            let outcome = self.stream.compress(&self.page, &mut self.payload[made..], flush);
            outcome.map_err(|error| Error::other("compress a page with zlib", error))?;
            made += length(self.stream.total_out() - given);
            let whole = length(self.stream.total_in() - taken) == self.page.len();
            if !whole || made == self.payload.len() {
                return Err(Error::other("compress a page with zlib", "it outgrows the largest payload"));
            }
        }
        Ok(&self.payload[..made])
    }
}

pub(super) struct Decoder(Decompress);

impl Decoder {
    pub(super) fn new() -> Self {
        Self(Decompress::new(true))
    }
}

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
                // More than there may be, whatever is left.
                break;
            }
            if input == 0 && output == 0 {
                return Err(malformed("it leads nowhere").into());
            }
        }
        Ok(made)
    }
}

fn why(error: &DecompressError) -> &str {
    let otherwise =
        if error.needs_dictionary().is_some() { "it wants a dictionary" } else { "it is corrupt" };
    error.message().unwrap_or(otherwise)
}

fn malformed(why: &str) -> Malformed {
    Malformed::Compressed { method: "zlib", why: why.into() }
}

/// Within one packet, so it fits.
fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
