//! What a compression method implements: an encoder for a source's channel, a decoder for a destination's.

use crate::{
    error::Result,
    ram::{PageIndex, PageSize, RamBlock},
};

/// Makes the payload of one channel's packets.
pub(crate) trait Encode: Send {
    /// The payload of a packet with these pages. They are compressed from a private copy: the guest writes to them
    /// meanwhile, and a compressor reads its input more than once.
    fn encode(&mut self, pages: &Pages<'_>) -> Result<&[u8]>;
}

/// The pages of a packet, wherever they are.
#[cfg_attr(not(any(feature = "zlib", feature = "zstd")), expect(dead_code, reason = "no method reads them"))]
pub(crate) enum Pages<'a> {
    /// In guest memory.
    Mapped(&'a RamBlock, &'a [PageIndex]),
    /// In a private buffer, one behind the other.
    Private(&'a [u8], PageSize),
}

#[cfg(any(feature = "zlib", feature = "zstd"))]
impl Pages<'_> {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Mapped(_, pages) => pages.len(),
            Self::Private(bytes, page_size) => bytes.len() / page_size.bytes(),
        }
    }

    /// Copies the one at this place among them into `page`, which gets the length of a page.
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

/// Reads the payload of one channel's packets.
pub(crate) trait Decode: Send {
    /// Fills `pages`, all pages of a packet in order, from its payload. `pages` has room for one byte more than the
    /// packet may make, so that a surplus is met and not left inside the codec for the next packet. Says how many bytes
    /// were made, with all of the payload used.
    fn decode(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<usize>;
}
