//! How the demo deals with a guest that writes too fast, and who lets a migration go on that waits.

use std::{io, thread::Builder, time::Duration};

use clap::{Args, builder::RangedU64ValueParser};
use multifd::{
    live::{Control, MigrateOptions},
    parameters::{
        CPU_THROTTLE_INCREMENT, CPU_THROTTLE_INITIAL, MAX_CPU_THROTTLE, Range, THROTTLE_TRIGGER_THRESHOLD,
    },
};

use crate::outcome::say;

#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ConvergeArgs {
    /// Slow the guest down step by step if it writes too fast for the downtime limit
    #[arg(long)]
    auto_converge: bool,
    /// First step of the throttle: percent of time that the guest is paused, 1 to 99
    #[arg(long, value_name = "PERCENT", default_value_t = 20, value_parser = percent(CPU_THROTTLE_INITIAL))]
    cpu_throttle_initial: u8,
    /// Further steps of the throttle: percent of time added with each step, 1 to 99
    #[arg(long, value_name = "PERCENT", default_value_t = 10, value_parser = percent(CPU_THROTTLE_INCREMENT))]
    cpu_throttle_increment: u8,
    /// Highest throttle: percent of time that the guest is paused, cpu-throttle-initial to 99
    #[arg(long, value_name = "PERCENT", default_value_t = 99, value_parser = percent(MAX_CPU_THROTTLE))]
    max_cpu_throttle: u8,
    /// Use a smaller step of the throttle if it is expected to be enough
    #[arg(long)]
    cpu_throttle_tailslow: bool,
    /// Throttle the guest if it writes more than this percentage of the bytes sent, 1 to 100
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = percent(THROTTLE_TRIGGER_THRESHOLD))]
    throttle_trigger_threshold: u8,
    /// Wait for a line on standard input after the guest is stopped
    #[arg(long)]
    pub(super) pause_before_switchover: bool,
    /// Fail after this number of passes with the guest running; 0 = no limit
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_passes: u64,
    /// Fail if the guest is not stopped after this time in seconds; 0 = no limit
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

/// Lets a paused migration continue at the next line, or at the end, of standard input. The thread is not joined: a user who does not
/// press a key does not delay the end.
pub(super) fn proceed_at_a_line(control: Control) -> io::Result<()> {
    let wait = move || {
        if control.wait_pre_switchover() {
            say("the guest is stopped; press Enter to switch over");
            let _ = io::stdin().read_line(&mut String::new());
            // Whether it still waits is its own affair.
            let _ = control.proceed();
        }
    };
    Builder::new().name("continue".into()).spawn(wait).map(drop)
}

fn percent(range: Range) -> RangedU64ValueParser<u8> {
    RangedU64ValueParser::new().range(range.least..=range.most)
}
