//! What a file consists of, from its beginning to its end.

use qemu_stream::physical::PhysicalRange;

/// The pieces of a file, one after the other.
#[derive(Default)]
pub(super) struct Plan<'a> {
    /// Each with its position.
    pieces: Vec<(u64, Piece<'a>)>,
    length: u64,
}

/// A piece of a file.
pub(super) enum Piece<'a> {
    Bytes(Vec<u8>),
    Zeros(u64),
    Memory(PhysicalRange),
    /// The present pages of a range, without those between them: this number of bytes.
    Packed(PhysicalRange, u64),
    /// Entries of a table that is too long to be in memory.
    Table(Box<dyn Table + 'a>),
}

/// A table that is made while it is written.
pub(super) trait Table: Sync {
    /// Its length in bytes.
    fn length(&self) -> u64;
    /// Calls `write` with all of it, piece after piece.
    fn make(&self, write: &mut dyn FnMut(&[u8]) -> std::io::Result<()>) -> std::io::Result<()>;
}

impl<'a> Plan<'a> {
    /// Appends a piece.
    pub(super) fn push(&mut self, piece: Piece<'a>) {
        let length = piece.length();
        if length > 0 {
            self.pieces.push((self.length, piece));
            self.length += length;
        }
    }

    /// Appends zeros up to a multiple of `to`.
    pub(super) fn align(&mut self, to: u64) {
        self.push(Piece::Zeros(self.length.next_multiple_of(to) - self.length));
    }

    /// The length of the file.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// The pieces with their positions.
    pub(super) fn pieces(&self) -> &[(u64, Piece<'a>)] {
        &self.pieces
    }
}

impl Piece<'_> {
    fn length(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Zeros(length) | Self::Packed(_, length) => *length,
            Self::Memory(range) => range.length,
            Self::Table(table) => table.length(),
        }
    }
}
