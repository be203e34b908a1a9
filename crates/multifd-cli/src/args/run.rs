//! Flags of every verb that migrates a guest: the limit of the whole run, and who can see it.

use std::{path::PathBuf, time::Duration};

use clap::Args as ClapArgs;

use super::shared::{limit, seconds};

#[derive(Clone, Debug, ClapArgs)]
pub(crate) struct RunArgs {
    /// Time limit for the whole run, in seconds or with a unit (500ms, 2m, 1.5h); 0 = no limit. A run that takes longer is
    /// cancelled
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = seconds)]
    timeout: Duration,
    /// File for the metrics of this run, in the text format of OpenMetrics; written every 5 s and at the end. For
    /// node_exporter, a name in the directory of its textfile collector that ends in .prom
    #[arg(long, value_name = "FILE")]
    pub(crate) metrics: Option<PathBuf>,
    /// Unix socket for commands to this run, in the form of QMP: query-migrate, migrate_cancel, migrate-set-parameters.
    /// `multifd ctl` sends them. Only this user can connect
    #[arg(long, value_name = "SOCKET")]
    pub(crate) control: Option<PathBuf>,
}

impl RunArgs {
    /// `None` is no limit.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        limit(self.timeout)
    }
}
