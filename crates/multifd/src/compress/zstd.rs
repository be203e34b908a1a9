//! zstd: one frame a channel (RFC 8878), a flush at the end of each packet, never an end of the frame.
//!
//! UNSAFETY: the library's safe bindings do not know sequence producers, so its compressor is called directly. It is
//! given pointers to buffers that outlive the call, and one to a sieve that outlives it.
#![expect(unsafe_code, reason = "the library's safe bindings do not know sequence producers")]

use std::{
    ffi::{c_int, c_void},
    mem::MaybeUninit,
    ptr::NonNull,
    slice,
};

use zstd_safe::{
    DCtx, DParameter, InBuffer, OutBuffer, get_error_name,
    zstd_sys::{
        ZSTD_CCtx, ZSTD_CCtx_setParameter, ZSTD_EndDirective, ZSTD_Sequence, ZSTD_cParameter,
        ZSTD_compressStream2, ZSTD_createCCtx, ZSTD_freeCCtx, ZSTD_inBuffer, ZSTD_isError, ZSTD_outBuffer,
        ZSTD_registerSequenceProducer,
    },
};

use super::{
    codec::{Decode, Encode, Pages},
    sieve::{Sieve, Stretch},
};
use crate::{
    error::{Error, Malformed, Result},
    wire::limits::{PAYLOAD_BYTES, ZSTD_WINDOW_LOG},
};

pub(super) struct Encoder {
    stream: Stream,
    page: Vec<u8>,
    payload: Box<[u8]>,
}

impl Encoder {
    pub(super) fn new(level: u8) -> Result<Self> {
        let mut stream = Stream::new(level)?;
        if SIFTED_LEVELS.contains(&level) {
            stream.sift()?;
        }
        Ok(Self { stream, page: Vec::new(), payload: vec![0; PAYLOAD_BYTES as usize].into() })
    }
}

impl Encode for Encoder {
    fn encode(&mut self, pages: &Pages<'_>) -> Result<&[u8]> {
        let mut made = 0;
        for at in 0..pages.len() {
            pages.copy(at, &mut self.page)?;
            let flush = at + 1 == pages.len();
            let mut used = 0;
            loop {
                let room = &mut self.payload[made..];
                let step = self.stream.compress(&self.page[used..], room, flush)?;
                (used, made) = (used + step.used, made + step.made);
                if used == self.page.len() && (step.flushed || !flush) {
                    break;
                }
                if made == self.payload.len() {
                    return Err(Error::other("compress a page with zstd", "it outgrows the largest payload"));
                }
            }
        }
        Ok(&self.payload[..made])
    }
}

/// The library's compressor, which asks a sieve about each block before it looks for matches itself.
struct Stream {
    context: NonNull<ZSTD_CCtx>,
    /// Owned; reached by the library alone once it knows it.
    sieve: Option<NonNull<Sieve>>,
}

// SAFETY: both pointers are owned, and what they point to knows nothing of threads.
unsafe impl Send for Stream {}

/// What a call to the compressor has done.
struct Step {
    used: usize,
    made: usize,
    /// Nothing is left inside.
    flushed: bool,
}

impl Stream {
    fn new(level: u8) -> Result<Self> {
        // SAFETY: there is nothing to uphold.
        let context = unsafe { ZSTD_createCCtx() };
        let mut stream = Self { context: NonNull::new(context).ok_or_else(no_memory)?, sieve: None };
        stream.set(ZSTD_cParameter::ZSTD_c_compressionLevel, level.into())?;
        Ok(stream)
    }

    /// From now on blocks of noise and runs are written as the sieve finds them.
    fn sift(&mut self) -> Result<()> {
        // What the sieve leaves alone is the library's.
        self.set(ENABLE_SEQ_PRODUCER_FALLBACK, 1)?;
        let sieve = *self.sieve.get_or_insert_with(|| NonNull::from(Box::leak(Box::new(Sieve::new()))));
        // SAFETY: the context is alive, and the sieve lives as long as it, see `drop`. `produce` is a producer of sequences
        // whose state is a sieve.
        unsafe { ZSTD_registerSequenceProducer(self.context.as_ptr(), sieve.as_ptr().cast(), Some(produce)) };
        Ok(())
    }

