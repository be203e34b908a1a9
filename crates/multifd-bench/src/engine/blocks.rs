//! The blocks of RAM that a destination fills, and the check of their contents.

use multifd::ram::{PageIndex, RamBlocks};

use super::RAM;
use crate::{
    Result,
    contents::{Contents, PAGE},
};

/// The first page with wrong contents.
pub(super) fn wrong(blocks: &RamBlocks, contents: Contents) -> Result<Option<u64>> {
    let index = blocks.find(RAM.as_bytes()).ok_or("there is no RAM block")?;
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
