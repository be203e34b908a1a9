//! Connects QEMU's main stream with the engine's passes.
//!
//! A [`MainStream`] turns the calls of a [`Migration`](multifd::live::Migration) into those of an [`Outgoing`]. The devices
//! come from the guest, or unchanged from a captured machine.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use multifd::{
    Result, Synced,
    channel::{CloseWatch, Stop, Wake},
    live::{self, DeviceInfo, Main, Pass, Round, RunState, Verdict},
    parameters::STALL_TIMEOUT,
    ram::{PageBitmap, PageIndex, RamBlocks},
};

use super::{
    Outgoing,
    options::{END, VERDICT},
    postcopy::{Machine, PostcopyOptions, Requests},
    return_path::Peer,
    writer::failed,
};
use crate::{
    connection::Connection,
    embedder::{check_devices, devices_of, list_of},
    error::Usage,
    format::{BlockIndex, BlockList, DevicePart},
};

/// The main stream of a live migration.
pub struct MainStream<C> {
    outgoing: Outgoing<C>,
    captured: Option<(BlockList, DevicePart)>,
    end_timeout: Option<Duration>,
    verdict_timeout: Duration,
    /// How long the destination may not reply between passes and at the switch.
    reply_timeout: Option<Duration>,
    stop: Stop,
    /// Present while the guest runs.
    watch: Option<CloseWatch>,
    postcopy: Option<PostcopyOptions>,
    /// The connection for requested pages, if there is one. Never locked: the mutex only keeps this type `Sync`.
    requests: Option<Mutex<Requests>>,
    list: Option<BlockList>,
    /// The machine, after the switch to post-copy.
    switched: Option<Machine>,
}

impl<C> std::fmt::Debug for MainStream<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MainStream")
            .field("end_timeout", &self.end_timeout)
            .field("verdict_timeout", &self.verdict_timeout)
            .field("stop", &self.stop)
            .finish_non_exhaustive()
    }
}

impl<C: Connection> MainStream<C> {
    /// The stream of a running machine. The engine provides its block list, and its guest the devices. `stop` is the stop
    /// of the migration: it fails as soon as the destination reports a failure, or closes the connection.
    pub fn of_guest(outgoing: Outgoing<C>, stop: &Stop) -> Self {
        let (end_timeout, verdict_timeout, stop) = (Some(END), VERDICT, stop.clone());
        let (captured, watch, postcopy, list, switched) = (None, None, None, None, None);
        let requests = None;
        let reply_timeout = Some(STALL_TIMEOUT.default_time());
        Self {
            outgoing,
            captured,
            end_timeout,
            verdict_timeout,
            reply_timeout,
            stop,
            watch,
            postcopy,
            requests,
            list,
            switched,
        }
    }

    /// The stream of a captured machine, whose block list and devices are replayed.
    pub fn of_capture(outgoing: Outgoing<C>, blocks: BlockList, devices: DevicePart, stop: &Stop) -> Self {
        Self { captured: Some((blocks, devices)), ..Self::of_guest(outgoing, stop) }
    }

    /// The time limit for the destination to confirm that it has the guest, after everything was sent. The destination may
    /// need this time to write a file to a slow disk. Default 600 s; `None` is no limit, as in QEMU. After the time limit
    /// [it is not known](multifd::Error::OwnerUnknown) whether the destination has the guest.
    #[must_use]
    pub fn end_timeout(mut self, limit: Option<Duration>) -> Self {
        self.end_timeout = limit;
        self
    }

    /// The time limit for the destination to report whether it has the guest, if the migration is cancelled after
    /// everything was sent. Default 10 s. After the time limit it is not known whether the destination has the guest, as
    /// with [`end_timeout`](Self::end_timeout).
    #[must_use]
    pub fn verdict_timeout(mut self, limit: Duration) -> Self {
        self.verdict_timeout = limit;
        self
    }

