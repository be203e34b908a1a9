//! The progress of a verb that reads all pages of files.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::output::{
    display::Shown,
    progress::Look,
    report::{Ram, Report, millis, rate},
};

/// What the display shows.
pub(super) struct Reading {
    /// Bytes that were read.
    pub(super) read: Arc<AtomicU64>,
    /// All bytes.
    pub(super) total: u64,
    pub(super) start: Instant,
    /// What is being done, for programs.
    pub(super) status: &'static str,
}

impl Shown for Reading {
    fn look(&self) -> Look {
        let done = self.read.load(Ordering::Relaxed);
        let time = self.start.elapsed();
        let left = self.total.saturating_sub(done);
        // A second shows how fast it is.
        let to_go = (time.as_secs() > 0).then(|| rate(done, time)).filter(|rate| *rate > 0);
        let to_go = to_go.map(|rate| Duration::from_secs(left / rate));
        let check = "the disk does not answer";
        Look { done, total: self.total, transferred: done, to_go, check, ..Look::default() }
    }

    fn report(&self) -> Report {
        let (time, done) = (self.start.elapsed(), self.read.load(Ordering::Relaxed));
        let ram = Ram {
            total: self.total,
            transferred: done,
            remaining: Some(self.total.saturating_sub(done)),
            ..Ram::default()
        };
        Report { status: self.status, total_time: millis(time), ram, ..Report::default() }
    }
}
