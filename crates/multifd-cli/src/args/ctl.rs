//! The command line of `multifd ctl`.

use std::{path::PathBuf, str::FromStr, time::Duration};

use clap::{Args as ClapArgs, Subcommand};
use multifd::parameters::DOWNTIME_LIMIT;

use super::shared::{milliseconds, rate};

#[derive(Debug, ClapArgs)]
pub(crate) struct CtlArgs {
    /// Socket of the run: the one of its --control
    pub(crate) socket: PathBuf,
    #[command(subcommand)]
    pub(crate) command: CtlCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CtlCommand {
    /// Show the status of the run
    Status {
        /// Print one JSON object with the fields of QEMU's query-migrate
        #[arg(long)]
        json: bool,
    },
    /// Cancel the run, as an interrupt does; the guest stays where it is
    Cancel,
    /// Change limits of the run
    ///
    /// `capture` takes max-bandwidth and downtime-limit and sets them at QEMU. `send` and `restore` take max-bandwidth; with
    /// --postcopy-ram, max-postcopy-bandwidth. A destination has no limits: set them at the source.
    Set {
        /// max-bandwidth=RATE or max-postcopy-bandwidth=RATE in bytes per second, for example 100M (M = 1024 K), 0 = no
        /// limit; downtime-limit=TIME in milliseconds or with a unit (2s)
        #[arg(required = true, value_name = "LIMIT=VALUE")]
        limits: Vec<LimitArg>,
    },
}

/// A limit and its new value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LimitArg {
    MaxBandwidth(u64),
    MaxPostcopyBandwidth(u64),
    DowntimeLimit(Duration),
}

impl FromStr for LimitArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("max-bandwidth", value)) => rate(value).map(Self::MaxBandwidth),
            Some(("max-postcopy-bandwidth", value)) => rate(value).map(Self::MaxPostcopyBandwidth),
            Some(("downtime-limit", value)) => milliseconds(DOWNTIME_LIMIT)(value).map(Self::DowntimeLimit),
            _ => Err(format!(
                "expected max-bandwidth=RATE, max-postcopy-bandwidth=RATE or downtime-limit=TIME, found {text:?}"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_has_a_name_and_a_value_in_its_range() {
        let parse = |text: &str| text.parse::<LimitArg>();
        assert_eq!(parse("max-bandwidth=100M"), Ok(LimitArg::MaxBandwidth(100 << 20)));
        assert_eq!(parse("max-postcopy-bandwidth=0"), Ok(LimitArg::MaxPostcopyBandwidth(0)));
        assert_eq!(parse("downtime-limit=2s"), Ok(LimitArg::DowntimeLimit(Duration::from_secs(2))));
        for wrong in ["max-bandwidth", "downtime-limit=1h", "max-bandwidth=fast", "multifd-channels=2", ""] {
            parse(wrong).expect_err(wrong);
        }
    }
}
