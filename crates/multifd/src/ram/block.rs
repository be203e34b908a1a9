//! RAM blocks and their registry.
//!
//! A block is a name, a used length, a page size and the memory behind it. Both sides list the same blocks;
//! the source announces its list on the main stream, the destination looks every name up before it writes.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    BlockName, BlockOffset, DirectFile, GuestSlice, Mapping, PageBitmap, PageIndex, PageSize, cut::explained,
    file_size,
};
use crate::error::{Error, Result, Usage};

/// The place of a block in its [`RamBlocks`], from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub usize);

/// Where the bytes of a block live.
#[derive(Debug)]
pub enum Memory {
    /// In this process's address space. Pages are sent from it and received into it without a copy.
    Mapped(Mapping),
    /// In a file, from `offset` on. Pages pass through a private buffer, run by run. Zero pages are not looked for:
    /// they are those that are not [present](RamBlock::present).
    File {
        /// Shared by all blocks in it: positions are absolute.
        file: Arc<File>,
        /// How channels go past the page cache, if they do; main never does.
        direct: Option<Arc<DirectFile>>,
        /// Where the block's first byte lies.
        offset: u64,
    },
}

/// A block of guest RAM, or of a ROM or device memory that migrates like RAM.
#[derive(Debug)]
pub struct RamBlock {
    name: BlockName,
    used_length: u64,
    page_size: PageSize,
    memory: Memory,
    /// Pages that may hold something else than zero; all others are known to be zero.
    present: PageBitmap,
    /// Whether a page has been cleared. Orders nothing: read when nobody clears any more.
    cleared: AtomicBool,
    ignored: bool,
}

impl RamBlock {
    /// A block whose memory may hold anything: the blocks of a source, or of a destination that reuses memory.
    ///
    /// # Errors
    /// [`Usage::ShortMemory`] if a mapping is shorter than `used_length`.
    pub fn new(name: BlockName, used_length: u64, page_size: PageSize, memory: Memory) -> Result<Self> {
        let present = PageBitmap::full(page_size.whole_pages_in(used_length));
        Self::with_present(name, used_length, page_size, memory, present)
    }

    /// A block whose memory is all zero: the blocks of a destination with fresh memory. A zero page that
    /// arrives there is not written, so memory that stays zero stays untouched.
    ///
    /// # Errors
    /// As [`RamBlock::new`].
    pub fn fresh(name: BlockName, used_length: u64, page_size: PageSize, memory: Memory) -> Result<Self> {
        let present = PageBitmap::new(page_size.whole_pages_in(used_length));
        Self::with_present(name, used_length, page_size, memory, present)
    }

    /// A block of which only the pages in `present` hold something; the others count as zero, whatever
    /// bytes their memory has. That is what a mapped-ram file is.
    ///
    /// # Errors
    /// As [`RamBlock::new`].
    ///
    /// # Panics
    /// If `present` has another number of pages than the block.
    pub fn with_present(
        name: BlockName,
        used_length: u64,
        page_size: PageSize,
        memory: Memory,
        present: PageBitmap,
    ) -> Result<Self> {
        assert_eq!(present.pages(), page_size.whole_pages_in(used_length), "a bit for each page of {name:?}");
        if let Memory::Mapped(mapping) = &memory
            && mapping.len() < used_length
        {
            return Err(Usage::ShortMemory { name, mapped: mapping.len(), used_length }.into());
        }
        let cleared = AtomicBool::new(false);
        Ok(Self { name, used_length, page_size, memory, present, cleared, ignored: false })
    }

    /// The block, but none of its pages are sent: both sides share its memory (capability `x-ignore-shared`).
    #[must_use]
    pub fn ignored(mut self) -> Self {
        self.ignored = true;
        self
    }

    /// Whether its pages are not sent.
    pub fn is_ignored(&self) -> bool {
        self.ignored
    }

    /// Whether no page has come for a block that was [fresh](RamBlock::fresh), not even a zero one. To be asked
    /// when all of RAM is here.
    pub fn is_untouched(&self) -> bool {
        !self.cleared.load(Ordering::Relaxed) && self.present.words().all(|word| word == 0)
    }

    /// The name that both sides know it by.
    pub fn name(&self) -> &BlockName {
        &self.name
    }

    /// The length in bytes that is in use and migrates.
    pub fn used_length(&self) -> u64 {
        self.used_length
    }

