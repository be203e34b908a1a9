//! Which pages have arrived in a migration.
//!
//! It is created when the blocks are known and dropped with the migration; the blocks outlive it and keep no record of
//! arrived pages. It answers two questions. *Must a zero page be written?* No, if the page table had no page there when the
//! migration began and no page has arrived since. *Is RAM complete?* It is if every page of every block has arrived at
//! least once, as bytes or as zero.

use std::{
    io,
    sync::{Arc, OnceLock},
};

use super::late::PlaceLate;
use crate::{
    error::{Error, Result, Usage, Violation},
    ram::{Access, BlockIndex, Memory, PageBitmap, PageIndex, PageRun, RamBlock, RamBlocks},
};

/// The blocks that a migration fills, and which of their pages have arrived.
///
/// **Warning:** from the call of [`set_blocks`](crate::Receiver::set_blocks) until all of RAM has arrived nothing else may
/// write to the blocks' memory. Data written in this time may remain in pages that are zero at the source.
#[derive(Debug)]
pub struct Arrived {
    blocks: Arc<RamBlocks>,
    pages: Vec<BlockPages>,
    /// Where pages go from the switch to post-copy on, if the guest runs then.
    late: OnceLock<Arc<dyn PlaceLate>>,
}

/// The state of one block. The thread that has written a page sets its bits; a reader is ordered after it by a sync point.
#[derive(Debug)]
struct BlockPages {
    /// Pages that have arrived, including zero pages.
    arrived: PageBitmap,
    /// Pages whose memory may contain anything other than zero; `None`: all of them.
    may_hold: Option<PageBitmap>,
    /// Runs of pages that this process may not access, first page and count. Mostly empty.
    closed: Vec<(PageIndex, u64)>,
}

