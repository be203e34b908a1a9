//! Decides whether a migration converges: after each pass, what to do next and what to expect.
//!
//! ```text
//! round (bytes, pages, time, dirty) ─▶ estimate ─▶ enough? ─▶ switch over
//!                                         │           └ no ─▶ throttle? stalled? out of bounds? ─▶ another pass
//!                                         └─▶ expected-downtime, expected remaining time
//! ```
//!
//! All results are computed from the arguments: there is no clock, no wait and no guest. The migration and the
//! simulation that tests it (`simulation.rs`) use the same code.

mod estimate;
#[cfg(test)]
mod simulation;
mod throttle;

use std::time::Duration;

use estimate::Estimate;
pub(super) use estimate::{Round, ZERO_ENTRY};
pub(crate) use throttle::CpuThrottle;
use throttle::Throttle;

use super::MigrateOptions;
use crate::{
    outcome::{Bound, Percent, Remedy, Stall},
    parameters,
    ram::PageSize,
};

/// The judge of one migration.
#[derive(Clone, Debug)]
pub(super) struct Converge {
    options: MigrateOptions,
    channels: u8,
    estimate: Estimate,
    throttle: Option<Throttle>,
    passes: u64,
    /// The least expected downtime so far.
    least: Option<Duration>,
    /// The fewest pages that a pass has left to send, and how many passes ago that was.
    best: (u64, u32),
    /// The number of successive passes that did not converge.
    doubts: u32,
}

/// The result of judging a pass: what to report and what to do.
#[derive(Clone, Debug)]
pub(super) struct Judgement {
    pub(super) expected_downtime: Duration,
    /// The time until the migration is complete, downtime included.
    pub(super) remaining_time: Option<Duration>,
    pub(super) stall: Option<Stall>,
    /// Like `stall`, if the migration does not converge at the moment but a burst may be the cause.
    pub(super) doubt: Option<Stall>,
    /// Bytes per second on the wire.
    pub(super) bandwidth: f64,
    pub(super) step: Step,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Another pass, with this throttle from now on if it changes.
    Pass(Option<Percent>),
    /// The remaining pages fit into the downtime.
    SwitchOver,
    /// A bound was reached.
    GiveUp(Bound),
}

impl Converge {
    /// Creates a judge for a guest of `pages` pages, over `channels` channels; 0 means main only.
    pub(super) fn new(options: &MigrateOptions, page_size: PageSize, pages: u64, channels: u8) -> Self {
        Self {
            options: options.clone(),
            channels,
            estimate: Estimate::new(page_size, pages),
            throttle: options.auto_converge.then(|| Throttle::new(options.cpu_throttle)),
            passes: 0,
            least: None,
            best: (u64::MAX, 0),
            doubts: 0,
        }
    }

    /// Uses this `downtime-limit` from now on.
    /// Sets the `max-bandwidth` that holds from now on.
    pub(super) fn set_max_bandwidth(&mut self, limit: Option<u64>) {
        self.options.max_bandwidth = limit;
    }

    pub(super) fn set_downtime_limit(&mut self, limit: Duration) {
        self.options.downtime_limit = limit;
    }

    /// Judges a pass that ended `elapsed` after the migration began.
    pub(super) fn judge(&mut self, round: &Round, elapsed: Duration) -> Judgement {
        self.passes += 1;
        self.estimate.observe(round, self.throttled());
        let dirty = round.dirty as f64;
        let expected_downtime = self.estimate.downtime(dirty, &self.options);
        self.least = Some(self.least.map_or(expected_downtime, |least| least.min(expected_downtime)));
        let mut judgement = Judgement {
            expected_downtime,
            remaining_time: Some(expected_downtime),
            stall: None,
            doubt: None,
            bandwidth: self.estimate.bandwidth(),
            step: Step::SwitchOver,
        };
        if expected_downtime <= self.options.downtime_limit {
            return judgement;
        }
        let raised = self
            .throttle
            .as_mut()
            .and_then(|throttle| throttle.passed(self.estimate.cost(dirty), round.bytes as f64, round.time));
        judgement.remaining_time = self.estimate.remaining_time(dirty, &self.options, self.throttle.clone());
        let endless = judgement.remaining_time.is_none();
        let stalled = self.is_stalled(round.dirty, endless, raised.is_some());
        judgement.doubt = (endless || stalled).then(|| self.describe());
        if stalled {
            judgement.remaining_time = None;
            judgement.stall.clone_from(&judgement.doubt);
        }
        judgement.step = self.out_of_bounds(elapsed).map_or(Step::Pass(raised), Step::GiveUp);
        judgement
    }

