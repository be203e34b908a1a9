//! Which pages have come, of one migration.
//!
//! It is made when the blocks are known and ends with the migration: blocks last longer, and nothing of their arrival
//! stays with them. Two questions are answered from it. *Must a zero page be written?* Not if the page table had no page
//! there when the migration began and nothing has come since. *Is RAM complete?* Every page of every block has to come once,
//! as bytes or as zero.

use std::{io, sync::Arc};

use crate::{
    error::{Error, Result, Usage, Violation},
    ram::{Access, BlockIndex, Memory, PageBitmap, PageIndex, RamBlock, RamBlocks},
};

/// The blocks that a migration fills, and which of their pages have come.
///
/// **Warning:** from the moment the blocks are [set](crate::Receiver::set_blocks) until all of RAM is here nobody else may
/// write to their memory. What is written meanwhile may stay where the source says that a page is zero.
#[derive(Debug)]
pub struct Arrived {
    blocks: Arc<RamBlocks>,
    pages: Vec<BlockPages>,
}

/// Of one block. Bits are set by the thread that has written the page; who asks has met that thread at a sync point.
#[derive(Debug)]
struct BlockPages {
    /// Pages that have come, zero ones too.
    come: PageBitmap,
    /// Pages whose memory may hold something else than zero; `None`: all of them.
    may_hold: Option<PageBitmap>,
    /// Runs of pages that this process may not access, first page and count. Mostly empty.
    closed: Vec<(PageIndex, u64)>,
}

/// What need not come of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MayMiss {
    /// Nothing: every page has to come.
    Nothing,
    /// The block as a whole, because its memory is shared; if one page comes, all have to.
    Whole,
    /// Any page: what the guest has not in use, or is not plugged in.
    Pages,
}

impl Arrived {
    pub(super) fn new(blocks: Arc<RamBlocks>) -> Self {
        let mut touched = blocks.touched().into_iter();
        let holes = blocks.inaccessible(Access::ReadWrite);
        let pages = blocks.iter().map(|(index, block)| {
            let touched = touched.next().flatten();
            let may_hold = match block.memory() {
                Memory::Mapped(_) => Some(touched.unwrap_or_else(|| PageBitmap::full(block.pages()))),
                Memory::MappedRam(_) => None,
            };
            let closed = holes.iter().filter(|hole| hole.block == index);
            let closed = closed.map(|hole| (hole.first, hole.count)).collect();
            BlockPages { come: PageBitmap::new(block.pages()), may_hold, closed }
        });
        let pages = pages.collect();
        Self { blocks, pages }
    }

    /// The blocks.
    pub fn blocks(&self) -> &Arc<RamBlocks> {
        &self.blocks
    }

    /// How many pages of a block have come, each counted once; 0 if there is no such block.
    pub fn count(&self, block: BlockIndex) -> u64 {
        self.pages.get(block.0).map_or(0, |pages| pages.come.count())
    }

    /// Whether no page of a block has come, not even a zero one. To be asked when all of RAM is here.
    pub fn is_untouched(&self, block: BlockIndex) -> bool {
        self.pages.get(block.0).is_none_or(|pages| pages.come.words().all(|word| word == 0))
    }

    /// Writes pages that came over another way than the channels, from `first` on.
    ///
    /// # Errors
    /// If there are no such pages, `bytes` are no whole pages, a file cannot be written, or this process may not access
    /// the memory.
    pub fn store(&self, block: BlockIndex, first: PageIndex, bytes: &[u8]) -> Result<()> {
        let of = self.blocks.block(block)?;
        let size = of.page_size().bytes();
        if !bytes.len().is_multiple_of(size) {
            return Err(Usage::NotWholePages { name: of.name().clone(), length: bytes.len() }.into());
        }
        let count = (bytes.len() / size) as u64;
        check(of, first, count)?;
        self.check_access(of, block, first, count)?;
        of.store(first, bytes).map_err(|error| broken("write", of, first, error))?;
        self.note(block, first, count);
        Ok(())
    }

    /// Makes a page zero that came over another way than the channels.
    ///
    /// # Errors
    /// If there is no such page, or it may hold something and this process may not access it.
    pub fn clear(&self, block: BlockIndex, page: PageIndex) -> Result<()> {
        let of = self.blocks.block(block)?;
        check(of, page, 1)?;
        self.clear_run(of, block, page, 1)
    }

