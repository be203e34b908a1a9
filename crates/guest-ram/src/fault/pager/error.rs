//! Why a pager has not completed a machine's memory.

use crate::{BlockName, BlockOffset};

use super::{super::FaultError, source::LoadError};

/// Why a pager has not completed the memory. Pages that were missing are poisoned then, and none reads as zero.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagerError {
    /// The faults cannot be served.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// The source does not know what it has.
    #[error("the source of pages cannot say what block {name:?} contains")]
    Contents {
        /// The block.
        name: BlockName,
        /// The reason.
        source: LoadError,
    },
    /// The judge has decided to stop.
    #[error("the pager was stopped, because {trouble}")]
    Stopped {
        /// What the judge was asked about.
        trouble: String,
    },
    /// [`Pager::stop`](super::Pager::stop), or the drop of the pager.
    #[error("the pager was stopped before all pages had come")]
    Cancelled,
    /// A thread of the pager panicked, or the judge did.
    #[error("a thread of the pager panicked: {0}")]
    Panicked(String),
    /// A thread cannot be started.
    #[error("cannot start a thread of the pager")]
    Thread(#[source] std::io::Error),
    /// Pages were pushed that are not whole pages of armed memory, or pieces of too many host pages.
    #[error("pages that were pushed cannot be placed: {why}")]
    Pushed {
        /// What is wrong with them.
        why: String,
    },
    /// Everything else is there.
    #[error(
        "{pages} pages could not be had and are poisoned, the first at offset {offset} of block {name:?}; all others are there. The guest \
         gets an error where it accesses them"
    )]
    Poisoned {
        /// Their number.
        pages: u64,
        /// The block of the first one.
        name: BlockName,
        /// The offset of the first one.
        offset: BlockOffset,
    },
    /// The limit was reached. The pager continues.
    #[error("{missing} pages are still missing")]
    Incomplete {
        /// Their number.
        missing: u64,
    },
}
