//! Connects the engine's receiver with the main stream, as its destination.
//!
//! The records of main become calls of a [`Receiver`]: the page size before the first packet, the blocks before the first
//! page, every sync point, the end of RAM. The caller provides the blocks, in memory or in a file.
//!
//! ```text
//! announced: names, lengths ─▶ make ─▶ blocks, in any order ─ by name and length ─▶ pages ─▶ finish: is RAM complete?
//! ```

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use multifd::{
    Arrived, Error, MayMiss, Receiver, Result,
    error::Usage,
    ram::{self, PageBitmap, PageIndex, RamBlock, RamBlocks},
    wire::ChannelId,
};

use super::{
    counts::{MainCounts, MainPages},
    destination::Destination,
    early::RunEarly,
    loaded::Loaded,
    passes::{self, Idle, Passes},
    preempt::Preempt,
};
use crate::{
    error::Violation,
    format::{BlockEntry, BlockIndex, BlockList, Configuration, DevicePart, MachineType},
};

/// Which machines a destination accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Any machine: for a destination that only stores it, such as a capture.
    AnyMachine,
    /// Machines of this type. The name is compared byte by byte with the one in the source's configuration.
    Type(MachineType),
}

/// What a source may omit from RAM. RAM without any page is always refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LeftOut {
    /// Only blocks that are [ignored](multifd::ram::RamBlock::ignored) on this side, because it shares their memory with
    /// the source.
    #[default]
    Ignored,
    /// With capability `x-ignore-shared` also any other block without a single page.
    SharedBlocks,
    /// Any page: a source that uses free-page hints of virtio-balloon does not send pages that its guest does not use. Such
    /// pages are cleared. **Warning:** a page that the network lost looks the same.
    Pages,
}

/// Receives a machine with a [`Receiver`].
pub struct Loader<'a, F> {
    receiver: &'a Receiver,
    make: F,
    state: LoaderState,
}

/// What a loader knows. It outlives its loader where the blocks are made between two calls.
#[derive(Debug)]
pub(crate) struct LoaderState {
    expected: Expected,
    left_out: LeftOut,
    configuration: Option<Configuration>,
    /// For each block of the source's list, the block that was made for it.
    order: Vec<BlockIndex>,
    passes: Passes,
    idle: Idle,
    begun: Instant,
    /// When the last section of RAM began.
    last_section: Instant,
    /// The bytes of the blocks of RAM that no device brings.
    plain_ram: u64,
    /// Whether a source that waits for SWITCHOVER_ACK would wait without limit.
    ack_may_be_missing: bool,
    counts: Arc<MainCounts>,
    preempt: Arc<Preempt>,
    /// The source has switched to post-copy.
    switched: bool,
    /// Pages were discarded: the source is about to switch.
    discarded: bool,
    list: Option<BlockList>,
    early: Option<Arc<dyn RunEarly>>,
}

impl LoaderState {
    pub(crate) fn new(expected: Expected) -> Self {
        Self {
            expected,
            left_out: LeftOut::default(),
            configuration: None,
            order: Vec::new(),
            passes: Passes::default(),
            idle: Idle::default(),
            begun: Instant::now(),
            last_section: Instant::now(),
            plain_ram: 0,
            ack_may_be_missing: false,
            counts: Arc::default(),
            preempt: Arc::default(),
            switched: false,
            discarded: false,
            list: None,
            early: None,
        }
    }

    pub(crate) fn left_out(mut self, left_out: LeftOut) -> Self {
        self.left_out = left_out;
        self
    }

    /// The guest runs before its RAM is there.
    #[cfg(feature = "fault")]
    pub(crate) fn set_early(&mut self, early: Arc<dyn RunEarly>) {
        self.early = Some(early);
    }

    /// Logs a hint, once, if the source seems to wait for SWITCHOVER_ACK, which was not sent.
    pub(crate) fn without_switchover_ack(mut self, missing: bool) -> Self {
        self.ack_may_be_missing = missing;
        self
    }

    pub(crate) fn configuration(&self) -> Option<&Configuration> {
        self.configuration.as_ref()
    }

    /// The numbers of main.
    pub(crate) fn counts(&self) -> &Arc<MainCounts> {
        &self.counts
    }

