//! When a migration switches to post-copy.

use std::{fmt, str::FromStr, time::Duration};

use crate::error::Usage;

/// When a migration switches to post-copy: the guest moves to the destination, and runs there while the rest of its pages follow.
///
/// As text (and with feature `serde`): `never`, `request`, `start`, `stall`, `passes:N`, `after:SECONDS`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum PostcopyWhen {
    /// It does not, and the destination is not asked whether it could.
    #[default]
    Never,
    /// When [`Control::start_postcopy`](crate::live::Control::start_postcopy) is called. The other cases allow that as well.
    Request,
    /// Before the first pass: nothing but the devices is sent first.
    Start,
    /// When no end of the passes can be predicted ([`Stall`](crate::live::Stall)), and instead of giving up at a
    /// [bound](crate::live::MigrateOptions::max_passes).
    Stall,
    /// After this number of passes.
    Passes(u64),
    /// When the migration has run for this time, also within a pass.
    After(Duration),
}

impl PostcopyWhen {
    /// Whether the migration may switch.
    pub fn is_allowed(self) -> bool {
        self != Self::Never
    }
}

impl fmt::Display for PostcopyWhen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::Request => f.write_str("request"),
            Self::Start => f.write_str("start"),
            Self::Stall => f.write_str("stall"),
            Self::Passes(passes) => write!(f, "passes:{passes}"),
            Self::After(time) => write!(f, "after:{}", time.as_secs_f64()),
        }
    }
}

impl FromStr for PostcopyWhen {
    type Err = Usage;

    fn from_str(text: &str) -> Result<Self, Usage> {
        let refused = || Usage::PostcopyWhen { found: text.to_owned() };
        Ok(match text {
            "never" => Self::Never,
            "request" => Self::Request,
            "start" => Self::Start,
            "stall" => Self::Stall,
            _ => match text.split_once(':') {
                Some(("passes", passes)) => Self::Passes(passes.parse().map_err(|_| refused())?),
                Some(("after", seconds)) => {
                    let seconds: f64 = seconds.parse().map_err(|_| refused())?;
                    Self::After(Duration::try_from_secs_f64(seconds).map_err(|_| refused())?)
                }
                _ => return Err(refused()),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_case_is_read_as_it_is_written() {
        for when in [
            PostcopyWhen::Never,
            PostcopyWhen::Request,
            PostcopyWhen::Start,
            PostcopyWhen::Stall,
            PostcopyWhen::Passes(3),
            PostcopyWhen::After(Duration::from_millis(1500)),
        ] {
            assert_eq!(when.to_string().parse(), Ok(when));
        }
        for text in ["", "later", "passes:", "passes:-1", "after:x", "after:-1", "after:inf", "start:1"] {
            let refused = text.parse::<PostcopyWhen>().expect_err("refused").to_string();
            assert!(
                refused.starts_with("expected never, request, start, stall, passes:N or after:SECONDS"),
                "{refused}"
            );
        }
    }
}
