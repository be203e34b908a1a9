//! The near end of the channels: pages come in one by one, gather into a batch and are handed over.

use super::Sender;
use crate::{
    error::{Result, Usage},
    ram::{BlockIndex, PageIndex},
};

impl Sender {
    /// Queues a page whose bytes travel. They are read when a channel gets to it, and once only; a page that
    /// the guest writes after its dirty bit was taken is dirty again.
    ///
    /// Waits while all batches are on their way: that is the back-pressure.
    ///
    /// # Errors
    /// The error that stopped the migration; [`Usage`] if there is no such page.
    pub fn queue(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.make_room(block, page)?;
        self.hand.push_normal(block, page);
        self.hand_over_if_full()
    }

    /// Queues `count` pages from `first` on, whose bytes travel. Otherwise as [`queue`](Sender::queue).
    ///
    /// # Errors
    /// As [`queue`](Sender::queue).
    pub fn queue_run(&mut self, block: BlockIndex, first: PageIndex, count: u64) -> Result<()> {
        for page in first.0..first.0.saturating_add(count) {
            self.queue(block, PageIndex(page))?;
        }
        Ok(())
    }

    /// Queues a page that is zero and travels as an entry in a packet's head. Only destinations from QEMU 9.0 on
    /// understand that.
    ///
    /// # Errors
    /// As [`queue`](Sender::queue).
    pub fn queue_zero(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.make_room(block, page)?;
        self.hand.push_zero(block, page);
        self.hand_over_if_full()
    }

    /// Queues a page that is zero or not: the channel that carries it looks, and sends its bytes or
    /// [an entry](Sender::queue_zero) accordingly.
    ///
    /// # Errors
    /// As [`queue`](Sender::queue).
    pub fn queue_unknown(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.make_room(block, page)?;
        self.hand.push_unknown(block, page);
        self.hand_over_if_full()
    }

    /// The channel sync: hands over what is queued, and waits until one SYNC packet has left on every channel
    /// after everything queued so far. Then the main stream's record of the sync point may go, at once.
    ///
    /// # Errors
    /// The error that stopped the migration.
    pub fn sync(&mut self) -> Result<()> {
        self.ready()?;
        if !self.hand.is_empty() {
            self.hand_over()?;
        }
        let shared = self.shared()?;
        shared.dispatch.sync(&shared.stop)?;
        tracing::debug!("multifd_send_sync_main");
        Ok(())
    }

    fn make_room(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.ready()?;
        let of = self.blocks.block(block)?;
        if page.0 >= of.pages() {
            let (name, pages) = (of.name().clone(), of.pages());
            return Err(Usage::NoSuchPage { name, page: page.0, pages }.into());
        }
        if self.hand.takes(block) { Ok(()) } else { self.hand_over() }
    }

    fn hand_over_if_full(&mut self) -> Result<()> {
        if self.hand.is_full() { self.hand_over() } else { Ok(()) }
    }

    fn hand_over(&mut self) -> Result<()> {
        let Some(shared) = &self.shared else { return Err(Usage::TooEarly("the sender").into()) };
        shared.dispatch.swap(&mut self.hand, &shared.stop)
    }
}
