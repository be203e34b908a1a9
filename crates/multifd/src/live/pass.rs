//! One pass: walks the dirty bits once and sends every page found to a channel or to main, run by run.

use super::{Main, Pace, Progress, ZeroPageDetection, converge::ZERO_ENTRY};
use crate::{
    batch::Kind,
    channel::Stop,
    error::{Error, Result},
    ram::{BlockIndex, PageBitmap, PageIndex, RamBlock, runs},
    send::Sender,
};

/// The parts of the migration that a pass uses.
pub(super) struct Walk<'a> {
    pub(super) sender: Option<&'a mut Sender>,
    pub(super) main: &'a mut dyn Main,
    pub(super) detection: ZeroPageDetection,
    /// Whether pages are checked for zeros that are not known to be zero.
    pub(super) look: bool,
    /// Pages that may be nonzero, one bitmap for each block for which that is known; all other pages are zero. A page
    /// that is dirtied later is handled by a later pass.
    pub(super) touched: &'a [Option<PageBitmap>],
    pub(super) pace: &'a mut Pace,
    pub(super) progress: &'a Progress,
    pub(super) stop: &'a Stop,
    /// A private copy of a page, for pages that go over main.
    pub(super) page: &'a mut [u8],
    /// Whether the pass should end now, with the rest of the bits where they are.
    pub(super) ends: &'a dyn Fn() -> bool,
}

impl Walk<'_> {
    /// Takes all bits out of `pending` and sends their pages. Returns whether the pass has to [end](Walk::ends) before.
    pub(super) fn block(
        &mut self,
        index: BlockIndex,
        block: &RamBlock,
        pending: &PageBitmap,
    ) -> Result<bool> {
        let mut words = pending.take_words();
        loop {
            if (self.ends)() {
                return Ok(true);
            }
            let Some((word, bits)) = words.next() else { return Ok(false) };
            self.stop.check()?;
            let zero = bits & self.known_zero(index, block, word);
            for (first, count) in runs(word, zero) {
                self.pages(Kind::Zero, index, block, first, count)?;
            }
            for (first, count) in runs(word, bits & !zero) {
                self.rest(index, block, first, count)?;
            }
            self.progress.walked(u64::from(bits.count_ones()));
        }
    }

    /// The pages of a word that are known to be zero. A page in a file must not be read: its bytes are undefined. A
    /// wrong answer because the guest writes at the same time is harmless, because the page is then dirty again.
    fn known_zero(&self, index: BlockIndex, block: &RamBlock, word: usize) -> u64 {
        if self.detection == ZeroPageDetection::None {
            return 0;
        }
        let absent = match self.touched.get(index.0) {
            Some(Some(touched)) => !touched.word_at(word),
            _ => 0,
        };
        !block.present_word(word) | absent
    }

    /// Handles pages that are not known to be zero.
    fn rest(&mut self, index: BlockIndex, block: &RamBlock, first: PageIndex, count: u64) -> Result<()> {
        if self.detection == ZeroPageDetection::None || !self.look {
            return self.pages(Kind::Normal, index, block, first, count);
        }
        // With a limit, the cost of a page must be known before it is sent, and there is time to check it here.
        if self.detection == ZeroPageDetection::Multifd && self.sender.is_some() && !self.pace.is_limited() {
            return self.pages(Kind::Unknown, index, block, first, count);
        }
        for page in (first.0..first.0 + count).map(PageIndex) {
            let kind = if block.is_zero(page) { Kind::Zero } else { Kind::Normal };
            self.pages(kind, index, block, page, 1)?;
        }
        Ok(())
    }

    fn pages(
        &mut self,
        kind: Kind,
        index: BlockIndex,
        block: &RamBlock,
        first: PageIndex,
        count: u64,
    ) -> Result<()> {
        let by_channels = kind != Kind::Zero || self.detection == ZeroPageDetection::Multifd;
        // The limit is enforced page by page.
        let step = if self.pace.is_limited() { 1 } else { count };
        for at in (first.0..first.0 + count).step_by(usize::try_from(step).unwrap_or(1)).map(PageIndex) {
            match &mut self.sender {
                Some(sender) if by_channels => sender.collect(kind, index, at, step)?,
                _ => self.by_main(kind, index, block, at, step)?,
            }
            let cost = match kind {
                Kind::Normal => block.page_size().bytes() as u64,
                Kind::Zero => ZERO_ENTRY,
                Kind::Unknown => 0,
            };
            self.pace.spend(cost * step, self.stop, self.ends)?;
        }
        Ok(())
    }

    fn by_main(
        &mut self,
        kind: Kind,
        index: BlockIndex,
        block: &RamBlock,
        first: PageIndex,
        count: u64,
    ) -> Result<()> {
        for page in (first.0..first.0 + count).map(PageIndex) {
            if kind == Kind::Zero {
                self.progress.duplicate();
                self.main.zero_page(index, page)?;
                continue;
            }
            self.progress.normal();
            let loaded = block.load(page, self.page);
            loaded.map_err(|error| {
                let offset = block.page_size().bytes() as u64 * page.0;
                Error::io(format!("read block {:?} at offset {offset:#x}", block.name()), error)
            })?;
            self.main.page(index, page, self.page)?;
            self.progress.main_bytes(self.main.bytes());
        }
        self.progress.main_bytes(self.main.bytes());
        Ok(())
    }
}