    fn set(&mut self, parameter: ZSTD_cParameter, value: c_int) -> Result<()> {
        // SAFETY: the context is alive.
        checked(unsafe { ZSTD_CCtx_setParameter(self.context.as_ptr(), parameter, value) }).map(drop)
    }

    fn compress(&mut self, bytes: &[u8], room: &mut [u8], flush: bool) -> Result<Step> {
        let mut input = ZSTD_inBuffer { src: bytes.as_ptr().cast(), size: bytes.len(), pos: 0 };
        let mut output = ZSTD_outBuffer { dst: room.as_mut_ptr().cast(), size: room.len(), pos: 0 };
        let end = if flush { ZSTD_EndDirective::ZSTD_e_flush } else { ZSTD_EndDirective::ZSTD_e_continue };
        // SAFETY: the context is alive; input and output are whole slices that outlive the call, and the library keeps
        // neither.
        let left =
            unsafe { ZSTD_compressStream2(self.context.as_ptr(), &raw mut output, &raw mut input, end) };
        let left = checked(left)?;
        Ok(Step { used: input.pos, made: output.pos, flushed: left == 0 })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: it was made by `ZSTD_createCCtx` and is not used again.
        unsafe { ZSTD_freeCCtx(self.context.as_ptr()) };
        if let Some(sieve) = self.sieve {
            // SAFETY: it is the box that `sift` has leaked; the context that knew it is gone.
            drop(unsafe { Box::from_raw(sieve.as_ptr()) });
        }
    }
}

/// What the library calls for each block: the sequences of a block of noise and runs, or the word that it is none.
unsafe extern "C" fn produce(
    sieve: *mut c_void,
    sequences: *mut ZSTD_Sequence,
    room: usize,
    block: *const c_void,
    length: usize,
    _: *const c_void,
    _: usize,
    _: c_int,
    _: usize,
) -> usize {
    // SAFETY: it is the state that was registered, a sieve, and the one reference to it: a context serves one call at a
    // time.
    let sieve = unsafe { &mut *sieve.cast::<Sieve>() };
    // SAFETY: the library says that so many bytes of the block can be read.
    let block = unsafe { slice::from_raw_parts(block.cast::<u8>(), length) };
    // SAFETY: the library says that there is room for so many sequences; nothing is said about what is there now.
    let places = unsafe { slice::from_raw_parts_mut(sequences.cast::<MaybeUninit<ZSTD_Sequence>>(), room) };
    let Some(stretches) = sieve.sift(block) else { return NOT_MINE };
    let mut places = places.iter_mut();
    let mut made = 0;
    let mut literals = 0;
    let mut put = |sequence| {
        made += 1;
        places.next().map(|place| place.write(sequence)).is_some()
    };
    for stretch in stretches {
        match *stretch {
            Stretch::Noise(length) => literals += length,
            // A byte, and a match with the byte before.
            Stretch::Run(length) => {
                if !put(sequence(literals + 1, 1, length - 1)) {
                    return NOT_MINE;
                }
                literals = 0;
            }
        }
    }
    if put(sequence(literals, 0, 0)) { made } else { NOT_MINE }
}

fn sequence(literals: usize, offset: u32, length: usize) -> ZSTD_Sequence {
    let within_a_block = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    ZSTD_Sequence { offset, litLength: within_a_block(literals), matchLength: within_a_block(length), rep: 0 }
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

/// What a call to the library has given back.
fn checked(code: usize) -> Result<usize> {
    // SAFETY: it looks at the number alone.
    if unsafe { ZSTD_isError(code) } == 0 { Ok(code) } else { Err(refused(code)) }
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

/// What a producer says that has made no sequences: more than there is room for.
const NOT_MINE: usize = usize::MAX;
/// `ZSTD_c_enableSeqProducerFallback`; the bindings know its number.
const ENABLE_SEQ_PRODUCER_FALLBACK: ZSTD_cParameter = ZSTD_cParameter::ZSTD_c_experimentalParam17;
/// Levels whose window, 2 MiB at the most, is well within what a [`Sieve`] remembers.
const SIFTED_LEVELS: std::ops::RangeInclusive<u8> = 0..=4;
