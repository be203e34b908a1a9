//! Collects neighbouring pages of one block, and writes them to their places with one call.

use std::io;

use multifd::ram::{BlockIndex, PageIndex, RamBlocks};

use super::pages::Pages;

/// Pages that were read from a stream and are not yet in the scratch file.
pub(super) struct Batch<'a> {
    blocks: &'a RamBlocks,
    pages: Pages,
    bytes: Vec<u8>,
    block: BlockIndex,
    first: PageIndex,
    count: u64,
}

impl<'a> Batch<'a> {
    pub(super) fn new(blocks: &'a RamBlocks, pages: Pages) -> Self {
        let bytes = Vec::with_capacity(if pages == Pages::Keep { BATCH } else { 0 });
        Self { blocks, pages, bytes, block: BlockIndex(0), first: PageIndex(0), count: 0 }
    }

    /// Adds a page. Pages that are not its neighbours are written first.
    pub(super) fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> io::Result<()> {
        let follows = block == self.block && self.first.0.checked_add(self.count) == Some(page.0);
        if !follows || self.bytes.len() + bytes.len() > BATCH {
            self.flush()?;
            (self.block, self.first) = (block, page);
        }
        if self.pages == Pages::Keep {
            self.bytes.extend_from_slice(bytes);
        }
        self.count += 1;
        Ok(())
    }

    /// The page is zero.
    pub(super) fn zero(&mut self, block: BlockIndex, page: PageIndex) -> io::Result<()> {
        self.flush()?;
        if let Some(block) = self.blocks.get(block) {
            block.clear(page);
        }
        Ok(())
    }

    /// Changes a page that was read before. `change` gets its contents.
    pub(super) fn change<E: From<io::Error>>(
        &mut self,
        block: BlockIndex,
        page: PageIndex,
        change: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.flush()?;
        let Some(of) = self.blocks.get(block) else { return Ok(()) };
        match self.pages {
            // What it changes is not known, but whether it is a change of a page.
            Pages::Count => {
                change(&mut vec![0; of.page_size().bytes()])?;
                of.note_written(page, 1);
            }
            Pages::Keep => {
                let mut bytes = vec![0; of.page_size().bytes()];
                of.load(page, &mut bytes)?;
                change(&mut bytes)?;
                of.store(page, &bytes)?;
            }
        }
        Ok(())
    }

    /// Writes what was collected.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let (count, block) = (std::mem::take(&mut self.count), self.blocks.get(self.block));
        if let Some(block) = block.filter(|_| count > 0) {
            match self.pages {
                Pages::Keep => block.store(self.first, &self.bytes)?,
                Pages::Count => block.note_written(self.first, count),
            }
        }
        self.bytes.clear();
        Ok(())
    }
}

/// Bytes that are written with one call.
const BATCH: usize = 1 << 20;
