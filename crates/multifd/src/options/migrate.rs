//! The options of the passes: `max-bandwidth`, `downtime-limit`, `auto-converge`, bounds and similar ones.

use std::{fmt, str::FromStr, time::Duration};

use super::{PostcopyWhen, parameters};
use crate::{error::Usage, live::converge::CpuThrottle};

/// Where zero pages are detected and how they are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ZeroPageDetection {
    /// Zero pages are not detected. They are sent like any other page, including pages that are
    /// [known](crate::ram::RamBlock::is_present) to be zero. So all memory is read, which makes the system allocate
    /// [untouched](crate::ram::RamBlock::touched) pages of a memfd or of huge pages, and memory without access rights
    /// (`PROT_NONE`) is refused.
    None,
    /// The migration's thread detects them, and they go over main, which every destination understands.
    #[default]
    Legacy,
    /// The channels detect them and list them in their packets. For destinations from QEMU 9.0 on, and this library. It
    /// behaves as `Legacy` without channels; with a [limit](MigrateOptions::max_bandwidth), only the detection does.
    Multifd,
}

impl ZeroPageDetection {
    /// QEMU's name for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Legacy => "legacy",
            Self::Multifd => "multifd",
        }
    }
}

impl fmt::Display for ZeroPageDetection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ZeroPageDetection {
    type Err = Usage;

    fn from_str(text: &str) -> Result<Self, Usage> {
        let known = [Self::None, Self::Legacy, Self::Multifd].into_iter().find(|mode| mode.as_str() == text);
        known.ok_or_else(|| Usage::ZeroPageDetection { found: text.to_owned() })
    }
}

/// When and how fast a migration moves.
///
/// With feature `serde`: an object with the parameters' names, times in milliseconds, 0 for no limit. Missing
/// parameters have their defaults; unknown parameters and values outside their range are refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(
        try_from = "crate::options::settings::MigrateSettings",
        into = "crate::options::settings::MigrateSettings"
    )
)]
#[must_use]
pub struct MigrateOptions {
    pub(crate) downtime_limit: Duration,
    pub(crate) max_bandwidth: Option<u64>,
    pub(crate) avail_switchover_bandwidth: Option<u64>,
    pub(crate) zero_page_detection: ZeroPageDetection,
    pub(crate) look_for_zero_pages: bool,
    pub(crate) auto_converge: bool,
    pub(crate) cpu_throttle: CpuThrottle,
    pub(crate) pause_before_switchover: bool,
    pub(crate) max_passes: Option<u64>,
    pub(crate) max_total_time: Option<Duration>,
    /// `None`: derived from `downtime_limit`.
    pub(crate) switchover_timeout: Option<Option<Duration>>,
    pub(crate) resume_if_unknown: bool,
    pub(crate) postcopy: PostcopyWhen,
}

impl Default for MigrateOptions {
    fn default() -> Self {
        Self {
            downtime_limit: parameters::DOWNTIME_LIMIT.default_time(),
            max_bandwidth: None,
            avail_switchover_bandwidth: None,
            zero_page_detection: ZeroPageDetection::Legacy,
            look_for_zero_pages: true,
            auto_converge: false,
            cpu_throttle: CpuThrottle::default(),
            pause_before_switchover: false,
            max_passes: None,
            max_total_time: None,
            switchover_timeout: None,
            resume_if_unknown: false,
            postcopy: PostcopyWhen::Never,
        }
    }
}

impl MigrateOptions {
    /// The default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// `downtime-limit`: the guest is stopped when the remaining pages can be sent in this time, 0 to 2000 s. Default
    /// 300 ms. A shorter limit takes more passes, and may never be reached if the guest writes faster than the channels
    /// send.
    pub fn downtime_limit(mut self, limit: Duration) -> Self {
        self.downtime_limit = limit;
        self
    }

    /// `max-bandwidth`: bytes per second over all connections while the guest runs. `None`, the default, and 0 are no
    /// limit.
    pub fn max_bandwidth(mut self, bytes: Option<u64>) -> Self {
        self.max_bandwidth = bytes.filter(|bytes| *bytes > 0);
        self
    }

