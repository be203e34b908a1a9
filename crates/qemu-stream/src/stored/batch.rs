//! Collects neighbouring pages of one block, and writes them to their places with one call; or records where they are, if they can
//! be read again.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use multifd::ram::{BlockIndex, PageIndex, PagePositions, RamBlocks};

use super::pages::Pages;

/// Pages that were read from a stream and are not yet in the scratch file.
pub(super) struct Batch<'a> {
    blocks: &'a RamBlocks,
    pages: Pages,
    bytes: Vec<u8>,
    block: BlockIndex,
    first: PageIndex,
    count: u64,
    found: Option<Found>,
}

/// Pages that stay where they are.
struct Found {
    file: Arc<File>,
    /// For each block.
    positions: Vec<PagePositions>,
}

impl<'a> Batch<'a> {
    pub(super) fn new(blocks: &'a RamBlocks, pages: Pages) -> Self {
        let bytes = Vec::with_capacity(if pages == Pages::Keep { BATCH } else { 0 });
        Self { blocks, pages, bytes, block: BlockIndex(0), first: PageIndex(0), count: 0, found: None }
    }

    /// Records where pages are in `file`, and collects none.
    pub(super) fn staying_in(mut self, file: Arc<File>) -> Self {
        let positions = self.blocks.iter().map(|_| PagePositions::new()).collect();
        self.found = Some(Found { file, positions });
        self
    }

    /// Adds a page that begins at `position` of the file in which pages stay.
    pub(super) fn page_at(&mut self, block: BlockIndex, page: PageIndex, position: u64) {
        let Some(of) = self.blocks.get(block) else { return };
        match self.positions(block) {
            Some(positions) => {
                // What an earlier change of it has left in the scratch file.
                if of.is_present(page) {
                    of.clear(page);
                }
                positions.set(page, position);
            }
            None => of.note_written(page, 1),
        }
    }

    /// Where the pages of each block are in the file in which they stay.
    pub(super) fn into_positions(self) -> Vec<PagePositions> {
        self.found.map(|found| found.positions).unwrap_or_default()
    }

    /// Where the pages of a block are, if they stay.
    fn positions(&mut self, block: BlockIndex) -> Option<&mut PagePositions> {
        self.found.as_mut()?.positions.get_mut(block.0)
    }

    /// The blocks of the scratch file.
    pub(super) fn blocks(&self) -> &'a RamBlocks {
        self.blocks
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
        if let Some(positions) = self.positions(block) {
            positions.clear(page);
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
                let found = self.found.as_mut().and_then(|found| {
                    let positions = found.positions.get_mut(block.0)?;
                    Some((&found.file, positions.get(page)?, positions))
                });
                match found {
                    Some((file, position, positions)) => {
                        file.read_exact_at(&mut bytes, position)?;
                        // It is in the scratch file from here on.
                        positions.clear(page);
                    }
                    None => of.load(page, &mut bytes)?,
                }
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
