//! A channel's thread that copies: from guest memory into a file, or out of a file into guest memory.
//!
//! To the collector it is like any other: it takes batches, stands at sync points, and its counters count. A batch ends
//! where the target begins a new stretch of huge pages, unless it is nearly empty, so that no two channels work on one of
//! them.

use super::{copier::Copier, dispatch::Job, draw::unread, shared::Shared};
use crate::{
    batch::{Batch, neighbours},
    error::{Error, Result, Usage},
    ram::{self, BlockOffset, PageIndex, TransferError, hold_in_this_thread},
    wire::ChannelId,
};

/// The life of a channel that copies. An error ends the whole migration.
pub(super) fn run(id: ChannelId, shared: &Shared) {
    let _alarm = shared.stop.alarm("a channel's thread");
    // A file that comes to the limit of its size is to fail the capture, and not to end the monitor.
    hold_in_this_thread();
    if let Err(error) = carry(id, shared) {
        tracing::debug!(channel = id.0, %error, "multifd_send_error");
        shared.stop.fail(error.on_channel(id));
    }
    tracing::debug!(channel = id.0, "multifd_send_thread_end");
}

fn carry(id: ChannelId, shared: &Shared) -> Result<()> {
    let Some(copier) = &shared.copier else { return Err(Usage::TooEarly("the target").into()) };
    shared.dispatch.connected();
    tracing::debug!(channel = id.0, peer = "a file", "multifd_send_thread_start");
    let (mut done, mut synced) = (None, 0);
    loop {
        match shared.dispatch.next(done.take(), synced) {
            Job::Batch(mut batch) => {
                copy(id, shared, copier, &mut batch)?;
                done = Some(batch);
            }
            Job::Sync => {
                synced += 1;
                shared.dispatch.synced();
            }
            Job::End => return Ok(()),
        }
    }
}

fn copy(id: ChannelId, shared: &Shared, copier: &Copier, batch: &mut Batch) -> Result<()> {
    let source = shared.blocks.block(batch.block)?;
    let (index, transfer) =
        copier.transfers.get(batch.block.0).ok_or(ram::Error::NoSuchBlock(batch.block.0))?;
    let target = copier.target.block(*index)?;
    batch.part(|page| source.is_zero(page));
    // Asked to go as bytes, and known to be zero: a file may have anything there.
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
    tracing::trace!(channel = id.0, normal, zero, block = %source.name(), "multifd_send");
    let bytes = normal * source.page_size().bytes();
    shared.counters[usize::from(id.0)].add_packet(normal, zero, bytes as u64);
    Ok(())
}
