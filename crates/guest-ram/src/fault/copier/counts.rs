//! What a copier has done, in numbers.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use crate::Latencies;

/// The counters, which threads add to without a lock. No other access depends on them.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) noted: AtomicU64,
    pub(super) held: AtomicU64,
    pub(super) faults: AtomicU64,
    pub(super) first: AtomicU64,
    pub(super) stored: AtomicU64,
    pub(super) holes: AtomicU64,
    pub(super) hold_nanos: AtomicU64,
    latencies: Latencies,
}

/// What a copier has done so far. Pages are those of the machine, not of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CopierStats {
    /// Writes that were noted and let through before the hold.
    pub noted: u64,
    /// Pages that were protected again at the hold.
    pub held: u64,
    /// How long the hold took.
    pub hold: Duration,
    /// Writes that waited after the hold. Several threads may have waited for one page.
    pub faults: u64,
    /// Pages that were copied because somebody wanted to write to them.
    pub first: u64,
    /// Pages that were stored, in all.
    pub stored: u64,
    /// Pages of shared memory that were holes, and were not read.
    pub holes: u64,
    /// The time that writers have waited, as far as it is known: from the moment at which a fault was read to the one at which the write
    /// was allowed.
    pub blocked: Duration,
    /// The median of this time.
    pub p50: Option<Duration>,
    /// The time that 99 % of the faults did not exceed.
    pub p99: Option<Duration>,
}

impl Counts {
    pub(super) fn add(counter: &AtomicU64, number: u64) {
        counter.fetch_add(number, Ordering::Relaxed);
    }

    /// A write was allowed after this time.
    pub(super) fn answered(&self, after: Duration) {
        Self::add(&self.faults, 1);
        self.latencies.add(after);
    }

    pub(super) fn stats(&self) -> CopierStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CopierStats {
            noted: of(&self.noted),
            held: of(&self.held),
            hold: Duration::from_nanos(of(&self.hold_nanos)),
            faults: of(&self.faults),
            first: of(&self.first),
            stored: of(&self.stored),
            holes: of(&self.holes),
            blocked: self.latencies.total(),
            p50: self.latencies.percentile(500),
            p99: self.latencies.percentile(990),
        }
    }
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
