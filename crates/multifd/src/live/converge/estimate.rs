//! Estimates properties of the connections and of the guest from each pass, and predicts the next passes.
//!
//! The input is the numbers of each round. The output is the bandwidth, the cost of a page on the wire, and how much
//! the guest will have dirtied after a time. Nothing here waits or reads a clock.
//!
//! A page that is written twice between two bitmap syncs is sent once, so a guest dirties fewer pages per second over a
//! longer time: `pages(t) = set × (1 − e^(−rate × t / set))`, where `t` is the time that its processors ran. Two rounds
//! of different length show both the rate and the set of pages that it writes to.

use std::{collections::VecDeque, time::Duration};

use super::Throttle;
use crate::{live::MigrateOptions, outcome::Percent, ram::PageSize};

/// The numbers from one bitmap sync to the next: one pass.
#[derive(Clone, Copy, Debug)]
pub(in crate::live) struct Round {
    pub(in crate::live) time: Duration,
    /// Bytes that left on all connections.
    pub(in crate::live) bytes: u64,
    /// Pages whose bytes were sent.
    pub(in crate::live) normal: u64,
    /// Zero pages that were sent.
    pub(in crate::live) zero: u64,
    /// Pages to be sent next: the pages that the guest wrote in this round.
    pub(in crate::live) dirty: u64,
}

/// The estimates after some rounds.
#[derive(Clone, Debug)]
pub(super) struct Estimate {
    page_size: f64,
    /// Pages of the guest's RAM.
    pages: f64,
    /// Bytes per second on the wire.
    bandwidth: f64,
    /// Bytes per page on the wire.
    cost: f64,
    /// Pages dirtied per second in the last round.
    dirty_rate: f64,
    /// The last rounds, newest first.
    seen: VecDeque<Seen>,
}

/// One round, from the guest's point of view.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Seconds that its processors ran.
    ran: f64,
    dirty: f64,
}

impl Estimate {
    pub(super) fn new(page_size: PageSize, pages: u64) -> Self {
        let page_size = page_size.bytes() as f64;
        Self {
            page_size,
            pages: pages as f64,
            bandwidth: 0.0,
            cost: page_size,
            dirty_rate: 0.0,
            seen: VecDeque::with_capacity(ROUNDS),
        }
    }

    /// Adds a round, during which the guest was throttled by `percent`.
    pub(super) fn observe(&mut self, round: &Round, percent: Percent) {
        let seconds = round.time.as_secs_f64().max(1e-9);
        let bandwidth = round.bytes as f64 / seconds;
        // A very short pass shows more about the cost of a pass than about the bandwidth.
        let weight = if self.bandwidth > 0.0 { 1.0 - (-seconds / SETTLES).exp() } else { 1.0 };
        self.bandwidth += (bandwidth - self.bandwidth) * weight;
        if round.normal > 0 {
            let zero = ZERO_ENTRY * round.zero;
            self.cost = round.bytes.saturating_sub(zero).max(1) as f64 / round.normal as f64;
        }
        self.dirty_rate = round.dirty as f64 / seconds;
        self.seen.truncate(ROUNDS - 1);
        self.seen.push_front(Seen { ran: seconds * percent.running(), dirty: round.dirty as f64 });
    }

    /// Bytes per second on the wire.
    pub(super) fn bandwidth(&self) -> f64 {
        self.bandwidth
    }

    /// The bytes on the wire of `pages` dirty pages.
    pub(super) fn cost(&self, pages: f64) -> f64 {
        pages * self.cost
    }

    /// Bytes of RAM that are dirtied per second, and bytes of RAM that can be sent per second.
    pub(super) fn rates(&self) -> (f64, f64) {
        (self.dirty_rate * self.page_size, self.bandwidth / self.cost * self.page_size)
    }

    /// The downtime if the guest is stopped with `pages` pages to send.
    pub(super) fn downtime(&self, pages: f64, options: &MigrateOptions) -> Duration {
        options.expected_downtime(self.cost(pages), self.bandwidth)
    }

