//! A dirty log that is kept from one capture to the next, so that the next one stores only what was written since.
//!
//! ```text
//! capture 1 ── last take ── mark 1 ─┄─ the guest runs ─┄─ capture 2: since(mark 1) ── takes ── mark 2
//!                                      the log stays on        └── fails: the pages taken stay here, mark 1 stays valid
//! ```
//!
//! What can go wrong is checked where the two captures meet: a mark of another log, an older mark, a log that could not be
//! read in between, and other blocks are refused.

use std::{
    error, fmt, io,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{DirtyLog, DirtyPages, log_mark::LogMark};
use crate::{BlockIndex, Identity, PageBitmap, RamBlocks};

/// A dirty log that is kept between migrations: it knows what was written since the last one that was complete.
///
/// The log inside is read from the first migration on until this is dropped; while it is active it may slow the guest down.
/// Nothing else may read it meanwhile.
///
/// ```
/// use guest_ram::{DirtyBitmaps, KeptLog, RamBlocks};
///
/// let blocks = RamBlocks::default();
/// let writes = DirtyBitmaps::new(&blocks);
/// let mut log = KeptLog::new(writes.reader()?);
/// // every capture takes `&mut log`
/// # Ok::<_, std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct KeptLog<L> {
    log: L,
    number: u64,
    blocks: Option<Identity>,
    /// The mark that `since` is relative to; `None` if nothing is known.
    from: Option<u64>,
    /// The pages of each block that were taken since that mark.
    since: Vec<PageBitmap>,
    /// A mark that was given out, and becomes `from` unless the migration fails.
    next: Option<u64>,
    /// The number of the last mark.
    last: u64,
    /// Whether a take has failed, so that bits may be lost.
    is_broken: bool,
}

impl<L: DirtyLog> KeptLog<L> {
    /// Keeps `log`. It must be active: everything that the guest writes from the end of the first migration on must be found by a
    /// later take.
    pub fn new(log: L) -> Self {
        // Relaxed: the number is only unique, it orders nothing.
        let number = LOGS.fetch_add(1, Ordering::Relaxed);
        let (blocks, from, since, next) = (None, None, Vec::new(), None);
        Self { log, number, blocks, from, since, next, last: 0, is_broken: false }
    }

    /// Ends the keeping.
    pub fn into_inner(self) -> L {
        self.log
    }

    /// Marks that are known are no longer.
    fn forget(&mut self) {
        (self.from, self.next) = (None, None);
    }
}

impl<L: DirtyLog> DirtyLog for KeptLog<L> {
    /// The log inside begins once, so that it never loses what it has.
    fn begin(&mut self, blocks: &RamBlocks) -> io::Result<()> {
        match &self.blocks {
            Some(known) => known.check(blocks)?,
            None => {
                self.log.begin(blocks)?;
                self.blocks = Some(blocks.identity());
                self.since = blocks.iter().map(|(_, block)| PageBitmap::new(block.pages())).collect();
            }
        }
        // The last migration was complete: nobody has put its pages back.
        if let Some(next) = self.next.take() {
            self.from = Some(next);
            self.since.iter().for_each(PageBitmap::forget);
        }
        Ok(())
    }

    fn take(&mut self, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        let taken = PageBitmap::new(into.pages());
        let result = self.log.take(block, &mut DirtyPages::new(&taken));
        if let Some(since) = self.since.get(block.0) {
            taken.set_words().for_each(|(word, bits)| since.merge_at(word, [bits]));
        }
        into.take_from(&taken);
        if result.is_err() {
            self.is_broken = true;
            self.forget();
        }
        result
    }

    /// The pages that were taken are remembered here, so nothing has to be put back into the log inside.
    fn put_back(&mut self, _block: BlockIndex, _from: &PageBitmap) {
        self.next = None;
    }

    fn mark(&mut self) -> Option<LogMark> {
        if self.is_broken {
            return None;
        }
        self.last += 1;
        self.next = Some(self.last);
        Some(LogMark { log: self.number, at: self.last })
    }

    fn since(&mut self, mark: LogMark, block: BlockIndex, into: &mut DirtyPages<'_>) -> io::Result<()> {
        let refused = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if mark.log != self.number {
            return refused(NotSince::OtherLog);
        }
        if self.is_broken {
            return refused(NotSince::Broken);
        }
        match self.from {
            Some(from) if from == mark.at => {}
            _ => return refused(NotSince::OtherMark),
        }
        let Some(since) = self.since.get(block.0).filter(|since| since.pages() == into.pages()) else {
            return refused(NotSince::OtherLog);
        };
        for (word, bits) in since.set_words() {
            into.bits_of_word(word, bits);
        }
        Ok(())
    }
}

/// Why a log does not know what was written since a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NotSince {
    OtherLog,
    OtherMark,
    Broken,
}

impl fmt::Display for NotSince {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OtherLog => {
                "the base was captured with another dirty log, of another machine or started again since: capture without a base, \
                 or compare with the digests of the base"
            }
            Self::OtherMark => {
                "the dirty log knows what was written since the last complete capture only, and the base is another one: use the \
                 last capture as the base, or compare with the digests of the base"
            }
            Self::Broken => {
                "the dirty log could not be read, so writes may be missing in it: start another log and capture without a base, or \
                 compare with the digests of the base"
            }
        })
    }
}

impl error::Error for NotSince {}