    /// How long the destination may take to reply to a question between passes, or at the switch to post-copy. Default 120 s; `None`
    /// is no limit.
    pub(crate) fn reply_timeout(mut self, limit: Option<Duration>) -> Self {
        self.reply_timeout = limit;
        self
    }

    /// The stream of a machine that may switch to post-copy. The options of `outgoing` announce that.
    pub(crate) fn with_postcopy(mut self, options: PostcopyOptions, requests: Option<Requests>) -> Self {
        (self.postcopy, self.requests) = (Some(options), requests.map(Mutex::new));
        self
    }

    /// The connection, what is known about the destination, and the machine, after the switch to post-copy.
    pub(super) fn into_switched(self) -> Option<(C, Peer, Machine, Option<Requests>)> {
        let (connection, peer) = self.outgoing.into_parts();
        let requests = self.requests.and_then(|requests| requests.into_inner().ok());
        Some((connection, peer, self.switched?, requests))
    }

    fn requests(&mut self) -> Option<&mut Requests> {
        self.requests.as_mut().and_then(|requests| requests.get_mut().ok())
    }

    /// The stream that it writes to.
    pub fn into_inner(self) -> Outgoing<C> {
        self.outgoing
    }

    fn list(&self, blocks: &RamBlocks) -> Result<BlockList, Usage> {
        match &self.captured {
            Some((list, _)) => Ok(list.clone()),
            None => list_of(blocks),
        }
    }
}

impl<C: Connection> Main for MainStream<C> {
    fn expect(&mut self, devices: &[DeviceInfo]) -> Result<()> {
        if self.captured.is_some() {
            return Ok(());
        }
        let options = self.outgoing.options();
        check_devices(devices, options.page_size().bytes(), options.section).map_err(failed)
    }

    fn begin(&mut self, channels: u8) -> Result<()> {
        self.outgoing.begin(channels).map_err(failed)?;
        // Not earlier: a destination knows main by its first bytes.
        self.requests().map_or(Ok(()), Requests::connect)?;
        self.watch = self.outgoing.watch(&self.stop);
        Ok(())
    }

    /// # Errors
    /// If the stream fails; if a captured machine has other blocks than these, or one is ignored and the configuration
    /// lacks `x-ignore-shared`: it would contain zeros at the destination.
    fn setup(&mut self, blocks: &RamBlocks, synced: Option<Synced<'_>>) -> Result<()> {
        let list = self.list(blocks).map_err(failed)?;
        check_list(&list, blocks, self.outgoing.options().ignore_shared()).map_err(failed)?;
        let list =
            self.postcopy.as_ref().map_or(Ok(list.clone()), |options| options.list(&list)).map_err(failed)?;
        if self.postcopy.is_some() {
            self.list = Some(list.clone());
        }
        self.outgoing.setup(list, synced).map_err(failed)?;
        match &self.captured {
            Some((_, devices)) => self.outgoing.early(devices).map_err(failed),
            None => Ok(()),
        }
    }