    /// The size of its pages.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The number of its whole pages. A block smaller than a page has none.
    pub fn pages(&self) -> u64 {
        self.present.pages()
    }

    /// The pages that may hold something else than zero: all of them, or those received into fresh memory.
    pub fn present(&self) -> &PageBitmap {
        &self.present
    }

    /// Where its bytes live.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Where `page` starts; `None` if the block has no such page.
    pub fn offset_of(&self, page: PageIndex) -> Option<BlockOffset> {
        if page.0 < self.pages() { self.page_size.offset_of(page) } else { None }
    }

    /// Writes whole pages from `first` on, into memory or file, and notes that they hold something.
    ///
    /// # Errors
    /// If the file cannot be written.
    ///
    /// # Panics
    /// If `bytes` are no whole pages of this block.
    pub fn store(&self, first: PageIndex, bytes: &[u8]) -> io::Result<()> {
        self.write(first, bytes, None)
    }

    /// The same from a channel, past the page cache if the file is to be written so.
    pub(crate) fn store_direct(&self, first: PageIndex, bytes: &[u8]) -> io::Result<()> {
        let Memory::File { direct, .. } = &self.memory else { return self.store(first, bytes) };
        self.write(first, bytes, direct.as_deref())
    }

    fn write(&self, first: PageIndex, bytes: &[u8], direct: Option<&DirectFile>) -> io::Result<()> {
        let page_size = self.page_size.bytes();
        let count = (bytes.len() / page_size) as u64;
        let inside = first.0.checked_add(count).is_some_and(|end| end <= self.pages());
        assert!(bytes.len().is_multiple_of(page_size) && inside, "whole pages of the block");
        let start = self.page_size.offset_of(first).map_or(u64::MAX, |offset| offset.0);
        match &self.memory {
            Memory::Mapped(mapping) => {
                mapping.slice(start, bytes.len()).expect("the mapping covers the block").copy_from(bytes);
            }
            Memory::File { file, offset, .. } => file_size::held(|| match direct {
                Some(direct) => direct.write_all_at(file, bytes, offset + start),
                None => file.write_all_at(bytes, offset + start),
            })?,
        }
        self.present.set_run(first, count);
        Ok(())
    }

    /// Reads a page, from memory or file, into a private buffer. One that is not
    /// [present](RamBlock::present) is zero.
    ///
    /// # Errors
    /// If the file cannot be read.
    ///
    /// # Panics
    /// If the block has no such page, or `buffer` is not a page long.
    pub fn load(&self, page: PageIndex, buffer: &mut [u8]) -> io::Result<()> {
        let start = self.offset_of(page).expect("a page of the block").0;
        assert_eq!(buffer.len(), self.page_size.bytes(), "a page's buffer");
        if !self.present.contains(page) {
            buffer.fill(0);
            return Ok(());
        }
        match &self.memory {
            Memory::Mapped(mapping) => {
                mapping.slice(start, buffer.len()).expect("the mapping covers the block").copy_to(buffer);
                Ok(())
            }
            Memory::File { file, offset, .. } => {
                file.read_exact_at(buffer, offset + start).map_err(explained)
            }
        }
    }

    /// Reads `count` pages of a file from `first` on, past the page cache if the file is to be read so. Pages that are
    /// not [present](RamBlock::present) are zero.
    ///
    /// # Panics
    /// If the block has no such pages or is not in a file, or `buffer` has another length.
    pub(crate) fn load_direct(&self, first: PageIndex, count: u64, buffer: &mut [u8]) -> io::Result<()> {
        let Memory::File { file, direct, offset } = &self.memory else { panic!("a block in a file") };
        let page_size = self.page_size.bytes();
        let inside = first.0.checked_add(count).is_some_and(|end| end <= self.pages());
        assert!(inside && buffer.len() as u64 == count * page_size as u64, "pages of the block");
        let start = self.page_size.offset_of(first).map_or(u64::MAX, |offset| offset.0);
        let read = match direct {
            Some(direct) => direct.read_exact_at(file, buffer, offset + start),
            None => file.read_exact_at(buffer, offset + start),
        };
        read.map_err(explained)?;
        for (page, bytes) in (first.0..).map(PageIndex).zip(buffer.chunks_mut(page_size)) {
            if !self.present.contains(page) {
                bytes.fill(0);
            }
        }
        Ok(())
    }

