//! Detects that nothing moves between the two sides any more.
//!
//! A peer whose host answers may still be inactive: a stopped process, a disk that hangs, a destination that waits for
//! something that this source does not send. It differs from a slow peer in that no connection moves a byte. So all
//! connections of a side record in one place when one of them moved bytes. A wait for something that is expected ends
//! when that was too long ago.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use crate::sync_types::{AtomicBool, AtomicU64, Instant};

/// When bytes last moved on any connection of a side.
#[derive(Debug)]
pub(super) struct Activity {
    born: Instant,
    /// Milliseconds since `born`. Orders nothing: a thread that reads an old value checks again when that time has
    /// passed.
    last: AtomicU64,
}

impl Default for Activity {
    fn default() -> Self {
        Self { born: Instant::now(), last: AtomicU64::new(0) }
    }
}

/// How long the peers of a side may be inactive while something is expected. A connection gets the timer in its
/// [`Context`](super::Context). All timers of one [`Stop`](super::Stop) use the same activity.
#[derive(Clone, Debug)]
pub struct StallTimer {
    activity: Arc<Activity>,
    limit: Option<Duration>,
    /// Whether the connection's bytes count; `None` if they always do. The bytes of a foreign connection must not keep
    /// a migration alive. Orders nothing: a few bytes more or less make no difference.
    counts: Option<Arc<AtomicBool>>,
}

impl StallTimer {
    pub(super) fn new(activity: Arc<Activity>, limit: Option<Duration>) -> Self {
        Self { activity, limit, counts: None }
    }

    /// The same timer for a connection that has not been identified yet: its bytes do not count before
    /// [`identified`](Self::identified).
    pub(super) fn of_stranger(&self) -> Self {
        Self { counts: Some(Arc::default()), ..self.clone() }
    }

    /// Records that the connection belongs to the migration: its bytes count from now on.
    pub(crate) fn identified(&self) {
        if let Some(counts) = &self.counts {
            counts.store(true, Ordering::Relaxed);
        }
        self.moved();
    }

    /// The limit; `None` is no limit.
    pub fn limit(&self) -> Option<Duration> {
        self.limit
    }

    /// Notes that bytes have moved.
    pub fn moved(&self) {
        if self.counts.as_ref().is_some_and(|counts| !counts.load(Ordering::Relaxed)) {
            return;
        }
        let now = u64::try_from(self.activity.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.activity.last.fetch_max(now, Ordering::Relaxed);
    }

    /// The rest of the limit for a wait that began at `begun`; `None` without a limit.
    pub fn left(&self, begun: Instant) -> Option<Duration> {
        Some(self.left_of(self.limit?, begun))
    }

    /// The same, of another limit.
    pub(crate) fn left_of(&self, limit: Duration, begun: Instant) -> Duration {
        // The clock is read first, so that bytes that move in between count.
        let now = Instant::now();
        let last = self.activity.born + Duration::from_millis(self.activity.last.load(Ordering::Relaxed));
        let quiet = now.saturating_duration_since(begun.max(last));
        limit.saturating_sub(quiet)
    }

    /// Called after a wait to send has reached its time limit.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if nothing is left of the limit.
    pub fn check_send(&self, begun: Instant) -> io::Result<()> {
        match (self.left(begun), self.limit) {
            (Some(Duration::ZERO), Some(limit)) => {
                let text = format!("the other side has accepted no data for {} s", limit.as_secs_f64());
                Err(io::Error::new(io::ErrorKind::TimedOut, text))
            }
            _ => Ok(()),
        }
    }
}

/// How many times a wait checks within its limit. The wait may exceed the limit by this fraction of it.
const LOOKS: u32 = 4;

/// How long a wait may take before it checks again.
pub(super) fn interval(limit: Duration) -> Duration {
    (limit / LOOKS).max(Duration::from_millis(1))
}

/// The beginning of a wait that has just ended for the first time after `interval`.
pub(super) fn begun(interval: Duration) -> Instant {
    let now = Instant::now();
    now.checked_sub(interval).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn bytes_of_a_stranger_do_not_count_before_it_is_identified() {
        const LIMIT: Duration = Duration::from_secs(100);
        let of_side = StallTimer::new(Arc::default(), Some(LIMIT));
        let (begun, stranger) = (Instant::now(), of_side.of_stranger());
        let moments = Duration::from_millis(20);
        thread::sleep(moments);
        stranger.moved();
        assert!(of_side.left(begun).expect("a limit") <= LIMIT - moments, "nothing has moved");
        stranger.identified();
        assert!(of_side.left(begun).expect("a limit") > LIMIT - moments, "a channel was identified");
        thread::sleep(moments);
        let again = Instant::now();
        stranger.moved();
        let left = of_side.left(begun).expect("a limit");
        assert!(left > LIMIT.saturating_sub(again.elapsed() + moments), "it counts: {left:?}");
    }
}
