//! After the switch to post-copy, each channel takes its next pages from the schedule.
//!
//! ```text
//! Schedule ─ requested ─▶ the channel for requests ─▶ packets
//!     └───── walk ──────▶ every other channel ──────▶ packets
//! ```
//!
//! The first channel that asks sends only requested pages, so that none of them waits behind others in a socket. If it is the only
//! one, it sends both.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{Sender, dispatch::Dispatch, worker::Carrier};
use crate::{
    batch::{Batch, Kind},
    error::{Error, Result, Usage},
    postcopy::{Lane, Schedule},
    ram::PageIndex,
    sync_types::{AtomicBool, Instant},
};

/// What the channels send by themselves.
pub(super) struct Serving {
    schedule: Arc<Schedule>,
    /// Called with the time between a request and the end of its write.
    answered: Box<dyn Fn(Duration) + Send + Sync>,
    channels: u8,
    /// A channel has taken the requests.
    taken: AtomicBool,
}

impl Sender {
    /// Sends what `schedule` has, over all channels, until it has nothing more. A [`sync`](Self::sync) must follow. The guest must be
    /// stopped: no page may change. With two or more channels, one is kept free for requested pages. `answered` is called for each
    /// request when its pages were written, with the time since it came.
    ///
    /// The schedule is closed at the end. If the migration is stopped, the caller must close it, or this call waits.
    ///
    /// # Errors
    /// The error that stopped the migration, or that of a sender that is not connected.
    pub fn serve(
        &mut self,
        schedule: &Arc<Schedule>,
        answered: impl Fn(Duration) + Send + Sync + 'static,
    ) -> Result<()> {
        self.ready()?;
        if !self.hand.is_empty() {
            return Err(Usage::Unsynced.into());
        }
        let channels = self.options.channels;
        let (answered, taken) = (Box::new(answered), AtomicBool::new(false));
        let serving = Arc::new(Serving { schedule: schedule.clone(), answered, channels, taken });
        let (shared, all) = (self.shared()?, usize::from(channels));
        shared.dispatch.begin_serve(serving);
        shared.dispatch.wait_served((all - 1).max(1));
        let all_sent = schedule.drained();
        // The channel for requests ends when nothing can be requested any more.
        schedule.close();
        shared.dispatch.end_serve(&shared.stop)?;
        if all_sent { Ok(()) } else { Err(Error::Cancelled) }
    }
}

impl Serving {
    /// Sends what the schedule gives to one channel. Returns a batch that is no longer needed.
    pub(super) fn work<C: Carrier>(&self, dispatch: &Dispatch, carrier: &mut C) -> Result<Option<Batch>> {
        let (lane, most) = match self.channels {
            1 => (Lane::Both, SHORT),
            _ if self.taken.swap(true, Ordering::Relaxed) => (Lane::Walk, LONG),
            _ => (Lane::Requests, LONG),
        };
        let mut batch = None;
        while let Some(job) = self.schedule.next(lane, most) {
            let sent = Self::send(&job.run, dispatch, carrier, &mut batch);
            self.schedule.sent(job);
            sent?;
            if let Some(since) = job.requested {
                (self.answered)(Instant::now().saturating_duration_since(since));
            }
        }
        Ok(batch)
    }

    fn send<C: Carrier>(
        run: &crate::ram::PageRun,
        dispatch: &Dispatch,
        carrier: &mut C,
        kept: &mut Option<Batch>,
    ) -> Result<()> {
        let (mut first, end) = (run.first.0, run.first.0 + run.count);
        while first < end {
            // There is one for each batch that a channel may keep, and one more.
            let mut batch = dispatch.empty(kept.take()).expect("a channel has an empty batch");
            first += batch.push(Kind::Unknown, run.block, PageIndex(first), end - first);
            *kept = carrier.carry(batch)?;
        }
        Ok(())
    }
}

/// Pages of a job: as many as a packet has, or fewer if requests wait behind it.
const LONG: u64 = 128;
const SHORT: u64 = 32;
