//! What the channels send after the switch to post-copy.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use crate::{
    postcopy::{Cost, Job, Lane, Schedule},
    sync_types::{AtomicBool, Instant},
};

/// What the channels send by themselves.
pub(super) struct Serving {
    schedule: Arc<Schedule>,
    /// Called with the time between a request and the end of its write.
    answered: Box<dyn Fn(Duration) + Send + Sync>,
    channels: usize,
    /// A channel has taken the requests.
    taken: AtomicBool,
}

/// What one channel sends.
#[derive(Clone, Copy)]
pub(super) struct Share {
    lane: Lane,
    /// The greatest number of pages of a job.
    most: u64,
}

impl Serving {
    pub(super) fn new(
        schedule: Arc<Schedule>,
        channels: usize,
        answered: impl Fn(Duration) + Send + Sync + 'static,
    ) -> Self {
        Self { schedule, answered: Box::new(answered), channels, taken: AtomicBool::new(false) }
    }

    /// What a channel sends that begins to serve. The first one takes the requests. If it is the only one, it sends both.
    pub(super) fn share(&self) -> Share {
        // Relaxed: it orders nothing.
        match self.channels {
            1 => Share { lane: Lane::Both, most: SHORT },
            _ if self.taken.swap(true, Ordering::Relaxed) => Share { lane: Lane::Walk, most: LONG },
            _ => Share { lane: Lane::Requests, most: LONG },
        }
    }

    /// The next pages of a share; `None` if there are no more.
    pub(super) fn next(&self, share: Share) -> Option<Job> {
        self.schedule.next(share.lane, share.most)
    }

    /// The pages of a job were written, or could not be.
    pub(super) fn sent(&self, job: Job, cost: Cost, written: bool) {
        self.schedule.sent(job, cost);
        if let Some(since) = job.requested.filter(|_| written) {
            (self.answered)(Instant::now().saturating_duration_since(since));
        }
    }
}

/// Pages of a job: as many as a packet has, or fewer if requests wait for its end.
const LONG: u64 = 128;
const SHORT: u64 = 32;
