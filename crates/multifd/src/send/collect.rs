//! The near end of the channels: pages come in run by run, gather into a batch and are handed over.

use std::marker::PhantomData;

use super::Sender;
use crate::{
    batch::Kind,
    error::{Result, Usage},
    ram::{BlockIndex, PageIndex},
};

/// One SYNC has left on every channel, behind all pages queued so far: what [`Sender::sync`] gives, and what the record of a
/// sync point on main [must have](crate::live::Main::end_pass) before it leaves. A destination stands still at that record
/// until each channel has brought its SYNC.
///
/// ```compile_fail,E0499
/// # use multifd::{Sender, ram::{BlockIndex, PageIndex}};
/// fn late(sender: &mut Sender) -> multifd::Result<()> {
///     let synced = sender.sync()?;
///     sender.queue(BlockIndex(0), PageIndex(0))?; // a page that no SYNC is behind
///     drop(synced);
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct Synced<'a> {
    channels: u8,
    sender: PhantomData<&'a mut Sender>,
}

impl Synced<'_> {
    /// For who writes the channels himself, without a [`Sender`].
    ///
    /// **Warning:** nothing checks it. A record of main whose SYNCs have not left on all of so many channels has the
    /// destination wait for them, 120 s by default, and then fail.
    pub fn asserted(channels: u8) -> Self {
        Self { channels, sender: PhantomData }
    }

    /// The number of channels.
    pub fn channels(&self) -> u8 {
        self.channels
    }
}

impl Sender {
    /// Queues a page whose bytes travel. They are read when a channel gets to it, and once only; a page that
    /// the guest writes after its dirty bit was taken is dirty again.
    ///
    /// Waits while all batches are on their way: that is the back-pressure.
    ///
    /// # Errors
    /// The error that stopped the migration; [`Usage`] if there is no such page.
    pub fn queue(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.queue_run(block, page, 1)
    }

    /// Queues `count` pages from `first` on, whose bytes travel. Otherwise as [`queue`](Sender::queue).
    ///
    /// # Errors
    /// As [`queue`](Sender::queue). If one of the pages does not exist, none is queued.
    pub fn queue_run(&mut self, block: BlockIndex, first: PageIndex, count: u64) -> Result<()> {
        self.collect(Kind::Normal, block, first, count)
    }

    /// Queues `count` pages from `first` on that are zero and travel as entries in a packet's head. Only destinations from
    /// QEMU 9.0 on understand that.
    ///
    /// # Errors
    /// As [`queue_run`](Sender::queue_run).
    pub fn queue_zero_run(&mut self, block: BlockIndex, first: PageIndex, count: u64) -> Result<()> {
        self.collect(Kind::Zero, block, first, count)
    }

    /// Queues `count` pages from `first` on, each of which is zero or not: the channel that carries it looks, and sends its
    /// bytes or [an entry](Sender::queue_zero_run) accordingly.
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

    /// The channel sync: hands over what is queued, and waits until one SYNC packet has left on every channel
    /// after everything queued so far. Then the main stream's record of the sync point may go, at once: what comes back is
    /// what that asks for, and nothing can be queued while it is held.
    ///
    /// # Errors
    /// The error that stopped the migration.
    pub fn sync(&mut self) -> Result<Synced<'_>> {
        self.ready()?;
        if !self.hand.is_empty() {
            self.hand_over()?;
        }
        let shared = self.shared()?;
        shared.dispatch.sync(&shared.stop)?;
        tracing::debug!("multifd_send_sync_main");
        Ok(Synced { channels: self.options.channels, sender: PhantomData })
    }

    fn hand_over(&mut self) -> Result<()> {
        let Some(shared) = &self.shared else { return Err(Usage::TooEarly("the sender").into()) };
        shared.dispatch.swap(&mut self.hand, &shared.stop)
    }
}
