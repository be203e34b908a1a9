//! A channel that copies: from guest memory into a file, or out of a file into guest memory.
//!
//! For the collector it is like any other channel: it takes batches, waits at sync points, and updates its counters. A
//! batch ends where the target begins a new stretch of huge pages, unless it is nearly empty, so that no two channels
//! work on the same stretch.

use std::sync::Arc;

use super::{file_pages::unread, shared::Shared, worker::Carrier};
use crate::{
    batch::{Batch, neighbours},
    error::{Error, Result, Usage},
    ram::{
        self, BlockIndex, BlockOffset, PageIndex, RamBlock, RamBlocks, Transfer, TransferError,
        hold_in_this_thread,
    },
    wire::ChannelId,
};

/// The blocks into which the channels copy. Never changes.
#[derive(Debug)]
pub(super) struct Targets {
    target: Arc<RamBlocks>,
    /// The transfer of each block of the source.
    transfers: Vec<(BlockIndex, Transfer)>,
}

impl Targets {
    pub(super) fn new(source: &RamBlocks, target: Arc<RamBlocks>) -> Result<Self> {
        let transfer = |of: &RamBlock| {
            let found = target.find(of.name().as_bytes()).ok_or("the target has no such block".to_owned());
            let transfer = found.and_then(|index| {
                let into = target.get(index).ok_or("the target has no such block")?;
                Ok((index, Transfer::new(of, into)?))
            });
            transfer.map_err(|why| Error::from(Usage::OtherBlocks { name: of.name().clone(), why }))
        };
        let transfers = source.iter().map(|(_, block)| transfer(block)).collect::<Result<_>>()?;
        // A block of the target that no channel would write.
        let foreign = target.iter().find(|(_, block)| source.find(block.name().as_bytes()).is_none());
        match foreign {
            None => Ok(Self { transfers, target }),
            Some((_, block)) => {
                let why = "the source has no such block".to_owned();
                Err(Usage::OtherBlocks { name: block.name().clone(), why }.into())
            }
        }
    }

    /// The greatest number of pages of a batch.
    pub(super) fn room(&self) -> usize {
        let stretch = self.transfers.first().map_or(1, |(_, transfer)| transfer.stretch());
        usize::try_from(stretch).unwrap_or(1)
    }

    /// The first page from `page` on at which a new batch must begin.
    pub(super) fn border(&self, block: BlockIndex, page: PageIndex) -> u64 {
        self.transfers.get(block.0).map_or(u64::MAX, |(_, transfer)| transfer.border(page))
    }
}

/// A channel that copies.
pub(super) struct Copies<'a> {
    id: ChannelId,
    shared: &'a Shared,
    targets: &'a Targets,
}

impl<'a> Copies<'a> {
    pub(super) fn begin(id: ChannelId, shared: &'a Shared, targets: &'a Targets) -> Self {
        // A file that reaches the limit of its size must fail the capture, and not end the monitor.
        hold_in_this_thread();
        tracing::debug!(channel = id.0, peer = "a file", "multifd_send_thread_start");
        Self { id, shared, targets }
    }
}

impl Carrier for Copies<'_> {
    fn carry(&mut self, mut batch: Batch) -> Result<Option<Batch>> {
        let source = self.shared.blocks.block(batch.block)?;
        let (index, transfer) =
            self.targets.transfers.get(batch.block.0).ok_or(ram::Error::NoSuchBlock(batch.block.0))?;
        let target = self.targets.target.block(*index)?;
        batch.part(|page| source.is_zero(page));
        // These pages were queued as bytes but are known to be zero: the file may have any bytes there.
        let absent = |page: &&PageIndex| !source.is_present(**page);
        batch.zero().iter().chain(batch.normal().iter().filter(absent)).for_each(|page| target.clear(*page));
        let normal = batch.normal().iter().copied().filter(|page| source.is_present(*page));
        for (first, count) in neighbours(normal) {
            transfer.copy(source, target, first, count).map_err(|error| match error {
                TransferError::Read(error) => unread(source, first, error),
                TransferError::Write(error) => {
                    let offset = target.offset_of(first).unwrap_or(BlockOffset(u64::MAX));
                    Error::io(format!("write block {:?} at offset {offset}", target.name()), error)
                }
            })?;
        }
        let (normal, zero) = (batch.normal().len(), batch.zero().len());
        tracing::trace!(channel = self.id.0, normal, zero, block = %source.name(), "multifd_send");
        let bytes = normal * source.page_size().bytes();
        self.shared.counters[usize::from(self.id.0)].add_packet(normal, zero, bytes as u64);
        Ok(Some(batch))
    }

    /// Nothing to wait for: a page is in place when its call has returned.
    fn sync(&mut self) -> Result<()> {
        Ok(())
    }

    fn end(self) {}
}
