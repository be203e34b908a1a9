//! The options of a pager.

use std::{fmt, time::Duration};

use crate::PageRun;

use super::source::{Decision, Trouble, default_decision};

pub(super) type Judge = Box<dyn Fn(&Trouble) -> Decision + Send + Sync>;

/// How a [`Pager`](super::Pager) works.
#[must_use]
pub struct PagerOptions {
    pub(super) fault_threads: usize,
    pub(super) prefetch_threads: usize,
    pub(super) prefetch_bytes: Option<u64>,
    pub(super) working_set: Vec<PageRun>,
    pub(super) silence: Duration,
    pub(super) retry: Duration,
    pub(super) end_limit: Duration,
    pub(super) judge: Judge,
}

impl Default for PagerOptions {
    fn default() -> Self {
        Self {
            fault_threads: 2,
            prefetch_threads: 2,
            prefetch_bytes: None,
            working_set: Vec::new(),
            silence: Duration::from_secs(10),
            retry: Duration::from_millis(200),
            end_limit: Duration::from_secs(5),
            judge: Box::new(default_decision),
        }
    }
}

impl fmt::Debug for PagerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagerOptions")
            .field("fault_threads", &self.fault_threads)
            .field("prefetch_threads", &self.prefetch_threads)
            .field("silence", &self.silence)
            .finish_non_exhaustive()
    }
}

impl PagerOptions {
    /// Two threads for faults, two that prefetch.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of threads that serve faults, at least 1. Default 2. Each loads one host page at a time, so a source that is far
    /// away needs about as many as the guest has vCPUs.
    pub fn fault_threads(mut self, threads: usize) -> Self {
        self.fault_threads = threads.max(1);
        self
    }

    /// The number of threads that load pages before they are needed. Default 2. With 0, only pages that the guest accesses come.
    pub fn prefetch_threads(mut self, threads: usize) -> Self {
        self.prefetch_threads = threads;
        self
    }

    /// How much is prefetched at once, in bytes: at least a host page. A fault on a page that is being prefetched waits for all of them.
    /// Default: 2 MiB in private memory, if the kernel can move pages into it (Linux 6.8). Huge pages are then moved as a whole, which costs
    /// a third of the time of small ones. Otherwise 256 KiB.
    pub fn prefetch_bytes(mut self, bytes: u64) -> Self {
        self.prefetch_bytes = Some(bytes);
        self
    }

    /// The pages that are prefetched before all others, such as those that the last start needed. Pages that do not exist are
    /// ignored.
    pub fn working_set(mut self, pages: Vec<PageRun>) -> Self {
        self.working_set = pages;
        self
    }

    /// How long a load may take until the [judge](Self::judge) is asked. Default 10 s.
    pub fn silence(mut self, limit: Duration) -> Self {
        self.silence = limit.max(Duration::from_millis(1));
        self
    }

    /// The time until a load that has failed is repeated, if the judge decides to [wait](Decision::Wait). Default 200 ms.
    pub fn retry(mut self, after: Duration) -> Self {
        self.retry = after;
        self
    }

    /// How long the end of the pager waits for a source that does not return. Default 5 s. Its thread is then left behind.
    pub fn end_limit(mut self, limit: Duration) -> Self {
        self.end_limit = limit;
        self
    }

    /// Decides about pages that do not come. Called from threads of the pager. It should not wait: other faults may wait for it. If
    /// it panics, the pager stops. Default: [wait](Decision::Wait) for a silent source, [poison](Decision::Poison) what cannot be
    /// had. The log gets a warning in each case.
    pub fn judge(mut self, judge: impl Fn(&Trouble) -> Decision + Send + Sync + 'static) -> Self {
        self.judge = Box::new(judge);
        self
    }
}
