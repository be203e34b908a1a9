//! Where dirty pages come from: the log that a pass takes its bits from.

use std::{io, sync::Arc};

use super::{BlockIndex, Identity, PageBitmap, PageIndex, RamBlocks, turn::Turn};

/// The log of pages that the guest has written.
///
/// A migration sends every page once and from then on those that the log names. It asks with the guest running
/// before every pass, and once more after the guest has stopped.
///
/// A log that costs the guest something, as the kernel's do, starts when it is made and ends with its drop: make it for
/// one migration, before that runs. What was written before it was made is sent by the first pass.
///
/// An error of a call, or a panic in one, ends the migration as any other error does: the guest goes on at the source.
pub trait DirtyLog {
    /// A migration of `blocks` begins. Called once, before the first [`take`](DirtyLog::take), with the guest running.
    ///
    /// # Errors
    /// If the log is of other blocks, or somebody else reads it; the migration then fails.
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()>;

    /// The *bitmap sync*: adds to `into` all pages of `block` written since they were last taken, and forgets them in the
    /// same step. A write that happens meanwhile must be found now or the next time.
    ///
    /// # Errors
    /// If the log cannot be read; the migration then fails.
    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()>;

    /// Puts bits back that were taken and whose pages no destination has: the migration failed or was cancelled. Called after
    /// an error of [`take`](DirtyLog::take), too.
    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap);
}

/// Pages of one block that a [`DirtyLog`] has found. Pages can be added to it and not taken out: most are there already
/// when a log is asked for the first time.
#[derive(Debug)]
pub struct DirtyPages<'a>(&'a PageBitmap);

impl<'a> DirtyPages<'a> {
    /// Pages are added to `pages`.
    pub fn new(pages: &'a PageBitmap) -> Self {
        Self(pages)
    }

    /// The number of pages of the block.
    pub fn pages(&self) -> u64 {
        self.0.pages()
    }

    /// Adds a page.
    ///
    /// # Panics
    /// If the block has no such page.
    pub fn add(&mut self, page: PageIndex) {
        self.0.set(page);
    }

    /// Adds `count` pages from `first` on.
    ///
    /// # Panics
    /// If the block has no such pages.
    pub fn add_run(&mut self, first: PageIndex, count: u64) {
        self.0.set_run(first, count);
    }

    /// Adds the pages whose bits are set in `words`, from the first page on, least significant bit first. Bits beyond the
    /// last page are ignored.
    pub fn add_words(&mut self, words: impl IntoIterator<Item = u64>) {
        self.0.merge(words);
    }

    /// Takes all bits out of `from` and adds their pages.
    ///
    /// # Panics
    /// If it is of another number of pages.
    pub fn take_from(&mut self, from: &PageBitmap) {
        from.take(self.0);
    }

    #[cfg(any(feature = "kvm", feature = "vm-memory", feature = "pagemap"))]
    pub(super) fn bits(&self) -> &PageBitmap {
        self.0
    }
}

impl<L: DirtyLog + ?Sized> DirtyLog for &mut L {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        (**self).begin(blocks)
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        (**self).take(block, into)
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        (**self).put_back(block, from);
    }
}

impl<L: DirtyLog + ?Sized> DirtyLog for Box<L> {
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        (**self).begin(blocks)
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        (**self).take(block, into)
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        (**self).put_back(block, from);
    }
}

/// Bits that the writers themselves keep: whoever writes to guest memory marks the page. They last as long as the machine;
/// a migration reads them through a [`reader`](DirtyBitmaps::reader).
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
    /// Clear bits for all pages of `blocks`.
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

    /// How many pages of a block are marked; 0 if there is no such block.
    pub fn count(&self, block: BlockIndex) -> u64 {
        self.0.blocks.get(block.0).map_or(0, PageBitmap::count)
    }

    /// The dirty log of one migration or capture.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] while another reader lives.
    pub fn reader(&self) -> io::Result<DirtyReader> {
        let turn = Turn::take(Arc::as_ptr(&self.0).addr())?;
        Ok(DirtyReader { bitmaps: self.clone(), _turn: turn })
    }
}

/// Reads [`DirtyBitmaps`], alone, until dropped.
#[derive(Debug)]
pub struct DirtyReader {
    bitmaps: DirtyBitmaps,
    _turn: Turn,
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

/// The dirty log of a guest that does not run: nothing is ever written.
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
    use crate::ram::{BlockName, Mapping, Memory, PageSize, RamBlock};

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
            assert!(refused.starts_with("made for other blocks than the migration's: "), "{refused}");
        }
    }
}