    /// The time until the migration is complete, downtime included, with `pages` to send now; `None` if it does not
    /// converge.
    pub(super) fn remaining_time(
        &self,
        mut pages: f64,
        options: &MigrateOptions,
        mut throttle: Option<Throttle>,
    ) -> Option<Duration> {
        let curve = self.curve();
        let mut time = Duration::ZERO;
        for _ in 0..MOST_ROUNDS {
            let downtime = self.downtime(pages, options);
            if downtime <= options.downtime_limit {
                return time.checked_add(downtime);
            }
            let pass = self.cost(pages) / self.bandwidth.max(1.0);
            let pass = Duration::try_from_secs_f64(pass).ok()?;
            time = time.checked_add(pass)?;
            let percent = throttle.as_ref().map_or(Percent::NONE, Throttle::percent);
            let dirty = curve.pages_after(pass.as_secs_f64() * percent.running()).min(self.pages);
            if let Some(throttle) = &mut throttle {
                throttle.passed(self.cost(dirty), self.cost(pages), pass);
            }
            let rises = throttle.as_ref().is_some_and(|throttle| !throttle.is_spent());
            if dirty > pages * SHRINKS && !rises {
                return None;
            }
            pages = dirty.round();
        }
        None
    }

    /// How pages become dirty, according to the last rounds.
    fn curve(&self) -> Curve {
        let Some(last) = self.seen.front() else { return Curve { rate: 0.0, set: f64::INFINITY } };
        let straight = Curve { rate: last.dirty / last.ran.max(1e-9), set: f64::INFINITY };
        let differ = |other: &&Seen| other.ran > last.ran * DIFFER || last.ran > other.ran * DIFFER;
        self.seen
            .iter()
            .find(differ)
            .map_or(straight, |other| Curve::through(*last, *other).unwrap_or(straight))
    }
}

/// The number of dirty pages as a function of time.
#[derive(Clone, Copy, Debug)]
struct Curve {
    /// Pages per second at first.
    rate: f64,
    /// The number of pages that the guest writes to.
    set: f64,
}

impl Curve {
    /// The curve through both rounds, if they bend in the expected direction.
    fn through(a: Seen, b: Seen) -> Option<Self> {
        let (short, long) = if a.ran < b.ran { (a, b) } else { (b, a) };
        let grown = long.dirty / short.dirty.max(1.0);
        if grown <= 1.0 {
            // The whole set is dirty after the shorter one.
            return Some(Self { rate: f64::INFINITY, set: a.dirty });
        }
        if grown * FLAT >= long.ran / short.ran {
            return None;
        }
        // `part(x × long) / part(x × short)` falls from the ratio of the times to 1 as `x`, which is rate / set, grows.
        let part = |seconds: f64| -(-seconds).exp_m1();
        let (mut low, mut high) = (0.0, 50.0 / short.ran.max(1e-9));
        for _ in 0..60 {
            let x = f64::midpoint(low, high);
            if part(x * long.ran) / part(x * short.ran) > grown {
                low = x;
            } else {
                high = x;
            }
        }
        let set = a.dirty / part(high * a.ran);
        Some(Self { rate: high * set, set })
    }

    fn pages_after(self, seconds: f64) -> f64 {
        if self.set.is_infinite() {
            self.rate * seconds
        } else if self.rate.is_infinite() {
            self.set
        } else {
            self.set * -(-self.rate * seconds / self.set).exp_m1()
        }
    }
}

