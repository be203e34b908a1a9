//! `max-bandwidth`: the source waits after it has sent what a time slice allows.

use std::time::Instant;

use super::control::Bandwidth;
use crate::{channel::Stop, error::Result, slices::Slices};

/// Limits the rate at which bytes are sent.
#[derive(Debug)]
pub(super) struct Pace {
    limit: Bandwidth,
    /// The slices of the limit that was found last.
    slices: Option<Slices>,
    start: Instant,
}

impl Pace {
    /// Creates a limit that follows `limit`, also during a wait.
    pub(super) fn new(limit: Bandwidth) -> Self {
        Self { limit, slices: None, start: Instant::now() }
    }

    /// Whether there is a limit at present.
    pub(super) fn is_limited(&self) -> bool {
        self.limit.get().is_some()
    }

    /// The slices of the present limit. A new limit begins with a new slice.
    fn slices(&mut self) -> Option<&mut Slices> {
        let rate = self.limit.get();
        if self.slices.as_ref().map(Slices::rate) != rate {
            self.slices = rate.map(Slices::new);
        }
        self.slices.as_mut()
    }

    /// Records bytes that are sent now, and waits if they exceed the limit, unless `ends`.
    ///
    /// # Errors
    /// The error that stopped the migration.
    pub(super) fn spend(&mut self, bytes: u64, stop: &Stop, ends: &dyn Fn() -> bool) -> Result<()> {
        let Some(slices) = self.slices() else { return Ok(()) };
        slices.spend(bytes);
        let start = self.start;
        // No wait is longer than a slice, so a limit that is changed in the meantime is noticed.
        while let Some(left) = self.slices().and_then(|slices| slices.wait(start.elapsed())) {
            if ends() {
                return Ok(());
            }
            stop.pause(left)?;
            if stop.is_stopped() {
                return stop.check();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn no_more_is_spent_than_the_rate_allows() {
        let (mut pace, stop, start) =
            (Pace::new(Bandwidth::new(Some(1_000_000))), Stop::new(), Instant::now());
        for _ in 0..300 {
            pace.spend(1000, &stop, &|| false).expect("running");
        }
        // 300 kB at 1 MB/s; the first and the last slice may count as whole slices.
        assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
    }

    /// At 20 bytes a second the wait would take years.
    #[test]
    fn a_waiting_source_goes_on_when_the_limit_is_raised_or_removed() {
        for raised in [None, Some(u64::MAX)] {
            let limit = Bandwidth::new(Some(20));
            let (mut pace, stop) = (Pace::new(limit.clone()), Stop::new());
            let raise = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                limit.set(raised);
            });
            pace.spend(1 << 40, &stop, &|| false).expect("goes on");
            raise.join().expect("no panic");
        }
    }

    #[test]
    fn a_limit_that_is_set_while_bytes_are_sent_holds_from_then_on() {
        let limit = Bandwidth::new(None);
        let (mut pace, stop) = (Pace::new(limit.clone()), Stop::new());
        pace.spend(1 << 60, &stop, &|| false).expect("no limit");
        limit.set(Some(1_000_000));
        assert!(pace.is_limited());
        let start = Instant::now();
        (0..300).for_each(|_| pace.spend(1000, &stop, &|| false).expect("running"));
        assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
        limit.set(Some(0));
        assert!(!pace.is_limited());
    }

    #[test]
    fn a_waiting_source_ends_with_the_stop() {
        let (mut pace, stop) = (Pace::new(Bandwidth::new(Some(20))), Stop::new());
        let cancel = std::thread::spawn({
            let stop = stop.clone();
            move || stop.cancel()
        });
        assert!(pace.spend(1 << 40, &stop, &|| false).expect_err("cancelled").is_cancelled());
        cancel.join().expect("no panic");
    }
}
