//! zstd whose blocks of noise and runs are found here, and not by the library.
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
    get_error_name,
    zstd_sys::{
        ZSTD_CCtx, ZSTD_CCtx_setParameter, ZSTD_EndDirective, ZSTD_Sequence, ZSTD_cParameter,
        ZSTD_compressStream2, ZSTD_createCCtx, ZSTD_freeCCtx, ZSTD_inBuffer, ZSTD_isError, ZSTD_outBuffer,
        ZSTD_registerSequenceProducer,
    },
};

use super::sieve::{Sieve, Stretch};
use crate::{
    compress::stream::{Compressor, Step},
    error::{Error, Result},
};

/// The greatest level whose window, 2 MiB at most, is well within what a [`Sieve`] remembers.
pub(in crate::compress) const MOST_LEVEL: u8 = 4;

/// The library's compressor, which asks a sieve about each block before it looks for matches itself.
pub(in crate::compress) struct Sifted {
    context: NonNull<ZSTD_CCtx>,
    /// Owned; reached by the library alone.
    sieve: NonNull<Sieve>,
}

// SAFETY: both pointers are owned, and what they point to knows nothing of threads.
unsafe impl Send for Sifted {}

impl Sifted {
    /// A compressor of a level that is at most [`MOST_LEVEL`].
    pub(in crate::compress) fn new(level: u8) -> Result<Self> {
        // SAFETY: there is nothing to uphold.
        let context = unsafe { ZSTD_createCCtx() };
        let context = NonNull::new(context).ok_or_else(no_memory)?;
        let mut stream = Self { context, sieve: NonNull::from(Box::leak(Box::new(Sieve::new()))) };
        stream.set(ZSTD_cParameter::ZSTD_c_compressionLevel, level.into())?;
        // What the sieve leaves alone is the library's.
        stream.set(ENABLE_SEQ_PRODUCER_FALLBACK, 1)?;
        let sieve = stream.sieve.as_ptr().cast();
        // SAFETY: the context is alive, and the sieve lives as long as it, see `drop`. `produce` is a producer of sequences
        // whose state is a sieve.
        unsafe { ZSTD_registerSequenceProducer(stream.context.as_ptr(), sieve, Some(produce)) };
        Ok(stream)
    }

    fn set(&mut self, parameter: ZSTD_cParameter, value: c_int) -> Result<()> {
        // SAFETY: the context is alive.
        checked(unsafe { ZSTD_CCtx_setParameter(self.context.as_ptr(), parameter, value) }).map(drop)
    }
}

impl Compressor for Sifted {
    const NAME: &'static str = "zstd";

    fn compress(&mut self, input: &[u8], room: &mut [u8], flush: bool) -> Result<Step> {
        let mut input = ZSTD_inBuffer { src: input.as_ptr().cast(), size: input.len(), pos: 0 };
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

impl Drop for Sifted {
    fn drop(&mut self) {
        // SAFETY: it was made by `ZSTD_createCCtx` and is not used again.
        unsafe { ZSTD_freeCCtx(self.context.as_ptr()) };
        // SAFETY: it is the box that `new` has leaked; the context that knew it is gone.
        drop(unsafe { Box::from_raw(self.sieve.as_ptr()) });
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

/// What a call to the library has given back.
fn checked(code: usize) -> Result<usize> {
    // SAFETY: it looks at the number alone.
    if unsafe { ZSTD_isError(code) } == 0 { Ok(code) } else { Err(refused(code)) }
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
