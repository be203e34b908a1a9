//! Names, ranges and defaults of the parameters that are numbers, as QEMU has them where it has the parameter.
//!
//! This is the one place that has them. The options of both sides take their defaults from here and are checked against
//! it; so is the command line. A compression method has its own level ([`Method::level`](crate::Method::level)).

use std::time::Duration;

use crate::error::Usage;

/// A parameter that is a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Parameter {
    /// QEMU's name where it has the parameter.
    pub name: &'static str,
    /// The least value.
    pub least: u64,
    /// The greatest value.
    pub most: u64,
    /// What it is if nothing is chosen.
    pub default: u64,
}

impl Parameter {
    /// A number from `least` to `most`.
    pub const fn new(name: &'static str, least: u64, most: u64, default: u64) -> Self {
        Self { name, least, most, default }
    }

    /// A time in milliseconds.
    const fn time(name: &'static str, default: u64) -> Self {
        Self::new(name, 0, u64::MAX, default)
    }

    /// Refuses a value outside of the range.
    ///
    /// # Errors
    /// [`Usage::OutOfRange`], with the name.
    pub fn check(&self, found: impl Into<i128>) -> Result<(), Usage> {
        let (name, least, most, found) = (self.name, self.least, self.most, found.into());
        if (i128::from(least)..=i128::from(most)).contains(&found) {
            Ok(())
        } else {
            Err(Usage::OutOfRange { name, least, most, found })
        }
    }

    /// The default of a parameter that is a time in milliseconds.
    pub const fn default_time(&self) -> Duration {
        Duration::from_millis(self.default)
    }

    /// The default of a parameter that is at most 255.
    pub(crate) const fn default_small(&self) -> u8 {
        assert!(self.default <= u8::MAX as u64, "a small number");
        self.default.to_be_bytes()[7]
    }
}

/// Number of channels of a source.
pub const MULTIFD_CHANNELS: Parameter = Parameter::new("multifd-channels", 1, 255, 2);
/// How long the guest may be stopped, in milliseconds.
pub const DOWNTIME_LIMIT: Parameter = Parameter::new("downtime-limit", 0, 2_000_000, 300);
/// The share of time that a throttled guest is paused at first, in percent.
pub const CPU_THROTTLE_INITIAL: Parameter = Parameter::new("cpu-throttle-initial", 1, 99, 20);
/// By how much that share grows with each step, in percent of the time.
pub const CPU_THROTTLE_INCREMENT: Parameter = Parameter::new("cpu-throttle-increment", 1, 99, 10);
/// The greatest share of time that a throttled guest is paused, in percent; not below `cpu-throttle-initial` either.
pub const MAX_CPU_THROTTLE: Parameter = Parameter::new("max-cpu-throttle", 1, 99, 99);
/// How much a guest may dirty while a pass is sent, in percent of what the pass sends.
pub const THROTTLE_TRIGGER_THRESHOLD: Parameter = Parameter::new("throttle-trigger-threshold", 1, 100, 50);
/// How long it may take to connect, TLS handshake included, in milliseconds.
pub const CONNECT_TIMEOUT: Parameter = Parameter::time("connect-timeout", 30_000);
/// How long the other side may do nothing, on any connection, while something is expected of it, in milliseconds; 0 is no limit.
///
/// The default is longer than a switch or router takes to reconfigure its links, and than
/// [`TcpOptions`](crate::channel::TcpOptions) gives a host that does not answer, so that the more exact error comes first.
pub const STALL_TIMEOUT: Parameter = Parameter::time("stall-timeout", 120_000);
/// The memory that the decompression of all channels of a destination may take for zstd windows, in bytes; 0 is no limit.
///
/// A window is at most 2 MiB up to level 8, 4 MiB up to level 16, 8 MiB up to level 19 and 32 MiB at level 20: the default is
/// enough for 255, 128, 64 and 16 channels.
pub const DECOMPRESSION_MEMORY: Parameter = Parameter::new("decompression-memory", 0, u64::MAX, 512 << 20);
/// How long a new connection may take to say what it is, in milliseconds.
pub const GREETING_TIMEOUT: Parameter = Parameter::time("greeting-timeout", 10_000);
/// How long one of the first two sync points waits for channels that are on their way, in milliseconds.
pub const CHANNELS_TIMEOUT: Parameter = Parameter::time("channels-timeout", 10_000);
/// How long a source may take to close its channels after everything has arrived, in milliseconds.
pub const DRAIN_TIMEOUT: Parameter = Parameter::time("drain-timeout", 5_000);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_beyond_either_bound_is_refused_by_name() {
        for range in [
            MULTIFD_CHANNELS,
            DOWNTIME_LIMIT,
            CPU_THROTTLE_INITIAL,
            CPU_THROTTLE_INCREMENT,
            MAX_CPU_THROTTLE,
            THROTTLE_TRIGGER_THRESHOLD,
        ] {
            let (least, most) = (i128::from(range.least), i128::from(range.most));
            assert_eq!((range.check(least), range.check(most)), (Ok(()), Ok(())));
            for found in [least - 1, most + 1] {
                let told = format!("expected {} {least} to {most}, found {found}", range.name);
                assert_eq!(range.check(found).expect_err("refused").to_string(), told);
            }
        }
    }
}
