//! Measures the engine, QEMU 10.0 and iperf3: all of them in one run, in turns. `cargo xtask bench` runs it.
//!
//! ```text
//! cases ── what is moved, which peers take part, the targets
//!   └▶ run ── rounds, the peers in turns ──▶ measure ── medians ──▶ report: Markdown, JSON, SVG
//!        └▶ peer ── QEMU, iperf3, and this program: engine
//! ```
//!
//! Messages go to standard error, the table to standard output.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line program prints its results")]

mod cases;
mod contents;
mod delta;
mod engine;
mod error;
mod first_instruction;
mod free;
mod look;
mod measure;
mod peer;
mod postcopy;
mod report;
mod requests;
mod run;
mod snapshots;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
pub(crate) use error::{Error, Result};

#[derive(Debug, Parser)]
#[command(name = "multifd-bench", version, max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Measure, and write results.md, results.json and channels.svg
    Run(run::RunArgs),
    /// Measure how soon a guest runs that is restored out of a file
    FirstInstruction(first_instruction::FirstInstructionArgs),
    /// Measure how long a destination of post-copy waits for a page
    Requests(requests::RequestsArgs),
    /// Measure how long a guest waits that moves before its memory, over a line with a limit, beside QEMU
    Postcopy(postcopy::PostcopyArgs),
    /// Measure captures that store only what changed
    Delta(delta::DeltaArgs),
    /// Measure what a snapshot of a running machine costs: pauses, slow-downs, faults, deltas, a hand-over
    Snapshots(snapshots::SnapshotsArgs),
    /// Measure exporting and searching the memory of a stored guest, beside dd and volatility3
    Look(look::LookArgs),
    /// Be a source: fill RAM, then migrate once for each line of standard input
    #[command(hide = true)]
    Source(engine::SourceArgs),
    /// Be a destination of one migration
    #[command(hide = true)]
    Destination(engine::DestinationArgs),
}

fn main() -> ExitCode {
    let outcome = match Args::parse().verb {
        Verb::Run(args) => run::run(&args),
        Verb::FirstInstruction(args) => first_instruction::run(&args),
        Verb::Requests(args) => requests::run(&args),
        Verb::Postcopy(args) => postcopy::run(&args),
        Verb::Delta(args) => delta::run(&args),
        Verb::Snapshots(args) => snapshots::run(&args),
        Verb::Look(args) => look::run(&args),
        Verb::Source(args) => engine::source(&args),
        Verb::Destination(args) => engine::destination(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("multifd-bench: {}", multifd::error::chain(&*error));
            ExitCode::FAILURE
        }
    }
}
