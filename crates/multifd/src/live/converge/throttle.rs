//! `auto-converge`: throttles a guest that writes too fast.
//!
//! The input is the number of bytes that the passes sent and that the guest dirtied in the same time. The output is the
//! share of time for which its processors must pause. Nothing here waits or reads a clock.

use std::time::Duration;

use crate::{error::Usage, outcome::Percent, parameters};

/// The parameters of `auto-converge`, with QEMU's defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CpuThrottle {
    pub(crate) initial: u8,
    pub(crate) increment: u8,
    pub(crate) max: u8,
    pub(crate) tailslow: bool,
    /// `throttle-trigger-threshold`: percentage of what was sent.
    pub(crate) trigger: u8,
}

impl Default for CpuThrottle {
    fn default() -> Self {
        Self {
            initial: parameters::CPU_THROTTLE_INITIAL.default_small(),
            increment: parameters::CPU_THROTTLE_INCREMENT.default_small(),
            max: parameters::MAX_CPU_THROTTLE.default_small(),
            tailslow: false,
            trigger: parameters::THROTTLE_TRIGGER_THRESHOLD.default_small(),
        }
    }
}

impl CpuThrottle {
    pub(crate) fn check(&self) -> Result<(), Usage> {
        parameters::CPU_THROTTLE_INITIAL.check(self.initial)?;
        parameters::CPU_THROTTLE_INCREMENT.check(self.increment)?;
        parameters::MAX_CPU_THROTTLE.check(self.max)?;
        // Not below `cpu-throttle-initial`, as in QEMU.
        parameters::Parameter { least: self.initial.into(), ..parameters::MAX_CPU_THROTTLE }
            .check(self.max)?;
        parameters::THROTTLE_TRIGGER_THRESHOLD.check(self.trigger)
    }
}

/// The current throttle of the guest, and the reasons to raise it.
#[derive(Clone, Debug)]
pub(super) struct Throttle {
    options: CpuThrottle,
    percent: Percent,
    /// The number of successive periods in which the guest dirtied too much.
    high: u8,
    period: Period,
}

/// Several whole passes, together long enough to judge by.
#[derive(Clone, Copy, Debug, Default)]
struct Period {
    time: Duration,
    dirtied: f64,
    sent: f64,
}

impl Throttle {
    pub(super) fn new(options: CpuThrottle) -> Self {
        Self { options, percent: Percent::NONE, high: 0, period: Period::default() }
    }

    pub(super) fn percent(&self) -> Percent {
        self.percent
    }

    /// Whether it cannot be more.
    pub(super) fn is_spent(&self) -> bool {
        self.percent.get() >= self.options.max
    }

    /// Records that passes have sent `sent` bytes in `time`, and that the guest dirtied `dirtied` bytes again. Returns
    /// the new throttle if it changes.
    ///
    /// A change needs two successive periods of at least one second each: the first may be a burst, and the guest must
    /// have run for a while with a throttle before the throttle can be judged.
    pub(super) fn passed(&mut self, dirtied: f64, sent: f64, time: Duration) -> Option<Percent> {
        self.period.dirtied += dirtied;
        self.period.sent += sent;
        self.period.time += time;
        if self.period.time < PERIOD {
            return None;
        }
        let Period { dirtied, sent, .. } = std::mem::take(&mut self.period);
        let allowed = sent * f64::from(self.options.trigger) / 100.0;
        if dirtied <= allowed {
            self.high = 0;
            return None;
        }
        if self.is_spent() {
            return None;
        }
        self.high += 1;
        if self.high < IN_A_ROW {
            return None;
        }
        self.high = 0;
        let now = self.percent.get();
        let more = if now == 0 { self.options.initial } else { self.increment(allowed / dirtied) };
        self.percent = Percent::new(now.saturating_add(more).min(self.options.max));
        Some(self.percent)
    }

    /// `cpu-throttle-tailslow`: an increment no greater than needed for the guest to dirty just `share` of the present
    /// amount.
    fn increment(&self, share: f64) -> u8 {
        let increment = self.options.increment;
        if !self.options.tailslow {
            return increment;
        }
        let runs = f64::from(100 - self.percent.get());
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 100")]
        let enough = (runs * (1.0 - share)).ceil() as u8;
        enough.clamp(1, increment)
    }
}