/// The approximate cost of a zero page on the wire: its entry in a head, or its record on main.
pub(in crate::live) const ZERO_ENTRY: u64 = 9;
/// The number of rounds that are kept: older behaviour of a guest predicts little.
const ROUNDS: usize = 4;
/// Two rounds define a curve if one lasted at least this many times as long.
const DIFFER: f64 = 1.4;
/// A curve that bends by less than this is treated as straight.
const FLAT: f64 = 1.03;
/// Seconds after which an earlier bandwidth has little weight.
const SETTLES: f64 = 0.1;
/// A pass that leaves more than this share of its pages makes no progress.
const SHRINKS: f64 = 0.995;
const MOST_ROUNDS: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn round(millis: u64, normal: u64, dirty: u64) -> Round {
        Round { time: Duration::from_millis(millis), bytes: normal * 4096, normal, zero: 0, dirty }
    }

    fn after(rounds: &[Round]) -> Estimate {
        let mut estimate = Estimate::new(PageSize::KIB_4, 1 << 30);
        rounds.iter().for_each(|round| estimate.observe(round, Percent::NONE));
        estimate
    }

    #[test]
    fn guest_that_dirties_half_of_what_is_sent_is_done_after_a_geometric_series() {
        let estimate = after(&[round(1000, 1_000_000, 500_000)]);
        let limit = |millis| MigrateOptions::new().downtime_limit(Duration::from_millis(millis));
        let time = |millis| estimate.remaining_time(500_000.0, &limit(millis), None).expect("an end");
        // 500 ms to send; then 250, 125, 62.5; each pass takes as long as the downtime that it saves.
        for (millis, expected) in [(500, 500), (300, 750), (130, 875), (100, 937)] {
            assert_eq!(time(millis).as_millis(), expected, "{millis} ms");
        }
    }

    #[test]
    fn guest_that_dirties_more_than_is_sent_is_never_done_unless_it_can_be_held_back() {
        let estimate = after(&[round(1000, 1000, 2000)]);
        let options = MigrateOptions::new();
        assert_eq!(estimate.remaining_time(2000.0, &options, None), None);
        let throttle = Throttle::new(options.cpu_throttle);
        let time = estimate.remaining_time(2000.0, &options, Some(throttle)).expect("an end");
        assert!(time > 10 * SECOND, "{time:?}");
        let weak = super::super::CpuThrottle { initial: 30, max: 40, ..options.cpu_throttle };
        assert_eq!(estimate.remaining_time(2000.0, &options, Some(Throttle::new(weak))), None);
    }

    #[test]
    fn set_that_the_guest_writes_to_shows_in_two_rounds() {
        let truth = Curve { rate: 5000.0, set: 3000.0 };
        let seen = |ran| Seen { ran, dirty: truth.pages_after(ran) };
        let curve = Curve::through(seen(0.2), seen(1.0)).expect("it bends");
        assert!((curve.rate - truth.rate).abs() < 1.0 && (curve.set - truth.set).abs() < 1.0, "{curve:?}");
        let straight = Curve::through(Seen { ran: 1.0, dirty: 10.0 }, Seen { ran: 2.0, dirty: 20.0 });
        assert!(straight.is_none(), "{straight:?}");
        let full = Curve::through(Seen { ran: 1.0, dirty: 10.0 }, Seen { ran: 2.0, dirty: 10.0 });
        assert!((full.expect("it bends").pages_after(0.1) - 10.0).abs() < 1e-9, "{full:?}");
    }

    #[test]
    fn pages_count_as_they_travel() {
        // Pages shrink to a quarter of their size, and there are zero pages among them.
        let packed =
            Round { time: SECOND, bytes: 1024 * 1000 + 9 * 500, normal: 1000, zero: 500, dirty: 400 };
        let estimate = after(&[packed]);
        assert!((estimate.cost(400.0) - 409_600.0).abs() < 1e-6, "{estimate:?}");
        let downtime = estimate.downtime(400.0, &MigrateOptions::new());
        assert!(downtime.abs_diff(Duration::from_millis(398)) < Duration::from_millis(1), "{downtime:?}");
    }

    #[test]
    fn pass_of_a_moment_says_little_of_the_bandwidth() {
        let moment = Round { time: SECOND / 1000, bytes: 1, normal: 1, zero: 0, dirty: 0 };
        let estimate = after(&[round(1000, 1000, 10), moment]);
        assert!(estimate.bandwidth() > 0.98 * 4_096_000.0, "{estimate:?}");
    }
}
