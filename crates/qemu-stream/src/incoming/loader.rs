//! The engine's receiver as the destination of a main stream.
//!
//! Main's records become calls on a [`Receiver`]: the page size before the first packet, the blocks before the first
//! page, every sync point, the end of RAM. What the blocks are made of is the caller's: memory, or a file.

use std::sync::Arc;

use multifd::{
    Error, Receiver, Result,
    error::Usage,
    ram::{PageIndex, RamBlock, RamBlocks},
};

use super::Destination;
use crate::format::{BlockIndex, BlockList, Configuration};

/// Takes a machine in through a [`Receiver`].
pub struct Loader<'a, F> {
    receiver: &'a Receiver,
    make: F,
    configuration: Option<Configuration>,
    blocks: Option<Arc<RamBlocks>>,
    pages: MainPages,
}

/// Pages that came over main: all pages of a source with multifd off, zero pages of many others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MainPages {
    /// Pages whose bytes came.
    pub normal: u64,
    /// Pages that are zero.
    pub zero: u64,
}

impl<'a, F> Loader<'a, F>
where
    F: FnMut(Option<&Configuration>, &BlockList) -> Result<RamBlocks>,
{
    /// A loader whose blocks are made by `make`, once the source has announced them. It may refuse the machine.
    pub fn new(receiver: &'a Receiver, make: F) -> Self {
        Self { receiver, make, configuration: None, blocks: None, pages: MainPages::default() }
    }

    /// The pages that came over main so far.
    pub fn main_pages(&self) -> MainPages {
        self.pages
    }

    /// The blocks, once they are known.
    pub fn into_blocks(self) -> Option<Arc<RamBlocks>> {
        self.blocks
    }

    fn block(&self, block: BlockIndex) -> Result<&RamBlock> {
        let blocks = self.blocks.as_ref().ok_or(Usage::TooEarly("the block list"))?;
        blocks.block(block)
    }
}

impl<F> Destination for Loader<'_, F>
where
    F: FnMut(Option<&Configuration>, &BlockList) -> Result<RamBlocks>,
{
    type Error = Error;

    fn configuration(&mut self, configuration: Option<&Configuration>) -> Result<()> {
        self.configuration = configuration.cloned();
        if configuration.is_some_and(|configuration| configuration.machine.has_exact_packet_nums()) {
            self.receiver.expect_exact_packet_nums();
        }
        self.receiver.set_page_size(configuration.map(Configuration::page_size).unwrap_or_default())
    }

    fn channels(&mut self, channels: u8) -> Result<()> {
        self.receiver.expect_channels(channels)?;
        self.receiver.expect_exact_packet_nums();
        Ok(())
    }

    fn multifd(&mut self) -> Result<()> {
        self.receiver.expect_any_channels();
        Ok(())
    }

    fn blocks(&mut self, blocks: &BlockList) -> Result<()> {
        let blocks = Arc::new((self.make)(self.configuration.as_ref(), blocks)?);
        self.blocks = Some(blocks.clone());
        self.receiver.set_blocks(blocks)
    }

    fn sync(&mut self) -> Result<()> {
        self.receiver.sync()
    }

    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.block(block)?.clear(page);
        self.pages.zero += 1;
        Ok(())
    }

    fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<()> {
        let block = self.block(block)?;
        block
            .store(page, bytes)
            .map_err(|error| Error::io(format!("write {}", place(block, page)), error))?;
        self.pages.normal += 1;
        Ok(())
    }

    fn read_page(&mut self, block: BlockIndex, page: PageIndex, into: &mut [u8]) -> Result<()> {
        let block = self.block(block)?;
        block.load(page, into).map_err(|error| Error::io(format!("read {}", place(block, page)), error))
    }

    fn end_of_ram(&mut self) -> Result<()> {
        self.receiver.seal()
    }
}

/// Of a page, to be told.
fn place(block: &RamBlock, page: PageIndex) -> String {
    let offset = block.page_size().bytes() as u64 * page.0;
    format!("block {:?} at offset {offset:#x}", block.name())
}
