//! Flags of every verb that migrates a guest: limits of the whole run.

use std::time::Duration;

use clap::Args as ClapArgs;

use super::shared::{limit, seconds};

#[derive(Clone, Debug, ClapArgs)]
pub(crate) struct RunArgs {
    /// Time limit for the whole run, in seconds or with a unit (500ms, 2m, 1.5h); 0 = no limit. A run that takes longer is
    /// cancelled
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = seconds)]
    timeout: Duration,
}

impl RunArgs {
    /// `None` is no limit.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        limit(self.timeout)
    }
}