/// The shortest time to judge by: at 99 per cent, a guest that runs for 10 ms pauses for the rest of it.
const PERIOD: Duration = Duration::from_secs(1);
const IN_A_ROW: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// The throttles of a guest that dirties `share` of what is sent, for `seconds` seconds.
    fn throttles(options: CpuThrottle, share: f64, seconds: u32) -> Vec<u8> {
        let mut throttle = Throttle::new(options);
        (0..seconds)
            .filter_map(|_| throttle.passed(1000.0 * share, 1000.0, SECOND))
            .map(Percent::get)
            .collect()
    }

    #[test]
    fn guest_is_held_back_step_by_step_up_to_the_most() {
        let options = CpuThrottle::default();
        assert_eq!(throttles(options, 2.0, 7), [20, 30, 40]);
        assert_eq!(throttles(options, 2.0, 1000), [20, 30, 40, 50, 60, 70, 80, 90, 99]);
        let options = CpuThrottle { initial: 45, increment: 30, max: 80, ..options };
        assert_eq!(throttles(options, 2.0, 1000), [45, 75, 80]);
    }

    #[test]
    fn guest_that_dirties_no_more_than_the_threshold_is_left_alone() {
        let options = CpuThrottle::default();
        assert_eq!(throttles(options, 0.5, 1000), [0_u8; 0]);
        assert_eq!(throttles(options, 0.51, 2), [20]);
        let options = CpuThrottle { trigger: 100, ..options };
        assert_eq!((throttles(options, 1.0, 1000), throttles(options, 1.01, 2)), (vec![], vec![20]));
    }

    #[test]
    fn one_burst_is_not_enough_and_many_short_passes_are_one_period() {
        let mut throttle = Throttle::new(CpuThrottle::default());
        for _ in 0..100 {
            assert_eq!(throttle.passed(2.0, 1.0, SECOND), None);
            assert_eq!(throttle.passed(0.0, 1.0, SECOND), None);
        }
        let short = (0..200).filter_map(|_| throttle.passed(2.0, 1.0, SECOND / 100)).count();
        assert_eq!(short, 1);
    }

    #[test]
    fn tail_is_slow_where_it_is_asked_for() {
        let options = CpuThrottle { initial: 80, tailslow: true, ..CpuThrottle::default() };
        // A twentieth less is enough, and the guest runs for a fifth of the time: one per cent.
        assert_eq!(throttles(options, 0.526, 6), [80, 81, 82]);
        // If more than the increment is needed, the increment is used.
        assert_eq!(throttles(options, 5.0, 6), [80, 90, 99]);
    }

    #[test]
    fn processors_stand_their_share_of_time() {
        let pause = |percent| Percent::new(percent).pause_after(Duration::from_millis(10));
        assert_eq!(pause(0), Duration::ZERO);
        assert_eq!(pause(50), Duration::from_millis(10));
        assert_eq!(pause(99), Duration::from_millis(990));
        assert_eq!(pause(255), pause(99), "it is never stopped");
    }

    #[test]
    fn parameters_beyond_their_bounds_are_refused_by_name() {
        let good = CpuThrottle::default();
        assert_eq!(good.check(), Ok(()));
        for (options, name) in [
            (CpuThrottle { initial: 0, ..good }, "cpu-throttle-initial 1 to 99, found 0"),
            (CpuThrottle { increment: 100, ..good }, "cpu-throttle-increment 1 to 99, found 100"),
            (CpuThrottle { max: 100, ..good }, "max-cpu-throttle 1 to 99, found 100"),
            (CpuThrottle { max: 19, ..good }, "max-cpu-throttle 20 to 99, found 19"),
            (CpuThrottle { trigger: 101, ..good }, "throttle-trigger-threshold 1 to 100, found 101"),
        ] {
            assert_eq!(options.check().expect_err("refused").to_string(), format!("expected {name}"));
        }
    }
}
