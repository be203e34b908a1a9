//! The state that a sender's channel threads share with the collector.

use std::sync::{Arc, atomic::AtomicU64};

use super::{dispatch::Dispatch, given::Given};
use crate::{channel::Stop, ram::RamBlocks, stats::ChannelCounters, sync_types::OnceLock};

/// The state that the channels' threads share with the collector.
pub(super) struct Shared {
    /// Never changes.
    pub(super) blocks: Arc<RamBlocks>,
    /// Locked within; see `docs/develop/concurrency.md`.
    pub(super) stop: Stop,
    pub(super) dispatch: Dispatch,
    /// What each channel was given since the last reply of the destination; set if a channel may break.
    pub(super) given: OnceLock<Given>,
    /// The next packet number; each channel takes one when it fills a head.
    pub(super) packet_num: AtomicU64,
    /// The counters; each is written only by its channel.
    pub(super) counters: Box<[ChannelCounters]>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("stop", &self.stop).finish_non_exhaustive()
    }
}
