//! Why a copier has not copied everything.

use std::{io, time::Duration};

use crate::{BlockName, BlockOffset};

use super::{super::FaultError, sink::StoreError};

/// Why a copier has not copied everything. All of the memory is writable again then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopierError {
    /// The memory cannot be protected against writing.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// The memory is shared, and nobody has declared that only this process writes to it.
    #[error(
        "block {name:?}: its memory is shared, and a write of another process that maps it would not be noticed: if there is none, declare it \
         (CopierOptions::sole_writer); otherwise capture in passes, with a dirty log that knows all writers"
    )]
    Shared {
        /// The block.
        name: BlockName,
    },
    /// A page cannot be read.
    #[error("block {name:?}: the page at offset {offset} cannot be read")]
    Unreadable {
        /// The block.
        name: BlockName,
        /// The offset.
        offset: BlockOffset,
        /// The system's error.
        source: io::Error,
    },
    /// Memory was discarded before it was copied.
    #[error(
        "block {name:?}: memory at offset {offset} was discarded before it was copied (a balloon, MADV_DONTNEED, MADV_REMOVE): its contents are \
         lost for this capture. Discard nothing until the capture is complete"
    )]
    Discarded {
        /// The block.
        name: BlockName,
        /// The offset of the first byte that was discarded.
        offset: BlockOffset,
    },
    /// Something else was mapped over the memory.
    #[error(
        "block {name:?}: memory at offset {offset} is no longer what was armed: something else is mapped there"
    )]
    Replaced {
        /// The block.
        name: BlockName,
        /// The offset.
        offset: BlockOffset,
    },
    /// Pages cannot be stored.
    #[error("pages of block {name:?} at offset {offset} cannot be stored")]
    Store {
        /// The block.
        name: BlockName,
        /// The offset of the first one.
        offset: BlockOffset,
        /// The reason.
        source: StoreError,
    },
    /// Nothing was stored for too long.
    #[error("a store of pages has not returned for {0:?}: the disk or the file system does not answer")]
    Silent(Duration),
    /// [`Copier::stop`](super::Copier::stop), or a drop.
    #[error("the copy was stopped before it was complete")]
    Cancelled,
    /// A thread of the copier panicked.
    #[error("a thread of the copier panicked: {0}")]
    Panicked(String),
    /// A thread cannot be started.
    #[error("cannot start a thread of the copier")]
    Thread(#[source] io::Error),
    /// The limit was reached. The copier continues.
    #[error("{missing} pages are not copied yet")]
    Incomplete {
        /// Their number.
        missing: u64,
    },
}
