//! Names, ranges and defaults of the numeric parameters, as in QEMU.
//!
//! The options of both sides take their defaults from here and are checked against it. A command line can use it, too.

use crate::error::Usage;

/// A numeric parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Range {
    /// QEMU's name, if QEMU has the parameter.
    pub name: &'static str,
    /// The least value.
    pub least: u64,
    /// The greatest value.
    pub most: u64,
}

impl Range {
    /// Refuses a value outside the range.
    ///
    /// # Errors
    /// [`Usage::OutOfRange`], with the name.
    pub fn check(&self, met: impl Into<i128>) -> Result<(), Usage> {
        let (name, least, most, met) = (self.name, self.least, self.most, met.into());
        if (i128::from(least)..=i128::from(most)).contains(&met) {
            Ok(())
        } else {
            Err(Usage::OutOfRange { name, least, most, met })
        }
    }
}

/// Number of channels of a source.
pub const MULTIFD_CHANNELS: Range = Range { name: "multifd-channels", least: 1, most: 255 };
/// Level of zlib.
pub const MULTIFD_ZLIB_LEVEL: Range = Range { name: "multifd-zlib-level", least: 0, most: 9 };
/// Level of zstd.
pub const MULTIFD_ZSTD_LEVEL: Range = Range { name: "multifd-zstd-level", least: 0, most: 20 };
/// Milliseconds for which the guest may be stopped.
pub const DOWNTIME_LIMIT: Range = Range { name: "downtime-limit", least: 0, most: 2_000_000 };
/// Percentage of time for which a throttled guest pauses at first.
pub const CPU_THROTTLE_INITIAL: Range = Range { name: "cpu-throttle-initial", least: 1, most: 99 };
/// Percentage of time that each further step adds.
pub const CPU_THROTTLE_INCREMENT: Range = Range { name: "cpu-throttle-increment", least: 1, most: 99 };
/// Greatest percentage of time; not below `cpu-throttle-initial` either.
pub const MAX_CPU_THROTTLE: Range = Range { name: "max-cpu-throttle", least: 1, most: 99 };
/// Percentage of what was sent that a guest may dirty in the same time.
pub const THROTTLE_TRIGGER_THRESHOLD: Range =
    Range { name: "throttle-trigger-threshold", least: 1, most: 100 };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_beyond_either_bound_is_refused_by_name() {
        for range in [
            MULTIFD_CHANNELS,
            MULTIFD_ZLIB_LEVEL,
            MULTIFD_ZSTD_LEVEL,
            DOWNTIME_LIMIT,
            CPU_THROTTLE_INITIAL,
            CPU_THROTTLE_INCREMENT,
            MAX_CPU_THROTTLE,
            THROTTLE_TRIGGER_THRESHOLD,
        ] {
            let (least, most) = (i128::from(range.least), i128::from(range.most));
            assert_eq!((range.check(least), range.check(most)), (Ok(()), Ok(())));
            for met in [least - 1, most + 1] {
                let told = format!("expected {} {least} to {most}, met {met}", range.name);
                assert_eq!(range.check(met).expect_err("refused").to_string(), told);
            }
        }
    }
}
