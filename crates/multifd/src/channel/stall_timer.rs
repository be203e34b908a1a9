//! Whether anything still moves between the two sides.
//!
//! A peer whose host answers may do nothing all the same: a stopped process, a disk that hangs, a destination that waits
//! for something that this source does not send. What tells it from a slow one is that no connection moves a byte, so
//! all connections of a side note in one place when one did, and a wait for something that is due ends when that was
//! too long ago.

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
    /// Milliseconds since `born`. Orders nothing: who reads an old value looks again when that is over.
    last: AtomicU64,
}

impl Default for Activity {
    fn default() -> Self {
        Self { born: Instant::now(), last: AtomicU64::new(0) }
    }
}

/// How long the peers of a side may do nothing while something is due. It comes in a connection's
/// [`Context`](super::Context); all timers of one [`Stop`](super::Stop) see the same activity.
#[derive(Clone, Debug)]
pub struct StallTimer {
    activity: Arc<Activity>,
    limit: Option<Duration>,
    /// Whether the connection's bytes count; `None`: they do. A stranger's must not keep a migration alive. Orders
    /// nothing: a few bytes too many or too few make no difference.
    counts: Option<Arc<AtomicBool>>,
}

impl StallTimer {
    pub(super) fn new(activity: Arc<Activity>, limit: Option<Duration>) -> Self {
        Self { activity, limit, counts: None }
    }

    /// The same timer for a connection that has not said yet what it is: its bytes do not count before
    /// [`identified`](Self::identified).
    pub(super) fn of_stranger(&self) -> Self {
        Self { counts: Some(Arc::default()), ..self.clone() }
    }

    /// The connection is one of the migration: its bytes count from now on.
    pub(crate) fn identified(&self) {
        if let Some(counts) = &self.counts {
            counts.store(true, Ordering::Relaxed);
        }
        self.moved();
    }

    /// The limit; `None` is none.
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

    /// How much is left of the limit for a wait that began at `begun`; `None` without a limit.
    pub fn left(&self, begun: Instant) -> Option<Duration> {
        Some(self.left_of(self.limit?, begun))
    }

    /// The same, of another limit.
    pub(crate) fn left_of(&self, limit: Duration, begun: Instant) -> Duration {
        // The clock first: what moves in between counts.
        let now = Instant::now();
        let last = self.activity.born + Duration::from_millis(self.activity.last.load(Ordering::Relaxed));
        let quiet = now.saturating_duration_since(begun.max(last));
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
        assert!(of_side.left(begun).expect("a limit") > LIMIT - moments, "a channel has come");
        thread::sleep(moments);
        let again = Instant::now();
        stranger.moved();
        let left = of_side.left(begun).expect("a limit");
        assert!(left > LIMIT.saturating_sub(again.elapsed() + moments), "it counts: {left:?}");
    }
}