    /// `avail-switchover-bandwidth`: bytes per second to assume for the remaining pages after the guest has been
    /// stopped. `None`, the default, and 0 use the bandwidth measured in the pass before. Set it if `max-bandwidth`
    /// limits that pass but not the last one: the guest is then stopped earlier.
    pub fn avail_switchover_bandwidth(mut self, bytes: Option<u64>) -> Self {
        self.avail_switchover_bandwidth = bytes.filter(|bytes| *bytes > 0);
        self
    }

    /// `zero-page-detection`. Default legacy.
    pub fn zero_page_detection(mut self, detection: ZeroPageDetection) -> Self {
        self.zero_page_detection = detection;
        self
    }

    /// Whether pages that may be nonzero are checked for zeros, unless `zero-page-detection` is none. Default true. If
    /// false, only pages that are known to be zero without reading them count as zero: pages that a mapped-ram file [does
    /// not have](crate::ram::RamBlock::is_present), and memory that was [never touched](crate::ram::RamBlock::touched).
    /// This saves the time of the check if few of the guest's pages are zero.
    pub fn look_for_zero_pages(mut self, look: bool) -> Self {
        self.look_for_zero_pages = look;
        self
    }

    /// `auto-converge`: a guest that dirties too much of what is sent is throttled with [`Guest::throttle`], step by
    /// step until it can be stopped. Default false. It slows the guest down, but only when necessary. If the guest does
    /// not implement `throttle`, the migration fails at its beginning.
    ///
    /// [`Guest::throttle`]: crate::live::Guest::throttle
    pub fn auto_converge(mut self, on: bool) -> Self {
        self.auto_converge = on;
        self
    }

    /// `cpu-throttle-initial`: percentage of time for which the guest's processors pause at first, 1 to 99. Default 20.
    pub fn cpu_throttle_initial(mut self, percent: u8) -> Self {
        self.cpu_throttle.initial = percent;
        self
    }

    /// `cpu-throttle-increment`: percentage of time that is added whenever the throttle is not enough, 1 to 99. Default
    /// 10.
    pub fn cpu_throttle_increment(mut self, percent: u8) -> Self {
        self.cpu_throttle.increment = percent;
        self
    }

    /// `max-cpu-throttle`: greatest percentage of time, `cpu-throttle-initial` to 99. Default 99.
    pub fn max_cpu_throttle(mut self, percent: u8) -> Self {
        self.cpu_throttle.max = percent;
        self
    }

    /// `cpu-throttle-tailslow`: steps are no greater than needed to bring the guest to the threshold, estimated from
    /// what it dirties now. Default false. It slows the guest less, and may take longer.
    pub fn cpu_throttle_tailslow(mut self, on: bool) -> Self {
        self.cpu_throttle.tailslow = on;
        self
    }

    /// `throttle-trigger-threshold`: the guest is throttled (further) when it has dirtied more than this percentage of
    /// what was sent in the same time, in two successive periods of at least one second each. 1 to 100, default 50.
    pub fn throttle_trigger_threshold(mut self, percent: u8) -> Self {
        self.cpu_throttle.trigger = percent;
        self
    }

    /// `pause-before-switchover`: with the guest stopped, the migration waits for [`Control::proceed`], without limit.
    /// Default false. What the embedder drains in the pause, such as disk requests, reaches the destination: devices
    /// are saved and the last pages are taken after the pause.
    ///
    /// [`Control::proceed`]: crate::live::Control::proceed
    pub fn pause_before_switchover(mut self, on: bool) -> Self {
        self.pause_before_switchover = on;
        self
    }

    /// The greatest number of passes with the guest running; `None`, the default, and 0 are no bound. If the guest
    /// cannot be stopped after the last one, the migration fails with [`NotConverged`](crate::live::NotConverged) and the
    /// guest continues.
    pub fn max_passes(mut self, passes: Option<u64>) -> Self {
        self.max_passes = passes.filter(|passes| *passes > 0);
        self
    }

    /// The longest time until the guest is stopped; `None`, the default, and 0 are no bound. The migration then ends as
    /// with [`max_passes`](Self::max_passes), even in the middle of a pass. The bound has no effect after the guest has
    /// been stopped.
    pub fn max_total_time(mut self, time: Option<Duration>) -> Self {
        self.max_total_time = time.filter(|time| !time.is_zero());
        self
    }

