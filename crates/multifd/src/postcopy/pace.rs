//! How much of the walk is on its way at once while a guest waits for pages.
//!
//! A requested page waits for what is before it on the line, also if it has a connection of its own. A sender that fills the
//! buffers of all connections fills the queue of the slowest link, too: milliseconds. What the line carries in one round trip,
//! and as much again, keeps it busy.

use std::time::Duration;

use crate::sync_types::Instant;

/// What a job has cost, besides the line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Until the first byte could be sent: to read the pages, check them for zeros, compress them.
    pub prepared: Duration,
    /// The shortest round trip of the connection, as far as the system knows it.
    pub round_trip: Option<Duration>,
}

/// Measures the line, and says how much may be on its way.
pub(super) struct Pace {
    since: Instant,
    /// Sent since then.
    bytes: u64,
    prepared: Duration,
    round_trip: Option<Duration>,
    allowed: u64,
}

/// How the walk is limited while a guest waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit {
    /// Threads that send at once.
    pub(super) threads: usize,
    /// Bytes that may wait in the connection of each.
    pub(super) backlog: u64,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, bytes: 0, prepared: Duration::ZERO, round_trip: None, allowed: PIECE }
    }

    /// Notes what was sent.
    pub(super) fn sent(&mut self, bytes: u64, cost: Cost, now: Instant) {
        self.bytes += bytes;
        self.prepared = (self.prepared * 7 + cost.prepared) / 8;
        self.round_trip = self.round_trip.into_iter().chain(cost.round_trip).min();
        let time = now.saturating_duration_since(self.since);
        if time >= SPAN {
            // Twice as long as it takes, so that more is allowed until the line is full.
            let lasts = (self.prepared + self.round_trip.unwrap_or_default()) * 2 + QUEUE;
            let allowed = u128::from(self.bytes) * lasts.as_nanos() / time.as_nanos();
            self.allowed = u64::try_from(allowed).unwrap_or(u64::MAX);
            (self.since, self.bytes) = (now, 0);
        }
    }

    pub(super) fn limit(&self) -> Limit {
        let threads = self.allowed.div_ceil(PIECE).clamp(1, THREADS);
        let backlog = (self.allowed / threads).max(LEAST);
        Limit { threads: usize::try_from(threads).unwrap_or(usize::MAX), backlog }
    }
}

/// How long the line is measured.
const SPAN: Duration = Duration::from_millis(5);
/// What a requested page may wait for on the line.
const QUEUE: Duration = Duration::from_micros(250);
/// About the bytes of a short job.
const PIECE: u64 = 64 << 10;
/// More than there are channels.
const THREADS: u64 = 256;
/// With less in a connection, the time between two wake-ups of its thread would count.
const LEAST: u64 = 32 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    /// What is allowed on a line that carries `line` bytes in a second, when senders keep what is allowed on their way.
    fn settled(line: u64, cost: Cost) -> Limit {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        for _ in 0..40 {
            let Limit { threads, .. } = pace.limit();
            // A job of each thread takes its preparation and a round trip, if the line is not the limit.
            let job = cost.prepared + cost.round_trip.unwrap_or_default() + Duration::from_micros(10);
            let round = job.max(Duration::from_nanos(threads as u64 * PIECE * 1_000_000_000 / line));
            for _ in 0..SPAN.as_nanos().div_ceil(round.as_nanos()) {
                now += round;
                pace.sent(threads as u64 * PIECE, cost, now);
            }
        }
        pace.limit()
    }

    const MICROS: fn(u64) -> Duration = Duration::from_micros;

    #[test]
    fn slow_line_gets_one_thread_and_a_fast_one_many() {
        let cost = Cost { prepared: MICROS(5), round_trip: Some(MICROS(50)) };
        let slow = settled(125_000_000, cost);
        assert_eq!(slow.threads, 1, "{slow:?}");
        assert!(slow.backlog <= PIECE, "{slow:?}");
        assert!(settled(1_250_000_000, cost).threads >= 6);
        assert_eq!(settled(1_000_000, cost), Limit { threads: 1, backlog: LEAST });
    }

    #[test]
    fn what_takes_time_besides_the_line_does_not_slow_it_down() {
        // One thread could not fill these lines: far away, slow to read, slow to compress.
        for cost in [
            Cost { prepared: MICROS(5), round_trip: Some(MICROS(10_000)) },
            Cost { prepared: MICROS(4_000), round_trip: Some(MICROS(50)) },
            Cost { prepared: MICROS(300), round_trip: None },
        ] {
            let job = cost.prepared + cost.round_trip.unwrap_or_default();
            let needed = 1_250_000_000 * u64::try_from(job.as_nanos()).unwrap() / 1_000_000_000;
            let limit = settled(1_250_000_000, cost);
            assert!(limit.threads as u64 * PIECE >= needed.min(THREADS * PIECE), "{limit:?} for {cost:?}");
        }
    }

    #[test]
    fn shortest_round_trip_counts() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        for round_trip in [None, Some(MICROS(900)), Some(MICROS(100)), Some(MICROS(5_000))] {
            pace.sent(PIECE, Cost { round_trip, ..Cost::default() }, now + SPAN);
        }
        assert_eq!(pace.round_trip, Some(MICROS(100)));
    }
}
