//! The options of a copier.

use std::{num::NonZero, thread, time::Duration};

/// How a [`Copier`](super::Copier) works.
#[derive(Clone, Debug)]
#[must_use]
pub struct CopierOptions {
    pub(super) fault_threads: usize,
    pub(super) threads: usize,
    pub(super) niceness: i32,
    pub(super) bytes: u64,
    pub(super) ahead: u64,
    pub(super) silence: Duration,
    pub(super) end_limit: Duration,
    pub(super) sole_writer: bool,
}

impl Default for CopierOptions {
    fn default() -> Self {
        Self {
            fault_threads: 1,
            threads: default_threads(),
            niceness: 10,
            bytes: 256 << 10,
            ahead: 64 << 20,
            silence: Duration::from_secs(10),
            end_limit: Duration::from_secs(5),
            sole_writer: false,
        }
    }
}

fn default_threads() -> usize {
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    (processors / 2).clamp(1, 2)
}

impl CopierOptions {
    /// One thread for faults, one or two that copy and store.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of threads that serve writes of the guest, at least 1. Default 1.
    pub fn fault_threads(mut self, threads: usize) -> Self {
        self.fault_threads = threads.max(1);
        self
    }

    /// The number of threads that copy and store, at least 1. Default 2, or 1 on a host with fewer than four processors: others are
    /// for the guest, and for its faults.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads.max(1);
        self
    }

    /// By how much the threads that copy and store are nicer than others (`nice`), 0 to 19. Default 10: on a host without idle processors,
    /// the guest runs first, and the copy takes longer.
    pub fn niceness(mut self, niceness: u8) -> Self {
        self.niceness = i32::from(niceness.min(19));
        self
    }

    /// How much is copied at once, in bytes: at least a host page. Default 256 KiB. A write to a page that is being copied waits for
    /// all of them, but not until they are stored.
    pub fn bytes(mut self, bytes: u64) -> Self {
        self.bytes = bytes;
        self
    }

    /// How many bytes may wait to be stored because the guest wanted to write to them. Default 64 MiB, which is memory of this process.
    /// If there are more, the guest's next writes to protected pages wait for the sink.
    pub fn ahead(mut self, bytes: u64) -> Self {
        self.ahead = bytes;
        self
    }

    /// How long one store may take. Default 10 s. Then the copier ends with an error, and the guest continues.
    pub fn silence(mut self, limit: Duration) -> Self {
        self.silence = limit.max(Duration::from_millis(1));
        self
    }

    /// How long the end waits for a sink that does not return. Default 5 s. Its thread is then left behind, with a warning.
    pub fn end_limit(mut self, limit: Duration) -> Self {
        self.end_limit = limit;
        self
    }

    /// Declares that nobody but this process, through the blocks' own mappings, writes to shared memory until the copy is complete:
    /// no other process that maps it (vhost-user), no second mapping, and no hole is made through its descriptor. Without it, shared
    /// memory is refused.
    ///
    /// **Warning:** if it is not true, pages can be in the capture as they were later, and this is not noticed.
    pub fn sole_writer(mut self, is_declared: bool) -> Self {
        self.sole_writer = is_declared;
        self
    }
}
