//! The memory that a copier protects: the calls of an armament, a wait that can be woken, and reading its pages.

use std::sync::Arc;

use super::{
    super::{
        FaultError, FaultEvent, Placed, Protection,
        pager::{ArmedMemory, Serve},
    },
    error::CopierError,
    read::read,
};
use crate::{BlockIndex, BlockOffset, PageBitmap, PageRun, RamBlocks};

/// What the threads of a copier do to memory. A model of the threads has memory of its own.
pub(crate) trait Protect: Send + Sync {
    /// Reads one message, if there is one.
    fn read(&self, events: &mut Vec<FaultEvent>) -> Result<(), FaultError>;
    fn protect(
        &self,
        block: BlockIndex,
        offset: BlockOffset,
        len: u64,
        protection: Protection,
    ) -> Result<Placed, FaultError>;
    /// The bytes of these pages in their block.
    fn len(&self, run: PageRun) -> usize;
    /// Fills `buffer`, which has that length, with these pages.
    fn load(&self, run: PageRun, buffer: &mut [u8]) -> Result<(), CopierError>;
    /// The pages of a block that may be nonzero, if that is known.
    fn touched(&self, block: BlockIndex) -> Option<PageBitmap>;
    /// Waits for a message, for [`notify`](Self::notify), or for [`stop`](Self::stop).
    fn wait(&self) -> Result<(), FaultError>;
    /// Ends the wait of one thread, or of the next one that begins to wait.
    fn notify(&self);
    /// Ends all waits, and those to come.
    fn stop(&self);
    /// Memory is no longer armed.
    fn disarm(&self);
}

/// Memory of this process.
pub(super) struct OwnMemory {
    pub(super) armed: ArmedMemory,
    pub(super) blocks: Arc<RamBlocks>,
}

impl Protect for OwnMemory {
    fn read(&self, events: &mut Vec<FaultEvent>) -> Result<(), FaultError> {
        self.armed.read(events)
    }

    fn protect(
        &self,
        block: BlockIndex,
        offset: BlockOffset,
        len: u64,
        protection: Protection,
    ) -> Result<Placed, FaultError> {
        self.armed.armed.protect(block, offset, len, protection)
    }

    fn len(&self, run: PageRun) -> usize {
        let block = self.blocks.get(run.block);
        block.and_then(|block| block.slice(run.first, run.count)).map_or(0, |memory| memory.len())
    }

    fn load(&self, run: PageRun, buffer: &mut [u8]) -> Result<(), CopierError> {
        let block = self.blocks.block(run.block);
        let block = block.map_err(|error| CopierError::Panicked(error.to_string()))?;
        let Some(memory) = block.slice(run.first, run.count) else { return Ok(()) };
        read(&memory, buffer).map_err(|source| CopierError::Unreadable {
            name: block.name().clone(),
            offset: block.offset_of(run.first).unwrap_or_default(),
            source,
        })
    }

    fn touched(&self, block: BlockIndex) -> Option<PageBitmap> {
        self.blocks.get(block).and_then(crate::RamBlock::touched)
    }

    fn wait(&self) -> Result<(), FaultError> {
        self.armed.wait()
    }

    fn notify(&self) {
        self.armed.notify();
    }

    fn stop(&self) {
        self.armed.stop();
    }

    fn disarm(&self) {
        self.armed.disarm();
    }
}