    /// Makes a page zero. Memory is looked at only if the page may hold something else, and written only if it
    /// does; in a file, the page is no longer [present](RamBlock::present) and its bytes stay.
    ///
    /// # Panics
    /// If the block has no such page.
    pub fn clear(&self, page: PageIndex) {
        // Looked at first, so that channels do not take the line from each other.
        if !self.cleared.load(Ordering::Relaxed) {
            self.cleared.store(true, Ordering::Relaxed);
        }
        if self.present.clear(page)
            && let Some(slice) = self.slice(page, 1)
            && !slice.is_zero()
        {
            slice.clear();
        }
    }

    /// Whether a page is zero, found by looking at it. A wrong answer because the guest writes meanwhile is harmless, for
    /// the page is then dirty again. One in a file is not looked at: what the file knows of it stands in
    /// [`present`](RamBlock::present).
    pub(crate) fn is_zero(&self, page: PageIndex) -> bool {
        !self.present.contains(page) || self.slice(page, 1).is_some_and(|slice| slice.is_zero())
    }

    /// Whether a look at its pages may raise `SIGBUS`, because they are in a mapping of a file that somebody may cut shorter:
    /// they are moved by system calls alone.
    pub(crate) fn may_shrink(&self) -> bool {
        matches!(&self.memory, Memory::Mapped(mapping) if mapping.may_shrink())
    }

    /// `count` pages of mapped memory from `first` on; `None` if they are not all in the block, or if it
    /// lives in a file.
    pub fn slice(&self, first: PageIndex, count: u64) -> Option<GuestSlice<'_>> {
        let end = first.0.checked_add(count)?;
        if end > self.pages() {
            return None;
        }
        let len = usize::try_from(count).ok()?.checked_mul(self.page_size.bytes())?;
        match &self.memory {
            Memory::Mapped(mapping) => mapping.slice(self.page_size.offset_of(first)?.0, len),
            Memory::File { .. } => None,
        }
    }
}

/// All RAM blocks of a machine, in the order in which the source lists them.
#[derive(Debug, Default)]
pub struct RamBlocks {
    blocks: Vec<RamBlock>,
    by_name: HashMap<BlockName, BlockIndex>,
    page_size: PageSize,
}

impl RamBlocks {
    /// A registry of `blocks`.
    ///
    /// # Errors
    /// [`Usage::DuplicateBlock`] if two have one name, [`Usage::MixedPageSizes`] if their page sizes differ.
    pub fn new(blocks: Vec<RamBlock>) -> Result<Self> {
        let page_size = blocks.first().map(RamBlock::page_size).unwrap_or_default();
        let mut by_name = HashMap::with_capacity(blocks.len());
        for (index, block) in blocks.iter().enumerate() {
            if block.page_size != page_size {
                return Err(Usage::MixedPageSizes(page_size, block.page_size).into());
            }
            if by_name.insert(block.name.clone(), BlockIndex(index)).is_some() {
                return Err(Usage::DuplicateBlock(block.name.clone()).into());
            }
        }
        Ok(Self { blocks, by_name, page_size })
    }

    /// The page size of all blocks; 4 KiB where there is no block.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there is no block.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The blocks in their order, each with its index.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (BlockIndex, &RamBlock)> {
        self.blocks.iter().enumerate().map(|(index, block)| (BlockIndex(index), block))
    }

    /// The block at `index`.
    pub fn get(&self, index: BlockIndex) -> Option<&RamBlock> {
        self.blocks.get(index.0)
    }

    /// The block at `index`.
    ///
    /// # Errors
    /// [`Usage::NoSuchBlock`].
    pub fn block(&self, index: BlockIndex) -> Result<&RamBlock> {
        self.get(index).ok_or_else(|| Error::from(Usage::NoSuchBlock(index.0)))
    }

    /// The index of the block named `name`.
    pub fn find(&self, name: &[u8]) -> Option<BlockIndex> {
        self.by_name.get(name).copied()
    }

    /// The used lengths of all blocks, added up: `total` of the RAM statistics, in bytes.
    pub fn total(&self) -> u64 {
        self.blocks.iter().map(RamBlock::used_length).sum()
    }
}

impl IntoIterator for RamBlocks {
    type Item = RamBlock;
    type IntoIter = std::vec::IntoIter<RamBlock>;

    /// The blocks in their order.
    fn into_iter(self) -> Self::IntoIter {
        self.blocks.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, used_length: u64) -> RamBlock {
        let memory = Memory::Mapped(Mapping::anonymous(used_length).expect("memory"));
        RamBlock::new(BlockName::new(name).expect("a name"), used_length, PageSize::KIB_4, memory)
            .expect("a block")
    }

