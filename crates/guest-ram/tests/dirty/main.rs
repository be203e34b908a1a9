//! Tests that a dirty log finds every write.
//!
//! In each round, every page is written once, while the log is taken again and again and each reported page is copied.
//! After a round's writes, the log is taken once more; then every copy must equal its page. So each of a million writes
//! is checked by itself: a lost write leaves one old copy.

#[cfg(all(test, feature = "vm-memory"))]
mod atomic_bitmap;
mod kit;
#[cfg(all(test, feature = "kvm"))]
mod kvm;
#[cfg(test)]
mod marked;
#[cfg(all(test, feature = "pagemap"))]
mod pagemap;

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use guest_ram::{
    BlockIndex, BlockOffset, DirtyLog, DirtyPages, Memory, PageBitmap, PageIndex, RamBlock, RamBlocks,
};

/// How it went.
#[derive(Debug)]
pub(crate) struct Found {
    /// The number of writes, each to a different page in its round.
    pub(crate) writes: u64,
    /// The number of pages whose copy was old at the end of a round.
    pub(crate) lost: u64,
    /// Takes during the writes.
    takes: u64,
    /// Pages that these found.
    early: u64,
}

impl Found {
    /// Asserts that nothing was lost, and that the log was under load: many pages were found while others were written.
    /// The system decides how many, because it may let one side run alone for a while.
    pub(crate) fn assert_whole(&self) {
        assert_eq!(self.lost, 0, "{self:?}");
        assert!(self.takes > 100, "the log was hardly asked: {self:?}");
        assert!(self.early > self.writes / 100, "hardly a page was found early: {self:?}");
    }
}

/// The value of a page's first word in a round.
pub(crate) fn word(round: u64) -> [u8; 8] {
    // Lowest byte first, as the processors that tests have a guest for write it.
    value(round).swap_bytes().to_be_bytes()
}

/// The same as a number.
pub(crate) fn value(round: u64) -> u64 {
    round + 1
}

/// Runs rounds until at least `writes` writes are done. `write` must write [`word`] to the first bytes of every page.
pub(crate) fn follow(
    log: &mut dyn DirtyLog,
    blocks: &RamBlocks,
    writes: u64,
    write: impl Fn(u64) + Sync,
) -> Found {
    let pages: u64 = blocks.iter().map(|(_, block)| block.pages()).sum();
    let mut copies: Vec<Vec<[u8; 8]>> =
        blocks.iter().map(|(_, block)| vec![[0; 8]; usize::try_from(block.pages()).expect("few")]).collect();
    let pending: Vec<PageBitmap> = blocks.iter().map(|(_, block)| PageBitmap::new(block.pages())).collect();
    let mut found = Found { writes: 0, lost: 0, takes: 0, early: 0 };
    // Bits from before the first write.
    take(log, blocks, &pending, &mut copies);
    for round in 0..writes.div_ceil(pages) {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                write(round);
                done.store(true, Ordering::Release);
            });
            while !done.load(Ordering::Acquire) {
                found.early += take(log, blocks, &pending, &mut copies);
                found.takes += 1;
            }
        });
        take(log, blocks, &pending, &mut copies);
        found.writes += pages;
        found.lost += copies.iter().flatten().filter(|copy| **copy != word(round)).count() as u64;
    }
    found
}

/// Takes the log and copies the pages it reports; returns their number.
fn take(
    log: &mut dyn DirtyLog,
    blocks: &RamBlocks,
    pending: &[PageBitmap],
    copies: &mut [Vec<[u8; 8]>],
) -> u64 {
    let mut count = 0;
    for ((index, block), pending) in blocks.iter().zip(pending) {
        log.take(index, &mut DirtyPages::new(pending)).expect("taken");
        if pending.words().all(|word| word == 0) {
            continue;
        }
        for page in (0..block.pages()).map(PageIndex).filter(|page| pending.clear(*page)) {
            copies[index.0][usize::try_from(page.0).expect("few")] = first_word(block, page);
            count += 1;
        }
    }
    count
}

fn first_word(block: &RamBlock, page: PageIndex) -> [u8; 8] {
    let (Memory::Mapped(mapping), Some(BlockOffset(offset))) = (block.memory(), block.offset_of(page)) else {
        panic!("a page in memory");
    };
    let mut word = [0; 8];
    mapping.slice(offset, 8).expect("inside").copy_to(&mut word);
    word
}

/// A log that loses one bit: number `which` of those that it takes.
pub(crate) struct Forgetful<L> {
    pub(crate) log: L,
    pub(crate) which: AtomicU64,
}

impl<L: DirtyLog> DirtyLog for Forgetful<L> {
    fn begin(&mut self, blocks: &RamBlocks) -> std::io::Result<()> {
        self.log.begin(blocks)
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> std::io::Result<()> {
        let taken = PageBitmap::new(into.pages());
        self.log.take(block, &mut DirtyPages::new(&taken))?;
        let (count, left) = (taken.count(), self.which.load(Ordering::Relaxed));
        if (1..=count).contains(&left) {
            let mut set = (0..taken.pages()).map(PageIndex).filter(|page| taken.contains(*page));
            let page = set.nth(usize::try_from(left - 1).expect("few")).expect("one of them");
            taken.clear(page);
        }
        self.which.store(left.saturating_sub(count), Ordering::Relaxed);
        into.take_from(&taken);
        Ok(())
    }

    fn put_back(&mut self, block: BlockIndex, from: &PageBitmap) {
        self.log.put_back(block, from);
    }
}

/// Writes a round with two threads, each page by one of them, through `write`.
pub(crate) fn by_two_threads(blocks: &RamBlocks, write: impl Fn(BlockIndex, PageIndex) + Sync) {
    thread::scope(|scope| {
        for half in 0..2 {
            let write = &write;
            scope.spawn(move || {
                for (index, block) in blocks.iter() {
                    // A stride without a common factor reaches every page once, not in order.
                    let count = block.pages();
                    for at in (half..count).step_by(2) {
                        write(index, PageIndex(at * 7919 % count));
                    }
                }
            });
        }
    });
}

pub(crate) const MILLION: u64 = 1_000_000;
