//! The interface of a migration to its main stream.

use std::sync::Arc;

use super::{DeviceInfo, DeviceSection, RunState};
use crate::{
    Synced,
    channel::{Stop, Wake},
    error::{Error, Result, Usage},
    ram::{BlockIndex, LogMark, PageBitmap, PageIndex, RamBlocks},
    wire::ChannelId,
};

/// A pass over RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The guest runs during the pass.
    Live,
    /// The guest has stopped; no page remains afterwards.
    Final,
}

/// What the destination has of the round that has ended: see [`Main::round`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Round {
    /// It was not asked, or does not continue without a broken channel.
    NotAgreed,
    /// It has everything, except what these channels have carried since its reply before: their connections are broken, and it
    /// continues without them. It has passed the sync point, and receives nothing more from them.
    Confirmed {
        /// All channels that are lost so far.
        lost: Vec<ChannelId>,
    },
}

/// How a migration ended at the other side, after everything was sent.
#[derive(Debug)]
pub enum Verdict {
    /// The destination has the guest.
    Taken,
    /// The destination does not have the guest and never will: it continues on the source.
    Refused(Error),
    /// The source cannot know whether the destination has the guest.
    Unknown(Error),
}

/// The main stream of a source, as the passes see it. `qemu-stream` writes QEMU's.
///
/// Calls come in this order: `expect`, `begin`, `setup`, then for each pass `begin_pass`, pages, `end_pass`; before the
/// final pass `switchover`, after it `ready`, `end_ram`, `devices` and `complete`. `setup`, `end_pass` and `end_ram`
/// are sync points: their argument shows that a SYNC was sent on every channel; it is `None` without channels.
///
/// **Warning:** the bytes that mark a sync point on main must leave before the call returns. If they stay in a buffer,
/// the destination's channels wait, and when their buffers are full the source waits too, until a limit of either side
/// ends the migration.
pub trait Main {
    /// Announces the guest's devices, whose state follows after it has been stopped. Called first, before a byte is
    /// sent.
    ///
    /// # Errors
    /// If a name cannot be sent, or the destination does not accept as much.
    fn expect(&mut self, devices: &[DeviceInfo]) -> Result<()>;
    /// What the other side has already: everything up to this mark of the dirty log. Then only pages that were written since
    /// are sent. The log must know the mark. Called after [`expect`](Main::expect). Default `None`: nothing.
    fn since(&self) -> Option<LogMark> {
        None
    }
    /// The mark of a log that is [kept](crate::ram::KeptLog): everything up to it was sent. Called before
    /// [`ready`](Main::ready). If the migration fails, the mark is not valid. Default: it is ignored.
    fn marked(&mut self, mark: LogMark) {
        let _ = mark;
    }
    /// Opens the stream. The stream should send the number of channels to the destination, if it can. The channels
    /// connect now, and main's bytes may arrive before they do. 0 is a migration without channels.
    ///
    /// # Errors
    /// Any of these calls fails if the stream breaks, and the migration with it.
    fn begin(&mut self, channels: u8) -> Result<()>;
    /// Announces the blocks; a sync point.
    ///
    /// # Errors
    /// If the stream breaks, or it was made for other blocks.
    fn setup(&mut self, blocks: &RamBlocks, synced: Option<Synced<'_>>) -> Result<()>;
    /// Begins a pass.
    ///
    /// # Errors
    /// If the stream breaks.
    fn begin_pass(&mut self, pass: Pass) -> Result<()>;
    /// Sends a page that is zero, if zero pages go over main.
    ///
    /// # Errors
    /// If the stream breaks.
    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<()>;
    /// Sends a page, in a migration without channels.
    ///
    /// # Errors
    /// If the stream breaks.
    fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<()>;
    /// Ends a pass; a sync point.
    ///
    /// # Errors
    /// If the stream breaks.
    fn end_pass(&mut self, pass: Pass, synced: Option<Synced<'_>>) -> Result<()>;
    /// Asks what the destination has of the round that has ended, and waits for its reply. Called after [`setup`](Main::setup) and
    /// after each [`end_pass`](Main::end_pass), if there are channels. The reply after `setup` decides whether the migration continues
    /// without a channel that breaks: if it is [`Round::Confirmed`], all later ones must be. Default: [`Round::NotAgreed`].
    ///
    /// # Errors
    /// If the stream breaks, or the destination has failed.
    fn round(&mut self) -> Result<Round> {
        Ok(Round::NotAgreed)
    }
    /// Called when the guest has stopped.
    ///
    /// # Errors
    /// If the stream breaks.
    fn switchover(&mut self) -> Result<()>;
    /// Switches to post-copy, with the guest stopped: makes the destination forget the pages in `lacking`, one bitmap for each block,
    /// waits until it has, and sends it the devices and the command to run the guest. Called instead of
    /// [`switchover`](Main::switchover) and everything after it. An error means that the destination cannot have received the
    /// command. Default: refused.
    ///
    /// # Errors
    /// If the stream breaks before all of it was written, the destination refuses, or post-copy is not supported.
    fn postcopy(
        &mut self,
        lacking: &[PageBitmap],
        devices: Vec<DeviceSection>,
        guest: RunState,
    ) -> Result<()> {
        drop((lacking, devices, guest));
        Err(Usage::NoPostcopy { why: "its main stream does not support it" }.into())
    }
    /// Waits until the destination is known to have all of RAM, if the stream can find that out: from then on the
    /// destination restores the guest. Until then [`switchover_timeout`](super::MigrateOptions::switchover_timeout) may
    /// end the migration with the guest here.
    ///
    /// # Errors
    /// If the destination has failed, or the stream breaks.
    fn ready(&mut self) -> Result<()>;
    /// Called when all of RAM has been sent; a sync point.
    ///
    /// # Errors
    /// If the stream breaks.
    fn end_ram(&mut self, synced: Option<Synced<'_>>) -> Result<()>;
    /// Sends the state of the devices as the guest has saved it, whether the guest ran, and the end of the stream.
    ///
    /// # Errors
    /// If the destination cannot have received all of it. An error *after* the last byte has left is not reported by
    /// this call, but by [`complete`](Main::complete).
    fn devices(&mut self, devices: Vec<DeviceSection>, guest: RunState) -> Result<()>;
    /// Waits for the destination's reply on whether it has the guest. Everything has been sent. If `stop` has happened,
    /// or happens during the call, the sending side is [closed](Main::send_waker). The call still waits for the reply,
    /// but only for a short time.
    fn complete(&mut self, stop: &Stop) -> Verdict;
    /// Bytes written so far.
    fn bytes(&self) -> u64;
    /// Ends all waits of these calls before [`devices`](Main::devices), from any thread; `None` if none of them waits
    /// for a peer.
    fn waker(&self) -> Option<Arc<dyn Wake>>;
    /// Ends the sending of [`devices`](Main::devices) and signals to the destination that the source takes the guest
    /// back. The reply can still be read. `None` if nothing waits for a peer.
    fn send_waker(&self) -> Option<Arc<dyn Wake>>;
}
