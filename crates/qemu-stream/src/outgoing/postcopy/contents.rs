//! What a source of post-copy sends, and the numbers of it: everything that outlives a set of connections.

use std::sync::Arc;

use multifd::{
    postcopy::Shape,
    ram::{BlockIndex, PageBitmap, PageIndex, RamBlock, RamBlocks},
};

use super::{control::PostcopyControl, opening::Machine, options::PostcopyOptions, progress::Counts};
use crate::{
    error::Usage,
    format::{BlockEntry, BlockList, DevicePart},
    outgoing::options::Options,
};

/// A machine, its memory, and what was found out about it.
pub(super) struct Contents {
    pub(super) machine: Machine,
    pub(super) blocks: Arc<RamBlocks>,
    pub(super) options: PostcopyOptions,
    /// Pages that are sent before the guest starts.
    pub(super) first: Vec<PageBitmap>,
    /// Pages that the destination has requested, over all connections.
    pub(super) requested: Vec<PageBitmap>,
    pub(super) counts: Arc<Counts>,
    pub(super) control: PostcopyControl,
    /// The destination always sends SHUT, as far as it is known.
    pub(super) always_speaks: bool,
    /// The destination has confirmed that it runs the guest, or is taken to.
    pub(super) is_confirmed: bool,
}

impl Contents {
    pub(super) fn new(
        stream: Options,
        list: &BlockList,
        devices: DevicePart,
        blocks: Arc<RamBlocks>,
        options: PostcopyOptions,
    ) -> Result<Self, Usage> {
        let listed = list.entries().iter().map(|entry| (&entry.name, entry.used_length));
        if !blocks.iter().map(|(_, block)| (block.name(), block.used_length())).eq(listed) {
            return Err(Usage::Blocks("they differ from those of the machine".into()));
        }
        let machine = Machine::new(stream, options.list(list)?, devices)?;
        Ok(Self::of_machine(machine, blocks, options))
    }

    /// The contents of a machine whose block list has the host page sizes.
    pub(super) fn of_machine(machine: Machine, blocks: Arc<RamBlocks>, options: PostcopyOptions) -> Self {
        let none = || blocks.iter().map(|(_, block)| PageBitmap::new(block.pages())).collect();
        let (first, requested, counts) = (none(), none(), Arc::new(Counts::new()));
        let control = PostcopyControl::new(options.walk_limit);
        let (always_speaks, is_confirmed) = (false, true);
        Self { machine, first, requested, blocks, options, counts, control, always_speaks, is_confirmed }
    }

    /// Adds pages to those that are sent before the guest starts: whole host pages.
    pub(super) fn send_first(&self, block: BlockIndex, pages: &PageBitmap) {
        let Some((into, shape)) = self.first.get(block.0).zip(self.shape(block)) else { return };
        for (first, count) in pages.set_runs().filter(|(first, _)| first.0 < shape.pages) {
            let (first, count) = shape.whole(first.0, count);
            into.set_run(PageIndex(first), count);
        }
    }

    /// Blocks whose pages are sent.
    pub(super) fn sent(&self) -> impl Iterator<Item = (BlockIndex, &RamBlock, &BlockEntry)> {
        let blocks = self.blocks.iter().zip(self.machine.blocks().entries());
        let blocks = blocks.map(|((index, block), entry)| (index, block, entry));
        blocks.filter(|(_, block, _)| !block.is_ignored() && block.pages() > 0)
    }

    pub(super) fn shapes(&self) -> Vec<Shape> {
        self.blocks.iter().filter_map(|(index, _)| self.shape(index)).collect()
    }

    pub(super) fn shape(&self, block: BlockIndex) -> Option<Shape> {
        let (entry, pages) = (self.machine.blocks().entry(block)?, self.blocks.get(block)?.pages());
        Some(Shape { pages, host_page: self.options.host_page(entry, self.machine.page_size()) })
    }
}