    fn begin_pass(&mut self, _pass: Pass) -> Result<()> {
        self.outgoing.begin_part().map_err(failed)
    }

    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.outgoing.zero_page(block, page).map_err(failed)
    }

    fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<()> {
        self.outgoing.page(block, page, bytes).map_err(failed)
    }

    fn end_pass(&mut self, _pass: Pass, synced: Option<Synced<'_>>) -> Result<()> {
        self.outgoing.end_part(synced).map_err(failed)
    }

    fn round(&mut self) -> Result<Round> {
        if !self.outgoing.options().channels_may_break {
            return Ok(Round::NotAgreed);
        }
        // The watch would read the reply that is waited for.
        self.watch = None;
        let lost = self.outgoing.round(self.reply_timeout).map_err(failed)?;
        self.watch = self.outgoing.watch(&self.stop);
        Ok(lost.map_or(Round::NotAgreed, |lost| Round::Confirmed { lost }))
    }

    fn switchover(&mut self) -> Result<()> {
        self.outgoing.switchover().map_err(failed)
    }

    fn postcopy(
        &mut self,
        lacking: &[PageBitmap],
        devices: Vec<live::DeviceSection>,
        guest: RunState,
    ) -> Result<()> {
        // The watch would read the replies that are waited for.
        self.watch = None;
        let options = self.outgoing.options().clone();
        let (Some(postcopy), Some(list)) = (&self.postcopy, &self.list) else {
            let why = "SourceOptions::postcopy is not set";
            return Err(multifd::error::Usage::NoPostcopy { why }.into());
        };
        let part =
            devices_of(devices, guest, options.page_size().bytes(), options.section).map_err(failed)?;
        let machine = Machine::new(options.multifd(false), list.clone(), part).map_err(failed)?;
        let keep = postcopy.kept(list, lacking);
        let discards = machine.discards(&keep);
        let ours = self.outgoing.discard(&discards, self.reply_timeout).map_err(failed)?;
        // The last moment at which the guest can stay.
        self.requests().map_or(Ok(()), Requests::check)?;
        self.outgoing.package(&machine.switch(ours)).map_err(failed)?;
        self.switched = Some(machine);
        Ok(())
    }

    // A captured machine is asked about as well: a destination whose channels have failed never has all of RAM, and the devices
    // are not sent to it.
    fn ready(&mut self) -> Result<()> {
        // The watch would read the reply that `ready` waits for.
        self.watch = None;
        // No guest is stopped meanwhile, so no other limit ends this wait.
        let limit = self.captured.as_ref().and(self.end_timeout);
        self.outgoing.ready_within(limit).map_err(failed)
    }

    fn end_ram(&mut self, synced: Option<Synced<'_>>) -> Result<()> {
        let outgoing = &mut self.outgoing;
        let named = outgoing.name_lost(synced.as_ref());
        named.and_then(|()| outgoing.begin_end()).and_then(|()| outgoing.end_part(synced)).map_err(failed)
    }

    fn devices(&mut self, devices: Vec<live::DeviceSection>, guest: RunState) -> Result<()> {
        let part = match &self.captured {
            Some((_, captured)) => captured.clone(),
            None => {
                let options = self.outgoing.options();
                devices_of(devices, guest, options.page_size().bytes(), options.section).map_err(failed)?
            }
        };
        self.outgoing.devices(&part).map_err(failed)
    }

    fn complete(&mut self, stop: &Stop) -> Verdict {
        self.outgoing.complete(stop, self.end_timeout, self.verdict_timeout)
    }

    fn bytes(&self) -> u64 {
        self.outgoing.bytes()
    }

    fn waker(&self) -> Option<Arc<dyn Wake>> {
        self.outgoing.connection().waker()
    }

    fn send_waker(&self) -> Option<Arc<dyn Wake>> {
        self.outgoing.connection().write_waker()
    }
}

/// Refuses a block list that differs from the blocks that are sent.
fn check_list(list: &BlockList, blocks: &RamBlocks, ignore_shared: bool) -> Result<(), Usage> {
    if list.entries().len() != blocks.len() {
        let why = format!("{} blocks are listed, {} are sent", list.entries().len(), blocks.len());
        return Err(Usage::Blocks(why));
    }
    for (entry, (_, block)) in list.entries().iter().zip(blocks.iter()) {
        if (&entry.name, entry.used_length) != (block.name(), block.used_length()) {
            let (name, length) = (block.name(), block.used_length());
            return Err(Usage::Blocks(format!(
                "\"{}\" with {:#x} bytes is listed where \"{name}\" with {length:#x} is sent",
                entry.name, entry.used_length
            )));
        }
        if block.is_ignored() && !ignore_shared {
            return Err(Usage::Blocks(format!(
                "\"{}\" is ignored, but the configuration lacks x-ignore-shared: it would contain zeros at the destination",
                entry.name
            )));
        }
    }
    Ok(())
}
