//! The context of a connection: the migration that it belongs to.

use std::{num::NonZeroU8, time::Duration};

use super::{StallTimer, Stop};
use crate::parameters::CONNECT_TIMEOUT;

/// The migration for which a connection is opened or accepted. Every connection gets it when it is made, so its stop,
/// time limits and share of the buffers always apply.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Context {
    /// Ends the attempt to connect, and ends a wait of the connection through its waker.
    pub stop: Stop,
    /// The time limit of an attempt to connect, TLS handshake included. Default [30 s](CONNECT_TIMEOUT).
    pub connect_timeout: Duration,
    /// The stall timer. The connection calls [`StallTimer::moved`] when bytes have moved, and fails a send with
    /// [`TimedOut`](std::io::ErrorKind::TimedOut) when [`StallTimer::check_send`] does. No limit by default.
    pub stall_timer: StallTimer,
    /// The number of connections of this kind in the migration. Each gets its share of what all use, such
    /// as caches. Default 1.
    pub channels: NonZeroU8,
}

impl Context {
    /// Creates a context of the migration that `stop` ends.
    pub fn new(stop: &Stop) -> Self {
        let (connect_timeout, stall_timer) = (CONNECT_TIMEOUT.default_time(), stop.stall_timer(None));
        Self { stop: stop.clone(), connect_timeout, stall_timer, channels: NonZeroU8::MIN }
    }

    /// Sets [`connect_timeout`](Self::connect_timeout).
    #[must_use]
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// Sets how long the other side may be inactive while something is expected. A send fails if in this time the other
    /// end has read nothing and no other connection of the same stop has moved a byte. `None` is no limit.
    #[must_use]
    pub fn stall_timeout(mut self, limit: Option<Duration>) -> Self {
        self.stall_timer = self.stop.stall_timer(limit);
        self
    }

    /// Sets [`channels`](Self::channels); 0 is treated as 1.
    #[must_use]
    pub fn channels(mut self, channels: u8) -> Self {
        self.channels = NonZeroU8::new(channels).unwrap_or(NonZeroU8::MIN);
        self
    }

    /// The same context, for a connection that has not been identified yet.
    pub(crate) fn of_stranger(&self) -> Self {
        Self { stall_timer: self.stall_timer.of_stranger(), ..self.clone() }
    }
}
