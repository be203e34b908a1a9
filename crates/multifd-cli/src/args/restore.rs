//! The command line of `multifd restore`.

use std::time::Duration;

use clap::Args as ClapArgs;
use multifd::{channel::Address, parameters::STALL_TIMEOUT};

use super::{
    postcopy::PostcopyArgs,
    run::RunArgs,
    shared::{
        OutputArgs, default_seconds, destination_address, file_address, limit, number, qmp_address, rate,
        seconds,
    },
};
use crate::{file_address::FileAddress, qmp::QmpAddress};

#[derive(Debug, ClapArgs)]
pub(crate) struct RestoreArgs {
    /// Number of channels, 0 to 255; 0 = main alone
    #[arg(long, alias = "channels", value_name = "N", default_value_t = 4, value_parser = number::<u8>(0, 255))]
    pub(crate) multifd_channels: u8,
    /// Limit in bytes per second, for example 100M (M = 1024 K); 0 = no limit
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = rate)]
    pub(crate) max_bandwidth: u64,
    /// Address at which QEMU listens for this program; default: a private unix socket, or the address of a TCP connection
    /// to QMP
    #[arg(long, value_name = "ADDRESS", value_parser = destination_address)]
    pub(crate) listen: Option<Address>,
    /// Time limit for a QEMU that accepts no data, in seconds or with a unit (500ms, 2m); 0 = no limit
    #[arg(long, value_name = "TIME", default_value = default_seconds(STALL_TIMEOUT), value_parser = seconds)]
    stall_timeout: Duration,
    /// Leave the guest stopped
    #[arg(long, conflicts_with = "postcopy")]
    pub(crate) paused: bool,
    /// Send FILE although QEMU's machine differs from it
    #[arg(long)]
    pub(crate) force: bool,
    /// Read pages for channels with direct I/O, past the page cache, if the file system supports it
    #[arg(long)]
    pub(crate) direct_io: bool,
    /// Read FILE although it is damaged: do not compare it with its digests
    #[arg(long)]
    pub(crate) no_verify: bool,
    #[command(flatten)]
    pub(crate) postcopy: PostcopyArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// File to restore: a path, file:PATH,offset=N, or file:PATH,snapshot=NAME (in a disk image)
    #[arg(value_parser = file_address())]
    pub(crate) file: FileAddress,
    /// QMP socket of a QEMU that was started with -incoming defer: unix:PATH, a path, or tcp:HOST:PORT
    #[arg(value_parser = qmp_address)]
    pub(crate) qmp: QmpAddress,
}

impl RestoreArgs {
    /// `None` is no limit.
    pub(crate) fn stall_timeout(&self) -> Option<Duration> {
        limit(self.stall_timeout)
    }
}
