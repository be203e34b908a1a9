//! What a migration asks of its main stream.

use std::sync::Arc;

use super::{DeviceInfo, DeviceSection, RunState};
use crate::{
    Synced,
    channel::{Stop, Wake},
    error::{Error, Result},
    ram::{BlockIndex, PageIndex, RamBlocks},
};

/// A pass over RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The guest runs meanwhile.
    Live,
    /// The guest has stopped; nothing remains afterwards.
    Final,
}

/// How a migration has ended at the other end, when everything has been sent.
#[derive(Debug)]
pub enum Verdict {
    /// The destination has the guest.
    Taken,
    /// The destination has not got the guest and never will: it goes on at the source.
    Refused(Error),
    /// Nobody here can know whether the destination has the guest.
    Unknown(Error),
}

/// The main stream of a source, as the passes see it. `qemu-stream` writes QEMU's.
///
/// Calls come in this order: `expect`, `begin`, `setup`, then for each pass `begin_pass`, pages, `end_pass`; before the
/// final pass `switchover`, after it `ready`, `end_ram`, `devices` and `complete`. `setup`, `end_pass` and `end_ram` are sync
/// points: they are given that a SYNC has left on every channel, `None` without channels.
///
/// **Warning:** what marks a sync point on main must leave before the call returns. If it is kept back the destination's
/// channels stand still, and when they are full so does the source, until a limit of either side ends the migration.
pub trait Main {
    /// The guest has these devices, whose state comes when it has been stopped. Comes first, before a byte is sent.
    ///
    /// # Errors
    /// If a name cannot be sent, or the destination does not take as much.
    fn expect(&mut self, devices: &[DeviceInfo]) -> Result<()>;
    /// Opens the stream. It is the stream's task to tell the destination the number of channels, if it can: they connect
    /// now, and main's bytes may arrive before they do. 0 is a migration without channels.
    ///
    /// # Errors
    /// Any of these calls fails if the stream breaks, and the migration with it.
    fn begin(&mut self, channels: u8) -> Result<()>;
    /// Announces the blocks; a sync point.
    ///
    /// # Errors
    /// If the stream breaks, or the blocks are not those that it was made for.
    fn setup(&mut self, blocks: &RamBlocks, synced: Option<Synced<'_>>) -> Result<()>;
    /// A pass begins.
    ///
    /// # Errors
    /// If the stream breaks.
    fn begin_pass(&mut self, pass: Pass) -> Result<()>;
    /// A page that is zero, when zero pages go over main.
    ///
    /// # Errors
    /// If the stream breaks.
    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<()>;
    /// A page, in a migration without channels.
    ///
    /// # Errors
    /// If the stream breaks.
    fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<()>;
    /// The pass is over; a sync point.
    ///
    /// # Errors
    /// If the stream breaks.
    fn end_pass(&mut self, pass: Pass, synced: Option<Synced<'_>>) -> Result<()>;
    /// The guest has stopped.
    ///
    /// # Errors
    /// If the stream breaks.
    fn switchover(&mut self) -> Result<()>;
    /// Waits until the destination is known to have all of RAM, where it can be known: from then on it restores. Until then
    /// [`switchover_timeout`](super::MigrateOptions::switchover_timeout) may end the migration with the guest here.
    ///
    /// # Errors
    /// If the destination has failed, or the stream breaks.
    fn ready(&mut self) -> Result<()>;
    /// All of RAM has been sent; a sync point.
    ///
    /// # Errors
    /// If the stream breaks.
    fn end_ram(&mut self, synced: Option<Synced<'_>>) -> Result<()>;
    /// The devices' state, as the guest has saved it, whether the guest ran, and the end of the stream.
    ///
    /// # Errors
    /// If the destination cannot have got all of it. An error *after* the last byte has left is not for this call, but for
    /// [`complete`](Main::complete).
    fn devices(&mut self, devices: Vec<DeviceSection>, guest: RunState) -> Result<()>;
    /// Waits for the destination's word whether it has the guest. Everything has been sent. If `stop` has happened, or happens
    /// meanwhile, the sending side is [closed](Main::send_waker): the word is still waited for, but not for long.
    fn complete(&mut self, stop: &Stop) -> Verdict;
    /// Bytes written so far.
    fn bytes(&self) -> u64;
    /// What ends all waits of these calls, from any thread, before [`devices`](Main::devices); `None` if none of them waits
    /// for a peer.
    fn waker(&self) -> Option<Arc<dyn Wake>>;
    /// What ends the sending of [`devices`](Main::devices) and tells the destination that the source takes the guest back;
    /// its word can still be read. `None` if nothing waits for a peer.
    fn send_waker(&self) -> Option<Arc<dyn Wake>>;
}
