//! Whether anything still moves between the two sides.
//!
//! A peer whose host answers may do nothing all the same: a stopped process, a disk that hangs, a destination that waits
//! for something that this source does not send. What tells it from a slow one is that no connection moves a byte, so
//! all connections of a side note in one place when one did, and a wait for something that is due ends when that is
//! too long ago.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use crate::sync_types::{AtomicU64, Instant};

/// When bytes last moved on any connection of a side.
#[derive(Debug)]
pub(super) struct Pulse {
    born: Instant,
    /// Milliseconds since `born`. Orders nothing: who reads an old value looks again when that is over.
    last: AtomicU64,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { born: Instant::now(), last: AtomicU64::new(0) }
    }
}

/// How long a connection's peer may do nothing while something is due. Made by [`Stop::attention`](super::Stop::attention);
/// clones, and those of the same stop, note the same movement.
#[derive(Clone, Debug)]
pub struct Attention {
    pulse: Arc<Pulse>,
    limit: Option<Duration>,
}

impl Attention {
    pub(super) fn new(pulse: Arc<Pulse>, limit: Option<Duration>) -> Self {
        Self { pulse, limit }
    }

    /// The limit; `None` is none.
    pub fn limit(&self) -> Option<Duration> {
        self.limit
    }

    /// Notes that bytes have moved.
    pub fn beat(&self) {
        let now = u64::try_from(self.pulse.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.pulse.last.fetch_max(now, Ordering::Relaxed);
    }

    /// How much is left of the limit for a wait that began at `begun`; `None` without a limit.
    pub fn left(&self, begun: Instant) -> Option<Duration> {
        Some(self.left_of(self.limit?, begun))
    }

    /// The same, of another limit.
    pub(crate) fn left_of(&self, limit: Duration, begun: Instant) -> Duration {
        // The clock first: what moves in between counts.
        let now = Instant::now();
        let moved = self.pulse.born + Duration::from_millis(self.pulse.last.load(Ordering::Relaxed));
        let quiet = now.saturating_duration_since(begun.max(moved));
        limit.saturating_sub(quiet)
    }

    /// After a wait to send that took its time.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if nothing is left of the limit.
    pub fn check_send(&self, begun: Instant) -> io::Result<()> {
        match (self.left(begun), self.limit) {
            (Some(Duration::ZERO), Some(limit)) => {
                let text = format!("the other side has taken nothing for {} s", limit.as_secs_f64());
                Err(io::Error::new(io::ErrorKind::TimedOut, text))
            }
            _ => Ok(()),
        }
    }
}

/// How often a wait looks within its limit: it may last longer by so small a part.
const LOOKS: u32 = 4;

/// How long a wait may take before it looks again.
pub(super) fn interval(limit: Duration) -> Duration {
    (limit / LOOKS).max(Duration::from_millis(1))
}

/// When a wait began that has just ended for the first time after `interval`.
pub(super) fn begun(interval: Duration) -> Instant {
    let now = Instant::now();
    now.checked_sub(interval).unwrap_or(now)
}
