//! What a connection is a part of.

use std::time::Duration;

use super::{StallTimer, Stop};
use crate::parameters::CONNECT_TIMEOUT;

/// The migration that a connection is opened or taken for. Every connection gets it when it is made, so none can miss its
/// stop, its time limits or its share of the buffers.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Context {
    /// Ends the attempt to connect, and a wait of the connection through its waker.
    pub stop: Stop,
    /// How long an attempt to connect may take, with the handshake of TLS. Default
    /// [30 s](CONNECT_TIMEOUT).
    pub connect_timeout: Duration,
    /// The connection calls [`StallTimer::moved`] when bytes have moved, and fails a send with
    /// [`TimedOut`](std::io::ErrorKind::TimedOut) when [`StallTimer::check_send`] says so. Without limit by default.
    pub stall_timer: StallTimer,
    /// How many connections of this kind the migration has, at least 1: each gets its share of what is for all, such as
    /// caches. Default 1.
    pub channels: u8,
}

impl Context {
    /// A context of the migration that `stop` ends.
    pub fn new(stop: &Stop) -> Self {
        let (connect_timeout, stall_timer) = (CONNECT_TIMEOUT.default_time(), stop.stall_timer(None));
        Self { stop: stop.clone(), connect_timeout, stall_timer, channels: 1 }
    }

    /// Sets [`connect_timeout`](Self::connect_timeout).
    #[must_use]
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// Sets how long the other side may do nothing while something is due: a send fails when for so long the other end has
    /// taken nothing and no other connection of the same stop has moved a byte. `None` is forever.
    #[must_use]
    pub fn stall_timeout(mut self, limit: Option<Duration>) -> Self {
        self.stall_timer = self.stop.stall_timer(limit);
        self
    }

    /// Sets [`channels`](Self::channels); 0 is taken as 1.
    #[must_use]
    pub fn channels(mut self, channels: u8) -> Self {
        self.channels = channels.max(1);
        self
    }

    /// The same for a connection that has not said yet what it is.
    pub(crate) fn of_stranger(&self) -> Self {
        Self { stall_timer: self.stall_timer.of_stranger(), ..self.clone() }
    }
}
