//! `max-bandwidth`: the source waits after it has sent what a time slice allows.

use std::time::{Duration, Instant};

use crate::{channel::Stop, error::Result};

/// Limits the rate at which bytes are sent.
#[derive(Debug)]
pub(super) struct Pace {
    slices: Option<Slices>,
    start: Instant,
}

impl Pace {
    /// Creates a limit of `rate` bytes per second; `None` is no limit.
    pub(super) fn new(rate: Option<u64>) -> Self {
        Self { slices: rate.map(Slices::new), start: Instant::now() }
    }

    /// Whether there is a limit.
    pub(super) fn is_limited(&self) -> bool {
        self.slices.is_some()
    }

    /// Records bytes that are sent now, and waits if they exceed the limit.
    ///
    /// # Errors
    /// The error that stopped the migration.
    pub(super) fn spend(&mut self, bytes: u64, stop: &Stop) -> Result<()> {
        let Some(slices) = &mut self.slices else { return Ok(()) };
        slices.spend(bytes);
        while let Some(left) = slices.wait(self.start.elapsed()) {
            stop.pause(left)?;
            if stop.is_stopped() {
                return stop.check();
            }
        }
        Ok(())
    }
}

/// The number of bytes that each time slice allows. The caller passes the time.
#[derive(Debug)]
pub(super) struct Slices {
    rate: u64,
    slice: Duration,
    spent: u64,
}

impl Slices {
    /// Creates slices for `rate` bytes per second.
    pub(super) fn new(rate: u64) -> Self {
        Self { rate, slice: Duration::ZERO, spent: 0 }
    }

    /// Records bytes that are sent.
    pub(super) fn spend(&mut self, bytes: u64) {
        self.spent = self.spent.saturating_add(bytes);
    }

    /// The time to wait, `now` after the beginning, before more may be sent; `None` if there is no wait. Must be called
    /// again after the wait.
    pub(super) fn wait(&mut self, now: Duration) -> Option<Duration> {
        let allowed = self.rate / SLICES_A_SECOND;
        while self.spent > allowed {
            // A source that had nothing to send may not send faster later.
            let left = SLICE.saturating_sub(now.saturating_sub(self.slice));
            if !left.is_zero() {
                return Some(left);
            }
            self.slice = now;
            self.spent = self.spent.saturating_sub(allowed.max(1));
        }
        None
    }
}

const SLICES_A_SECOND: u64 = 20;
const SLICE: Duration = Duration::from_millis(1000 / SLICES_A_SECOND);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_spent_than_the_rate_allows() {
        let (mut pace, stop, start) = (Pace::new(Some(1_000_000)), Stop::new(), Instant::now());
        for _ in 0..300 {
            pace.spend(1000, &stop).expect("running");
        }
        // 300 kB at 1 MB/s; the first and the last slice may count as whole slices.
        assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
    }

    #[test]
    fn a_waiting_source_ends_with_the_stop() {
        let (mut pace, stop) = (Pace::new(Some(20)), Stop::new());
        let cancel = std::thread::spawn({
            let stop = stop.clone();
            move || stop.cancel()
        });
        assert!(pace.spend(1 << 40, &stop).expect_err("cancelled").is_cancelled());
        cancel.join().expect("no panic");
    }
}