    #[test]
    fn a_block_smaller_than_a_page_and_an_empty_one_have_no_pages() {
        for length in [0, 1, 4095] {
            let block = block("small", length);
            assert_eq!(block.pages(), 0);
            assert!(block.offset_of(PageIndex(0)).is_none());
            assert!(block.slice(PageIndex(0), 1).is_none());
        }
    }

    #[test]
    fn a_page_outside_the_block_has_no_slice() {
        let block = block("b", 3 * 4096 + 5);
        assert!(block.slice(PageIndex(0), 3).is_some());
        assert!(block.slice(PageIndex(1), 3).is_none());
        assert!(block.slice(PageIndex(u64::MAX), 1).is_none());
        assert!(block.slice(PageIndex(0), u64::MAX).is_none());
    }

    #[test]
    fn three_hundred_blocks_are_found_by_name() {
        let blocks =
            RamBlocks::new((0..300).map(|n| block(&format!("block{n}"), 4096)).collect()).expect("distinct");
        assert_eq!(blocks.find(b"block299"), Some(BlockIndex(299)));
        assert_eq!(blocks.find(b"block300"), None);
        assert_eq!(blocks.total(), 300 * 4096);
    }

    #[test]
    fn two_blocks_of_one_name_are_refused() {
        let refused =
            RamBlocks::new(vec![block("pc.ram", 4096), block("pc.ram", 8192)]).expect_err("refused");
        assert_eq!(refused.to_string(), r#"two RAM blocks are named "pc.ram""#);
    }

    #[test]
    fn a_block_of_terabytes_works() {
        let block = block("huge", 2 << 40);
        assert_eq!(block.pages(), 1 << 29);
        assert_eq!(block.slice(PageIndex((1 << 29) - 1), 1).expect("the last page").len(), 4096);
    }

    #[test]
    fn pages_are_stored_in_memory_and_in_files_and_cleared_there() {
        let file = Arc::new(tempfile::tempfile().expect("a file"));
        let in_file = Memory::File { file: file.clone(), direct: None, offset: 8192 };
        for memory in [in_file, Memory::Mapped(Mapping::anonymous(4 * 4096).expect("memory"))] {
            let name = BlockName::new("b").expect("a name");
            let block = RamBlock::fresh(name, 4 * 4096, PageSize::KIB_4, memory).expect("a block");
            block.store(PageIndex(1), &[7; 8192]).expect("stored");
            assert_eq!(block.present().words().next(), Some(0b0110));
            block.clear(PageIndex(2));
            block.clear(PageIndex(3));
            assert_eq!(block.present().words().next(), Some(0b0010));
            for (page, expected) in [(1, 7), (2, 0), (3, 0)] {
                let mut bytes = [1; 4096];
                block.load(PageIndex(page), &mut bytes).expect("loaded");
                assert_eq!(bytes, [expected; 4096]);
            }
            if let Some(slice) = block.slice(PageIndex(2), 1) {
                assert!(slice.is_zero());
                assert!(!block.slice(PageIndex(1), 1).expect("there").is_zero());
            }
        }
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, 8192 + 4096).expect("written");
        assert_eq!(bytes, [7; 4096]);
    }

    #[test]
    fn a_fresh_block_is_untouched_until_a_page_comes_even_a_zero_one() {
        let fresh = || {
            let memory = Memory::Mapped(Mapping::anonymous(8192).expect("memory"));
            RamBlock::fresh(BlockName::new("b").expect("a name"), 8192, PageSize::KIB_4, memory)
                .expect("a block")
        };
        assert!(fresh().is_untouched());
        let block = fresh();
        block.clear(PageIndex(1));
        assert!(!block.is_untouched());
        let block = fresh();
        block.store(PageIndex(0), &[0; 4096]).expect("stored");
        assert!(!block.is_untouched());
    }

    #[test]
    fn memory_shorter_than_the_block_is_refused() {
        let memory = Memory::Mapped(Mapping::anonymous(4096).expect("memory"));
        let refused = RamBlock::new(BlockName::new("b").expect("a name"), 8192, PageSize::KIB_4, memory);
        assert_eq!(
            refused.expect_err("refused").to_string(),
            r#"block "b": 0x1000 bytes of memory for a used length of 0x2000"#
        );
    }
}
