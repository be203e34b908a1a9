//! Connects the engine's receiver with the main stream, as its destination.
//!
//! The records of main become calls of a [`Receiver`]: the page size before the first packet, the blocks before the first
//! page, every sync point, the end of RAM. The caller provides the blocks, in memory or in a file.
//!
//! ```text
//! announced: names, lengths ─▶ make ─▶ blocks, in any order ─ by name and length ─▶ pages ─▶ finish: is RAM complete?
//! ```

use std::{sync::Arc, time::Instant};

use multifd::{
    Arrived, Error, MayMiss, Receiver, Result,
    error::Usage,
    ram::{self, PageIndex, RamBlock, RamBlocks},
};

use super::{
    counts::{MainCounts, MainPages},
    destination::Destination,
    loaded::Loaded,
    passes::{self, Idle, Passes},
};
use crate::{
    error::Violation,
    format::{BlockIndex, BlockList, Configuration, DevicePart, MachineType},
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
    expected: Expected,
    left_out: LeftOut,
    configuration: Option<Configuration>,
    /// For each block of the source's list, the block that was made for it.
    order: Vec<BlockIndex>,
    pages: MainPages,
    passes: Passes,
    idle: Idle,
    begun: Instant,
    /// Whether a source that waits for SWITCHOVER_ACK would wait without limit.
    ack_may_be_missing: bool,
    counts: Arc<MainCounts>,
}

