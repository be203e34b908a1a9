//! The flags of `multifd receive --dir`.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::shared::number;
use crate::file_name::NameTemplate;

/// Options of a destination that takes one machine after another.
#[derive(Debug, ClapArgs)]
pub(crate) struct ManyArgs {
    /// Receive one machine after another, each into a new file in the folder DIR, until SIGTERM or Ctrl-C: the first one
    /// ends the wait for sources and lets running migrations complete, the second one cancels them
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Names of the files in DIR. {uuid}: the machine's UUID, or no-uuid; {name}: the UUID, or machine-N; {number}: N, which
    /// counts the machines of this process; {time}: the time of arrival in UTC, 20260131T235959Z. If the name is in use, -2,
    /// -3 and so on is added
    #[arg(long, value_name = "TEMPLATE", requires = "dir", default_value = "{name}-{time}.ram", value_parser = NameTemplate::parse)]
    pub(crate) name: NameTemplate,
    /// Number of machines to receive at the same time. Each job listens at an address of its own: the next ports, or {job} in
    /// the path of a unix socket is replaced by 1, 2 and so on. Default: 1; with the address systemd, one for each socket
    #[arg(long, value_name = "N", requires = "dir", value_parser = number::<u16>(1, 256))]
    pub(crate) jobs: Option<u16>,
}
