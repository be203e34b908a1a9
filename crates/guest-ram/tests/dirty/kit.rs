//! Blocks for tests.

use std::sync::Arc;

use guest_ram::{BlockName, Mapping, Memory, PageSize, RamBlock, RamBlocks};

pub(crate) fn name(text: &str) -> BlockName {
    BlockName::new(text).expect("a name")
}

/// Blocks of these lengths in new memory.
pub(crate) fn fresh(page_size: PageSize, blocks: &[(&str, u64)]) -> Arc<RamBlocks> {
    let made = blocks.iter().map(|(text, length)| {
        let memory = Memory::Mapped(Mapping::anonymous(*length).expect("memory"));
        RamBlock::new(name(text), *length, page_size, memory).expect("a block")
    });
    Arc::new(RamBlocks::new(made.collect()).expect("distinct"))
}