    fn ignores_shared(&self) -> bool {
        self.configuration.as_ref().is_some_and(|configuration| configuration.ignore_shared)
    }
}

impl<F> std::fmt::Debug for Loader<'_, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loader").field("state", &self.state).finish_non_exhaustive()
    }
}

impl<'a, F> Loader<'a, F>
where
    F: FnMut(Option<&Configuration>, &BlockList) -> Result<RamBlocks>,
{
    /// A loader of an `expected` machine. `make` makes its blocks when the source has announced them, or refuses the
    /// machine. Its blocks are matched with the announced ones by name, in any order: each announced block needs one of its
    /// length, and there must be no others.
    pub fn new(receiver: &'a Receiver, expected: Expected, make: F) -> Self {
        Self::resumed(receiver, LoaderState::new(expected), make)
    }

    /// A loader that continues with the state of an earlier one of the same receiver.
    pub(crate) fn resumed(receiver: &'a Receiver, state: LoaderState, make: F) -> Self {
        Self { receiver, make, state }
    }

    pub(crate) fn into_state(self) -> LoaderState {
        self.state
    }

    /// What the source may omit. Default: [`LeftOut::Ignored`].
    #[must_use]
    pub fn left_out(mut self, left_out: LeftOut) -> Self {
        self.state = self.state.left_out(left_out);
        self
    }

    /// The pages that have arrived so far, on all connections.
    fn all_pages(&self) -> u64 {
        let (channels, main) = (self.receiver.stats(), self.main_pages());
        let on_channels: u64 = channels.iter().map(|channel| channel.normal + channel.zero).sum();
        on_channels + main.normal + main.zero
    }

    /// Whether the first pass lacks more than the source could send in [`SWITCHOVER`] at its rate so far. It may stop its guest
    /// only if the rest fits into its `downtime-limit`.
    fn lacks_much_of_the_first_pass(&self) -> bool {
        let LoaderState { counts, left_out, .. } = &self.state;
        let Some((_, page_size)) = counts.ram() else { return false };
        // Pages that never come must not count.
        if *left_out == LeftOut::Pages || self.state.ignores_shared() || counts.pass() != Some(1) {
            return false;
        }
        let sent: u64 =
            self.receiver.stats().iter().map(|channel| channel.bytes).sum::<u64>() + counts.bytes();
        let time = self.state.last_section.saturating_duration_since(self.state.begun).max(SHORTEST);
        let missing = self.state.plain_ram.saturating_sub(self.all_pages().saturating_mul(page_size));
        tracing::debug!(missing, sent, ?time, "the source is silent in the first pass");
        missing as f64 / SWITCHOVER.as_secs_f64() > sent as f64 / time.as_secs_f64()
    }

    fn show_pass(&self) {
        self.state.counts.set_pass(self.state.passes.pass(self.receiver.counters().restarts()));
    }

    /// The pages that have arrived over main so far, and over the connection of postcopy-preempt.
    pub fn main_pages(&self) -> MainPages {
        let (main, preempt) = (self.state.counts.pages(), self.state.preempt.pages());
        MainPages { normal: main.normal + preempt.normal, zero: main.zero + preempt.zero }
    }

    /// Returns the blocks after the whole stream has arrived, and checks that every page of RAM has. Memory of a virtio-mem
    /// device that is not plugged in is not sent and is zero here; its block is recognised by the name of the device.
    ///
    /// # Errors
    /// [`Violation::PagesMissing`](multifd::error::Violation::PagesMissing) if a page is missing that must not be omitted;
    /// [`Violation::NoPages`](multifd::error::Violation::NoPages) if no page has arrived; [`Usage::TooEarly`] if no blocks
    /// were announced.
    pub fn finish(self, loaded: &Loaded) -> Result<Arc<RamBlocks>> {
        self.complete(loaded)
    }

    pub(crate) fn complete(&self, loaded: &Loaded) -> Result<Arc<RamBlocks>> {
        let arrived = self.target()?;
        arrived.check_complete(|block| match self.state.left_out {
            LeftOut::Pages => MayMiss::Pages,
            _ if is_pluggable(block, &loaded.devices) => MayMiss::Pages,
            LeftOut::SharedBlocks if self.state.ignores_shared() => MayMiss::Whole,
            LeftOut::SharedBlocks | LeftOut::Ignored => MayMiss::Nothing,
        })?;
        Ok(arrived.blocks().clone())
    }

    fn target(&self) -> Result<&'a Arrived> {
        self.receiver.arrived().ok_or_else(|| Usage::TooEarly("the block list").into())
    }

    /// The block that was made for this one of the list.
    fn block(&self, block: BlockIndex) -> Result<BlockIndex> {
        self.state.order.get(block.0).copied().ok_or_else(|| ram::Error::NoSuchBlock(block.0).into())
    }
}

