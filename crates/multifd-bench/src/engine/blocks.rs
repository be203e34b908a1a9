//! The blocks of RAM that a destination fills, and whether they hold what they should.

use multifd::ram::{Mapping, Memory, PageIndex, RamBlock, RamBlocks};
use qemu_stream::format::BlockList;

use super::RAM;
use crate::{
    Result,
    contents::{Contents, PAGE},
};

/// These blocks in fresh memory.
pub(super) fn fresh(list: &BlockList) -> multifd::Result<RamBlocks> {
    let blocks = list.entries().iter().map(|entry| {
        let memory = Mapping::anonymous(entry.used_length);
        let memory = memory.map_err(|error| multifd::Error::io("map the guest's memory", error))?;
        RamBlock::new(entry.name.clone(), entry.used_length, list.page_size(), Memory::Mapped(memory))
    });
    RamBlocks::new(blocks.collect::<multifd::Result<_>>()?)
}

/// The first page that does not hold what it should.
pub(super) fn wrong(blocks: &RamBlocks, contents: Contents) -> Result<Option<u64>> {
    let index = blocks.find(RAM.as_bytes()).ok_or("no block of RAM")?;
    let block = blocks.block(index)?;
    let mut page = [0; PAGE];
    for index in 0..block.pages() {
        block.slice(PageIndex(index), 1).ok_or("a page")?.copy_to(&mut page);
        if contents.wrong(index, &page).is_some() {
            return Ok(Some(index));
        }
    }
    Ok(None)
}
