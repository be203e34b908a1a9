//! The numbers of an arrival while it runs.

use std::sync::Arc;

use multifd::{ChannelStats, RecvCounters};

use crate::incoming::{MainCounts, MainPages};

/// The numbers of an arrival, for another thread to read: on main and on the channels. Clones show the same numbers.
#[derive(Clone)]
pub struct ArrivalProgress {
    pub(super) channels: RecvCounters,
    pub(super) main: Arc<MainCounts>,
}

impl std::fmt::Debug for ArrivalProgress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ArrivalProgress").field("channels", &self.channels).field("main", &self.main).finish()
    }
}

impl ArrivalProgress {
    /// Whether a source has connected.
    pub fn has_source(&self) -> bool {
        self.channels.has_main()
    }

    /// How many connections were refused before a source connected.
    pub fn refused(&self) -> u64 {
        self.channels.refused()
    }

    /// The counters of each channel.
    pub fn channels(&self) -> Vec<ChannelStats> {
        self.channels.stats()
    }

    /// The number of bytes that have arrived over main.
    pub fn main_bytes(&self) -> u64 {
        self.main.bytes()
    }

    /// The pages that have arrived over main.
    pub fn main_pages(&self) -> MainPages {
        self.main.pages()
    }

    /// The length in bytes of RAM, and of a page; `None` before the source has announced them.
    pub fn ram(&self) -> Option<(u64, u64)> {
        self.main.ram()
    }

    /// Whether the source has switched to post-copy, its connection is broken, and it may return: QEMU's `postcopy-paused`.
    pub fn is_paused(&self) -> bool {
        self.main.is_paused()
    }

    /// The pass over RAM, from 1; `None` before the first. For a QEMU it may be less than the source's number, because passes of
    /// very few pages cannot be distinguished.
    pub fn pass(&self) -> Option<u64> {
        self.main.pass()
    }
}
