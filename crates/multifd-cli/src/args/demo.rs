//! The command line of `multifd demo`, and of the second process that it starts.

use clap::Args as ClapArgs;
use multifd::{channel::Address, parameters::DOWNTIME_LIMIT};

use super::shared::{CompressionArgs, ZeroPagesArg, size};
use crate::demo::ConvergeArgs;

#[derive(Debug, ClapArgs)]
pub(crate) struct DemoArgs {
    /// The guest's memory, like 512M or 4G
    #[arg(long, default_value = "1G", value_parser = size)]
    pub(crate) size: u64,
    /// Number of channels
    #[arg(long, alias = "channels", value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..))]
    pub(crate) multifd_channels: u8,
    #[command(flatten)]
    pub(crate) compression: CompressionArgs,
    /// Where zero pages are looked for, and how they travel; auto is multifd
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub(crate) zero_page_detection: ZeroPagesArg,
    /// Bytes a second over all connections while the guest runs, like 100M; 0 is no limit
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size)]
    pub(crate) max_bandwidth: u64,
    /// Bytes a second to reckon with once the guest has been stopped; 0 takes what was measured
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size)]
    pub(crate) avail_switchover_bandwidth: u64,
    /// Milliseconds that the guest may stand still
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(..=DOWNTIME_LIMIT.most))]
    pub(crate) downtime_limit: u64,
    #[command(flatten)]
    pub(crate) converge: ConvergeArgs,
    /// Bytes of memory that the guest writes a second
    #[arg(long, value_name = "RATE", default_value = "200M", value_parser = size)]
    pub(crate) dirty_rate: u64,
    /// Have the system read pages where they are; on one machine it copies them all the same
    #[arg(long)]
    pub(crate) zero_copy_send: bool,
    /// Print one JSON object at the end instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct DemoDestinationArgs {
    pub(crate) listen: Address,
}