impl<F> std::fmt::Debug for Loader<'_, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loader")
            .field("expected", &self.expected)
            .field("left_out", &self.left_out)
            .field("pages", &self.pages)
            .finish_non_exhaustive()
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
        Self {
            receiver,
            make,
            expected,
            left_out: LeftOut::default(),
            configuration: None,
            order: Vec::new(),
            pages: MainPages::default(),
            passes: Passes::default(),
            idle: Idle::default(),
            begun: Instant::now(),
            ack_may_be_missing: false,
            counts: Arc::default(),
        }
    }

    /// What the source may omit. Default: [`LeftOut::Ignored`].
    #[must_use]
    pub fn left_out(mut self, left_out: LeftOut) -> Self {
        self.left_out = left_out;
        self
    }

    /// For a machine whose configuration was read by another loader of the same receiver.
    pub(crate) fn configured(mut self, configuration: Option<Configuration>, passes: Passes) -> Self {
        (self.configuration, self.passes) = (configuration, passes);
        self
    }

    /// What it knows about passes, for the next loader of the same receiver.
    pub(crate) fn into_passes(self) -> Passes {
        self.passes
    }

    /// Keeps its numbers in `counts`.
    pub(crate) fn counted(mut self, counts: Arc<MainCounts>) -> Self {
        self.counts = counts;
        self
    }

    /// Logs a hint, once, if the source seems to wait for SWITCHOVER_ACK, which was not sent.
    pub(crate) fn without_switchover_ack(mut self, missing: bool) -> Self {
        self.ack_may_be_missing = missing;
        self
    }

    /// The pages that have arrived so far, on all connections.
    fn all_pages(&self) -> u64 {
        let channels = self.receiver.stats();
        let on_channels: u64 = channels.iter().map(|channel| channel.normal + channel.zero).sum();
        on_channels + self.pages.normal + self.pages.zero
    }

    fn show_pass(&self) {
        self.counts.set_pass(self.passes.pass(self.receiver.counters().restarts()));
    }

    /// The pages that have arrived over main so far.
    pub fn main_pages(&self) -> MainPages {
        self.pages
    }

    /// Returns the blocks after the whole stream has arrived, and checks that every page of RAM has. Memory of a virtio-mem
    /// device that is not plugged in is not sent and is zero here; its block is recognised by the name of the device.
    ///
    /// # Errors
    /// [`Violation::PagesMissing`](multifd::error::Violation::PagesMissing) if a page is missing that must not be omitted;
    /// [`Violation::NoPages`](multifd::error::Violation::NoPages) if no page has arrived; [`Usage::TooEarly`] if no blocks
    /// were announced.
    pub fn finish(self, loaded: &Loaded) -> Result<Arc<RamBlocks>> {
        let arrived = self.arrived()?;
        arrived.check_complete(|block| match self.left_out {
            LeftOut::Pages => MayMiss::Pages,
            _ if is_pluggable(block, &loaded.devices) => MayMiss::Pages,
            LeftOut::SharedBlocks if self.ignores_shared() => MayMiss::Whole,
            LeftOut::SharedBlocks | LeftOut::Ignored => MayMiss::Nothing,
        })?;
        Ok(arrived.blocks().clone())
    }

    fn ignores_shared(&self) -> bool {
        self.configuration.as_ref().is_some_and(|configuration| configuration.ignore_shared)
    }

    fn arrived(&self) -> Result<&'a Arrived> {
        self.receiver.arrived().ok_or_else(|| Usage::TooEarly("the block list").into())
    }

    fn count(&mut self, block: BlockIndex, page: PageIndex) {
        self.counts.set_pages(self.pages);
        self.passes.page(block, page);
    }

    /// The block that was made for this one of the list.
    fn block(&self, block: BlockIndex) -> Result<BlockIndex> {
        self.order.get(block.0).copied().ok_or_else(|| ram::Error::NoSuchBlock(block.0).into())
    }
}

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
    let find = |(_, entry): (_, &crate::format::BlockEntry)| {
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
        if let Expected::Type(expected) = &self.expected {
            let found = configuration.map(|configuration| &configuration.machine);
            if found != Some(expected) {
                let (expected, found) = (expected.clone(), found.cloned());
                let refused = Violation::OtherMachine { expected, found };
                return Err(Error::other("this destination cannot accept the machine", refused));
            }
        }
        self.configuration = configuration.cloned();
        if configuration.is_some_and(|configuration| configuration.machine.has_exact_packet_nums()) {
            self.receiver.expect_exact_packet_nums();
        }
        self.receiver.set_page_size(configuration.map(Configuration::page_size).unwrap_or_default())
    }

    fn channels(&mut self, channels: u8) -> Result<()> {
        self.receiver.expect_channels(channels)?;
        self.receiver.expect_exact_packet_nums();
        self.passes.announced();
        Ok(())
    }

    fn multifd(&mut self) -> Result<()> {
        self.receiver.expect_any_channels();
        Ok(())
    }

    fn blocks(&mut self, list: &BlockList) -> Result<()> {
        let blocks = (self.make)(self.configuration.as_ref(), list)?;
        self.order = matched(list, &blocks, self.ignores_shared())?;
        self.counts.set_ram(list.total(), list.page_size().bytes() as u64);
        self.receiver.set_blocks(Arc::new(blocks))
    }

    fn section(&mut self, _last: bool) -> Result<()> {
        self.passes.section();
        self.show_pass();
        // A source of this library does not wait for it.
        let may_wait = self.ack_may_be_missing && !self.passes.are_announced();
        if may_wait && self.idle.section(self.all_pages(), self.begun.elapsed()) {
            tracing::warn!("{}", passes::HINT);
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        self.receiver.sync()?;
        self.show_pass();
        Ok(())
    }

    fn zero_page(&mut self, block: BlockIndex, page: PageIndex) -> Result<()> {
        self.arrived()?.clear(self.block(block)?, page)?;
        self.pages.zero += 1;
        self.count(block, page);
        Ok(())
    }

    fn page(&mut self, block: BlockIndex, page: PageIndex, bytes: &[u8]) -> Result<()> {
        self.arrived()?.store(self.block(block)?, page, bytes)?;
        self.pages.normal += 1;
        self.count(block, page);
        Ok(())
    }

    fn read_page(&mut self, block: BlockIndex, page: PageIndex, into: &mut [u8]) -> Result<()> {
        self.arrived()?.load(self.block(block)?, page, into)
    }

    fn end_of_ram(&mut self) -> Result<()> {
        self.receiver.seal()
    }
}