/// Far more than the time for which guests are stopped: `downtime-limit` is 300 ms by default.
const SWITCHOVER: Duration = Duration::from_secs(5);
/// How long pages on the connection of postcopy-preempt may take to arrive after the end of main.
const PREEMPT_ENDS: Duration = Duration::from_secs(10);
/// A rate is not computed over less.
const SHORTEST: Duration = Duration::from_millis(100);

/// Whether the block is the memory of a virtio-mem device: `0000:00:02.0/mem0` of `0000:00:02.0/virtio-mem`, seen with QEMU
/// 7.2 and 10.0.
fn is_pluggable(block: &RamBlock, devices: &DevicePart) -> bool {
    let path = |name: &[u8]| {
        let slash = name.iter().rposition(|byte| *byte == b'/')?;
        name.get(..slash).map(<[u8]>::to_vec)
    };
    let Some(of_block) = path(block.name().as_bytes()) else { return false };
    devices.sections().iter().map(|section| section.name.as_bytes()).any(|name| {
        name.windows(VIRTIO_MEM.len()).any(|part| part == VIRTIO_MEM)
            && path(name).as_ref() == Some(&of_block)
    })
}

/// The end of the names of such a device's sections.
const VIRTIO_MEM: &[u8] = b"/virtio-mem";

/// Finds the block that was made for each announced block.
fn matched(list: &BlockList, blocks: &RamBlocks, ignore_shared: bool) -> Result<Vec<BlockIndex>, Usage> {
    let find = |(_, entry): (_, &BlockEntry)| {
        let name = || entry.name.clone();
        let index = blocks.find(entry.name.as_bytes()).ok_or_else(|| Usage::BlockMissing(name()))?;
        let block = blocks.get(index).ok_or_else(|| Usage::BlockMissing(name()))?;
        if block.used_length() != entry.used_length {
            let (announced, found) = (entry.used_length, block.used_length());
            return Err(Usage::BlockLength { name: name(), announced, found });
        }
        if block.is_ignored() && !ignore_shared {
            return Err(Usage::NotShared(name()));
        }
        Ok(index)
    };
    let order = list.iter().map(find).collect::<Result<_, _>>()?;
    match blocks.iter().find(|(_, block)| list.position(block.name()).is_none()) {
        None => Ok(order),
        Some((_, surplus)) => Err(Usage::BlockSurplus(surplus.name().clone())),
    }
}

