//! The registry of a machine's blocks.
//!
//! Both sides of a migration list the same blocks. A block name from the wire is looked up here before anything is
//! written.

use std::{collections::HashMap, io, sync::Arc};

use crate::{
    Access, BasePages, BlockIndex, BlockName, Digest, Error, Memory, PageBitmap, PageIndex, PageSize,
    RamBlock,
    memory::{areas::Areas, residency},
};

/// All RAM blocks of a machine, in the order in which the source lists them.
#[derive(Debug, Default)]
pub struct RamBlocks {
    blocks: Vec<RamBlock>,
    by_name: HashMap<BlockName, BlockIndex>,
    page_size: PageSize,
}

impl RamBlocks {
    /// Creates a registry of `blocks`.
    ///
    /// # Errors
    /// [`Error::DuplicateBlock`] if two have the same name, [`Error::MixedPageSizes`] if their page sizes differ,
    /// [`Error::SharedBytes`] if two have bytes in common: a write through one would be missing in the other's dirty
    /// bits. Two mappings of the same file are not detected.
    pub fn new(blocks: Vec<RamBlock>) -> Result<Self, Error> {
        let page_size = blocks.first().map(RamBlock::page_size).unwrap_or_default();
        let mut by_name = HashMap::with_capacity(blocks.len());
        for (index, block) in blocks.iter().enumerate() {
            if block.page_size() != page_size {
                return Err(Error::MixedPageSizes(page_size, block.page_size()));
            }
            if by_name.insert(block.name().clone(), BlockIndex(index)).is_some() {
                return Err(Error::DuplicateBlock(block.name().clone()));
            }
        }
        let mut ranges: Vec<_> =
            blocks.iter().filter_map(|block| Some((block.range()?, block.name()))).collect();
        ranges.sort_by_key(|((within, start, _), _)| (*within, *start));
        for pair in ranges.windows(2) {
            if let [((a, _, end), one), ((b, start, _), other)] = pair
                && a == b
                && start < end
            {
                return Err(Error::SharedBytes((*one).clone(), (*other).clone()));
            }
        }
        Ok(Self { blocks, by_name, page_size })
    }

    /// The page size of all blocks; 4 KiB if there are no blocks.
    #[inline]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there are no blocks.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The blocks in order, each with its index.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (BlockIndex, &RamBlock)> {
        self.blocks.iter().enumerate().map(|(index, block)| (BlockIndex(index), block))
    }

    /// The block at `index`.
    #[inline]
    pub fn get(&self, index: BlockIndex) -> Option<&RamBlock> {
        self.blocks.get(index.0)
    }

    /// The block at `index`.
    ///
    /// # Errors
    /// [`Error::NoSuchBlock`] if there is no such block.
    #[inline]
    pub fn block(&self, index: BlockIndex) -> Result<&RamBlock, Error> {
        self.get(index).ok_or(Error::NoSuchBlock(index.0))
    }

    /// The index of the block named `name`.
    pub fn find(&self, name: &[u8]) -> Option<BlockIndex> {
        self.by_name.get(name).copied()
    }

    /// The sum of the used lengths of all blocks, in bytes: `total` in the RAM statistics.
    pub fn total(&self) -> u64 {
        self.blocks.iter().map(RamBlock::used_length).sum()
    }
}

/// A run of pages of a block that this process may not access, although they belong to the block's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inaccessible {
    /// The block.
    pub block: BlockIndex,
    /// The first page.
    pub first: PageIndex,
    /// The number of pages, at least 1.
    pub count: u64,
}

impl RamBlocks {
    /// The [touched](RamBlock::touched) pages of each block, in order. The system is asked once for all blocks.
    pub fn touched(&self) -> Vec<Option<PageBitmap>> {
        let questioned: Vec<_> = self.blocks.iter().filter_map(RamBlock::questioned).collect();
        let areas = if questioned.is_empty() { None } else { residency::areas_of(&questioned) };
        self.blocks.iter().map(|block| block.touched_among(areas.as_ref())).collect()
    }

    /// The pages of mapped memory that this process may not access now: nothing is mapped there, or without the right to
    /// read (`PROT_NONE`), or to write if `access` says so and the mapping is not read-only. A page counts if this is so
    /// for a part of it. An access by a copy would end the process by `SIGSEGV`, one by a system call fails with `EFAULT`.
    ///
    /// A virtual machine has such pages where memory is not plugged in (virtio-mem). They are zero if they are not
    /// [touched](RamBlock::touched), and are then sent as zero pages and never accessed. **Warning:** access rights must not
    /// be removed during a pass of a migration, because a page may be read between the check and the end of the pass.
    ///
    /// The list is empty if the system does not say what is mapped (`/proc/self/maps`).
    pub fn inaccessible(&self, access: Access) -> Vec<Inaccessible> {
        let addresses: Vec<_> = self.blocks.iter().filter_map(RamBlock::addresses).collect();
        let Ok(areas) = Areas::without_flags(&addresses) else { return Vec::new() };
        let runs = self.iter().flat_map(|(block, of)| {
            let runs = of.inaccessible_among(access, &areas).into_iter();
            runs.map(move |(first, count)| Inaccessible { block, first, count })
        });
        runs.collect()
    }

