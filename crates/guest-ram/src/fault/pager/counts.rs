//! What a pager has done, in numbers.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::load::Waits;
use crate::Latencies;

/// The counters, which threads add to without a lock. No other access depends on them.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) faults: AtomicU64,
    pub(super) zero: AtomicU64,
    pub(super) prefetched: AtomicU64,
    pub(super) loaded: AtomicU64,
    pub(super) existed: AtomicU64,
    pub(super) gone: AtomicU64,
    pub(super) removed: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) latencies: Latencies,
    /// Of each thread that the kernel has named.
    threads: Mutex<BTreeMap<u32, Latencies>>,
}

/// What a pager has done so far. Pages are those of the machine, not of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PagerStats {
    /// Page faults that were read. Several threads may have waited for one page.
    pub faults: u64,
    /// Of those, faults on pages that are zero, or were discarded.
    pub zero: u64,
    /// Pages that were placed because of a fault.
    pub loaded: u64,
    /// Pages that were placed before they were needed.
    pub prefetched: u64,
    /// Pages that existed already, as after a pager that was killed.
    pub existed: u64,
    /// Pages whose memory was no longer there.
    pub gone: u64,
    /// Pages that the guest or its monitor has discarded before they were placed.
    pub removed: u64,
    /// Pages that were poisoned.
    pub poisoned: u64,
    /// Loads that were repeated after a failure.
    pub retries: u64,
    /// Pages that are still missing.
    pub missing: u64,
    /// The time that threads of the guest have waited, as far as it is known: from the moment at which a fault was read to the one at
    /// which its page was placed.
    pub blocked: Duration,
    /// The median of this time.
    pub p50: Option<Duration>,
    /// The time that 99 % of the faults did not exceed.
    pub p99: Option<Duration>,
}

/// How long one thread of the guest has waited for pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ThreadWaits {
    /// The thread's number (`gettid`), in the namespace of its process.
    pub thread: u32,
    /// The number of waits.
    pub waits: u64,
    /// The sum of the waits.
    pub blocked: Duration,
    /// The median of a wait.
    pub p50: Option<Duration>,
    /// The time that 99 % of the waits did not exceed.
    pub p99: Option<Duration>,
}

impl Counts {
    pub(super) fn add(counter: &AtomicU64, number: u64) {
        counter.fetch_add(number, Ordering::Relaxed);
    }

    /// Threads wait no longer.
    pub(super) fn answered(&self, waits: Waits) {
        if waits.is_empty() {
            return;
        }
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for (thread, waited) in waits.end() {
            self.latencies.add(waited);
            let Some(thread) = thread else { continue };
            if threads.len() < THREADS || threads.contains_key(&thread) {
                threads.entry(thread).or_default().add(waited);
            }
        }
    }

    pub(super) fn threads(&self) -> Vec<ThreadWaits> {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |(thread, latencies): (&u32, &Latencies)| ThreadWaits {
            thread: *thread,
            waits: latencies.count(),
            blocked: latencies.total(),
            p50: latencies.percentile(500),
            p99: latencies.percentile(990),
        };
        threads.iter().map(of).collect()
    }

    pub(super) fn stats(&self, missing: u64, poisoned: u64) -> PagerStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PagerStats {
            faults: of(&self.faults),
            zero: of(&self.zero),
            loaded: of(&self.loaded),
            prefetched: of(&self.prefetched),
            existed: of(&self.existed),
            gone: of(&self.gone),
            removed: of(&self.removed),
            poisoned,
            retries: of(&self.retries),
            missing,
            blocked: self.latencies.total(),
            p50: self.latencies.percentile(500),
            p99: self.latencies.percentile(990),
        }
    }
}

/// Threads that are counted one by one. A guest has some, and its monitor can start others without end.
const THREADS: usize = 1024;
