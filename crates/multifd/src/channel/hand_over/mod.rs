//! Hands guest memory to another process of this host, without a copy: its descriptors come before the main stream.
//!
//! ```text
//! HandOver (Connect) ── packet with descriptors, then the main stream ──▶ HandOverListener (Listen) ──▶ main
//!                                                                                └──▶ HandedOver ──▶ files to map
//! ```
//!
//! The blocks that are handed over are [ignored](crate::ram::RamBlock::ignored) on both sides: none of their pages is sent. All
//! others are sent over main; there are no channels. The source has the guest until it has read the destination's confirmation, so the
//! destination must not write to the memory before it has confirmed, and the source must not after it.

mod incoming;
mod outgoing;
mod packet;

use std::{fs::File, io};

pub use incoming::{HandOverListener, HandedOver};
pub use outgoing::HandOver;

use crate::ram::{Access, BlockName, Mapping};

/// The memory of one block, as a part of a file: a memfd, or a file on tmpfs or of huge pages.
#[derive(Debug)]
pub struct SharedMemory {
    /// The block.
    pub block: BlockName,
    /// The file. It is mapped shared.
    pub file: File,
    /// The offset of the block's first byte in the file, in bytes.
    pub offset: u64,
    /// The length of the block in bytes.
    pub length: u64,
}

impl SharedMemory {
    /// Maps the memory.
    ///
    /// # Errors
    /// As [`Mapping::of_file`].
    pub fn map(&self) -> io::Result<Mapping> {
        Mapping::of_file(&self.file, self.offset, self.length, Access::ReadWrite)
    }
}
