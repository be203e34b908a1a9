//! Limits a rate: what each slice of time allows. It computes, and does not wait.

use std::time::Duration;

/// The number of bytes that each time slice allows. The caller passes the time.
#[derive(Debug)]
pub(crate) struct Slices {
    rate: u64,
    slice: Duration,
    spent: u64,
}

impl Slices {
    /// Creates slices for `rate` bytes per second.
    pub(crate) fn new(rate: u64) -> Self {
        Self { rate, slice: Duration::ZERO, spent: 0 }
    }

    /// The bytes per second.
    pub(crate) fn rate(&self) -> u64 {
        self.rate
    }

    /// Records bytes that are sent.
    pub(crate) fn spend(&mut self, bytes: u64) {
        self.spent = self.spent.saturating_add(bytes);
    }

    /// The time to wait, `now` after the beginning, before more may be sent; `None` if there is no wait. Must be called
    /// again after the wait.
    pub(crate) fn wait(&mut self, now: Duration) -> Option<Duration> {
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