impl<F> Destination for Loader<'_, F>
where
    F: FnMut(Option<&Configuration>, &BlockList) -> Result<RamBlocks>,
{
    type Error = Error;

    fn configuration(&mut self, configuration: Option<&Configuration>) -> Result<()> {
        if let Expected::Type(expected) = &self.state.expected {
            let found = configuration.map(|configuration| &configuration.machine);
            if found != Some(expected) {
                let (expected, found) = (expected.clone(), found.cloned());
                let refused = Violation::OtherMachine { expected, found };
                return Err(Error::other("this destination cannot accept the machine", refused));
            }
        }
        self.state.configuration = configuration.cloned();
        if configuration.is_some_and(|configuration| configuration.machine.has_exact_packet_nums()) {
            self.receiver.expect_exact_packet_nums();
        }
        self.receiver.set_page_size(configuration.map(Configuration::page_size).unwrap_or_default())
    }

    fn channels(&mut self, channels: u8) -> Result<()> {
        self.receiver.expect_channels(channels)?;
        self.receiver.expect_exact_packet_nums();
        self.state.passes.announced();
        Ok(())
    }

    fn multifd(&mut self) -> Result<()> {
        self.receiver.expect_any_channels();
        Ok(())
    }

    fn blocks(&mut self, list: &BlockList) -> Result<()> {
        let blocks = (self.make)(self.state.configuration(), list)?;
        self.state.order = matched(list, &blocks, self.state.ignores_shared())?;
        self.state.list = Some(list.clone());
        self.state.counts.set_ram(list.total(), list.page_size().bytes() as u64);
        let is_plain = |entry: &&BlockEntry| !entry.name.as_bytes().contains(&b'/');
        self.state.plain_ram = list.entries().iter().filter(is_plain).map(|entry| entry.used_length).sum();
        self.state.begun = Instant::now();
        let blocks = Arc::new(blocks);
        if let Some(early) = &self.state.early {
            early.blocks(&blocks)?;
        }
        self.receiver.set_blocks(blocks)
    }

    fn section(&mut self, _last: bool) -> Result<()> {
        self.state.passes.section();
        self.state.last_section = Instant::now();
        self.show_pass();
        // A source of this library does not wait for it.
        let may_wait = self.state.ack_may_be_missing && !self.state.passes.are_announced();
        if may_wait {
            let (pages, now) = (self.all_pages(), self.state.begun.elapsed());
            if self.state.idle.section(pages, now) {
                tracing::warn!("{}", passes::HINT);
            }
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        self.receiver.sync()?;
        self.show_pass();
        Ok(())
    }

    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.target()?.clear(self.block(block)?, page)?;
        self.state.counts.add_zero();
        self.state.passes.page(block, page);
        Ok(())
    }

    fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<()> {
        self.target()?.store(self.block(block)?, page, bytes)?;
        self.state.counts.add_normal();
        self.state.passes.page(block, page);
        Ok(())
    }

    fn read_page(&mut self, block: BlockIndex, page: PageIndex, into: &mut [u8]) -> Result<()> {
        self.target()?.load(self.block(block)?, page, into)
    }

    fn postcopy_advised(&mut self) -> Result<()> {
        let (preempt, stop) = (self.state.preempt.clone(), self.receiver.stop().clone());
        self.receiver.expect_preempt(move |arrived, stream| preempt.read(arrived, stream, &stop));
        Ok(())
    }

    fn discard(&mut self, block: BlockIndex, first: PageIndex, count: u64) -> Result<()> {
        let block = self.block(block)?;
        if let Some(early) = &self.state.early {
            if !self.state.discarded {
                self.state.discarded = true;
                self.receiver.expect_resumed();
            }
            early.discard(block, first, count)?;
        }
        self.target()?.discard(block, first, count)
    }

    fn postcopy_run(&mut self) -> Result<()> {
        self.state.switched = true;
        if let Some(early) = &self.state.early {
            early.arm(self.target()?)?;
        }
        // Before the connection of preempt is read, which may have broken.
        self.receiver.expect_resumed();
        if let Some(list) = self.state.list.take() {
            self.state.preempt.begin(list, self.state.order.clone(), self.state.early.is_some());
        }
        Ok(())
    }

    fn arrived(&self, block: BlockIndex) -> Option<&PageBitmap> {
        self.receiver.arrived()?.received(self.block(block).ok()?)
    }

    fn postcopy_resumed(&mut self) -> Result<()> {
        if let Some(error) = self.state.early.as_ref().and_then(|early| early.refused()) {
            return Err(error);
        }
        self.state.preempt.resume();
        self.postcopy_advised()
    }

    fn round(&mut self) -> Result<Vec<ChannelId>> {
        Ok(self.receiver.round())
    }

    fn lose(&mut self, channel: ChannelId) -> Result<()> {
        self.state.passes.split();
        self.receiver.lose(channel)
    }

    fn is_within_pass(&self) -> bool {
        self.receiver.has_open_packet() || self.lacks_much_of_the_first_pass()
    }

    fn end_of_ram(&mut self) -> Result<()> {
        if self.state.switched {
            if let Some(early) = &self.state.early {
                early.decided(self.receiver.stop())?;
            }
            self.state.preempt.settle(self.receiver, self.target()?, PREEMPT_ENDS)?;
        }
        self.receiver.seal()
    }
}
