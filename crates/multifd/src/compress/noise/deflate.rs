//! Writes blocks of deflate (RFC 1951) without the library: noise is stored, and a run becomes matches with the byte
//! before.

use crate::wire::limits::PAYLOAD_BYTES;

/// A payload that consists of whole blocks. Some are written here, and some by the library.
pub(super) struct Blocks {
    payload: Box<[u8]>,
    made: usize,
    /// The bits that do not fill a byte yet, the first one lowest.
    bits: u64,
    held: u32,
    /// The last block was written here.
    ours: bool,
}

impl Blocks {
    pub(super) fn new() -> Self {
        Self { payload: vec![0; PAYLOAD_BYTES as usize].into(), made: 0, bits: 0, held: 0, ours: false }
    }

    /// Begins the next payload, after one that was [finished](Self::finish).
    pub(super) fn clear(&mut self) {
        self.made = 0;
    }

    /// Appends bytes of the stream's header.
    pub(super) fn head(&mut self, bytes: &[u8]) -> Option<()> {
        bytes.iter().try_for_each(|byte| self.put((*byte).into(), 8))
    }

    /// Appends a stored block. This and the other functions return `None` if the payload is full.
    pub(super) fn stored(&mut self, bytes: &[u8]) -> Option<()> {
        for bytes in bytes.chunks(usize::from(u16::MAX)) {
            let length = bytes.len() as u64;
            self.put(STORED, 3)?;
            self.fill_byte()?;
            self.put(length, 16)?;
            self.put(!length & 0xffff, 16)?;
            self.payload.get_mut(self.made..)?.get_mut(..bytes.len())?.copy_from_slice(bytes);
            self.made += bytes.len();
        }
        self.ours = true;
        Some(())
    }

    /// Appends a run: `length` times the same byte, at least four.
    pub(super) fn run(&mut self, byte: u8, length: usize) -> Option<()> {
        self.put(FIXED_CODES, 3)?;
        match byte {
            0..=143 => self.code(0x30 + u32::from(byte), 8)?,
            144.. => self.code(0x190 + u32::from(byte - 144), 9)?,
        }
        let mut left = length - 1;
        while left > 0 {
            // The remainder must not be shorter than a match.
            let length = match left {
                ..=258 => left,
                259 | 260 => 255,
                _ => 258,
            };
            self.length(length)?;
            self.code(DISTANCE_ONE, 5)?;
            left -= length;
        }
        self.code(END_OF_BLOCK, 7)?;
        self.ours = true;
        Some(())
    }

    /// Appends the length of a match, 3 to 258.
    fn length(&mut self, length: usize) -> Option<()> {
        let over = u32::try_from(length).ok()? - 3;
        let extra = if over < 8 { 0 } else { over.ilog2() - 2 };
        // Symbols begin at 257; the last one is only for the greatest length.
        let symbol = if length == 258 { 285 } else { 257 + 4 * extra + (over >> extra) };
        match symbol {
            ..280 => self.code(symbol - 256, 7)?,
            _ => self.code(0xc0 + symbol - 280, 8)?,
        }
        if length == 258 {
            return Some(());
        }
        self.put(u64::from(over) & ((1 << extra) - 1), extra)
    }

    /// Ends at a byte boundary with an empty stored block. Blocks of the library end at a byte boundary already.
    pub(super) fn finish(&mut self) -> Option<()> {
        if self.ours {
            self.stored_nothing()?;
            self.ours = false;
        }
        Some(())
    }

    fn stored_nothing(&mut self) -> Option<()> {
        self.put(STORED, 3)?;
        self.fill_byte()?;
        self.put(0, 16)?;
        self.put(0xffff, 16)
    }

    /// The rest of the payload, for the library. Blocks that were written here have to be [finished](Self::finish) before.
    pub(super) fn room(&mut self) -> &mut [u8] {
        debug_assert!(!self.ours && self.held == 0, "a block is open");
        &mut self.payload[self.made..]
    }

    /// The library has written this number of bytes.
    pub(super) fn add(&mut self, made: usize) {
        self.made += made;
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.payload[..self.made]
    }

    /// Appends a Huffman code. Its highest bit is first, unlike all other fields.
    fn code(&mut self, code: u32, bits: u32) -> Option<()> {
        self.put(u64::from(code.reverse_bits() >> (u32::BITS - bits)), bits)
    }

    fn put(&mut self, value: u64, bits: u32) -> Option<()> {
        self.bits |= value << self.held;
        self.held += bits;
        while self.held >= 8 {
            *self.payload.get_mut(self.made)? = (self.bits & 0xff) as u8;
            self.made += 1;
            self.bits >>= 8;
            self.held -= 8;
        }
        Some(())
    }

    fn fill_byte(&mut self) -> Option<()> {
        self.put(0, self.held.wrapping_neg() % 8)
    }
}

/// Types of a block that is not the last.
const STORED: u64 = 0b000;
const FIXED_CODES: u64 = 0b010;
const END_OF_BLOCK: u32 = 0;
const DISTANCE_ONE: u32 = 0;

#[cfg(test)]
mod tests {
    use flate2::{Decompress, FlushDecompress};

    use super::*;

    fn inflate(blocks: &Blocks, expected: usize) -> Vec<u8> {
        let mut made = vec![0; expected + 1];
        let mut stream = Decompress::new(false);
        stream.decompress(blocks.bytes(), &mut made, FlushDecompress::Sync).expect("valid");
        assert_eq!(stream.total_in(), blocks.bytes().len() as u64);
        made.truncate(usize::try_from(stream.total_out()).expect("small"));
        made
    }

    #[test]
    fn runs_of_every_byte_and_length_come_back() {
        for (length, byte) in (4..1100).chain([4096, 65_536]).zip((0..=255).cycle()) {
            let mut blocks = Blocks::new();
            blocks.run(byte, length).expect("room");
            blocks.run(!byte, length).expect("room");
            blocks.finish().expect("room");
            assert!(blocks.bytes().ends_with(&[0, 0, 0xff, 0xff]));
            assert_eq!(inflate(&blocks, 2 * length), [vec![byte; length], vec![!byte; length]].concat());
        }
    }

    #[test]
    fn bytes_of_every_length_come_back_as_they_are() {
        let bytes: Vec<u8> = (0..=250).cycle().take(200_000).collect();
        for length in [0, 1, 255, 4096, 65_534, 65_535, 65_536, 131_071, 200_000] {
            let mut blocks = Blocks::new();
            blocks.run(3, 70).expect("room");
            blocks.stored(&bytes[..length]).expect("room");
            blocks.finish().expect("room");
            assert_eq!(inflate(&blocks, 70 + length)[70..], bytes[..length]);
        }
    }

    #[test]
    fn bytes_that_do_not_fit_are_refused() {
        let mut blocks = Blocks::new();
        assert_eq!(blocks.stored(&vec![1; PAYLOAD_BYTES as usize]), None);
        let mut blocks = Blocks::new();
        blocks.stored(&vec![1; PAYLOAD_BYTES as usize - 5 * 17 - 10]).expect("room");
        assert_eq!(blocks.run(1, 1 << 16), None);
    }
}
