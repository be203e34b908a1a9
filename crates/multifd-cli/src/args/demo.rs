//! The command line of `multifd demo`, and of the second process that it starts.

use std::time::Duration;

use clap::{Args as ClapArgs, builder::RangedU64ValueParser};
use multifd::{
    channel::Address,
    live::MigrateOptions,
    parameters::{
        CPU_THROTTLE_INCREMENT, CPU_THROTTLE_INITIAL, DOWNTIME_LIMIT, MAX_CPU_THROTTLE, Range,
        THROTTLE_TRIGGER_THRESHOLD,
    },
};

use super::shared::{CompressionArgs, ZeroPagesArg, size};

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

/// How the demo deals with a guest that writes too fast.
#[derive(Clone, Copy, Debug, ClapArgs)]
pub(crate) struct ConvergeArgs {
    /// Hold the guest back, step by step, if it writes too fast to be stopped within the downtime
    #[arg(long)]
    auto_converge: bool,
    /// Per cent of time that the guest stands at first, 1 to 99
    #[arg(long, value_name = "PERCENT", default_value_t = 20, value_parser = percent(CPU_THROTTLE_INITIAL))]
    cpu_throttle_initial: u8,
    /// Per cent of time that it stands more with each step, 1 to 99
    #[arg(long, value_name = "PERCENT", default_value_t = 10, value_parser = percent(CPU_THROTTLE_INCREMENT))]
    cpu_throttle_increment: u8,
    /// Per cent of time that it stands at the most, cpu-throttle-initial to 99
    #[arg(long, value_name = "PERCENT", default_value_t = 99, value_parser = percent(MAX_CPU_THROTTLE))]
    max_cpu_throttle: u8,
    /// Take smaller steps where they are reckoned to be enough
    #[arg(long)]
    cpu_throttle_tailslow: bool,
    /// Per cent of what was sent that the guest may write meanwhile, 1 to 100, before it is held back
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = percent(THROTTLE_TRIGGER_THRESHOLD))]
    throttle_trigger_threshold: u8,
    /// Wait for a line on standard input when the guest has been stopped
    #[arg(long)]
    pub(crate) pause_before_switchover: bool,
    /// Give up after so many passes with the guest running; 0 is no bound
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_passes: u64,
    /// Give up if the guest has not been stopped after so many seconds; 0 is no bound
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    max_total_time: u64,
}

impl ConvergeArgs {
    pub(crate) fn apply(self, options: MigrateOptions) -> MigrateOptions {
        options
            .auto_converge(self.auto_converge)
            .cpu_throttle_initial(self.cpu_throttle_initial)
            .cpu_throttle_increment(self.cpu_throttle_increment)
            .max_cpu_throttle(self.max_cpu_throttle)
            .cpu_throttle_tailslow(self.cpu_throttle_tailslow)
            .throttle_trigger_threshold(self.throttle_trigger_threshold)
            .pause_before_switchover(self.pause_before_switchover)
            .max_passes(Some(self.max_passes))
            .max_total_time(Some(Duration::from_secs(self.max_total_time)))
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct DemoDestinationArgs {
    pub(crate) listen: Address,
}

fn percent(range: Range) -> RangedU64ValueParser<u8> {
    RangedU64ValueParser::new().range(range.least..=range.most)
}
