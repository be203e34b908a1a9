//! Payloads of a library that compresses a stream. Each packet ends with a flush; the stream never ends.

use super::codec::{Encode, PacketPages, too_long};
use crate::{error::Result, wire::limits::PAYLOAD_BYTES};

/// The compressor of one channel.
pub(super) trait Compressor: Send {
    /// The method's name, for errors.
    const NAME: &'static str;

    /// Compresses bytes of `input` into `room`. With `flush`, it writes all bytes that it has buffered.
    fn compress(&mut self, input: &[u8], room: &mut [u8], flush: bool) -> Result<Step>;
}

/// The result of a call of the compressor.
pub(super) struct Step {
    /// The number of input bytes that were used.
    pub(super) used: usize,
    /// The number of output bytes that were written.
    pub(super) made: usize,
    /// No bytes are buffered any more.
    pub(super) flushed: bool,
}

/// Creates payloads with a [`Compressor`].
pub(super) struct Encoder<S> {
    stream: S,
    page: Vec<u8>,
    payload: Box<[u8]>,
}

impl<S: Compressor> Encoder<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, page: Vec::new(), payload: vec![0; PAYLOAD_BYTES as usize].into() }
    }
}

impl<S: Compressor> Encode for Encoder<S> {
    fn encode(&mut self, pages: &PacketPages<'_>) -> Result<&[u8]> {
        let mut made = 0;
        for at in 0..pages.len() {
            pages.copy(at, &mut self.page)?;
            let flush = at + 1 == pages.len();
            let mut used = 0;
            loop {
                let step = self.stream.compress(&self.page[used..], &mut self.payload[made..], flush)?;
                (used, made) = (used + step.used, made + step.made);
                if used == self.page.len() && (step.flushed || !flush) {
                    break;
                }
                if made == self.payload.len() {
                    return Err(too_long(S::NAME));
                }
            }
        }
        Ok(&self.payload[..made])
    }
}
