//! Guest-physical addresses, pieces of blocks at them, and why there is no map of them.

use std::fmt;

use multifd::ram::{BlockIndex, BlockName, BlockOffset};

/// A guest-physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PhysicalAddress(pub u64);

impl fmt::Display for PhysicalAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A piece of a block at a guest-physical address. It is never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhysicalRange {
    /// Its first address.
    pub start: PhysicalAddress,
    /// Its length in bytes.
    pub length: u64,
    /// The block.
    pub block: BlockIndex,
    /// Where the piece begins in the block.
    pub offset: BlockOffset,
}

impl PhysicalRange {
    /// The address of its last byte.
    pub fn last(&self) -> PhysicalAddress {
        PhysicalAddress(self.start.0 + (self.length - 1))
    }
}

/// Why a machine has no map of its memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadPlace {
    /// The machine type is not known, and no block has an address.
    #[error(
        "the guest-physical addresses of machine type {0} are not known: give the address of each block of RAM"
    )]
    Machine(String),
    /// Several blocks could be RAM, and nothing shows their order.
    #[error(
        "RAM is in several blocks ({0}), and nothing shows their order: give the address of each of them"
    )]
    Order(String),
    /// The machine type has its RAM in a block that is not there.
    #[error("no block is RAM of {machine}: give the address of each block of RAM")]
    NoRam {
        /// The machine type.
        machine: String,
    },
    /// On some hosts, RAM of this size is elsewhere.
    #[error(
        "RAM of {0:#x} bytes may be above 1 TiB on hosts with AMD processors: give the address of each block of RAM"
    )]
    Huge(u64),
    /// There is no such block.
    #[error("no block is called {0:?}")]
    NoSuchBlock(BlockName),
    /// A piece is empty, leaves its block, or leaves the address space.
    #[error(
        "{start}: a piece of {length:#x} bytes at offset {offset} is not in block {block:?} of {used_length:#x} bytes"
    )]
    Outside {
        /// The address.
        start: PhysicalAddress,
        /// The length of the piece.
        length: u64,
        /// Where the piece begins in the block.
        offset: BlockOffset,
        /// The block.
        block: BlockName,
        /// The length of the block.
        used_length: u64,
    },
    /// Two pieces are at the same address.
    #[error("{0}: two blocks are at this address")]
    Overlap(PhysicalAddress),
    /// A piece does not consist of whole pages.
    #[error("{0}: a piece does not begin or end with a page")]
    Unaligned(PhysicalAddress),
}
