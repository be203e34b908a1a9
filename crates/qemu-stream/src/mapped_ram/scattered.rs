//! Pages of a machine that are in a stream, in the order in which they were sent.

use std::{fs::File, sync::Arc};

use multifd::ram::{BlockIndex, PageBitmap, PagePositions, Places};

/// The pages that are in one stream.
#[derive(Debug)]
pub(crate) struct Scattered {
    file: Arc<File>,
    /// For each block.
    positions: Vec<Arc<PagePositions>>,
}

impl Scattered {
    /// Of the stream in this file. `positions` has those of the pages of each block.
    pub(crate) fn new(file: Arc<File>, positions: Vec<PagePositions>) -> Self {
        Self { file, positions: positions.into_iter().map(Arc::new).collect() }
    }

    /// The file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Which of the `pages` pages of a block are there.
    pub(super) fn present(&self, block: BlockIndex, pages: u64) -> Option<PageBitmap> {
        Some(self.positions.get(block.0)?.present(pages))
    }

    /// Where the pages of a block of `pages` pages are.
    pub(super) fn places(&self, block: BlockIndex, pages: u64) -> Option<Places> {
        let positions = self.positions.get(block.0)?;
        Some(Places::scattered(self.file.clone(), pages, positions.clone()))
    }
}