    fn throttled(&self) -> Percent {
        self.throttle.as_ref().map_or(Percent::NONE, Throttle::percent)
    }

    fn out_of_bounds(&self, elapsed: Duration) -> Option<Bound> {
        let passes = self.options.max_passes.filter(|most| self.passes >= *most).map(Bound::Passes);
        passes.or_else(|| self.options.max_total_time.filter(|most| elapsed >= *most).map(Bound::Time))
    }

    /// Whether the migration makes no progress: it does not converge, or the number of pages to send does not fall.
    fn is_stalled(&mut self, dirty: u64, endless: bool, raised: bool) -> bool {
        self.doubts = if endless { self.doubts.saturating_add(1) } else { 0 };
        let (best, ago) = self.best;
        let nearer = (dirty as f64) < best as f64 * NEARER;
        // After a higher throttle the count starts again.
        self.best = if nearer || raised { (dirty.min(best), 0) } else { (best, ago.saturating_add(1)) };
        self.doubts >= DOUBTS || self.best.1 >= NO_NEARER
    }

    fn describe(&self) -> Stall {
        let (dirty_rate, sending_rate) = self.estimate.rates();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "rates of bytes")]
        let (dirty_rate, sending_rate) = (dirty_rate as u64, sending_rate as u64);
        Stall { dirty_rate, sending_rate, throttled: self.throttled(), remedies: self.remedies() }
    }

    fn remedies(&self) -> Vec<Remedy> {
        let held_back =
            self.options.max_bandwidth.filter(|most| self.estimate.bandwidth() > *most as f64 * USED_UP);
        let faster = held_back.map_or(Remedy::Channels(self.channels), Remedy::MaxBandwidth);
        let most = Percent::new(self.options.cpu_throttle.max);
        let slower = match self.throttle {
            None => Some(Remedy::AutoConverge),
            Some(_) if most < Percent::new(u8::MAX) => Some(Remedy::MaxCpuThrottle(most)),
            Some(_) => None,
        };
        [Some(faster), slower, self.allowed().map(Remedy::DowntimeLimit)].into_iter().flatten().collect()
    }

    /// The downtime that would have been enough, rounded to tenths of a second.
    fn allowed(&self) -> Option<Duration> {
        let tenths = self.least?.as_nanos() / 100_000_000 + 1;
        let limit = Duration::from_millis(u64::try_from(tenths).ok()?.checked_mul(100)?);
        parameters::DOWNTIME_LIMIT.check(i128::try_from(limit.as_millis()).ok()?).ok()?;
        Some(limit)
    }
}