    /// The longest time from stopping the guest until the destination is known to have all of RAM and the devices have
    /// been sent; a [pause](Self::pause_before_switchover) does not count. After that time the migration fails and the
    /// guest continues on the source. Default: 5 s plus ten times `downtime-limit`; with its default this is 8 s.
    /// `None` is no bound: a destination that becomes silent then keeps the guest stopped for at least
    /// [`stall_timeout`](crate::SendOptions::stall_timeout).
    pub fn switchover_timeout(mut self, limit: Option<Duration>) -> Self {
        self.switchover_timeout = Some(limit);
        self
    }

    /// Whether the guest continues on the source if nobody can know whether the destination has it
    /// ([`Error::OwnerUnknown`](crate::Error::OwnerUnknown)). Default false: it stays stopped until the embedder
    /// decides.
    ///
    /// **Warning:** with true the guest may run on both sides at once, and both write to its disks.
    pub fn resume_if_unknown(mut self, on: bool) -> Self {
        self.resume_if_unknown = on;
        self
    }

    /// When the migration switches to post-copy. Default [`PostcopyWhen::Never`]. Any other value needs a main stream and a caller
    /// that can do it: see [`Migration::run_postcopy`](crate::live::Migration::run_postcopy).
    pub fn postcopy(mut self, when: PostcopyWhen) -> Self {
        self.postcopy = when;
        self
    }

    /// Whether the migration may switch to post-copy.
    pub fn may_switch(&self) -> bool {
        self.postcopy.is_allowed()
    }

    /// The time limit of the switchover, given the `downtime-limit` that was set while the migration runs, if any.
    pub(crate) fn switchover_limit(&self, downtime_limit: Option<Duration>) -> Option<Duration> {
        let fitting = downtime_limit.unwrap_or(self.downtime_limit).saturating_mul(10);
        self.switchover_timeout.unwrap_or_else(|| Some(fitting.saturating_add(Duration::from_secs(5))))
    }

    /// The time to send `remaining` bytes with the guest stopped, after a pass at `measured` bytes per second.
    pub(crate) fn expected_downtime(&self, remaining: f64, measured: f64) -> Duration {
        let bandwidth = self.avail_switchover_bandwidth.map_or(measured, |bytes| bytes as f64);
        Duration::try_from_secs_f64(remaining / bandwidth.max(1.0)).unwrap_or(Duration::MAX)
    }

    /// Checks for what [`Migration::run`](crate::live::Migration::run) would refuse.
    ///
    /// # Errors
    /// [`Usage::OutOfRange`], with the name of the first option that is out of its range.
    pub fn check(&self) -> Result<(), Usage> {
        let limit = self.downtime_limit;
        // Rounded up, so that a value less than a millisecond above the bound is refused.
        let millis = limit.as_nanos().div_ceil(1_000_000);
        parameters::DOWNTIME_LIMIT.check(i128::try_from(millis).unwrap_or(i128::MAX))?;
        self.cpu_throttle.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downtime_limit_beyond_the_bound_is_refused_by_name() {
        let limit = |limit| MigrateOptions::new().downtime_limit(limit).check();
        assert_eq!(limit(Duration::from_secs(2000)), Ok(()));
        for above in [Duration::from_secs(2000) + Duration::from_nanos(1), Duration::MAX] {
            let refused = limit(above).expect_err("refused").to_string();
            assert!(refused.starts_with("expected downtime-limit 0 to 2000000, found "), "{refused}");
        }
    }

    #[test]
    fn bandwidth_of_the_switchover_replaces_what_was_measured() {
        let options = MigrateOptions::new();
        assert_eq!(options.expected_downtime(1000.0, 100.0), Duration::from_secs(10));
        let told = options.clone().avail_switchover_bandwidth(Some(500));
        assert_eq!(told.expected_downtime(1000.0, 100.0), Duration::from_secs(2));
        let none = told.avail_switchover_bandwidth(Some(0));
        assert_eq!(none, options);
    }

    #[test]
    fn mode_that_is_none_is_refused_with_those_that_are() {
        let refused = "off".parse::<ZeroPageDetection>().expect_err("refused").to_string();
        assert_eq!(refused, r#"expected zero-page-detection none, legacy or multifd, found "off""#);
        assert_eq!("multifd".parse(), Ok(ZeroPageDetection::Multifd));
    }
}
