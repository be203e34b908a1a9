//! What the channels' threads of a sender share with the collector.

use std::sync::{Arc, atomic::AtomicU64};

use super::dispatch::Dispatch;
use crate::{channel::Stop, ram::RamBlocks, stats::ChannelCounters};

/// What the channels' threads share with the collector.
pub(super) struct Shared {
    /// Never changes.
    pub(super) blocks: Arc<RamBlocks>,
    /// Locked within; see `docs/develop/concurrency.md`.
    pub(super) stop: Stop,
    pub(super) dispatch: Dispatch,
    /// Drawn by each channel as it fills a head.
    pub(super) packet_num: AtomicU64,
    /// Each written by its channel only.
    pub(super) counters: Box<[ChannelCounters]>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("stop", &self.stop).finish_non_exhaustive()
    }
}
