//! What a compression method implements, and what is to be said of it.

use super::DecoderMemory;
use crate::{
    error::Result,
    parameters::Parameter,
    ram::{PageIndex, PageSize, RamBlock},
    wire::Flags,
};

/// A method: all that the rest of the engine, a command line or a settings file needs to know of it.
pub(crate) struct Description {
    /// QEMU's name for it.
    pub(crate) name: &'static str,
    /// The bits that packets with pages carry.
    pub(crate) flags: Flags,
    /// How hard it tries, if that can be chosen.
    pub(crate) level: Option<Level>,
    /// Makes the encoder of one channel, of a level within its range; `None` if the pages themselves are the payload. It
    /// fails if the library behind the method refuses, for want of memory for example.
    pub(crate) encoder: fn(level: u8) -> Made<dyn Encode>,
    /// Makes the decoder of one channel; `None` if the pages themselves are the payload.
    /// What it takes in proportion to the source's choice is reserved of `memory`.
    pub(crate) decoder: fn(memory: &DecoderMemory) -> Made<dyn Decode>,
}

/// A codec, if the method has one.
pub(crate) type Made<T> = Result<Option<Box<T>>>;

/// How hard a method tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Level {
    /// `multifd-NAME-level`: its range and default.
    pub parameter: Parameter,
    /// What its values mean: `0 (stored) to 9 (smallest)`.
    pub meaning: &'static str,
}

/// Makes the payload of one channel's packets.
pub(crate) trait Encode: Send {
    /// The payload of a packet with these pages. They are compressed from a private copy: the guest writes to them
    /// meanwhile, and a compressor reads its input more than once.
    fn encode(&mut self, pages: &PacketPages<'_>) -> Result<&[u8]>;
}

/// Reads the payload of one channel's packets.
pub(crate) trait Decode: Send {
    /// Fills `pages`, all pages of a packet in order, from its payload. `pages` has room for one byte more than the
    /// packet may make, so that a surplus is found and not left inside the codec for the next packet. Returns how many
    /// bytes were made, with all of the payload used.
    fn decode(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<usize>;
}

/// The pages of a packet, wherever they are.
#[cfg_attr(not(feature = "_codec"), expect(dead_code, reason = "no method reads them"))]
pub(crate) enum PacketPages<'a> {
    /// In guest memory.
    Mapped(&'a RamBlock, &'a [PageIndex]),
    /// In a private buffer, one behind the other.
    Private(&'a [u8], PageSize),
}

#[cfg(feature = "_codec")]
impl PacketPages<'_> {
    /// The number of pages.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Mapped(_, pages) => pages.len(),
            Self::Private(bytes, page_size) => bytes.len() / page_size.bytes(),
        }
    }

    /// Copies page number `at` among them into `page`, which gets the length of a page.
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn copy(&self, at: usize, page: &mut Vec<u8>) -> Result<()> {
        match self {
            Self::Mapped(block, pages) => {
                page.resize(block.page_size().bytes(), 0);
                block.load(pages[at], page).map_err(|error| crate::Error::io("read a page", error))
            }
            Self::Private(bytes, page_size) => {
                page.clear();
                page.extend(&bytes[at * page_size.bytes()..][..page_size.bytes()]);
                Ok(())
            }
        }
    }
}

/// A payload that exceeds its bound, which no page makes that a method is given.
#[cfg(feature = "_codec")]
pub(super) fn too_long(method: &str) -> crate::Error {
    crate::Error::other(format!("compress a page with {method}"), "the result exceeds the largest payload")
}
