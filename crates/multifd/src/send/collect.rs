//! The collector: pages arrive run by run, are collected in a batch and are handed over to the channels.

use std::marker::PhantomData;

use super::Sender;
use crate::{
    batch::Kind,
    error::{Result, Usage},
    ram::{BlockIndex, PageIndex},
    wire::ChannelId,
};

/// Proof that one SYNC was sent on every channel, after all pages queued so far. [`Sender::sync`] returns it, and the
/// record of a sync point on main [needs it](crate::live::Main::end_pass) before it leaves. A destination waits at that
/// record until the SYNC of each channel has arrived, except of those that it knows to be [lost](Self::lost).
///
/// ```compile_fail,E0499
/// # use multifd::{Sender, ram::{BlockIndex, PageIndex}};
/// fn late(sender: &mut Sender) -> multifd::Result<()> {
///     let synced = sender.sync()?;
///     sender.queue(BlockIndex(0), PageIndex(0))?; // a page that no SYNC follows
///     drop(synced);
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct Synced<'a> {
    channels: u8,
    lost: Vec<ChannelId>,
    sender: PhantomData<&'a mut Sender>,
}

impl Synced<'_> {
    /// Creates the proof without a check, for a caller that writes the channels itself, without a [`Sender`].
    ///
    /// **Warning:** nothing checks it. If main's record leaves before `channels` SYNCs have left, the destination waits
    /// for them, 120 s by default, and then fails.
    pub fn asserted(channels: u8) -> Self {
        Self { channels, lost: Vec::new(), sender: PhantomData }
    }

    /// The number of channels, including those that are lost.
    pub fn channels(&self) -> u8 {
        self.channels
    }

    /// The channels whose connection is broken, on which no SYNC was sent. The destination must know of them before main's record
    /// leaves. Always empty, unless the destination has [agreed](crate::live::Round) to continue without them.
    pub fn lost(&self) -> &[ChannelId] {
        &self.lost
    }
}

impl Sender {
    /// Queues a page whose bytes are to be sent. A channel reads them later, and only once. A page that the guest
    /// writes after its dirty bit was taken is dirty again.
    ///
    /// Waits while all batches are in use: this is the back-pressure.
    ///
    /// # Errors
    /// The error that stopped the migration; [`Usage`] if there is no such page.
    pub fn queue(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.queue_run(block, page, 1)
    }

    /// Queues `count` pages from `first` on, whose bytes are to be sent. Otherwise like [`queue`](Sender::queue).
    ///
    /// # Errors
    /// As [`queue`](Sender::queue). If one of the pages does not exist, none is queued.
    pub fn queue_run(&mut self, block: BlockIndex, first: PageIndex, count: u64) -> Result<()> {
        self.collect(Kind::Normal, block, first, count)
    }

    /// Queues `count` pages from `first` on that are zero. They are sent as entries in a packet's head. Only
    /// destinations from QEMU 9.0 on support that.
    ///
    /// # Errors
    /// As [`queue_run`](Sender::queue_run).
    pub fn queue_zero_run(&mut self, block: BlockIndex, first: PageIndex, count: u64) -> Result<()> {
        self.collect(Kind::Zero, block, first, count)
    }

    /// Queues `count` pages from `first` on that may be zero or not. The channel that carries a page checks it, and
    /// sends its bytes or [an entry](Sender::queue_zero_run) accordingly.
    ///
    /// # Errors
    /// As [`queue_run`](Sender::queue_run).
    pub fn queue_unknown_run(&mut self, block: BlockIndex, first: PageIndex, count: u64) -> Result<()> {
        self.collect(Kind::Unknown, block, first, count)
    }

    pub(crate) fn collect(
        &mut self,
        kind: Kind,
        block: BlockIndex,
        first: PageIndex,
        count: u64,
    ) -> Result<()> {
        self.ready()?;
        let of = self.blocks.block(block)?;
        let end = first.0.saturating_add(count);
        if end > of.pages() {
            let (name, pages) = (of.name().clone(), of.pages());
            return Err(Usage::NoSuchPage { name, page: first.0.max(pages), pages }.into());
        }
        let mut at = first.0;
        while at < end {
            let border = self.targets.as_ref().map(|targets| targets.border(block, PageIndex(at)));
            if !self.hand.takes(block) || border == Some(at) && self.hand.is_worth_a_way() {
                self.hand_over()?;
            }
            let most = border.filter(|border| *border > at).map_or(end, |border| border.min(end));
            at += self.hand.push(kind, block, PageIndex(at), most - at);
            if self.hand.is_full() {
                self.hand_over()?;
            }
        }
        Ok(())
    }

    /// The channel sync: hands over the queued pages, and waits until one SYNC packet has left on every channel after
    /// everything queued so far. The main stream's record of the sync point may then be sent at once: it needs the
    /// returned proof. While the proof exists, nothing can be queued.
    ///
    /// # Errors
    /// The error that stopped the migration.
    pub fn sync(&mut self) -> Result<Synced<'_>> {
        self.ready()?;
        if !self.hand.is_empty() {
            self.hand_over()?;
        }
        let shared = self.shared()?;
        let lost = shared.dispatch.sync(&shared.stop)?;
        tracing::debug!("multifd_send_sync_main");
        Ok(Synced { channels: self.options.channels, lost, sender: PhantomData })
    }

    fn hand_over(&mut self) -> Result<()> {
        let Some(shared) = &self.shared else { return Err(Usage::TooEarly("the sender").into()) };
        shared.dispatch.swap(&mut self.hand, &shared.stop)
    }
}
