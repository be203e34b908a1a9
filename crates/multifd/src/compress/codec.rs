//! The interface of a compression method, and its description.

use super::DecoderMemory;
use crate::{
    error::Result,
    parameters::Parameter,
    ram::{PageIndex, PageSize, RamBlock},
    wire::Flags,
};

/// The description of a method. The rest of the engine, a command line and a settings file take everything about the method
/// from it.
pub(crate) struct Description {
    /// QEMU's name of the method.
    pub(crate) name: &'static str,
    /// The flags of its packets with pages.
    pub(crate) flags: Flags,
    /// The compression level, if the method has one.
    pub(crate) level: Option<Level>,
    /// Creates the encoder of one channel with a level within its range; `None` if the pages themselves are the payload. It
    /// fails if the library fails, for example because there is no memory.
    pub(crate) encoder: fn(level: u8) -> Made<dyn Encode>,
    /// Creates the decoder of one channel; `None` if the pages themselves are the payload. It reserves the part of `memory`
    /// whose size depends on the source's settings.
    pub(crate) decoder: fn(memory: &DecoderMemory) -> Made<dyn Decode>,
}

/// A codec, if the method has one.
pub(crate) type Made<T> = Result<Option<Box<T>>>;

/// The level of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Level {
    /// The parameter `multifd-NAME-level`: its range and default.
    pub parameter: Parameter,
    /// The meaning of its values: `0 (stored) to 9 (smallest)`.
    pub meaning: &'static str,
}

/// Creates the payloads of one channel's packets.
pub(crate) trait Encode: Send {
    /// Returns the payload of a packet with these pages. The pages are compressed from a private copy, because the guest
    /// may write to them at the same time, and a compressor reads its input more than once.
    fn encode(&mut self, pages: &PacketPages<'_>) -> Result<&[u8]>;
}

/// Decompresses the payloads of one channel's packets.
pub(crate) trait Decode: Send {
    /// Fills `pages`, all pages of a packet in order, from its payload. `pages` is one byte longer than the packet's pages,
    /// so that a surplus is found and does not stay in the codec for the next packet. Returns the number of bytes written,
    /// after the whole payload was used.
    fn decode(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<usize>;
}

/// The pages of a packet.
#[cfg_attr(not(feature = "_codec"), expect(dead_code, reason = "no method reads them"))]
pub(crate) enum PacketPages<'a> {
    /// In guest memory.
    Mapped(&'a RamBlock, &'a [PageIndex]),
    /// In a private buffer, one after the other.
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

    /// Copies page number `at` into `page`, which is resized to the length of a page.
    ///
    /// # Panics
    /// If there is no page of this number.
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

/// The error for a compressed page that is longer than the longest payload. No page causes it.
#[cfg(feature = "_codec")]
pub(super) fn too_long(method: &str) -> crate::Error {
    crate::Error::other(format!("compress a page with {method}"), "the result exceeds the largest payload")
}