/// Which pages of a block may be missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MayMiss {
    /// No page may be missing.
    Nothing,
    /// All or none may be missing, because the memory of the block is shared.
    Whole,
    /// Any page may be missing: the guest does not use it, or it is not plugged in.
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
            BlockPages { arrived: PageBitmap::new(block.pages()), may_hold, closed }
        });
        let (pages, late) = (pages.collect(), OnceLock::new());
        Self { blocks, pages, late }
    }

    /// The blocks.
    pub fn blocks(&self) -> &Arc<RamBlocks> {
        &self.blocks
    }

    /// The number of pages of a block that have arrived, each counted once; 0 if there is no such block.
    pub fn count(&self, block: BlockIndex) -> u64 {
        self.pages.get(block.0).map_or(0, |pages| pages.arrived.count())
    }

    /// The pages of a block that have arrived; `None` if there is no such block.
    pub fn received(&self, block: BlockIndex) -> Option<&PageBitmap> {
        self.pages.get(block.0).map(|pages| &pages.arrived)
    }

    /// Whether no page of a block has arrived, not even a zero page. Meaningful when all of RAM has arrived.
    pub fn is_untouched(&self, block: BlockIndex) -> bool {
        self.pages.get(block.0).is_none_or(|pages| pages.arrived.is_empty())
    }

    /// The guest uses the memory from now on: pages are no longer written in place, but given to `late`. Call it between two sync
    /// points, when no page is on its way.
    ///
    /// # Errors
    /// [`Usage::UsedTwice`] the second time.
    pub fn place_late(&self, late: Arc<dyn PlaceLate>) -> Result<()> {
        self.late.set(late).map_err(|_| Usage::UsedTwice.into())
    }

    /// Where pages go that must not be written in place.
    pub(super) fn late(&self) -> Option<&dyn PlaceLate> {
        self.late.get().map(|late| &**late)
    }

    /// Writes pages that did not arrive over a channel, beginning with page `first`.
    ///
    /// # Errors
    /// If there are no such pages, `bytes` are not whole pages, a file cannot be written, or this process may not access
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
        match self.late() {
            Some(late) => late.place(PageRun { block, first, count }, bytes)?,
            None => of.store(first, bytes).map_err(|error| broken("write", of, first, error))?,
        }
        self.note(block, first, count);
        Ok(())
    }

    /// Clears a page for which a zero page arrived, but not over a channel.
    ///
    /// # Errors
    /// If there is no such page, or it may hold something and this process may not access it.
    pub fn clear(&self, block: BlockIndex, page: PageIndex) -> Result<()> {
        let of = self.blocks.block(block)?;
        check(of, page, 1)?;
        self.clear_run(of, block, page, 1)
    }

    /// Forgets pages, beginning with page `first`: the source will send them again. What they contain now is out of date, and
    /// in a mapped-ram file they are absent from now on. They count as missing until they arrive again.
    ///
    /// # Errors
    /// If there are no such pages.
    pub fn discard(&self, block: BlockIndex, first: PageIndex, count: u64) -> Result<()> {
        let of = self.blocks.block(block)?;
        check(of, first, count)?;
        let pages = self.pages(block);
        pages.arrived.clear_run(first, count);
        if pages.may_hold.is_none() {
            of.clear_run(first, count);
        }
        Ok(())
    }

    /// Whether every page of every block has arrived, except those of ignored blocks.
    pub fn is_complete(&self) -> bool {
        let mut due = self.blocks.iter().filter(|(_, block)| !block.is_ignored());
        due.all(|(index, block)| self.count(index) == block.pages())
    }

    /// Reads the current contents of a page.
    ///
    /// # Errors
    /// If there is no such page, `into` has not the length of a page, a file cannot be read, or this process may not access
    /// the memory.
    pub fn load(&self, block: BlockIndex, page: PageIndex, into: &mut [u8]) -> Result<()> {
        let of = self.blocks.block(block)?;
        check(of, page, 1)?;
        if into.len() != of.page_size().bytes() {
            return Err(Usage::NotWholePages { name: of.name().clone(), length: into.len() }.into());
        }
        self.check_access(of, block, page, 1)?;
        of.load(page, into).map_err(|error| broken("read", of, page, error))
    }

    /// Checks, when all of RAM has arrived, that no page is missing, except in ignored blocks and those that `may_miss`
    /// allows for a block. Pages that may be missing are cleared.
    ///
    /// # Errors
    /// [`Violation::PagesMissing`], with the first incomplete block and the number of missing pages in all blocks;
    /// [`Violation::NoPages`] if no page has arrived, not even a zero page, although there are pages to send.
    pub fn check_complete(&self, may_miss: impl Fn(&RamBlock) -> MayMiss) -> Result<()> {
        self.check_any()?;
        let (mut first, mut missing) = (None, 0);
        for (index, block) in self.blocks.iter().filter(|(_, block)| !block.is_ignored()) {
            let arrived = self.count(index);
            if arrived == block.pages() {
                continue;
            }
            match may_miss(block) {
                MayMiss::Whole if arrived == 0 => {}
                MayMiss::Pages => {
                    let missing = self.clear_missing(index, block)?;
                    tracing::debug!(block = %block.name(), missing, "pages that the source omitted are zero");
                }
                MayMiss::Whole | MayMiss::Nothing => {
                    missing += block.pages() - arrived;
                    first.get_or_insert((index, block));
                }
            }
        }
        let Some((index, block)) = first else { return Ok(()) };
        let page = self.pages(index).arrived.clear_runs().next().map(|(page, _)| page);
        let offset = page.and_then(|page| block.offset_of(page)).unwrap_or_default();
        Err(Violation::PagesMissing { missing, name: block.name().clone(), offset }.into())
    }

    /// Checks that at least one page has arrived, if there are pages to send.
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

    /// Clears every page of a block that has not arrived. Returns their number.
    fn clear_missing(&self, index: BlockIndex, block: &RamBlock) -> Result<u64> {
        let mut missing = 0;
        for (first, count) in self.pages(index).arrived.clear_runs() {
            missing += count;
            self.clear_run(block, index, first, count)?;
        }
        Ok(missing)
    }

    /// Records that pages were written, beginning with page `first`.
    pub(super) fn note(&self, block: BlockIndex, first: PageIndex, count: u64) {
        self.may_hold(block, first, count);
        self.placed(block, first, count);
    }

    /// Records that pages were written that [may hold](Self::may_hold) something already.
    pub(super) fn placed(&self, block: BlockIndex, first: PageIndex, count: u64) {
        self.pages(block).arrived.set_run(first, count);
    }

    /// Records that bytes are about to be received in the memory of pages, beginning with page `first`.
    pub(super) fn may_hold(&self, block: BlockIndex, first: PageIndex, count: u64) {
        if let Some(may_hold) = &self.pages(block).may_hold {
            may_hold.set_run(first, count);
        }
    }

    /// Clears pages, beginning with page `first`.
    ///
    /// # Errors
    /// If a page may contain something and this process may not access it.
    pub(super) fn clear_run(
        &self,
        of: &RamBlock,
        block: BlockIndex,
        first: PageIndex,
        count: u64,
    ) -> Result<()> {
        let pages = self.pages(block);
        if let Some(late) = self.late() {
            late.zero(PageRun { block, first, count })?;
            pages.arrived.set_run(first, count);
            return Ok(());
        }
        let Some(may_hold) = &pages.may_hold else {
            of.clear_run(first, count);
            pages.arrived.set_run(first, count);
            return Ok(());
        };
        for page in (first.0..first.0 + count).map(PageIndex) {
            if may_hold.clear(page) {
                self.check_access(of, block, page, 1)?;
                of.clear(page);
            }
        }
        pages.arrived.set_run(first, count);
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
            error.starts_with(r#"1 page of RAM did not arrive, the first in block "b1" at offset 0x42000"#),
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
            assert!(error.starts_with("RAM ended and not one page has arrived"), "{error}");
        }
        arrived(&[0]).check_complete(|_| MayMiss::Nothing).expect("there is no page");
    }

    /// Memory that another machine has used: contents of pages that do not arrive must not remain.
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
    fn discarded_pages_must_arrive_again_and_a_zero_page_clears_them() {
        let arrived = arrived(&[4 * 4096]);
        for page in 0..4 {
            arrived.store(BlockIndex(0), PageIndex(page), &[7; 4096]).expect("stored");
        }
        assert!(arrived.is_complete());
        arrived.discard(BlockIndex(0), PageIndex(1), 2).expect("discarded");
        assert!(!arrived.is_complete());
        assert_eq!(arrived.count(BlockIndex(0)), 2);
        assert!(arrived.check_complete(|_| MayMiss::Nothing).is_err());
        arrived.store(BlockIndex(0), PageIndex(1), &[8; 4096]).expect("stored");
        arrived.clear(BlockIndex(0), PageIndex(2)).expect("cleared");
        arrived.check_complete(|_| MayMiss::Nothing).expect("complete");
        let page = |number| {
            let mut page = [1; 4096];
            arrived.load(BlockIndex(0), PageIndex(number), &mut page).expect("loaded");
            page
        };
        assert_eq!((page(1), page(2)), ([8; 4096], [0; 4096]));
        assert!(arrived.discard(BlockIndex(0), PageIndex(3), 2).is_err());
        assert!(arrived.discard(BlockIndex(0), PageIndex(u64::MAX), 2).is_err());
        assert!(arrived.discard(BlockIndex(1), PageIndex(0), 1).is_err());
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
