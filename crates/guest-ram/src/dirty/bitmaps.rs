//! Dirty bits that writers set themselves, and the log of a guest that does not run.

use std::{io, sync::Arc};

use super::{DirtyLog, DirtyPages, sole_reader::SoleReader};
use crate::{BlockIndex, Identity, PageBitmap, PageIndex, RamBlocks};

/// Dirty bits that writers set themselves: code that writes to guest memory marks the page. The bits live as long as
/// the machine; a migration reads them through a [`reader`](DirtyBitmaps::reader).
///
/// Clones share their bits. Mark a page *after* writing to it.
#[derive(Clone, Debug)]
pub struct DirtyBitmaps(Arc<Bitmaps>);

#[derive(Debug)]
struct Bitmaps {
    of: Identity,
    blocks: Box<[PageBitmap]>,
}

impl DirtyBitmaps {
    /// Creates clear bits for all pages of `blocks`.
    pub fn new(blocks: &RamBlocks) -> Self {
        let bitmaps = blocks.iter().map(|(_, block)| PageBitmap::new(block.pages())).collect();
        Self(Arc::new(Bitmaps { of: blocks.identity(), blocks: bitmaps }))
    }

    /// Marks a page as written.
    ///
    /// # Panics
    /// If there is no such block or page.
    pub fn mark(&self, block: BlockIndex, page: PageIndex) {
        self.0.blocks[block.0].set(page);
    }

    /// Whether a page is marked.
    pub fn is_marked(&self, block: BlockIndex, page: PageIndex) -> bool {
        self.0.blocks.get(block.0).is_some_and(|bits| bits.contains(page))
    }

    /// The number of marked pages of a block; 0 if there is no such block.
    pub fn count(&self, block: BlockIndex) -> u64 {
        self.0.blocks.get(block.0).map_or(0, PageBitmap::count)
    }

    /// Creates the dirty log for one migration or capture.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] while another reader exists.
    pub fn reader(&self) -> io::Result<DirtyReader> {
        let turn = SoleReader::of(Arc::as_ptr(&self.0).addr())?;
        Ok(DirtyReader { bitmaps: self.clone(), _sole_reader: turn })
    }
}

/// The only reader of [`DirtyBitmaps`], until it is dropped.
#[derive(Debug)]
pub struct DirtyReader {
    bitmaps: DirtyBitmaps,
    _sole_reader: SoleReader,
}

impl DirtyLog for DirtyReader {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        self.bitmaps.0.of.check(blocks)
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        into.take_from(&self.bitmaps.0.blocks[block.0]);
        Ok(())
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        self.bitmaps.0.blocks[block.0].merge(from.words());
    }
}

/// The dirty log of a guest that does not run: no page is ever dirty.
#[derive(Clone, Copy, Debug, Default)]
pub struct NeverDirty;

impl DirtyLog for NeverDirty {
    fn begin(&mut self, _blocks: &RamBlocks) -> io::Result<()> {
        Ok(())
    }

    fn take(&mut self, _block: BlockIndex, _into: &mut DirtyPages<'_>) -> io::Result<()> {
        Ok(())
    }

    fn put_back(&mut self, _block: BlockIndex, _from: &PageBitmap) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockName, Mapping, Memory, PageSize, RamBlock};

    fn blocks(names: &[&str]) -> RamBlocks {
        let block = |name: &&str| {
            let memory = Memory::Mapped(Mapping::anonymous(16 << 12).expect("memory"));
            RamBlock::new(BlockName::new(*name).expect("a name"), 16 << 12, PageSize::KIB_4, memory)
        };
        RamBlocks::new(names.iter().map(|name| block(name).expect("a block")).collect()).expect("distinct")
    }

    #[test]
    fn two_readers_at_once_are_refused() {
        let bits = DirtyBitmaps::new(&blocks(&["a"]));
        let reader = bits.reader().expect("the first");
        assert_eq!(bits.clone().reader().expect_err("the second").kind(), io::ErrorKind::ResourceBusy);
        drop(reader);
        bits.reader().expect("after the first");
    }

    #[test]
    fn bits_of_other_blocks_are_refused_even_if_they_look_alike() {
        let (one, other) = (blocks(&["a", "b"]), blocks(&["a", "b"]));
        let mut reader = DirtyBitmaps::new(&one).reader().expect("alone");
        reader.begin(&one).expect("these");
        for wrong in [other, blocks(&["b", "a"]), blocks(&["a"])] {
            let refused = reader.begin(&wrong).expect_err("refused").to_string();
            assert!(
                refused.starts_with("created for other blocks than those of the migration: "),
                "{refused}"
            );
        }
    }
}
