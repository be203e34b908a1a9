//! zstd whose blocks of noise and runs are found here instead of by the library.
//!
//! UNSAFETY: the library's safe bindings do not include sequence producers, so its compressor is called directly. It gets
//! pointers to buffers that outlive the call, and a pointer to a sieve that outlives the compressor.
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

/// The greatest level whose window (2 MiB at most) is much shorter than what a [`Sieve`] remembers.
pub(in crate::compress) const MOST_LEVEL: u8 = 4;

/// The library's compressor. It passes each block to a sieve before it looks for matches itself.
pub(in crate::compress) struct Sifted {
    context: NonNull<ZSTD_CCtx>,
    /// Owned. Only the library accesses it.
    sieve: NonNull<Sieve>,
}

// SAFETY: both pointers are owned, and their targets do not depend on a thread.
unsafe impl Send for Sifted {}

impl Sifted {
    /// A compressor of a level that is at most [`MOST_LEVEL`].
    pub(in crate::compress) fn new(level: u8) -> Result<Self> {
        // SAFETY: the function has no preconditions.
        let context = unsafe { ZSTD_createCCtx() };
        let context = NonNull::new(context).ok_or_else(no_memory)?;
        let mut stream = Self { context, sieve: NonNull::from(Box::leak(Box::new(Sieve::new()))) };
        stream.set(ZSTD_cParameter::ZSTD_c_compressionLevel, level.into())?;
        // The library compresses the blocks that the sieve refuses.
        stream.set(ENABLE_SEQ_PRODUCER_FALLBACK, 1)?;
        let sieve = stream.sieve.as_ptr().cast();
        // SAFETY: the context is alive, and the sieve lives as long as the context, see `drop`. `produce` is a sequence
        // producer whose state is a sieve.
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
        // SAFETY: it was created by `ZSTD_createCCtx` and is not used again.
        unsafe { ZSTD_freeCCtx(self.context.as_ptr()) };
        // SAFETY: it is the box that `new` leaked, and the context that referred to it is freed.
        drop(unsafe { Box::from_raw(self.sieve.as_ptr()) });
    }
}

/// The library calls it for each block. Returns the number of sequences if the block is noise and runs, otherwise
/// [`NOT_MINE`].
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
    // SAFETY: it is the registered state, a sieve. This is its only reference, because a context serves one call at a time.
    let sieve = unsafe { &mut *sieve.cast::<Sieve>() };
    // SAFETY: the library guarantees that `length` bytes of the block can be read.
    let block = unsafe { slice::from_raw_parts(block.cast::<u8>(), length) };
    // SAFETY: the library guarantees space for `room` sequences; they may be uninitialised.
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
            // One literal, and a match with the byte before.
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

/// Converts the library's return code.
fn checked(code: usize) -> Result<usize> {
    // SAFETY: the function only reads the number.
    if unsafe { ZSTD_isError(code) } == 0 { Ok(code) } else { Err(refused(code)) }
}

fn refused(code: usize) -> Error {
    Error::other("use zstd", get_error_name(code))
}

fn no_memory() -> Error {
    Error::io("use zstd", std::io::ErrorKind::OutOfMemory.into())
}

/// The result of a producer that did not produce sequences: more than there is space for.
const NOT_MINE: usize = usize::MAX;
/// `ZSTD_c_enableSeqProducerFallback`. The bindings only have its number.
const ENABLE_SEQ_PRODUCER_FALLBACK: ZSTD_cParameter = ZSTD_cParameter::ZSTD_c_experimentalParam17;