    /// Reads a page as it is now.
    ///
    /// # Errors
    /// If there is no such page, `into` is not a page long, a file cannot be read, or this process may not access the
    /// memory.
    pub fn load(&self, block: BlockIndex, page: PageIndex, into: &mut [u8]) -> Result<()> {
        let of = self.blocks.block(block)?;
        check(of, page, 1)?;
        if into.len() != of.page_size().bytes() {
            return Err(Usage::NotWholePages { name: of.name().clone(), length: into.len() }.into());
        }
        self.check_access(of, block, page, 1)?;
        of.load(page, into).map_err(|error| broken("read", of, page, error))
    }

    /// Checks, when all of RAM is here, that every page of every block has come, but for what `may_miss` allows of a block,
    /// and for blocks that are ignored. Pages that need not come are made zero.
    ///
    /// # Errors
    /// [`Violation::PagesMissing`], with the first block that is not whole and the number of pages missing in all;
    /// [`Violation::NoPages`] if nothing at all has come, not even a zero page, where something could.
    pub fn check_complete(&self, may_miss: impl Fn(&RamBlock) -> MayMiss) -> Result<()> {
        self.check_any()?;
        let (mut first, mut missing) = (None, 0);
        for (index, block) in self.blocks.iter().filter(|(_, block)| !block.is_ignored()) {
            let come = self.count(index);
            if come == block.pages() {
                continue;
            }
            match may_miss(block) {
                MayMiss::Whole if come == 0 => {}
                MayMiss::Pages => {
                    let missing = self.clear_missing(index, block)?;
                    tracing::debug!(block = %block.name(), missing, "pages that the source left out are zero");
                }
                MayMiss::Whole | MayMiss::Nothing => {
                    missing += block.pages() - come;
                    first.get_or_insert((index, block));
                }
            }
        }
        let Some((index, block)) = first else { return Ok(()) };
        let page = self.pages(index).come.clear_runs().next().map(|(page, _)| page);
        let offset = page.and_then(|page| block.offset_of(page)).unwrap_or_default();
        Err(Violation::PagesMissing { missing, name: block.name().clone(), offset }.into())
    }

    /// Checks that anything has come at all, be it zero, if there is a page that could.
    fn check_any(&self) -> Result<()> {
        let mut due =
            self.blocks.iter().filter(|(_, block)| !block.is_ignored() && block.pages() > 0).peekable();
        if due.peek().is_some() && due.all(|(index, _)| self.is_untouched(index)) {
            return Err(Violation::NoPages.into());
        }
        Ok(())
    }

    fn pages(&self, block: BlockIndex) -> &BlockPages {
        self.pages.get(block.0).expect("there is one for each block")
    }

    /// Makes every page of a block zero that has not come; says how many those are.
    fn clear_missing(&self, index: BlockIndex, block: &RamBlock) -> Result<u64> {
        let mut missing = 0;
        for (first, count) in self.pages(index).come.clear_runs() {
            missing += count;
            self.clear_run(block, index, first, count)?;
        }
        Ok(missing)
    }

    /// Pages from `first` on have been written.
    pub(super) fn note(&self, block: BlockIndex, first: PageIndex, count: u64) {
        let pages = self.pages(block);
        pages.come.set_run(first, count);
        if let Some(may_hold) = &pages.may_hold {
            may_hold.set_run(first, count);
        }
    }

    /// Pages from `first` on are zero, whatever they were.
    ///
    /// # Errors
    /// If a page may hold something and this process may not access it.
    pub(super) fn clear_run(
        &self,
        of: &RamBlock,
        block: BlockIndex,
        first: PageIndex,
        count: u64,
    ) -> Result<()> {
        let pages = self.pages(block);
        for page in (first.0..first.0 + count).map(PageIndex) {
            if pages.may_hold.as_ref().is_none_or(|may_hold| may_hold.clear(page)) {
                self.check_access(of, block, page, 1)?;
                of.clear(page);
            }
        }
        pages.come.set_run(first, count);
        Ok(())
    }

    /// Refuses pages that this process may not access: a copy to or from there would end it.
    ///
    /// # Errors
    /// [`Inaccessible`](crate::ram::Error::Inaccessible), for the first run of such pages.
    pub(super) fn check_access(
        &self,
        of: &RamBlock,
        block: BlockIndex,
        first: PageIndex,
        count: u64,
    ) -> Result<()> {
        let end = first.0.saturating_add(count);
        let closed = self.pages(block).closed.iter();
        match closed.into_iter().find(|(at, count)| at.0 < end && first.0 < at.0 + count) {
            None => Ok(()),
            Some((at, count)) => Err(of.inaccessible(*at, *count).into()),
        }
    }
}

fn check(block: &RamBlock, first: PageIndex, count: u64) -> Result<(), Usage> {
    match first.0.checked_add(count) {
        Some(end) if end <= block.pages() => Ok(()),
        _ => {
            let (name, pages) = (block.name().clone(), block.pages());
            Err(Usage::NoSuchPage { name, page: first.0.max(pages), pages })
        }
    }
}

