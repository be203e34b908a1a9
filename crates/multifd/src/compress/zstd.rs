//! zstd: one frame a channel (RFC 8878), a flush at the end of each packet, never an end of the frame.

use zstd_safe::{
    CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, get_error_name, zstd_sys::ZSTD_EndDirective,
};

use super::{Decode, Encode, Pages};
use crate::{
    error::{Error, Malformed, Result},
    wire::limits::{PAYLOAD_BYTES, ZSTD_WINDOW_LOG},
};

pub(super) struct Encoder {
    stream: CCtx<'static>,
    page: Vec<u8>,
    payload: Box<[u8]>,
}

impl Encoder {
    pub(super) fn new(level: u8) -> Result<Self> {
        let mut stream = CCtx::try_create().ok_or_else(no_memory)?;
        stream.set_parameter(CParameter::CompressionLevel(level.into())).map_err(refused)?;
        Ok(Self { stream, page: Vec::new(), payload: vec![0; PAYLOAD_BYTES as usize].into() })
    }
}

impl Encode for Encoder {
    fn encode(&mut self, pages: &Pages<'_>) -> Result<&[u8]> {
        let mut output = OutBuffer::around(&mut *self.payload);
        for at in 0..pages.len() {
            pages.copy(at, &mut self.page)?;
            let mut input = InBuffer::around(&self.page);
            let end = if at + 1 == pages.len() {
                ZSTD_EndDirective::ZSTD_e_flush
            } else {
                ZSTD_EndDirective::ZSTD_e_continue
            };
            loop {
                let left = self.stream.compress_stream2(&mut output, &mut input, end).map_err(refused)?;
                let flushed = end == ZSTD_EndDirective::ZSTD_e_continue || left == 0;
                if flushed && input.pos() == self.page.len() {
                    break;
                }
                if output.pos() == output.capacity() {
                    return Err(Error::other("compress a page with zstd", "it outgrows the largest payload"));
                }
            }
        }
        let made = output.pos();
        Ok(&self.payload[..made])
    }
}

pub(super) struct Decoder(DCtx<'static>);

impl Decoder {
    pub(super) fn new() -> Result<Self> {
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
            // A full room is more than there may be, whatever is left; with room, nothing is held back.
            if output.pos() == output.capacity() || input.pos() == payload.len() {
                return Ok(output.pos());
            }
            if (input.pos(), output.pos()) == before {
                return Err(malformed("it leads nowhere").into());
            }
        }
    }
}

fn malformed(why: &str) -> Malformed {
    Malformed::Compressed { method: "zstd", why: why.to_lowercase() }
}

fn refused(code: usize) -> Error {
    Error::other("use zstd", get_error_name(code))
}

fn no_memory() -> Error {
    Error::io("use zstd", std::io::ErrorKind::OutOfMemory.into())
}
