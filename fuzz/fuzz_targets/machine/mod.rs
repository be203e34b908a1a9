//! The RAM of a machine that comes in, no larger than a bound.

use multifd::{Error, ram::RamBlocks};
use qemu_stream::format::BlockList;

const MOST_RAM: u64 = 1 << 20;

/// Fresh memory for the blocks that a source has announced.
pub(crate) fn blocks(list: &BlockList) -> Result<RamBlocks, Error> {
    if list.total() > MOST_RAM {
        return Err(Error::other("make the blocks", "more RAM than this target gives"));
    }
    list.in_new_memory()
}
