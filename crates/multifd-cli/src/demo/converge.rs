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
    pub(super) pause_before_switchover: bool,
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

/// Lets the migration go on at the next line, or at the end, of standard input. The thread is not joined: whoever does not
/// press a key holds up no end.
pub(super) fn proceed_at_a_line(control: Control) -> io::Result<()> {
    let wait = move || {
        if control.wait_pre_switchover() {
            say("the guest has been stopped; press Enter to switch over");
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
