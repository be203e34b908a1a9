//! zlib whose blocks of noise and runs are written here instead of by the library.

use flate2::{Compress, Compression, FlushCompress};

use super::{
    deflate::Blocks,
    sieve::{Sieve, Stretch},
};
use crate::{
    compress::codec::{Encode, PacketPages, too_long},
    error::{Error, Result},
};

/// Writes pages of noise and runs as blocks of its own, and passes all others to the library. The library would look for
/// matches at each byte of noise, and at level 1 would make the noise longer.
pub(in crate::compress) struct Encoder {
    packer: Packer,
    sieve: Sieve,
    page: Vec<u8>,
    blocks: Blocks,
    begun: bool,
}

impl Encoder {
    pub(in crate::compress) fn new(level: u8) -> Self {
        Self {
            packer: Packer {
                stream: Compress::new(Compression::new(level.into()), false),
                open: false,
                skipped: Vec::new(),
                outrun: false,
            },
            sieve: Sieve::new(),
            page: Vec::new(),
            blocks: Blocks::new(),
            begun: false,
        }
    }
}

impl Encode for Encoder {
    fn encode(&mut self, pages: &PacketPages<'_>) -> Result<&[u8]> {
        self.blocks.clear();
        if !self.begun {
            self.blocks.head(&HEAD).ok_or_else(outgrown)?;
            self.begun = true;
        }
        for at in 0..pages.len() {
            pages.copy(at, &mut self.page)?;
            if let Some(stretches) = self.sieve.sift(&self.page) {
                self.packer.close(&mut self.blocks)?;
                write(&mut self.blocks, stretches, &self.page).ok_or_else(outgrown)?;
                self.packer.skip(&self.page);
            } else {
                self.blocks.finish().ok_or_else(outgrown)?;
                self.packer.pack(&self.page, &mut self.blocks)?;
            }
        }
        self.packer.close(&mut self.blocks)?;
        self.blocks.finish().ok_or_else(outgrown)?;
        Ok(self.blocks.bytes())
    }
}

/// The result of the sieve for a page.
fn write(blocks: &mut Blocks, stretches: &[Stretch], page: &[u8]) -> Option<()> {
    let mut rest = page;
    for stretch in stretches {
        let bytes;
        match *stretch {
            Stretch::Noise(length) => {
                (bytes, rest) = rest.split_at(length);
                blocks.stored(bytes)?;
            }
            Stretch::Run(length) => {
                (bytes, rest) = rest.split_at(length);
                blocks.run(bytes[0], length)?;
            }
        }
    }
    Some(())
}

/// The library, which must know the bytes that a match may refer to.
struct Packer {
    /// Writes blocks without a header and checksum: the stream never ends, so its checksum is never needed.
    stream: Compress,
    /// Bytes were passed to it since it last ended at a byte boundary.
    open: bool,
    /// The bytes that were written without the library since it last got a page. Not complete if `outrun`.
    skipped: Vec<u8>,
    /// A window or more was written without the library, so no match can refer to the bytes that it knows.
    outrun: bool,
}

impl Packer {
    fn pack(&mut self, page: &[u8], blocks: &mut Blocks) -> Result<()> {
        if self.outrun {
            self.stream.reset();
        } else if !self.skipped.is_empty() {
            self.stream.set_dictionary(&self.skipped).map_err(|error| Error::other(DOING, error))?;
        }
        self.outrun = false;
        self.skipped.clear();
        self.open = true;
        self.run(page, FlushCompress::None, blocks)
    }

    /// Ends at a byte boundary.
    fn close(&mut self, blocks: &mut Blocks) -> Result<()> {
        if self.open {
            self.open = false;
            self.run(&[], FlushCompress::Sync, blocks)?;
        }
        Ok(())
    }

    fn skip(&mut self, page: &[u8]) {
        self.outrun |= self.skipped.len() + page.len() >= WINDOW;
        if !self.outrun {
            self.skipped.extend(page);
        }
    }

    fn run(&mut self, page: &[u8], flush: FlushCompress, blocks: &mut Blocks) -> Result<()> {
        let (taken, given) = (self.stream.total_in(), self.stream.total_out());
        let room = blocks.room();
        let outcome = self.stream.compress(page, room, flush);
        outcome.map_err(|error| Error::other(DOING, error))?;
        let made = length(self.stream.total_out() - given);
        let full = made == room.len();
        blocks.add(made);
        let whole = length(self.stream.total_in() - taken) == page.len();
        if whole && !full { Ok(()) } else { Err(too_long("zlib")) }
    }
}

fn outgrown() -> Error {
    too_long("zlib")
}

const DOING: &str = "compress a page with zlib";
/// Deflate, a window of 32 KiB, no dictionary.
const HEAD: [u8; 2] = [0x78, 0x01];
const WINDOW: usize = 32 << 10;

/// The number is within one packet, so it fits.
fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