/// A pass makes progress if it leaves less than this share of the fewest pages so far.
const NEARER: f64 = 0.95;
/// This number of passes without progress is a stall.
const NO_NEARER: u32 = 8;
/// This number of successive passes that do not converge is a stall, too. Fewer may be a burst.
const DOUBTS: u32 = 3;
/// From this share of `max-bandwidth` on, the limit is considered the reason for slow passes.
const USED_UP: f64 = 0.8;

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn judge(options: &MigrateOptions) -> Converge {
        Converge::new(options, PageSize::KIB_4, 1 << 20, 4)
    }

    /// A pass that sent 400 MB/s for a guest that dirties `rate` MB/s.
    fn round(seconds: f64, rate: f64) -> Round {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pages")]
        let pages = |rate: f64| (rate * 1e6 * seconds / 4096.0) as u64;
        Round {
            time: Duration::from_secs_f64(seconds),
            bytes: pages(400.0) * 4096,
            normal: pages(400.0),
            zero: 0,
            dirty: pages(rate),
        }
    }

    #[test]
    fn guest_that_dirties_more_than_is_sent_is_told_of_after_its_third_pass() {
        let mut converge = judge(&MigrateOptions::new());
        let first = converge.judge(&round(1.0, 900.0), SECOND);
        assert_eq!((first.stall, first.remaining_time, first.step), (None, None, Step::Pass(None)));
        converge.judge(&round(2.25, 900.0), 3 * SECOND);
        let third = converge.judge(&round(5.0, 900.0), 9 * SECOND);
        assert_eq!(
            third.stall.expect("a stall").to_string(),
            "will not converge: dirty 900 MB/s, sending 400 MB/s; raise multifd-channels (now 4), switch auto-converge \
             on, or allow 2.3 s of downtime (downtime-limit)"
        );
        assert_eq!(third.step, Step::Pass(None), "a stall is reported and ends nothing");
    }

    #[test]
    fn what_is_advised_is_what_would_help() {
        let remedies = |options: MigrateOptions| {
            let mut converge = judge(&options);
            converge.judge(&round(1.0, 900.0), SECOND);
            converge.judge(&round(2.0, 900.0), SECOND);
            converge.judge(&round(2.0, 900.0), SECOND).stall.expect("a stall").remedies
        };
        let downtime = Remedy::DowntimeLimit(Duration::from_millis(2300));
        let held_back = remedies(MigrateOptions::new().max_bandwidth(Some(420_000_000)));
        assert_eq!(held_back, [Remedy::MaxBandwidth(420_000_000), Remedy::AutoConverge, downtime]);
        let weak = remedies(MigrateOptions::new().auto_converge(true).max_cpu_throttle(40));
        let throttle = Remedy::MaxCpuThrottle(Percent::new(40));
        assert_eq!(weak, [Remedy::Channels(4), throttle, downtime]);
    }

    #[test]
    fn guest_that_slows_down_is_no_longer_told_of() {
        let mut converge = judge(&MigrateOptions::new());
        for _ in 0..3 {
            converge.judge(&round(2.0, 900.0), SECOND);
        }
        let quiet = converge.judge(&round(2.0, 200.0), SECOND);
        assert_eq!((quiet.stall, quiet.step), (None, Step::Pass(None)));
        assert!(quiet.remaining_time.expect("an end") > SECOND);
    }

    #[test]
    fn bounds_end_it_unless_the_guest_can_be_stopped() {
        let options = MigrateOptions::new().max_passes(Some(2));
        let mut converge = judge(&options);
        assert_eq!(converge.judge(&round(1.0, 900.0), SECOND).step, Step::Pass(None));
        assert_eq!(converge.judge(&round(1.0, 900.0), SECOND).step, Step::GiveUp(Bound::Passes(2)));
        let mut converge = judge(&options.downtime_limit(10 * SECOND));
        assert_eq!(converge.judge(&round(1.0, 900.0), SECOND).step, Step::SwitchOver);
        let mut converge = judge(&MigrateOptions::new().max_total_time(Some(3 * SECOND)));
        assert_eq!(converge.judge(&round(1.0, 900.0), 3 * SECOND - SECOND / 1000).step, Step::Pass(None));
        assert_eq!(
            converge.judge(&round(1.0, 900.0), 3 * SECOND).step,
            Step::GiveUp(Bound::Time(3 * SECOND))
        );
    }

    #[test]
    fn guest_is_held_back_only_where_that_was_asked_for() {
        let step = |options: &MigrateOptions| {
            let mut converge = judge(options);
            converge.judge(&round(1.0, 900.0), SECOND);
            converge.judge(&round(2.0, 900.0), SECOND).step
        };
        let options = MigrateOptions::new();
        assert_eq!(step(&options), Step::Pass(None));
        assert_eq!(step(&options.auto_converge(true)), Step::Pass(Some(Percent::new(20))));
    }
}
