//! One pass: the dirty bits are walked once, and every page found goes to a channel or to main.

use super::{Main, Pace, Progress, ZeroPageDetection, converge::ZERO_ENTRY};
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
    /// Whether pages are looked at that are not known to be zero.
    pub(super) look: bool,
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
        let cost = match (self.kind(block, page), &mut self.sender, self.detection) {
            (Kind::Unknown, Some(sender), _) => {
                sender.queue_unknown(index, page)?;
                0
            }
            (Kind::Zero, Some(sender), ZeroPageDetection::Multifd) => {
                sender.queue_zero(index, page)?;
                ZERO_ENTRY
            }
            (Kind::Zero, ..) => {
                self.progress.duplicate();
                self.main.zero_page(index, page)?;
                ZERO_ENTRY
            }
            (_, Some(sender), _) => {
                sender.queue(index, page)?;
                block.page_size().bytes() as u64
            }
            (_, None, _) => {
                self.progress.normal();
                let loaded = block.load(page, self.page);
                loaded.map_err(|error| {
                    let offset = block.page_size().bytes() as u64 * page.0;
                    Error::io(format!("read block {:?} at offset {offset:#x}", block.name()), error)
                })?;
                self.main.page(index, page, self.page)?;
                block.page_size().bytes() as u64
            }
        };
        self.pace.spend(cost, self.stop)
    }

    /// A page that is known to be zero is never read: a file may have anything there. A wrong answer because the
    /// guest writes meanwhile is harmless, for the page is then dirty again.
    fn kind(&self, block: &RamBlock, page: PageIndex) -> Kind {
        if self.detection == ZeroPageDetection::None {
            return Kind::Normal;
        }
        if !block.present().contains(page) {
            return Kind::Zero;
        }
        if !self.look {
            return Kind::Normal;
        }
        // With a limit it must be known what a page costs before it goes, and there is time to look here.
        if self.detection == ZeroPageDetection::Multifd && self.sender.is_some() && !self.pace.is_limited() {
            return Kind::Unknown;
        }
        if block.slice(page, 1).is_some_and(|slice| slice.is_zero()) { Kind::Zero } else { Kind::Normal }
    }
}

/// What is known of a page before it goes.
enum Kind {
    Normal,
    Zero,
    /// The channel looks.
    Unknown,
}
