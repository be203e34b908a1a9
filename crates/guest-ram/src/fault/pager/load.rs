//! A load: pages that were claimed, and who executes it. [`Pages`](super::pages::Pages) owns all of them.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::PageRun;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LoadId(pub(super) u64);

/// Which threads of the guest wait, and since when.
#[derive(Clone, Debug, Default)]
pub(super) struct Waits(Vec<(Option<u32>, Instant)>);

impl Waits {
    /// One thread waits.
    pub(super) fn of(thread: Option<u32>, since: Instant) -> Self {
        Self(vec![(thread, since)])
    }

    /// A thread waits. A thread that was noted before, and has only tried again, still waits since then; so do all threads whose
    /// number is not known.
    pub(super) fn add(&mut self, thread: Option<u32>, since: Instant) {
        if self.0.iter().all(|(noted, _)| *noted != thread) {
            self.0.push((thread, since));
        }
    }

    pub(super) fn extend(&mut self, others: &Self) {
        others.0.iter().for_each(|(thread, since)| self.add(*thread, *since));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What they have waited until now.
    pub(super) fn end(self) -> impl Iterator<Item = (Option<u32>, Duration)> {
        let now = Instant::now();
        self.0.into_iter().map(move |(thread, since)| (thread, now.saturating_duration_since(since)))
    }
}

/// Pages on their way.
pub(super) struct Load {
    pub(super) run: PageRun,
    pub(super) since: Instant,
    /// The threads of the guest that are known to wait.
    pub(super) awaited: Waits,
    /// The number of host pages.
    pub(super) host_pages: u64,
    /// When the judge was last asked.
    pub(super) judged: Instant,
    pub(super) decided: u32,
    pub(super) stage: Stage,
    /// Whether its thread was replaced.
    pub(super) is_replaced: bool,
    /// Host pages that are not placed any more, by their first page.
    pub(super) dropped: BTreeMap<u64, Dropped>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// In the queue.
    Queued,
    /// Not before this time.
    Delayed(Instant),
    /// Somebody waits for it, and it was requested: it will be [pushed](super::Pager::push).
    Requested,
    /// In the source, or being placed, since this time.
    Running { since: Instant, for_fault: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dropped {
    /// Its contents were discarded: it is zero.
    Removed,
    /// It is poisoned, or loaded once more by another load.
    GivenUp,
}

/// What a fault is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// This load, which is in the queue now.
    Load(LoadId),
    /// A load that has begun.
    Underway,
    /// Zeros.
    Zero(PageRun),
    /// Only waking: the thread then finds the poison.
    Poisoned(PageRun),
    /// Nothing: the pager has ended.
    Ended,
}

/// A load that a thread executes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Task {
    pub(crate) id: LoadId,
    pub(crate) run: PageRun,
    pub(crate) for_fault: bool,
}

/// A load that takes too long.
pub(crate) struct Late {
    pub(crate) id: LoadId,
    pub(crate) run: PageRun,
    pub(crate) since: Duration,
    pub(crate) is_awaited: bool,
    pub(crate) decided: u32,
}

impl Load {
    /// Whether its pages were pushed, and are being placed. Until then it waits for them, in whichever stage: they can arrive before
    /// they are requested.
    pub(super) fn is_arrival(&self) -> bool {
        matches!(self.stage, Stage::Running { for_fault: false, .. })
    }

    /// Whether nothing of it will be placed.
    pub(super) fn is_dropped(&self) -> bool {
        self.dropped.len() as u64 >= self.host_pages
    }
}
