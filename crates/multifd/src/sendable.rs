//! Checks that the pages of blocks can be sent.

use crate::{
    error::{Result, Usage},
    ram::{Memory, RamBlock, RamBlocks},
};

/// Refuses blocks that end inside a page: the wire carries only whole pages.
///
/// # Errors
/// [`Usage::PartialPage`] for the first block that ends inside a page.
pub(crate) fn check_whole_pages(blocks: &RamBlocks) -> Result<()> {
    for (_, block) in blocks.iter() {
        let (name, used_length, page_size) = (block.name(), block.used_length(), block.page_size());
        if used_length % page_size.bytes() as u64 != 0 {
            return Err(Usage::PartialPage { name: name.clone(), used_length, page_size }.into());
        }
    }
    Ok(())
}

/// Refuses memory that may shrink: reading or copying it may end the process.
///
/// # Errors
/// [`Usage::MayShrink`] for the first such block that is sent.
pub(crate) fn check_may_be_copied(blocks: &RamBlocks) -> Result<()> {
    let may_shrink = |block: &RamBlock| {
        !block.is_ignored() && matches!(block.memory(), Memory::Mapped(mapping) if mapping.may_shrink())
    };
    match blocks.iter().find(|(_, block)| may_shrink(block)) {
        Some((_, block)) => Err(Usage::MayShrink(block.name().clone()).into()),
        None => Ok(()),
    }
}
