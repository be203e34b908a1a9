//! One pass: the dirty bits are walked once, and every page found goes to a channel or to main.

use super::{Main, Pace, Progress, ZeroPageDetection};
use crate::{
    channel::Stop,
    error::{Error, Result},
    ram::{BlockIndex, PageBitmap, PageIndex, RamBlock, runs},
    send::Sender,
};

/// What a pass needs of the migration that it is part of.
pub(super) struct Walk<'a> {
    pub(super) sender: Option<&'a mut Sender>,
    pub(super) main: &'a mut dyn Main,
    pub(super) detection: ZeroPageDetection,
    pub(super) pace: &'a mut Pace,
    pub(super) progress: &'a Progress,
    pub(super) stop: &'a Stop,
    /// A private copy of a page, for pages that main carries.
    pub(super) page: &'a mut [u8],
}

impl Walk<'_> {
    /// Takes all bits out of `pending` and sends their pages.
    pub(super) fn block(&mut self, index: BlockIndex, block: &RamBlock, pending: &PageBitmap) -> Result<()> {
        let mut at = 0;
        while let Some((word, bits)) = pending.take_word(at) {
            self.stop.check()?;
            for (first, count) in runs(word, bits) {
                for page in (first.0..first.0 + count).map(PageIndex) {
                    self.page(index, block, page)?;
                }
            }
            self.progress.walked(u64::from(bits.count_ones()));
            at = word + 1;
        }
        Ok(())
    }

    fn page(&mut self, index: BlockIndex, block: &RamBlock, page: PageIndex) -> Result<()> {
        if self.is_zero(block, page) {
            self.progress.duplicate();
            match (&mut self.sender, self.detection) {
                (Some(sender), ZeroPageDetection::Multifd) => sender.queue_zero(index, page)?,
                _ => self.main.zero_page(index, page)?,
            }
            return self.pace.spend(ZERO_ENTRY, self.stop);
        }
        self.progress.normal();
        match &mut self.sender {
            Some(sender) => sender.queue(index, page)?,
            None => {
                let loaded = block.load(page, self.page);
                loaded.map_err(|error| {
                    Error::io(format!("read page {page} of block {:?}", block.name()), error)
                })?;
                self.main.page(index, page, self.page)?;
            }
        }
        self.pace.spend(block.page_size().bytes() as u64, self.stop)
    }

    /// A page that is known to be zero is never read: a file may have anything there. A wrong answer because the
    /// guest writes meanwhile is harmless, for the page is then dirty again.
    fn is_zero(&self, block: &RamBlock, page: PageIndex) -> bool {
        !block.present().contains(page)
            || (self.detection != ZeroPageDetection::None
                && block.slice(page, 1).is_some_and(|slice| slice.is_zero()))
    }
}

/// What a zero page costs on the wire, about: its entry in a head, or its record on main.
const ZERO_ENTRY: u64 = 9;
