//! A guest that moves before its memory: how long its threads wait, beside QEMU's own post-copy, over the same line.
//!
//! ```text
//! network namespace ── lo, with the limit of `tc` (tbf)
//!    ├── QEMU ═══ lo ═══ relay ══ unix ══ QEMU      the relay notes when a request passes, and when its page comes
//!    └── us ═════ lo ═══ us                         the pager notes when a fault is read, and when its page is placed
//! ```
//!
//! Both guests have one thread that rewrites its pages as fast as it can, in order or with a stride.

mod line;
mod machine;
mod ours;
mod qemu;
mod sample;

use std::{path::PathBuf, time::Duration};

use clap::Args;

use crate::{Result, first_instruction::median};
use machine::Rewrites;
use ours::Passes;
use sample::Sample;

#[derive(Debug, Args)]
pub(crate) struct PostcopyArgs {
    /// Not used: the library is measured
    #[arg(long, hide = true)]
    program: Option<PathBuf>,
    /// How often everything is measured; medians are shown
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Limit of the line, as `tc` reads it
    #[arg(long, default_value = "1gbit")]
    rate: String,
    /// What the guest rewrites, in MiB
    #[arg(long, default_value_t = 64)]
    memory: u64,
    /// How many pages are between one that the guest rewrites and the next: 1 is in order
    #[arg(long, default_value_t = 1)]
    stride: u64,
    /// This process is in a network namespace with the line
    #[arg(long, hide = true)]
    inside: bool,
}

/// Measures, and prints a table.
pub(crate) fn run(args: &PostcopyArgs) -> Result<()> {
    if !args.inside {
        return line::enter(&args.rate);
    }
    line::limit(&args.rate)?;
    println!("| Migration | Faults | Wait, p50 | p99 | Waited in all | Downtime | Total | MiB sent |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    let mut rows: Vec<(String, Vec<Sample>)> = Vec::new();
    let mut add = |label: String, sample: Sample| {
        eprintln!("{label}: {sample:?}");
        match rows.iter_mut().find(|(known, _)| *known == label) {
            Some((_, samples)) => samples.push(sample),
            None => rows.push((label, vec![sample])),
        }
    };
    let rewrites = Rewrites { memory: args.memory, stride: args.stride };
    for _ in 0..args.rounds {
        for preempt in [false, true] {
            let with = if preempt { "with preempt" } else { "one connection" };
            add(format!("QEMU 10.0, {with}"), qemu::measure(rewrites, preempt)?);
        }
        let mut longest = Duration::ZERO;
        for channels in [1, 2, 4, 8] {
            let sample = ours::measure(rewrites, channels, Passes::First)?;
            longest = longest.max(sample.total);
            add(format!("us, {channels} channels"), sample);
        }
        add("us, 4 channels, two passes first".to_owned(), ours::measure(rewrites, 4, Passes::Two)?);
        let cancelled = ours::measure(rewrites, 4, Passes::Endless(4 * longest))?;
        add("us, 4 channels, pre-copy, cancelled".to_owned(), cancelled);
    }
    for (label, samples) in rows {
        println!("| {label} | {} |", columns(&samples));
    }
    Ok(())
}

/// The medians of what was measured.
fn columns(samples: &[Sample]) -> String {
    let number = |of: fn(&Sample) -> u64| median(samples.iter().map(of).collect());
    let time = |of: fn(&Sample) -> Duration| match median(samples.iter().map(of).collect()) {
        Duration::ZERO => "–".to_owned(),
        time if time < Duration::from_millis(10) => format!("{} µs", time.as_micros()),
        time => format!("{} ms", time.as_millis()),
    };
    [
        number(|sample| sample.faults).to_string(),
        time(|sample| sample.p50),
        time(|sample| sample.p99),
        time(|sample| sample.blocked),
        time(|sample| sample.downtime),
        time(|sample| sample.total),
        (number(|sample| sample.bytes) >> 20).to_string(),
    ]
    .join(" | ")
}
