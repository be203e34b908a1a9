//! The command line of `multifd demo`, and of the second process that it starts.

use std::time::Duration;

use clap::Args as ClapArgs;
use multifd::{
    channel::Address,
    live::MigrateOptions,
    parameters::{
        CPU_THROTTLE_INCREMENT, CPU_THROTTLE_INITIAL, DOWNTIME_LIMIT, MAX_CPU_THROTTLE, Parameter,
        STALL_TIMEOUT, THROTTLE_TRIGGER_THRESHOLD,
    },
};

use super::{
    compression::CompressionArgs,
    shared::{
        ZeroPagesArg, default_seconds, limit, milliseconds, number, rate, seconds, size, small_default,
    },
};

#[derive(Debug, ClapArgs)]
pub(crate) struct DemoArgs {
    /// Size of the guest's memory in bytes, for example 512M or 4G (M = 1024 K)
    #[arg(long, default_value = "1G", value_parser = size)]
    pub(crate) size: u64,
    /// Number of channels, 1 to 255
    #[arg(long, alias = "channels", value_name = "N", default_value_t = 4, value_parser = number::<u8>(1, 255))]
    pub(crate) multifd_channels: u8,
    #[command(flatten)]
    pub(crate) compression: CompressionArgs,
    /// How zero pages are found and sent
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub(crate) zero_page_detection: ZeroPagesArg,
    /// Limit in bytes per second over all connections while the guest runs, for example 100M (M = 1024 K); 0 = no limit
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = rate)]
    pub(crate) max_bandwidth: u64,
    /// Assumed bandwidth in bytes per second after the guest is stopped; 0 = as measured
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = rate)]
    pub(crate) avail_switchover_bandwidth: u64,
    /// Longest planned downtime of the guest, in milliseconds or with a unit (2s)
    #[arg(long, value_name = "TIME", default_value = DOWNTIME_LIMIT.default.to_string(), value_parser = milliseconds(DOWNTIME_LIMIT))]
    pub(crate) downtime_limit: Duration,
    #[command(flatten)]
    pub(crate) converge: ConvergeArgs,
    /// Time limit for a second process that accepts no data, in seconds or with a unit (500ms, 2m); 0 = no limit
    #[arg(long, value_name = "TIME", default_value = default_seconds(STALL_TIMEOUT), value_parser = seconds)]
    stall_timeout: Duration,
    /// Rate in bytes per second at which the guest writes to its memory
    #[arg(long, value_name = "RATE", default_value = "200M", value_parser = rate)]
    pub(crate) dirty_rate: u64,
    /// Send pages without copying them; on one machine the kernel copies anyway
    #[arg(long)]
    pub(crate) zero_copy_send: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

impl DemoArgs {
    /// `None` is no limit.
    pub(crate) fn stall_timeout(&self) -> Option<Duration> {
        limit(self.stall_timeout)
    }
}

/// How the demo deals with a guest that writes too fast.
#[derive(Clone, Copy, Debug, ClapArgs)]
pub(crate) struct ConvergeArgs {
    /// Slow the guest down step by step if it writes too fast for the downtime limit
    #[arg(long)]
    auto_converge: bool,
    /// First step of the throttle: percent of time that the guest is paused, 1 to 99
    #[arg(long, value_name = "PERCENT", default_value_t = small_default(CPU_THROTTLE_INITIAL), value_parser = percent(CPU_THROTTLE_INITIAL))]
    cpu_throttle_initial: u8,
    /// Further steps of the throttle: percent of time added with each step, 1 to 99
    #[arg(long, value_name = "PERCENT", default_value_t = small_default(CPU_THROTTLE_INCREMENT), value_parser = percent(CPU_THROTTLE_INCREMENT))]
    cpu_throttle_increment: u8,
    /// Highest throttle: percent of time that the guest is paused, cpu-throttle-initial to 99
    #[arg(long, value_name = "PERCENT", default_value_t = small_default(MAX_CPU_THROTTLE), value_parser = percent(MAX_CPU_THROTTLE))]
    max_cpu_throttle: u8,
    /// Use a smaller step of the throttle if it is expected to be enough
    #[arg(long)]
    cpu_throttle_tailslow: bool,
    /// Throttle the guest if it writes more than this percentage of the bytes sent, 1 to 100
    #[arg(long, value_name = "PERCENT", default_value_t = small_default(THROTTLE_TRIGGER_THRESHOLD), value_parser = percent(THROTTLE_TRIGGER_THRESHOLD))]
    throttle_trigger_threshold: u8,
    /// Wait for a line on standard input after the guest is stopped
    #[arg(long)]
    pub(crate) pause_before_switchover: bool,
    /// Fail after this number of passes with the guest running; 0 = no limit
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = number::<u64>(0, u64::MAX))]
    max_passes: u64,
    /// Fail if the guest is not stopped after this time, in seconds or with a unit (500ms, 2m); 0 = no limit
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = seconds)]
    max_total_time: Duration,
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
            .max_total_time(Some(self.max_total_time))
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct DemoDestinationArgs {
    pub(crate) listen: Address,
}

fn percent(range: Parameter) -> impl Fn(&str) -> Result<u8, String> + Clone + Send + Sync + 'static {
    number(range.least, range.most)
}
