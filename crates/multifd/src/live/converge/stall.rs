//! Why a migration gets nowhere, and what would help: the texts for people, the fields for programs.

use std::{fmt, time::Duration};

use super::Percent;

/// A migration that will not converge as things are: the guest dirties pages as fast as they are sent, or faster.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stall {
    /// Bytes of RAM that the guest dirties a second; a page written twice between two bitmap syncs counts once.
    pub dirty_rate: u64,
    /// Bytes of RAM that are sent a second.
    pub sending_rate: u64,
    /// How far the guest is held back already.
    pub throttled: Percent,
    /// What would help, each by itself: the first is the least trouble to the guest.
    pub remedies: Vec<Remedy>,
}

/// Something that would let a migration converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remedy {
    /// A higher `max-bandwidth`; this one, in bytes a second, is used up.
    MaxBandwidth(u64),
    /// More `multifd-channels`; there are so many now.
    Channels(u8),
    /// `auto-converge`, which is off.
    AutoConverge,
    /// A higher `max-cpu-throttle`.
    MaxCpuThrottle(Percent),
    /// A higher `downtime-limit`: with this one, the guest would have been stopped after one of the passes so far.
    DowntimeLimit(Duration),
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MaxBandwidth(now) => write!(f, "raise max-bandwidth (now {})", Rate(*now)),
            Self::Channels(now) => write!(f, "raise multifd-channels (now {now})"),
            Self::AutoConverge => f.write_str("switch auto-converge on"),
            Self::MaxCpuThrottle(now) => write!(f, "raise max-cpu-throttle (now {now})"),
            Self::DowntimeLimit(limit) => {
                write!(f, "allow {:.1} s of downtime (downtime-limit)", limit.as_secs_f64())
            }
        }
    }
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (dirty, sending) = (Rate(self.dirty_rate), Rate(self.sending_rate));
        write!(f, "will not converge: dirty {dirty}, sending {sending}")?;
        if self.throttled > Percent::NONE {
            write!(f, ", guest throttled by {}", self.throttled)?;
        }
        for (at, remedy) in self.remedies.iter().enumerate() {
            let between = match at {
                0 => "; ",
                _ if at + 1 < self.remedies.len() => ", ",
                1 => " or ",
                _ => ", or ",
            };
            write!(f, "{between}{remedy}")?;
        }
        Ok(())
    }
}

/// The most that a migration was allowed to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// `max-passes`.
    Passes(u64),
    /// `max-total-time`.
    Time(Duration),
}

/// A migration that came to its [`Bound`] with the guest still running.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub struct NotConverged {
    /// What was reached.
    pub bound: Bound,
    /// Why it would have taken longer still.
    pub stall: Option<Stall>,
    /// How much longer it would have taken, where that is known.
    pub expected_remaining_time: Option<Duration>,
}

impl fmt::Display for NotConverged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parameter = match self.bound {
            Bound::Passes(passes) => {
                write!(f, "not done after {passes} passes")?;
                "max-passes"
            }
            Bound::Time(time) => {
                write!(f, "not done after {:.1} s", time.as_secs_f64())?;
                "max-total-time"
            }
        };
        write!(f, " ({parameter}), so the guest runs on at the source: ")?;
        match (&self.stall, self.expected_remaining_time) {
            (Some(stall), _) => stall.fmt(f),
            (None, Some(time)) => {
                write!(f, "about {:.1} s more were expected; raise {parameter}", time.as_secs_f64())
            }
            (None, None) => write!(f, "raise {parameter}"),
        }
    }
}

/// Bytes a second, for people.
struct Rate(u64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (value, unit) = match self.0 {
            0..1_000_000 => (self.0 as f64 / 1e3, "kB/s"),
            1_000_000..1_000_000_000 => (self.0 as f64 / 1e6, "MB/s"),
            _ => (self.0 as f64 / 1e9, "GB/s"),
        };
        write!(f, "{value:.*} {unit}", usize::from(value < 10.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stall(remedies: &[Remedy]) -> Stall {
        Stall {
            dirty_rate: 900_000_000,
            sending_rate: 400_000_000,
            throttled: Percent::NONE,
            remedies: remedies.to_vec(),
        }
    }

    #[test]
    fn stall_says_what_is_wrong_and_what_would_help() {
        let allow = Remedy::DowntimeLimit(Duration::from_millis(2100));
        let told = stall(&[Remedy::Channels(4), Remedy::AutoConverge, allow]).to_string();
        let expected = "will not converge: dirty 900 MB/s, sending 400 MB/s; raise multifd-channels (now 4), switch \
                        auto-converge on, or allow 2.1 s of downtime (downtime-limit)";
        assert_eq!(told, expected);
        let throttled = Stall { throttled: Percent::new(30), dirty_rate: 1_240_000_000, ..stall(&[]) };
        let expected = "will not converge: dirty 1.2 GB/s, sending 400 MB/s, guest throttled by 30 %";
        assert_eq!(throttled.to_string(), expected);
        let two = stall(&[Remedy::MaxBandwidth(52_428_800), Remedy::MaxCpuThrottle(Percent::new(30))]);
        assert!(
            two.to_string()
                .ends_with("; raise max-bandwidth (now 52 MB/s) or raise max-cpu-throttle (now 30 %)"),
            "{two}"
        );
    }

    #[test]
    fn bound_that_was_reached_says_what_to_do() {
        let passes =
            NotConverged { bound: Bound::Passes(30), stall: Some(stall(&[])), expected_remaining_time: None };
        assert_eq!(
            passes.to_string(),
            "not done after 30 passes (max-passes), so the guest runs on at the source: will not converge: dirty 900 \
             MB/s, sending 400 MB/s"
        );
        let time = NotConverged {
            bound: Bound::Time(Duration::from_secs(60)),
            stall: None,
            expected_remaining_time: Some(Duration::from_millis(12_340)),
        };
        assert_eq!(
            time.to_string(),
            "not done after 60.0 s (max-total-time), so the guest runs on at the source: about 12.3 s more were \
             expected; raise max-total-time"
        );
        let unknown = NotConverged { expected_remaining_time: None, ..time };
        assert!(unknown.to_string().ends_with("source: raise max-total-time"), "{unknown}");
    }
}