fn broken(doing: &str, block: &RamBlock, page: PageIndex, error: io::Error) -> Error {
    let offset = block.page_size().bytes() as u64 * page.0;
    Error::io(format!("{doing} block {:?} at offset {offset:#x}", block.name()), error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::{BlockName, Mapping, PageSize};

    fn arrived(lengths: &[u64]) -> Arrived {
        let block = |(index, length): (usize, &u64)| {
            let name = BlockName::new(format!("b{index}")).expect("a name");
            let memory = Memory::Mapped(Mapping::anonymous(*length).expect("memory"));
            RamBlock::new(name, *length, PageSize::KIB_4, memory).expect("a block")
        };
        let blocks = RamBlocks::new(lengths.iter().enumerate().map(block).collect()).expect("blocks");
        Arrived::new(Arc::new(blocks))
    }

    #[test]
    fn a_zero_page_over_memory_that_was_used_before_is_written() {
        let before = arrived(&[8 * 4096]);
        before.store(BlockIndex(0), PageIndex(3), &[7; 4096]).expect("stored");
        let again = Arrived::new(before.blocks().clone());
        again.clear(BlockIndex(0), PageIndex(3)).expect("cleared");
        let mut page = [1; 4096];
        again.load(BlockIndex(0), PageIndex(3), &mut page).expect("loaded");
        assert_eq!(page, [0; 4096]);
    }

    #[test]
    fn what_has_not_come_is_counted_and_named() {
        let arrived = arrived(&[4096, 70 * 4096, 2 * 4096]);
        let shared = |block: &RamBlock| match block.name().as_bytes() {
            b"b2" => MayMiss::Whole,
            _ => MayMiss::Nothing,
        };
        let whole = |arrived: &Arrived| arrived.check_complete(shared);
        arrived.clear(BlockIndex(0), PageIndex(0)).expect("cleared");
        for page in (0..70).filter(|page| *page != 66) {
            arrived.clear(BlockIndex(1), PageIndex(page)).expect("cleared");
        }
        let error = whole(&arrived).expect_err("incomplete").to_string();
        assert!(
            error.starts_with(r#"1 page of RAM never came, the first in block "b1" at offset 0x42000"#),
            "{error}"
        );
        arrived.store(BlockIndex(1), PageIndex(66), &[1; 4096]).expect("stored");
        whole(&arrived).expect("complete");
        arrived.clear(BlockIndex(2), PageIndex(0)).expect("cleared");
        assert!(whole(&arrived).is_err(), "a block is left out whole or not at all");
        arrived.check_complete(|_| MayMiss::Pages).expect("complete");
    }

    #[test]
    fn ram_of_which_nothing_came_is_refused_whatever_may_miss() {
        for may_miss in [MayMiss::Nothing, MayMiss::Whole, MayMiss::Pages] {
            let error = arrived(&[4096]).check_complete(|_| may_miss).expect_err("nothing").to_string();
            assert!(error.starts_with("RAM ended and not one page of it has come"), "{error}");
        }
        arrived(&[0]).check_complete(|_| MayMiss::Nothing).expect("there is no page");
    }

    /// Memory that another machine has used: what does not come must not show through.
    #[test]
    fn pages_that_need_not_come_are_zero() {
        let before = arrived(&[8 * 4096]);
        before.store(BlockIndex(0), PageIndex(3), &[7; 4096]).expect("stored");
        let again = Arrived::new(before.blocks().clone());
        again.clear(BlockIndex(0), PageIndex(0)).expect("cleared");
        again.check_complete(|_| MayMiss::Pages).expect("complete");
        let mut page = [1; 4096];
        again.load(BlockIndex(0), PageIndex(3), &mut page).expect("loaded");
        assert_eq!(page, [0; 4096]);
    }

    #[test]
    fn pages_that_are_not_there_are_refused() {
        let arrived = arrived(&[2 * 4096]);
        let refused = |result: Result<()>| result.expect_err("refused").to_string();
        assert_eq!(
            refused(arrived.clear(BlockIndex(0), PageIndex(2))),
            r#"block "b0" has no page 2 (2 pages)"#
        );
        assert_eq!(
            refused(arrived.store(BlockIndex(1), PageIndex(0), &[0; 4096])),
            "there is no RAM block number 1"
        );
        assert!(arrived.store(BlockIndex(0), PageIndex(1), &[0; 8192]).is_err());
        assert!(arrived.store(BlockIndex(0), PageIndex(0), &[0; 100]).is_err());
        assert!(arrived.load(BlockIndex(0), PageIndex(0), &mut [0; 100]).is_err());
    }
}