/// The number of the next log. It orders nothing.
static LOGS: AtomicU64 = AtomicU64::new(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockName, DirtyBitmaps, Mapping, Memory, PageIndex, PageSize, RamBlock};

    const BLOCK: BlockIndex = BlockIndex(0);

    fn blocks() -> RamBlocks {
        let memory = Memory::Mapped(Mapping::anonymous(16 << 12).expect("memory"));
        let name = BlockName::new("b").expect("a name");
        let block = RamBlock::new(name, 16 << 12, PageSize::KIB_4, memory).expect("a block");
        RamBlocks::new(vec![block]).expect("one")
    }

    fn bits(result: impl FnOnce(&mut DirtyPages<'_>) -> io::Result<()>) -> Result<u64, String> {
        let into = PageBitmap::new(16);
        result(&mut DirtyPages::new(&into)).map_err(|error| error.to_string())?;
        Ok(into.word_at(0))
    }

    /// A migration that takes everything, and is complete.
    fn migrate(log: &mut impl DirtyLog, blocks: &RamBlocks) -> LogMark {
        log.begin(blocks).expect("begun");
        bits(|into| log.take(BLOCK, into)).expect("taken");
        log.mark().expect("a mark")
    }

    #[test]
    fn pages_since_the_last_complete_migration_are_known() {
        let blocks = blocks();
        let writes = DirtyBitmaps::new(&blocks);
        let mut log = KeptLog::new(writes.reader().expect("alone"));
        writes.mark(BLOCK, PageIndex(1));
        let first = migrate(&mut log, &blocks);
        writes.mark(BLOCK, PageIndex(2));
        log.begin(&blocks).expect("begun");
        assert_eq!(bits(|into| log.since(first, BLOCK, into)), Ok(0), "still in the log");
        assert_eq!(bits(|into| log.take(BLOCK, into)), Ok(0b100));
        assert_eq!(bits(|into| log.since(first, BLOCK, into)), Ok(0b100));
        let second = log.mark().expect("a mark");
        log.begin(&blocks).expect("begun");
        assert_eq!(bits(|into| log.since(second, BLOCK, into)), Ok(0));
        let refused = bits(|into| log.since(first, BLOCK, into)).expect_err("an older one");
        assert!(refused.contains("since the last complete capture only"), "{refused}");
    }

    #[test]
    fn failed_migration_loses_no_page_and_its_mark_is_not_valid() {
        let blocks = blocks();
        let writes = DirtyBitmaps::new(&blocks);
        let mut log = KeptLog::new(writes.reader().expect("alone"));
        let first = migrate(&mut log, &blocks);
        writes.mark(BLOCK, PageIndex(3));
        let failed = migrate(&mut log, &blocks);
        log.put_back(BLOCK, &PageBitmap::full(16));
        writes.mark(BLOCK, PageIndex(4));
        log.begin(&blocks).expect("begun");
        assert!(bits(|into| log.since(failed, BLOCK, into)).is_err());
        bits(|into| log.take(BLOCK, into)).expect("taken");
        assert_eq!(bits(|into| log.since(first, BLOCK, into)), Ok(0b1_1000));
    }

    #[test]
    fn mark_of_another_log_and_other_blocks_are_refused() {
        let (one, other) = (blocks(), blocks());
        let (writes, others) = (DirtyBitmaps::new(&one), DirtyBitmaps::new(&other));
        let mut log = KeptLog::new(writes.reader().expect("alone"));
        let mut second = KeptLog::new(others.reader().expect("alone"));
        let of_other = migrate(&mut second, &other);
        migrate(&mut log, &one);
        log.begin(&one).expect("begun");
        let refused = bits(|into| log.since(of_other, BLOCK, into)).expect_err("another log");
        assert!(refused.contains("another dirty log"), "{refused}");
        assert!(log.begin(&other).is_err());
        // The same writes, read by a log that was started again.
        let before = migrate(&mut log, &one);
        drop(log);
        let mut again = KeptLog::new(writes.reader().expect("alone"));
        again.begin(&one).expect("begun");
        assert!(bits(|into| again.since(before, BLOCK, into)).is_err());
        assert!(bits(|into| crate::NeverDirty.since(before, BLOCK, into)).is_err(), "a log that is not kept");
    }

    #[test]
    fn log_that_could_not_be_read_is_never_trusted_again() {
        struct Fails(bool);
        impl DirtyLog for Fails {
            fn begin(&mut self, _: &RamBlocks) -> io::Result<()> {
                Ok(())
            }
            fn take(&mut self, _: BlockIndex, _: &mut DirtyPages<'_>) -> io::Result<()> {
                if self.0 { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
            }
            fn put_back(&mut self, _: BlockIndex, _: &PageBitmap) {}
        }
        let blocks = blocks();
        let mut log = KeptLog::new(Fails(false));
        let mark = migrate(&mut log, &blocks);
        log.log.0 = true;
        log.begin(&blocks).expect("begun");
        assert!(bits(|into| log.take(BLOCK, into)).is_err());
        log.log.0 = false;
        log.put_back(BLOCK, &PageBitmap::full(16));
        log.begin(&blocks).expect("begun");
        let refused = bits(|into| log.since(mark, BLOCK, into)).expect_err("bits may be lost");
        assert!(refused.contains("could not be read"), "{refused}");
        assert_eq!(log.mark(), None);
    }
}
