//! zstd: one frame per channel (RFC 8878). Each packet ends with a flush; the frame never ends.

use zstd_safe::{
    CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, get_error_name, zstd_sys::ZSTD_EndDirective,
};

use super::{
    DecoderMemory,
    codec::{Decode, Description, Level},
    memory::Reserved,
    noise,
    stream::{Compressor, Encoder, Step},
};
use crate::{
    error::{Error, Malformed, Result, Unsupported},
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
    decoder: |memory| Ok(Some(Box::new(Decoder::new(memory.clone())?))),
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

struct Decoder {
    stream: DCtx<'static>,
    memory: DecoderMemory,
    /// The window of the channel's frame, once it has begun.
    window: Option<Reserved>,
}

impl Decoder {
    fn new(memory: DecoderMemory) -> Result<Self> {
        let mut stream = DCtx::try_create().ok_or_else(no_memory)?;
        stream.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG)).map_err(refused)?;
        Ok(Self { stream, memory, window: None })
    }
}

impl Decode for Decoder {
    fn decode(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<usize> {
        if self.window.is_none() {
            // A first payload without the whole head of the frame could make no page.
            let window =
                window(payload).ok_or_else(|| malformed("it does not begin with the head of a frame"))?;
            let most = 1 << ZSTD_WINDOW_LOG;
            if window > most {
                return Err(Unsupported::ZstdWindow { most, found: window }.into());
            }
            self.window = Some(self.memory.reserve(window)?);
        }
        let mut input = InBuffer::around(payload);
        let mut output = OutBuffer::around(pages);
        loop {
            let before = (input.pos(), output.pos());
            let left = self
                .stream
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

/// The bytes of the window that a frame asks for (RFC 8878, 3.1.1.1), or `None` if `payload` does not begin with the
/// whole head of a frame.
///
/// ```text
/// magic 4 │ descriptor 1 │ [window 1] │ [dictionary 0, 1, 2, 4] │ [content size 0, 1, 2, 4, 8]
/// ```
fn window(payload: &[u8]) -> Option<u64> {
    let (descriptor, rest) = payload.strip_prefix(&MAGIC)?.split_first()?;
    let is_single = descriptor & 1 << 5 != 0;
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let content = match descriptor >> 6 {
        0 => usize::from(is_single),
        size => 1 << size,
    };
    if rest.len() < usize::from(!is_single) + dictionary + content {
        return None;
    }
    if is_single {
        // The window is the content, whose size is little-endian and, in two bytes, counted from 256.
        let size = rest.get(dictionary..)?.get(..content)?.iter().rev();
        let size = size.fold(0_u64, |size, byte| size << 8 | u64::from(*byte));
        return Some(if content == 2 { size + 256 } else { size });
    }
    let window = *rest.first()?;
    let base = 1_u64 << (10 + (window >> 3));
    Some(base + base / 8 * u64::from(window & 7))
}

/// How each frame begins.
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

fn malformed(why: &str) -> Malformed {
    Malformed::Compressed { method: METHOD.name, why: why.to_lowercase() }
}

fn refused(code: usize) -> Error {
    Error::other("use zstd", get_error_name(code))
}

fn no_memory() -> Error {
    Error::io("use zstd", std::io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compress::{Levels, Method, PacketPages};
    use crate::ram::PageSize;

    /// The head of a frame with this window descriptor and nothing else.
    fn head(window: u8) -> Vec<u8> {
        [&MAGIC[..], &[0, window]].concat()
    }

    /// What libzstd asks for when it compresses a stream of unknown length, as QEMU and this library do.
    #[test]
    fn no_level_of_the_parameter_asks_for_more_than_the_bound() {
        let parameter = METHOD.level.expect("a level").parameter;
        let mut windows = Vec::new();
        for level in 0..=u8::try_from(parameter.most).expect("small") {
            let mut plain = Plain::new(level).expect("made");
            let mut room = vec![0; 1 << 16];
            let made = plain.compress(&[7; 4096], &mut room, true).expect("compressed").made;
            windows.push(window(&room[..made]).expect("a frame"));
            let mut levels = Levels::default();
            levels.set(Method::Zstd, level);
            let mut ours = Method::Zstd.encoder(levels).expect("made").expect("it compresses");
            let pages = PacketPages::Private(&[7; 4096], PageSize::KIB_4);
            assert_eq!(
                window(ours.encode(&pages).expect("compressed")),
                windows.last().copied(),
                "level {level}"
            );
        }
        assert_eq!(windows.iter().max(), Some(&(1 << ZSTD_WINDOW_LOG)), "{windows:?}");
        // As QEMU 10.0 sends them at levels 0, 1, 10, 19 and 20, and as the default of the limit counts them.
        assert_eq!([0, 1, 10, 19].map(|level| windows[level] >> 10), [2_048, 512, 4_096, 8_192]);
        assert!(windows[..=8].iter().all(|window| *window <= 2 << 20), "{windows:?}");
        assert!(windows[..=16].iter().all(|window| *window <= 4 << 20), "{windows:?}");
        assert!(windows[..=19].iter().all(|window| *window <= 8 << 20), "{windows:?}");
    }

    #[test]
    fn window_of_a_frame_is_read_from_its_head() {
        assert_eq!(window(&head(0)), Some(1 << 10));
        assert_eq!(window(&head(15 << 3)), Some(32 << 20));
        assert_eq!(window(&head(15 << 3 | 1)), Some(36 << 20));
        assert_eq!(window(&head(0xff)), Some((1 << 41) / 8 * 15));
        // One segment: the window is the content, of 1, 2, 4 or 8 bytes, behind a dictionary of 0 or 4 bytes.
        assert_eq!(window(&[&MAGIC[..], &[0x20, 9]].concat()), Some(9));
        assert_eq!(window(&[&MAGIC[..], &[0x60, 9, 1]].concat()), Some(256 + 0x109));
        assert_eq!(window(&[&MAGIC[..], &[0xa3, 0, 0, 0, 0, 1, 2, 0, 0]].concat()), Some(0x201));
        assert_eq!(window(&[&MAGIC[..], &[0xe0, 0, 0, 0, 0, 0, 1, 0, 0]].concat()), Some(1 << 40));
        for cut in 0..6 {
            assert_eq!(window(&head(8)[..cut]), None, "cut after {cut}");
        }
        assert_eq!(window(&[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0]), None, "a frame to be skipped");
    }

    #[test]
    fn window_beyond_the_bound_or_beyond_the_memory_of_all_channels_is_refused() {
        let memory = DecoderMemory::new(Some(48 << 20));
        let begin = |window: u8| {
            let mut decoder = Decoder::new(memory.clone()).expect("made");
            let found = decoder.decode(&head(window), &mut [0; 16]).map_err(|error| error.to_string());
            (decoder, found)
        };
        let (_, found) = begin(15 << 3 | 1);
        assert_eq!(
            found.expect_err("36 MiB"),
            "the source's zstd frame needs a window of 36 MiB, expected at most 32 MiB, which is what \
             multifd-zstd-level 20 needs: set multifd-zstd-level to 20 or less at the source"
        );
        let (first, found) = begin(15 << 3);
        assert_eq!(found, Ok(0), "32 MiB, and no page yet");
        let (_, found) = begin(15 << 3);
        let found = found.expect_err("64 MiB in all");
        assert!(
            found.contains("needs 64 MiB (32 MiB for this channel), but decompression-memory is 48 MiB"),
            "{found}"
        );
        drop(first);
        assert_eq!(begin(15 << 3).1, Ok(0), "a channel that has ended needs nothing");
    }
}
