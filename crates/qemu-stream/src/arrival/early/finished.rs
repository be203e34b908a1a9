//! How the thread that reads main ends.

use std::sync::Arc;

use multifd::{
    ChannelStats,
    ram::{PagerStats, RamBlocks, ThreadWaits},
};

use crate::arrival::pending::Pending;

/// How the thread that reads main has ended without an error.
pub(super) enum Done {
    Complete(Box<Pending>),
    Finished(Finished),
}

/// All of RAM is here.
#[derive(Debug)]
#[non_exhaustive]
pub struct Finished {
    /// The machine's blocks.
    pub blocks: Arc<RamBlocks>,
    /// What the faults have cost.
    pub faults: PagerStats,
    /// How long each thread of the guest has waited, as far as the kernel has named it.
    pub threads: Vec<ThreadWaits>,
    /// The counters of the channels.
    pub channels: Vec<ChannelStats>,
}