    /// Refuses the first page of `holes` that is `needed`.
    ///
    /// # Errors
    /// [`Error::Inaccessible`], from that page to the end of its hole.
    pub fn refuse_inaccessible(
        &self,
        holes: &[Inaccessible],
        needed: impl Fn(BlockIndex, PageIndex) -> bool,
    ) -> Result<(), Error> {
        for hole in holes {
            let (block, end) = (self.block(hole.block)?, hole.first.0.saturating_add(hole.count));
            let page = (hole.first.0..end).map(PageIndex).find(|page| needed(hole.block, *page));
            if let Some(page) = page {
                return Err(block.inaccessible(page, end - page.0));
            }
        }
        Ok(())
    }
}

impl IntoIterator for RamBlocks {
    type Item = RamBlock;
    type IntoIter = std::vec::IntoIter<RamBlock>;

    /// The blocks in order.
    fn into_iter(self) -> Self::IntoIter {
        self.blocks.into_iter()
    }
}

impl RamBlocks {
    /// The pages of a block in files as the base of a later state of it ([`Places::since`](crate::Places::since)). `None` if
    /// there is no such block, or its memory is mapped.
    pub fn as_base(self: &Arc<Self>, block: BlockIndex) -> Option<Arc<dyn BasePages>> {
        let is_stored = |of: &&RamBlock| matches!(of.memory(), Memory::MappedRam(_));
        self.get(block).filter(is_stored)?;
        Some(Arc::new(StoredBlock { blocks: self.clone(), block }))
    }
}

/// A block that is in files.
#[derive(Debug)]
struct StoredBlock {
    blocks: Arc<RamBlocks>,
    block: BlockIndex,
}

impl StoredBlock {
    fn get(&self) -> &RamBlock {
        self.blocks.get(self.block).expect("checked when it was made")
    }
}

impl BasePages for StoredBlock {
    fn page_size(&self) -> PageSize {
        self.get().page_size()
    }

    fn is_present(&self, page: PageIndex) -> bool {
        self.get().is_present(page)
    }

    fn present_word(&self, word: usize) -> u64 {
        self.get().present_word(word)
    }

    fn digest_of(&self, page: PageIndex) -> io::Result<Option<Digest>> {
        self.get().digest_of(page)
    }

    fn load(&self, first: PageIndex, buffer: &mut [u8]) -> io::Result<()> {
        let block = self.get();
        block.load_direct(first, (buffer.len() / block.page_size().bytes()) as u64, buffer)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{Mapping, Memory, PageBitmap, Places};

    fn block(name: &str, used_length: u64) -> RamBlock {
        let memory = Memory::Mapped(Mapping::anonymous(used_length).expect("memory"));
        RamBlock::new(BlockName::new(name).expect("a name"), used_length, PageSize::KIB_4, memory)
            .expect("a block")
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
    fn blocks_that_share_bytes_are_refused() {
        let memory = Arc::new(Mapping::anonymous(4 * 4096).expect("memory"));
        let part = |name: &str, first: u64, pages: u64| {
            let slice = memory.slice(first * 4096, 4096).expect("inside");
            let base = std::ptr::NonNull::new(slice.as_ptr()).expect("not null");
            let length = usize::try_from(pages * 4096).expect("small");
            // SAFETY: the range lies in a mapping that is kept alive, and no reference to it is made.
            #[expect(unsafe_code, reason = "two blocks on one mapping")]
            let part = unsafe { Mapping::from_raw(base, length, memory.clone()) };
            let name = BlockName::new(name).expect("a name");
            RamBlock::new(name, length as u64, PageSize::KIB_4, Memory::Mapped(part)).expect("a block")
        };
        assert!(RamBlocks::new(vec![part("b", 2, 2), part("a", 0, 2)]).is_ok());
        let refused = RamBlocks::new(vec![part("a", 0, 3), part("b", 2, 2)]).expect_err("refused");
        assert_eq!(refused.to_string(), r#"blocks "a" and "b" share bytes: each needs memory of its own"#);
        let file = Arc::new(tempfile::tempfile().expect("a file"));
        let stored = |name: &str, offset| {
            let places = Places::new(file.clone(), offset, PageBitmap::new(2));
            let name = BlockName::new(name).expect("a name");
            RamBlock::new(name, 8192, PageSize::KIB_4, Memory::MappedRam(places)).expect("a block")
        };
        assert!(RamBlocks::new(vec![stored("a", 0), stored("b", 8192)]).is_ok());
        assert!(RamBlocks::new(vec![stored("a", 0), stored("b", 4096)]).is_err());
    }
}
