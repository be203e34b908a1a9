//! The RAM of a machine that comes in, no larger than a bound.

use multifd::{
    Error,
    ram::{Mapping, Memory, RamBlock, RamBlocks},
};
use qemu_stream::format::BlockList;

const MOST_RAM: u64 = 1 << 20;

/// Fresh memory for the blocks that a source has announced.
pub(crate) fn blocks(list: &BlockList) -> Result<RamBlocks, Error> {
    if list.total() > MOST_RAM {
        return Err(Error::other("make the blocks", "more RAM than this target gives"));
    }
    let blocks = list.entries().iter().map(|entry| {
        let memory = Mapping::anonymous(entry.used_length).map_err(|error| Error::io("map", error))?;
        RamBlock::new(entry.name.clone(), entry.used_length, list.page_size(), Memory::Mapped(memory))
    });
    RamBlocks::new(blocks.collect::<Result<_, Error>>()?)
}
