//! zlib whose blocks of noise and runs are written here, and not by the library.

use flate2::{Compress, Compression, FlushCompress};

use super::{
    deflate::Blocks,
    sieve::{Sieve, Stretch},
};
use crate::{
    compress::codec::{Encode, PacketPages, too_long},
    error::{Error, Result},
};

/// Pages of noise and runs become blocks of our own; all others go through the library. It looks for matches in each byte
/// of noise, and at level 1 spends more bits on it than it has.
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
                missed: Vec::new(),
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
                self.packer.miss(&self.page);
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

/// A page as it was found to be.
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

/// The library, which must know what a match may lead to.
struct Packer {
    /// Blocks alone: nobody is ever told the checksum of a stream that never ends, so none is made.
    stream: Compress,
    /// It has taken bytes since it last ended at a whole byte.
    open: bool,
    /// What became blocks of our own since it last took a page,
    missed: Vec<u8>,
    /// if that is not a window or more: then no match leads to what it knows.
    outrun: bool,
}

impl Packer {
    fn pack(&mut self, page: &[u8], blocks: &mut Blocks) -> Result<()> {
        if self.outrun {
            self.stream.reset();
        } else if !self.missed.is_empty() {
            self.stream.set_dictionary(&self.missed).map_err(|error| Error::other(DOING, error))?;
        }
        self.outrun = false;
        self.missed.clear();
        self.open = true;
        self.run(page, FlushCompress::None, blocks)
    }

    /// Ends at a whole byte.
    fn close(&mut self, blocks: &mut Blocks) -> Result<()> {
        if self.open {
            self.open = false;
            self.run(&[], FlushCompress::Sync, blocks)?;
        }
        Ok(())
    }

    fn miss(&mut self, page: &[u8]) {
        self.outrun |= self.missed.len() + page.len() >= WINDOW;
        if !self.outrun {
            self.missed.extend(page);
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

/// Within one packet, so it fits.
fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
